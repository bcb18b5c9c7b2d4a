"""What the DAG thought at the numbers of a text: plans as readable expressions, what else it considered, the gate.

    look = explain(model, tokenizer, tokenizer.encode("12+7*3=33\n"))
    thought = look.thoughts[0]
    thought.expression          # "12 + (7 * 3 = 21) = 33"
    thought.gate, thought.probability, thought.alternatives[0].expression
    look.gates                  # of every token

Everything is plain Python, fit for dataclasses.asdict and JSON. A thought is a plan that was made where the text goes on
with a number. Slots are counted as in dag_model.py: inputs first, the newest number in slot 0, then a slot a step.
With soft plans an expression shows the likeliest choices, while what is written comes from the mixture.

Legend: K inputs, D steps, S = K + D slots, O operations, W plans in a beam.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F

import exact
from confidence import gates_of
from dag_model import GPT, DAGState, DifferentiableDAG
from exact import OPERATIONS
from plan_search import Plans
from planner import DAGPlanPredictor, Sight
from tokenizer import Tokenizer

ALTERNATIVES = 3
INFIX = {"add": "+", "subtract": "-", "multiply": "*", "divide": "/", "power": "^"}


@dataclass(frozen=True)
class Number:
    """A number of the text that a plan could use."""

    slot: int
    value: str
    first: int  # tokens
    last: int


@dataclass(frozen=True)
class Step:
    slot: int  # of its result
    operation: str
    operands: tuple[int, ...]  # slots
    value: str | None  # None where it has none
    operation_probability: dict[str, float]  # of all operations; {} where the planner has none
    operand_probability: tuple[dict[int, float], ...]  # of all slots, for each operand


@dataclass(frozen=True)
class Candidate:
    expression: str
    written: str | None
    probability: float


@dataclass(frozen=True)
class Thought:
    position: int  # token before the number
    first: int  # tokens of the number that the text goes on with
    last: int
    text: str  # the number
    expression: str
    written: str | None  # what the plan would write
    followed: bool  # whether this is what the text goes on with
    format: str  # a name of exact.FORMATS
    probability: float  # of plan and format
    gate: float
    inputs: tuple[Number, ...]
    steps: tuple[Step, ...]
    result: int  # its slot: an input's where nothing is computed
    alternatives: tuple[Candidate, ...]  # the likeliest other plans, the likeliest first


@dataclass(frozen=True)
class Unplanned:
    """A number that the text goes on with and no plan was made for."""

    first: int  # tokens
    last: int
    text: str
    reason: str


@dataclass(frozen=True)
class Look:
    begin: int  # the first token looked at: a text longer than the context has lost its beginning
    gates: tuple[float, ...]  # of every token from there on: how far what follows it is what the DAG offers
    thoughts: tuple[Thought, ...]
    unplanned: tuple[Unplanned, ...]


@torch.inference_mode()
def explain(model: GPT, tokenizer: Tokenizer, tokens: list[int], start: int = 0) -> Look:
    """Of the numbers that end at token `start` or later. None without a DAG over the numbers of the text."""
    assert not model.training, "plans are those of a model in eval mode: call model.eval() first"
    begin = max(len(tokens) - model.config.block_size, 0)
    ids = tokens[begin:]
    if not ids:
        return Look(begin, (), (), ())
    idx = torch.tensor([ids], device=model.lm_head.weight.device)
    state = model.inspect(idx)
    gates = tuple(gates_of(state, len(ids)).tolist())
    if not model.reads_numbers:
        return Look(begin, gates, (), ())
    dag, numerals = model.dag, model.dag.lexer(idx)
    visible = numerals.visible[0, :, 0].tolist()
    plan_at = {position: n for n, position in enumerate(state.position.tolist())}
    thoughts, unplanned = [], []
    for first, last in spans_of_numbers(dag, ids, numerals.offset[0].tolist()):
        if begin + last < start:
            continue
        text = tokenizer.decode(ids[first : last + 1])
        n = plan_at.get(first - 1)
        if n is None:
            reason = "the gate was shut" if first > 0 and visible[first - 1] else "no number before it"
            unplanned.append(Unplanned(begin + first, begin + last, text, reason))
            continue
        spans = torch.stack([numerals.first, numerals.last], dim=-1)[0, first - 1].tolist()
        numbers = numbers_of(dag, state, n, ids, spans)
        steps = steps_of(dag, state.plans, n)
        results = exact.run(steps, numbers, dag.digits, dag.operations)
        expression = plan_text(steps, numbers + results, dag.names, state.written[n])
        inputs = tuple(
            Number(slot, value_text(value), begin + span[0], begin + span[1])
            for slot, (value, span) in enumerate(zip(numbers, spans))
            if value is not None
        )
        thoughts.append(
            Thought(
                position=begin + first - 1,
                first=begin + first,
                last=begin + last,
                text=text,
                expression=expression,
                written=state.written[n],
                followed=ids[first : last + 1] == state.symbols[n][:-1],
                format=exact.FORMATS[int(state.format[n])],
                probability=float(state.log_probability[n].exp()),
                gate=gates[first - 1],
                inputs=inputs,
                steps=steps_with_odds(dag, state, n, results),
                result=last_slot(steps, dag.planner.num_inputs, dag.names),
                alternatives=alternatives(dag, state, n, numbers, expression),
            )
        )
    return Look(begin, gates, tuple(thoughts), tuple(unplanned))


def spans_of_numbers(dag: DifferentiableDAG, ids: list[int], offset: list[int]) -> Iterator[tuple[int, int]]:
    """First and last token of every number that the text goes on with."""
    first = 0
    while first < len(ids):
        last = last_of_number(dag, ids, offset, first)
        if last >= first:
            yield first, last
        first = max(first, last) + 1


def last_of_number(dag: DifferentiableDAG, ids: list[int], offset: list[int], first: int) -> int:
    """The last token of the number that opens at `first`, a fraction's denominator included; below it for none."""
    last = first - 1
    while last + 1 < len(ids) and (
        offset[last + 1] > 0 or last >= first and is_bar(dag, ids, offset, last + 1)
    ):
        last += 1
    while last >= first and dag.lexer.lexemes[ids[last]].digit < 0:  # a point or a bar that nothing followed
        last -= 1
    return last


