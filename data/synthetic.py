"""What the generated sets, data/*/prepare.py, have in common: lines such as 12+7*3=33, made from a seed.

    def draw(rng):
        tree = draw_tree(rng, [draw_integer(rng, range(1, 4)) for _ in range(3)])
        return Problem(infix(tree) + "=", exact(value_of(tree)))

    problems = draw_files(1337, {"three_numbers": draw}, count=100)
    corpus = draw_corpus(1337, {"three_numbers": draw}, {"three_numbers": 1.0}, lines=1000)
    write("data/mine", "mine", alphabet, corpus, problems)

- written are token shards and meta.json of training and validation, a line a document; and problems to score,
  a line each, `prompt<TAB>answer` (the blank that a prompt may end with counts), in problems/:
      val_KIND.tsv    for watching a run and for choosing between models
      test_KIND.tsv   for the tables at the end
- the numbers of a prompt decide its split, by a hash: those that stand together in a prompt of val or test
  are the numbers of no prompt of training, in whatever order, with whatever signs and words, whatever seed
  made it
- answers come from fractions and decimal alone, none of the model's own arithmetic; they are rounded half to
  even, and have no exponent and no -0

Splits as in https://github.com/google-deepmind/mathematics_dataset
"""

import decimal
import hashlib
import random
import re
from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

from data.loader import write_dataset
from data.tokenizer import CharTokenizer

VAL, TEST = 0.05, 0.05  # of all sets of numbers
NEGATIVE = 0.1  # of the numbers that may be
NUMBER = re.compile(r"\d+(?:\.\d+)?")
EXACT = decimal.Context(prec=1000, traps=[decimal.Inexact])  # raises rather than rounds

Number = int | Fraction


class Problem(NamedTuple):
    prompt: str
    answer: str
    operands: str = ""  # their numbers decide the split; empty is all of the prompt

    @property
    def line(self) -> str:
        return self.prompt + self.answer


Draw = Callable[[random.Random], Problem]


# ------------------------------------------------------------------------------------------------------------
# numbers; `digits` are what the length of a number is drawn from, before its value


def draw_natural(rng: random.Random, digits: Sequence[int]) -> int:
    length = rng.choice(digits)
    return rng.randrange(10 ** (length - 1) if length > 1 else 0, 10**length)


def draw_integer(rng: random.Random, digits: Sequence[int]) -> int:
    value = draw_natural(rng, digits)
    return -value if rng.random() < NEGATIVE else value


def draw_decimal(rng: random.Random, digits: Sequence[int], places: int) -> Number:
    """With exactly so many places, the last of them not 0."""
    if places == 0:
        return draw_integer(rng, digits)
    fraction = 10 * rng.randrange(10 ** (places - 1)) + rng.randint(1, 9)
    sign = "-" if rng.random() < NEGATIVE else ""
    return Fraction(f"{sign}{draw_natural(rng, digits)}.{fraction:0{places}d}")


# ------------------------------------------------------------------------------------------------------------
# how they are written


def exact(value: Number) -> str:
    """All its digits; decimal.Inexact where they do not end."""
    return quotient(value, EXACT)


def to_digits(value: Number, digits: int) -> str:
    """So many significant digits, without zeros at the end of the places: 3.1429, 120000"""
    return quotient(value, decimal.Context(prec=digits, rounding=decimal.ROUND_HALF_EVEN))


def to_places(value: Number, places: int) -> str:
    """So many places, with all their zeros: 2.500"""
    return f"{decimal.Decimal(round(value * 10**places)).scaleb(-places, EXACT):f}"


def as_fraction(value: Number) -> str:
    """In lowest terms: 3/4; an integer is only that."""
    return str(Fraction(value))


def quotient(value: Number, context: decimal.Context) -> str:
    text = f"{context.divide(decimal.Decimal(value.numerator), decimal.Decimal(value.denominator)):f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


# ------------------------------------------------------------------------------------------------------------
# expressions


class Tree(NamedTuple):
    left: "Tree | Number"
    operation: str  # a key of APPLY
    right: "Tree | Number"


RANK = {"+": 1, "-": 1, "*": 2, "/": 2}  # what binds tighter is higher
ATOM = 3  # the rank of a number
APPLY = {
    "+": lambda a, b: a + b,
    "-": lambda a, b: a - b,
    "*": lambda a, b: a * b,
    "/": lambda a, b: Fraction(a) / b,
}


def draw_tree(rng: random.Random, numbers: list[Number], operations: str = "+-*") -> Tree | Number:
    """An expression of these numbers in this order."""
    if len(numbers) == 1:
        return numbers[0]
    cut = rng.randrange(1, len(numbers))
    left, right = (draw_tree(rng, part, operations) for part in (numbers[:cut], numbers[cut:]))
    return Tree(left, rng.choice(operations), right)


def value_of(tree: Tree | Number) -> Number:
    """ZeroDivisionError where it has none."""
    if not isinstance(tree, Tree):
        return tree
    return APPLY[tree.operation](value_of(tree.left), value_of(tree.right))


def infix(
    tree: Tree | Number,
    signs: dict[str, str] | None = None,
    number: Callable[[Number], str] = exact,
    full: bool = False,
) -> str:
    """The expression as text, with the parentheses that it needs, or with `full` around every operation but
    the outermost. `signs` says how an operation is written, blanks and all; `number`, how a number is.
    """
    if not isinstance(tree, Tree):
        return number(tree)

    def side(part: Tree | Number, least: int) -> str:
        text = infix(part, signs, number, full)
        rank = RANK[part.operation] if isinstance(part, Tree) else ATOM
        return text if rank >= least else f"({text})"

    rank = RANK[tree.operation]
    left, right = side(tree.left, ATOM if full else rank), side(tree.right, ATOM if full else rank + 1)
    return left + (signs or {}).get(tree.operation, tree.operation) + right


