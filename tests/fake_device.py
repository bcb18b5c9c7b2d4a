"""A device that is not the CPU, on a computer that has no other.

    python tests/fake_device.py train.py config/train_default.py --max_iters=5 --dtype=float32

Runs a script as if on a GPU, as far as it matters where tensors are: an operation on one from here and one from there
fails, but for what CUDA allows. Inside, tensors from there are the CPU's. Nothing else is as on a GPU: no bf16, no
compiled code, nothing asynchronous, and no speed.

Needs a PyTorch that lets devices be written in Python: 2.10 or newer. It is for a process of its own, as PyTorch keeps
the device and tensors have no inference mode there.
"""

import runpy
import sys
from pathlib import Path

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

HERE = torch.device("cpu")
aten = torch.ops.aten
COPIES = {aten._to_copy.default, aten.copy_.default}
FILLS = {aten.masked_fill.Tensor, aten.masked_fill_.Tensor, aten.fill_.Tensor}  # by a number, too
INDEXING = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default}


class There(torch.Tensor):
    """A tensor on that device; `inner` has its values."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> "There":
        facts = dict(strides=inner.stride(), storage_offset=inner.storage_offset(), dtype=inner.dtype)
        there = torch.Tensor._make_wrapper_subclass(cls, inner.size(), **facts, device=make_device())
        there.inner = inner
        return there

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        return perform(function, args, kwargs or {})

    def tolist(self) -> list:  # PyTorch refuses that to all subclasses
        return self.inner.tolist()


def is_allowed(function, args: tuple, here: list[torch.Tensor]) -> bool:
    """Whether CUDA takes these arguments, of which some are `here` and others are not."""
    if function in COPIES:
        return True
    if function in INDEXING:  # by indices from anywhere
        return isinstance(args[0], There) and all(isinstance(x, There) or x.dim() == 0 for x in args[2:3])
    takes_numbers = torch.Tag.pointwise in function.tags or function in FILLS
    return (
        takes_numbers
        and all(x.dim() == 0 for x in here)
        and not (is_in_place(function) and any(x is args[0] for x in here))
    )


def is_in_place(function) -> bool:
    alias = function._schema.arguments[0].alias_info
    return alias is not None and alias.is_write


def perform(function, args: tuple, kwargs: dict):
    given = tree_leaves((args, kwargs))
    tensors = [x for x in given if isinstance(x, torch.Tensor)]
    here = [x for x in tensors if not isinstance(x, There)]
    if here and len(here) < len(tensors) and not is_allowed(function, args, here):
        shapes = ", ".join(f"{tuple(x.shape)} {'there' if isinstance(x, There) else 'here'}" for x in tensors)
        raise RuntimeError(f"{function} of tensors on two devices: {shapes}")
    if function is aten._fused_sdp_choice.default:
        return 0  # attention in plain operations
    devices = [x for x in given if isinstance(x, torch.device)]
    goes_there = devices[0] != HERE if devices else len(here) < len(tensors)
    if function is aten.copy_.default:
        goes_there = isinstance(args[0], There)
    inner = {There: lambda x: x.inner, torch.device: lambda x: HERE}
    args, kwargs = tree_map(lambda x: inner.get(type(x), lambda x: x)(x), (args, kwargs))
    result = function(*args, **kwargs)

    def outer(x):
        if not isinstance(x, torch.Tensor):
            return x
        for tensor in tensors:  # what works in place returns what it was given
            if x is (tensor.inner if isinstance(tensor, There) else tensor):
                return tensor
        return There(x) if goes_there else x

    return tree_map(outer, result)


class Operations(TorchDispatchMode):
    """Catches those that make tensors."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return perform(function, args, kwargs or {})


class Lists(TorchFunctionMode):
    """Where PyTorch makes tensors of lists by itself, nobody is asked."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is torch.tensor and kwargs.get("device") is not None:
            device = kwargs.pop("device")
            return torch.tensor(*args, **kwargs).to(device)
        if function in (torch.Tensor.__getitem__, torch.Tensor.__setitem__):
            index = args[1] if isinstance(args[1], tuple) else (args[1],)
            index = tuple(torch.tensor(x) if isinstance(x, list) else x for x in index)
            args = (args[0], index, *args[2:])
        return function(*args, **kwargs)


def make_device() -> torch.device:
    """The device; ImportError where this PyTorch cannot have it."""
    if not hasattr(torch, "elsewhere"):
        from torch.utils import backend_registration as registration

        class Module(registration._DummyBackendModule):
            def get_amp_supported_dtype(self) -> list:
                return [torch.bfloat16]

        registration._setup_privateuseone_for_python_backend("elsewhere", Module())
        torch.__future__.set_swap_module_params_on_conversion(True)  # tied weights stay tied
        torch.inference_mode = torch.no_grad
    return torch.device("elsewhere:0")


def main(script: str) -> None:
    sys.path.insert(0, str(Path(script).parent))
    device = make_device()
    from training import device as runtime

    runtime.resolve_device = lambda name: device
    sys.argv = sys.argv[1:]
    with Operations(), Lists():
        runpy.run_path(script, run_name="__main__")


if __name__ == "__main__":  # the script will be that; checkpoints have to find our class
    import fake_device

    fake_device.main(sys.argv[1])