def is_bar(dag: DifferentiableDAG, ids: list[int], offset: list[int], t: int) -> bool:
    return dag.lexer.lexemes[ids[t]].slash and t + 1 < len(ids) and offset[t + 1] > 0


# ----------------------------------------------------------------------------------------------------
# Plans as text


def steps_of(dag: DifferentiableDAG, plans: Plans, n: int) -> list[tuple[int, int, int]]:
    """Plan n, an operation and two slots for every step; a + b and the like in the order in which they are read."""
    K, steps = dag.planner.num_inputs, []
    oldest = list(range(dag.planner.num_slots))  # of the inputs that a slot is made of
    for s, (operation, a, b) in enumerate(torch.stack(tuple(plans), dim=-1)[n].tolist()):
        name = dag.names[operation]
        if OPERATIONS[name].commutative and oldest[a] < oldest[b]:
            a, b = b, a
        oldest[K + s] = max(oldest[a], oldest[b]) if OPERATIONS[name].binary else oldest[a]
        steps.append((operation, a, b))
    return steps


def numbers_of(dag: DifferentiableDAG, state: DAGState, n: int, ids: list[int], spans: list) -> list:
    """What is in the K input slots of plan n, exactly, None for nothing."""
    there = state.sight.inputs[n].tolist()
    if dag.learned_numbers is not None:
        return [exact.from_float(value) for value in state.sight.values[n].tolist()]
    return [
        exact.from_decimal(*dag.lexer.read_number(ids, *span)) if is_there else None
        for is_there, span in zip(there, spans)
    ]


def plan_text(steps: list, slots: list[exact.Rational | None], names: list[str], written: str | None) -> str:
    """A plan over the values of its slots, such as 12 + (7 * 3 = 21) = 33."""
    K = len(slots) - len(steps)
    values = [value_text(value) for value in slots]

    def formula(slot: int) -> str:
        operation, a, b = steps[slot - K]
        name = names[operation]
        if name in INFIX:
            return f"{term(a)} {INFIX[name]} {term(b)}"
        return f"{name}({term(a)}, {term(b)})" if OPERATIONS[name].binary else f"{name}({term(a)})"

    def term(slot: int) -> str:
        return values[slot] if slot < K else f"({formula(slot)} = {values[slot]})"

    last = last_slot(steps, K, names)
    return f"{formula(last) if last >= K else values[last]} = {written or 'nothing'}"


def last_slot(steps: list, K: int, names: list[str]) -> int:
    """Of the result, before `identity` passed it on."""
    last = K + len(steps) - 1
    while last >= K and names[steps[last - K][0]] == "identity":
        last = steps[last - K][1]
    return last


def value_text(value: exact.Rational | None) -> str:
    if value is None:
        return "nothing"
    return exact.write(value, "exact") or exact.write(value, "fraction")


# ----------------------------------------------------------------------------------------------------
# What else was considered


