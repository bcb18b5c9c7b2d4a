"""Every tensor is where the model is: scripts run on a device that is not the CPU (fake_device.py)."""

import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

ELSEWHERE = Path(__file__).with_name("fake_device.py")
try:
    from torch.utils.backend_registration import _setup_privateuseone_for_python_backend  # noqa: F401
except ImportError:
    pytest.skip("needs PyTorch 2.10 or newer: devices written in Python", allow_module_level=True)

SMALL = "--n_layer=1 --n_embd=32 --n_head=2 --batch_size=8 --dtype=float32 --num_threads=1".split()
SHORT = "--max_iters=4 --eval_interval=2 --eval_iters=1 --eval_problems=4 --log_interval=1".split()


def elsewhere(cwd: Path, script: str | Path, *arguments: str) -> str:
    command = [sys.executable, ELSEWHERE, ROOT / script, *arguments]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


FAILS = [
    *(
        "x + torch.ones(3)",
        "torch.ones(3)[x.long()]",
        "torch.nn.Linear(3, 1)(x)",
        "x.index_add_(0, x.long(), y)",
    ),
    *("x.index_select(0, torch.tensor(1))", "torch.stack([x[0], torch.tensor(0.0)])", "y[0].add_(x[0])"),
]
GOES = [
    *("x + torch.ones(())", "x[torch.tensor([0, 2])].sum()", "x[[0, 2]] + y.to(x.device)[1:]", "x.cpu() + y"),
    *("x.masked_fill(x > 0, torch.tensor(2.0))", "x.where(x > 0, 1.0)", "y.copy_(x)"),
]
TRIES = f"""
import torch
from training import device as runtime

x, y = torch.zeros(3, device=runtime.resolve_device("auto")), torch.ones(3)
for expression in {FAILS + GOES}:
    try:
        eval(expression)
        print("goes")
    except RuntimeError as error:
        print("fails" if "two devices" in str(error) else error)
"""


def test_two_devices_do_not_go_together(tmp_path):
    (tmp_path / "tries.py").write_text(TRIES)
    (tmp_path / "training").symlink_to(ROOT / "training")
    said = elsewhere(tmp_path, tmp_path / "tries.py").split()
    assert said == ["fails"] * len(FAILS) + ["goes"] * len(GOES)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    script = ROOT / "data" / "arithmetic" / "prepare.py"
    arguments = ["--lines=2000", "--problems_per_split=4", f"--out_dir={folder}/arithmetic"]
    subprocess.run([sys.executable, script, *arguments], check=True, capture_output=True)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(
    "config, flags",
    [
        ("train_default", []),
        ("train_default", ["--dag_plan=sampled"]),
        ("train_default", ["--dag_plan=soft", "--dag_values=learned"]),
        ("train_seed000", []),
    ],
)
def test_training_evaluating_and_writing(data, tmp_path, config, flags):
    run, config = "--out_dir=run", f"{ROOT}/config/{config}.py"
    said = elsewhere(tmp_path, "train.py", config, *flags, *SMALL, *SHORT, f"--data_dir={data}", run)
    assert "elsewhere" in said and "step 4: train loss" in said
    assert '"val_loss"' in elsewhere(tmp_path, "eval.py", run, "--suite=val", "--eval_iters=1")
    shows = ["--show_dag=true"] if "default" in config else []
    said = elsewhere(tmp_path, "sample.py", run, "--start=12+7*3=", "--max_new_tokens=8", *shows)
    assert said.startswith("12+7*3=")
