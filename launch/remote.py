"""A rented machine over ssh and rsync: bring the code there, train, follow the log, fetch the run.

    machine = Machine(host="192.0.2.7", known_hosts=state / "known_hosts", folder="nanogpt-dag/x")
    machine.wait_reachable(deadline)
    machine.upload(root, ["train.py", ...])
    print(machine.setup())                  # "1 x NVIDIA A10 (22 GiB); torch 2.7.0 with CUDA 12.8; ..."
    machine.start(["config/train_default.py"], gpus=1)
    while not (poll := machine.poll(offset)).is_over or poll.log:
        offset += len(poll.log)
    machine.pull(Path("out/x"))

What happens there is launch/remote_run.sh. Every method may be called again after a ConnectionLost: nothing is
done twice. The training does not know of connections, and its exit code comes from a file: ssh's own 255 can
mean anything.

Programs run in sessions of their own, so that Ctrl-C at the terminal stops none of them half-way (`cancelled`
does), and without this computer's keys in their environment.
"""

import errno
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from launch.lambda_api import KEYS, Clock

ON_MACHINE = "launch/remote_run.sh"
CHECKPOINT = re.compile(r"(last|best)-(\d{8,})")
KEEP = 2  # checkpoints of a kind, as train.py does
WATCH_SECONDS = 0.2  # how often `cancelled` is asked
RSYNC_LOST = (10, 12, 30, 35, 255)  # socket, protocol, timeouts, ssh's own
RSYNC_WRITE, RSYNC_VANISHED = 11, 24
RSYNC_CHANGED = (23, RSYNC_VANISHED)  # some files could not be read or written, some have vanished
RSYNC_NOISE = ("rsync error:", "rsync: connection unexpectedly closed")  # said after the reason
HOST_KEY = ("REMOTE HOST IDENTIFICATION HAS CHANGED", "Host key verification failed")
DISK_FULL = ("No space left on device", "Disk quota exceeded")


class MachineError(ValueError):
    """One line that says what is wrong."""


class ConnectionLost(MachineError):
    """Nobody answered, or no longer. Try again."""


class HostKeyChanged(MachineError):
    """Somebody else answers at the address."""


class LocalDiskFull(MachineError):
    """Here, not there."""


class Cancelled(MachineError):
    """`cancelled` said so."""


@dataclass(frozen=True)
class Done:
    code: int
    out: bytes
    err: str

    @property
    def complaint(self) -> str:
        """The last line of stderr that says something."""
        lines = [line.strip() for line in self.err.splitlines() if not line.startswith(RSYNC_NOISE)]
        return next(filter(None, reversed(lines)), "")


@dataclass(frozen=True)
class Poll:
    log: bytes  # from the offset that was asked for, at most 1 MiB
    size: int  # of the whole log
    exit_code: int | None  # of the training, once it has ended
    alive: bool

    @property
    def is_over(self) -> bool:
        """Where there is no exit code then, all was killed at once; the log is complete at `size`."""
        return not self.alive


def usual_port() -> int:
    text = os.environ.get("LAMBDA_SSH_PORT") or "22"
    if not text.isdecimal():
        raise ValueError(f"LAMBDA_SSH_PORT={text!r}: expected a number")
    return int(text)


