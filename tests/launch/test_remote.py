"""launch/remote.py and launch/remote_run.sh against a real ssh server and real rsync; the training is a few lines."""

import hashlib
import json
import os
import random
import re
import shutil
import subprocess
import sys
import sysconfig
import threading
import time
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import ssh_server as servers
from conftest import ROOT
from ssh_server import Sshd, descendants, kill, wait_until

from launch import remote as machines
from launch.lambda_api import Clock
from launch.remote import Cancelled, ConnectionLost, HostKeyChanged, LocalDiskFull, Machine, MachineError

pytestmark = pytest.mark.skipif(bool(servers.missing()), reason=str(servers.missing()))
SLOW = pytest.mark.slow
FAST = Clock(0.01)


# ------------------------------------------------------------------------------------------------------------
# a machine, and what its training is


class Home:
    """The machine's side: its home folder, and programs that are not what they were."""

    def __init__(self, folder: Path, server: Sshd):
        self.folder, self.server = folder, server

    def program(self, name: str, *lines: str) -> None:
        """`name` on the machine is this shell script, until the end of the test."""
        path = self.folder / "bin" / name
        path.write_text("\n".join(["#!/bin/bash", *lines, ""]))
        path.chmod(0o755)

    def module(self, name: str, source: str) -> None:
        path = self.folder / "lib" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    home = tmp_path_factory.mktemp("home")
    path = f"{home}/bin:{Path(sys.executable).parent}:{os.environ['PATH']}"
    libraries = f"{home}/lib:{sysconfig.get_paths()['purelib']}"
    with Sshd(home, {"PATH": path, "PYTHONPATH": libraries, "OMP_NUM_THREADS": "1"}) as running:
        yield running


@pytest.fixture
def home(server):
    for name in ("bin", "lib"):
        shutil.rmtree(server.home / name, ignore_errors=True)
        (server.home / name).mkdir()
    yield Home(server.home, server)
    for name in ("bin", "lib"):
        shutil.rmtree(server.home / name)


@pytest.fixture
def machine(server, tmp_path, request):
    """Not used yet. Its known_hosts lies where quoting is needed."""
    state = tmp_path / "it's 100% a state"
    state.mkdir()
    name = "".join(letter if letter.isalnum() else "-" for letter in request.node.name)
    return Machine(
        host="127.0.0.1",
        port=server.port,
        user=server.user,
        identity=server.client_key,
        known_hosts=state / "known_hosts",
        folder=f"runs/{name}",
        clock=FAST,
        say=lambda line: None,
    )


def there(machine: Machine, server: Sshd) -> Path:
    return server.home / machine.folder


def bring(machine: Machine, server: Sshd, training: str) -> Path:
    """Code with this train.py, and an environment, as upload and setup leave them; the machine's folder."""
    folder = there(machine, server)
    (folder / "code/launch").mkdir(parents=True)
    shutil.copy(ROOT / machines.ON_MACHINE, folder / "code/launch")
    shutil.copy(ROOT / "requirements-dev.txt", folder / "code")
    (folder / "code/train.py").write_text(TRAINING + training)
    (folder / "venv/bin").mkdir(parents=True)
    (folder / "venv/bin/python").write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    (folder / "venv/bin/python").chmod(0o755)
    return folder


TRAINING = """
import os, random, signal, sys, time, shutil
from pathlib import Path
out = Path(sys.argv[-1].removeprefix("--out_dir="))
"""
OBEDIENT = """
def save(*_):
    with open(out / "saved", "a") as file:
        file.write("x")
signal.signal(signal.SIGTERM, save)
print("ready")
while not (out / "saved").exists():
    time.sleep(0.01)
time.sleep(0.5)
"""
ENDLESS = "print('ready')\ntime.sleep(600)\n"


def follow(machine: Machine, seconds: float = 20) -> tuple[bytes, machines.Poll]:
    """The whole log and the last poll."""
    log, deadline = b"", time.monotonic() + seconds
    while True:
        poll = machine.poll(len(log))
        log += poll.log
        if poll.is_over and len(log) >= poll.size:
            return log, poll
        assert time.monotonic() < deadline, log[-500:]


def wait_for_log(folder: Path, text: str = "ready") -> None:
    wait_until(lambda: (folder / "log").exists() and text in (folder / "log").read_text())


def trainers(server: Sshd, folder: Path) -> list[int]:
    """Pids of what runs of this folder's training."""
    return [pid for pid in server.processes() if f"--out_dir={folder}/out" in arguments_of(pid)]


