"""A SLURM cluster on loopback: a controller and two nodes, all of them this computer, known to nobody else.

    python tests/launch/slurm_cluster.py                          # prints what to export, serves until Ctrl-C

    with SlurmCluster() as cluster:                        # OSError where it does not come up
        subprocess.run(["srun", "--nodes=2", "hostname"], env=os.environ | cluster.environment())

These are the real programs (Debian: apt install slurm-wlm munge). Each node has this computer's cores and two GPUs
that are none; nothing holds jobs to their share of either. A requeued job waits 5 s instead of two minutes.
"""

import ctypes
import getpass
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol")
NODES = ("n1", "n2")
PR_SET_PDEATHSIG = 1
CONFIG = """\
ClusterName=loopback
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort={port}
SlurmUser={user}
SlurmdUser={user}
AuthInfo=socket={folder}/munge.socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
SlurmdSpoolDir={folder}/%n
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
MpiDefault=none
ReturnToService=2
KillWait=10
SchedulerParameters=batch_sched_delay=0,sched_interval=1,bf_interval=1
GresTypes=gpu
PartitionName=all Nodes={nodes} Default=YES State=UP
"""
NODE = "NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs={cores} Gres=gpu:2\n"
GPUS = """\
AutoDetect=off
Name=gpu File=/dev/null Flags=nvidia_gpu_env
Name=gpu File=/dev/zero Flags=nvidia_gpu_env
"""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def end_with_parent() -> None:
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


class SlurmCluster:
    def __init__(self):
        self.folder = Path(tempfile.mkdtemp(prefix="slurm-"))
        self.folder.chmod(0o755)
        self.daemons: list[subprocess.Popen] = []

    def environment(self) -> dict[str, str]:
        return {"SLURM_CONF": str(self.folder / "slurm.conf")}

    def write_files(self) -> None:
        for name in ("state", *NODES):
            (self.folder / name).mkdir()
        (self.folder / "key").write_bytes(os.urandom(128))
        (self.folder / "key").chmod(0o600)
        here = dict(folder=self.folder, user=getpass.getuser(), nodes=",".join(NODES), port=free_port())
        node = dict(host=socket.gethostname(), cores=os.cpu_count())
        lines = [NODE.format(name=name, port=free_port(), **node) for name in NODES]
        (self.folder / "slurm.conf").write_text(CONFIG.format(**here) + "".join(lines))
        (self.folder / "gres.conf").write_text(GPUS)
        (self.folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")

    def __enter__(self) -> "SlurmCluster":
        try:
            self.write_files()
            files = [f"--{what}-file={self.folder}/{what}" for what in ("key", "pid", "log", "seed")]
            self.start("munged", "--foreground", "--force", f"--socket={self.folder}/munge.socket", *files)
            self.wait_for("munged", lambda: (self.folder / "munge.socket").exists())
            self.start("slurmctld", "-D", "-i")
            for node in NODES:
                self.start("slurmd", "-D", "-N", node)
            idle = ["idle", str(len(NODES))]
            self.wait_for("SLURM", lambda: self.ask("sinfo", "-h", "--format=%T %D").split() == idle)
        except BaseException:
            self.__exit__()
            raise
        return self

    def start(self, *command: str) -> None:
        with open(self.folder / f"{command[0]}.out", "ab") as log:
            process = subprocess.Popen(
                command,
                env=os.environ | self.environment(),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                preexec_fn=end_with_parent,
            )
        self.daemons.append(process)

    def wait_for(self, what: str, is_up: Callable[[], bool], seconds: float = 30) -> None:
        until = time.monotonic() + seconds
        while not is_up():
            if time.monotonic() > until or any(daemon.poll() is not None for daemon in self.daemons):
                lines = [line for path in self.folder.glob("*.out") for line in path.read_text().splitlines()]
                complaints = [line for line in lines if "error" in line.lower() or "fatal" in line]
                raise OSError(
                    f"{what} does not start here: {(complaints or lines or ['no reason given'])[-1]}"
                )
            time.sleep(0.2)

    def ask(self, *command: str) -> str:
        done = subprocess.run(command, env=os.environ | self.environment(), capture_output=True, text=True)
        return done.stdout

    def __exit__(self, *_) -> None:
        if len(self.daemons) == 2 + len(NODES):
            self.ask("scancel", f"--user={getpass.getuser()}")
            until = time.monotonic() + 30
            while self.ask("squeue", "--noheader") and time.monotonic() < until:
                time.sleep(0.2)
        for daemon in reversed(self.daemons):
            daemon.terminate()
            try:
                daemon.wait(10)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()
        shutil.rmtree(self.folder)


def main() -> None:
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.default_int_handler)
    with suppress(KeyboardInterrupt), SlurmCluster() as cluster:
        print(*(f"export {name}={value}" for name, value in cluster.environment().items()), sep="\n")
        print("# Ctrl-C cancels all jobs and ends this cluster", flush=True)
        signal.pause()


if __name__ == "__main__":
    try:
        main()
    except OSError as error:
        raise SystemExit(f"error: {error}") from None
