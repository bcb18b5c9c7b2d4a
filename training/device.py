"""Where a run happens: device, precision, compilation, processes. The scripts' only knowledge of hardware.

Every choice that a user leaves to "auto" is made here, once, by rules that were measured (dev/LOG.md).
"""

import contextlib
import os
import platform
import sys
from dataclasses import dataclass
from datetime import timedelta
from typing import Callable

import torch
import torch.distributed as dist
import torch.nn as nn


def resolve_device(name: str) -> torch.device:
    """ "auto" -> CUDA, else CPU: the DAG reads numbers in float64, which MPS does not have. Raises ValueError for a
    device this machine does not have.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"device={name}: expected auto, cpu, cuda, cuda:N or mps") from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(
            f"device={name}: this machine has {torch.cuda.device_count()} CUDA devices that PyTorch "
            f"{torch.__version__} can use; use --device=cpu, or see `nvidia-smi`"
        )
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise ValueError("device=mps: PyTorch finds no Metal device here; use --device=cpu")
    return device


def cpu_has_bf16() -> bool:
    """Whether matrix products in bf16 run natively on this CPU, which makes them about twice as fast."""
    return getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)()


def resolve_dtype(name: str, device: torch.device) -> torch.dtype:
    """ "auto" -> bfloat16 where the hardware multiplies it natively, else float32."""
    if name != "auto":
        return getattr(torch, name)
    native = {
        "cuda": lambda: torch.cuda.is_bf16_supported(including_emulation=False),
        "cpu": cpu_has_bf16,
        "mps": lambda: False,
    }
    return torch.bfloat16 if native[device.type]() else torch.float32


def autocast(device: torch.device, dtype: torch.dtype):
    """Matrix products in `dtype`, everything delicate in float32; a context manager."""
    if dtype == torch.float32:
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype)


def compile_model(
    model: nn.Module, setting: str, device: torch.device, trial: Callable[[nn.Module], object]
) -> nn.Module:
    """torch.compile as the setting asks ("auto", "true", "false"), or the model itself.

    "auto" compiles on CUDA alone: on 2 CPU cores a compiled step was no faster than an eager one, and
    compiling took longer than a hundred steps. `trial(model)` runs it once, so that a machine that cannot
    compile (no C++ compiler, no Triton) is found out here: said in one line, and the eager model returned.
    """
    if setting == "false" or (setting == "auto" and device.type != "cuda"):
        return model
    try:
        compiled = torch.compile(model)
        trial(compiled)
    except (
        RuntimeError
    ) as error:  # Dynamo's, Inductor's, and what torch.compile says on a platform without it
        if os.environ.get("RANK", "0") == "0":
            reason = str(error).strip().partition("\n")[0]
            print(f"torch.compile does not work here, going on without it: {reason}", file=sys.stderr)
        torch._dynamo.reset()
        compiled = model
    model.zero_grad(set_to_none=True)
    return compiled


@dataclass(frozen=True)
class Processes:
    """The processes of this run, as torchrun started them; alone, rank 0 of 1."""

    rank: int = 0
    local_rank: int = 0
    world_size: int = 1

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def mean(self, value: float) -> float:
        """The mean over all processes, by way of the CPU: the device is not waited for."""
        if self.world_size == 1:
            return value
        total = torch.tensor(value, dtype=torch.float64)
        dist.all_reduce(total)
        return total.item() / self.world_size

    def agree(self, choose: Callable[[], object]) -> object:
        """What `choose()` says on the first process, on all of them; what it raises there, likewise."""
        if self.world_size == 1:
            return choose()
        answer: list = [None, None]
        if self.is_main:
            try:
                answer[0] = choose()
            except (ValueError, OSError, SystemExit) as error:
                answer[1] = error
        dist.broadcast_object_list(answer, device=torch.device("cpu"))
        if answer[1] is not None:
            raise answer[1]
        return answer[0]

    def wait(self) -> None:
        if self.world_size > 1:
            dist.barrier()

    def close(self) -> None:
        self.wait()  # gloo aborts a process that leaves while another is still in a collective
        if dist.is_initialized():
            dist.destroy_process_group()


def start_processes(device_name: str) -> tuple[Processes, torch.device]:
    """Joins torchrun's process group (nccl on CUDA, else gloo), if there is one; and this process's device."""
    device = resolve_device(device_name)
    if "RANK" not in os.environ:
        return Processes(), device
    processes = Processes(*(int(os.environ[name]) for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE")))
    if device.type == "cuda":
        device = resolve_device(f"cuda:{processes.local_rank}")
        torch.cuda.set_device(device)
    # gloo beside nccl carries the host's small agreements; rank 0 preparing a large data set is waited for
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend=backend, timeout=timedelta(hours=2))
    return processes, device


def describe(device: torch.device, dtype: torch.dtype, processes: Processes) -> str:
    """The hardware in words, for logs and reports."""
    name = (
        torch.cuda.get_device_name(device) if device.type == "cuda" else f"{platform.machine()} {device.type}"
    )
    threads = f", {torch.get_num_threads()} threads" if device.type == "cpu" else ""
    count = f"{processes.world_size} x " if processes.world_size > 1 else ""
    return f"{count}{name}{threads}, {str(dtype).removeprefix('torch.')}, PyTorch {torch.__version__}"
