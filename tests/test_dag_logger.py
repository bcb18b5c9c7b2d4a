"""Statistics by hand, metrics.jsonl line by line, and the real wandb package without a network."""

import json
import math
import os
import pty
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import DENSE, random_text

import dag_logger
from dag_logger import DAGLogger
from dag_model import DAGState
from dense_dag import DenseState, Plan
from plan_search import Plans
from readout import Offers

ROOT = Path(dag_logger.__file__).parent


def read(run_dir) -> list[dict]:
    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line, parse_constant=refuse) for line in lines]


# ----------------------------------------------------------------------------------------------------
# metrics.jsonl


def test_a_line_is_on_the_disk_at_once_and_says_when(tmp_path):
    logger = DAGLogger(tmp_path / "new" / "run", {})
    before = time.time()
    logger.log(3, {"train/loss": 1.5, "count": 2})
    (line,) = read(tmp_path / "new" / "run")  # before finish
    assert line.pop("time") == pytest.approx(before, abs=5)
    assert line == {"step": 3, "train/loss": 1.5, "count": 2.0}
    assert logger.run_id is None
    logger.finish()


def test_not_finite_becomes_null(tmp_path):
    logger = DAGLogger(tmp_path, {})
    logger.log(1, {"nan": math.nan, "inf": math.inf, "minus": -math.inf, "tensor": torch.tensor(0.5)})
    (line,) = read(tmp_path)
    assert (line["nan"], line["inf"], line["minus"], line["tensor"]) == (None, None, None, 0.5)


def test_a_metric_cannot_take_the_place_of_the_step(tmp_path):
    with pytest.raises(AssertionError, match="reserved"):
        DAGLogger(tmp_path, {}).log(1, {"step": 7.0})


def test_resuming_drops_the_interrupted_future_and_a_torn_line(tmp_path):
    logger = DAGLogger(tmp_path, {})
    for step in (5, 10, 10, 15, 20):
        logger.log(step, {"loss": float(step)})
    logger.finish()
    with open(tmp_path / "metrics.jsonl", "ab") as file:
        file.write(b'{"step": 9, "loss": "\xc3')  # killed within a character
    logger = DAGLogger(tmp_path, {}, resume_step=10)
    assert [line["step"] for line in read(tmp_path)] == [5, 10, 10]
    logger.log(15, {"loss": 0.0})
    assert [(line["step"], line["loss"]) for line in read(tmp_path)][-2:] == [(10, 10.0), (15, 0.0)]
    assert os.listdir(tmp_path) == ["metrics.jsonl"]


def test_resuming_from_step_0_and_a_fresh_run_keep_different_things(tmp_path):
    DAGLogger(tmp_path, {}).log(0, {"loss": 1.0})
    DAGLogger(tmp_path, {}, resume_step=0)
    assert len(read(tmp_path)) == 1
    DAGLogger(tmp_path, {})
    assert read(tmp_path) == []


# ----------------------------------------------------------------------------------------------------
# statistics


def tiny_state() -> DenseState:
    """One row of two positions, K = 1 input and D = 2 steps, so S = 3; two operations; width 2."""
    operands = torch.tensor(
        [
            [[[1.0, 0, 0], [1, 0, 0]], [[0, 1, 0], [1, 0, 0]]],  # position 0: (0, 0), then (1, 0)
            [
                [[1.0, 0, 0], [1, 0, 0]],
                [[0.5, 0.5, 0], [0, 1, 0]],
            ],  # position 1: (0, 0), then a mixture and 1
        ]
    )[None]
    operation = torch.tensor([[[1.0, 0], [1, 0]], [[1, 0], [0, 1]]])[None]
    return DenseState(
        plan=Plan(operands, operation),
        values=torch.tensor([[[2.0, 4, 8], [3, 6, 9]]]),
        validity=torch.tensor([[[1.0, 1, 0], [1, 0.5, 1]]]),
        gate=torch.tensor([[[0.2], [0.8]]]),
        folded=torch.tensor([[[3.0, 4.0], [0.0, 1.0]]]),
    )


