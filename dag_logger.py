"""What a run and its DAG did: metrics.jsonl in the run folder, and Weights & Biases where it is asked for.

    logger = DAGLogger(run_dir, config, wandb_log=True, project="dag-gpt", run_name="first", mode="offline")
    logger.log(step, {"train/loss": 1.7})
    logger.log(step, logger.dag_statistics(model.inspect(idx), model.dag.names))
    logger.log(step, logger.get_wandb_logging_dict(model))     # after backward, before zero_grad
    logger.finish()

- metrics.jsonl has everything: a JSON object a line, flushed at once, NaN and infinity as null
- W&B is extra: not installed, not logged in, unreachable or dying mid-run costs one line, never the run
- under DDP only rank 0 has a logger
"""

import json
import math
import os
import sys
import time
from pathlib import Path

import torch

from dag_model import GPT, DAGState, DenseState

WANDB_SETTINGS = dict(
    silent=True,  # its banners would tear the progress bar; one line of ours says where the run is
    console="off",
    init_timeout=30,  # seconds, as the others
    finish_timeout=60,  # the default is to wait for the network for ever; `wandb sync` can send the rest
)
LOGIN_TIMEOUT = 30  # seconds at the prompt for an API key, so that an unattended run starts too


class DAGLogger:
    """The log of one run.

    `resume_step` is the step a resumed run goes on from: what metrics.jsonl holds beyond it is dropped, since
    the run will come by there again; None starts the file afresh. `run_id`, which belongs into the
    checkpoint, lets a resumed run go on in the same W&B run.
    """

    def __init__(
        self,
        run_dir: str | Path,
        config: dict,
        *,
        wandb_log: bool = False,
        project: str = "dag-gpt",
        run_name: str = "",
        mode: str = "online",
        run_id: str | None = None,
        resume_step: int | None = None,
    ):
        self.path = Path(run_dir) / "metrics.jsonl"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        keep_until(self.path, -1 if resume_step is None else resume_step)
        self.file = open(self.path, "a", encoding="utf-8")
        self.run_id = run_id
        self.latest: dict[str, float] = {}  # the newest of `dag_statistics`
        self.run = None
        if wandb_log and mode != "disabled":
            self._try_wandb(self._start_wandb, config, project, run_name, mode)

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """One line of metrics.jsonl, and the same in W&B. Log steps in order."""
        assert not {"step", "time"} & metrics.keys(), f"reserved name among {list(metrics)}"
        finite = {name: float(v) if math.isfinite(v) else None for name, v in metrics.items()}
        line = json.dumps({"step": step, "time": round(time.time(), 3), **finite}, allow_nan=False)
        self.file.write(line + "\n")
        self.file.flush()
        if self.run is not None:
            self._try_wandb(self.run.log, {name: v for name, v in finite.items() if v is not None}, step=step)

    def dag_statistics(self, state: DAGState | DenseState | None, names: list[str]) -> dict[str, float]:
        """Plain floats about `model.inspect(idx)`; `names` are the operations. {} for a plain GPT's None.

        Of either kind of DAG the gate's mean, standard deviation and share above 0.5 over all positions.
        """
        if state is None:
            return {}
        gate = state.gate.float()
        statistics = {
            "gate_mean": gate.mean(),
            "gate_std": gate.std(correction=0),
            "gate_open": (gate > 0.5).float().mean(),
        }
        statistics |= (dense_statistics if isinstance(state, DenseState) else plan_statistics)(state, names)
        self.latest = to_floats(statistics)
        return self.latest

    def get_wandb_logging_dict(self, model: GPT) -> dict[str, float]:
        """The latest statistics, and the gradient norms of the DAG's parts and of each operation's scores.

        Fit for `log` and for `wandb.log`. `model` is the bare GPT. Gradients are taken as they are: clipped
        after clipping, and none after `zero_grad`. {} for a plain GPT.
        """
        if model.dag is None:
            return {}
        norms = {}
        for part, module in model.dag.named_children():
            gradients = [p.grad.float().norm() for p in module.parameters() if p.grad is not None]
            if gradients:
                norms[f"gradient_norm/{part}"] = torch.stack(gradients).norm()
        scores = (
            model.dag.planner.operation_score.weight.grad
        )  # (O, C), or (D * O, C) with scores for every step
        if scores is not None:
            by_operation = scores.float().unflatten(0, (-1, len(model.dag.names))).norm(dim=(0, 2))  # (O,)
            norms |= {f"gradient_norm/{name}": norm for name, norm in zip(model.dag.names, by_operation)}
        return self.latest | to_floats(norms)

    def finish(self, exit_code: int = 0) -> None:
        """Close the file and the W&B run; a non-zero exit code marks the run as failed there."""
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
            name=run_name or None,
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

    def _try_wandb(self, call, *args, **kwargs) -> None:
        """Call into W&B. Whatever goes wrong there, from no package to a dead service, ends W&B alone."""
        try:
            call(*args, **kwargs)
        except Exception as error:  # it raises its own errors, OSError, pydantic's and protobuf's
            self.run = None
            reason = str(error).strip().partition("\n")[0] or type(error).__name__
            print(f"W&B is off from here on ({reason}); {self.path} has everything", file=sys.stderr)