@dataclass
class Machine:
    host: str
    known_hosts: Path  # of this machine alone: its key is accepted once, and no other one afterwards
    folder: str  # there, relative to the home folder
    identity: Path | None = None  # private key; None leaves it to ssh, with its agent and its own settings
    port: int = field(default_factory=usual_port)
    user: str = field(default_factory=lambda: os.environ.get("LAMBDA_SSH_USER") or "ubuntu")
    clock: Clock = Clock()
    say: Callable[[str], object] = print
    cancelled: Callable[[], bool] = lambda: False

    def __post_init__(self):
        assert re.fullmatch(r"[\w.-]+(/[\w.-]+)*", self.folder), f"needs quoting: {self.folder}"

    # ------------------------------------------------------------------------------------- the connection

    def ssh_argv(self, terminal: bool = False) -> list[str]:
        """ssh up to the command; with `terminal` for a person."""
        known = self.known_hosts.exists() and self.known_hosts.stat().st_size > 0
        quoted = str(self.known_hosts.absolute()).replace("%", "%%")
        options = {
            "UserKnownHostsFile": f'"{quoted}"',
            "GlobalKnownHostsFile": "none",  # addresses are rented out again
            "StrictHostKeyChecking": "yes" if known else "accept-new",
            "UpdateHostKeys": "no",
            "BatchMode": "no" if terminal else "yes",
            "ConnectTimeout": "10",
            "ServerAliveInterval": "15",
            "ServerAliveCountMax": "3",
            "LogLevel": "ERROR",
            "ControlMaster": "no",
            "ControlPath": "none",
            "ForwardAgent": "no",
            "ForwardX11": "no",
            "ClearAllForwardings": "yes",
            "RemoteCommand": "none",
            "RequestTTY": "auto" if terminal else "no",
        }
        if self.identity:
            options["IdentitiesOnly"] = "yes"
        words = [f"-o{name}={value}" for name, value in options.items()]
        key = ["-i", str(self.identity.absolute())] if self.identity else []
        return ["ssh", *words, *key, "-p", str(self.port), f"{self.user}@{self.host}"]

    def ssh(self, command: str, stdin: bytes = b"", timeout: float = 60) -> Done:
        """What the command answered, within `timeout` real seconds. Its exit code is never ssh's 255."""
        done = self._run([*self.ssh_argv(), command], stdin, timeout)
        if done.code == 255:
            raise self._lost(done)
        return done

    def wait_reachable(self, deadline: float) -> None:
        """Until ssh lets us in, or the epoch `deadline`. Refusals are usual soon after boot, of keys, too."""
        told = ""
        while True:
            try:
                self.ssh("true", timeout=20)
                return
            except ConnectionLost as problem:
                reason = str(problem)
            if self.clock.now() > deadline:
                raise MachineError(f"not reachable in time: {reason}")
            if reason != told:
                self.say(f"not reachable yet: {reason}")
                told = reason
            self._pause(5)

    def _pause(self, seconds: float) -> None:
        until = self.clock.after(seconds)
        while (left := until - self.clock.now()) > 0:
            if self.cancelled():
                raise Cancelled("cancelled")
            time.sleep(min(left, WATCH_SECONDS))

    def _run(self, argv: list[str], stdin: bytes = b"", timeout: float | None = None) -> Done:
        environment = {name: value for name, value in os.environ.items() if name not in KEYS}
        pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
        try:
            process = subprocess.Popen(argv, **pipes, env=environment, start_new_session=True)
        except FileNotFoundError:
            raise MachineError(f"{argv[0]} is not installed here") from None
        deadline = None if timeout is None else time.monotonic() + timeout
        unsent = stdin
        try:
            while True:
                if self.cancelled():
                    raise Cancelled("cancelled")
                if deadline is not None and time.monotonic() > deadline:
                    raise ConnectionLost(f"no answer from {self.host} within {timeout:.0f} s")
                try:
                    out, err = process.communicate(unsent, timeout=WATCH_SECONDS)
                    return Done(process.returncode, out, err.decode(errors="replace"))
                except subprocess.TimeoutExpired:
                    unsent = None  # Popen has it
        finally:
            if process.poll() is None:
                end(process)

    def _lost(self, done: Done) -> MachineError:
        if any(sign in done.err for sign in HOST_KEY):
            return HostKeyChanged(
                f"the host key of {self.host} is not the one of the first connection: another machine has "
                f"its address now, or somebody is listening in between. Nothing was sent there"
            )
        if "Permission denied (" in done.err:
            return ConnectionLost(
                f"{self.user}@{self.host} takes no key of ours (soon after boot, not yet): if it stays so, "
                f"the private half of the registered key is not here, or is locked: ssh-add it"
            )
        return ConnectionLost(f"no connection to {self.host}: {done.complaint or 'it broke'}")

    # ------------------------------------------------------------------------------------------ going there

    def upload(self, root: Path, files: list[str]) -> None:
        """The files of `root`, named relative to it, into code/; what else lies there stays."""
        names = b"".join(os.fsencode(name) + b"\0" for name in files)
        listed = ["--files-from=-", "--from0", f"{root.absolute()}/", self._address("code")]
        self._rsync(listed, "code", MachineError, names)

    def secret(self, name: str, value: str) -> None:
        """For the environment of the training. Only its owner can read the file, until `start` removes it."""
        if not value.isprintable() or not name.isidentifier():
            raise MachineError(f"{name} holds a line break or something else that no key has")
        store = f"umask 077 && mkdir -p {self._there}/secrets && cd {self._there}/secrets"
        self._require(self.ssh(f"{store} && cat >{name}.part && mv {name}.part {name}", value.encode()))

    def setup(self, torch_minimum: str = "2.6", device: str = "auto", timeout: float = 3600) -> str:
        """An environment with a PyTorch that really computes on every GPU. The line that describes it."""
        said = self._on_machine("setup", torch_minimum, device, timeout=timeout).decode()
        return said.strip().splitlines()[-1]

    # ------------------------------------------------------------------------------------------ the training

    def start(self, arguments: list[str], gpus: int) -> None:
        """train.py with these arguments, by torchrun over several GPUs. A second start is none."""
        self._on_machine("start", str(gpus), *arguments)

    def poll(self, offset: int) -> Poll:
        """The state, and the log from `offset` on."""
        out = self._on_machine("poll", str(offset))
        head = re.search(rb"^poll (running|ended) (\d+|-) (\d+)\n", out, re.MULTILINE)
        if not head:
            raise ConnectionLost(f"the answer of {self.host} was cut off")
        state, code, size = head.groups()
        return Poll(out[head.end() :], int(size), None if code == b"-" else int(code), state == b"running")

    def stop(self, grace: float = 120) -> None:
        """Asks the training to save and end, once however often it is called, and does not wait. What is left
        after `grace` real seconds is killed.
        """
        self._on_machine("stop", f"{grace:g}")

    def pull(self, local: Path) -> None:
        """Brings `local` up to date with the run's folder. Nothing is ever removed here because of what is
        missing there: a checkpoint goes when two newer ones of its kind are here, whole.
        """
        local = local.absolute()
        try:
            local.mkdir(parents=True, exist_ok=True)
            source = self._on_machine("snapshot").decode().split()[-1]
            unfinished = ["--exclude=/.tmp-*", "--exclude=/*.old"]
            kept = "--partial-dir=.rsync-partial"  # what has come of a file whose connection breaks
            self._rsync([*unfinished, kept, self._address(source), f"{local}/"], source, LocalDiskFull)
            prune(local)
        except OSError as error:
            full = LocalDiskFull if error.errno in (errno.ENOSPC, errno.EDQUOT) else MachineError
            raise full(f"cannot write {local}: {error.strerror}") from None

    @property
    def _there(self) -> str:
        return f'"$HOME"/{self.folder}'

    def _on_machine(self, *words: str, timeout: float = 60) -> bytes:
        command = f"cd {self._there}/code && exec bash {ON_MACHINE} {shlex.join(words)}"
        return self._require(self.ssh(command, timeout=timeout)).out

    def _require(self, done: Done) -> Done:
        if done.code:
            raise MachineError(f"the machine says: {done.complaint or f'exit code {done.code}'}")
        return done

    # ------------------------------------------------------------------------------------------ rsync

    def _address(self, there: str) -> str:
        return f"{self.user}@{self.host}:{self.folder}/{there}/"

    def _rsync(self, arguments: list[str], there: str, full: type[MachineError], stdin: bytes = b"") -> None:
        """`full` is raised where the receiving disk is."""
        ssh = self.ssh_argv()[:-1]
        # ssh begins in the account's folder, which is not always $HOME
        program = f"mkdir -p {self._there}/{there} && cd && rsync"
        argv = [
            "rsync",
            "-rlpt",
            "--timeout=120",
            f"--rsh={quoted_for_rsync(ssh)}",
            f"--rsync-path={program}",
        ]
        done = self._run([*argv, *arguments], stdin)
        if done.code in RSYNC_CHANGED:
            done = self._run([*argv, *arguments], stdin)
        if done.code in (0, RSYNC_VANISHED):  # the run goes on while it is fetched
            return
        problem = re.search(f".*({'|'.join(DISK_FULL)}).*", done.err)
        if problem or done.code == RSYNC_WRITE and not done.complaint:  # its reason is lost at times
            raise full(f"{problem[0] if problem else 'rsync could not write, a full disk?'}: free some space")
        if re.search(r"rsync: (command )?not found", done.err):
            raise MachineError("rsync is not installed on the machine")
        if done.code in RSYNC_LOST:
            raise self._lost(done)
        raise MachineError(f"rsync failed ({done.code}): {done.complaint}")


