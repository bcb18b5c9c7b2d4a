"""How a plan is made: which operation on which slots, step by step, and how the result is to be written.

- DAGPlanPredictor: choices one after another, each given those before it; learns from plans that explain the text
- MixedPlanPredictor: all choices at once, soft or straight-through, learned by gradient through the result
- LearnedNumbers: what a number is worth as a learned map of the hidden state that has read it

Legend: C width, E width of the planner, K inputs, D steps, S = K + D slots, O operations, F formats, N plans.
"""

import math
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F

from dag import dense, exact_arithmetic
from dag.plan_search import Plans


class Sight(NamedTuple):
    """What the plans at N positions are made from."""

    hidden: torch.Tensor  # (N, C), where the plan is made
    readers: torch.Tensor  # (N, up to K, C), where the numbers at hand were completed, the newest first
    inputs: torch.Tensor  # (N, K) bool: which of K numbers there are
    values: torch.Tensor  # (N, K) float64, NaN where there is none

    def __getitem__(self, rows) -> "Sight":
        return Sight(*(part.index_select(0, rows) for part in tuple(self)))


class SlotReader(nn.Module):
    """What a planner knows of the slots: K numbers that were read, and the results of D steps."""

    def __init__(self, config):
        super().__init__()
        C, E = config.n_embd, config.n_embd // 2
        self.width, self.num_inputs, self.depth = E, config.dag_num_inputs, config.dag_depth
        self.num_slots = self.num_inputs + self.depth
        self.context = nn.Linear(C, E)  # of the hidden state before the number that is planned
        self.key = nn.Linear(C, E)  # of an input, from the hidden state at the token that completed it
        self.slot = nn.Embedding(self.num_slots, E)
        earlier = torch.ones(self.depth, self.depth, dtype=torch.bool).tril(-1)
        self.register_buffer("earlier", earlier, persistent=False)  # which results each step sees

    def read(self, hidden, readers) -> tuple[torch.Tensor, torch.Tensor]:
        """Hidden states where plans are made (N, C), and where the newest numbers were read (N, up to K, C) -> contexts
        (N, E), keys of all slots (N, S, E).
        """
        keys = F.pad(self.key(readers), (0, 0, 0, self.num_inputs - readers.size(1)))
        inputs, results = self.slot.weight.split([self.num_inputs, self.depth])
        return self.context(hidden), torch.cat([inputs + keys, results.expand(len(keys), -1, -1)], dim=1)

    def mask(self, inputs: torch.Tensor) -> torch.Tensor:
        """Which inputs there are (N, K) -> what is added to the scores of the slots in each step (N, D, S): 0 for those
        that the step sees, -inf for the others.
        """
        N, D = len(inputs), self.depth
        visible = torch.cat([inputs[:, None].expand(-1, D, -1), self.earlier.expand(N, -1, -1)], dim=-1)
        return visible.float().log()


