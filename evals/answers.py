"""How good a model is: its loss on held-out text, and its attempts at problems with one right answer.

A file of problems has a line for each, `prompt<TAB>answer`; a blank at the end of a prompt counts:

    12+7*3=	33
    subtract 12 from 30. 	18

A model attempts one by continuing the prompt greedily up to the document separator. Decoys, the problems of a
file whose name ends so, have nothing to compute: whatever number a model writes there solves nothing.
"""

import re
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path

import torch

from dag_model import GPT
from data.loader import Loader
from data.tokenizer import Tokenizer
from inference.engine import generate
from training import device as runtime

SPARE_TOKENS = 8  # beyond the length of the answer: enough to see that an attempt goes on too long
NUMBER = re.compile(r"[+-]?(?=\.?\d)\d*(/0*[1-9]\d*|(\.\d*)?(e[+-]?\d{1,3})?)", re.IGNORECASE)


@dataclass(frozen=True)
class Problem:
    prompt: str
    answer: str


@dataclass(frozen=True)
class Attempt:
    prompt: str
    answer: str
    output: str  # what the model wrote, without the separator
    correct: bool
    tokens: tuple[int, ...] = ()  # of the output
    part: str = ""  # that failed, set by diagnosis.diagnose
    plan: str = ""  # as text, where there is one; likewise


# ------------------------------------------------------------------------------------------------------------
# problems


def read_problems(path: str | Path, tokenizer: Tokenizer | None = None) -> list[Problem]:
    """The problems of a file. Blank lines are skipped; a malformed line is a ValueError with its number, and
    so is a prompt that the tokenizer, where one is given, has no tokens for."""
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text (byte {error.start}): save it as UTF-8") from None
    problems = []
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        prompt, *answers = line.split("\t")
        if not prompt or len(answers) != 1 or not answers[0].strip():
            raise ValueError(f"{path}:{number}: expected prompt<TAB>answer, found {line!r}")
        problems.append(Problem(prompt, answers[0]))
        if tokenizer is not None:
            try:
                encode(tokenizer, prompt)
            except ValueError as error:
                raise ValueError(f"{path}:{number}: {error}") from None
    if not problems:
        raise ValueError(f"{path} has no problems: write one a line, prompt<TAB>answer")
    return problems


def splits(data_dir: str | Path, prefix: str = "val_") -> dict[str, Path]:
    """The data set's files of problems whose names begin with `prefix`, but decoys; {} where it has none."""
    paths = sorted((Path(data_dir) / "problems").glob(f"{prefix}*.tsv"))
    return {path.stem: path for path in paths if not is_decoys(path.stem)}


def is_decoys(name: str) -> bool:
    return name.endswith("decoys")


def encode(tokenizer: Tokenizer, prompt: str) -> list[int]:
    try:
        return tokenizer.encode(prompt)
    except ValueError as error:
        raise ValueError(f"prompt {prompt!r}: {error}") from None


def in_batches(items: list, size: int) -> list[list]:
    return [items[start : start + size] for start in range(0, len(items), size)]


# ------------------------------------------------------------------------------------------------------------
# attempts


def solve(model: GPT, tokenizer: Tokenizer, problems: list[Problem], batch_size: int = 64) -> list[Attempt]:
    """Attempts at all problems, in their order. A prompt longer than the model's context is a failed attempt
    without output; one outside the vocabulary is a ValueError, raised before anything is attempted.
    """
    encoded = [encode(tokenizer, problem.prompt) for problem in problems]
    attempts = [Attempt(problem.prompt, problem.answer, "", False) for problem in problems]
    readable = [n for n, prompt in enumerate(encoded) if len(prompt) <= model.config.block_size]
    for batch in in_batches(readable, batch_size):
        longest = max(len(problems[n].answer.encode()) for n in batch)  # bytes: no token is less than one
        prompts, stop = [encoded[n] for n in batch], [[tokenizer.separator_id]]
        written = generate(model, prompts, longest + SPARE_TOKENS, temperature=0, stop=stop)
        for n, tokens in zip(batch, written):
            if tokens[-1] == tokenizer.separator_id:
                tokens = tokens[:-1]
            output = tokenizer.decode(tokens)
            correct = output.strip() == problems[n].answer.strip()
            attempts[n] = replace(attempts[n], output=output, correct=correct, tokens=tuple(tokens))
    return attempts


def to_number(text: str) -> Fraction | None:
    """Of -12, 3.50, 3/4 or 1e-3; None for any other text."""
    return Fraction(text) if NUMBER.fullmatch(text) else None


def is_close(attempt: Attempt, rel_tol: float) -> bool:
    """Whether the output is the answer, or a number within rel_tol * |answer| of it; of 0, within rel_tol."""
    answer, output = to_number(attempt.answer.strip()), to_number(attempt.output.strip())
    if answer is None or output is None:
        return attempt.correct
    tolerance = Fraction(str(rel_tol))  # as it was typed: 0.3 the float is a little less
    return abs(output - answer) <= tolerance * (abs(answer) or 1)


# ------------------------------------------------------------------------------------------------------------
# loss


@torch.no_grad()
def mean_loss(
    model: torch.nn.Module, loader: Loader, batches: int, device: torch.device, dtype: torch.dtype
) -> float:
    """Mean cross-entropy in nats over the loader's first `batches`, each with the same weight, however much
    of it is padding. The host waits for the device, once."""
    loader.reset()
    total = torch.zeros((), device=device)
    for _ in range(batches):
        x, y = loader.next_batch()
        with runtime.autocast(device, dtype):
            total += model(x.to(device), y.to(device))[1]
    return total.item() / batches


def bytes_per_token(loader: Loader, batches: int, tokenizer: Tokenizer) -> float:
    """Of what is predicted in the loader's first `batches`; a separator is one byte, as a newline."""
    length = torch.tensor([len(token) for token in tokenizer.vocabulary])
    length[tokenizer.separator_id] = 1
    loader.reset()
    targets = torch.cat([y[y >= 0] for _, y in (loader.next_batch() for _ in range(batches))])
    return length[targets].double().mean().item()
