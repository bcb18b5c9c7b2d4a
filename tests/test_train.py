"""The training script: every preset takes a step, a resumed run equals an uninterrupted one, errors keep what was."""

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import DENSE
from safetensors.torch import load_file

import train
from data import loader as dataloader
from evals.dag_metrics import Watch, observe
from training import checkpoint

ROOT = Path(__file__).resolve().parent.parent
PRESETS = sorted(path.name for path in (ROOT / "config").glob("*.py"))
TINY = [
    "--n_layer=1",
    "--n_head=2",
    "--n_embd=16",
    "--block_size=64",
    "--batch_size=4",
    "--eval_iters=2",
    "--warmup_iters=2",
    "--log_interval=1",
    "--eval_problems=6",
    "--device=cpu",
    "--dtype=float32",
]
SYSTEMS = {"numbers": []} | {
    inputs: [f"--{name}={value}" for name, value in fields.items()] for inputs, fields in DENSE.items()
}
SOFT = [*SYSTEMS["token"], "--dag_plan=soft"]


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory):
    """Small datasets under the names that the presets use."""
    folder = tmp_path_factory.mktemp("data")
    text = folder / "text.txt"
    text.write_text("".join(f"line {n}: it is {n * n % 97} and not {n + 1}\n" for n in range(400)))
    subprocess.run(
        [
            sys.executable,
            "data/arithmetic/prepare.py",
            "--lines=3000",
            "--problems_per_split=20",
            f"--out_dir={folder}/arithmetic",
        ],
        cwd=ROOT,
        check=True,
        capture_output=True,
    )
    subprocess.run(
        [
            sys.executable,
            "data/custom/prepare.py",
            f"--input={text}",
            "--name=text",
            "--tokenizer=byte",
            f"--out_dir={folder}/text",
        ],
        cwd=ROOT,
        check=True,
        capture_output=True,
    )
    for name in ("shakespeare_char", "shakespeare", "openwebtext"):
        (folder / name).symlink_to(folder / "text")
    for name in ("addition", "addition_1k", "multiop", "allops"):
        (folder / name).symlink_to(folder / "arithmetic")
    return folder


