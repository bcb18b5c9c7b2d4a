"""What a run and its DAG did: metrics.jsonl in the run folder, and Weights & Biases where it is asked for.

    logger = DAGLogger(run_dir, config, wandb_log=True, project="dag-gpt", run_name="first", mode="offline")
    logger.watch = Watch.of(model, tokenizer, idx, targets, problems)    # the text that is looked at, once
    logger.log(step, {"train/loss": 1.7})
    logger.log(step, logger.get_wandb_logging_dict(model))     # after backward, before zero_grad
    logger.finish()

In a training loop of your own, `wandb.log(logger.get_wandb_logging_dict(model))` is all of it: finite floats.

- metrics.jsonl has everything: a JSON object a line, flushed at once, NaN and infinity as null
- W&B is extra: not installed, not logged in, unreachable or dying mid-run costs one line, never the run
- under DDP every rank has a logger, and asks it for statistics at the same steps: they are means over all
  ranks. Those of all ranks but the first have `run_dir` None and write nothing
- what is measured, and how: evals/dag_metrics.py
"""

import json
import math
import os
import statistics
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

from dag_model import GPT
from data.tokenizer import Tokenizer
from evals.answers import Attempt, encode
from evals.dag_metrics import Watch, hit_statistics, in_mode, observe, parameter_gradients, probe_values
from evals.failures import diagnose
from inference.explain import explain

WANDB_SETTINGS = dict(
    silent=True,  # its banners would tear the progress bar; one line of ours says where the run is
    console="off",
    init_timeout=30,  # seconds, as the others
    finish_timeout=60,  # the default is to wait for the network for ever; `wandb sync` can send the rest
)
LOGIN_TIMEOUT = 30  # seconds at the prompt for an API key, so that an unattended run starts too


class DAGLogger:
    """The log of one run; with `run_dir` None it writes nothing.

    `resume_step` is the step a resumed run goes on from: what metrics.jsonl holds beyond it is dropped, since
    the run will come by there again; None starts the file afresh. In W&B the run has the name of its folder,
    or `run_name`. `run_id`, which belongs into the checkpoint, lets a resumed run go on in the same W&B run.
    `artifacts` uploads checkpoints there too.
    """

    def __init__(
        self,
        run_dir: str | Path | None,
        config: dict,
        *,
        wandb_log: bool = False,
        project: str = "dag-gpt",
        run_name: str = "",
        mode: str = "online",
        artifacts: bool = False,
        run_id: str | None = None,
        resume_step: int | None = None,
    ):
        self.run_id, self.artifacts = run_id, artifacts
        self.watch: Watch | None = None
        self.file = self.run = None
        if run_dir is None:
            return
        self.path = Path(run_dir) / "metrics.jsonl"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        keep_until(self.path, -1 if resume_step is None else resume_step)
        self.file = open(self.path, "a", encoding="utf-8")
        if wandb_log and mode != "disabled":
            self._try_wandb(self._start_wandb, config, project, run_name, mode)

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """One line of metrics.jsonl, and the same in W&B. Log steps in order."""
        assert not {"step", "time"} & metrics.keys(), f"reserved name among {list(metrics)}"
        if self.file is None:
            return
        finite = {name: float(v) if math.isfinite(v) else None for name, v in metrics.items()}
        line = json.dumps({"step": step, "time": round(time.time(), 3), **finite}, allow_nan=False)
        self.file.write(line + "\n")
        self.file.flush()
        self._log_wandb(step, {name: v for name, v in finite.items() if v is not None})

    def get_wandb_logging_dict(self, model: GPT) -> dict[str, float]:
        """All that evals/dag_metrics.py has to say, under "dag/", and the nodes of the probes, under "probe/":
        floats, fit for `log` and for `wandb.log`. {} for a plain GPT.

        `model` is the bare GPT, whose .grad may be there or not. Costs a forward and a backward, and a
        forward without gradient, of the text in `watch`; without that there are gradients and hits alone. All
        ranks take part.
        """
        if model.dag is None:
            return {}
        found = self.hits_since(model)
        found |= mean_over_ranks(prefixed(to_floats(parameter_gradients(model.dag))))
        if self.watch is not None:
            found |= mean_over_ranks(prefixed(to_floats(observe(model, self.watch))))
            found |= finite_ones(probe_values(model, self.watch))  # the same on all ranks
        return found

    def hits_since(self, model: GPT) -> dict[str, float]:
        """How far plans explained the numbers of the training steps since the last call. Costs nothing."""
        if not model.reads_numbers:
            return {}
        hits = hit_statistics(model.dag.plan_loss.hits)
        model.dag.plan_loss.hits.clear()
        return mean_over_ranks(prefixed(hits))

    def log_problems(
        self, step: int, model: GPT, tokenizer: Tokenizer, attempts: dict[str, list[Attempt]]
    ) -> None:
        """A W&B table of attempts by kind, with their plans, and which part of the model failed."""
        if self.run is None:
            return
        columns = ["kind", "prompt", "answer", "output", "correct", "part", "plan"]
        rows = []
        with in_mode(model, training=False):
            for kind, tried in attempts.items():
                for attempt in diagnose(model, tokenizer, tried):
                    plan = plan_of(model, tokenizer, attempt) if attempt.correct else attempt.plan
                    rows.append([kind, *(getattr(attempt, name) for name in columns[1:-1]), plan])
        self._log_wandb(step, lambda wandb: {"val/problems": wandb.Table(columns=columns, data=rows)})

    def log_pictures(self, step: int, paths: dict[str, Path]) -> None:
        """Picture files by name, in W&B, as far as they are there."""
        there = {name: path for name, path in paths.items() if path.is_file()}
        self._log_wandb(step, lambda wandb: {name: wandb.Image(str(path)) for name, path in there.items()})

    def log_checkpoint(self, path: Path, kind: str) -> None:
        """A checkpoint's files as a new version of the run's artifact, where `artifacts` are asked for."""
        if self.run is not None and self.artifacts:
            self._try_wandb(self._log_artifact, path, kind)

    def finish(self, exit_code: int = 0) -> None:
        """Close the file and the W&B run; a non-zero exit code marks the run as failed there."""
        if self.file is not None:
            self.file.close()
        if self.run is not None:
            self._try_wandb(self.run.finish, exit_code=exit_code)
            self.run = None

    def _start_wandb(self, config: dict, project: str, run_name: str, mode: str) -> None:
        import wandb

        if mode == "online" and not wandb.login(timeout=LOGIN_TIMEOUT, verify=False):
            raise ValueError("not logged in; run `wandb login`, or use --wandb_mode=offline")
        self.run = wandb.init(
            project=project,
            name=run_name or self.path.parent.name,
            config=config,
            mode=mode,
            dir=self.path.parent,
            id=self.run_id,
            resume="allow" if self.run_id else None,
            settings=WANDB_SETTINGS,
        )
        self.run_id = self.run.id
        sync = f"offline; send it with `wandb sync {Path(self.run.dir).parent}`"
        print("W&B:", sync if mode == "offline" else self.run.url)

    def _log_wandb(self, step: int, metrics) -> None:
        """`metrics` is a dict, or makes one from the package."""

        def log():
            import wandb

            self.run.log(metrics(wandb) if callable(metrics) else metrics, step=step)

        if self.run is not None:
            self._try_wandb(log)

    def _log_artifact(self, path: Path, kind: str) -> None:
        import wandb

        artifact = wandb.Artifact(f"checkpoint-{self.run_id}", type="model")
        for file in sorted(path.iterdir()):  # add_dir would print
            artifact.add_file(str(file))
        self.run.log_artifact(artifact, aliases=[kind, path.name])

    def _try_wandb(self, call, *args, **kwargs) -> None:
        """Call into W&B. Whatever goes wrong there, from no package to a dead service, ends W&B alone."""
        try:
            call(*args, **kwargs)
        except Exception as error:  # it raises its own errors, OSError, pydantic's and protobuf's
            self.run = None
            reason = str(error).strip().partition("\n")[0] or type(error).__name__
            print(f"W&B is off from here on ({reason}); {self.path} has everything", file=sys.stderr)


