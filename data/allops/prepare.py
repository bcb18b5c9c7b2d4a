"""Nine operations in symbols and in words, and answers in several formats, a line a document.

    python data/allops/prepare.py

    7/4=1.75                            22/7 to 3 places = 3.143           22/7 to 5 digits = 3.1429
    6/8 as a fraction = 3/4             (12+7)/4=4.75                      what is 1.5 plus -2? -0.5
    2^10=1024                           2^0.5 to 6 digits = 1.41421        log(7) to 4 places = 1.9459
    the larger of 3 and 9 is 9          which is smaller, 3 or 9? 3        repeat 317: 317

The kinds of problems (see data/synthetic.py) are those of MIX.

- a line is a phrase for the operation, the format of the answer, and an ending. Where it names no format, the
  answer has all its digits, and they end within 6 places
- log is the natural one, digits are the significant ones
- the operands alone decide a problem's split: 22/7 to 3 and to 5 places are in the same
"""

import decimal
import random
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from itertools import product
from operator import add, mul, sub
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from configurator import load, run_script, setting, to_dict  # noqa: E402
from data import synthetic as ar  # noqa: E402
from data.loader import summary  # noqa: E402

ALPHABET = "\n ()*+,-./0123456789:=?^abcdefghijklmnopqrstuvwxyz"
MAX_LINE = 63  # characters, so that every line fits block_size=64 with its newline
LENGTHS = range(1, 4)  # digits of a number before its point
ALONE = (1, 2, 2, 3, 3, 3, 3)  # the same for the only number, and for a base: there are but ten of one digit
PLACES, DIGITS = range(1, 7), range(2, 9)  # that a format may ask for
MAX_ANSWER = 12  # digits

SYMBOLS = 0.5  # of the lines of an operation that has them
SPACED = 0.3  # of those
DECIMAL = 0.2  # of the numbers
COMPOUND = 0.1  # of the operands of + - * / in symbols: (12+7)

EXPONENTS = (-3, -2, -1, 0, 1, *(2, 3, 4) * 3, *range(5, 11))  # those that are integers
ROOTS = 0.4  # of the exponents are not

PRECISE = decimal.Context(prec=40)  # far more than any format shows
NEARLY = decimal.Context(prec=30)  # 4^0.5 is 2, even where PRECISE only comes close

MIX = {  # shares of the lines
    "add": 0.10,
    "subtract": 0.10,
    "multiply": 0.10,
    "divide_decimal": 0.20,
    "divide_fraction": 0.08,
    "power": 0.14,
    "log": 0.08,
    "max": 0.05,
    "min": 0.05,
    "copy": 0.04,
    "decoys": 0.06,
}


@dataclass(frozen=True)
class Settings:
    out_dir: str = setting(str(Path(__file__).parent), "folder to write to")
    lines: int = setting(200_000, "lines of training text", minimum=1)
    seed: int = setting(1337, "another seed draws other lines", minimum=0)
    problems_per_split: int = setting(500, "problems in every file under problems/", minimum=1)


# ------------------------------------------------------------------------------------------------------------
# operations: ArithmeticError where there is no result


def divide(a: ar.Number, b: ar.Number) -> Fraction:
    return Fraction(a) / b


def power(a: ar.Number, b: ar.Number) -> Fraction:
    if b.denominator == 1:
        return Fraction(a) ** int(b)
    if a <= 0:
        raise ArithmeticError(f"{a}^{b} is not computed")
    return Fraction(NEARLY.plus(PRECISE.power(*map(decimal.Decimal, map(ar.exact, (a, b))))))


def log(a: ar.Number) -> Fraction:
    if a <= 0:
        raise ArithmeticError(f"there is no log({a})")
    return Fraction(PRECISE.ln(decimal.Decimal(ar.exact(a))))


class Operation(NamedTuple):
    """What it gives, and phrases for it: in symbols, as a noun, as a command, as a question. {a} to {c} are
    its operands, and {_} is where blanks may be."""

    value: Callable[..., ar.Number]
    symbols: tuple[str, ...] = ()
    nouns: tuple[str, ...] = ()
    commands: tuple[str, ...] = ()
    questions: tuple[str, ...] = ()