@pytest.fixture
def run(data_dir, tmp_path, monkeypatch, capsys):
    """run("config/x.py", "--max_iters=2") trains in this process, in an empty folder; returns what it printed."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments):
        presets = [str(ROOT / argument) if argument.endswith(".py") else argument for argument in arguments]
        monkeypatch.setattr(sys, "argv", ["train.py", *TINY, f"--data_dir={data_dir}", *presets])
        train.main()
        return capsys.readouterr().out

    return call


def metrics(run_dir, name):
    lines = [json.loads(line) for line in open(Path(run_dir) / "metrics.jsonl")]
    return {line["step"]: line[name] for line in lines if name in line}


def weights(run_dir, kind="last"):
    return checkpoint.load(run_dir, kind).model


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_trains_a_step(run, preset):
    flags = ["--init_from=scratch", "--eval_only=False", "--max_iters=1", "--gradient_accumulation_steps=1"]
    run(f"config/{preset}", *flags, "--out_dir=run")
    assert metrics("run", "train/batch_loss").keys() == {1}
    fresh = load_file("run/last-00000000/model.safetensors")
    trained = load_file("run/last-00000001/model.safetensors")
    assert any(not torch.equal(fresh[name], trained[name]) for name in trained)


@pytest.mark.parametrize("depth", [0, 3])
def test_training_lowers_the_loss_and_ends_with_commands_that_work(run, run_script, depth):
    printed = run(f"--dag_depth={depth}", "--max_iters=100", "--eval_interval=100", "--learning_rate=1e-2")
    losses = metrics("out/train-001", "val/loss")
    assert losses[100] < 0.8 * losses[0]
    commands = [line.split() for line in printed.splitlines() if line.startswith("  python ")]
    assert [command[1] for command in commands] == ["sample.py", "eval.py", "train.py"]
    for _, script, *arguments in commands[:2]:
        done = run_script(script, *[argument.replace('"', "") for argument in arguments], cwd=Path.cwd())
        assert done.returncode == 0, done.stderr
        assert done.stdout.strip()


def test_metrics_hold_losses_speed_and_what_the_dag_does(run):
    run("--max_iters=4", "--eval_interval=2", "--out_dir=run", "--dag_depth=2")
    assert metrics("run", "train/batch_loss").keys() == {1, 2, 3, 4}
    assert metrics("run", "val/loss").keys() == metrics("run", "val/solved").keys() == {0, 2, 4}
    assert 0 < metrics("run", "dag/gate_mean")[4] < 1
    assert metrics("run", "dag/gradient_norm/planner")[4] > 0
    assert metrics("run", "dag/gradient/final_hidden").keys() == {0, 2, 4}
    assert metrics("run", "dag/own_plan_explains").keys() == {1, 2, 3, 4}  # of training, at every line
    run_card = json.loads(Path("run/run.json").read_text())
    for n, probe in enumerate(run_card["probes"]):
        assert metrics("run", f"probe/{n}/gate").keys() == {0, 2, 4} and "=" in probe
    assert run_card["command"][1:] == sys.argv
    assert json.loads(Path("run/config.json").read_text())["dag_depth"] == 2


def test_problems_are_also_scored_by_their_kind(run, data_dir, monkeypatch):
    """As many of each; a model that can subtract, and only in sentences of one kind, say."""
    solve = train.answers.solve

    def solve_some(model, tokenizer, problems):
        right = [len(problem.prompt) % 3 == 0 for problem in problems]
        return [replace(done, correct=flag) for done, flag in zip(solve(model, tokenizer, problems), right)]

    monkeypatch.setattr(train.answers, "solve", solve_some)
    run("--max_iters=1", "--eval_problems=22", "--out_dir=run")
    splits = train.answers.splits(data_dir / "arithmetic")
    for name, path in splits.items():
        lengths = [len(problem.prompt) for problem in train.answers.read_problems(path)[:2]]
        solved = metrics("run", f"val/solved/{name.removeprefix('val_')}")
        assert solved[1] == sum(length % 3 == 0 for length in lengths) / 2
    assert len(splits) == 11 and 0 < metrics("run", "val/solved")[1] < 1


def test_without_problems_there_are_no_scores(run):
    run("--max_iters=1", "--eval_problems=0", "--out_dir=run")
    assert not metrics("run", "val/solved") and metrics("run", "dag/gate_mean")


@pytest.mark.slow
def test_a_resumed_run_goes_on_in_the_same_wandb_run(run):
    flags = ["--wandb_log=True", "--wandb_mode=offline", "--wandb_artifacts=True", "--out_dir=run"]
    run(*flags, "--max_iters=1")
    run("--init_from=resume", "--out_dir=run", "--max_iters=2")
    names = [path.name.split("-")[-1] for path in Path("run/wandb").glob("offline-run-*")]
    assert len(names) == 2 and len(set(names)) == 1
    assert checkpoint.load("run", "last").progress["wandb_run_id"] == names[0]


@pytest.mark.parametrize("inputs", SYSTEMS)
def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(run, inputs):
    flags = [
        "--dropout=0.2",
        *SYSTEMS[inputs],
        "--eval_interval=3",
        "--lr_decay_iters=6",
        "--gradient_accumulation_steps=2",
    ]
    run(*flags, "--max_iters=6", "--out_dir=whole")
    run(*flags, "--max_iters=3", "--out_dir=halves")
    torch.manual_seed(99)  # whatever happened to the generator in between
    run(
        "--init_from=resume", "--out_dir=halves", "--max_iters=6"
    )  # the rest of the settings come from the run
    whole, halves = checkpoint.load("whole", "last"), checkpoint.load("halves", "last")
    assert whole.step == halves.step == 6
    assert all(torch.equal(whole.model[name], halves.model[name]) for name in whole.model)
    moments = [
        tensor
        for state in (whole, halves)
        for entry in state.optimizer["state"].values()
        for tensor in entry.values()
    ]
    half = len(moments) // 2
    assert half and all(torch.equal(a, b) for a, b in zip(moments[:half], moments[half:]))
    assert metrics("whole", "train/batch_loss") == metrics("halves", "train/batch_loss")


def test_runs_are_numbered_and_the_newest_is_resumed(run):
    run("config/train_seed001.py", "--max_iters=1")
    run("config/train_seed001.py", "--max_iters=2")
    assert sorted(path.name for path in Path("out").iterdir()) == ["train_seed001-001", "train_seed001-002"]
    run("config/train_seed001.py", "--init_from=resume", "--max_iters=3")
    assert checkpoint.load("out/train_seed001-002", "last").step == 3
    assert checkpoint.load("out/train_seed001-001", "last").step == 1


def test_patience_stops_a_run_that_no_longer_improves(run):
    printed = run(
        "--max_iters=50",
        "--eval_interval=1",
        "--patience=2",
        "--learning_rate=0",
        "--min_lr=0",
        "--out_dir=run",
    )
    assert "stopping early at step 2" in printed
    assert max(metrics("run", "val/loss")) == 2


def files_below(folder):
    return {path: path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


def test_eval_only_changes_nothing(run):
    run("--max_iters=2", "--out_dir=run")
    before = files_below(".")
    for flags in (["--init_from=resume", "--out_dir=run"], []):
        printed = run(*flags, "--eval_only=True")
        assert "val loss" in printed and "Try next" not in printed
        assert files_below(".") == before


def test_flags_given_on_resume_are_in_force(run):
    run("--max_iters=2", "--out_dir=run", "--schedule=constant", "--weight_decay=0.5", "--dropout=0.25")
    run(
        "--max_iters=3",
        "--out_dir=run",
        "--init_from=resume",
        "--weight_decay=0.25",
        "--beta2=0.5",
        "--dropout=0",
        "--learning_rate=1e-5",
    )
    resumed = checkpoint.load("run", "last")
    assert {group["weight_decay"] for group in resumed.optimizer["param_groups"]} == {0.25, 0.0}
    assert {tuple(group["betas"]) for group in resumed.optimizer["param_groups"]} == {(0.9, 0.5)}
    assert resumed.model_config["dropout"] == 0
    assert resumed.train_config["schedule"] == "constant"
    assert json.loads(Path("run/config-00000002.json").read_text())["learning_rate"] == 1e-5


@pytest.mark.extras
def test_what_is_saved_names_the_shape_of_pretrained_weights(run, tmp_path, monkeypatch):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.GPT2Config(n_layer=1, n_head=2, n_embd=8, n_positions=64, vocab_size=256)
    monkeypatch.setattr(
        transformers.GPT2LMHeadModel, "from_pretrained", lambda name: transformers.GPT2LMHeadModel(theirs)
    )
    monkeypatch.setattr(train.tokenizers.ByteTokenizer, "kind", "gpt2")
    run("--init_from=gpt2", "--dataset=text", "--max_iters=1", "--out_dir=run", "--dag_depth=2")
    saved = checkpoint.load(tmp_path / "run", "last")
    assert saved.train_config["n_embd"] == saved.model_config["n_embd"] == 8
    assert saved.train_config["bias"] is True


def refused(run, *arguments):
    with pytest.raises((ValueError, OSError)) as caught:
        run(*arguments)
    return str(caught.value)


def test_a_run_is_never_overwritten(run):
    run("--max_iters=1", "--out_dir=run")
    before = weights("run")
    assert "already holds a run" in refused(run, "--max_iters=1", "--out_dir=run")
    for name in ("config.json", "metrics.jsonl"):
        Path("run", name).unlink()  # the checkpoints alone are a run too
    assert "already holds a run" in refused(run, "--max_iters=1", "--out_dir=run")
    assert all(torch.equal(before[name], tensor) for name, tensor in weights("run").items())


def test_errors_say_what_to_do(run, data_dir):
    assert "no checkpoint in nowhere" in refused(run, "--init_from=resume", "--out_dir=nowhere")
    assert "nothing to resume" in refused(run, "--init_from=resume")
    assert "--out_dir=run" in refused(run, "--init_from=resume", "--out_dir=run/last-00000001")
    assert "data/custom/prepare.py" in refused(run, "--dataset=missing")
    run("--max_iters=1", "--out_dir=run")
    assert "block_size=128" in refused(run, "--init_from=resume", "--out_dir=run", "--block_size=128")
    assert "vocabulary" in refused(run, "--init_from=resume", "--out_dir=run", "--dataset=text")
    assert "GPT-2's tokens" in refused(run, "--init_from=gpt2", "--out_dir=other")
    assert not Path("other").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="a machine without CUDA")
def test_a_missing_gpu_is_one_line_and_exit_code_2(run_script, tmp_path):
    done = run_script("train.py", "--device=cuda", cwd=tmp_path)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1 and "--device=cpu" in done.stderr
    assert not list(tmp_path.iterdir())


def test_a_diverging_run_stops_with_an_error_and_keeps_the_good_checkpoint(run):
    with pytest.raises(SystemExit) as caught:
        run(
            "--max_iters=40",
            "--eval_interval=100",
            "--learning_rate=1e30",
            "--warmup_iters=0",
            "--grad_clip=0",
            "--out_dir=run",
        )
    assert "the loss is nan" in caught.value.code  # a text as code: printed, exit code 1
    kept = checkpoint.load("run", "last")
    assert kept.step == 0 and all(tensor.isfinite().all() for tensor in kept.model.values())


def test_a_run_ends_with_a_report_that_resuming_it_for_nothing_keeps(run):
    run("--max_iters=2", "--eval_problems=12", "--out_dir=run")
    folder = Path("run")
    report = (folder / "report.md").read_text()
    assert "## Problems" in report and "![curves](curves.png)" in report
    assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert "already at step 2" in run("--init_from=resume", "--out_dir=run")
    assert (folder / "report.md").read_text() == report


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_ends_cleanly(data_dir, tmp_path, number):
    command = [
        sys.executable,
        str(ROOT / "train.py"),
        *TINY,
        f"--data_dir={data_dir}",
        "--max_iters=1000000",
        "--out_dir=run",
        "--eval_interval=1000000",
    ]
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, text=True)
    try:
        for line in process.stdout:
            if line.startswith("step 3/"):
                process.send_signal(number)
                break
        rest = process.communicate(timeout=60)[0]
    finally:
        process.kill()
    assert process.returncode == 0
    saved = checkpoint.load(tmp_path / "run", "last")
    assert f"saving at step {saved.step}" in rest and saved.step >= 3
    assert saved.progress["minutes"] == list(metrics(tmp_path / "run", "train/minutes").values())[-1] > 0
    assert "sample.py --out_dir=run --checkpoint=last" in rest
    assert rest.rstrip().endswith("--init_from=resume --out_dir=run")  # not a shorter run


def torchrun(tmp_path, *arguments):
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node=2",
        str(ROOT / "train.py"),
        *TINY,
        *arguments,
    ]
    return subprocess.run(
        command,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=200,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def test_two_processes_equal_one_on_the_same_global_batch(run, data_dir, tmp_path):
    flags = ["--max_iters=3", "--gradient_accumulation_steps=4", *SOFT, f"--data_dir={data_dir}"]
    done = torchrun(tmp_path, *flags, "--out_dir=two")
    assert done.returncode == 0, done.stderr
    run(*flags, "--out_dir=one")
    for name, tolerance in {"train/batch_loss": 1e-4, "gradient_norm": 1e-3}.items():
        assert metrics("one", name) == pytest.approx(metrics("two", name), rel=tolerance)
    assert len(open(tmp_path / "two" / "metrics.jsonl").readlines()) == 5  # the first process writes, alone
    model, tokenizer, _ = checkpoint.load_model("two/last-00000000")
    means = []
    for rank in (0, 1):
        where = dict(batch_size=4, block_size=64, seed=1338, rank=rank, world_size=2)
        batch = dataloader.Loader(data_dir / "arithmetic", "val", **where).next_batch()
        means.append(float(observe(model, Watch.of(model, tokenizer, *batch))["gate_mean"]))
    assert metrics("two", "dag/gate_mean")[0] == pytest.approx(sum(means) / 2) != pytest.approx(means[0])
    start, one, two = (
        torch.cat([tensor.flatten() for tensor in state.values()])
        for state in (checkpoint.load("one/last-00000000").model, weights("one"), weights("two"))
    )
    # AdamW's first steps have the size of the learning rate whatever the gradient's, so where a gradient is
    # zero but for rounding single weights may differ; all together they must not
    assert (one - two).abs().mean() < 0.01 * (one - start).abs().mean()


@pytest.mark.slow
def test_an_error_in_two_processes_ends_both(data_dir, tmp_path):
    done = torchrun(tmp_path, "--gradient_accumulation_steps=3", f"--data_dir={data_dir}", "--out_dir=two")
    assert done.returncode != 0
    assert "make it a multiple of 2" in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("inputs", ["numbers", "sequence"])
def test_compiled_and_eager_training_agree(run, inputs):
    for setting in ("true", "false"):
        run("--max_iters=3", f"--compile={setting}", f"--out_dir={setting}", *SYSTEMS[inputs])
    compiled, eager = metrics("true", "train/batch_loss"), metrics("false", "train/batch_loss")
    assert compiled == pytest.approx(eager, rel=1e-3)


@pytest.mark.slow
def test_no_compiler_is_said_once_and_training_goes_on(data_dir, run_script, tmp_path):
    without = {
        "CXX": "/nonexistent/c++",
        "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache"),
        "PATH": "/nonexistent",
    }
    done = run_script(
        "train.py",
        *TINY,
        f"--data_dir={data_dir}",
        "--compile=true",
        "--max_iters=2",
        "--out_dir=run",
        cwd=tmp_path,
        env=without,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("torch.compile does not work here") == 1
    assert checkpoint.load(tmp_path / "run", "last").step == 2