def end(process: subprocess.Popen, patience: float = 5) -> None:
    """TERM first: rsync then keeps what it has of a file."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
            process.communicate(timeout=patience)
            return
        except ProcessLookupError:
            process.wait()
            return
        except subprocess.TimeoutExpired:
            continue


def quoted_for_rsync(words: list[str]) -> str:
    """As rsync splits its --rsh: not quite as a shell would."""
    return " ".join("'" + word.replace("'", "''") + "'" for word in words)


# ------------------------------------------------------------------------------------------------------------
# checkpoints that were fetched


def is_whole(folder: Path) -> bool:
    """Whether every file that its manifest names is there; rsync names a file only when all of it is."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text())
        return all((folder / name).stat().st_size == about["size"] for name, about in manifest.items())
    except (OSError, ValueError, TypeError, LookupError, AttributeError):  # missing, or no manifest at all
        return False


def prune(run: Path) -> None:
    """Removes the checkpoints that train.py would have, but never on account of one that is not whole."""
    for kind in ("last", "best"):
        found = {path: int(m[2]) for path in run.glob(f"{kind}-*") if (m := CHECKPOINT.fullmatch(path.name))}
        newest = sorted((step for path, step in found.items() if is_whole(path)), reverse=True)[:KEEP]
        if len(newest) == KEEP:
            for path in [path for path, step in found.items() if step < newest[-1]]:
                shutil.rmtree(path)