OPERATIONS = {
    "add": Operation(
        add,
        symbols=("{a}{_}+{_}{b}",),
        nouns=("{a} plus {b}", "the sum of {a} and {b}"),
        commands=("add {a} and {b}", "add {a} to {b}"),
    ),
    "subtract": Operation(
        sub,
        symbols=("{a}{_}-{_}{b}",),
        nouns=("{a} minus {b}", "{a} less {b}"),
        commands=("subtract {b} from {a}", "take {b} away from {a}"),
    ),
    "multiply": Operation(
        mul,
        symbols=("{a}{_}*{_}{b}",),
        nouns=("{a} times {b}", "{a} multiplied by {b}", "the product of {a} and {b}"),
        commands=("multiply {a} by {b}", "multiply {a} and {b}"),
    ),
    "divide": Operation(
        divide,
        symbols=("{a}{_}/{_}{b}",),
        nouns=("{a} divided by {b}", "{a} over {b}", "the quotient of {a} and {b}"),
        commands=("divide {a} by {b}",),
    ),
    "power": Operation(
        power,
        symbols=("{a}{_}^{_}{b}",),
        nouns=("{a} to the power {b}", "{a} to the power of {b}", "{a} raised to {b}"),
        commands=("raise {a} to the power {b}", "raise {a} to {b}"),
    ),
    "log": Operation(
        log,
        symbols=("log({a})", "ln({a})", "log {a}", "ln {a}"),
        nouns=("the log of {a}", "the natural log of {a}", "the logarithm of {a}"),
        commands=("take the log of {a}",),
    ),
    "max": Operation(
        max,
        symbols=("max({a},{_}{b})", "max({a},{_}{b})", "max({a},{_}{b},{_}{c})"),
        nouns=("the larger of {a} and {b}", "the maximum of {a} and {b}", "the largest of {a}, {b} and {c}"),
        questions=("which is larger, {a} or {b}", "which is more, {a} or {b}"),
    ),
    "min": Operation(
        min,
        symbols=("min({a},{_}{b})", "min({a},{_}{b})", "min({a},{_}{b},{_}{c})"),
        nouns=(
            "the smaller of {a} and {b}",
            "the minimum of {a} and {b}",
            "the smallest of {a}, {b} and {c}",
        ),
        questions=("which is smaller, {a} or {b}", "which is less, {a} or {b}"),
    ),
    "copy": Operation(
        lambda a: a,
        nouns=("the same as {a}",),
        commands=("repeat {a}", "copy {a}", "write {a}", "say {a} again"),
    ),
}
ENDINGS = {  # of the phrases in a field of Operation
    "symbols": ("{}=", "{} = ", "{}: ", "{} is ", "what is {}? "),
    "nouns": ("{} = ", "{}: ", "{} is ", "what is {}? "),
    "commands": ("{}. ", "{}: ", "{} = "),
    "questions": ("{}? ",),
}

# ------------------------------------------------------------------------------------------------------------
# formats


def short(value: ar.Number) -> str:
    """All digits; ArithmeticError where they do not end soon enough."""
    if value != round(value, PLACES[-1]):
        raise ArithmeticError(f"{value} does not end within {PLACES[-1]} places")
    return ar.exact(value)


class Format(NamedTuple):
    phrases: tuple[str, ...]
    write: Callable[[ar.Number, int], str]
    counts: range = range(1)  # of {n}


FORMATS = {
    "exact": Format(("",), lambda value, n: short(value)),
    "fraction": Format(
        (" as a fraction", " as a reduced fraction", " in lowest terms"),
        lambda value, n: ar.as_fraction(value),
    ),
    "places": Format(
        (" to {n} place{s}", " to {n} decimal place{s}", " to {n} decimal{s}", " rounded to {n} place{s}"),
        ar.to_places,
        PLACES,
    ),
    "digits": Format(
        (" to {n} digits", " to {n} significant digits", " rounded to {n} digits"), ar.to_digits, DIGITS
    ),
}
MOSTLY_EXACT = {"exact": 0.9, "places": 0.05, "digits": 0.05}
FORMATS_OF = {  # shares of a kind's lines
    "add": MOSTLY_EXACT,
    "subtract": MOSTLY_EXACT,
    "multiply": MOSTLY_EXACT,
    "divide_decimal": {"exact": 0.4, "places": 0.35, "digits": 0.25},
    "divide_fraction": {"fraction": 1.0},
    "power": {"exact": 0.5, "places": 0.2, "digits": 0.3},
    "log": {"places": 0.5, "digits": 0.5},
    "max": {"exact": 1.0},
    "min": {"exact": 1.0},
    "copy": {"exact": 1.0},
}

