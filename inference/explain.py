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

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F

from dag import exact_arithmetic, positions
from dag.exact_arithmetic import OPERATIONS
from dag.number_lexer import Numerals
from dag.plan_search import Plans
from dag.planner import DAGPlanPredictor
from dag_model import GPT, DAGState, DifferentiableDAG
from data.tokenizer import Tokenizer
from inference.engine import windows
from inference.token_stats import gates_of

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
    gates: tuple[float, ...]  # of every token: how far what follows it is what the DAG offers
    thoughts: tuple[Thought, ...]
    unplanned: tuple[Unplanned, ...]


class Window(NamedTuple):
    """A context that tokens were written in, as the DAG read it."""

    begin: int  # its first token
    tokens: list[int]
    numerals: Numerals
    computes: list[bool]  # whether a plan may be made behind each of the tokens
    state: DAGState


@torch.inference_mode()
def explain(
    model: GPT, tokenizer: Tokenizer, tokens: list[int], start: int = 0, alternatives: int = ALTERNATIVES
) -> Look:
    """Of the numbers that end at token `start` or later, in the contexts that engine.generate writes them in;
    with so many alternatives at most, of which none is the fastest. Without a DAG over numbers gates alone.
    """
    assert not model.training, "plans are those of a model in eval mode: call model.eval() first"
    device, dag = model.lm_head.weight.device, model.dag
    numbers = deque(spans_of_numbers(dag, tokens) if model.reads_numbers and tokens else ())
    gates, thoughts, unplanned = [], [], []
    for begin, first, end in windows(len(tokens) + 1, model.config.block_size):
        context = tokens[begin : end - 1]
        idx = torch.tensor([context], device=device)
        state = model.inspect(idx)
        gates += gates_of(state, len(context))[first - begin - 1 :].tolist()
        if not model.reads_numbers:
            continue
        numerals = dag.lexer(idx)
        computes = positions.may_compute(dag.lexer, idx, numerals)[0].tolist()
        window = Window(begin, context, numerals, computes, state)
        while numbers and numbers[0][0] < end:
            span = numbers.popleft()
            if span[1] >= start:
                told = tell(dag, tokenizer, tokens, window, *span, alternatives)
                (thoughts if isinstance(told, Thought) else unplanned).append(told)
    return Look(tuple(gates), tuple(thoughts), tuple(unplanned))


def tell(
    dag: DifferentiableDAG,
    tokenizer: Tokenizer,
    tokens: list[int],
    window: Window,
    first: int,
    last: int,
    alternatives: int,
) -> Thought | Unplanned:
    """Of the number at tokens `first` to `last`, which was begun in this window."""
    begin, state, position = window.begin, window.state, first - window.begin - 1
    text = tokenizer.decode(tokens[first : last + 1])
    made = (state.position == position).nonzero().flatten()  # one at most
    if len(made) == 0:
        return Unplanned(first, last, text, reason(window, position))
    n, plan, sight = int(made), Plans(*(part[made] for part in state.plans)), state.sight[made]
    known = None if dag.mixes else (*dag.planner.read(sight.hidden, sight.readers), sight.inputs)
    columns = window.numerals.first, window.numerals.last
    spans = torch.stack(columns, dim=-1)[0, position].tolist()
    numbers = numbers_of(dag, state, n, window.tokens, spans)
    steps = steps_of(dag, plan, 0)
    results = exact_arithmetic.run(steps, numbers, dag.digits, dag.operations)
    expression = plan_text(dag, steps, numbers + results, state.written[n])
    inputs = tuple(
        Number(slot, value_text(value, dag.digits), begin + span[0], begin + span[1])
        for slot, (value, span) in enumerate(zip(numbers, spans))
        if value is not None
    )
    return Thought(
        position=first - 1,
        first=first,
        last=last,
        text=text,
        expression=expression,
        written=state.written[n],
        followed=tokens[first : last + 1] == state.symbols[n][:-1],
        format=exact_arithmetic.FORMATS[int(state.format[n])],
        probability=float(state.log_probability[n].exp()),
        gate=float(state.gate[0, position, 0]),
        inputs=inputs,
        steps=steps_with_odds(dag, plan, known, steps, results),
        result=last_slot(steps, dag.planner.num_inputs, dag.names),
        alternatives=other_plans(dag, known, numbers, expression, alternatives),
    )


def reason(window: Window, position: int) -> str:
    """Why nothing was planned there."""
    if position < 0 or not window.numerals.visible[0, position, 0]:
        return "no number before it"
    return "the gate was shut" if window.computes[position] else "it is behind a sign or a bar"


def spans_of_numbers(dag: DifferentiableDAG, tokens: list[int]) -> Iterator[tuple[int, int]]:
    """First and last token of every number that the text goes on with."""
    device = dag.lexer.table.device
    offset = dag.lexer(torch.tensor([tokens], device=device)).offset[0].tolist()
    first = 0
    while first < len(tokens):
        end = end_of_number(dag, tokens, offset, first)
        last = end - 1
        while last >= first and not is_digit(dag, tokens, last):  # a point or a sign that nothing followed
            last -= 1
        if last >= first:
            yield first, last
        first = max(first + 1, end)


