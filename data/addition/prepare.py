"""Addition of two numbers of 1 to 6 digits, a line a document, and sums far longer than those.

    python data/addition/prepare.py

    123+4567=4690

Kinds of problems (see data/synthetic.py for their files):

    digits_1_6                 as in training
    digits_7_12, digits_13_20  longer: as in Neural Firmware Arithmetic's table
    carries                    every digit of a number of 4 to 20 digits carries: 9999+37, 4726+5274
    digits_100                 100 problems
"""

import random
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from configurator import load, run_script, setting, to_dict  # noqa: E402
from data import synthetic as ar  # noqa: E402
from data.loader import summary  # noqa: E402

ALPHABET = "\n+=0123456789"
LONG = 100  # problems of 100 digits


@dataclass(frozen=True)
class Settings:
    out_dir: str = setting(str(Path(__file__).parent), "folder to write to")
    lines: int = setting(200_000, "lines of training text", minimum=1)
    seed: int = setting(1337, "another seed draws other lines", minimum=0)
    max_digits: int = setting(6, "of a number; 7 and more are kept for extrapolation", minimum=1, below=7)
    problems_per_split: int = setting(500, "problems in every file under problems/", minimum=1)


def plain(a: int, b: int) -> ar.Problem:
    return ar.Problem(f"{a}+{b}=", str(a + b))


def draw_sum(rng: random.Random, digits: range) -> ar.Problem:
    return plain(ar.draw_natural(rng, digits), ar.draw_natural(rng, digits))


def draw_carries(rng: random.Random, digits: range) -> ar.Problem:
    """Half are nines and a number of any length, half two numbers of one length; in either order."""
    length, nines = rng.choice(digits), rng.random() < 0.5
    a = [9] * length if nines else [rng.randint(1, 9) for _ in range(length)]
    b = [rng.randint(9 - digit, 9) for digit in a[:-1]] + [rng.randint(10 - a[-1], 9)]
    b = b[-rng.randint(1, length) :] if nines else b
    return plain(*(int("".join(map(str, part))) for part in rng.sample((a, b), 2)))


def kinds(settings: Settings) -> dict[str, ar.Draw]:
    """The first is what the corpus is made of."""
    return {
        f"digits_1_{settings.max_digits}": partial(draw_sum, digits=range(1, settings.max_digits + 1)),
        "digits_7_12": partial(draw_sum, digits=range(7, 13)),
        "digits_13_20": partial(draw_sum, digits=range(13, 21)),
        "carries": partial(draw_carries, digits=range(4, 21)),
    }


def prepare(settings: Settings) -> dict:
    """Writes everything and returns the content of meta.json."""
    seed, count, draws = settings.seed, settings.problems_per_split, kinds(settings)
    seen = next(iter(draws))
    long = {"digits_100": partial(draw_sum, digits=range(100, 101))}
    problems = ar.draw_files(seed, draws, count) | ar.draw_files(seed, long, min(count, LONG))
    corpus = ar.draw_corpus(seed, {seen: draws[seen]}, {seen: 1.0}, settings.lines)
    return ar.write(settings.out_dir, "addition", ALPHABET, corpus, problems, to_dict(settings))


def main():
    settings = load(Settings)
    print(f"{settings.out_dir}: {summary(prepare(settings))}")


if __name__ == "__main__":
    run_script(main)
