"""Checkpoints: what is loaded is what was saved, or an earlier one and a line that says so."""

import dataclasses
import json
import math
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from training import checkpoint
from training.checkpoint import Checkpoint, capture_rng, find, load, rebuild_config, restore_rng, save

ROOT = Path(__file__).resolve().parents[2]
FILES = ["model.safetensors", "optimizer.pt", "state.json", "manifest.json"]


def training():
    """A model with tied weights and dropout, and its optimizer."""
    model = torch.nn.Sequential(torch.nn.Embedding(5, 4), torch.nn.Dropout(0.5), torch.nn.Linear(4, 5))
    model[2].weight = model[0].weight
    return model, torch.optim.AdamW(model.parameters(), lr=0.1)


def train(model, optimizer, steps):
    for _ in range(steps):
        loss = model(torch.arange(5)).logsumexp(-1).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def snapshot(step=1, module=None, optimizer=None, **fields):
    if module is None:
        module, optimizer = training()
    values = dict(
        model=module.state_dict(),
        optimizer=optimizer.state_dict(),
        rng=capture_rng(),
        model_config={"n_embd": 4},
        train_config={"lr": 0.1, "name": "é\ud800"},
        tokenizer={"kind": "char", "chars": "\n+=0123456789"},
        loader={"next": step},
    )
    return Checkpoint(step=step, **values | fields)


def flip_bit(path, bit):
    data = bytearray(path.read_bytes())
    bit %= 8 * len(data)
    data[bit // 8] ^= 1 << bit % 8
    path.write_bytes(data)


def names(run):
    return sorted(path.name for path in run.iterdir())


# ------------------------------------------------------------------------------------------------------------
# round trip


def test_what_was_saved_is_loaded(tmp_path):
    model, optimizer = training()
    train(model, optimizer, 2)
    saved = snapshot(7, model, optimizer, best_val_loss=1.5, progress={"stale": 3})
    path = save(tmp_path / "new" / "run", "last", saved)
    loaded = load(tmp_path / "new" / "run")
    assert path == loaded.path == tmp_path / "new" / "run" / "last-00000007"
    assert sorted(file.name for file in path.iterdir()) == sorted(FILES)
    for name in checkpoint.STATE_FIELDS:
        assert getattr(loaded, name) == getattr(saved, name), name
    torch.testing.assert_close(loaded.model, dict(saved.model), rtol=0, atol=0)
    torch.testing.assert_close(loaded.optimizer, saved.optimizer, rtol=0, atol=0)


def test_a_loss_that_was_never_measured_stays_infinite_in_valid_json(tmp_path):
    path = save(tmp_path, "last", snapshot())
    assert load(path).best_val_loss == math.inf
    json.loads((path / "state.json").read_text(), parse_constant=lambda name: pytest.fail(name))


def test_resumed_equals_uninterrupted_with_dropout(tmp_path):
    model, optimizer = training()
    train(model, optimizer, 3)
    save(tmp_path, "last", snapshot(3, model, optimizer))
    train(model, optimizer, 3)

    torch.manual_seed(99)  # another process would not be where this one is
    resumed, its_optimizer = training()
    loaded = load(tmp_path)
    resumed.load_state_dict(loaded.model)
    its_optimizer.load_state_dict(loaded.optimizer)
    restore_rng(loaded.rng)
    train(resumed, its_optimizer, 3)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), resumed.parameters(), strict=True))


def test_tied_weights_are_stored_once_and_stay_tied(tmp_path):
    path = save(tmp_path, "last", snapshot())
    assert len(load_file(path / "model.safetensors")) == 2  # readable without the rest
    model = load(path).model
    assert model["0.weight"].data_ptr() == model["2.weight"].data_ptr()
    assert set(model) == {"0.weight", "2.weight", "2.bias"}


def test_a_transposed_view_of_a_weight_is_not_taken_for_the_weight(tmp_path):
    square = torch.arange(9.0).view(3, 3)
    loaded = load(save(tmp_path, "last", snapshot(model={"a": square, "b": square.t()}))).model
    assert torch.equal(loaded["a"], square) and torch.equal(loaded["b"], square.t())


def test_random_state_of_an_absent_device_is_said_aloud(capsys):
    state = capture_rng() | {"tpu": ""}
    expected = torch.rand(3)
    restore_rng(state)
    assert torch.equal(torch.rand(3), expected)
    assert "no tpu here" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------------------
# which one is kept, which one is found


def test_the_two_latest_of_each_kind_are_kept(tmp_path):
    (tmp_path / "metrics.jsonl").touch()
    for step in (1, 2, 3, 10):
        save(tmp_path, "last", snapshot(step))
    save(tmp_path, "best", snapshot(2))
    assert names(tmp_path) == ["best-00000002", "last-00000003", "last-00000010", "metrics.jsonl"]
    assert load(tmp_path).step == load(tmp_path, "last").step == 10
    assert load(tmp_path, "best").step == 2


