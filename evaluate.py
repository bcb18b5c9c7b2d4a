"""Score a trained model: its loss on the validation text, and the share of problems that it solves.

    python evaluate.py --out_dir=out/train_default-001                 # validation problems of its data set
    python evaluate.py --out_dir=out/train_default-001 --suite=test    # longer and more numbers, other words
    python evaluate.py --out_dir=out/train_default-001 --problems=mine.tsv --json=scores.json

A line of a problem file is `prompt<TAB>answer`. The model continues the prompt greedily up to the end of the
document, and has solved the problem if it wrote the answer, character for character. Prints a table, up to
ten failures, and as the last line a JSON object; shares in it are between 0 and 1.
"""

import json
import time
from dataclasses import dataclass
from pathlib import Path

import torch

import checkpoint
import runtime
import tasks
from configurator import load, run_script, setting
from dataloader import Loader, read_meta

SUITES = {
    "val": lambda name: name.startswith("val_"),
    "test": lambda name: not name.startswith("val_"),
    "all": lambda name: True,
}


@dataclass(frozen=True)
class EvaluateConfig:
    out_dir: str = setting("", "run folder of the model", section="model")
    checkpoint: str = setting("best", "which of its checkpoints", choices=("best", "last"))
    suite: str = setting(
        "val",
        "problems of the run's data set: val like those in training; test also "
        "longer and more numbers, other words",
        choices=tuple(SUITES),
        section="problems",
    )
    problems: str = setting("", "a file of problems to score instead")
    batch_size: int = setting(64, "problems attempted together", minimum=1)
    eval_iters: int = setting(50, "batches of the validation text for the loss", minimum=1)
    json: str = setting("", "file to write the JSON object of the last line to, too")
    device: str = setting("auto", "auto, cpu, cuda, cuda:N or mps", section="system")

    def check(self) -> None:
        if not self.out_dir:
            raise ValueError("which run? give its folder as --out_dir=RUN")


def problem_files(config: EvaluateConfig, data_dir: Path) -> dict[str, Path]:
    """{name: path} of what is to be scored; {} where the data set has no problems."""
    if config.problems:
        return {Path(config.problems).stem: Path(config.problems)}
    in_suite = SUITES[config.suite]
    return {name: path for name, path in tasks.splits(data_dir, prefix="").items() if in_suite(name)}


def validation_loader(data_dir: Path, saved: checkpoint.Checkpoint) -> Loader:
    """The batches whose first `eval_iters` a run on one process evaluates on."""
    checkpoint.require_vocabulary(saved, read_meta(data_dir))
    batch_size, block_size, seed = (saved.train_config[name] for name in ("batch_size", "block_size", "seed"))
    return Loader(data_dir, "val", batch_size=batch_size, block_size=block_size, seed=seed + 1)


def share(attempts: list[tasks.Attempt]) -> float | None:
    return sum(attempt.correct for attempt in attempts) / len(attempts) if attempts else None


def show_failures(attempts: list[tasks.Attempt], count: int = 10) -> None:
    """Up to `count` of them, spread evenly, so that one split does not hide the others."""
    failed = [attempt for attempt in attempts if not attempt.correct]
    if not failed:
        return
    shown = failed[:: -(-len(failed) // count)]
    print(f"\n{len(shown)} of {len(failed)} failures:")
    for attempt in shown:
        print(f"  {attempt.prompt}{attempt.output or '[nothing]'}  (right is {attempt.answer})")


def main() -> None:
    config = load(EvaluateConfig)
    device = runtime.resolve_device(config.device)
    model, tokenizer, saved = checkpoint.load_model(config.out_dir, config.checkpoint, device)
    data_dir = Path(saved.train_config["data_dir"]) / saved.train_config["dataset"]
    files = problem_files(config, data_dir)
    problems = {name: tasks.read_problems(path) for name, path in files.items()}

    since = time.perf_counter()
    loss = None
    if not config.problems:
        loader = validation_loader(data_dir, saved)
        loss = tasks.mean_loss(model, loader, config.eval_iters, device, torch.float32)
        print(f"validation loss {loss:.4f} at step {saved.step}")
    attempts = {}
    if problems:
        width = max(map(len, problems))
        print(f"{'split':{width}}  {'n':>6}  exact %")
    for name in problems:
        attempts[name] = tasks.solve(model, tokenizer, problems[name], config.batch_size)
        print(f"{name:{width}}  {len(attempts[name]):6}  {share(attempts[name]):7.1%}", flush=True)
    together = [attempt for some in attempts.values() for attempt in some]
    show_failures(together)

    scores = dict(
        n=len(together),
        exact=share(together),
        splits={name: dict(n=len(some), exact=share(some)) for name, some in attempts.items()},
        val_loss=loss,
        step=saved.step,
        seconds=round(time.perf_counter() - since, 3),
    )
    if config.json:
        Path(config.json).write_text(json.dumps(scores, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(scores))


if __name__ == "__main__":
    run_script(main)
