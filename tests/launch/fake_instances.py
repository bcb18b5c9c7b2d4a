"""Rented instances, what becomes of them, and the machine behind them: a real ssh server on this computer.

Times are in seconds of the stand-in (fake_lambda_api.py).
"""

import math
import os
import secrets
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from api_rules import TYPES, region_json, type_json
from ssh_server import Sshd

TERMINATING = 20  # from terminate to terminated
LISTED = 120  # from terminate until it is forgotten


@dataclass
class Instance:
    """Something rented. The times are what faults change."""

    name: str | None
    type: str
    region: str
    key: str
    launched: float
    tags: list[dict] = field(default_factory=list)
    file_systems: list[str] = field(default_factory=list)
    boot: float = 180  # from launch until active
    address: float = 60  # from launch until the ip shows
    seen: float = 0  # from launch until it can be listed
    known: float = 0  # from launch until it can be terminated
    unhealthy: float = math.inf  # from active
    preempted: float = math.inf  # from active
    ssh: float = 0  # from active until ssh answers
    lingers: float = 0  # from terminate until it begins to terminate
    ended: float = math.inf  # when it began to terminate
    events: list[tuple[float, Callable[[Sshd], Any]]] = field(default_factory=list)  # from when ssh answers
    programs: dict[str, str] = field(default_factory=dict)  # shell scripts, first on the machine's PATH
    disk_mib: float | None = None  # None: as much as this computer has
    packages: bool = True  # its Python has those of this one
    machine: bool = True  # there is one that ssh may reach
    id: str = field(default_factory=lambda: secrets.token_hex(16))
    token: str = field(default_factory=lambda: secrets.token_hex(16))

    @property
    def active(self) -> float:
        return self.launched + self.boot

    @property
    def end(self) -> float:
        return min(self.ended, self.active + self.preempted)

    def status(self, now: float) -> str:
        if now < self.active and now < self.end:
            return "booting"
        if now < self.end:
            return "unhealthy" if self.active + self.unhealthy <= now else "active"
        if self.end < self.ended:
            return "preempted"
        return "terminating" if now < self.end + TERMINATING else "terminated"

    def listed(self, now: float) -> bool:
        return self.launched + self.seen <= now < self.ended + LISTED

    def reachable(self, now: float) -> bool:
        return self.machine and self.active + self.ssh <= now < self.end

    def cents(self, now: float) -> float:
        """By the minute, from active until terminate."""
        minutes = math.ceil(max(0, min(now, self.end) - self.active) / 60)
        return minutes * TYPES[self.type][1] / 60

    def json(self, now: float) -> dict:
        shown = {
            "id": self.id,
            "status": self.status(now),
            "ssh_key_names": [self.key],
            "file_system_names": self.file_systems,
            "region": region_json(self.region),
            "instance_type": type_json(self.type),
            "hostname": f"10-0-0-{self.id[:4]}",
            "actions": {"terminate": {"available": True}, "restart": {"available": True}},
            "tags": self.tags,
            "is_reserved": False,
            "jupyter_token": self.token,
            "jupyter_url": f"https://jupyter.invalid/?token={self.token}",
        }
        if self.name is not None:
            shown["name"] = self.name
        if self.launched + self.address <= now:
            shown |= {"ip": "127.0.0.1", "private_ip": "10.0.0.2"}
        return shown


# ------------------------------------------------------------------------------------------------------------


class Keeper:
    """A thread that keeps one ssh server as the instances want it: there, gone, or in trouble.

    Of several that are active the oldest has it. What runs there ends with the instance; its files, in
    `homes`, stay until the stand-in ends, so that tests can search them.
    """

    def __init__(self, folder: Path, instances: list[Instance], now: Callable[[], float]):
        self.folder, self.instances, self.now = folder, instances, now
        self.sshd = Sshd(folder)
        self.homes: list[Path] = []
        self.tenant: Instance | None = None
        self.failure: Exception | None = None
        self.stopping = threading.Event()
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def stop(self) -> None:
        self.stopping.set()
        self.thread.join()
        if self.failure:
            raise self.failure

    def _run(self) -> None:
        try:
            while not self.stopping.wait(0.01):
                self._look()
        except Exception as failure:  # raised by `stop`
            self.failure = failure
        finally:
            self.sshd.stop()
            self.sshd.temporary.cleanup()

    def _look(self) -> None:
        if self.tenant and not self.tenant.reachable(self.now()):
            self.sshd.stop()
            self.tenant = None
        waiting = [each for each in list(self.instances) if each.reachable(self.now())]
        if waiting and not self.tenant:
            self._move_in(waiting[0])
        while self.tenant and self.events and self.events[0][0] <= self.now():
            self.events.pop(0)[1](self.sshd)

    def _move_in(self, tenant: Instance) -> None:
        home, programs = self.folder / tenant.id / "home", self.folder / tenant.id / "bin"
        home.mkdir(parents=True)
        if tenant.disk_mib:
            mount(home, tenant.disk_mib)
        write_programs(programs, tenant.programs)
        self.homes.append(home)
        self.sshd.home = home
        self.sshd.environment = {
            "PATH": f"{programs}:{Path(sys.executable).parent}:/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin",
            "OMP_NUM_THREADS": "1",
            "PIP_NO_INDEX": "1",
        }
        if tenant.packages:
            self.sshd.environment["PYTHONPATH"] = sysconfig.get_path("purelib")
        self.sshd.allow_authentication()
        for after, act in tenant.events:
            if after <= 0:
                act(self.sshd)
        self.sshd.start()
        later = [(self.now() + after, act) for after, act in tenant.events if after > 0]
        self.events = sorted(later, key=lambda event: event[0])
        self.tenant = tenant


def write_programs(folder: Path, programs: dict[str, str]) -> None:
    folder.mkdir(parents=True)
    for name, script in programs.items():
        (folder / name).write_text(f"#!/bin/sh\n{script}\n")
        (folder / name).chmod(0o755)


# ------------------------------------------------------------------------------------------------------------
# small disks


def mount(folder: Path, mib: float) -> None:
    command = ["mount", "-t", "tmpfs", "-o", f"size={mib * 1024:.0f}k", "tmpfs", str(folder)]
    subprocess.run(command, check=True, capture_output=True)


def may_mount() -> bool:
    """Whether `disk_full` can work here."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            mount(Path(folder), 1)
        except (OSError, subprocess.CalledProcessError):
            return False
        subprocess.run(["umount", folder], check=True)
        return True


def remove(folder: Path) -> None:
    """With what is mounted in it."""
    for line in Path("/proc/mounts").read_text().splitlines():
        if line.split()[1].startswith(f"{folder}/"):
            subprocess.run(["umount", "--lazy", line.split()[1]], check=True)
    shutil.rmtree(folder, ignore_errors=True)


def new_folder() -> Path:
    """One that carries our pid; those of processes that were killed are removed."""
    for left in Path(tempfile.gettempdir()).glob("stand-in-*-*"):
        if not Path("/proc", left.name.split("-")[2]).exists():
            remove(left)
    return Path(tempfile.mkdtemp(prefix=f"stand-in-{os.getpid()}-"))
