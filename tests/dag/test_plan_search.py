"""The bank of plans against expressions enumerated by recursion, and matching against what dag/exact_arithmetic.py writes."""

import itertools
import math
import random
from collections import Counter
from fractions import Fraction

import pytest
import torch

from dag import exact_arithmetic
from dag.plan_search import OPERATIONS, PlanBank, Plans, Target, logsumexp_by_group, run

NAN = math.nan
ARITHMETIC = ["add", "subtract", "multiply", "divide", "identity"]
ALL = list(exact_arithmetic.OPERATIONS)
BANKS = [  # operations, leaves, depth
    (ARITHMETIC, 3, 4),
    (ARITHMETIC, 4, 2),
    (["identity", "multiply", "add"], 4, 3),
    (["log", "subtract", "max", "identity"], 3, 3),
    (["log", "divide", "identity"], 2, 1),
    (ALL, 2, 4),
    (["identity"], 2, 1),
]


def bank_name(case) -> str:
    names, leaves, depth = case
    return f"{'all' if names is ALL else '+'.join(names)}-{leaves}-{depth}"


@pytest.fixture(params=BANKS, ids=bank_name)
def case(request):
    return request.param


def expressions(names, leaves: tuple, steps: int):
    """All expressions with so many operations that have each of the leaves once, as tuples (name, a[, b])."""
    if steps == 0 and len(leaves) == 1:
        yield leaves[0]
    for name in names if steps else []:
        commutes, _ = OPERATIONS[name]
        if name == "identity":
            continue
        if commutes is None:
            yield from ((name, a) for a in expressions(names, leaves, steps - 1))
            continue
        for size, done in itertools.product(range(1, len(leaves)), range(steps)):
            for left in itertools.combinations(leaves, size):
                right = tuple(leaf for leaf in leaves if leaf not in left)
                if not commutes or min(left) < min(right):
                    sides = expressions(names, left, done), expressions(names, right, steps - 1 - done)
                    yield from ((name, a, b) for a, b in itertools.product(*map(list, sides)))


def first_leaf(expression) -> int:
    return expression if isinstance(expression, int) else min(map(first_leaf, expression[1:]))


def expression_of(plan: list[tuple], names, leaves: int):
    """What a plan [(operation, operand1, operand2), ...] computes."""
    slots = list(range(leaves))
    for operation, a, b in plan:
        name = names[operation]
        commutes, _ = OPERATIONS[name]
        if name == "identity":
            slots.append(slots[a])
        elif commutes is None:
            slots.append((name, slots[a]))
        else:
            operands = [slots[a], slots[b]]
            slots.append((name, *(sorted(operands, key=first_leaf) if commutes else operands)))
    return slots[-1]


def steps_of(plans: Plans) -> list[list[tuple]]:
    return torch.stack(tuple(plans), dim=-1).tolist()


def test_the_bank_has_every_expression_once(case):
    names, leaves, depth = case
    found = Counter(
        expression_of(plan, names, leaves) for plan in steps_of(PlanBank(names, leaves, depth).plans)
    )
    most = min(depth, leaves - 1 + ("log" in names))
    expected = [
        expression
        for size in range(1, leaves + 1)
        for subset in itertools.combinations(range(leaves), size)
        for steps in range(most + 1)
        for expression in expressions(names, subset, steps)
    ]
    assert len(set(expected)) == len(expected)
    assert found == Counter(expected)


def test_plans_of_the_bank_can_be_chosen_by_the_dag(case):
    names, leaves, depth = case
    for plan in steps_of(PlanBank(names, leaves, depth).plans):
        assert len(plan) == depth
        kinds = [names[operation] for operation, _, _ in plan]
        ended = kinds.index("identity") if "identity" in kinds else depth
        for step, (name, (_, a, b)) in enumerate(zip(kinds, plan)):
            assert a < leaves + step and b < leaves + step
            assert exact_arithmetic.OPERATIONS[name].binary or b == 0
            assert step < ended or name == "identity"  # it ends a plan ...
            assert step <= ended or a == leaves + step - 1  # ... and passes the result on
            if exact_arithmetic.OPERATIONS[name].commutative:
                assert a < b


def random_values(rows: int, leaves: int) -> torch.Tensor:
    return torch.randint(-3, 7, (rows, leaves)).double()


