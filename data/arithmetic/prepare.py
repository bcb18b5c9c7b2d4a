"""Arithmetic in plain text, a line a document, made on the spot from a seed.

    python data/arithmetic/prepare.py
    python data/arithmetic/prepare.py --lines=50_000 --max_digits=2 --out_dir=data/small --seed=7

    12+7*3=33                    (5 - -20) * 3 = 75           1.5+2.25=3.75
    subtract 12 from 30. 18      sam has 9 apples and buys 4 more. how many? 13
    room 12 is on floor 7        a decoy: numbers, but nothing to compute

The kinds of problems (see data/synthetic.py for their files) are

- those of MIX: the corpus consists of them
- those of `extrapolation`, which the corpus never shows: longer or more numbers, other words, and the other
  words of val are not those of test
"""

import random
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from configurator import load, run_script, setting, to_dict  # noqa: E402
from data import synthetic as ar  # noqa: E402
from data.loader import summary  # noqa: E402

ALPHABET = "\n ()*+,-.0123456789:=?abcdefghijklmnopqrstuvwxyz"
MAX_LINE = 63  # characters, so that every line fits block_size=64 with its newline
SPACED = 0.3  # of the expressions
VAL_EXTRAPOLATION = 200  # problems a file at most: a run is watched on them

MIX = {  # shares of the lines
    "two_numbers": 0.15,
    "three_numbers": 0.20,
    "four_numbers": 0.25,
    "decimals": 0.10,
    "sentences": 0.20,
    "decoys": 0.10,
}

Templates = dict[str, Callable[..., int]]

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
VAL_TEMPLATES = {  # not in training, and not those of test
    "compute {a} plus {b}: ": lambda a, b: a + b,
    "{a} and {b} together make ": lambda a, b: a + b,
    "when {a} is taken from {b} we keep ": lambda a, b: b - a,
    "how much is {a} times {b}? ": lambda a, b: a * b,
    "the product of {a} and {b} less {c} is ": lambda a, b, c: a * b - c,
    "{name} finds {a} {item} and then {b} others. how many now? ": lambda a, b: a + b,
    "{name} sold {b} of {a} {item}. how many stay? ": lambda a, b: a - b,
    "{a} bags hold {b} {item} each. how many is that? ": lambda a, b: a * b,
}
TEST_TEMPLATES = {  # likewise
    "find {a} plus {b}. ": lambda a, b: a + b,
    "if {a} is added to {b} we get ": lambda a, b: a + b,
    "from {a} subtract {b}. ": lambda a, b: a - b,
    "{a} multiplied by {b} is ": lambda a, b: a * b,
    "take the product of {a} and {b} and add {c}. ": lambda a, b, c: a * b + c,
    "{name} buys {a} {item} and then {b} more. how many in all? ": lambda a, b: a + b,
    "of {a} {item} {name} gave away {b}. how many are left? ": lambda a, b: a - b,
    "{name} has {b} {item} in each of {a} boxes. how many? ": lambda a, b: a * b,
}


@dataclass(frozen=True)
class Settings:
    out_dir: str = setting(str(Path(__file__).parent), "folder to write to")
    lines: int = setting(200_000, "lines of training text", minimum=1)
    seed: int = setting(1337, "another seed draws other lines", minimum=0)
    max_digits: int = setting(3, "of a number; 7 and more are kept for extrapolation", minimum=1, below=7)
    max_operands: int = setting(4, "of an expression; 5 and more are kept likewise", minimum=2, below=5)
    problems_per_split: int = setting(500, "problems in every file under problems/", minimum=1)


def draw_expression(rng: random.Random, numbers: list[ar.Number]) -> ar.Problem:
    space = " " if rng.random() < SPACED else ""
    tree = ar.draw_tree(rng, numbers)
    text = ar.infix(tree, {sign: space + sign + space for sign in "+-*"})
    return ar.Problem(f"{text}{space}={space}", ar.exact(ar.value_of(tree)))


def draw_integers(rng: random.Random, count: int, digits: range) -> ar.Problem:
    return draw_expression(rng, [ar.draw_integer(rng, digits) for _ in range(count)])


def draw_decimals(rng: random.Random, max_count: int, digits: range) -> ar.Problem:
    places = [rng.randint(0, 2) for _ in range(rng.randint(2, max_count))]
    places[rng.randrange(len(places))] = rng.randint(1, 2)
    return draw_expression(rng, [ar.draw_decimal(rng, digits, p) for p in places])


def draw_sentence(rng: random.Random, templates: Templates, digits: range) -> ar.Problem:
    template = rng.choice(list(templates))
    while True:
        prompt, numbers = ar.draw_words(rng, template, digits)
        answer = templates[template](**numbers)
        if answer >= 0 or "{item}" not in template:  # nobody is left with fewer than no apples
            return ar.Problem(prompt, str(answer))


def interpolation(settings: Settings) -> dict[str, ar.Draw]:
    """What the corpus is made of, by the keys of MIX; three and four numbers only up to max_operands."""
    digits = range(1, settings.max_digits + 1)
    kinds = {
        "two_numbers": partial(draw_integers, count=2, digits=digits),
        "three_numbers": partial(draw_integers, count=3, digits=digits),
        "four_numbers": partial(draw_integers, count=4, digits=digits),
        "decimals": partial(draw_decimals, max_count=min(3, settings.max_operands), digits=digits),
        "sentences": partial(draw_sentence, templates=TEMPLATES, digits=digits),
        "decoys": partial(ar.draw_decoy, digits=digits),
    }
    for kind in ("three_numbers", "four_numbers")[settings.max_operands - 2 :]:
        del kinds[kind]
    return {kind: partial(ar.draw_fitting, draw=draw, length=MAX_LINE) for kind, draw in kinds.items()}


def extrapolation(settings: Settings, templates: Templates) -> dict[str, ar.Draw]:
    """What the corpus never shows; `templates` are the unseen ones."""
    digits = range(1, settings.max_digits + 1)
    return {
        "digits_8": partial(draw_integers, count=2, digits=range(8, 9)),
        "digits_18": partial(draw_integers, count=2, digits=range(18, 19)),
        "sentence_digits_7": partial(draw_sentence, templates=TEMPLATES, digits=range(7, 8)),
        "operands_5": partial(draw_integers, count=5, digits=digits),
        "operands_6": partial(draw_integers, count=6, digits=digits),
        "unseen_templates": partial(draw_sentence, templates=templates, digits=digits),
    }


def draw_problems(settings: Settings) -> dict[str, list[ar.Problem]]:
    """-> the problems of every file"""
    seed, count = settings.seed, settings.problems_per_split
    problems = ar.draw_files(seed, interpolation(settings), count)
    for kind, draw in extrapolation(settings, VAL_TEMPLATES).items():
        few = min(count, VAL_EXTRAPOLATION)
        problems[f"val_{kind}"] = ar.draw_distinct(f"{seed} val_{kind}", draw, "val", few)
    for kind, draw in extrapolation(settings, TEST_TEMPLATES).items():
        problems[f"test_{kind}"] = ar.draw_distinct(f"{seed} {kind}", draw, "test", count)
    return problems


def prepare(settings: Settings) -> dict:
    """Writes everything and returns the content of meta.json."""
    problems = draw_problems(settings)
    corpus = ar.draw_corpus(settings.seed, interpolation(settings), MIX, settings.lines)
    return ar.write(settings.out_dir, "arithmetic", ALPHABET, corpus, problems, to_dict(settings))


def main():
    settings = load(Settings)
    print(f"{settings.out_dir}: {summary(prepare(settings))}")


if __name__ == "__main__":
    run_script(main)
