"""What tests share: the repository on the path, fixed seeds, one thread, a script runner, a tiny model."""

import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import settings

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

# where pytest runs in the background SIGINT is ignored, and what it starts would inherit that
signal.signal(signal.SIGINT, signal.default_int_handler)
os.environ.pop("PYTHONUNBUFFERED", None)  # a user's output is buffered, and what is left in a buffer can fail
torch.set_num_threads(1)  # tensors this small lose by sharing: five times slower on a busy machine
settings.register_profile("repository", deadline=None, derandomize=True, database=None)
settings.load_profile("repository")

VOCABULARY = [char.encode() for char in "0123456789+-*/=(). \nabcdefghi"]  # of tiny_gpt
SEPARATOR = VOCABULARY.index(b"\n")
GLUED = [*VOCABULARY, b" -", b"(-", b"=-", b" +", b"=+"]  # as a byte-pair encoding has them
DENSE = {  # by dag_inputs
    inputs: dict(dag_inputs=inputs, dag_values="learned", dag_plan="straight_through", dag_fold="value")
    for inputs in ("token", "sequence")
}
IMPOSSIBLE = [  # flags of train.py, and what it says to them; the launchers say the same
    (["--dag_ops=plus"], "dag_ops names 'plus'; choose from add, subtract"),
    (["--dag_ops=add,multiply"], "lacks identity"),
    (["--dag_inputs=token"], "dag_values is 'literal'; choose from learned with dag_inputs=token"),
    (
        ["--dag_inputs=token", "--dag_values=learned"],
        "dag_plan is 'searched'; choose from soft, straight_through",
    ),
    (["--dag_fold=value"], "dag_fold is 'value'; choose from digits with dag_inputs=numbers"),
    (["--dag_leaves=6"], "dag_leaves='6': expected int in [1, 6)"),
    (["--dag_strict_probability=1.1"], "dag_strict_probability='1.1': expected a finite float in [0, 1]"),
    (["--n_embd=130"], "n_embd=130 is not a multiple of n_head=4"),
    (["--device=mps"], "numbers are read in float64, which MPS does not have"),
    (["--init_from=gpt2", "--block_size=2048"], "gpt2 has 1024 positions"),
]


def random_text(*shape: int, vocabulary=VOCABULARY) -> torch.Tensor:
    """Tokens, two of three of them digits, and otherwise mostly what may stand in numbers or between them."""
    marks = torch.randint(10, min(len(vocabulary), 20), shape)
    marks = torch.where(torch.rand(shape) < 0.3, torch.randint(10, len(vocabulary), shape), marks)
    return torch.where(torch.rand(shape) < 0.6, torch.randint(10, shape), marks)


@pytest.fixture(autouse=True)
def seeded():
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture
def run_script():
    """run_script("train.py", "--max_iters=2", cwd=..., env={...}) -> CompletedProcess with text output."""

    def run(script: str, *arguments: str, cwd=ROOT, env=None, timeout=120) -> subprocess.CompletedProcess:
        return subprocess.run(
            [sys.executable, str(ROOT / script), *map(str, arguments)],
            cwd=cwd,
            env={**os.environ, "OMP_NUM_THREADS": "1", **(env or {})},
            capture_output=True,
            text=True,
            timeout=timeout,
        )

    return run


@pytest.fixture
def tiny_gpt():
    """tiny_gpt(dag_depth=3, ...) -> a GPT of a few thousand weights in eval mode, over VOCABULARY or another.

    Its weights are large and random, LayerNorms and biases among them: at a real initialisation the DAG is so
    quiet that a leak, a wrong cache or a dead gradient would pass unseen.
    """
    from dag_model import GPT, GPTConfig

    def build(std=0.3, vocabulary=VOCABULARY, **fields) -> GPT:
        trunk = dict(block_size=16, vocab_size=len(vocabulary), n_layer=2, n_head=2, n_embd=16, dag_leaves=2)
        torch.manual_seed(0)
        model = GPT(GPTConfig(**(trunk | fields)), vocabulary).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.normal_(std=std)
        return model

    return build