# ------------------------------------------------------------------------------------------------------------
# one problem


def draw_number(rng: random.Random, lengths: Sequence[int] = LENGTHS) -> ar.Number:
    return ar.draw_decimal(rng, lengths, rng.randint(1, 2) if rng.random() < DECIMAL else 0)


def draw_exponent(rng: random.Random) -> ar.Number:
    if rng.random() < ROOTS:
        return rng.choice((Fraction(1, 2), Fraction(rng.randint(-20, 40), 10)))
    return rng.choice(EXPONENTS)


def draw_operands(rng: random.Random, name: str, field: str, count: int) -> list[ar.Tree | ar.Number]:
    if name == "power":
        return [draw_number(rng, ALONE), draw_exponent(rng)]
    if count == 1:
        return [draw_number(rng, ALONE)]
    compound = COMPOUND if field == "symbols" and name in ("add", "subtract", "multiply", "divide") else 0
    sizes = [2 if rng.random() < compound else 1 for _ in range(count)]
    return [ar.draw_tree(rng, [draw_number(rng) for _ in range(size)]) for size in sizes]


def operand_text(operand: ar.Tree | ar.Number, is_base: bool) -> str:
    text = ar.infix(operand)
    return f"({text})" if isinstance(operand, ar.Tree) or is_base and operand < 0 else text


def draw_phrase(rng: random.Random, operation: Operation) -> tuple[str, str]:
    """-> the field of Operation that it is from; the phrase, blanks decided"""
    words = ("nouns", "commands", "questions")
    fields = ("symbols",) if operation.symbols and rng.random() < SYMBOLS else words
    field, phrase = rng.choice([(field, phrase) for field in fields for phrase in getattr(operation, field)])
    return field, phrase.replace("{_}", " " if rng.random() < SPACED else "")


def draw_problem(rng: random.Random, kind: str) -> ar.Problem:
    name = kind.partition("_")[0]
    field, phrase = draw_phrase(rng, OPERATIONS[name])
    names = [letter for letter in "abc" if f"{{{letter}}}" in phrase]
    shares = FORMATS_OF[kind]
    style = FORMATS[rng.choices(list(shares), list(shares.values()))[0]]
    n = rng.choice(style.counts)
    answer = None
    while answer is None or sum(map(str.isdigit, answer)) > MAX_ANSWER:
        operands = draw_operands(rng, name, field, len(names))
        try:
            answer = style.write(OPERATIONS[name].value(*map(ar.value_of, operands)), n)
        except ArithmeticError:
            answer = None
    texts = [operand_text(operand, name == "power" and i == 0) for i, operand in enumerate(operands)]
    text = phrase.format(**dict(zip(names, texts)))
    text += rng.choice(style.phrases).format(n=n, s="" if n == 1 else "s")
    return ar.Problem(rng.choice(ENDINGS[field]).format(text), answer, operands=" ".join(texts))


def is_computable(target: int, numbers: list[int]) -> bool:
    return ar.is_computable(target, numbers) or any(
        target == a**b for a, b in product(numbers, repeat=2) if b < 10
    )


def kinds() -> dict[str, ar.Draw]:
    draws = {kind: partial(draw_problem, kind=kind) for kind in FORMATS_OF}
    draws["decoys"] = partial(ar.draw_decoy, digits=LENGTHS, computable=is_computable)
    return {kind: partial(ar.draw_fitting, draw=draws[kind], length=MAX_LINE) for kind in MIX}


def prepare(settings: Settings) -> dict:
    """Writes everything and returns the content of meta.json."""
    problems = ar.draw_files(settings.seed, kinds(), settings.problems_per_split)
    corpus = ar.draw_corpus(settings.seed, kinds(), MIX, settings.lines)
    return ar.write(settings.out_dir, "allops", ALPHABET, corpus, problems, to_dict(settings))


def main():
    settings = load(Settings)
    print(f"{settings.out_dir}: {summary(prepare(settings))}")


if __name__ == "__main__":
    run_script(main)
