"""Checkpoints: the one place where they are saved, checked and loaded.

    save(run_dir, "last", Checkpoint(step=500, model=model.state_dict(), ...))
    checkpoint = load(run_dir, "best")                                # or load(run_dir / "last-00000500")
    model, tokenizer, checkpoint = load_model(run_dir, "best")        # to use it

    RUN/last-00000500/model.safetensors    weights; readable without the rest, tied tensors are stored once
                      optimizer.pt         optimizer.state_dict(), for torch.load(weights_only=True)
                      state.json           step, configs, tokenizer, loader and RNG state, versions
                      manifest.json        size and sha256 of the files above
    RUN/best-00000400/...

A checkpoint is written to a temporary folder, forced to the disk and then renamed, so its name never stands
for half of one. Whatever else may happen to the files (a bad disk, an interrupted copy) is found by the
manifest when loading, and the checkpoint before is used.
"""

import base64
import dataclasses
import functools
import hashlib
import json
import math
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from dag_model import GPT, GPTConfig
from data import tokenizer

T = TypeVar("T")

FORMAT = 1  # raise it when older code could no longer make sense of what is written
KINDS = ("last", "best")
NAME = re.compile(r"(last|best)-(\d{8,})(\.old)?")  # kind, step; .old while its successor moves in


@dataclass
class Checkpoint:
    step: int
    model: dict[str, torch.Tensor]  # state_dict() of the bare module, out of DDP and torch.compile
    optimizer: dict[str, Any]
    model_config: dict[str, Any]
    train_config: dict[str, Any]
    tokenizer: dict[str, Any]  # to_json() of the tokenizer
    loader: dict[str, Any]
    rng: dict[str, str]  # capture_rng()
    best_val_loss: float = math.inf
    progress: dict[str, Any] = field(default_factory=dict)  # what else the training loop wants back, JSON
    path: Path | None = None  # set by load
    written_by: str = ""  # set by load: versions of the code and of torch


STATE_FIELDS = (
    "step",
    "model_config",
    "train_config",
    "tokenizer",
    "loader",
    "rng",
    "best_val_loss",
    "progress",
)


class DamagedCheckpoint(ValueError):
    """Files are missing or are not what was written."""


def say(line: str) -> None:
    print(f"checkpoint: {line}", file=sys.stderr)


# ------------------------------------------------------------------------------------------------------------
# saving


