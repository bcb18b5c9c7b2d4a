"""Expressions of 2, 3 and 4 numbers within +-100 with + - * and /, a line a document, written in many ways.

    python data/multiop/prepare.py

    ((63*-26) - 7)=-1645                   what is ( -84 / 16 )? -5.25
    (a/b), ((a+b)/(c-d)), (a+(b*(c-d)))    trees of every shape, with parentheses around every operation, or
                                           every one but the outermost, or those that are needed: 3+5*2
    -7 (-7) 7 +7  12.5 12.50               a line keeps to its way with signs, with places and with blanks

Answers have up to 8 significant digits, rounded half to even: 22/7=3.1428571. The kinds of problems (see
data/synthetic.py) are those of MIX.

The task of OccamLLM's multistep arithmetic, https://arxiv.org/abs/2406.06576
"""

import random
import sys
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from configurator import load, run_script, setting, to_dict  # noqa: E402
from data import synthetic as ar  # noqa: E402
from data.loader import summary  # noqa: E402

ALPHABET = "\n ()*+,-./0123456789:=?ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
LIMIT = 100  # of the numbers, on both sides of zero
DIGITS = 8  # of an answer; no line is longer than 95 characters

MIX = {"numbers_2": 0.25, "numbers_3": 0.35, "numbers_4": 0.40}  # shares of the lines

OPENINGS = (
    "compute ",
    "what is ",
    "calculate ",
    "evaluate ",
    "find ",
    "solve ",
    "how much is ",
    "the value of ",
    "Compute ",
    "What is ",
    "Calculate ",
    "Evaluate ",
)
ENDINGS = ("=", " = ", " =", "= ", "? ", " is ", ": ")

OPENED = 0.5  # of the lines
DECIMALS = 0.35
SIGNED = 0.15  # write a plus before positive numbers
BRACKETED = 0.3  # put negative numbers into parentheses
MINIMAL = 0.25  # have the parentheses that are needed alone
BARE = 0.3  # of the others, lack the outermost


@dataclass(frozen=True)
class Settings:
    out_dir: str = setting(str(Path(__file__).parent), "folder to write to")
    lines: int = setting(200_000, "lines of training text", minimum=1)
    seed: int = setting(1337, "another seed draws other lines", minimum=0)
    problems_per_split: int = setting(500, "problems in every file under problems/", minimum=1)


def draw_number_style(rng: random.Random, places: int) -> Callable[[ar.Number], str]:
    plus, bracketed, all_places = rng.random() < SIGNED, rng.random() < BRACKETED, rng.random() < 0.5

    def number(value: ar.Number) -> str:
        text = ar.to_places(value, places) if all_places else ar.exact(value)
        if value < 0:
            return f"({text})" if bracketed else text
        return "+" + text if plus else text

    return number


def draw_signs(rng: random.Random) -> dict[str, str]:
    """No blanks, blanks around all operations, or around some."""
    spaced = rng.choice(("", "+-*/", [sign for sign in "+-*/" if rng.random() < 0.5]))
    return {sign: f" {sign} " if sign in spaced else sign for sign in "+-*/"}


def draw_value(rng: random.Random, count: int, places: int) -> tuple[ar.Tree, ar.Number]:
    scale = 10**places
    while True:
        numbers = [Fraction(rng.randint(-LIMIT * scale, LIMIT * scale), scale) for _ in range(count)]
        tree = ar.draw_tree(rng, numbers, "+-*/")
        try:
            return tree, ar.value_of(tree)
        except ZeroDivisionError:
            pass


def draw_expression(rng: random.Random, count: int) -> ar.Problem:
    places = rng.choice((1, 2)) if rng.random() < DECIMALS else 0
    tree, value = draw_value(rng, count, places)
    full = rng.random() >= MINIMAL
    text = ar.infix(tree, draw_signs(rng), draw_number_style(rng, places), full)
    if full and rng.random() >= BARE:
        text = f"({text})"
    opening = rng.choice(OPENINGS) if rng.random() < OPENED else ""
    return ar.Problem(opening + text + rng.choice(ENDINGS), ar.to_digits(value, DIGITS))


def kinds() -> dict[str, ar.Draw]:
    return {kind: partial(draw_expression, count=int(kind[-1])) for kind in MIX}


def prepare(settings: Settings) -> dict:
    """Writes everything and returns the content of meta.json."""
    problems = ar.draw_files(settings.seed, kinds(), settings.problems_per_split)
    corpus = ar.draw_corpus(settings.seed, kinds(), MIX, settings.lines)
    return ar.write(settings.out_dir, "multiop", ALPHABET, corpus, problems, to_dict(settings))


def main():
    settings = load(Settings)
    print(f"{settings.out_dir}: {summary(prepare(settings))}")


if __name__ == "__main__":
    run_script(main)