def test_a_kind_that_is_absent_is_replaced_by_the_other_aloud(tmp_path, capsys):
    save(tmp_path, "last", snapshot(5))
    assert load(tmp_path, "best").step == 5
    assert "has no best checkpoint, using last-00000005" in capsys.readouterr().err


def test_steps_are_ordered_as_numbers(tmp_path):
    for step in (99_999_999, 100_000_000):
        save(tmp_path, "last", snapshot(step))
    assert [path.name for path in find(tmp_path)] == ["last-100000000", "last-99999999"]


def test_saving_the_same_step_again_replaces_it(tmp_path):
    save(tmp_path, "last", snapshot(4))
    save(tmp_path, "last", snapshot(5, progress={"attempt": 1}))
    save(tmp_path, "last", snapshot(5, progress={"attempt": 2}))
    assert load(tmp_path).progress == {"attempt": 2}
    assert names(tmp_path) == ["last-00000004", "last-00000005"]


def test_a_run_that_went_back_is_not_outranked_by_its_abandoned_future(tmp_path, capsys):
    for step in (100, 200, 300):
        save(tmp_path, "last", snapshot(step))
    save(tmp_path, "last", snapshot(250))
    assert load(tmp_path).step == 250
    assert names(tmp_path) == ["last-00000200", "last-00000250"]
    assert "removing last-00000300" in capsys.readouterr().err


@pytest.mark.parametrize("run", [".", "absent", "last-00000001"])
def test_nothing_to_load_is_one_clear_line(tmp_path, run):
    with pytest.raises(FileNotFoundError, match="^no checkpoint in .*: train a model there first"):
        load(tmp_path / run, "last")


# ------------------------------------------------------------------------------------------------------------
# damage


@settings(max_examples=60, phases=[Phase.generate])  # a counterexample is as small as it gets
@given(st.sampled_from(FILES), st.integers(0, 10**6))
def test_any_flipped_bit_is_detected(tmp_path_factory, name, bit):
    run = tmp_path_factory.mktemp("run")
    path = save(run, "last", snapshot(2))
    flip_bit(path / name, bit)
    with pytest.raises(ValueError, match=f"{path}.* (is not what was written|cannot be read)"):
        load(path)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", ["remove", "truncate", "empty", "flip"])