def save(run_dir: str | Path, kind: str, checkpoint: Checkpoint, keep: int = 2) -> Path:
    """Save as RUN/<kind>-<step> and remove all but the newest `keep` of that kind. OSError where it cannot be
    written; earlier checkpoints are then untouched.

    Those of a later step are removed too: they belong to a course that the run left when it went back to an
    earlier step, and must not be taken for its newest.
    """
    assert kind in KINDS, kind
    run_dir = Path(run_dir)
    final = run_dir / f"{kind}-{checkpoint.step:08d}"
    temporary = run_dir / f".tmp-{final.name}"
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        for stale in run_dir.glob(".tmp-*"):
            shutil.rmtree(stale)
        temporary.mkdir()
        write_files(temporary, checkpoint)
        replace_folder(temporary, final)
    except (OSError, RuntimeError, SafetensorError) as error:
        # torch.save turns the OSError of a full disk into a RuntimeError of its own
        reason = error.__context__ if isinstance(error.__context__, OSError) else error
        raise OSError(
            f"cannot save {final}: {reason}. Earlier checkpoints are untouched; free some space or "
            f"move the run to another disk, then go on with --init_from=resume"
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    prune(final, keep)
    return final


def write_files(folder: Path, checkpoint: Checkpoint) -> None:
    tensors, tied = untie(checkpoint.model)
    save_file(tensors, folder / "model.safetensors", metadata={"tied": json.dumps(tied)})
    with open(folder / "optimizer.pt", "wb") as file:
        torch.save(checkpoint.optimizer, file)
    state = {name: getattr(checkpoint, name) for name in STATE_FIELDS}
    if math.isinf(checkpoint.best_val_loss):
        state["best_val_loss"] = None  # JSON knows no infinity
    state |= {"format": FORMAT, "code": code_version(), "torch": torch.__version__}
    write_json(folder / "state.json", state)
    manifest = {path.name: describe(path) for path in folder.iterdir()}
    write_json(folder / "manifest.json", manifest)
    for path in (*folder.iterdir(), folder):
        fsync(path)


def untie(state_dict: dict[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """The tensors, each once, and {name: name of the same tensor among them} for the others."""
    tensors, tied, first = {}, {}, {}
    for name, tensor in state_dict.items():
        place = (tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
        owner = first.setdefault(place, name)
        if owner == name:
            tensors[name] = tensor.detach().cpu().contiguous()
        else:
            tied[name] = owner
    return tensors, tied


def replace_folder(source: Path, target: Path) -> None:
    """Rename, onto an earlier folder if need be; at every moment one of them has a name that `find` knows."""
    old = target.with_suffix(".old")
    if target.exists():
        shutil.rmtree(old, ignore_errors=True)
        target.rename(old)
    source.rename(target)
    fsync(target.parent)
    shutil.rmtree(old, ignore_errors=True)


def prune(newest: Path, keep: int) -> None:
    kind, step = kind_and_step(newest)
    same = [path for path in find(newest.parent) if kind_and_step(path)[0] == kind]
    later = [path for path in same if kind_and_step(path)[1] > step]
    if later:
        say(f"removing {', '.join(p.name for p in later)}: the run went back and is now at step {step}")
    for path in later + [path for path in same if path not in later][keep:]:
        shutil.rmtree(path)


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1, allow_nan=False) + "\n")


def describe(path: Path) -> dict[str, Any]:
    """What the manifest says of a file."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return {"size": path.stat().st_size, "sha256": digest.hexdigest()}


def fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@functools.cache
def code_version() -> str:
    """What git calls the code at hand, such as "1a2b3c4-dirty"."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


# ------------------------------------------------------------------------------------------------------------
# finding and loading


def kind_and_step(path: Path) -> tuple[str, int]:
    kind, step, _ = NAME.fullmatch(path.name).groups()
    return kind, int(step)


def find(run_dir: str | Path, kind: str | None = None) -> list[Path]:
    """The checkpoints of a run in the order to try them: those of `kind` first, the latest step first."""
    folders = [path for path in Path(run_dir).glob("*-*") if NAME.fullmatch(path.name) and path.is_dir()]

    def order(path: Path) -> tuple:
        its_kind, step = kind_and_step(path)
        return kind is not None and its_kind != kind, -step, path.suffix == ".old", KINDS.index(its_kind)

    return sorted(folders, key=order)


def load(path: str | Path, kind: str | None = None, with_optimizer: bool = True) -> Checkpoint:
    """Load a checkpoint folder, or the latest sound one of a run folder, preferably of `kind` ("best" to use the
    model, None for the latest of all, to resume). Tensors are on the CPU. Without the optimizer, its state is
    {} and its file is neither read nor checked.

    Raises FileNotFoundError where there is no checkpoint, ValueError where none is sound or where this code
    cannot read the format.
    """
    path = Path(path)
    if NAME.fullmatch(path.name) and path.is_dir():
        return read(path, with_optimizer)
    candidates = find(path, kind)
    if not candidates:
        raise FileNotFoundError(
            f"no checkpoint in {path}: train a model there first, or give the folder of "
            f"a run that has one as --out_dir"
        )
    problems = []
    for candidate in candidates:
        try:
            checkpoint = read(candidate, with_optimizer)
        except DamagedCheckpoint as error:
            problems.append(str(error))
            continue
        if problems:
            say(f"{'; '.join(problems)}; using {candidate.name} instead")
        elif kind not in (None, kind_and_step(candidate)[0]):
            say(f"{path} has no {kind} checkpoint, using {candidate.name}")
        return checkpoint
    raise DamagedCheckpoint(f"no sound checkpoint in {path}: {'; '.join(problems)}; train again")


def read(folder: Path, with_optimizer: bool) -> Checkpoint:
    check_files(folder, skip=() if with_optimizer else ("optimizer.pt",))
    state = json.loads((folder / "state.json").read_text())
    written_by = f"code {state['code']} with torch {state['torch']}"
    if state["format"] != FORMAT:
        raise ValueError(
            f"{folder} has checkpoint format {state['format']} and was written by {written_by}; "
            f"this code reads format {FORMAT}: check out that version"
        )
    if state["best_val_loss"] is None:
        state["best_val_loss"] = math.inf
    optimizer = {}
    if with_optimizer:
        optimizer = torch.load(folder / "optimizer.pt", map_location="cpu", weights_only=True)
    return Checkpoint(
        model=load_weights(folder / "model.safetensors"),
        optimizer=optimizer,
        path=folder,
        written_by=written_by,
        **{name: state[name] for name in STATE_FIELDS},
    )


def check_files(folder: Path, skip: tuple[str, ...]) -> None:
    """Compare the files with the manifest; DamagedCheckpoint says what is wrong."""
    name = "manifest.json"
    try:
        manifest = dict(json.loads((folder / name).read_text()))
        for name in sorted({"model.safetensors", "optimizer.pt", "state.json", *manifest} - {*skip}):
            if describe(folder / name) != manifest.get(name):
                raise ValueError
    except OSError as error:
        raise DamagedCheckpoint(f"{folder}/{name} cannot be read ({error.strerror})") from None
    except (ValueError, TypeError):
        raise DamagedCheckpoint(f"{folder}/{name} is not what was written") from None


def load_weights(path: str | Path) -> dict[str, torch.Tensor]:
    """A state dict from a weight file; tied names share one tensor again."""
    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}
        tied = json.loads((file.metadata() or {}).get("tied", "{}"))
    return tensors | {name: tensors[owner] for name, owner in tied.items()}


def rebuild_config(cls: type[T], saved: dict[str, Any], written_by: str = "another version of the code") -> T:
    """A config dataclass from what a checkpoint holds, where other code may have written it. A setting that was
    not known then takes its default. One that is not known now is dropped if it was off (False, 0, None,
    empty); otherwise the model would not be the one that was trained, and that is a ValueError.
    """
    known = {field.name for field in dataclasses.fields(cls)}
    unknown = sorted(saved.keys() - known)
    in_use = [f"{name}={saved[name]!r}" for name in unknown if saved[name]]
    if in_use:
        raise ValueError(
            f"the checkpoint was written by {written_by} and uses settings that this code "
            f"does not have: {', '.join(in_use)}; check out that version"
        )
    missing = sorted(known - saved.keys())
    config = cls(**{name: saved[name] for name in known & saved.keys()})
    if missing:
        say(
            "settings that it does not name take their default: "
            + ", ".join(f"{name}={getattr(config, name)!r}" for name in missing)
        )
    if unknown:
        say(f"settings that this code does not have were off in it: {', '.join(unknown)}")
    return config


def rebuild_model(checkpoint: Checkpoint, **overrides: Any) -> GPT:
    """The model as it was saved, but for `overrides` of its config, on the CPU, in train mode."""
    config = rebuild_config(GPTConfig, checkpoint.model_config, checkpoint.written_by)
    vocabulary = tokenizer.from_json(checkpoint.tokenizer).vocabulary
    model = GPT(dataclasses.replace(config, **overrides), vocabulary)
    try:
        model.load_state_dict(checkpoint.model)
    except RuntimeError as error:
        raise ValueError(
            f"the weights were written by {checkpoint.written_by} and do not fit the model "
            f"of this code; check out that version: {error}"
        ) from error
    return model


def load_model(
    path: str | Path, kind: str | None = None, device: torch.device | str = "cpu"
) -> tuple[GPT, tokenizer.Tokenizer, Checkpoint]:
    """A trained model in eval mode, its tokenizer, and the checkpoint without its optimizer state."""
    checkpoint = load(path, kind, with_optimizer=False)
    return rebuild_model(checkpoint).to(device).eval(), tokenizer.from_json(checkpoint.tokenizer), checkpoint


def require_vocabulary(checkpoint: Checkpoint, meta: dict[str, Any]) -> None:
    """ValueError unless the data set of this meta.json has the vocabulary that the model was trained with."""
    if checkpoint.tokenizer != meta["tokenizer"]:
        raise ValueError(
            f"the vocabulary of the data set {meta['name']} is not the one the checkpoint was trained "
            f"with: prepare the data set again as it was, or train a new model on this one"
        )


# ------------------------------------------------------------------------------------------------------------
# random number generators


def generators() -> dict[str, Any]:
    """Modules with get_rng_state and set_rng_state, of the devices in use."""
    in_use = {"cpu": True, "cuda": torch.cuda.is_initialized(), "mps": torch.backends.mps.is_available()}
    modules = {"cpu": torch, "cuda": torch.cuda, "mps": torch.mps}
    return {name: module for name, module in modules.items() if in_use[name]}


def capture_rng() -> dict[str, str]:
    """State of PyTorch's generators, of the current CUDA device among them, as plain JSON. It is the state of
    this process: restored in every rank of a distributed run it would give them all the same dropout masks.
    """
    return {
        name: base64.b64encode(module.get_rng_state().numpy().tobytes()).decode()
        for name, module in generators().items()
    }


def restore_rng(state: dict[str, str]) -> None:
    """Call it last, once the model is on its device: building a model draws random numbers."""
    here = generators()
    for name, text in state.items():
        if name in here:
            here[name].set_rng_state(torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8))
        else:
            say(f"there is no {name} here to restore the random state of: the run goes on, not bit for bit")
