"""Arithmetic in plain text, a line a document, made on the spot from a seed.

    python data/arithmetic/prepare.py
    python data/arithmetic/prepare.py --lines=50_000 --max_digits=2 --out_dir=data/small --seed=7

    12+7*3=33                    (5 - -20) * 3 = 75           1.5+2.25=3.75
    subtract 12 from 30. 18      sam has 9 apples and buys 4 more. how many? 13
    room 12 is on floor 7        a decoy: numbers, but nothing to compute

Writes token shards and meta.json for training and validation, and problems to score, `prompt<TAB>answer` (the
blank that a prompt may end with counts), in problems/:

    val_KIND.tsv, test_KIND.tsv   problems like those in training, on other numbers; KIND is a key of MIX.
                                  val is for watching a run, test for the tables at the end
    EXTRAPOLATION.tsv             what training never shows: longer or more numbers, other templates

The numbers of a prompt decide its split, by a hash: those that stand together in a prompt of val or test are
the numbers of no prompt of training, in whatever order, with whatever signs and words, whatever seed made it.

A decoy's answer is the number that comes next in the text. It was drawn apart from those before it, and is
none of them nor + - * / of two of them: a model that computes there is wrong, and its gate should be shut.

Extrapolation splits as in https://github.com/google-deepmind/mathematics_dataset
"""

import decimal
import hashlib
import random
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from configurator import load, run_script, setting, to_dict  # noqa: E402
from dataloader import write_dataset  # noqa: E402
from tokenizer import CharTokenizer  # noqa: E402

ALPHABET = "\n ()*+,-.0123456789:=?abcdefghijklmnopqrstuvwxyz"  # the vocabulary, whatever the sample
MAX_LINE = 63  # characters, so that every line fits block_size=64 with its newline
NEGATIVE = 0.1  # of the numbers in expressions
SPACED = 0.3  # of the expressions
VAL, TEST = 0.05, 0.05  # of all sets of numbers

MIX = {  # shares of the lines
    "two_numbers": 0.15,
    "three_numbers": 0.20,
    "four_numbers": 0.25,
    "decimals": 0.10,
    "sentences": 0.20,
    "decoys": 0.10,
}

TEMPLATES = {  # how a sentence reads: how its answer is computed
    "add {a} and {b}. ": lambda a, b: a + b,
    "add {a} to {b}: ": lambda a, b: a + b,
    "what is {a} plus {b}? ": lambda a, b: a + b,
    "the sum of {a} and {b} is ": lambda a, b: a + b,
    "subtract {a} from {b}. ": lambda a, b: b - a,
    "take {a} away from {b}: ": lambda a, b: b - a,
    "what is {a} minus {b}? ": lambda a, b: a - b,
    "multiply {a} by {b}. ": lambda a, b: a * b,
    "what is {a} times {b}? ": lambda a, b: a * b,
    "the product of {a} and {b} is ": lambda a, b: a * b,
    "add {a} and {b}, then multiply by {c}. ": lambda a, b, c: (a + b) * c,
    "multiply {a} by {b}, then subtract {c}. ": lambda a, b, c: a * b - c,
    "{name} has {a} {item} and buys {b} more. how many? ": lambda a, b: a + b,
    "{name} had {a} {item} and gave {b} away. how many are left? ": lambda a, b: a - b,
    "{name} has {a} {item} and loses {b}. how many are left? ": lambda a, b: a - b,
    "there are {a} boxes of {b} {item}. how many in all? ": lambda a, b: a * b,
    "{a} {item} cost {b} cents each. how much in all? ": lambda a, b: a * b,
    "{name} has {a} {item}, buys {b} and loses {c}. how many? ": lambda a, b, c: a + b - c,
    "{name} has {a} boxes of {b} {item} and {c} more. how many? ": lambda a, b, c: a * b + c,
    "{name} had {a} boxes of {b} {item} and lost {c}. how many? ": lambda a, b, c: a * b - c,
}
UNSEEN_TEMPLATES = {
    "find {a} plus {b}. ": lambda a, b: a + b,
    "if {a} is added to {b} we get ": lambda a, b: a + b,
    "from {a} subtract {b}. ": lambda a, b: a - b,
    "{a} multiplied by {b} is ": lambda a, b: a * b,
    "take the product of {a} and {b} and add {c}. ": lambda a, b, c: a * b + c,
    "{name} buys {a} {item} and then {b} more. how many in all? ": lambda a, b: a + b,
    "of {a} {item} {name} gave away {b}. how many are left? ": lambda a, b: a - b,
    "{name} has {b} {item} in each of {a} boxes. how many? ": lambda a, b: a * b,
}
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
NAMES = ("ann", "ben", "mia", "sam", "zoe")
ITEMS = ("apples", "books", "cards", "coins", "eggs", "pens")

