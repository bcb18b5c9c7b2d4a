"""Score a trained model: its loss on the validation text, and the share of problems that it solves.

    python eval.py --out_dir=out/train_default-001                 # validation problems of its data set
    python eval.py --out_dir=out/train_default-001 --suite=all     # test problems, the unseen kinds too
    python eval.py --out_dir=out/train_default-001 --problems=mine.tsv --rel_tol=1e-4 --json=scores.json

A line of a problem file is `prompt<TAB>answer`. The model continues the prompt greedily up to the end of the
document, and has solved the problem if it wrote the answer, character for character. Prints a table, up to
ten failures with the part that failed (evals/failures.py) and its plan, and as the last line a JSON object. In it

    n, exact, within_tol, parts    problems, shares of them that are solved, and by rel_tol; failures by part
    gate_open, false_fires         share of answers whose gate is open, and of numbers in decoys; decoys have
                                   no other scores, and are not among the n
    val_loss, val_bpb              in nats a token and in bits a byte; and _silent, with the DAG silenced

Shares are between 0 and 1; what was not asked for, or the model does not have, is null.
"""

import json
import math
import re
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch

from configurator import load, run_script, setting
from dag_model import GPT
from data.loader import Loader, read_meta
from data.tokenizer import Tokenizer
from evals import answers, failures
from training import checkpoint
from training import device as runtime

SUITES = {  # the names of their files, as a regular expression
    "val": r"val_.*",
    "arithmetic": r"test_(?!digits|operands|sentence|unseen|decoys).*",
    "digits": r"test_digits.*",
    "operands": r"test_operands.*",
    "sentences": r"test_(sentence|unseen).*",
    "decoys": r"test_decoys",
    "test": r"test_(?!decoys).*",
    "all": r"test_.*",
}


@dataclass(frozen=True)
class EvaluateConfig:
    out_dir: str = setting("", "run folder of the model", section="model")
    checkpoint: str = setting("best", "which of its checkpoints", choices=("best", "last"))
    suite: str = setting(
        "val",
        "problems of the run's data set: val like those in training and some beyond, to choose models by; "
        "of the test problems one kind, test for all but decoys, or all",
        choices=tuple(SUITES),
        section="problems",
    )
    problems: str = setting("", "a file of problems to score instead")
    rel_tol: float | None = setting(None, "count answers within this relative error, too", minimum=0)
    silent: bool = setting(False, "score with the DAG silenced: what the trunk has learned by itself")
    batch_size: int = setting(64, "problems attempted together", minimum=1)
    eval_iters: int = setting(50, "batches of the validation text for the loss", minimum=1)
    json: str = setting("", "file to write the JSON object of the last line to, too")
    device: str = setting("auto", "auto, cpu, cuda, cuda:N or mps", section="system")

    def check(self) -> None:
        if not self.out_dir:
            raise ValueError("which run? give its folder as --out_dir=RUN")


def problem_files(config: EvaluateConfig, data_dir: Path) -> dict[str, Path]:
    """{name: path} of what is to be scored; {} for the validation problems of a data set without problems."""
    if config.problems:
        return {Path(config.problems).stem: Path(config.problems)}
    found = {path.stem: path for path in sorted((data_dir / "problems").glob("*.tsv"))}
    files = {name: path for name, path in found.items() if re.fullmatch(SUITES[config.suite], name)}
    if not files and config.suite != "val":
        raise ValueError(
            f"{data_dir} has no problems for suite={config.suite}, only {', '.join(found) or 'none'}"
        )
    return files


def validation_scores(
    model: GPT,
    tokenizer: Tokenizer,
    saved: checkpoint.Checkpoint,
    data_dir: Path,
    batches: int,
    device: torch.device,
) -> dict:
    """Over the batches whose first `eval_iters` a run on one process evaluates on."""
    checkpoint.require_vocabulary(saved, read_meta(data_dir))
    batch_size, block_size, seed = (saved.train_config[name] for name in ("batch_size", "block_size", "seed"))
    loader = Loader(data_dir, "val", batch_size=batch_size, block_size=block_size, seed=seed + 1)
    bytes_per_token = answers.bytes_per_token(loader, batches, tokenizer)
    scores = {}
    for suffix, silent in {"": False, "_silent": True}.items():
        if silent and model.dag is None:
            continue
        model.silent = silent
        loss = answers.mean_loss(model, loader, batches, device, torch.float32)
        scores |= {f"val_loss{suffix}": loss, f"val_bpb{suffix}": loss / math.log(2) / bytes_per_token}
    model.silent = False
    return scores


