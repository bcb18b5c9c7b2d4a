"""Addition of two numbers below 1000 from 1,000 lines: can a small GPT learn it from so few?

    python data/addition_1k/prepare.py
    python data/addition_1k/prepare.py --lines=5_000 --out_dir=data/addition_5k

    123+456=579

Both numbers are uniform over 0 to 999, no line is there twice, and the problems (see data/synthetic.py for their
files) are sums of numbers that no line adds, in either order: 500 in val_sums, 1,000 in test_sums.

The plain format of Lee et al. 2023, https://arxiv.org/abs/2307.03381
"""

import random
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from configurator import load, run_script, setting, to_dict  # noqa: E402
from data import synthetic as ar  # noqa: E402
from data.loader import summary  # noqa: E402

ALPHABET = "\n+=0123456789"
PROBLEMS = {"val": 500, "test": 1000}


@dataclass(frozen=True)
class Settings:
    out_dir: str = setting(str(Path(__file__).parent), "folder to write to")
    lines: int = setting(1000, "lines of training text, all different", minimum=1, below=800_001)
    seed: int = setting(1337, "another seed draws other lines", minimum=0)


def draw_sum(rng: random.Random) -> ar.Problem:
    a, b = rng.randrange(1000), rng.randrange(1000)
    return ar.Problem(f"{a}+{b}=", str(a + b))


def prepare(settings: Settings) -> dict:
    """Writes everything and returns the content of meta.json."""
    train = ar.draw_distinct(f"{settings.seed} train", draw_sum, "train", settings.lines)
    problems = {
        split: ar.draw_distinct(f"{settings.seed} {split}", draw_sum, split, count)
        for split, count in PROBLEMS.items()
    }
    corpus = {"train": [problem.line for problem in train], "val": [p.line for p in problems["val"]]}
    files = {f"{split}_sums": problems[split] for split in PROBLEMS}
    return ar.write(settings.out_dir, "addition_1k", ALPHABET, corpus, files, to_dict(settings))


def main():
    settings = load(Settings)
    print(f"{settings.out_dir}: {summary(prepare(settings))}")


if __name__ == "__main__":
    run_script(main)
