"""metrics.jsonl line by line, what one call tells, and the real wandb package without a network."""

import json
import math
import multiprocessing
import os
import pty
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import DENSE, SEPARATOR, VOCABULARY, random_text
from matplotlib.figure import Figure

import dag_logger
from dag_logger import DAGLogger
from data.tokenizer import CharTokenizer
from evals.answers import Attempt, Problem
from evals.dag_metrics import Watch
from inference.explain import explain

ROOT = Path(dag_logger.__file__).parent
TOKENIZER = CharTokenizer(b"".join(VOCABULARY).decode())


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
# statistics: what they are is tested in test_dag_statistics.py


@pytest.mark.parametrize("fields", [{}, DENSE["sequence"]], ids=["numbers", "sequence"])
def test_one_call_has_statistics_gradients_hits_and_probes(tmp_path, tiny_gpt, fields):
    model = tiny_gpt(separator_id=SEPARATOR, **fields).train()
    logger = DAGLogger(tmp_path, {})
    idx, targets = random_text(16, 16), random_text(16, 16)
    assert logger.get_wandb_logging_dict(model) == {}  # nothing to look at, and no gradients yet
    logger.watch = Watch.of(model, TOKENIZER, idx, targets, [Problem("2+3=", "5")])
    model(idx, targets)[1].backward()
    logged = logger.get_wandb_logging_dict(model)
    expected = {"dag/gate_open", "dag/mixed_norm", "dag/use/add", "dag/gradient/final_hidden", "probe/0/gate"}
    expected |= {f"dag/gradient_norm/{part}" for part in ("planner", "add")}
    if model.reads_numbers:
        expected |= {"dag/own_plan_explains", "dag/gradient_norm/near_digit"}
    assert expected <= logged.keys()
    assert all(type(value) is float and math.isfinite(value) for value in logged.values())
    logger.log(1, logged)
    (line,) = read(tmp_path)
    assert logged.items() <= line.items()


def test_a_plain_gpt_has_nothing_to_tell(tmp_path, tiny_gpt):
    model = tiny_gpt(dag_depth=0)
    logger = DAGLogger(tmp_path, {})
    idx = random_text(2, 8)
    logger.watch = Watch.of(model, TOKENIZER, idx, idx, [Problem("2+3=", "5")])
    model(idx, idx)[1].backward()
    assert logger.get_wandb_logging_dict(model) == logger.hits_since(model) == {}


def test_hits_are_those_since_the_last_call(tiny_gpt):
    logger, model = DAGLogger(None, {}), tiny_gpt()
    model.dag.plan_loss.hits.update(numbers=4, own=1)
    assert logger.hits_since(model) == {"dag/own_plan_explains": 0.25, "dag/explained": 0.0}
    assert logger.hits_since(model) == {}
    model.dag.plan_loss.hits.update(numbers=2, own=2, explained=2, plans=2)
    assert logger.hits_since(model)["dag/own_plan_explains"] == 1.0


def test_what_is_not_finite_is_left_out():
    tensors = {name: torch.tensor(value) for name, value in dict(a=1.5, b=math.nan, c=-math.inf).items()}
    assert dag_logger.to_floats(tensors) == {"a": 1.5}


def test_without_a_folder_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    logger = DAGLogger(None, {}, wandb_log=True, mode="offline")
    logger.log(1, {"loss": 1.0})
    logger.finish()
    assert logger.run is None and os.listdir(tmp_path) == []


def gather(rank: int, path: str, results) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=2)
    mine = [{"both": 1.0, "first": 5.0}, {"both": 2.0, "second": 7.0}][rank]
    results.put((rank, dag_logger.mean_over_ranks(mine)))
    torch.distributed.destroy_process_group()