def plans_state(count: int) -> DAGState:
    """One row of two positions and `count` of two plans: K = 1 input, D = 2 steps; two operations."""
    operation = torch.tensor([[0, 1], [1, 1]])[:count]
    none = torch.zeros_like(operation)
    return DAGState(
        row=torch.zeros(count, dtype=torch.long),
        position=torch.arange(count),
        plans=Plans(operation, none, none),
        format=torch.zeros(count, dtype=torch.long),
        log_probability=torch.tensor([0.5, 0.25]).log()[:count],
        written=["7", None][:count],
        symbols=[[7, 29], []][:count],
        offers=Offers(
            torch.tensor([[7, -1]]), torch.tensor([[-0.5, 0]]), torch.tensor([[0, 0]]), torch.tensor([[0, 2]])
        ),
        gate=torch.tensor([[[0.8], [0.0]]]),
        plan_loss=None,
    )


def nats(*probabilities) -> float:
    return -sum(p * math.log(p) for p in probabilities)


def test_statistics_by_hand(tmp_path):
    statistics = DAGLogger(tmp_path, {}).dag_statistics(tiny_state(), ["add", "log"])
    assert all(type(value) is float for value in statistics.values())
    assert statistics == pytest.approx(
        {
            "dag/gate_mean": 0.5,
            "dag/gate_std": 0.3,
            "dag/gate_open": 0.5,
            "dag/valid_results": 2.5 / 4,
            "dag/valid_final": 0.5,
            "dag/folded_norm": (5 + 1) / 2,
            "dag/gated_norm": (0.2 * 5 + 0.8 * 1) / 2,
            "dag/operation_entropy": nats(3 / 4, 1 / 4),
            "dag/operand1_entropy": nats(2.5 / 4, 1.5 / 4),
            "dag/operand2_entropy": nats(3 / 4, 1 / 4),
            "dag/operands_from_results": (1.5 + 1) / 8,
            "dag/use/add": 3 / 4,
            "dag/use/log": 1 / 4,
        },
        rel=1e-6,
    )


def test_statistics_of_plans_by_hand(tmp_path):
    logger = DAGLogger(tmp_path, {})
    gate = {"dag/gate_mean": 0.4, "dag/gate_std": 0.4, "dag/gate_open": 0.5}
    assert logger.dag_statistics(plans_state(2), ["add", "identity"]) == pytest.approx(
        gate
        | {
            "dag/plans": 2.0,
            "dag/valid_final": 0.5,
            "dag/plan_probability": 0.375,
            "dag/operation_entropy": nats(1 / 4, 3 / 4),
            "dag/use/add": 1 / 4,
            "dag/use/identity": 3 / 4,
        },
        rel=1e-6,
    )
    assert logger.dag_statistics(plans_state(0), ["add", "identity"]) == pytest.approx(
        gate | {"dag/plans": 0.0}
    )


@pytest.mark.parametrize(
    "fields", [DENSE["sequence"] | dict(dag_gate=False), DENSE["token"] | dict(dag_plan="soft"), {}]
)
def test_statistics_of_a_model_are_finite_under_autocast(tmp_path, tiny_gpt, fields):
    model = tiny_gpt(**fields)
    with torch.autocast("cpu", torch.bfloat16):
        state = model.inspect(random_text(8, 16))
    statistics = DAGLogger(tmp_path, {}).dag_statistics(state, model.dag.names)
    assert all(math.isfinite(value) for value in statistics.values())
    assert sum(value for name, value in statistics.items() if "/use/" in name) == pytest.approx(1, abs=1e-5)


def test_the_wrong_operation_names_are_refused(tmp_path):
    for state, names in [(tiny_state(), ["add", "log", "max"]), (plans_state(2), ["add"])]:
        with pytest.raises(ValueError):
            DAGLogger(tmp_path, {}).dag_statistics(state, names)


