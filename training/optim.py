"""The optimizer and the learning rate.

    optimizer = make_optimizer(model, learning_rate=1e-3, betas=(0.9, 0.99), weight_decay=0.1)
    for group in optimizer.param_groups:
        group["lr"] = learning_rate_at(step, schedule="cosine", learning_rate=1e-3, min_lr=1e-4,
                                       warmup_iters=100, decay_iters=2000, wsd_decay_iters=400)

- AdamW (Loshchilov & Hutter, 1711.05101), fused into one kernel where PyTorch has it; decay for matrices only
- schedules: cosine as in nanoGPT, warmup-stable-decay (MiniCPM, 2404.06395), constant; after linear warmup
"""

import math

import torch
import torch.nn as nn


def make_optimizer(
    model: nn.Module, learning_rate: float, betas: tuple[float, float], weight_decay: float
) -> torch.optim.AdamW:
    """AdamW in two groups: matrices and embeddings decay; biases, norms and scalars do not.

    Make it after `model.to(device)`: which kernel exists depends on where the parameters are.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    try:
        return torch.optim.AdamW(groups, lr=learning_rate, betas=betas, fused=True)
    except RuntimeError:  # AdamW checks the parameters' devices; this one has no fused kernel
        return torch.optim.AdamW(groups, lr=learning_rate, betas=betas)


def restore(optimizer: torch.optim.Optimizer, state: dict) -> None:
    """Load a saved optimizer's moments; betas and weight decay stay as this optimizer was made with."""
    settings = [{name: group[name] for name in ("betas", "weight_decay")} for group in optimizer.param_groups]
    optimizer.load_state_dict(state)
    for group, kept in zip(optimizer.param_groups, settings):
        group.update(kept)


def cosine(step: int, warmup_iters: int, decay_iters: int, wsd_decay_iters: int) -> float:
    """Half a cosine from the end of warmup to `decay_iters`."""
    if step >= decay_iters:
        return 0.0
    progress = max(0, step - warmup_iters) / max(1, decay_iters - warmup_iters)
    return 0.5 * (1 + math.cos(math.pi * progress))


def wsd(step: int, warmup_iters: int, decay_iters: int, wsd_decay_iters: int) -> float:
    """Stable, then a straight line down over the last `wsd_decay_iters` steps before `decay_iters`."""
    return min(1.0, max(0, decay_iters - step) / max(1, wsd_decay_iters))


def constant(step: int, warmup_iters: int, decay_iters: int, wsd_decay_iters: int) -> float:
    return 1.0


# name -> (step, warmup_iters, decay_iters, wsd_decay_iters) -> where between min_lr (0) and learning_rate (1)
SCHEDULES = {"cosine": cosine, "wsd": wsd, "constant": constant}


def learning_rate_at(
    step: int,
    schedule: str,
    learning_rate: float,
    min_lr: float,
    warmup_iters: int,
    decay_iters: int,
    wsd_decay_iters: int,
) -> float:
    """The learning rate of step 0, 1, 2, ...: linear warmup that peaks at `warmup_iters`, then the schedule.

    Step 0 already learns. From `decay_iters` on cosine and wsd stay at min_lr.

    >>> [learning_rate_at(step, "wsd", 1.0, 0.5, 1, 6, 2) for step in range(8)]
    [0.5, 1.0, 1.0, 1.0, 1.0, 0.75, 0.5, 0.5]
    """
    warmed = learning_rate * min(1.0, (step + 1) / (warmup_iters + 1))
    height = SCHEDULES[schedule](step, warmup_iters, decay_iters, wsd_decay_iters)
    return min(warmed, height * learning_rate + (1 - height) * min_lr)