def test_statistics_are_means_over_the_processes_that_have_them(tmp_path):
    fork = multiprocessing.get_context("fork")
    results = fork.Queue()
    ranks = [
        fork.Process(target=gather, args=(rank, str(tmp_path / "rendezvous"), results)) for rank in (0, 1)
    ]
    for process in ranks:
        process.start()
    found = dict(results.get(timeout=60) for _ in ranks)
    for process in ranks:
        process.join()
    assert found[0] == found[1] == {"both": 1.5, "first": 5.0, "second": 7.0}
    assert dag_logger.mean_over_ranks({"both": 1.0}) == {"both": 1.0}  # a run of one process


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


def read_wandb(run_dir: Path) -> tuple[dict, list[dict], list]:
    """Configuration, history and artifacts of the folder's run; W&B ends its file shortly after `finish`."""
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

    configuration = as_dict(records["run"][0].run.config.update)
    artifacts = [record.artifact for record in records.get("artifact", [])]
    return configuration, [as_dict(record.history.item) for record in records["history"]], artifacts


def test_offline_run_holds_what_was_logged_and_goes_on_under_its_id(tmp_path, capfd):
    config = {"n_layer": 4, "dtype": "auto"}
    first = DAGLogger(tmp_path, config, wandb_log=True, mode="offline", run_name="one")
    assert first.run_id and first.run.name == "one"
    first.log(10, {"train/loss": 2.5, "broken": math.nan})
    first.log(10, {"val/loss": 2.75})  # of the same step
    first.log(20, {"train/loss": 1.25})
    first.finish()
    assert "wandb sync" in capfd.readouterr().out
    written, history, _ = read_wandb(tmp_path)
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


def test_tables_pictures_and_checkpoints_are_in_the_offline_run(tmp_path, tiny_gpt, capfd):
    model = tiny_gpt(separator_id=SEPARATOR)
    model.dag.wanted.bias.data += 100.0  # an open gate
    checkpoint = tmp_path / "last-00000007"
    checkpoint.mkdir()
    (checkpoint / "state.json").write_text("{}")
    right = Attempt("2+3=", "5", "5", True, tuple(TOKENIZER.encode("5")))
    wrong = Attempt("4-1=", "3", "9", False, tuple(TOKENIZER.encode("9")))
    Figure(figsize=(1, 1)).savefig(tmp_path / "curves.png")
    logger = DAGLogger(tmp_path, {}, wandb_log=True, mode="offline", artifacts=True)
    logger.log_problems(7, model, TOKENIZER, {"sums": [right], "differences": [wrong]})
    logger.log_pictures(7, {"curves": tmp_path / "curves.png", "none": tmp_path / "none.png"})
    logger.log_checkpoint(checkpoint, "last")
    assert logger.run is not None and capfd.readouterr().err == ""  # nothing of that went wrong
    logger.finish()
    _, (row,), artifacts = read_wandb(tmp_path)
    files = Path(next(tmp_path.glob("wandb/offline-run-*/files")))
    table = json.loads((files / row["val/problems.path"]).read_text())
    assert (files / row["curves.path"]).read_bytes().startswith(b"\x89PNG")
    assert [line[:5] for line in table["data"]] == [
        ["sums", "2+3=", "5", "5", True],
        ["differences", "4-1=", "3", "9", False],
    ]
    (solved_part, solved_plan), (failed_part, failed_plan) = (line[5:] for line in table["data"])
    expected = explain(model, TOKENIZER, TOKENIZER.encode("2+3=5")).thoughts[-1].expression
    assert solved_plan == expected and solved_part == ""
    assert failed_part in ("plan", "execution", "writing") and failed_plan
    (artifact,) = [saved for saved in artifacts if saved.type == "model"]  # the table is one too
    assert artifact.name == f"checkpoint-{logger.run_id}"
    assert {"last", checkpoint.name} <= set(artifact.aliases)
    assert [entry.path for entry in artifact.manifest.contents] == ["state.json"]


def test_checkpoints_are_uploaded_only_if_asked(tmp_path):
    logger = DAGLogger(tmp_path, {})
    logger.run = object()  # anything done with it would end W&B
    logger.log_checkpoint(tmp_path, "last")
    assert logger.run is not None


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
