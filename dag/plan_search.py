"""Which plans explain the number that a text goes on with? What the DAG's planner learns from.

    12 + 7 * 3 = 33         numbers 3, 7, 12 before it; of the 144 compact plans over three numbers with + - * /
                            these reach 33: 12 + 7 * 3, and whatever else happens to

    bank = PlanBank(["add", "subtract", "identity"], leaves=3, depth=4)
    results = bank(values)         # (R, 3) float64, NaN where there is no number -> (R, P), NaN where no result
    bank.plans.operation[p]        # (D,): what the steps of plan p do

- plans in the bank are compact: no number twice, the result of every step but the last used by one later step
- and canonical: of a + b and b + a, and of two independent steps in either order, there is one
- a plan is one more step on top of another, so running all P of them takes little more than P operations

float64 is enough to find plans: whoever acts on one runs it again exactly. It takes numbers apart that differ in
the first 12 digits. Slots are the DAG's: inputs first, then a slot a step.
Legend: R rows, K inputs, L leaves, D steps, P plans, F formats.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn as nn

from dag.exact_arithmetic import FORMATS


def partial(operate):
    """An operation that does not always have a result: NaN where it has none."""

    def where_it_has_one(a, b):
        result = operate(a, b) + 0 * (a + b)  # torch.pow(1, NaN) is 1
        return result.masked_fill(~result.isfinite(), torch.nan)

    return where_it_has_one


OPERATIONS = {  # name: whether a and b may trade places (None: there is no b), what it does on float64
    "add": (True, torch.add),
    "subtract": (False, torch.sub),
    "multiply": (True, torch.mul),
    "divide": (False, partial(torch.div)),
    "identity": (None, lambda a, b: a),
    "power": (False, partial(torch.pow)),
    "log": (None, partial(lambda a, b: torch.log(a))),
    "max": (True, torch.maximum),
    "min": (True, torch.minimum),
}


class Plans(NamedTuple):
    """Some plans. Their last step's result counts; `identity` passes a result on to the steps after it."""

    operation: torch.Tensor  # (R, D) int64
    operand1: torch.Tensor  # (R, D) int64, slots
    operand2: torch.Tensor  # (R, D) int64, slots; 0 where the operation is unary

    def __getitem__(self, rows) -> "Plans":
        return Plans(*(part[rows] for part in tuple(self)))


def run(plans: Plans, values: torch.Tensor, names: list[str]) -> torch.Tensor:
    """Plans over inputs (R, K), float64, NaN where there is none -> results (R,), NaN where there is none."""
    slots = values
    for operation, slot1, slot2 in zip(*(part.unbind(1) for part in tuple(plans))):
        a, b = (slots.gather(1, slot[:, None]).squeeze(1) for slot in (slot1, slot2))
        result = a
        for index, name in enumerate(names):
            if name != "identity":
                result = torch.where(operation == index, OPERATIONS[name][1](a, b), result)
        slots = torch.cat([slots, result[:, None]], dim=1)
    return slots[:, -1]


# ----------------------------------------------------------------------------------------------------
# When a plan explains a number


class Target(NamedTuple):
    """Numbers as they stand in a text; (R,) each, or whatever shape goes with the results."""

    value: torch.Tensor  # float64
    places: torch.Tensor  # int64, digits behind the point; -1 where it stands as a fraction
    ends_in_zero: torch.Tensor  # bool: behind the point

    def __getitem__(self, rows) -> "Target":
        return Target(*(part[rows] for part in tuple(self)))

    def is_exact(self, result: torch.Tensor) -> torch.Tensor:
        return (result - self.value).abs() <= 1e-12 * self.value.abs().clamp(min=1.0)

    def is_near(self, result: torch.Tensor, unit: torch.Tensor) -> torch.Tensor:
        """Whether rounding the result to a multiple of `unit` gives the number."""
        return (result - self.value).abs() <= 0.5 * unit + 1e-9 * unit.clamp(max=1.0)

    def matches(self, result: torch.Tensor) -> torch.Tensor:
        """Whether the number may be the result: exactly, or rounded to its places where it has any."""
        rounded = self.is_near(result, 10.0 ** -self.places.double())
        return self.is_exact(result) | (rounded & (self.places > 0))

    def formats(self, result: torch.Tensor) -> torch.Tensor:
        """In which formats the result (R,) reads as the number does: bool (R, F)."""
        value, places = self.value.abs(), self.places
        exactly, spelled = self.is_exact(result), (places >= 0) & ~self.ends_in_zero
        exponent = result.abs().clamp(min=1e-300).log10().floor()
        columns = []
        for name in FORMATS:
            kind, _, count = name.partition("_")
            if kind == "places":
                unit = torch.full_like(value, 10.0 ** -int(count))
                columns.append((places == int(count)) & self.is_near(result, unit))
            elif kind == "digits":
                unit = 10.0 ** (exponent - int(count) + 1)
                count_of_units = value / unit
                on_grid = (count_of_units - count_of_units.round()).abs() <= 1e-9 + 2e-15 * count_of_units
                columns.append(spelled & on_grid & self.is_near(result, unit))
            elif kind == "fraction":
                columns.append(exactly & (places <= 0))
            else:
                columns.append(spelled & exactly)
        return torch.stack(columns, dim=-1)


def logsumexp_by_group(x: torch.Tensor, group: torch.Tensor, count: int) -> torch.Tensor:
    """log of the sum of exp(x) (H,) of each of `count` groups, none empty -> (count,)"""
    top = x.detach().new_full((count,), -torch.inf).scatter_reduce(0, group, x.detach(), "amax")
    return top + torch.zeros_like(top).index_add(0, group, (x - top[group]).exp()).log()


# ----------------------------------------------------------------------------------------------------
# All short plans