def test_all_plans_run_together_as_they_do_one_by_one_and_exactly(case):
    names, leaves, depth = case
    bank, values = PlanBank(names, leaves, depth), random_values(6, leaves)
    results, plans = bank(values), steps_of(bank.plans)
    assert results.shape == (6, len(plans))
    for row, inputs in zip(results, values):
        alone = run(bank.plans, inputs.expand(len(plans), -1), names)
        torch.testing.assert_close(row, alone, rtol=0, atol=0, equal_nan=True)
    for p in random.sample(range(len(plans)), min(len(plans), 200)):
        for row, inputs in zip(results[:, p].tolist(), values.tolist()):
            rationals = [(int(value), 1) for value in inputs]
            operations = [exact_arithmetic.OPERATIONS[name] for name in names]
            expected = exact_arithmetic.run(plans[p], rationals, digits=150, operations=operations)[-1]
            if expected is None:
                assert not 1e-150 < abs(row) < 1e150, plans[p]
            else:
                assert row == pytest.approx(float(Fraction(*expected)), rel=1e-9), plans[p]


@pytest.mark.parametrize("missing", [(0,), (1,), (0, 1)])
def test_a_plan_over_a_number_that_is_not_there_has_no_result(missing):
    bank, values = (
        PlanBank(ALL, 2, 3),
        torch.tensor([[0.0, 1.0], [1.0, 0.0], [1.0, 1.0], [5.0, 3.0]]).double(),
    )
    values[:, missing] = NAN

    def uses_missing(plan) -> bool:
        read = [step[1 : 3 if exact_arithmetic.OPERATIONS[ALL[step[0]]].binary else 2] for step in plan]
        return not set(missing).isdisjoint(itertools.chain.from_iterable(read))

    hopeless = torch.tensor([uses_missing(plan) for plan in steps_of(bank.plans)])
    assert not bank(values)[:, hopeless].isfinite().any()
    assert hopeless.all() == bank(values).isnan().all() == (len(missing) == 2)


@pytest.mark.parametrize(
    "name, other", itertools.product(["max", "min", "divide", "power"], ["divide", "log", "power"])
)
def test_what_has_no_value_does_not_come_back(name, other):
    """x/0 and its like are no numbers to the operations after them either."""
    names, slots = [name, other, "identity"], itertools.product([0.0, 0.5, 3.0], repeat=3)
    if other == name:
        names = [name, "identity"]
    values = torch.tensor(list(slots)).double()
    for a, b, first in [(1, 3, 2), (3, 1, 2), (2, 3, 0)]:
        steps = [(names.index(other), 0, first * exact_arithmetic.OPERATIONS[other].binary), (0, a, b)]
        result = run(Plans(*torch.tensor([steps] * len(values)).unbind(-1)), values, names)
        for inputs, row in zip(values.tolist(), result.tolist()):
            rationals = [Fraction(value).as_integer_ratio() for value in inputs]
            expected = exact_arithmetic.run([(names[op], *ab) for op, *ab in steps], rationals, digits=300)[
                -1
            ]
            assert math.isfinite(row) == (expected is not None), (inputs, names, steps)


# search


def exactly(values: torch.Tensor) -> Target:
    """Whole numbers as they stand in a text."""
    return Target(
        values, torch.zeros(len(values), dtype=torch.long), torch.zeros(len(values), dtype=torch.bool)
    )


def test_search_finds_plans_over_the_numbers_there_are():
    K, bank = 5, PlanBank(ALL, leaves=3, depth=4)
    values = torch.randint(0, 4, (200, K)).double()
    count = torch.randint(1, K + 1, (200, 1))
    values = values.masked_fill(torch.arange(K) >= count, NAN)
    target = exactly(torch.randint(-2, 9, (200,)).double())
    row, plans, result = bank.search(values, target)
    assert row.unique().numel() > 50 and target[row].matches(result).all()
    torch.testing.assert_close(run(plans, values[row], ALL), result, rtol=0, atol=0)
    most = 0
    for inputs, plan in zip(count[row, 0].tolist(), steps_of(plans)):
        for step, (operation, a, b) in enumerate(plan):
            slots = (a, b) if exact_arithmetic.OPERATIONS[ALL[operation]].binary else (a,)
            assert all(slot < inputs or K <= slot < K + step for slot in slots), plan
            assert (
                not exact_arithmetic.OPERATIONS[ALL[operation]].commutative or a < b
            )  # as DAGPlanPredictor.canonical has it
            most = max(most, *(slot for slot in slots if slot < K), 0)
    assert most == K - 1, "no number but the newest is looked at"