class DAGPlanPredictor(SlotReader):
    """Draws plans step by step: operation, operand 1, operand 2, each given the choices before it.

    Step s sees the visible inputs and the results of steps 0..s-1, that is slots 0..K+s-1. `identity` ends a
    plan: the steps after it are not chosen, they pass the result on. What a plan has chosen so far enters as a
    sum of embeddings, so the log-probability of a given plan takes one pass over all its steps.
    """

    def __init__(self, config, names: list[str]):
        super().__init__(config)
        D, O, E = self.depth, len(names), self.width
        self.end = names.index("identity")
        for property in ("binary", "commutative"):
            of_operation = [getattr(exact_arithmetic.OPERATIONS[name], property) for name in names]
            self.register_buffer(property, torch.tensor(of_operation), persistent=False)
        compares = torch.tensor([name in ("max", "min") for name in names])
        self.register_buffer("compares", compares, persistent=False)
        steps = [[self.end, self.num_inputs - 1 + step, 0] for step in range(D)]  # once a plan has ended
        self.register_buffer("no_steps", torch.tensor(steps), persistent=False)
        self.step = nn.Embedding(D + 1, E)
        sizes = dict(operation=O, operand1=self.num_slots, operand2=self.num_slots)
        self.chosen = nn.ModuleDict({name: nn.Embedding(D * size, E) for name, size in sizes.items()})
        self.norm = nn.LayerNorm(E, bias=config.bias)
        self.mlp = nn.Sequential(nn.Linear(E, 4 * E), nn.GELU(approximate="tanh"), nn.Linear(4 * E, E))
        self.operation_score = nn.Linear(E, O)
        self.query1, self.query2 = nn.Linear(E, E), nn.Linear(E, E)
        self.operation_in_query1, self.operation_in_query2 = nn.Embedding(O, E), nn.Embedding(O, E)
        self.operand1_in_query2 = nn.Embedding(self.num_slots, E)
        self.format_score = nn.Linear(E, len(exact_arithmetic.FORMATS))

    def state(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.mlp(self.norm(x))

    def operand1_score(self, state, operation, keys, mask) -> torch.Tensor:
        """(N, ..., E), (N, ...), (N, S, E), (N, ..., S) -> (N, ..., S), -inf where a slot is not seen"""
        return self._attend(self.query1(state) + self.operation_in_query1(operation), keys, mask)

    def operand2_score(self, state, operation, operand1, keys, mask) -> torch.Tensor:
        choices = self.operation_in_query2(operation) + self.operand1_in_query2(operand1)
        return self._attend(self.query2(state) + choices, keys, mask)

    def _attend(self, query, keys, mask) -> torch.Tensor:
        return torch.einsum("n...c,nsc->n...s", query, keys).float() / math.sqrt(keys.size(-1)) + mask

    def remember(self, step, operation, operand1, operand2) -> torch.Tensor:
        """What a step has chosen, (N,) or (N, D) each, as a vector (..., E)."""
        O, S = len(self.binary), self.num_slots
        return (
            self.chosen["operation"](step * O + operation)
            + self.chosen["operand1"](step * S + operand1)
            + self.chosen["operand2"](step * S + operand2)
        )

    def forward(
        self, context, keys, inputs, explore: float | None = None
    ) -> tuple[Plans, torch.Tensor, torch.Tensor]:
        """Contexts (N, E), slot keys (N, S, E), visible inputs (N, K) -> plans, their log-probability (N,), and
        that of every format (N, F). Takes the likeliest choices one after another; with `explore`, in [0, 1), draws
        them, and so often takes any choice there is.
        """
        D, mask, x = self.depth, self.mask(inputs), context.float()
        log_p = x.new_zeros(len(x))
        plans, last, total = self.no_steps.repeat(len(x), 1, 1), torch.empty_like(x), torch.empty_like(log_p)
        going = torch.arange(len(x), device=x.device)  # plans that have not ended

        def choose(scores):
            log_probability = F.log_softmax(scores.float(), dim=-1)
            if explore is None:
                likeliest = log_probability.max(-1)
                return likeliest.indices, likeliest.values
            possible = scores > -torch.inf
            drawn_from = (1 - explore) * log_probability.exp()
            drawn_from = drawn_from + explore * possible / possible.sum(-1, keepdim=True)
            gumbel = -torch.empty_like(drawn_from).exponential_().log()
            choice = (drawn_from.log() + gumbel).argmax(-1)
            return choice, log_probability.gather(-1, choice[:, None]).squeeze(1)

        for step in range(D):
            if len(going) == 0:
                break
            state, seen = self.state(x + self.step.weight[step]), mask[:, step]
            operation, log_p0 = choose(self.operation_score(state))
            operand1, log_p1 = choose(self.operand1_score(state, operation, keys, seen))
            operand2, log_p2 = choose(self.operand2_score(state, operation, operand1, keys, seen))
            goes_on = (operation != self.end).nonzero().squeeze(1)  # the host waits for the device
            binary = self.binary[operation]
            chosen = operation, operand1, operand2 * binary
            plans[going, step] = torch.stack(chosen, dim=-1)
            x, log_p = x + self.remember(step, *chosen), log_p + (log_p0 + log_p1 + log_p2 * binary)
            if step == D - 1 or len(goes_on) < len(going):
                last[going], total[going] = x, log_p
            if len(goes_on) < len(going):
                parts = going, x, log_p, keys, mask
                going, x, log_p, keys, mask = (part.index_select(0, goes_on) for part in parts)
        formats = self.formats(self.state(last + self.step.weight[D]))
        return Plans(*plans.unbind(-1)), total, formats

    def choices(self, context, keys, inputs, plans: Plans) -> tuple[torch.Tensor, ...]:
        """Log-probabilities of everything that the steps of given plans could have chosen in its place: operations
        (N, D, O), slots as operand 1 and as operand 2 (N, D, S), formats (N, F).
        """
        D, mask = self.depth, self.mask(inputs)
        operation, operand1, operand2 = plans
        over = self.is_over(operation)[..., None]
        chosen = self.remember(torch.arange(D, device=context.device), *plans).masked_fill(over, 0.0)
        before = F.pad(chosen.cumsum(1), (0, 0, 1, 0))  # (N, D + 1, E)
        state = self.state(context[:, None] + before + self.step.weight)
        scores = (
            self.operation_score(state[:, :D]),
            self.operand1_score(state[:, :D], operation, keys, mask),
            self.operand2_score(state[:, :D], operation, operand1, keys, mask),
        )
        return *(F.log_softmax(score.float(), dim=-1) for score in scores), self.formats(state[:, D])

    def log_probability(self, context, keys, inputs, plans: Plans) -> tuple[torch.Tensor, torch.Tensor]:
        """As forward, for given plans: their log-probability (N,), and that of every format (N, F)."""
        *choices, formats = self.choices(context, keys, inputs, plans)
        operation, operand1, operand2 = plans
        binary, over = self.binary[operation], self.is_over(operation)
        operand2 = operand2.where(binary, operand1)  # any visible slot: its gradient is masked below
        log_p, log_p1, log_p2 = (
            log_p.gather(-1, chosen[..., None]).squeeze(-1)
            for log_p, chosen in zip(choices, (operation, operand1, operand2))
        )
        return (log_p + log_p1 + log_p2.masked_fill(~binary, 0.0)).masked_fill(over, 0.0).sum(1), formats

    def is_over(self, operation: torch.Tensor) -> torch.Tensor:
        """(N, D) -> (N, D) bool: the steps after the one that ended the plan"""
        ends = operation == self.end
        return ends.cumsum(1) - ends.long() > 0

    def formats(self, state: torch.Tensor) -> torch.Tensor:
        return F.log_softmax(self.format_score(state).float(), dim=-1)

    def comparisons(self, plans: Plans) -> torch.Tensor:
        """(N,) int64: the steps of a plan that only says which of its inputs is the largest or smallest, 0 for a copy;
        -1 for all that compute something.
        """
        over, compares = self.is_over(plans.operation), self.compares[plans.operation]
        alone = (compares | over | (plans.operation == self.end)).all(1)
        return (compares & ~over).sum(1).where(alone, -1)

    def canonical(self, plans: Plans) -> Plans:
        """The same computations, with the operands of a + b and the like in the order of their slots."""
        operation, operand1, operand2 = plans
        swap = self.commutative[operation] & (operand1 > operand2)
        return Plans(operation, operand2.where(swap, operand1), operand1.where(swap, operand2))


class MixedPlanPredictor(SlotReader):
    """Chooses operands and operations of all steps at once, as dense_dag.PLANS says; formats are not chosen."""

    format = exact_arithmetic.FORMATS.index("digits_12")  # what float64 can tell apart

    def __init__(self, config, names: list[str]):
        super().__init__(config)
        self.names, self.choose = names, dense.PLANS[config.dag_plan]
        self.query = nn.Linear(self.width, self.depth * 2 * self.width)
        self.operation_score = nn.Linear(self.width, self.depth * len(names))

    def forward(self, context, keys, inputs, values) -> tuple[torch.Tensor, Plans, torch.Tensor]:
        """Contexts (N, E), slot keys (N, S, E), visible inputs (N, K), values (N, K) -> results (N,), float64, NaN where
        there is none; the likeliest choices; their log-probability (N,).
        """
        N, D, E = len(context), self.depth, self.width
        query = self.query(context).view(N, D, 2, E) / math.sqrt(E)
        scores = torch.einsum("ndke,nse->ndks", query, keys).float() + self.mask(inputs)[:, :, None]
        operation_scores = self.operation_score(context).view(N, D, len(self.names)).float()
        plan = dense.Plan(self.choose(scores)[:, None], self.choose(operation_scores)[:, None])
        operands, operation = F.log_softmax(scores, -1).max(-1), F.log_softmax(operation_scores, -1).max(-1)
        log_p = operands.values.sum((1, 2)) + operation.values.sum(1)
        likeliest = Plans(operation.indices, *operands.indices.unbind(-1))
        return result_of(plan, values, self.names), likeliest, log_p


def result_of(plan: dense.Plan, values: torch.Tensor, names: list[str]) -> torch.Tensor:
    """Results (N,) of plans over values (N, K), NaN where there is none, with gradients to both."""
    slots, validity = dense.execute(plan, values[:, None], names)
    return slots[:, 0, -1].where(validity[:, 0, -1] > 0.5, torch.nan)


def as_choices(plans: Plans, num_slots: int, num_operations: int) -> dense.Plan:
    """N plans (N, D) as one-hot choices."""
    operands = torch.stack([F.one_hot(slot, num_slots) for slot in (plans.operand1, plans.operand2)], dim=2)
    return dense.Plan(operands[:, None].float(), F.one_hot(plans.operation, num_operations)[:, None].float())


class LearnedNumbers(nn.Module):
    """Whole numbers from the hidden states that have read them (N, K, C) -> (N, K) float64."""

    scale = 100.0  # a unit of the linear map: a fresh model's values already spread

    def __init__(self, config):
        super().__init__()
        self.extract = nn.Linear(config.n_embd, 1)

    def forward(self, readers: torch.Tensor) -> torch.Tensor:
        with torch.autocast(readers.device.type, enabled=False):  # bf16 would lose digits
            value = self.scale * self.extract(readers.float()).squeeze(-1).double()
        return value + (value.round() - value).detach()