# ------------------------------------------------------------------------------------------------------------
# words, and decoys: numbers, but nothing to compute. A decoy's answer is the number that comes next in the
# text. It was drawn apart from those before it: a model that computes there is wrong, its gate should be shut

NAMES = ("ann", "ben", "mia", "sam", "zoe")
ITEMS = ("apples", "books", "cards", "coins", "eggs", "pens")
DECOYS = (
    "room {a} is on floor {b}",
    "bus {a} leaves from stop {b}",
    "flight {a} boards at gate {b}",
    "row {a}, seat {b}",
    "call {a} and ask for {b}",
    "chapter {a} begins on page {b}",
    "{name} lives at {a} main street, flat {b}",
    "{name} has {a} {item} and tom has {b}",
    "{name} wore number {a} and tom number {b}",
    "the code for box {a} is {b} and then {c}",
    "in {a} the winner was car {b}, then car {c}",
    "of the {item} {name} liked {a}, {b} and {c}",
)


def draw_words(rng: random.Random, template: str, digits: range) -> tuple[str, dict[str, int]]:
    """-> the template filled in; its numbers by name"""
    numbers = {name: draw_natural(rng, digits) for name in "abc" if f"{{{name}}}" in template}
    return template.format(name=rng.choice(NAMES), item=rng.choice(ITEMS), **numbers), numbers


def is_computable(target: int, numbers: list[int]) -> bool:
    """Whether the target is one of the numbers, or + - * / of two of them or of one with itself."""
    return target in numbers or any(
        target in (a + b, a - b, a * b) or (b != 0 and target * b == a) for a in numbers for b in numbers
    )


def draw_decoy(
    rng: random.Random, digits: range, computable: Callable[[int, list[int]], bool] = is_computable
) -> Problem:
    template = rng.choice(DECOYS)
    while True:
        line, numbers = draw_words(rng, template, digits)
        values = list(numbers.values())
        if not any(computable(value, values[:i]) for i, value in enumerate(values)):
            answer = str(values[-1])
            return Problem(line.removesuffix(answer), answer)


# ------------------------------------------------------------------------------------------------------------
# splits and files


def split_of(problem: Problem) -> str:
    numbers = NUMBER.findall(problem.operands or problem.prompt)
    numbers = [n.rstrip("0").rstrip(".") if "." in n else n for n in numbers]  # 7.50 is 7.5
    digest = hashlib.blake2b(" ".join(sorted(numbers)).encode(), digest_size=4).digest()
    place = int.from_bytes(digest, "big") / 2**32
    return "val" if place < VAL else "test" if place < VAL + TEST else "train"


def without_blanks(text: str) -> str:
    return text.replace(" ", "")


def draw_fitting(rng: random.Random, draw: Draw, length: int) -> Problem:
    """One whose line is no longer than that."""
    while len((problem := draw(rng)).line) > length:
        pass
    return problem


def draw_corpus(seed: int, draws: dict[str, Draw], mix: dict[str, float], lines: int) -> dict[str, list[str]]:
    """The lines of train and val, kinds in the shares of `mix`. Those of train, `lines` of them, may repeat;
    val gets what falls to it meanwhile, each once."""
    rng = random.Random(f"{seed} corpus")
    kinds, shares = list(draws.values()), [mix[kind] for kind in draws]
    train, val = [], {}
    while len(train) < lines:
        problem = rng.choices(kinds, shares)[0](rng)
        split = split_of(problem)
        if split == "train":
            train.append(problem.line)
        elif split == "val":
            val.setdefault(without_blanks(problem.prompt), problem.line)
    return {"train": train, "val": list(val.values())}


def draw_files(seed: int, draws: dict[str, Draw], count: int) -> dict[str, list[Problem]]:
    """-> `count` problems for every val_KIND and test_KIND"""
    return {
        f"{split}_{kind}": draw_distinct(f"{seed} {split}_{kind}", draw, split, count)
        for kind, draw in draws.items()
        for split in ("val", "test")
    }


def draw_distinct(seed: str, draw: Draw, split: str, count: int) -> list[Problem]:
    """Different ones, blanks aside. ValueError where there are too few, which takes a while to see."""
    rng = random.Random(seed)
    found = {}
    for _ in range(count * 500):  # about 20 for each are needed where problems abound
        problem = draw(rng)
        if split_of(problem) == split:
            found.setdefault(without_blanks(problem.prompt), problem)
        if len(found) == count:
            return list(found.values())
    raise ValueError(
        f"found only {len(found)} different problems for {split}, {count} were asked for, such as "
        f"{problem.line!r}: ask for fewer, or for longer numbers"
    )


def write(
    out_dir: str | Path,
    name: str,
    alphabet: str,
    corpus: dict[str, list[str]],
    problems: dict[str, list[Problem]],
    settings: dict | None = None,
) -> dict:
    """Writes everything, meta.json last, and returns its content. `alphabet` is the vocabulary, whatever the
    sample; `settings` are kept in meta.json."""
    folder = Path(out_dir) / "problems"
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("*.tsv"):
        old.unlink()
    for file in problems:
        lines = [f"{problem.prompt}\t{problem.answer}\n" for problem in problems[file]]
        (folder / f"{file}.tsv").write_text("".join(lines), encoding="ascii")
    return write_dataset(out_dir, name, CharTokenizer(alphabet), corpus, documents=True, prepare=settings)