class Step(NamedTuple):
    operation: str
    a: int  # slots
    b: int


@dataclass(frozen=True)
class Prefix:
    """The first steps of a plan."""

    steps: tuple[Step, ...]
    unused: tuple[int, ...]  # slots that no step has used yet

    def is_whole(self, leaves: int) -> bool:
        return sum(slot >= leaves for slot in self.unused) == 1

    def extensions(self, names: list[str], leaves: int):
        """All prefixes with one more step."""
        new = leaves + len(self.steps)
        for a in self.unused:
            for b in self.unused:
                for name in names:
                    commutes, _ = OPERATIONS[name]
                    is_needed = a == b if commutes is None else a < b if commutes else a != b
                    step = Step(name, a, b)
                    if is_needed and self._in_order(step, new - 1):
                        unused = tuple(slot for slot in self.unused if slot not in (a, b))
                        yield Prefix((*self.steps, step), (*unused, new))

    def _in_order(self, step: Step, newest: int) -> bool:
        """Of two steps in a row that do not need each other, the one with the earlier operand comes first."""
        if not self.steps or newest in (step.a, step.b):
            return True
        return min(step.a, step.b) > min(self.steps[-1].a, self.steps[-1].b)


class PlanBank(nn.Module):
    """All compact plans of up to `depth` steps over `leaves` numbers, `plans`, and how to run them together."""

    def __init__(
        self, names: list[str], leaves: int, depth: int, max_run: int = 2**21, max_found: int = 1024
    ):
        super().__init__()
        self.leaves = leaves
        self.max_run = max_run  # plans in one search
        self.max_found = max_found  # plans that it returns
        searched = [name for name in names if name != "identity"]
        levels = [[Prefix((), tuple(range(leaves)))]]
        for _ in range(min(depth, leaves - 1 + ("log" in names))):
            grown = [longer for prefix in levels[-1] for longer in prefix.extensions(searched, leaves)]
            if not grown:
                break
            levels.append(sorted(grown, key=lambda prefix: searched.index(prefix.steps[-1].operation)))
        nodes = [prefix.steps for level in levels[1:] for prefix in level]
        column = {steps: leaves + n for n, steps in enumerate(nodes)}  # of the table that forward() builds

        def column_of(slot: int, steps: tuple) -> int:
            return slot if slot < leaves else column[steps[: slot - leaves + 1]]

        self.slices = []  # for every level: the operations of its columns and how many columns each has
        for n, level in enumerate(levels[1:]):
            done = [prefix.steps[-1].operation for prefix in level]
            self.slices.append([(name, done.count(name)) for name in searched if name in done])
            for operand in "ab":
                columns = [column_of(getattr(prefix.steps[-1], operand), prefix.steps) for prefix in level]
                self.register_buffer(f"{operand}{n}", torch.tensor(columns), persistent=False)

        whole = [prefix.steps for level in levels[1:] for prefix in level if prefix.is_whole(leaves)]
        copies = [(Step("identity", leaf, 0),) for leaf in range(leaves)]
        result = [leaf for leaf in range(leaves)] + [column[steps] for steps in whole]
        self.register_buffer("result", torch.tensor(result), persistent=False)
        padded = torch.tensor(
            [
                [(names.index(name), a, 0 if OPERATIONS[name][0] is None else b) for name, a, b in steps]
                + [(names.index("identity"), leaves + n, 0) for n in range(len(steps) - 1, depth - 1)]
                for steps in copies + whole
            ]
        )  # (P, D, 3)
        binary = torch.tensor([OPERATIONS[name][0] is not None for name in names])
        self.register_buffer("binary", binary, persistent=False)
        for field, part in zip(Plans._fields, padded.unbind(-1)):
            self.register_buffer(field, part.contiguous(), persistent=False)

    @property
    def plans(self) -> Plans:
        return Plans(self.operation, self.operand1, self.operand2)

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        """Leaves (R, L) -> results (R, P), NaN where a plan has none."""
        table = values
        for n, slices in enumerate(self.slices):
            counts = [count for _, count in slices]
            a = table[:, getattr(self, f"a{n}")].split(counts, dim=1)
            b = table[:, getattr(self, f"b{n}")].split(counts, dim=1)
            table = torch.cat(
                [table, *(OPERATIONS[name][1](*ab) for (name, _), *ab in zip(slices, a, b))], dim=1
            )
        return table[:, self.result]

    def search(self, values: torch.Tensor, target: Target) -> tuple[torch.Tensor, Plans, torch.Tensor]:
        """Plans over a random few of the numbers at hand (R, K), NaN where there is none, that explain the target (R,)
        -> of H hits, in slots of the DAG: the row (H,), the plan, its result (H,). Rows beyond what `max_run` plans in
        all allow are not searched, and `max_found` hits at most are returned.
        """
        K, L = values.size(1), self.leaves
        values = values[: self.max_run // len(self.result)]
        order = torch.rand_like(values).masked_fill(values.isnan(), 2.0)
        leaf = order.topk(L, largest=False).indices.sort(1).values  # (R, L) slots
        results = self(values.gather(1, leaf))  # (R, P)
        rows = torch.arange(len(values), device=values.device)
        row, plan = target[rows[:, None]].matches(results).nonzero(as_tuple=True)
        kept = torch.randperm(len(row), device=row.device)[: self.max_found]
        row, plan = row[kept], plan[kept]
        operation, operand1, operand2 = self.plans[plan]

        def slots(operand):  # from the bank's leaves and results to the DAG's
            return leaf[row].gather(1, operand.clamp(max=L - 1)).where(operand < L, operand - L + K)

        operand2 = slots(operand2) * self.binary[operation]
        return row, Plans(operation, slots(operand1), operand2), results[row, plan]
