"""What a DAG does, in numbers: gate, norms, plans, hits and gradients, and what it computes at probes.

    watch = Watch.of(model, tokenizer, idx, targets, problems)
    observe(model, watch)       # {"gate_open": 0.19, "gradient/final_hidden": 0.002, ...}: tensors

- statistics are of the model in eval mode; gradients of the loss that it is trained with, on the same text
- gradients come from a forward and backward of their own, through hooks that are gone afterwards: no step
  pays for them, a compiled model is not compiled again, parameters keep the .grad they have, and random
  numbers go on as if nothing had been
- where there is nothing to tell (no numbers, nothing offered), a statistic is missing or NaN

Legend: B batch, T tokens, C width, K inputs, D steps, S = K + D slots, O operations, N plans, M offers.
"""

import contextlib
import math
from collections import Counter
from dataclasses import dataclass
from fractions import Fraction

import torch

from dag import exact_arithmetic, positions
from dag.number_lexer import Lexer
from dag.plan_search import Plans
from dag.proposals import NOTHING
from dag_model import GPT, DAGState, DenseState, DifferentiableDAG
from data.tokenizer import Tokenizer
from evals.answers import Problem, encode
from evals.failures import writable
from inference.explain import explain
from inference.token_stats import has_gate

Tensors = dict[str, torch.Tensor]

PROBES = 3
SCORES = {  # modules of the planners: what comes out of them
    "operation_score": "plan_logits_operation",
    "format_score": "plan_logits_format",
    "result_score": "plan_logits_results",
    "query": "plan_queries_operands",
    "query1": "plan_queries_operand1",
    "query2": "plan_queries_operand2",
}


@dataclass(frozen=True)
class Watch:
    """The text that statistics are of, the same all through a run."""

    tokenizer: Tokenizer
    idx: torch.Tensor  # (B, T)
    targets: torch.Tensor  # (B, T)
    on_numbers: torch.Tensor  # (B, T) bool: a number follows that has others before it in its document
    elsewhere: torch.Tensor  # (B, T) bool: none follows, and none is being written
    probes: tuple[Problem, ...]

    @classmethod
    def of(cls, model: GPT, tokenizer: Tokenizer, idx, targets, problems: list[Problem] = ()) -> "Watch":
        """The shortest of the problems are the probes."""
        separator_id, text = model.config.separator_id, idx.cpu()  # not every device has float64
        lexer = Lexer(tokenizer.vocabulary, separator_id, 1, model.config.dag_thousands)
        following, numerals = positions.following(lexer, text, targets.cpu(), separator_id), lexer(text)
        on_numbers = following.opens & positions.may_compute(lexer, text, numerals)
        elsewhere = ~following.opens & (numerals.offset == 0)
        probes = [problem for problem in problems if writable(tokenizer, problem.answer)]
        probes = tuple(sorted(probes, key=lambda problem: len(problem.prompt))[:PROBES])
        on_numbers, elsewhere = on_numbers.to(idx.device), elsewhere.to(idx.device)
        return cls(tokenizer, idx, targets, on_numbers, elsewhere, probes)


class Record:
    """What went through a DAG and its planner while it was `recorded`."""

    hidden: torch.Tensor  # (B, T, C), what goes in
    mixed: torch.Tensor  # (B, T, C), what comes out: the final hidden states
    state: DAGState | DenseState
    scores: Tensors  # by name in SCORES, as far as they have a gradient


@contextlib.contextmanager
def recorded(dag: torch.nn.Module):
    record = Record()
    record.scores = {}

    def keep(_, inputs, output):
        record.hidden, (record.mixed, record.state) = inputs[0], output

    def keep_scores(name):
        def hook(_, inputs, output):
            if output.requires_grad:
                record.scores[name] = output

        return hook

    handles = [dag.register_forward_hook(keep)]
    for module, name in SCORES.items():
        if hasattr(dag.planner, module):
            handles.append(getattr(dag.planner, module).register_forward_hook(keep_scores(name)))
    try:
        yield record
    finally:
        for handle in handles:
            handle.remove()


