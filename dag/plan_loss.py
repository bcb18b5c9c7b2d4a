"""What the planner learns from: the plans that explain the numbers which follow in the text.

    12 + 7 * 3 = 33       the model's own plan says 31: all plans of the bank are run, 12 + 7 * 3 gives 33 and so
                          do a few coincidences; the loss is minus the log of their summed probability

- a plan explains a number if its result can be written as the number stands there
- coincidences differ from line to line, so what is right all the time wins; no plan is ever labelled
- no gradient passes through values

Legend: N numbers, H hits, K inputs, D steps, F formats.
"""

import math
from collections import Counter

import torch
import torch.nn as nn

from dag.exact_arithmetic import FORMATS
from dag.number_lexer import Following
from dag.plan_search import PlanBank, Plans, Target, logsumexp_by_group, run
from dag.planner import DAGPlanPredictor, Sight

EXACT = FORMATS.index("exact")


def target_at(following: Following, at) -> Target:
    """The numbers that open after the positions `at`."""
    slash, places = following.slash[at], following.places[at]
    ends_in_zero = (places > 0) & (following.mantissa[at] % 10 == 0)
    value = following.fraction_value[at].where(slash, following.value[at])
    return Target(value, places.masked_fill(slash, -1), ends_in_zero)


class PlanLoss(nn.Module):
    """The planner's loss. `hits` counts, from step to step, what came of the numbers. It has no weights."""

    def __init__(self, config, names: list[str]):
        super().__init__()
        self.config = config
        self.names, self.hits, self.bank = names, Counter(), None
        if config.dag_plan == "searched":
            self.bank = PlanBank(
                names,
                leaves=min(config.dag_leaves, config.dag_num_inputs),
                depth=config.dag_depth,
                max_run=config.dag_max_searched_plans,
                max_found=config.dag_max_consistent_plans,
            )

    def forward(
        self, planner: DAGPlanPredictor, plans: Plans, sight: Sight, target: Target, odds: torch.Tensor
    ) -> torch.Tensor:
        """Minus the mean log-probability of what explains N numbers: the model's own plan (N, D) where it computes it,
        else every plan that is found. () in nats; numbers without any do not count. `odds` (N,) of a search.
        """
        plans, values = planner.canonical(plans), sight.values.detach()
        result = run(plans, values, self.names)
        matched = target.matches(result)
        computed = matched & (planner.comparisons(plans) < 0)
        own = computed.nonzero().squeeze(1)
        missed = (~computed & (torch.rand_like(odds) < odds)).nonzero().squeeze(1)
        missed = missed[torch.randperm(len(missed), device=missed.device)]
        if self.bank is not None:
            found, found_plans, found_results = self.bank.search(values[missed], target[missed])
        else:
            found, found_plans, found_results = self.draw(planner, sight[missed], target[missed])
        n = torch.cat([own, missed[found]])  # (H,): the number that a hit explains
        hits = Plans(*(torch.cat(pair) for pair in zip(plans[own], found_plans)))
        right = target[n].formats(torch.cat([result[own], found_results]))  # (H, F)
        written = right.any(-1)
        n, hits, right = n[written], hits[written], right[written]
        is_strict = torch.rand_like(odds) < self.config.dag_strict_probability
        counts = compared_enough(planner.comparisons(hits), n, is_strict)
        n, hits, right = n[counts], hits[counts], right[counts]
        numbers, group = n.unique(return_inverse=True)
        counted = dict(searched=len(missed), found=len(found.unique()), explained=len(numbers), plans=len(n))
        self.hits.update(
            numbers=len(odds), own=int(matched.sum()), **counted
        )  # the host waits for the device
        if len(n) == 0:  # every parameter takes part in every step, or distributed training would wait
            return 0.0 * sum(parameter.sum() for parameter in planner.parameters())
        sight = sight[numbers]
        context, keys = planner.read(sight.hidden, sight.readers)
        log_p, formats = planner.log_probability(context[group], keys[group], sight.inputs[group], hits)
        log_p = log_p + (formats + format_weights(right, self.config.dag_other_format_weight)).logsumexp(-1)
        return -logsumexp_by_group(log_p, group, len(numbers)).mean()

    @torch.no_grad()
    def draw(
        self, planner: DAGPlanPredictor, sight: Sight, target: Target
    ) -> tuple[torch.Tensor, Plans, torch.Tensor]:
        """What PlanBank.search does, among plans that the planner draws."""
        values, known = sight.values, (*planner.read(sight.hidden, sight.readers), sight.inputs)
        number = torch.arange(len(values), device=values.device).repeat_interleave(self.config.dag_samples)
        plans = planner.canonical(
            planner(*(part[number] for part in known), explore=self.config.dag_exploration)[0]
        )
        right = (
            target[number]
            .matches(run(plans, values[number], self.names))
            .nonzero()
            .squeeze(1)[: self.config.dag_max_consistent_plans]
        )
        hits = torch.cat([number[:, None], *tuple(plans)], dim=1)[right].unique(dim=0)
        number, plans = hits[:, 0], Plans(*hits[:, 1:].chunk(3, dim=1))
        return number, plans, run(plans, values[number], self.names)


def compared_enough(compared: torch.Tensor, n: torch.Tensor, is_strict: torch.Tensor) -> torch.Tensor:
    """Which hits (H,) of numbers `n` are to count. Of those that copy or compare alone, only those that compare the
    most where their number is_strict (N,); `compared` is planner.comparisons of them.

    max(a, b) is always also a copy of a or of b, and max(a, max(b, c)) that of two of them. Trunks soon learn to
    compare short numbers and to say which, and nothing would be left for `max` to explain.
    """
    most = torch.zeros_like(is_strict, dtype=compared.dtype).scatter_reduce(0, n, compared, "amax")
    return (compared < 0) | (compared == most[n]) | ~is_strict[n]


def format_weights(right: torch.Tensor, other_weight: float) -> torch.Tensor:
    """Which formats (H, F) are right for hits -> what is added to their log-probabilities: -inf for those that are wrong,
    and a little less than 0 for the others where the exact one is right.

    Sums of six digits are the same to 8 digits, to 12 and exactly; those of twenty are not. So the exact one is learned
    where it is right more than (1 + other_weight) / 2 as often as another, and one that rounds where text asks for rounding.
    """
    other = torch.arange(len(FORMATS), device=right.device) != EXACT
    weights = torch.zeros(right.shape, device=right.device).masked_fill(~right, -torch.inf)
    return weights.masked_fill(
        right & right[:, EXACT, None] & other, math.log(other_weight) if other_weight else -torch.inf
    )