def test_the_one_before_is_used_aloud(tmp_path, capsys, name, damage):
    save(tmp_path, "last", snapshot(1))
    file = save(tmp_path, "last", snapshot(2)) / name
    if damage == "remove":
        file.unlink()
    elif damage == "flip":
        flip_bit(file, 8 * (file.stat().st_size // 2))
    else:
        os.truncate(file, file.stat().st_size - 2 if damage == "truncate" else 0)
    assert load(tmp_path).step == 1
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and str(file.parent) in said and "using last-00000001 instead" in said


def test_when_none_is_sound_all_are_named(tmp_path):
    for kind in ("last", "best"):
        flip_bit(save(tmp_path, kind, snapshot(3)) / "state.json", 99)
    with pytest.raises(ValueError, match="no sound checkpoint in .*last-00000003.*best-00000003"):
        load(tmp_path)


def test_without_the_optimizer_its_file_is_not_needed(tmp_path):
    path = save(tmp_path, "best", snapshot())
    (path / "optimizer.pt").unlink()
    assert load(path, with_optimizer=False).optimizer == {}
    flip_bit(path / "model.safetensors", 10_000)
    with pytest.raises(ValueError, match="model.safetensors"):
        load(path, with_optimizer=False)


# ------------------------------------------------------------------------------------------------------------
# interruptions while saving


SAVE_FOREVER = """
import sys, torch
sys.path[:0] = {paths!r}
from test_checkpoint import snapshot
from training.checkpoint import save
torch.set_num_threads(1)
model = torch.nn.Linear(400, 400)
model.weight.data.fill_(1.0)
optimizer = torch.optim.AdamW(model.parameters())
print("ready", flush=True)
step = 0
while True:
    step += 1
    model.bias.data.fill_(float(step))
    save({run!r}, "last", snapshot(step, model, optimizer))
    if step == 1:
        print("saved", flush=True)
"""


def test_kill_in_the_middle_of_saving_leaves_a_sound_checkpoint(tmp_path):
    code = SAVE_FOREVER.format(
        paths=[str(ROOT), str(ROOT / "tests"), str(ROOT / "tests" / "training")], run=str(tmp_path)
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "ready\n" and process.stdout.readline() == "saved\n"
    time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    newest = find(tmp_path)[0]
    loaded = load(newest)  # whatever has its final name is whole
    assert torch.equal(loaded.model["bias"], torch.full((400,), float(loaded.step)))
    save(tmp_path, "last", snapshot(loaded.step + 1))
    assert not list(tmp_path.glob(".tmp-*"))  # what the killed process left behind


def test_at_every_moment_of_a_save_there_is_a_whole_checkpoint(tmp_path, monkeypatch):
    """Stop before each call that changes the run folder, while a step is saved for a second time."""

    class PowerCut(BaseException):
        pass

    def cut_power_at(last_call, patch):
        calls = 0

        def counted(function):
            def call(*arguments, **options):
                nonlocal calls
                calls += 1
                if calls >= last_call:
                    raise PowerCut
                return function(*arguments, **options)

            return call

        for owner, name in [(Path, "rename"), (Path, "mkdir"), (shutil, "rmtree")]:
            patch.setattr(owner, name, counted(getattr(owner, name)))

    for last_call in range(1, 100):
        run = tmp_path / str(last_call)
        save(run, "last", snapshot(5))
        with monkeypatch.context() as patch:
            cut_power_at(last_call, patch)
            try:
                save(run, "last", snapshot(5))
                break
            except PowerCut:
                pass
        whole = run / "last-00000005"
        assert load(run).path == (whole if whole.exists() else whole.with_suffix(".old"))
        save(run, "last", snapshot(5, progress={"attempt": 3}))
        assert load(run).progress == {"attempt": 3} and names(run) == [whole.name]
    assert last_call > 6  # two folders made, one moved away, one moved in, two removed


FULL_DISK = "cannot save .*last-00000002.*Earlier checkpoints are untouched; free some space"


def big_snapshot(of, step=2):
    """Too much for the small disks below, in one of its files."""
    return dataclasses.replace(snapshot(step), **{of: {"bulk": torch.zeros(1 << 18)}})


@pytest.mark.parametrize("of", ["model", "optimizer"])
def test_a_file_size_limit_is_one_line_and_loses_nothing(tmp_path, of):
    save(tmp_path, "last", snapshot(1))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 18, limits[1]))
    try:
        with pytest.raises(OSError, match=FULL_DISK) as error:
            save(tmp_path, "last", big_snapshot(of))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "File too large" in str(error.value) and "\n" not in str(error.value)
    assert names(tmp_path) == ["last-00000001"] and load(tmp_path).step == 1


@pytest.mark.parametrize("of", ["model", "optimizer"])
def test_a_full_disk_is_one_line_and_loses_nothing(tmp_path, of):
    mount = ["mount", "-t", "tmpfs", "-o", "size=512k", "tmpfs", str(tmp_path)]
    try:
        mounted = subprocess.run(mount, capture_output=True).returncode == 0
    except FileNotFoundError:
        mounted = False
    if not mounted:
        pytest.skip("mounting a small file system is not allowed here")
    try:
        save(tmp_path / "run", "last", snapshot(1))
        with pytest.raises(OSError, match=FULL_DISK) as error:
            save(tmp_path / "run", "last", big_snapshot(of))
        assert "No space left on device" in str(error.value) and "\n" not in str(error.value)
        assert names(tmp_path / "run") == ["last-00000001"] and load(tmp_path / "run").step == 1
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


def test_a_run_folder_that_cannot_be_made_is_one_line(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="cannot save .*Not a directory"):
        save(tmp_path / "file" / "run", "last", snapshot())


# ------------------------------------------------------------------------------------------------------------
# other versions of the code


@dataclass(frozen=True)
class Config:
    width: int = 8
    added: str = "default"


def test_another_format_explains_itself(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "FORMAT", checkpoint.FORMAT + 1)
        patch.setattr(checkpoint, "code_version", lambda: "v9-abc")
        save(tmp_path, "last", snapshot())
    line = f"format {checkpoint.FORMAT + 1} and was written by code v9-abc with torch .*check out"
    with pytest.raises(ValueError, match=line):
        load(tmp_path)


def test_a_config_of_the_same_code_is_rebuilt_in_silence(capsys):
    config = Config(width=3, added="x")
    assert rebuild_config(Config, json.loads(json.dumps(dataclasses.asdict(config)))) == config
    assert capsys.readouterr().err == ""


def test_a_setting_that_was_not_known_takes_its_default_aloud(capsys):
    assert rebuild_config(Config, {"width": 4}) == Config(width=4)
    assert "added='default'" in capsys.readouterr().err


@pytest.mark.parametrize("off", [False, 0, 0.0, None, ""])
def test_an_unknown_setting_that_was_off_is_dropped_aloud(capsys, off):
    assert rebuild_config(Config, {"width": 4, "added": "x", "new": off}) == Config(4, "x")
    assert "new" in capsys.readouterr().err


def test_an_unknown_setting_in_use_is_refused_with_who_wrote_it():
    with pytest.raises(ValueError, match="written by code v9.*new='rotary'; check out that version"):
        rebuild_config(Config, {"width": 4, "added": "x", "new": "rotary"}, "code v9")


def test_weights_that_do_not_fit_explain_themselves(tiny_gpt):
    model = tiny_gpt(dag_depth=0)
    config = dataclasses.asdict(model.config)
    saved = snapshot(model=model.state_dict(), model_config=config, written_by="code v9")
    assert torch.equal(checkpoint.rebuild_model(saved).lm_head.weight, model.lm_head.weight)
    del saved.model["lm_head.weight"]
    with pytest.raises(ValueError, match="written by code v9 and do not fit"):
        checkpoint.rebuild_model(saved)