def steps_with_odds(dag: DifferentiableDAG, state: DAGState, n: int, results: list) -> tuple[Step, ...]:
    """The steps of plan n up to its result, each with what its choices were made from."""
    K, steps = dag.planner.num_inputs, steps_of(dag, state.plans, n)
    log_p = None
    if isinstance(dag.planner, DAGPlanPredictor):
        sight = state.sight[torch.tensor([n], device=state.row.device)]
        known = *dag.planner.read(sight.hidden, sight.readers), sight.inputs
        log_p = dag.planner.choices(*known, Plans(*(part[n : n + 1] for part in state.plans)))
    told = []
    for s in range(last_slot(steps, K, dag.names) - K + 1):
        operation, *operands = steps[s]
        name = dag.names[operation]
        operands = operands[: 1 + OPERATIONS[name].binary]
        odds_of_operation, odds_of_operands = {}, []
        if log_p is not None:
            odds_of_operation = dict(zip(dag.names, log_p[0][0, s].exp().tolist()))
            odds_of_operands = [visible_odds(log_p[1 + i][0, s]) for i in range(len(operands))]
            if operands[0] != int(state.plans.operand1[n, s]):
                odds_of_operands.reverse()  # they were chosen in the other order
        value = None if results[s] is None else value_text(results[s])
        told.append(Step(K + s, name, tuple(operands), value, odds_of_operation, tuple(odds_of_operands)))
    return tuple(told)


def visible_odds(log_p: torch.Tensor) -> dict[int, float]:
    return {slot: p for slot, p in enumerate(log_p.exp().tolist()) if p > 0}


def alternatives(
    dag: DifferentiableDAG, state: DAGState, n: int, numbers: list, expression: str
) -> tuple[Candidate, ...]:
    """The likeliest plans beside plan n that read otherwise, at most ALTERNATIVES."""
    if not isinstance(dag.planner, DAGPlanPredictor):
        return ()
    sight = state.sight[torch.tensor([n], device=state.row.device)]
    plans, log_p, format = likeliest(dag.planner, sight, 2 * ALTERNATIVES)
    found = {}
    for row, (form, p) in enumerate(zip(format.tolist(), log_p.exp().tolist())):
        steps = steps_of(dag, plans, row)
        results = exact.run(steps, numbers, dag.digits, dag.operations)
        written = dag.write(results[-1], form)
        text = plan_text(steps, numbers + results, dag.names, written)
        if text != expression:
            found.setdefault(text, Candidate(text, written, p))
    return tuple(found.values())[:ALTERNATIVES]


def likeliest(
    planner: DAGPlanPredictor, sight: Sight, width: int
) -> tuple[Plans, torch.Tensor, torch.Tensor]:
    """Beam search over the plans that one number's planner could make, the likeliest first: W plans (W, D), their
    log-probability with their likeliest format (W,), that format (W,).
    """
    D, K, O = planner.depth, planner.num_inputs, len(planner.binary)
    context, keys = planner.read(sight.hidden, sight.readers)
    S, visible = keys.size(1), planner.visible(sight.inputs)[0]  # (D, S)
    x, log_p, going = context, context.new_zeros(1), torch.ones(1, dtype=torch.bool, device=context.device)
    plans = torch.zeros(1, 0, 3, dtype=torch.long, device=context.device)
    operations, slots = torch.arange(O, device=x.device), torch.arange(S, device=x.device)
    for step in range(D):
        W, seen = len(x), visible[step].expand(1, S)
        state = planner.state(x + planner.step.weight[step])
        odds = F.log_softmax(planner.operation_score(state).float(), dim=-1)  # (W, O)
        at = state[:, None].expand(-1, O, -1), operations.expand(W, O), keys.expand(W, S, -1)
        odds1 = F.log_softmax(planner.operand1_score(*at, seen), dim=-1)  # (W, O, S)
        state, operation, _ = at
        state, operation = state[:, :, None].expand(-1, -1, S, -1), operation[..., None].expand(-1, -1, S)
        odds2 = planner.operand2_score(state, operation, slots.expand(W, O, S), at[2], seen)
        odds2 = F.log_softmax(odds2, dim=-1)  # (W, O, S, S)
        alone = torch.full_like(odds2[0, 0], -torch.inf)
        alone[:, 0] = 0.0  # of a unary operation the second operand is slot 0
        odds2 = odds2.where(planner.binary[:, None, None], alone)
        joint = odds[..., None, None] + odds1[..., None] + odds2
        joint[~going] = -torch.inf
        joint[~going, planner.end, K - 1 + step, 0] = 0.0  # what has ended passes its result on
        joint = (log_p[:, None, None, None] + joint).flatten()
        log_p, best = joint.topk(min(width, int((joint > -torch.inf).sum())))
        operand2, rest = best % S, best // S
        operand1, rest = rest % S, rest // S
        operation, beam = rest % O, rest // O
        chosen = planner.remember(step, operation, operand1, operand2)
        x = x[beam] + chosen * going[beam, None]
        going = going[beam] & (operation != planner.end)
        step_chosen = torch.stack([operation, operand1, operand2], dim=-1)
        plans = torch.cat([plans[beam], step_chosen[:, None]], dim=1)
    format_log_p, format = planner.formats(planner.state(x + planner.step.weight[D])).max(-1)
    log_p, order = (log_p + format_log_p).sort(descending=True)
    return Plans(*plans[order].unbind(-1)), log_p, format[order]
