"""How good a model is: its loss on held-out text, and its attempts at problems with one right answer.

A file of problems has a line for each, `prompt<TAB>answer`; a blank at the end of a prompt counts:

    12+7*3=	33
    subtract 12 from 30. 	18

A model attempts one by continuing the prompt greedily up to the document separator.
"""

from dataclasses import dataclass, replace
from pathlib import Path

import torch

import runtime
from dag_model import GPT
from dataloader import Loader
from engine import generate
from tokenizer import Tokenizer

SPARE_TOKENS = 8  # beyond the length of the answer: enough to see that an attempt goes on too long


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


def read_problems(path: str | Path) -> list[Problem]:
    """The problems of a file. Blank lines are skipped; a malformed line is a ValueError with its number."""
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
    if not problems:
        raise ValueError(f"{path} has no problems: write one a line, prompt<TAB>answer")
    return problems


def splits(data_dir: str | Path, prefix: str = "val_") -> dict[str, Path]:
    """The data set's files of problems whose names begin with `prefix`; {} where it has none. Decoys are left
    out: there is nothing to compute in them, and whatever number a model writes there solves nothing.
    """
    paths = sorted((Path(data_dir) / "problems").glob(f"{prefix}*.tsv"))
    return {path.stem: path for path in paths if not path.stem.endswith("decoys")}


def solve(model: GPT, tokenizer: Tokenizer, problems: list[Problem], batch_size: int = 64) -> list[Attempt]:
    """Attempts at all problems, in their order. A prompt longer than the model's context is a failed attempt without
    output; one with characters outside the vocabulary is a ValueError, raised before anything is attempted.
    """
    encoded = [encode(tokenizer, problem.prompt) for problem in problems]
    attempts = [Attempt(problem.prompt, problem.answer, "", False) for problem in problems]
    readable = [n for n, prompt in enumerate(encoded) if len(prompt) <= model.config.block_size]
    for start in range(0, len(readable), batch_size):
        batch = readable[start : start + batch_size]
        longest = max(len(problems[n].answer.encode()) for n in batch)  # bytes: no token is less than one
        prompts, stop = [encoded[n] for n in batch], [[tokenizer.separator_id]]
        written = generate(model, prompts, longest + SPARE_TOKENS, temperature=0, stop=stop)
        for n, tokens in zip(batch, written):
            if tokens[-1] == tokenizer.separator_id:
                tokens = tokens[:-1]
            output = tokenizer.decode(tokens)
            correct = output.strip() == problems[n].answer.strip()
            attempts[n] = replace(attempts[n], output=output, correct=correct)
    return attempts


@torch.no_grad()
def mean_loss(
    model: torch.nn.Module, loader: Loader, batches: int, device: torch.device, dtype: torch.dtype
) -> float:
    """Mean cross-entropy in nats over the loader's first `batches`, each with the same weight, however much of it
    is padding. The host waits for the device, once."""
    loader.reset()
    total = torch.zeros((), device=device)
    for _ in range(batches):
        x, y = loader.next_batch()
        with runtime.autocast(device, dtype):
            total += model(x.to(device), y.to(device))[1]
    return total.item() / batches


def encode(tokenizer: Tokenizer, prompt: str) -> list[int]:
    try:
        return tokenizer.encode(prompt)
    except ValueError as error:
        raise ValueError(f"prompt {prompt!r}: {error}") from None