def test_gradients_by_hand(tmp_path, tiny_gpt):
    model = tiny_gpt(dag_depth=2, dag_ops="add,log", n_embd=2, n_head=1, **DENSE["token"])
    logger = DAGLogger(tmp_path, {})
    assert logger.get_wandb_logging_dict(model) == {}  # no gradients yet
    scores = model.dag.planner.operation_score  # rows: step 0 add, step 0 log, step 1 add, step 1 log
    scores.weight.grad = torch.tensor([[3.0, 0], [1, 0], [0, 4], [0, 0]])
    model.dag.fold.project.weight.grad = torch.tensor([[6.0], [0]])
    model.dag.fold.project.bias.grad = torch.tensor([0.0, 8])
    model.lm_head.weight.grad = torch.ones_like(model.lm_head.weight)  # not the DAG's
    assert logger.get_wandb_logging_dict(model) == pytest.approx(
        {
            "dag/gradient_norm/planner": math.sqrt(26),
            "dag/gradient_norm/fold": 10.0,
            "dag/gradient_norm/add": 5.0,
            "dag/gradient_norm/log": 1.0,
        }
    )


@pytest.mark.parametrize(
    "fields, parts",
    [
        (
            DENSE["sequence"] | dict(dag_context="attention"),
            ["contexts", "values", "inputs", "planner", "fold", "gate"],
        ),
        ({}, ["near_digit", "planner", "wanted", "trusted"]),
    ],
    ids=["sequence", "numbers"],
)
def test_the_logging_dict_has_statistics_and_gradients_of_every_part(tmp_path, tiny_gpt, fields, parts):
    model = tiny_gpt(**fields).train()
    logger = DAGLogger(tmp_path, {})
    idx = random_text(16, 16)
    statistics = logger.dag_statistics(model.inspect(idx), model.dag.names)
    model(idx, idx)[1].backward()
    logged = logger.get_wandb_logging_dict(model)
    assert statistics.items() <= logged.items()
    for part in parts:
        assert logged[f"dag/gradient_norm/{part}"] > 0
    logger.log(1, logged)
    assert read(tmp_path)[0]["dag/gate_mean"] == statistics["dag/gate_mean"]


def test_a_plain_gpt_has_nothing_to_tell(tmp_path, tiny_gpt):
    model = tiny_gpt(dag_depth=0)
    logger = DAGLogger(tmp_path, {})
    idx = torch.randint(29, (1, 4))
    model(idx, idx)[1].backward()
    assert logger.dag_statistics(model.inspect(idx), []) == {}
    assert logger.get_wandb_logging_dict(model) == {}


# ----------------------------------------------------------------------------------------------------
# W&B, the real package


def wandb_records(path: Path):
    """The protobuf records of a .wandb file: after 7 bytes, LevelDB's log format in blocks of 32 KiB."""
    from wandb.proto import wandb_internal_pb2

    data, at, parts = path.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768  # a header never crosses a block
            continue
        length, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        parts += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield wandb_internal_pb2.Record.FromString(parts)
            parts = b""


def read_wandb(run_dir: Path) -> tuple[dict, list[dict]]:
    """Configuration and history of the folder's run; W&B ends its file shortly after `finish`."""
    (path,) = run_dir.glob("wandb/offline-run-*/*.wandb")
    for _ in range(200):
        records = {}
        for record in wandb_records(path):
            records.setdefault(record.WhichOneof("record_type"), []).append(record)
        if "exit" in records:
            break
        time.sleep(0.1)

    def as_dict(items) -> dict:
        return {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in items}

    return as_dict(records["run"][0].run.config.update), [as_dict(r.history.item) for r in records["history"]]