def plan_of(model: GPT, tokenizer: Tokenizer, attempt: Attempt) -> str:
    """The plan of an attempt's first number, as text; empty where there is none."""
    prompt = encode(tokenizer, attempt.prompt)
    thoughts = explain(
        model, tokenizer, [*prompt, *attempt.tokens], start=len(prompt), alternatives=0
    ).thoughts
    return thoughts[0].expression if thoughts else ""


def keep_until(path: Path, last_step: int) -> None:
    """Drop what a metrics file holds after `last_step`, and a line that a crash left half written."""
    if not path.exists():
        return
    scratch = path.with_suffix(".tmp")
    with open(path, encoding="utf-8", errors="replace") as old, open(scratch, "w", encoding="utf-8") as new:
        new.writelines(line for line in old if step_of(line) <= last_step)
    os.replace(scratch, path)


def step_of(line: str) -> float:
    """The step of a line of metrics.jsonl; infinity for what is not one."""
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return math.inf


# ----------------------------------------------------------------------------------------------------
# Floats


def to_floats(tensors: dict[str, torch.Tensor]) -> dict[str, float]:
    """Scalars as finite floats, without those that are not. The host waits for the device, once for each."""
    return finite_ones({name: tensor.item() for name, tensor in tensors.items()})


def finite_ones(values: dict[str, float]) -> dict[str, float]:
    return {name: value for name, value in values.items() if math.isfinite(value)}


def prefixed(values: dict[str, float]) -> dict[str, float]:
    return {f"dag/{name}": value for name, value in values.items()}


def mean_over_ranks(values: dict[str, float]) -> dict[str, float]:
    """The mean of each over the processes that have it; every process has to take part."""
    if not (dist.is_available() and dist.is_initialized()):
        return values
    parts = [{} for _ in range(dist.get_world_size())]
    dist.all_gather_object(parts, values)
    names = {name: None for part in parts for name in part}  # in order
    return {name: statistics.fmean(part[name] for part in parts if name in part) for name in names}