RANK = {"+": 1, "-": 1, "*": 2}  # what binds tighter is higher; a number, 3
APPLY = {"+": lambda a, b: a + b, "-": lambda a, b: a - b, "*": lambda a, b: a * b}
EXACT = decimal.Context(prec=100, traps=[decimal.Inexact])  # raises rather than rounds
NUMBER = re.compile(r"\d+(?:\.\d+)?")


@dataclass(frozen=True)
class Settings:
    out_dir: str = setting(str(Path(__file__).parent), "folder to write to")
    lines: int = setting(200_000, "lines of training text", minimum=1)
    seed: int = setting(1337, "another seed draws other lines", minimum=0)
    max_digits: int = setting(3, "of a number; 7 and more are kept for extrapolation", minimum=1, below=7)
    max_operands: int = setting(4, "of an expression; 5 and more are kept likewise", minimum=2, below=5)
    problems_per_split: int = setting(500, "problems in every file under problems/", minimum=1)


class Problem(NamedTuple):
    prompt: str
    answer: str

    @property
    def line(self) -> str:
        return self.prompt + self.answer


Draw = Callable[[random.Random], Problem]


# ------------------------------------------------------------------------------------------------------------
# one problem; `digits` is the range that the length of a number is drawn from, before its value


def draw_natural(rng: random.Random, digits: range) -> int:
    length = rng.choice(digits)
    return rng.randrange(10 ** (length - 1) if length > 1 else 0, 10**length)


def draw_integer(rng: random.Random, digits: range) -> int:
    value = draw_natural(rng, digits)
    return -value if rng.random() < NEGATIVE else value


def draw_decimal(rng: random.Random, digits: range, places: int) -> decimal.Decimal:
    """With exactly so many places, the last of them not 0."""
    if places == 0:
        return decimal.Decimal(draw_integer(rng, digits))
    fraction = 10 * rng.randrange(10 ** (places - 1)) + rng.randint(1, 9)
    sign = "-" if rng.random() < NEGATIVE else ""
    return decimal.Decimal(f"{sign}{draw_natural(rng, digits)}.{fraction:0{places}d}")


def draw_tree(rng: random.Random, numbers: list, signs: dict[str, str]):
    """-> an expression of these numbers in this order, with the parentheses it needs; its rank; its value"""
    if len(numbers) == 1:
        return str(numbers[0]), 3, numbers[0]
    cut = rng.randrange(1, len(numbers))
    left, left_rank, a = draw_tree(rng, numbers[:cut], signs)
    right, right_rank, b = draw_tree(rng, numbers[cut:], signs)
    operation = rng.choice("+-*")
    rank = RANK[operation]
    left = f"({left})" if left_rank < rank else left
    right = f"({right})" if right_rank <= rank else right
    return left + signs[operation] + right, rank, APPLY[operation](a, b)


def draw_expression(rng: random.Random, numbers: list) -> Problem:
    space = " " if rng.random() < SPACED else ""
    text, _, value = draw_tree(rng, numbers, {sign: space + sign + space for sign in RANK})
    return Problem(f"{text}{space}={space}", written(value))


def draw_integers(rng: random.Random, count: int, digits: range) -> Problem:
    return draw_expression(rng, [draw_integer(rng, digits) for _ in range(count)])


def draw_decimals(rng: random.Random, max_count: int, digits: range) -> Problem:
    places = [rng.randint(0, 2) for _ in range(rng.randint(2, max_count))]
    places[rng.randrange(len(places))] = rng.randint(1, 2)
    with decimal.localcontext(EXACT):
        return draw_expression(rng, [draw_decimal(rng, digits, p) for p in places])


def written(value: int | decimal.Decimal) -> str:
    """All its digits, and no 0 behind a decimal point's last one; never -0."""
    return str(value) if isinstance(value, int) else f"{value.normalize() + 0:f}"


def draw_words(rng: random.Random, template: str, digits: range) -> tuple[str, dict[str, int]]:
    numbers = {name: draw_natural(rng, digits) for name in "abc" if f"{{{name}}}" in template}
    return template.format(name=rng.choice(NAMES), item=rng.choice(ITEMS), **numbers), numbers


def draw_sentence(rng: random.Random, templates: dict[str, Callable[..., int]], digits: range) -> Problem:
    template = rng.choice(list(templates))
    while True:
        prompt, numbers = draw_words(rng, template, digits)
        answer = templates[template](**numbers)
        if answer >= 0 or "{item}" not in template:  # nobody is left with fewer than no apples
            return Problem(prompt, str(answer))


def draw_decoy(rng: random.Random, digits: range) -> Problem:
    template = rng.choice(DECOYS)
    while True:
        line, numbers = draw_words(rng, template, digits)
        values = list(numbers.values())
        if not any(is_computable(value, values[:i]) for i, value in enumerate(values)):
            answer = str(values[-1])
            return Problem(line.removesuffix(answer), answer)


def is_computable(target: int, numbers: list[int]) -> bool:
    """Whether the target is one of the numbers, or + - * / of two of them or of one with itself."""
    return target in numbers or any(
        target in (a + b, a - b, a * b) or (b != 0 and target * b == a) for a in numbers for b in numbers
    )


