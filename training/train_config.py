"""The settings of train.py. Needs no torch: the launchers check them before anything is rented or queued.

config, files = configurator.load_with_files(TrainConfig)
"""

import re
from dataclasses import dataclass

from configurator import setting
from gpt.model_config import ModelSettings

GPT2_BLOCK_SIZE = 1024  # positions that OpenAI's weights have


@dataclass(frozen=True)
class RunSettings:
    """What is trained on which data."""

    out_dir: str = setting("", "run folder; empty makes a new one, out/<config name>-NNN", section="run")
    init_from: str = setting(
        "scratch",
        "what to start from",
        choices=("scratch", "resume", "gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl"),
    )
    seed: int = setting(1337, "of weights, dropout and the order of the data", minimum=0, below=10**9)
    eval_only: bool = setting(False, "evaluate once and stop")

    dataset: str = setting("arithmetic", "folder in data_dir; prepared where it is missing", section="data")
    data_dir: str = setting("data", "folder of the datasets")
    batch_size: int = setting(32, "rows per micro-batch and process", minimum=1)
    gradient_accumulation_steps: int = setting(1, "micro-batches per step, over all processes", minimum=1)


@dataclass(frozen=True)
class LoopSettings:
    """How it is trained, evaluated and logged."""

    learning_rate: float = setting(1e-3, "peak", minimum=0, section="optimizer")
    max_iters: int = setting(2000, "steps in all", minimum=0)
    weight_decay: float = setting(0.1, "on matrices; vectors have none", minimum=0)
    beta1: float = setting(0.9, "AdamW", minimum=0, below=1)
    beta2: float = setting(0.99, "AdamW", minimum=0, below=1)
    grad_clip: float = setting(1.0, "largest gradient norm; 0 is off", minimum=0)
    schedule: str = setting("cosine", "learning rate after warmup", choices=("cosine", "wsd", "constant"))
    warmup_iters: int = setting(100, "steps of linear warmup", minimum=0)
    lr_decay_iters: int = setting(0, "step at which cosine and wsd reach min_lr; 0 is max_iters", minimum=0)
    min_lr: float = setting(1e-4, "where cosine and wsd end", minimum=0)
    wsd_decay_iters: int = setting(0, "length of the decay in wsd; 0 is a fifth of max_iters", minimum=0)

    eval_interval: int = setting(250, "steps between evaluations", minimum=1, section="evaluation")
    eval_iters: int = setting(20, "batches per evaluation and split", minimum=1)
    log_interval: int = setting(10, "steps between lines of the log", minimum=1)
    patience: int = setting(0, "evaluations without a better loss before stopping; 0 is never", minimum=0)
    eval_problems: int = setting(100, "problems to solve at an evaluation, if the dataset has any", minimum=0)

    device: str = setting("auto", "auto, cpu, cuda, cuda:N or mps", section="system")
    dtype: str = setting("auto", "of matrix products", choices=("auto", "float32", "bfloat16"))
    compile: str = setting("auto", "torch.compile; auto is on for CUDA", choices=("auto", "true", "false"))
    num_threads: int = setting(0, "CPU threads; 0 is PyTorch's choice", minimum=0)

    wandb_log: bool = setting(False, "log to Weights & Biases", section="wandb")
    wandb_project: str = setting("dag-gpt", "project")
    wandb_run_name: str = setting("", "run; empty is the name of the run folder")
    wandb_mode: str = setting("online", "offline needs no account", choices=("online", "offline", "disabled"))
    wandb_artifacts: bool = setting(False, "upload checkpoints too, as artifacts")


@dataclass(frozen=True)
class TrainConfig(
    LoopSettings, ModelSettings, RunSettings
):  # dataclasses take fields from the last base first
    """Everything that train.py can be told."""

    def check(self) -> None:
        """Raise ValueError, in one line that says what to do, for settings that cannot be together."""
        super().check()
        if self.schedule != "constant" and self.min_lr > self.learning_rate:
            raise ValueError(f"min_lr={self.min_lr} is above learning_rate={self.learning_rate}: lower it")
        if not re.fullmatch(r"auto|cpu|mps|cuda(:\d+)?", self.device):
            raise ValueError(f"device={self.device!r}: expected auto, cpu, cuda, cuda:N or mps")
        if self.device == "mps" and self.dag_depth > 0 and self.dag_inputs == "numbers":
            raise ValueError(
                "device=mps: numbers are read in float64, which MPS does not have: use --device=cpu, or --dag_depth=0"
            )
        if self.init_from.startswith("gpt2") and self.block_size > GPT2_BLOCK_SIZE:
            raise ValueError(
                f"block_size={self.block_size}: {self.init_from} has {GPT2_BLOCK_SIZE} positions; "
                f"use --block_size={GPT2_BLOCK_SIZE} or less"
            )