def observe(model: GPT, watch: Watch) -> Tensors:
    """All of it, as scalar tensors. `model` is the bare GPT, and is left as it was."""
    if model.dag is None:
        return {}
    gradients = activation_gradients(
        model, watch
    )  # first: autocast remembers weights without gradient from below
    with in_mode(model, training=False), recorded(model.dag) as record:
        model.inspect(watch.idx)
    return (
        (gate_statistics(record.state.gate.squeeze(-1), watch) if has_gate(model) else {})
        | norm_statistics(record)
        | (plan_statistics if model.reads_numbers else dense_statistics)(record.state, model.dag)
        | gradients
    )


@contextlib.contextmanager
def in_mode(model: GPT, training: bool):
    was_training = model.training
    model.train(training)
    try:
        yield
    finally:
        model.train(was_training)


# ----------------------------------------------------------------------------------------------------
# Gate and norms


def gate_statistics(gate: torch.Tensor, watch: Watch) -> Tensors:
    """Of a gate (B, T): mean, standard deviation, and the share above 0.5. Everywhere; on numbers, where it
    is decided whether one is computed; and elsewhere. Positions within a number, where the gate holds, are in
    the first alone.
    """
    where = {"": torch.ones_like(watch.on_numbers)}
    where |= {"_on_numbers": watch.on_numbers, "_elsewhere": watch.elsewhere}
    statistics = {}
    for name, chosen_positions in where.items():
        chosen = gate[chosen_positions].float()
        statistics[f"gate_mean{name}"] = chosen.mean()
        statistics[f"gate_std{name}"] = (chosen - chosen.mean()).square().mean().sqrt()
        statistics[f"gate_open{name}"] = (chosen > 0.5).float().mean()
    return statistics


def norm_statistics(record: Record) -> Tensors:
    """Mean lengths: of hidden states before and behind the DAG, of the vectors that the DAG would put in
    their place or on top of them, before the gate (those of offered digits are as long as dag_scale), and of
    what the DAG changes. `dag_ratio` is dag_norm / hidden_norm. Where nothing is offered does not count.
    """

    def length(vectors):
        return vectors.detach().float().norm(dim=-1).mean()

    before, behind = record.hidden.float(), record.mixed.float()
    if isinstance(record.state, DAGState):
        offered = record.state.offers.symbol != NOTHING
        before, behind = before[offered], behind[offered]
    hidden, dag, mixed, change = map(length, (before, record.state.folded, behind, behind - before))
    return dict(
        hidden_norm=hidden, dag_norm=dag, mixed_norm=mixed, change_norm=change, dag_ratio=dag / hidden
    )


# ----------------------------------------------------------------------------------------------------
# Plans


def plan_statistics(state: DAGState, dag: DifferentiableDAG) -> Tensors:
    """The number of plans, and over all of them: the share that has a result, the mean probability, and
    depth_used. Over their steps, up to the `identity` that ends a plan: how often each operation is used, and
    each input; how many operands are earlier results; and the entropies of these three choices in nats.
    """
    statistics = {"plans": torch.tensor(float(len(state.row)))}
    if len(state.row) == 0:
        return statistics
    operation, operand1, operand2 = plans = Plans(*(part.cpu() for part in state.plans))
    K, S = dag.planner.num_inputs, dag.planner.num_slots
    made = torch.ones_like(operation, dtype=torch.bool)
    if not dag.mixes:  # then every step is chosen
        ended = operation == dag.planner.end
        made = ended.cumsum(1) - ended.long() == 0
    binary = is_binary(dag.names)[operation]
    operation_use = counts(operation[made], len(dag.names))
    operand1_use, operand2_use = counts(operand1[made], S), counts(operand2[made & binary], S)
    operand_use = shares(operand1_use + operand2_use)
    statistics |= {
        "valid_final": torch.tensor([text is not None for text in state.written]).float().mean(),
        "plan_probability": state.log_probability.detach().exp().mean(),
        "depth_used": depth_used(plans, K, dag.names).float().mean(),
        "operation_entropy": entropy(operation_use),
        "operand1_entropy": entropy(operand1_use),
        "operand2_entropy": entropy(operand2_use),
        "operands_from_results": operand_use[K:].sum(),
    }
    statistics |= {f"use/{name}": use for name, use in zip(dag.names, shares(operation_use))}
    return statistics | {f"operand_use/input_{k}": operand_use[k] for k in range(K)}


