"""slurm.py and launch/slurm_job.sh: what is submitted, and what becomes of it on a real SLURM (slurm_cluster.py)."""

import contextlib
import json
import os
import shutil
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path
from secrets import token_hex

import pytest
from conftest import IMPOSSIBLE, ROOT
from safetensors.torch import load_file
from slurm_cluster import PROGRAMS, SlurmCluster

import slurm

KEY = token_hex(20)  # a W&B key, in no file
TRAINING = [
    "config/train_default.py",
    *("--n_layer=1", "--n_head=2", "--n_embd=16", "--block_size=64", "--batch_size=4", "--eval_iters=2"),
    *(
        "--warmup_iters=2",
        "--log_interval=5",
        "--eval_problems=6",
        "--dtype=float32",
        "--eval_interval=100000",
    ),
]

pytestmark = pytest.mark.skipif(not (ROOT / ".git").exists(), reason="only a git checkout can be submitted")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    script = ROOT / "data" / "arithmetic" / "prepare.py"
    arguments = ["--lines=3000", "--problems_per_split=20", f"--out_dir={folder}/arithmetic"]
    subprocess.run([sys.executable, script, *arguments], check=True, capture_output=True)
    return folder


@pytest.fixture
def place(data, tmp_path, monkeypatch):
    """A folder to submit from, with a little data."""
    monkeypatch.chdir(tmp_path)
    for name in [name for name in os.environ if slurm.SECRET.search(name) or name.startswith("SLURM")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    (tmp_path / "config").symlink_to(ROOT / "config")
    shutil.copytree(data, tmp_path / "data")
    return tmp_path


@pytest.fixture
def slurm_py(place, monkeypatch, capsys):
    """slurm_py("submit", ...) calls it as from a shell and returns what it printed."""

    def call(*arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", ["slurm.py", *arguments])
        slurm.main()
        return capsys.readouterr().out

    return call


@pytest.fixture
def fake_sbatch(place, monkeypatch):
    """Puts an sbatch of this shell code on the path."""

    def install(code: str) -> None:
        program = place / "bin" / "sbatch"
        program.parent.mkdir(exist_ok=True)
        program.write_text(f"#!/bin/sh\n{code}\n")
        program.chmod(0o755)
        monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")

    return install


# ------------------------------------------------------------------------------------------------------------
# what is submitted


CPU = ("--gpus=0", "--cpus=1")


@pytest.mark.parametrize(
    "arguments, complaint",
    [
        (["--n_layer=none"], "expected int"),
        (["--max_iter=4"], "did you mean 'max_iters'"),
        (["--nodes=2"], "make it a multiple of 2"),
        (["--nodes=2", "--gpus=4", "--gradient_accumulation_steps=4"], "make it a multiple of 8"),
        (["--device=cpu"], "--gpus=0 trains on the CPUs"),
        *([flags, complaint] for flags, complaint in IMPOSSIBLE),
        (["--data_dir=elsewhere"], "prepare.py --out_dir="),
        (["--dataset=mine"], "--input=FILE --name=mine"),
        (["--init_from=resume"], "--out_dir=RUN"),
        (["--init_from=resume", "--out_dir=nowhere"], "no checkpoint in nowhere"),
        (["--out_dir=full"], "already holds a run"),
        (["--out_dir=out/a\nb"], "line breaks"),
    ],
)
def test_what_cannot_run_is_refused_before_anything_is_written(slurm_py, place, arguments, complaint, capsys):
    (place / "full" / "best-00000010").mkdir(parents=True)
    with pytest.raises((ValueError, SystemExit)) as refusal:
        slurm_py("submit", "config/train_default.py", *arguments)
    assert complaint in str(refusal.value) + capsys.readouterr().err
    assert not (place / "out").exists() and len(list(place.glob("full/*"))) == 1


@pytest.mark.parametrize("text", ["10", "0:10:00", "0-1", "0-0:10", "1-00:00:00", "10:30", "4:00:00"])
def test_times_as_slurm_writes_them(text):
    assert slurm.time_limit(text) == text


@pytest.mark.parametrize(
    "text", ["9", "9:59", "0:09:59", "0-0", "0-0:9", "", "UNLIMITED", "4h", "1:2:3:4", "-5"]
)
def test_times_that_are_none_or_too_short(text):
    with pytest.raises(slurm.argparse.ArgumentTypeError):
        slurm.time_limit(text)


def test_a_dry_run_shows_a_sound_script_and_leaves_no_trace(slurm_py, place):
    wanted = dict(partition="gpu", account="lab", qos="high", mem="64G")
    flags = [f"--{name}={value}" for name, value in wanted.items()]
    text = slurm_py(
        "submit",
        "config/train_gpt2.py",
        "--nodes=2",
        "--gpus=4",
        "--time=1-0",
        "--mail=a@b.c",
        *flags,
        "--dry-run",
    )
    wanted |= {"nodes": 2, "gres": "gpu:4", "cpus-per-task": 16, "time": "1-0", "signal": "TERM@180"}
    wanted |= {
        "ntasks-per-node": 1,
        "open-mode": "append",
        "mail-user": "a@b.c",
        "job-name": "train_gpt2-001",
    }
    head = text.split("set -euo pipefail")[0].splitlines()
    assert {f"#SBATCH --{name}={value}" for name, value in wanted.items()} <= set(head)
    assert "#SBATCH --requeue" in head and "processes=4" in head
    assert "--device=cuda" in text and f"no data in {place}/data/openwebtext" in text
    assert subprocess.run(["bash", "-n"], input=text, text=True).returncode == 0
    assert not (place / "out").exists()


def git(*arguments: str, cwd: Path) -> str:
    who = ["-c", "user.name=a", "-c", "user.email=a@b.c"]
    return subprocess.run(
        ["git", *who, *arguments], cwd=cwd, check=True, capture_output=True, text=True
    ).stdout


def test_a_snapshot_holds_the_tracked_files_as_they_are_and_tells_their_changes(tmp_path, monkeypatch):
    root, code = tmp_path / "a root", tmp_path / "code"
    (root / "sub").mkdir(parents=True)
    git("init", "-q", cwd=root)
    for name in ("same", "changed", "gone", "sub/deep"):
        (root / name).write_text(name)
    git("add", ".", cwd=root)
    git("commit", "-qm", "first", cwd=root)
    (root / "changed").write_text("now")
    (root / "gone").unlink()
    (root / "added").write_text("added")
    git("add", "added", cwd=root)
    (root / "private").write_text("never asked for")
    before = git("status", "--porcelain", cwd=root)
    monkeypatch.setattr(slurm, "ROOT", root)
    slurm.snapshot(code)
    files = [path for path in code.rglob("*") if path.is_file() and ".git" not in path.parts]
    assert {str(path.relative_to(code)): path.read_text() for path in files} == {
        "same": "same",
        "changed": "now",
        "sub/deep": "sub/deep",
        "added": "added",
    }
    assert git("rev-parse", "HEAD", cwd=code) == git("rev-parse", "HEAD", cwd=root)
    assert git("diff", "HEAD", cwd=code) == git("diff", "HEAD", cwd=root)
    assert git("status", "--porcelain", cwd=root) == before


def test_runs_are_named_as_train_py_names_them(slurm_py, place, fake_sbatch):
    fake_sbatch("echo '17;cluster'")
    for name in ("train_default-001", "train_default-0007", "train_default-x", "other-123"):
        (place / "out" / name).mkdir(parents=True)
    assert "job 17, run folder out/train_default-008" in slurm_py("submit", *TRAINING, *CPU)
    assert slurm.Job.of(Path("out/train_default-008")) == slurm.Job("17", 2000)


@pytest.mark.parametrize("folder", ["", "mine"])
def test_what_sbatch_refuses_leaves_no_trace_of_ours(slurm_py, place, fake_sbatch, folder):
    fake_sbatch("echo 'sbatch: error: invalid account' >&2; exit 1")
    (place / "mine").mkdir()
    (place / "mine" / "notes").write_text("keep")
    with pytest.raises(ValueError, match="invalid account"):
        slurm_py("submit", *TRAINING, *CPU, f"--out_dir={folder}")
    assert list(place.glob("out/*")) == [] and [path.name for path in place.glob("mine/*")] == ["notes"]


def test_secrets_do_not_pass_through_sbatch(slurm_py, place, fake_sbatch, monkeypatch):
    fake_sbatch(f"env > {place}/seen; echo 3")
    for name in ("WANDB_API_KEY", "LAMBDA_API_KEY", "hf_token", "DB_PASSWORD"):
        monkeypatch.setenv(name, KEY)
    slurm_py("submit", *TRAINING, *CPU, "--wandb_log=true", "--out_dir=run")
    seen = (place / "seen").read_text()
    assert "OMP_NUM_THREADS=1" in seen and KEY not in seen
    assert [str(path) for path in holding(KEY, place / "run")] == [str(place / "run/slurm/wandb_key")]
    assert stat.S_IMODE((place / "run/slurm/wandb_key").stat().st_mode) == 0o600
    slurm_py("submit", *TRAINING, *CPU, "--out_dir=silent")
    assert not holding(KEY, place / "silent")


def test_a_shared_place_for_gpt2s_vocabulary_is_asked_for(slurm_py, place, fake_sbatch, monkeypatch):
    fake_sbatch("echo 3")
    monkeypatch.delenv("TIKTOKEN_CACHE_DIR", raising=False)
    assert "TIKTOKEN_CACHE_DIR" not in slurm_py("submit", *TRAINING, *CPU)
    meta = place / "data" / "arithmetic" / "meta.json"
    meta.write_text(json.dumps(json.loads(meta.read_text()) | {"tokenizer": {"kind": "gpt2"}}))
    assert "TIKTOKEN_CACHE_DIR" in slurm_py("submit", *TRAINING, *CPU)
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(place))
    assert "TIKTOKEN_CACHE_DIR" not in slurm_py("submit", *TRAINING, *CPU)


def test_missing_data_is_prepared_where_that_is_asked_for(slurm_py, place, fake_sbatch):
    fake_sbatch("echo 3")
    slurm_py("submit", "config/train_add3_1k.py", *CPU, "--prepare")
    assert (place / "data" / "addition_1k" / "meta.json").exists()


def holding(text: str, *folders: Path) -> list[Path]:
    files = [path for folder in folders for path in folder.rglob("*") if path.is_file()]
    return [path for path in files if text.encode() in path.read_bytes()]


# ------------------------------------------------------------------------------------------------------------
# what becomes of it


@pytest.fixture(scope="module")
def running_cluster():
    if missing := [name for name in PROGRAMS if not shutil.which(name)]:
        pytest.skip(
            f"{', '.join(missing)} not on the PATH: apt install slurm-wlm munge, and have /usr/sbin on it"
        )
    with contextlib.ExitStack() as stack:
        try:
            cluster = stack.enter_context(SlurmCluster())
        except OSError as reason:
            pytest.skip(str(reason))
        yield cluster


@pytest.fixture
def cluster(running_cluster, place, monkeypatch):
    for name, value in running_cluster.environment().items():
        monkeypatch.setenv(name, value)
    return running_cluster


class Submitted:
    """A job, and what can be seen of it from outside."""

    def __init__(self, run: str):
        self.run = Path(run)
        self.id = slurm.Job.of(self.run).id

    @property
    def state(self) -> str:
        return slurm.look(self.run, slurm.queue())["state"]

    @property
    def log(self) -> str:
        path = self.run / "slurm" / "logs" / f"{self.id}.log"
        return path.read_text() if path.exists() else ""

    def wait(self, happens, seconds: float = 300) -> None:
        until = time.monotonic() + seconds
        while not happens():
            assert time.monotonic() < until, f"{self.state}\n{self.log}"
            time.sleep(0.2)

    def wait_for_line(self, text: str) -> None:
        self.wait(lambda: text in self.log or self.state in slurm.OVER)
        assert text in self.log

    def wait_for_end(self) -> str:
        self.wait(lambda: self.state in slurm.OVER)
        return self.state

    def tell(self, name: str) -> None:
        subprocess.run(["scancel", f"--signal={name}", self.id], check=True)

    def starts(self) -> int:
        return self.log.count(f"job {self.id} on ")


@pytest.fixture
def submit(cluster, slurm_py):
    def submit(*arguments: str) -> Submitted:
        slurm_py("submit", *TRAINING, *CPU, "--out_dir=run", *arguments)
        return Submitted("run")

    return submit


def processes(command: str) -> dict[int, bytes]:
    """Environments of the running programs whose command line has this, by their ids."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if command in (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode():
                found[int(folder.name)] = (folder / "environ").read_bytes()
        except OSError:  # it has just ended
            continue
    return found


def weights(run: str, step: int):
    return load_file(f"{run}/last-{step:08d}/model.safetensors")


def same(left: dict, right: dict) -> bool:
    return left.keys() == right.keys() and all(left[name].equal(right[name]) for name in left)


@pytest.mark.slow
def test_a_job_that_is_told_to_stop_resumes_to_the_weights_of_an_uninterrupted_run(
    submit, cluster, run_script, slurm_py, monkeypatch
):
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    flags = ["--max_iters=200", "--dropout=0.1", "--wandb_log=true", "--wandb_mode=disabled"]
    job = submit(*flags)
    job.wait_for_line("\nstep 20/200")
    knows = {name for name in ("train.py", "srun ", "slurmstepd") if KEY in str(processes(name))}
    assert knows == {"train.py"}
    job.tell("TERM")
    job.wait_for_line("back into the queue")
    step = slurm.newest_step(job.run)
    assert 20 <= step < 200 and f"asked to stop: saving at step {step}\n" in job.log
    assert 0 < job.log.find("\ncheckpoints in ") < job.log.find("back into the queue")  # it ended by itself
    job.wait(lambda: job.state == "PENDING")
    assert json.loads(slurm_py("status", "run", "--json"))[0] | {"where": ""} == dict(
        run="run",
        job=job.id,
        state="PENDING",
        time="0:00",
        limit="4:00:00",
        where="",
        step=step,
        max_iters=200,
    )
    assert holding(KEY, job.run, cluster.folder) == [job.run / "slurm" / "wandb_key"]
    assert job.wait_for_end() == "COMPLETED"
    assert job.starts() == 2 and job.log.count("\nstep 0:") == 1
    assert not holding(KEY, job.run, cluster.folder)
    assert slurm_py("logs", "run", "--follow") == job.log
    run_script("train.py", *TRAINING, "--out_dir=alone", "--device=cpu", *flags, cwd=".")
    assert same(weights("alone", 200), weights("run", 200))


@pytest.mark.slow
def test_two_nodes_are_told_to_stop_and_resume_together(submit):
    # without a DAG, as several processes do not resume its random choices
    flags = ["--max_iters=60", "--gradient_accumulation_steps=2", "--dag_depth=0"]
    job = submit(*flags, "--nodes=2")
    job.wait_for_line("\nstep 10/60")
    job.tell("TERM")
    assert job.wait_for_end() == "COMPLETED"
    assert job.starts() == 2 and job.log.count(" on 2 x ") == 2
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    arguments = [*TRAINING, *flags, "--out_dir=alone", "--device=cpu"]
    subprocess.run([*torchrun, ROOT / "train.py", *arguments], check=True, capture_output=True, timeout=200)
    assert same(weights("alone", 60), weights("run", 60))


@pytest.mark.slow
def test_a_signal_before_the_first_step_is_not_lost(submit):
    job = submit("--max_iters=500")
    job.wait(lambda: processes(f" -u {job.run.absolute()}/slurm/code/train.py"))  # a worker of torchrun
    job.tell("TERM")
    assert job.wait_for_end() == "COMPLETED"
    assert job.starts() == 2 and "asked to stop: saving at step " in job.log
    assert (job.run / "last-00000500").is_dir()


@pytest.mark.slow
def test_an_error_on_one_of_two_nodes_ends_the_job(submit):
    job = submit("--max_iters=100000", "--gradient_accumulation_steps=2", "--nodes=2")
    job.wait_for_line("\nstep 10/")
    workers = {pid: seen for pid, seen in processes("code/train.py").items() if b"\0LOCAL_RANK=0\0" in seen}
    assert len(workers) == 2
    os.kill(next(pid for pid, seen in workers.items() if b"SLURMD_NODENAME=n2\0" in seen), signal.SIGKILL)
    assert job.wait_for_end() == "FAILED"
    assert job.starts() == 1 and "the training failed" in job.log


@pytest.mark.slow
def test_what_train_py_refuses_fails_the_job(submit, slurm_py):
    job = submit("--init_from=gpt2")  # arithmetic is not in GPT-2's tokens
    assert job.wait_for_end() == "FAILED"
    assert "needs a dataset in GPT-2's tokens" in job.log and job.starts() == 1
    assert "FAILED" in slurm_py("status", "run")
    assert slurm_py("status") == "nothing was submitted into out/\n"  # but into run/


@pytest.mark.slow
def test_a_cancelled_job_saves_stays_away_and_can_be_resumed(submit, slurm_py):
    job = submit("--max_iters=100000")
    job.wait_for_line("\nstep 10/")
    with pytest.raises(ValueError, match="is not over"):
        slurm_py("submit", "--init_from=resume", "--out_dir=run", *CPU)
    slurm_py("cancel", "run")
    assert job.wait_for_end() == "CANCELLED"
    job.wait(lambda: not processes("code/train.py"), seconds=30)
    step = slurm.newest_step(job.run)
    assert step >= 10
    slurm_py("submit", "--init_from=resume", "--out_dir=run", f"--max_iters={step + 10}", *CPU)
    resumed = Submitted("run")
    assert slurm.queue()[job.id][0] == "CANCELLED"
    assert resumed.wait_for_end() == "COMPLETED" and slurm.newest_step(job.run) == step + 10
    assert job.log != resumed.log


STUB = """\
import os, signal, sys, time
acts = signal.getsignal(signal.SIGTERM) != signal.SIG_IGN or "SIGTERM" in os.environ["PET_SIGNALS_TO_HANDLE"]
signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
print("started", sys.argv[2:], "acts on TERM" * acts, "sees GPUs", os.environ["CUDA_VISIBLE_DEVICES"], flush=True)
time.sleep(100)
"""


@pytest.mark.slow
def test_a_second_job_never_trains_the_same_run(submit, slurm_py):
    first = submit("--max_iters=100000")
    first.wait_for_line("\nstep 10/")
    again = "sbatch", "--parsable", "run/slurm/job.sh"
    second = first.run / "slurm" / "logs" / f"{slurm.call(*again).strip()}.log"
    first.wait(lambda: second.exists() and f"job {first.id} is at work on this run" in second.read_text())
    assert slurm.Job.of(first.run).id == first.id
    slurm_py("cancel", "run")
    first.wait_for_end()
    third = slurm.call(*again).strip()
    first.wait(lambda: slurm.Job.of(first.run).id == third)  # status, logs and cancel know it
    assert f"job {third} is told" in slurm_py("cancel", "run")
    Submitted("run").wait_for_end()


@pytest.mark.slow
def test_jobs_that_cannot_get_anywhere_say_so_and_end(cluster, slurm_py, place):
    """In place of PyTorch stands a program that stops when told, having saved nothing."""
    slurm_py(
        "submit",
        "config/train_default.py",
        "--gpus=2",
        "--cpus=1",
        "--nodes=2",
        "--out_dir=a b's %j",
        "--gradient_accumulation_steps=4",
    )
    job = Submitted("a b's %j")
    script = job.run / "slurm" / "job.sh"
    slurm_py("cancel", str(job.run))
    stub = place / "stub"
    stub.write_text(f"#!{sys.executable}\n{STUB}")
    stub.chmod(0o755)
    script.write_text(script.read_text().replace(f"python={sys.executable}", f"python={stub}"))

    def again() -> Submitted:
        number = subprocess.run(
            ["sbatch", "--parsable", script], check=True, capture_output=True, text=True
        ).stdout
        (job.run / "slurm" / "job.json").write_text(json.dumps(dict(id=number.strip(), max_iters=1)))
        return Submitted(str(job.run))

    stuck = again()
    stuck.wait(lambda: stuck.log.count("started ['torch.distributed.run'") == 2)
    assert "acts on TERM" not in stuck.log  # a torchrun that does kills its workers while they save
    assert "--nproc_per_node=2" in stuck.log and stuck.log.count("sees GPUs 0,1\n") == 2
    stuck.tell("TERM")
    assert stuck.wait_for_end() == "FAILED"
    assert "told to stop before anything was saved" in stuck.log
    (place / "data" / "arithmetic" / "meta.json").unlink()
    blind = again()
    assert blind.wait_for_end() == "FAILED"
    assert (
        "no data in" in blind.log and "data/arithmetic/prepare.py" in blind.log and "started" not in blind.log
    )