# ------------------------------------------------------------------------------------------------------------
# kinds of problems and their splits


def interpolation(settings: Settings) -> dict[str, Draw]:
    """What the corpus is made of, by the keys of MIX; three and four numbers only up to max_operands."""
    digits = range(1, settings.max_digits + 1)
    kinds = {
        "two_numbers": partial(draw_integers, count=2, digits=digits),
        "three_numbers": partial(draw_integers, count=3, digits=digits),
        "four_numbers": partial(draw_integers, count=4, digits=digits),
        "decimals": partial(draw_decimals, max_count=min(3, settings.max_operands), digits=digits),
        "sentences": partial(draw_sentence, templates=TEMPLATES, digits=digits),
        "decoys": partial(draw_decoy, digits=digits),
    }
    for kind in ("three_numbers", "four_numbers")[settings.max_operands - 2 :]:
        del kinds[kind]
    return {kind: partial(draw_fitting, draw=draw) for kind, draw in kinds.items()}


def extrapolation(settings: Settings) -> dict[str, Draw]:
    digits = range(1, settings.max_digits + 1)
    return {
        "digits_8": partial(draw_integers, count=2, digits=range(8, 9)),
        "digits_18": partial(draw_integers, count=2, digits=range(18, 19)),
        "sentence_digits_7": partial(draw_sentence, templates=TEMPLATES, digits=range(7, 8)),
        "operands_5": partial(draw_integers, count=5, digits=digits),
        "operands_6": partial(draw_integers, count=6, digits=digits),
        "unseen_templates": partial(draw_sentence, templates=UNSEEN_TEMPLATES, digits=digits),
    }


def draw_fitting(rng: random.Random, draw: Draw) -> Problem:
    while len((problem := draw(rng)).line) > MAX_LINE:
        pass
    return problem


def split_of(problem: Problem) -> str:
    numbers = " ".join(sorted(NUMBER.findall(problem.prompt)))
    place = int.from_bytes(hashlib.blake2b(numbers.encode(), digest_size=4).digest(), "big") / 2**32
    return "val" if place < VAL else "test" if place < VAL + TEST else "train"


def draw_corpus(settings: Settings) -> dict[str, list[str]]:
    """The lines of training and validation. Training lines may repeat, those of validation do not."""
    rng = random.Random(f"{settings.seed} corpus")
    draws = interpolation(settings)
    kinds, shares = list(draws.values()), [MIX[kind] for kind in draws]
    train, val = [], {}
    while len(train) < settings.lines:
        problem = rng.choices(kinds, shares)[0](rng)
        split = split_of(problem)
        if split == "train":
            train.append(problem.line)
        elif split == "val":
            val.setdefault(without_blanks(problem.prompt), problem.line)
    return {"train": train, "val": list(val.values())}


def draw_problems(settings: Settings) -> Iterator[tuple[str, list[Problem]]]:
    """-> (name, problems) of every file"""
    for kind, draw in interpolation(settings).items():
        for split in ("val", "test"):
            yield f"{split}_{kind}", draw_distinct(f"{split}_{kind}", draw, split, settings)
    for name, draw in extrapolation(settings).items():
        yield name, draw_distinct(name, draw, "test", settings)


def draw_distinct(name: str, draw: Draw, split: str, settings: Settings) -> list[Problem]:
    rng = random.Random(f"{settings.seed} {name}")
    found, wanted = {}, settings.problems_per_split
    for _ in range(wanted * 500):  # about 20 for each are needed where problems abound
        problem = draw(rng)
        if split_of(problem) == split:
            found.setdefault(without_blanks(problem.prompt), problem)
        if len(found) == wanted:
            return list(found.values())
    raise ValueError(
        f"found only {len(found)} different problems for {name}: raise --max_digits or lower "
        f"--problems_per_split={wanted}"
    )


def without_blanks(text: str) -> str:
    return text.replace(" ", "")


def prepare(settings: Settings) -> dict:
    """Writes everything, meta.json last, and returns its content."""
    folder = Path(settings.out_dir) / "problems"
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("*.tsv"):
        old.unlink()
    for name, problems in draw_problems(settings):
        lines = [f"{problem.prompt}\t{problem.answer}\n" for problem in problems]
        (folder / f"{name}.tsv").write_text("".join(lines), encoding="ascii")
    return write_dataset(
        settings.out_dir,
        "arithmetic",
        CharTokenizer(ALPHABET),
        draw_corpus(settings),
        documents=True,
        prepare=to_dict(settings),
    )


def main():
    settings = load(Settings)
    splits = prepare(settings)["splits"]
    for split in splits:
        print(
            f"{settings.out_dir}: {split} has {splits[split]['documents']:,} lines, "
            f"{splits[split]['tokens']:,} tokens"
        )


if __name__ == "__main__":
    run_script(main)