def of_process(pid: int | str, what: str) -> bytes:
    try:
        return Path(f"/proc/{pid}/{what}").read_bytes()
    except OSError:  # it is gone
        return b""


def arguments_of(pid: int) -> list[str]:
    return of_process(pid, "cmdline").decode(errors="replace").split("\0")


@contextmanager
def small_disk(folder: Path, kib: int):
    folder.mkdir(parents=True, exist_ok=True)
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={kib}k", "none", str(folder)], capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"no small disk without a right to mount: {mounted.stderr.strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


# ------------------------------------------------------------------------------------------------------------
# the training


ENDINGS = {
    "print('fine')": 0,
    "sys.exit(3)": 3,
    "sys.exit('error: no')": 1,
    "os.kill(os.getpid(), signal.SIGKILL)": 137,
    "os.kill(os.getpid(), signal.SIGTERM)": 143,
    "os.killpg(0, signal.SIGTERM)": 143,  # all of us, not the training alone
}


def test_the_exit_code_is_that_of_the_training(machine, server):
    each = [replace(machine, folder=f"{machine.folder}-{i}") for i in range(len(ENDINGS))]
    for one, training in zip(each, ENDINGS):
        bring(one, server, training)
        one.start([], gpus=1)
    for one, code in zip(each, ENDINGS.values()):
        log, poll = follow(one)
        assert (poll.exit_code, poll.alive) == (code, False), log


def test_arguments_arrive_as_they_are(machine, server):
    folder = bring(machine, server, "print(repr(sys.argv[1:]), Path.cwd())")
    given = ["config/x.py", "--a=$HOME `id` 'b' \"c\"", "--n=", "--e=é\n", "--out_dir=elsewhere"]
    machine.start(given, gpus=1)
    log, _ = follow(machine)
    assert log.decode().strip() == f"{[*given, f'--out_dir={folder}/out']!r} {folder}/code"


def test_the_log_arrives_whole_in_pieces_of_a_mebibyte(machine, server):
    """A cut may fall into a character, and the end comes with the last piece or before it."""
    text = random.Random(0).randbytes(2_500_000) + b"poll ended 7 3\n"
    folder = bring(machine, server, "sys.stdout.buffer.write(Path('text').read_bytes())")
    (folder / "code/text").write_bytes(text)
    machine.start([], gpus=1)
    pieces = []
    while not (poll := machine.poll(sum(map(len, pieces)))).is_over or poll.log:
        pieces.append(poll.log)
    assert max(map(len, pieces)) == 1 << 20
    assert b"".join(pieces) == text and poll.size == len(text)
    assert machine.poll(len(text) + 5).log == b""


def test_nothing_has_been_started(machine, server):
    bring(machine, server, "")
    assert machine.poll(0) == machines.Poll(b"", 0, None, alive=False)
    machine.stop()


def test_a_second_start_is_none(machine, server):
    folder = bring(machine, server, "with open('starts', 'a') as file: file.write('x')\ntime.sleep(1)")
    threads = [threading.Thread(target=machine.start, args=([], 1)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    machine.start([], gpus=1)
    assert follow(machine)[1].exit_code == 0
    machine.start([], gpus=1)
    (folder / "exit_code").unlink()  # not even where the end was not written down
    machine.start([], gpus=1)
    time.sleep(0.3)
    assert (folder / "code/starts").read_text() == "x"


def test_stop_lets_it_save_and_is_told_once(machine, server):
    folder = bring(machine, server, OBEDIENT)
    machine.start([], gpus=1)
    wait_for_log(folder)
    machine.stop()
    machine.stop()
    log, poll = follow(machine)
    assert poll.exit_code == 0, log
    assert (folder / "out/saved").read_text() == "x"


def test_stop_before_there_is_a_pid_waits_for_it(machine, server):
    folder = bring(machine, server, ENDLESS)
    machine.start([], gpus=1)
    wait_for_log(folder)
    (folder / "pid").rename(folder / "pid.later")
    threading.Timer(0.5, lambda: (folder / "pid.later").rename(folder / "pid")).start()
    machine.stop()
    assert follow(machine)[1].exit_code == 143


def test_who_does_not_stop_is_killed_after_the_grace(machine, server):
    folder = bring(machine, server, "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n" + ENDLESS)
    machine.start([], gpus=1)
    wait_for_log(folder)
    machine.stop(grace=1)
    assert machine.poll(0).alive
    assert follow(machine)[1].exit_code == 137


@SLOW  # torchrun takes its time
def test_all_processes_of_torchrun_are_told(machine, server):
    """Not torchrun: it would count that as a failure, and kill after half a minute what is still saving."""
    told = """
def save(*_):
    time.sleep(0.5)
    (out / f"saved-{os.environ['RANK']}").touch()
    sys.exit()
signal.signal(signal.SIGTERM, save)
(out / f"ready-{os.environ['RANK']}").touch()
time.sleep(600)
"""
    folder = bring(machine, server, told)
    machine.start([], gpus=2)
    wait_until(lambda: len(list((folder / "out").glob("ready-*"))) == 2, 60)
    machine.stop()
    log, poll = follow(machine, 60)
    assert poll.exit_code == 0, log
    assert sorted(path.name for path in (folder / "out").glob("saved-*")) == ["saved-0", "saved-1"]


def test_everything_killed_is_seen_as_the_end(machine, server):
    """As after a reboot: nobody was left to write an exit code, and another process may have the pid."""
    folder = bring(machine, server, ENDLESS)
    machine.start([], gpus=1)
    wait_for_log(folder)
    assert machine.poll(0).alive
    runner = [pid for pid in server.processes() if "run" in arguments_of(pid)]
    kill(runner + trainers(server, folder))
    (folder / "pid").write_text(f"{os.getpid()} 1\n")
    wait_until(lambda: machine.poll(0).is_over)
    assert machine.poll(0).exit_code is None
    machine.stop()  # and tells nobody


@SLOW
def test_a_training_without_its_shell_is_alive(machine, server):
    folder = bring(machine, server, ENDLESS)
    machine.start([], gpus=1)
    wait_for_log(folder)
    kill([pid for pid in server.processes() if "run" in arguments_of(pid)])
    assert machine.poll(0).alive
    kill(trainers(server, folder))
    wait_until(lambda: machine.poll(0).is_over)


def test_the_training_does_not_know_of_connections(machine, server):
    folder = bring(machine, server, "for i in range(100): print(i, flush=True); time.sleep(0.02)")
    machine.start([], gpus=1)
    wait_for_log(folder, "3")
    server.refuse()
    server.drop_sessions()
    with pytest.raises(ConnectionLost, match="refused"):
        machine.poll(0)
    time.sleep(0.5)
    server.listen()
    log, poll = follow(machine)
    assert log.decode().split() == list(map(str, range(100))) and poll.exit_code == 0


@pytest.mark.parametrize("training", ["sys.exit(2)", "(out / 'y').write_bytes(bytes(9999))"])
def test_on_a_full_disk_the_exit_code_still_arrives(machine, server, tmp_path, training):
    with small_disk(there(machine, server), 3000):
        fill = (
            "sys.stdout.flush()\n(out / 'model').write_bytes(b'm' * 1000)\nfile = open(out / 'x', 'wb', 0)\n"
        )
        fill += "try:\n    while True: file.write(bytes(4096))\nexcept OSError: pass\n"
        bring(machine, server, fill + training)
        machine.start([], gpus=1)
        log, poll = follow(machine)
        assert poll.exit_code == (2 if "exit" in training else 1)
        assert log.endswith(b"error: the machine's disk is full\n")
        machine.pull(tmp_path / "run")
        assert (tmp_path / "run/model").read_bytes() == b"m" * 1000


def test_secrets_reach_the_training_and_nothing_else(machine, server, monkeypatch):
    secret, own = "hush-4711", "never-leaves-0815"
    monkeypatch.setenv("WANDB_API_KEY", secret)
    monkeypatch.setenv("LAMBDA_API_KEY", own)
    seen, over = {"argv": set(), "environment": set()}, threading.Event()

    def watch() -> None:
        while not over.wait(0.01):
            for pid in filter(str.isdecimal, os.listdir("/proc")):
                seen["argv"].add(secret.encode() in of_process(pid, "cmdline"))
            for pid in set(descendants(os.getpid())) - {server.guard.pid, *server.processes()}:
                if servers.command_of(pid) in ("ssh", "rsync"):
                    held = of_process(pid, "environ")
                    seen["environment"].add(secret.encode() in held or own.encode() in held)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        folder = bring(
            machine,
            server,
            "time.sleep(0.2); print(len(os.environ['WANDB_API_KEY']), os.environ.get('LAMBDA_API_KEY'))",
        )
        machine.secret("WANDB_API_KEY", secret)
        path = folder / "secrets/WANDB_API_KEY"
        assert path.read_text() == secret
        assert (path.stat().st_mode & 0o777, path.parent.stat().st_mode & 0o777) == (0o600, 0o700)
        machine.start([], gpus=1)
        log, _ = follow(machine)
    finally:
        over.set()
        watcher.join()
    assert log == b"9 None\n"
    assert seen == {"argv": {False}, "environment": {False}}
    files = [path for path in server.home.rglob("*") if path.is_file()]
    assert not [path for path in files if secret.encode() in path.read_bytes()]
    with pytest.raises(MachineError, match="line break"):
        machine.secret("WANDB_API_KEY", "a\nb")


# ------------------------------------------------------------------------------------------------------------
# the connection


def test_it_waits_until_ssh_answers_and_lets_us_in(machine, server):
    said = []
    machine.say = said.append
    server.refuse()
    server.deny_authentication()
    threading.Timer(0.4, server.listen).start()
    threading.Timer(0.9, server.allow_authentication).start()
    machine.wait_reachable(FAST.after(2000))
    assert len(said) == 2 and "refused" in said[0] and "takes no key of ours" in said[1]
    assert machine.known_hosts.read_text().count("\n") == 1


def test_it_does_not_wait_for_ever(machine, server):
    server.deny_authentication()
    try:
        with pytest.raises(MachineError, match="not reachable in time: .* ssh-add"):
            machine.wait_reachable(FAST.after(20))
    finally:
        server.allow_authentication()


def test_another_host_key_ends_it_at_once(machine, server, tmp_path):
    machine.wait_reachable(FAST.after(2000))
    server.replace_host_key()
    since = time.monotonic()
    with pytest.raises(HostKeyChanged) as caught:
        machine.wait_reachable(FAST.after(20_000))
    assert time.monotonic() - since < 3 and "\n" not in str(caught.value)
    for attempt in (lambda: machine.pull(tmp_path / "run"), lambda: machine.upload(ROOT, ["train.py"])):
        with pytest.raises(HostKeyChanged):
            attempt()


def test_what_is_cancelled_ends_here(machine, server):
    machine.ssh("true")
    since = time.monotonic()
    machine.cancelled = lambda: time.monotonic() - since > 0.5
    with pytest.raises(Cancelled):
        machine.ssh("sleep 60")
    assert time.monotonic() - since < 3
    assert not [pid for pid in descendants(os.getpid()) if servers.command_of(pid) == "ssh"]
    with pytest.raises(Cancelled):
        machine.wait_reachable(FAST.after(2000))


@SLOW
def test_no_answer_is_a_lost_connection(machine, server):
    with pytest.raises(ConnectionLost, match="no answer from 127.0.0.1 within 1 s"):
        machine.ssh("sleep 60", timeout=1)


@SLOW
def test_a_broken_connection_says_so(machine, server):
    threading.Timer(0.7, server.drop_sessions).start()
    with pytest.raises(ConnectionLost, match="no connection to 127.0.0.1"):
        machine.ssh("sleep 60")


def test_exit_codes_and_both_outputs_come_back(machine, server):
    done = machine.ssh("cat; echo more >&2; exit 5", stdin=b"\0binary\xff" * 100_000)
    assert (done.code, done.out, done.err) == (5, b"\0binary\xff" * 100_000, "more\n")


@SLOW
def test_chatter_of_a_login_does_not_disturb(machine, server):
    bring(machine, server, "print('poll')")
    (server.home / ".bashrc").write_text("echo welcome to poll ended 9 9\n")
    try:
        machine.start([], gpus=1)
        log, poll = follow(machine)
    finally:
        (server.home / ".bashrc").unlink()
    assert (log, poll.exit_code) == (b"poll\n", 0)


def test_a_port_that_is_none(monkeypatch, tmp_path):
    monkeypatch.setenv("LAMBDA_SSH_PORT", "ssh")
    with pytest.raises(ValueError, match="LAMBDA_SSH_PORT='ssh'"):
        Machine(host="192.0.2.1", known_hosts=tmp_path / "k", folder="f")


def test_ssh_not_installed_is_one_line(machine, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(MachineError, match="ssh is not installed here"):
        machine.ssh("true")
    with pytest.raises(MachineError, match="rsync is not installed here"):
        machine.upload(tmp_path, [])


# ------------------------------------------------------------------------------------------------------------
# files


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_what_is_uploaded_is_there_and_the_rest_stays(machine, server, tmp_path):
    names = ["a.py", "b/c d.py", "b/$x 'y'", "é/-n", "new\nline"]
    for name in [*names, "private", "b/private"]:
        (tmp_path / "checkout" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "checkout" / name).write_text(name)
    machine.upload(tmp_path / "checkout", names)
    code = there(machine, server) / "code"
    assert snapshot(code) == {name: name.encode() for name in sorted(names)}
    (code / "made").write_text("there")
    (tmp_path / "checkout/a.py").write_text("changed")
    machine.upload(tmp_path / "checkout", names)
    assert snapshot(code) == {name: name.encode() for name in names} | {"a.py": b"changed", "made": b"there"}
    with pytest.raises(MachineError, match="gone.py"):
        machine.upload(tmp_path / "checkout", ["a.py", "gone.py"])


def test_no_rsync_there(machine, server, home):
    home.program("rsync", 'echo "bash: line 1: rsync: command not found" >&2', "exit 127")
    with pytest.raises(MachineError, match="rsync is not installed on the machine"):
        machine.upload(ROOT, ["train.py"])


@pytest.mark.parametrize("code, error", [(24, None), (23, MachineError), (30, ConnectionLost)])
def test_exit_codes_of_rsync(machine, server, tmp_path, monkeypatch, code, error):
    """Vanished files are usual while a run goes on; others must not go unnoticed."""
    folder = bring(machine, server, "")
    (folder / "out").mkdir()
    (folder / "out/file").write_text("text")
    wrapper = tmp_path / "bin/rsync"
    wrapper.parent.mkdir()
    wrapper.write_text(f'#!/bin/sh\n{shutil.which("rsync")} "$@"\nexit {code}\n')
    wrapper.chmod(0o755)
    monkeypatch.setenv("PATH", f"{wrapper.parent}:{os.environ['PATH']}")
    raised = None
    try:
        machine.pull(tmp_path / "run")
    except MachineError as caught:
        raised = type(caught)
    assert raised is error and snapshot(tmp_path / "run") == {"file": b"text"}


@SLOW
def test_no_room_for_the_code(machine, server, tmp_path):
    """rsync says why, or now and then only that it could not write."""
    (tmp_path / "large").write_bytes(bytes(500_000))
    raised = []
    with small_disk(there(machine, server), 200):
        for _ in range(5):
            with pytest.raises(MachineError) as caught:
                machine.upload(tmp_path, ["large"])
            raised.append(type(caught.value))
            assert re.search("(No space left on device.*|a full disk.): free some space", str(caught.value))
    assert set(raised) == {MachineError}  # nothing about the disk here


def test_pull_mirrors_the_run_and_never_removes_because_of_what_is_missing(machine, server, tmp_path):
    folder, local = bring(machine, server, ""), tmp_path / "a: b" / "run"
    machine.pull(local)
    assert snapshot(local) == {}  # nothing was started
    out = folder / "out"
    for name in (
        "metrics.jsonl",
        "wandb/a b/run.wandb",
        ".tmp-last-00000007/model",
        "last-00000007.old/model",
    ):
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_text("one\n")
    machine.pull(local)
    assert snapshot(local) == {"metrics.jsonl": b"one\n", "wandb/a b/run.wandb": b"one\n"}
    (out / "metrics.jsonl").write_text("one\ntwo\n")
    machine.pull(local)
    before = snapshot(local)
    assert before["metrics.jsonl"] == b"one\ntwo\n"
    shutil.rmtree(out)
    machine.pull(local)
    shutil.rmtree(folder / "out")
    machine.pull(local)
    assert snapshot(local) == before


def save_checkpoint(run: Path, kind: str, step: int, seed: int = 0) -> Path:
    """As training/checkpoint.py does: whole when it has its name; the two newest stay."""
    temporary, final = run / f".tmp-{kind}", run / f"{kind}-{step:08d}"
    temporary.mkdir()
    (temporary / "model.safetensors").write_bytes(random.Random(step + seed).randbytes(200_000))
    (temporary / "state.json").write_text(json.dumps({"step": step}))
    described = {
        path.name: {"size": path.stat().st_size, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
        for path in temporary.iterdir()
    }
    (temporary / "manifest.json").write_text(json.dumps(described))
    temporary.rename(final)
    for old in sorted(run.glob(f"{kind}-*"))[:-2]:
        shutil.rmtree(old)
    return final


def sound(run: Path) -> set[str]:
    """Checkpoints with just what was written, by its sha256."""
    found = set()
    for manifest in run.glob("*-*/manifest.json"):
        files = json.loads(manifest.read_text())
        paths = [manifest.parent / name for name in files]
        if all(path.exists() for path in paths):
            read = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}
            if read == {name: about["sha256"] for name, about in files.items()}:
                found.add(manifest.parent.name)
    return found


def test_the_names_of_checkpoints_are_those_of_train_py():
    from training import checkpoint

    for name in ("last-00000500", "best-123456789", "last-5", ".tmp-last-00000500", "first-00000500"):
        assert bool(machines.CHECKPOINT.fullmatch(name)) == bool(checkpoint.NAME.fullmatch(name)), name


def test_a_torn_checkpoint_never_drives_out_a_whole_one(tmp_path):
    for step in (1, 2):
        save_checkpoint(tmp_path, "last", step)
        save_checkpoint(tmp_path, "best", step)
    for step in (3, 4):
        shutil.copytree(tmp_path / "last-00000002", tmp_path / f"last-{step:08d}")
    (tmp_path / "last-00000003/model.safetensors").unlink()
    (tmp_path / "last-00000004/state.json").write_text("{")
    for kind, manifest in enumerate(("[]", "{", '{"state.json": 1}')):
        (tmp_path / f"best-0000001{kind}").mkdir()
        (tmp_path / f"best-0000001{kind}/manifest.json").write_text(manifest)
    machines.prune(tmp_path)
    names = {path.name for path in tmp_path.iterdir()}
    assert {f"last-{step:08d}" for step in (1, 2, 3, 4)} | {"best-00000001", "best-00000002"} <= names
    for step in (5, 6):
        shutil.copytree(tmp_path / "last-00000002", tmp_path / f"last-{step:08d}")
        machines.prune(tmp_path)
    assert {path.name for path in tmp_path.glob("last-*")} == {"last-00000005", "last-00000006"}


def slow_rsync(home: Home, kib: int) -> None:
    """So many KiB a second; 0 is no limit."""
    home.program("rsync", f'exec {shutil.which("rsync")} --bwlimit={kib} "$@"')


@pytest.mark.parametrize("linked", [True, False])
def test_checkpoints_that_go_while_they_are_fetched(machine, server, home, tmp_path, linked):
    """A copy made of links keeps them; where there can be none, the next ones are fetched."""
    if not linked:
        home.program("cp", "exit 1")
    folder, local = bring(machine, server, ENDLESS), tmp_path / "run"
    machine.start([], gpus=1)
    wait_for_log(folder)
    save_checkpoint(folder / "out", "last", 1)
    machine.pull(local)
    for step in (2, 3):
        save_checkpoint(folder / "out", "last", step)
    slow_rsync(home, 400)
    fetching = threading.Thread(target=machine.pull, args=(local,))
    fetching.start()
    wait_until(lambda: list(local.glob("last-00000002/.model*")))
    for step in (4, 5):
        save_checkpoint(folder / "out", "last", step)
    fetching.join()
    assert sound(local) == {f"last-{step:08d}" for step in ((2, 3) if linked else (4, 5))}
    slow_rsync(home, 0)
    machine.pull(local)
    assert {path.name for path in local.iterdir()} == sound(local) == sound(folder / "out")


@SLOW
def test_a_run_that_saves_while_it_is_fetched(machine, server, tmp_path):
    """Connections break at every moment; what was whole here stays whole until something newer is."""
    folder, local = bring(machine, server, ENDLESS), tmp_path / "run"
    machine.start([], gpus=1)
    wait_for_log(folder)
    over, newest = threading.Event(), 0

    def train() -> None:
        step = 0
        while not over.is_set():
            step += 1
            save_checkpoint(folder / "out", "last", step)
            time.sleep(0.02)

    def cut() -> None:
        chance = random.Random(1)
        while not over.wait(chance.uniform(0.3, 1.2)):
            server.drop_sessions()

    threads = [threading.Thread(target=train), threading.Thread(target=cut)]
    for thread in threads:
        thread.start()
    fetched = 0
    try:
        for _ in range(12):
            try:
                machine.pull(local)
                fetched += 1
            except ConnectionLost:
                pass
            steps = [int(name.split("-")[1]) for name in sound(local)]
            assert max(steps, default=0) >= newest
            newest = max(steps, default=0)
    finally:
        over.set()
        for thread in threads:
            thread.join()
    assert fetched > 2 and newest > 0
    machine.pull(local)
    assert sound(local) == sound(folder / "out") and len(sound(local)) == 2
    assert {path.name for path in local.iterdir()} == sound(local)


@SLOW
def test_two_fetch_at_once(machine, server, tmp_path):
    folder, local = bring(machine, server, ENDLESS), tmp_path / "run"
    machine.start([], gpus=1)
    wait_for_log(folder)
    for step in (1, 2):
        save_checkpoint(folder / "out", "last", step)
    threads = [threading.Thread(target=machine.pull, args=(local,)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    machine.pull(local)
    assert len(sound(local)) == 2


@SLOW
def test_what_has_come_of_a_file_is_not_fetched_again(machine, server, home, tmp_path):
    folder, local = bring(machine, server, ""), tmp_path / "run"
    (folder / "out").mkdir()
    (folder / "out/large").write_bytes(random.Random(0).randbytes(3_000_000))
    slow_rsync(home, 1000)
    threading.Timer(2, server.drop_sessions).start()
    with pytest.raises(ConnectionLost):
        machine.pull(local)
    assert not (local / "large").exists()
    assert (local / ".rsync-partial/large").stat().st_size > 500_000
    slow_rsync(home, 0)
    machine.pull(local)
    assert snapshot(local) == snapshot(folder / "out")


def test_the_disk_here_is_full(machine, server, tmp_path):
    folder, local = bring(machine, server, ""), tmp_path / "run"
    (folder / "out").mkdir()
    save_checkpoint(folder / "out", "last", 1)
    with small_disk(local, 700):
        machine.pull(local)
        save_checkpoint(folder / "out", "last", 2)
        (folder / "out/large").write_bytes(bytes(1_000_000))
        with pytest.raises(LocalDiskFull, match="No space left") as caught:
            machine.pull(local)
        assert "\n" not in str(caught.value)
        assert "last-00000001" in sound(local)
        subprocess.run(["mount", "-o", "remount,size=4m", str(local)], check=True)
        machine.pull(local)
        assert snapshot(local) == snapshot(folder / "out")


def test_a_folder_that_cannot_be_written(machine, server, tmp_path):
    bring(machine, server, "")
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(MachineError, match="cannot write"):
        machine.pull(tmp_path / "file" / "run")


# ------------------------------------------------------------------------------------------------------------
# setup


SMI = "echo '| NVIDIA-SMI 570.124    Driver Version: 570.124    CUDA Version: {} |'"
PIP = """
import sys
from pathlib import Path
if "--version" not in sys.argv:
    with open(Path(__file__).parent / "asked", "a") as file:
        file.write(" ".join(sys.argv[1:]) + "\\n")
    if "torch>=2.6" in sys.argv:
        (Path(__file__).parent.parent / "torch/__init__.py").write_text(TORCH)
"""
TORCH = """
__version__ = "{version}"
class version: cuda = {cuda!r}
class cuda:
    @staticmethod
    def init(): raise {error}
"""


def bring_stand_ins(
    home: Home, version="2.7.0", cuda="12.8", error="RuntimeError('unknown\\n error')"
) -> None:
    """What setup finds: a PyTorch, and a pip that writes down what it is asked for."""
    home.program("df", "echo head", f"echo disk 1 1 {20 << 20} 1% /")
    home.module("torch/__init__.py", TORCH.format(version=version, cuda=cuda, error=error))
    new = TORCH.format(version="2.9.0", cuda="12.8", error="RuntimeError('the installed one')")
    home.module("pip/__init__.py", "")
    home.module("pip/__main__.py", PIP.replace("TORCH", repr(new)))


def asked(home: Home) -> list[str]:
    path = home.folder / "lib/pip/asked"
    return path.read_text().splitlines() if path.exists() else []


@pytest.mark.parametrize(
    "driver, build",
    [("12.4", "cu126")]
    + [
        pytest.param(*case, marks=SLOW) for case in (("12.8", "cu128"), ("12.10", "cu128"), ("13.1", "cu130"))
    ],
)
def test_an_old_torch_is_replaced_by_the_build_for_the_driver(machine, server, home, driver, build):
    bring(machine, server, "")
    bring_stand_ins(home, version="2.5.1")
    home.program("nvidia-smi", SMI.format(driver))
    with pytest.raises(MachineError, match="PyTorch does not compute: the installed one"):
        machine.setup()
    assert asked(home) == [
        f"install --ignore-installed torch>=2.6 --index-url https://download.pytorch.org/whl/{build}"
    ]


@SLOW
def test_a_driver_too_old(machine, server, home):
    bring(machine, server, "")
    bring_stand_ins(home, version="2.5.1")
    home.program("nvidia-smi", SMI.format("11.4"))
    with pytest.raises(MachineError, match="driver is too old: it knows CUDA 11.4"):
        machine.setup()


def test_a_healthy_looking_gpu_that_does_not_compute(machine, server, home):
    """The image's torch is new enough, so nothing is installed; on one line the cause."""
    bring(machine, server, "")
    bring_stand_ins(home)
    home.program("nvidia-smi", SMI.format("12.8"))
    with pytest.raises(MachineError, match="error: PyTorch does not compute: unknown error$"):
        machine.setup()
    assert asked(home) == []


@SLOW
def test_no_gpu_answers(machine, server, home):
    bring(machine, server, "")
    bring_stand_ins(home)
    home.program("nvidia-smi", "echo NVIDIA-SMI has failed; exit 9")
    with pytest.raises(MachineError, match="no GPU answers: NVIDIA-SMI has failed"):
        machine.setup()


def test_a_full_disk_is_seen_before_anything_is_installed(machine, server, home):
    bring(machine, server, "")
    bring_stand_ins(home)
    home.program("df", "echo head", f"echo disk 1 1 {1 << 20} 1% /")
    with pytest.raises(MachineError, match="the machine's disk is full: 1024 MiB free, 2 GiB are needed"):
        machine.setup(device="cpu")


def test_no_wheel_for_the_processor(machine, server, home):
    bring(machine, server, "")
    bring_stand_ins(home, version="2.5.1")
    home.program("uname", "echo aarch64")
    complaint = "ERROR: No matching distribution found for torch>=2.6"
    home.module("pip/__main__.py", f"import sys\nsys.exit('--version' not in sys.argv and {complaint!r})")
    with pytest.raises(MachineError, match=rf"no torch>=2.6 \(cpu\) for aarch64: {complaint}"):
        machine.setup(device="cpu")


def test_what_tests_want_is_not_installed(machine, server, home):
    folder = bring(machine, server, "")
    bring_stand_ins(home)
    home.module(
        "pip/__main__.py", "import sys\nsys.exit('--version' not in sys.argv and 'ERROR: no network')"
    )
    with pytest.raises(MachineError, match="pip: ERROR: no network"):
        machine.setup(device="cpu")
    names = [line.split(">")[0] for line in (folder / "requirements.txt").read_text().splitlines()]
    assert {"numpy", "wandb", "safetensors", "rich"} <= set(names)
    assert not {"pytest", "hypothesis", "selenium", "torch", "torch==2.13.0"} & set(names)


@SLOW
def test_without_the_code_there_is_nothing_to_call(machine, server):
    with pytest.raises(MachineError, match="No such file"):
        machine.setup()


@pytest.mark.skipif(not shutil.which("shellcheck"), reason="shellcheck is not installed")
def test_the_script_is_clean():
    subprocess.run(["shellcheck", ROOT / machines.ON_MACHINE], check=True)


# ------------------------------------------------------------------------------------------------------------
# the real thing


@SLOW
def test_train_py_from_an_empty_home_to_a_checkpoint_here(machine, server, tmp_path):
    """Setup, twice at once and cut off, then a run over two processes that is asked to stop."""
    from training import checkpoint

    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True).stdout
    files = {name for name in listed.decode().split("\0") if name and (ROOT / name).is_file()}
    machine.upload(ROOT, sorted({*files, machines.ON_MACHINE}))
    lost = threading.Timer(2, server.drop_sessions)
    lost.start()
    with pytest.raises(ConnectionLost):
        machine.setup(device="cpu")
    line = machine.setup(device="cpu")
    assert line.startswith("CPU; torch 2.") and "GiB free" in line
    prepare = "venv/bin/python code/data/arithmetic/prepare.py --lines=500 --problems_per_split=5"
    assert machine.ssh(f"cd $HOME/{machine.folder} && {prepare}").code == 0
    tiny = "--n_layer=1 --n_head=2 --n_embd=16 --dag_depth=0 --batch_size=4 --block_size=64 --compile=false"
    often = (
        "--eval_interval=5 --eval_iters=1 --eval_problems=0 --log_interval=1 --gradient_accumulation_steps=2"
    )
    machine.start(f"config/train_default.py {tiny} {often} --device=cpu --max_iters=100000".split(), gpus=2)
    folder, local = there(machine, server), tmp_path / "run"
    wait_until(lambda: machine.poll(0).is_over or list((folder / "out").glob("last-*")), 240)
    assert machine.poll(0).alive, (folder / "log").read_text()[-2000:]
    machine.pull(local)
    machine.stop()
    log, poll = follow(machine, 120)
    assert poll.exit_code == 0, log.decode()[-2000:]
    machine.pull(local)
    newest = checkpoint.load(local, "last")
    assert newest.step == max(int(name.split("-")[1]) for name in sound(folder / "out")) > 5
    assert (local / "metrics.jsonl").exists() and (local / "report.md").exists()