def validation_text(scores: dict, step: int) -> str:
    text = f"validation loss {scores['val_loss']:.4f}, {scores['val_bpb']:.4f} bits a byte"
    if scores["val_loss_silent"] is not None:
        text += f"; without the DAG {scores['val_loss_silent']:.4f}, {scores['val_bpb_silent']:.4f}"
    return f"{text}; at step {step}"


def share(flags: list[bool]) -> float | None:
    return sum(flags) / len(flags) if flags else None


def problem_scores(
    attempts: list[answers.Attempt], gates: list[bool], fires: list[bool], rel_tol: float | None
) -> dict:
    close = [] if rel_tol is None else [answers.is_close(attempt, rel_tol) for attempt in attempts]
    return dict(
        n=len(attempts),
        exact=share([attempt.correct for attempt in attempts]),
        within_tol=share(close),
        gate_open=share(gates),
        false_fires=share(fires),
        parts=dict(Counter(attempt.part for attempt in attempts if not attempt.correct)),
    )


COLUMNS = {"exact": "exact", "within_tol": "within", "gate_open": "gate open", "false_fires": "false fires"}


def table_row(name: str, scores: dict, columns: dict[str, str], width: int) -> str:
    cells = [
        f"{'-' if scores[key] is None else format(scores[key], '.1%'):>{len(title)}}"
        for key, title in columns.items()
    ]
    parts = ", ".join(f"{part} {count}" for part, count in scores["parts"].items())
    return "  ".join([f"{name:{width}}  {scores['n']:6}", *cells, parts]).rstrip()


def show_failures(attempts: list[answers.Attempt], count: int = 10) -> None:
    """Up to `count` of them, spread evenly, so that one split does not hide the others."""
    failed = [attempt for attempt in attempts if not attempt.correct]
    if not failed:
        return
    shown = failed[:: -(-len(failed) // count)]
    print(f"\n{len(shown)} of {len(failed)} failures:")
    for attempt in shown:
        planned = f"; planned {attempt.plan}" if attempt.plan else ""
        output = attempt.output or "[nothing]"
        print(f"  {attempt.part}: {attempt.prompt}{output}  (right is {attempt.answer}{planned})")


def main() -> None:
    config = load(EvaluateConfig)
    device = runtime.resolve_device(config.device)
    model, tokenizer, saved = checkpoint.load_model(config.out_dir, config.checkpoint, device)
    data_dir = Path(saved.train_config["data_dir"]) / saved.train_config["dataset"]
    files = problem_files(config, data_dir)
    problems = {name: answers.read_problems(path, tokenizer) for name, path in files.items()}

    since = time.perf_counter()
    validation = dict.fromkeys(("val_loss", "val_bpb", "val_loss_silent", "val_bpb_silent"))
    if not config.problems:
        validation |= validation_scores(model, tokenizer, saved, data_dir, config.eval_iters, device)
        print(validation_text(validation, saved.step), "\n")
    model.silent = config.silent
    width = max(map(len, problems), default=0)
    columns = dict(COLUMNS)
    if config.rel_tol is None:
        del columns["within_tol"]
    if problems:
        print("  ".join([f"{'':{width}}  {'n':>6}", *columns.values(), "failures"]))
    attempts, gates, fires, by_split = [], [], [], {}
    for name, some in problems.items():
        tried, opened, fired = [], [], []
        if answers.is_decoys(name):
            fired = failures.gates_at_numbers(model, tokenizer, some, config.batch_size)
        else:
            tried = answers.solve(model, tokenizer, some, config.batch_size)
            tried = failures.diagnose(model, tokenizer, tried, config.batch_size)
            opened = failures.gates_at_answers(model, tokenizer, some, config.batch_size)
        by_split[name] = problem_scores(tried, opened, fired, config.rel_tol) | dict(n=len(some))
        print(table_row(name, by_split[name], columns, width), flush=True)
        attempts, gates, fires = attempts + tried, gates + opened, fires + fired
    show_failures(attempts)

    scores = dict(
        **problem_scores(attempts, gates, fires, config.rel_tol),
        splits=by_split,
        **validation,
        step=saved.step,
        seconds=round(time.perf_counter() - since, 3),
    )
    if config.json:
        Path(config.json).write_text(json.dumps(scores, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(scores))


if __name__ == "__main__":
    run_script(main)