def dense_statistics(state: DenseState, dag: torch.nn.Module) -> Tensors:
    """The share of valid results, of all steps and of the last; how often each operation is used, how many
    operands are earlier results; entropies in nats of the use of operations and slots, 0 where the DAG always
    does the same: over all positions and steps. Mixtures count in parts; `depth_used` is of the likeliest
    choices.
    """
    operands, operation = state.plan
    D, K = operation.size(2), operands.size(-1) - operation.size(2)
    operation_use = operation.float().mean((0, 1, 2))  # (O,)
    slot_use = operands.float().mean((0, 1, 2))  # (2, S)
    likeliest = Plans(*(part.argmax(-1).flatten(0, 1) for part in (operation, *operands.unbind(3))))
    statistics = {
        "valid_results": state.validity[..., -D:].mean(),
        "valid_final": state.validity[..., -1].mean(),
        "depth_used": depth_used(likeliest, K, dag.names).float().mean(),
        "operation_entropy": entropy(operation_use),
        "operand1_entropy": entropy(slot_use[0]),
        "operand2_entropy": entropy(slot_use[1]),
        "operands_from_results": slot_use[:, -D:].sum() / 2,
    }
    return statistics | {f"use/{name}": use for name, use in zip(dag.names, operation_use, strict=True)}


def depth_used(plans: Plans, num_inputs: int, names: list[str]) -> torch.Tensor:
    """How many steps of N plans (N, D) their results need, those aside that only pass on. (N,)"""
    N, D = plans.operation.shape
    rows = torch.arange(N, device=plans.operation.device)
    binary = is_binary(names).to(rows.device)[plans.operation]
    needed = torch.zeros(N, num_inputs + D, dtype=torch.bool, device=rows.device)
    needed[:, -1] = True
    for step in reversed(range(D)):
        here = needed[:, num_inputs + step]
        needed[rows, plans.operand1[:, step]] |= here
        needed[rows, plans.operand2[:, step]] |= here & binary[:, step]
    passes = [name == "identity" for name in names]
    return (needed[:, num_inputs:] & ~torch.tensor(passes, device=rows.device)[plans.operation]).sum(1)


def is_binary(names: list[str]) -> torch.Tensor:
    return torch.tensor([exact_arithmetic.OPERATIONS[name].binary for name in names])


def counts(chosen: torch.Tensor, length: int) -> torch.Tensor:
    return torch.bincount(chosen, minlength=length).float()


def shares(weights: torch.Tensor) -> torch.Tensor:
    return weights / weights.sum()


def entropy(weights: torch.Tensor) -> torch.Tensor:
    """In nats, of weights that need not sum to 1."""
    return torch.special.entr(shares(weights)).sum()


def hit_statistics(hits: Counter) -> dict[str, float]:
    """Of the numbers that the planner learned from, those with others before them in their document: how many the
    model's own plan explains; of those that were searched for, how many had any explanation found; how many were
    explained in the end, and by how many plans each.
    """
    parts = {
        "own_plan_explains": (hits["own"], hits["numbers"]),
        "search_found": (hits["found"], hits["searched"]),
        "explained": (hits["explained"], hits["numbers"]),
        "hits_per_number": (hits["plans"], hits["explained"]),
    }
    return {name: part / whole for name, (part, whole) in parts.items() if whole}


# ----------------------------------------------------------------------------------------------------
# Gradients