def end_of_number(dag: DifferentiableDAG, tokens: list[int], offset: list[int], first: int) -> int:
    """Behind the number that opens at `first`, the denominator of a fraction included; `first` for none."""
    end = first
    while end < len(tokens) and (end == first or offset[end] > 1) and offset[end] > 0:
        end += 1
    is_bar = first < end < len(tokens) - 1 and dag.lexer.lexemes[tokens[end]].slash
    if is_bar and offset[end + 1] == 1 and is_digit(dag, tokens, end + 1):
        return end_of_number(dag, tokens, offset, end + 1)
    return end


def is_digit(dag: DifferentiableDAG, tokens: list[int], t: int) -> bool:
    return dag.lexer.lexemes[tokens[t]].digit >= 0


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
        return [exact_arithmetic.from_float(value) for value in state.sight.values[n].tolist()]
    return [
        exact_arithmetic.from_decimal(*dag.lexer.read_number(ids, *span)) if is_there else None
        for is_there, span in zip(there, spans)
    ]


def plan_text(
    dag: DifferentiableDAG, steps: list, slots: list[exact_arithmetic.Rational | None], written: str | None
) -> str:
    """A plan over the values of its slots, such as 12 + (7 * 3 = 21) = 33."""
    K, names = dag.planner.num_inputs, dag.names
    values = [value_text(value, dag.digits) for value in slots]

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


def value_text(value: exact_arithmetic.Rational | None, digits: int) -> str:
    """As a decimal where that ends within so many digits, or DIGITS, as numbers of the text may be longer."""
    if value is None:
        return "nothing"
    return exact_arithmetic.write(
        value, "exact", max(digits, exact_arithmetic.DIGITS)
    ) or exact_arithmetic.write(value, "fraction")


# ----------------------------------------------------------------------------------------------------
# What else was considered


def steps_with_odds(
    dag: DifferentiableDAG, plan: Plans, known: tuple | None, steps: list, results: list
) -> tuple[Step, ...]:
    """The steps of a plan (1, D) up to its result, each with what its choices were made from. `known` is what
    the planner has read, None of one that mixes.
    """
    K = dag.planner.num_inputs
    log_p = None if known is None else dag.planner.choices(*known, plan)
    told = []
    for s in range(last_slot(steps, K, dag.names) - K + 1):
        operation, *operands = steps[s]
        name = dag.names[operation]
        operands = operands[: 1 + OPERATIONS[name].binary]
        odds_of_operation, odds_of_operands = {}, []
        if log_p is not None:
            odds_of_operation = dict(zip(dag.names, log_p[0][0, s].exp().tolist()))
            odds_of_operands = [visible_odds(log_p[1 + i][0, s]) for i in range(len(operands))]
            if operands[0] != int(plan.operand1[0, s]):
                odds_of_operands.reverse()  # they were chosen in the other order
        value = None if results[s] is None else value_text(results[s], dag.digits)
        told.append(Step(K + s, name, tuple(operands), value, odds_of_operation, tuple(odds_of_operands)))
    return tuple(told)


def visible_odds(log_p: torch.Tensor) -> dict[int, float]:
    return {slot: p for slot, p in enumerate(log_p.exp().tolist()) if p > 0}


def other_plans(
    dag: DifferentiableDAG, known: tuple | None, numbers: list, expression: str, count: int
) -> tuple[Candidate, ...]:
    """The likeliest plans that read otherwise than `expression`, at most `count`."""
    if known is None or count == 0:
        return ()
    plans, log_p, format = likeliest(dag.planner, *known, 1 + count)  # the plan made is among them
    found = {}
    for row, (form, p) in enumerate(zip(format.tolist(), log_p.exp().tolist())):
        steps = steps_of(dag, plans, row)
        results = exact_arithmetic.run(steps, numbers, dag.digits, dag.operations)
        written = dag.write(results[-1], form)
        text = plan_text(dag, steps, numbers + results, written)
        if text != expression:
            found.setdefault(text, Candidate(text, written, p))
    return tuple(found.values())[:count]


def likeliest(
    planner: DAGPlanPredictor, context: torch.Tensor, keys: torch.Tensor, inputs: torch.Tensor, width: int
) -> tuple[Plans, torch.Tensor, torch.Tensor]:
    """Beam search over the plans that one number's planner could make, the likeliest first: W plans (W, D), their
    log-probability with their likeliest format (W,), that format (W,).
    """
    D, K, O = planner.depth, planner.num_inputs, len(planner.binary)
    S, mask = keys.size(1), planner.mask(inputs)[0]  # (D, S)
    x, log_p, going = context, context.new_zeros(1), torch.ones(1, dtype=torch.bool, device=context.device)
    plans = torch.zeros(1, 0, 3, dtype=torch.long, device=context.device)
    operations, slots = torch.arange(O, device=x.device), torch.arange(S, device=x.device)
    for step in range(D):
        W, seen = len(x), mask[step].expand(1, S)
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
