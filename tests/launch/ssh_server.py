"""A rented machine for tests: a real OpenSSH server on a loopback port, as whoever runs the tests.

    with Sshd(home, {"PATH": ...}) as machine:
        ssh -i {machine.client_key} -p {machine.port} {machine.user}@127.0.0.1 'cd; ls'

HOME is `home` for its sessions (they still begin in the account's own folder: say `cd` first). Between the
tests and the server stands a small process, the guard: whatever a session leaves behind becomes the guard's
child, so what was detached survives the session, and dies with `stop` or when the tests are killed.
"""

import ctypes
import getpass
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

PR_SET_CHILD_SUBREAPER = 36
PROGRAM = shutil.which("sshd", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/local/sbin")


def missing() -> str | None:
    """Why there can be no machine here, or None."""
    if not sys.platform.startswith("linux"):
        return "the server of the tests needs Linux"
    absent = [name for name in ("ssh", "ssh-keygen", "rsync") if not shutil.which(name)] + ["sshd"] * (
        not PROGRAM
    )
    return f"not installed: {', '.join(absent)}" if absent else None


def descendants(pid: int) -> list[int]:
    try:
        children = [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except FileNotFoundError:
        return []
    return children + [pid for child in children for pid in descendants(child)]


def command_of(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/comm").read_text().strip()
    except (FileNotFoundError, ProcessLookupError):
        return ""


def kill(pids: list[int], number: int = signal.SIGKILL) -> None:
    for pid in pids:
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            pass


def wait_until(condition, seconds: float = 10) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"still not so after {seconds} s"
        time.sleep(0.01)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Sshd:
    """`start`, `stop`, which ends every process of the machine, and what can go wrong in between."""

    def __init__(self, home: Path, environment: dict[str, str] | None = None):
        """`environment` is what sessions see, besides HOME; values without quotation marks."""
        self.home = Path(home)
        self.environment = environment or {}
        self.user = getpass.getuser()
        self.port = free_port()
        self.temporary = tempfile.TemporaryDirectory(prefix="sshd-", ignore_cleanup_errors=True)
        self.folder = Path(self.temporary.name)
        self.client_key = self.folder / "client_key"
        self.host_key = self.folder / "host_key"
        self.authorized = self.folder / "authorized_keys"
        self.guard: subprocess.Popen | None = None
        self.listener: int | None = None
        self._make_key(self.client_key)
        self.allow_authentication()

    def __enter__(self) -> "Sshd":
        self.start()
        return self

    def __exit__(self, *_) -> None:
        self.stop()

    def start(self) -> None:
        """A machine with a host key of its own; after `stop` another one at the same address."""
        self.home.mkdir(parents=True, exist_ok=True)
        if os.getuid() == 0:
            Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)
        self._make_key(self.host_key)
        self._write_settings()
        self.guard = subprocess.Popen(
            [sys.executable, "-S", __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        self.listen()

    def stop(self) -> None:
        """Ends the server, its sessions and all that they left running; may be called twice."""
        if self.guard:
            self.guard.stdin.close()
            self.guard.wait(timeout=20)
            self.guard.stdout.close()
        self.guard = self.listener = None

    def listen(self) -> None:
        """Accepts connections (again)."""
        self.guard.stdin.write(f"{PROGRAM} -D -f {self.folder}/settings -E {self.folder}/log\n")
        self.guard.stdin.flush()
        self.listener = int(self.guard.stdout.readline())
        wait_until(self._answers)

    def refuse(self) -> None:
        """Connection refused, until `listen`; sessions go on."""
        kill([self.listener], signal.SIGTERM)
        wait_until(lambda: not self._answers())

    def sessions(self) -> list[int]:
        """The server's processes behind the connections."""
        found = [pid for pid in self.processes() if command_of(pid).startswith("sshd")]
        return [pid for pid in found if pid != self.listener]

    def drop_sessions(self) -> None:
        """All connections break; what runs in them loses its pipes, no more."""
        kill(self.sessions())

    def processes(self) -> list[int]:
        """Everything that runs on the machine, the server among it."""
        return descendants(self.guard.pid) if self.guard else []

    def replace_host_key(self) -> None:
        self.refuse()
        self._make_key(self.host_key)
        self.listen()

    def deny_authentication(self) -> None:
        self.authorized.write_text("")

    def allow_authentication(self) -> None:
        shutil.copy(f"{self.client_key}.pub", self.authorized)

    def _answers(self) -> bool:
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", self.port)) == 0

    def _make_key(self, path: Path) -> None:
        path.unlink(missing_ok=True)
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "test", "-f", path], check=True)

    def _write_settings(self) -> None:
        version = subprocess.run(["ssh", "-V"], capture_output=True, text=True).stderr
        penalties = tuple(map(int, re.search(r"OpenSSH_(\d+)\.(\d+)", version).groups())) >= (9, 8)
        seen = {"HOME": str(self.home), **self.environment}
        variables = " ".join(f'"{name}={value}"' for name, value in seen.items())
        lines = [
            f"Port {self.port}",
            "ListenAddress 127.0.0.1",
            f"HostKey {self.host_key}",
            f"AuthorizedKeysFile {self.authorized}",
            "PidFile none",
            "UsePAM no",
            "UseDNS no",
            "KexAlgorithms curve25519-sha256",  # half the time of a connection with the usual one
            "StrictModes no",
            "PermitRootLogin prohibit-password",
            "PasswordAuthentication no",
            "KbdInteractiveAuthentication no",
            "PrintMotd no",
            "MaxStartups 100",
            f"SetEnv {variables}",
        ]
        (self.folder / "settings").write_text("\n".join(lines + ["PerSourcePenalties no"] * penalties) + "\n")


def guard() -> None:
    """Starts what stdin names, a command a line, and prints its pid; at the end of stdin kills it all."""

    def reap(*_) -> None:
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        except ChildProcessError:
            pass

    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    signal.signal(signal.SIGCHLD, reap)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    null = {stream: subprocess.DEVNULL for stream in ("stdin", "stdout", "stderr")}
    for line in iter(sys.stdin.readline, ""):
        print(subprocess.Popen(line.split(), start_new_session=True, **null).pid, flush=True)
    while left := descendants(os.getpid()):
        kill(left)
        time.sleep(0.01)
        reap()


if __name__ == "__main__":
    guard()
