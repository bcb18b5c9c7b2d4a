"""What has been rented: a folder a run, written to the disk before the request that costs money.

    ledger = Ledger()                                 # $XDG_STATE_HOME/nanogpt-dag, or LAMBDA_STATE
    run = ledger.new(Run(name="train_default-7f3a19", ...))
    with ledger.hold(run.name) as held:               # False where another process looks after the machine
        ledger.save(replace(run, phase="booting", instance_id=...))

    STATE/NAME/run.json        the Run, replaced atomically
               lock            held, by flock, by the process that looks after the machine
               watchdog.lock   held by its watchdog
               service.log     what the service said; watchdog.log, what the watchdog said
               train.log       what the training printed
               known_hosts     the machine's host key

A lock is let go by the kernel when its process dies, however it dies; a number in a file would not be. No key
or password is ever written here.
"""

import contextlib
import fcntl
import json
import os
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import IO


@dataclass(frozen=True)
class Run:
    name: str  # of the run, of the machine and of its tag
    arguments: list[str]  # of train.py
    device: str  # of the training: auto, or cpu in a trial
    out_dir: str  # where its results go, an absolute path
    ssh_key: str  # its registered name
    identity: str  # file of the private key, or "" for the agent's
    account: str  # which service and key: another one does not know the machine
    created: float  # seconds since 1970, as all times here
    max_hours: float
    max_cost: float = 0.0  # dollars; 0 is no limit of its own
    boot_timeout: float = 30.0  # minutes, as are these
    pull_every: float = 5.0
    keep_on_failure: float = 0.0
    keep: bool = False  # the machine, until the deadline
    file_systems: list[str] = field(default_factory=list)
    image_family: str = ""  # "" is the newest lambda-stack of the region

    # planned, launching, booting, preparing, training, fetching, terminating, gone
    phase: str = "planned"
    instance_type: str = ""
    region: str = ""
    gpus: int = 0
    price: float = 0.0  # dollars an hour
    deadline: float = 0.0  # the machine is terminated then, whatever happens
    stop_at: float = 0.0  # the training is stopped, so that its results can still be fetched
    kept_until: float = 0.0  # nobody terminates it before, though nobody looks after it
    detached: bool = False  # the person has left, the watchdog looks after it
    instance_id: str = ""
    strangers: list[str] = field(default_factory=list)  # ids that were there before: never ours
    address: str = ""
    adopted: bool = False  # the answer was lost, and the machine was found by its name
    launched: float = 0.0  # when the request was sent; 0 is never
    started: float = 0.0  # when the training was
    log_offset: int = 0  # bytes of the training's output that are here
    exit_code: int | None = None  # of the training
    outcome: str = ""  # in words, once it is over
    code: int = 0  # what the service's exit code was then
    ended: float = 0.0  # when the machine was seen to be gone

    @classmethod
    def of_stranger(cls, name: str, machine_id: str, price: float, account: str) -> "Run":
        """For a machine that was launched from elsewhere and is to be terminated here."""
        begun = dict(phase="terminating", instance_id=machine_id, launched=1.0, price=price)
        begun |= dict(account=account)
        nothing = dict(arguments=[], device="", out_dir="", ssh_key="", identity="", max_hours=0.0)
        return cls(name=name, created=time.time(), **nothing, **begun)

    @property
    def is_over(self) -> bool:
        return self.phase == "gone"


def took(file: IO, seconds: float = 0.5) -> bool:
    """Whether the file could be locked; a little patience, as `is_held` takes a lock for a moment, too."""
    until = time.monotonic() + seconds
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if time.monotonic() > until:
                return False
            time.sleep(0.05)


def state_folder() -> Path:
    home = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    return Path(os.environ.get("LAMBDA_STATE") or Path(home) / "nanogpt-dag")


class Ledger:
    def __init__(self, folder: Path | None = None):
        self.folder = folder or state_folder()
        self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)

    def path(self, name: str, file: str = "") -> Path:
        return self.folder / name / file

    def new(self, run: Run) -> Run:
        """FileExistsError where the name is taken."""
        self.path(run.name).mkdir(mode=0o700)
        return self.save(run)

    def save(self, run: Run) -> Run:
        """On the disk when it returns: what follows may cost money."""
        path = self.path(run.name, "run.json")
        temporary = path.with_suffix(f".{os.getpid()}.tmp")
        with open(temporary, "w") as file:
            json.dump(asdict(run), file, indent=2)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
        return run

    def load(self, name: str) -> Run:
        """ValueError where there is no such run, or its file is damaged."""
        path = self.path(name, "run.json")
        try:
            saved = json.loads(path.read_text())
            return Run(**{item.name: saved[item.name] for item in fields(Run) if item.name in saved})
        except FileNotFoundError:
            known = ", ".join(run.name for run in self.runs()[:5]) or "none"
            raise ValueError(f"no run {name!r} in {self.folder}; the newest: {known}") from None
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise ValueError(f"{path} is damaged ({error}): look for {name} in `list`") from None

    def runs(self) -> list[Run]:
        """Newest first. A folder without a readable run is left out here; `damaged` names it."""
        found = []
        for path in self.folder.glob("*/run.json"):
            with contextlib.suppress(ValueError):
                found.append(self.load(path.parent.name))
        return sorted(found, key=lambda run: run.created, reverse=True)

    def damaged(self) -> list[str]:
        readable = {run.name for run in self.runs()}
        return sorted(
            path.name for path in self.folder.iterdir() if path.is_dir() and path.name not in readable
        )

    @contextlib.contextmanager
    def hold(self, name: str, lock: str = "lock") -> Iterator[bool]:
        """Whether the lock is ours inside the block."""
        with open(self.path(name, lock), "a") as file:
            yield took(file)

    def is_held(self, name: str, lock: str = "lock") -> bool:
        with self.hold(name, lock) as free:
            return not free