def activation_gradients(model: GPT, watch: Watch) -> Tensors:
    """Lengths of the training loss's gradients: of the final hidden states; of final values, where
    these carry a gradient; and of what the planner's choices are made from, logits also for every operation.

    With literal values and plans that are searched or drawn there are no gradients of values: those of the
    logits come from the plans' likelihood then.
    """
    device = watch.idx.device
    devices = [device] if device.type == "cuda" else []
    hits = model.dag.plan_loss.hits.copy() if model.reads_numbers else None
    with torch.random.fork_rng(devices), in_mode(model, training=True), recorded(model.dag) as record:
        loss = model(watch.idx, watch.targets)[1]
        values = record.state.result if model.reads_numbers else record.state.values
        tensors = {"final_hidden": record.mixed, "final_values": values, **record.scores}
        tensors = {name: x for name, x in tensors.items() if x is not None and x.requires_grad}
        gradients = torch.autograd.grad(loss, list(tensors.values()), allow_unused=True)
    if model.reads_numbers:
        model.dag.plan_loss.hits = hits  # those of training
    found = {name: g.float() for name, g in zip(tensors, gradients) if g is not None}
    norms = {f"gradient/{name}": gradient.norm() for name, gradient in found.items()}
    if "plan_logits_operation" in found:
        names = model.dag.names
        by_operation = found["plan_logits_operation"].flatten().unflatten(0, (-1, len(names))).norm(dim=0)
        norms |= {f"gradient/plan_logits/{name}": norm for name, norm in zip(names, by_operation)}
    return norms


def parameter_gradients(dag: torch.nn.Module) -> Tensors:
    """Lengths of the gradients that the DAG's parts have in .grad, and of the scores of each operation there:
    all micro-steps and processes together, clipped after clipping, and none after `zero_grad`.
    """
    norms = {}
    for part, module in dag.named_children():
        gradients = [p.grad.float().norm() for p in module.parameters() if p.grad is not None]
        if gradients:
            norms[f"gradient_norm/{part}"] = torch.stack(gradients).norm()
    scores = dag.planner.operation_score.weight.grad  # (O, C), or (D * O, C) with scores for every step
    if scores is not None:
        by_operation = scores.float().unflatten(0, (-1, len(dag.names))).norm(dim=(0, 2))  # (O,)
        norms |= {f"gradient_norm/{name}": norm for name, norm in zip(dag.names, by_operation)}
    return norms


# ----------------------------------------------------------------------------------------------------
# Probes


def probe_values(model: GPT, watch: Watch) -> dict[str, float]:
    """What the plan for the answer of each probe computes, step by step: {"probe/0/step_1": 21.0,
    "probe/0/step_2": 33.0, "probe/0/gate": 0.93, ...}. A step without a value, and any where no plan is made,
    is missing.
    """
    look, told = look_at_numbers if model.reads_numbers else look_at_values, {}
    with in_mode(model, training=False):
        for n, problem in enumerate(watch.probes):
            found = look(model, watch.tokenizer, problem)
            told |= {f"probe/{n}/{name}": value for name, value in found.items()}
    return told


def look_at_numbers(model: GPT, tokenizer: Tokenizer, problem: Problem) -> dict[str, float]:
    prompt = encode(tokenizer, problem.prompt)
    thoughts = explain(
        model, tokenizer, prompt + encode(tokenizer, problem.answer), start=len(prompt)
    ).thoughts
    if not thoughts:
        return {"gate": 0.0}
    steps = {
        f"step_{s}": to_float(step.value)
        for s, step in enumerate(thoughts[0].steps, start=1)
        if step.value is not None
    }
    return {"gate": thoughts[0].gate, "plan_probability": thoughts[0].probability, **steps}


def to_float(text: str) -> float:
    """Of a whole number, a decimal or a fraction of any length."""
    try:
        return float(Fraction(text))
    except OverflowError:
        return math.inf


def look_at_values(model: GPT, tokenizer: Tokenizer, problem: Problem) -> dict[str, float]:
    idx = torch.tensor([encode(tokenizer, problem.prompt)[-model.config.block_size :]])
    state = model.inspect(idx.to(model.lm_head.weight.device))
    values, validity = (
        part[0, -1, -model.config.dag_depth :].tolist() for part in (state.values, state.validity)
    )
    steps = {
        f"step_{s}": value for s, (value, there) in enumerate(zip(values, validity), start=1) if there > 0.5
    }
    return {"gate": float(state.gate[0, -1, 0]), **steps}