def dense_statistics(state: DenseState, names: list[str]) -> dict[str, torch.Tensor]:
    """The share of valid results, the norm of the folded result and of what the gate lets through: means over all
    positions. How often each operation is used, how much operands read from earlier results: means over positions
    and steps. Entropies in nats of the use of operations and slots: 0 says that the DAG always does the same.
    """
    plan, folded = state.plan, state.folded.float()
    D = plan.operation.size(2)
    operation_use = plan.operation.float().mean((0, 1, 2))  # (O,)
    slot_use = plan.operands.float().mean((0, 1, 2))  # (2, S)
    statistics = {
        "valid_results": state.validity[..., -D:].mean(),
        "valid_final": state.validity[..., -1].mean(),
        "folded_norm": folded.norm(dim=-1).mean(),
        "gated_norm": (state.gate.float() * folded).norm(dim=-1).mean(),
        "operation_entropy": entropy(operation_use),
        "operand1_entropy": entropy(slot_use[0]),
        "operand2_entropy": entropy(slot_use[1]),
        "operands_from_results": slot_use[:, -D:].sum() / 2,
    }
    return statistics | {f"use/{name}": use for name, use in zip(names, operation_use, strict=True)}


def plan_statistics(state: DAGState, names: list[str]) -> dict[str, torch.Tensor]:
    """The number of plans, and over all of them: the share that has a result, the mean probability, how often each
    operation is used a step, and the entropy of that in nats. {"plans": 0} where the text has no numbers.
    """
    count = len(state.row)
    statistics = {"plans": torch.tensor(float(count))}
    if count == 0:
        return statistics
    uses = torch.bincount(state.plans.operation.flatten().cpu(), minlength=len(names)).float()
    operation_use = uses / uses.sum()
    valid = sum(text is not None for text in state.written) / count
    statistics |= {
        "valid_final": torch.tensor(valid),
        "plan_probability": state.log_probability.exp().mean().cpu(),
        "operation_entropy": entropy(operation_use),
    }
    return statistics | {f"use/{name}": use for name, use in zip(names, operation_use, strict=True)}


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


def entropy(probability: torch.Tensor) -> torch.Tensor:
    """In nats, over the last axis."""
    return torch.special.entr(probability).sum(-1)


def to_floats(tensors: dict[str, torch.Tensor]) -> dict[str, float]:
    """Named scalars as floats under "dag/". The host waits for the device, once."""
    if not tensors:
        return {}
    return dict(
        zip(
            (f"dag/{name}" for name in tensors),
            torch.stack([tensor.cpu() for tensor in tensors.values()]).tolist(),
        )
    )