def test_search_misses_nothing_where_it_takes_all_numbers():
    bank = PlanBank(ARITHMETIC, leaves=3, depth=3)
    values, target = torch.tensor([[12.0, 7.0, 3.0]]).double(), exactly(torch.tensor([33.0]).double())
    _, plans, _ = bank.search(values, target)
    expected = [plan for plan, result in zip(steps_of(bank.plans), bank(values)[0].tolist()) if result == 33]
    assert sorted(steps_of(plans)) == sorted(expected)
    multiply, add, end = map(ARITHMETIC.index, ("multiply", "add", "identity"))
    assert [[multiply, 1, 2], [add, 0, 3], [end, 4, 0]] in expected


def test_a_number_that_no_plan_reaches_is_not_found():
    row, plans, result = PlanBank(ARITHMETIC, 2, 2).search(
        torch.tensor([[2.0, NAN]]), exactly(torch.tensor([77.0]))
    )
    assert len(row) == len(result) == len(plans.operation) == 0


# matching

HALVES = {Fraction(10) ** n for n in range(-20, 8)}


def random_rational() -> exact_arithmetic.Rational:
    magnitude = 10 ** random.randint(0, 6)
    denominator = random.choice([1, 1, 2, 3, 4, 5, 7, 8, 10, 40, 100, 1000, 10**5, random.randint(1, 999)])
    return exact_arithmetic.reduced(random.randint(-magnitude, magnitude), denominator)


def target_of(texts: list[str]) -> Target:
    """What the lexer tells the loss of numbers spelled like this."""
    values = [float(Fraction(*exact_arithmetic.read(text))) for text in texts]
    places = [-1 if "/" in text else len(text.partition(".")[2]) for text in texts]
    zeros = ["." in text and text.endswith("0") for text in texts]
    return Target(torch.tensor(values, dtype=torch.float64), torch.tensor(places), torch.tensor(zeros))


def is_too_close_to_call(a: Fraction, b: Fraction) -> bool:
    """Whether they differ behind the first 12 digits alone, or a lies halfway between two of a format."""
    half = 2 * abs(a - b)
    return 0 < half < 4 * Fraction(1, 10**12) * max(1, abs(a)) or half in HALVES


def random_matches(count: int):
    """A result, and a number that may or may not be what it looks like when it is written."""
    for _ in range(count):
        result = random_rational()
        spelled = random_rational() if random.random() < 0.2 else result
        if random.random() < 0.2:  # nearly
            spelled = exact_arithmetic.reduced(spelled[0] * 1000 + random.choice([-1, 1]), spelled[1] * 1000)
        text = exact_arithmetic.write(spelled, random.randrange(len(exact_arithmetic.FORMATS)))
        if text is not None and not is_too_close_to_call(
            Fraction(*result), Fraction(*exact_arithmetic.read(text))
        ):
            yield result, text


@pytest.mark.parametrize("count", [3000, pytest.param(100_000, marks=pytest.mark.slow)])
def test_formats_are_those_that_write_the_number(count):
    results, texts = zip(*random_matches(count))
    target = target_of(texts)
    values = torch.tensor([float(Fraction(*result)) for result in results], dtype=torch.float64)
    right, matches = target.formats(values), target.matches(values)
    hits = 0
    for result, text, ours, match in zip(results, texts, right.tolist(), matches.tolist()):
        expected = exact_arithmetic.matching_formats(result, text)
        assert [index for index, is_right in enumerate(ours) if is_right] == expected, (result, text)
        is_rounded_integer = "." not in text and exact_arithmetic.read(text) != result
        assert match == bool(expected) or is_rounded_integer, (result, text)
        hits += bool(expected)
    assert 0.2 * count < hits < 0.9 * count


def test_no_result_matches_nothing():
    target = target_of(["3", "0", "0.5", "1/3"])
    for nothing in (NAN, math.inf, -math.inf):
        assert not target.matches(torch.full((4,), nothing).double()).any()


def test_logsumexp_by_group_is_that_of_every_group():
    group = torch.tensor([2, 0, 0, 1, 2, 2, 0])
    x = torch.tensor([-1.0, -800, -801, 5, 2, 0.5, -802], requires_grad=True)
    ours = logsumexp_by_group(x, group, 3)
    expected = torch.stack([x[group == g].logsumexp(0) for g in range(3)])
    torch.testing.assert_close(ours, expected)
    for both in zip(*(torch.autograd.grad(part.sum(), x) for part in (ours, expected))):
        torch.testing.assert_close(*both)