def test_offline_run_holds_what_was_logged_and_goes_on_under_its_id(tmp_path, capfd):
    config = {"n_layer": 4, "dtype": "auto"}
    first = DAGLogger(tmp_path, config, wandb_log=True, mode="offline", run_name="one")
    assert first.run_id and first.run.name == "one"
    first.log(10, {"train/loss": 2.5, "broken": math.nan})
    first.log(10, {"val/loss": 2.75})  # of the same step
    first.log(20, {"train/loss": 1.25})
    first.finish()
    assert "wandb sync" in capfd.readouterr().out
    written, history = read_wandb(tmp_path)
    assert config.items() <= written.items()
    rows = [{name: row.get(name) for name in ("_step", "train/loss", "val/loss")} for row in history]
    assert rows == [
        {"_step": 10, "train/loss": 2.5, "val/loss": 2.75},
        {"_step": 20, "train/loss": 1.25, "val/loss": None},
    ]
    assert not any("broken" in row for row in history) and read(tmp_path)[0]["broken"] is None

    again = DAGLogger(tmp_path, {}, wandb_log=True, mode="offline", run_id=first.run_id, resume_step=20)
    again.finish()
    assert again.run_id == first.run_id


def test_disabled_is_off(tmp_path, capfd):
    logger = DAGLogger(tmp_path, {}, wandb_log=True, mode="disabled")
    logger.log(1, {"loss": 1.0})
    logger.finish()
    assert logger.run is None and len(read(tmp_path)) == 1 and not (tmp_path / "wandb").exists()
    assert capfd.readouterr() == ("", "")


def test_a_missing_package_costs_one_line(tmp_path, monkeypatch, capfd):
    monkeypatch.setitem(sys.modules, "wandb", None)  # import raises ImportError
    logger = DAGLogger(tmp_path, {}, wandb_log=True, mode="offline", run_id="kept")
    logger.log(1, {"loss": 1.0})
    logger.finish()
    message = capfd.readouterr().err
    assert message.count("\n") == 1 and "W&B is off" in message and "wandb" in message
    assert len(read(tmp_path)) == 1 and logger.run_id == "kept"  # a later resume can go on in that run


def test_a_run_outlives_wandb(tmp_path, capfd):
    """What happens when its service dies: every call raises, ConnectionResetError in wandb 0.31."""

    class Broken:
        def log(self, *args, **kwargs):
            raise ConnectionResetError("Connection lost")

    logger = DAGLogger(tmp_path, {})
    logger.run = Broken()
    for step in (1, 2):
        logger.log(step, {"loss": 1.0})
    logger.finish()
    assert capfd.readouterr().err.count("Connection lost") == 1
    assert [line["step"] for line in read(tmp_path)] == [1, 2]


ONLINE = """
import sys
import dag_logger
assert "wandb" not in sys.modules
dag_logger.LOGIN_TIMEOUT = 1
dag_logger.WANDB_SETTINGS["init_timeout"] = 1
logger = dag_logger.DAGLogger(sys.argv[1], {}, wandb_log=True, mode="online")
logger.log(1, {"loss": 1.0})
logger.finish()
print("trained on")
"""


def online(tmp_path, **env) -> tuple[list[str], dict]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    return [sys.executable, "-c", ONLINE, str(tmp_path / "run")], clean | {"HOME": str(tmp_path)} | env


@pytest.mark.slow
@pytest.mark.parametrize(
    "env, reason",
    [
        ({}, "wandb login"),
        ({"WANDB_API_KEY": "0" * 40, "WANDB_BASE_URL": "http://127.0.0.1:9"}, "127.0.0.1:9"),
    ],
)
def test_no_login_and_no_network_cost_one_line_and_little_time(tmp_path, env, reason):
    command, env = online(tmp_path, **env)
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and "trained on" in done.stdout, done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("W&B is off")]
    assert reason in line and len(read(tmp_path / "run")) == 1


@pytest.mark.slow
def test_the_login_prompt_on_an_unattended_terminal_gives_up(tmp_path):
    """wandb.init alone would wait at its prompt for ever."""
    command, env = online(tmp_path)
    keyboard, terminal = pty.openpty()
    streams = dict(stdin=terminal, stdout=terminal, stderr=terminal)
    done = subprocess.run(command, cwd=ROOT, env=env, timeout=40, **streams)
    output = os.read(keyboard, 65536).decode()
    os.close(keyboard), os.close(terminal)
    assert "Enter your choice" in output  # it did ask
    assert done.returncode == 0 and "trained on" in output and "W&B is off" in output, output
