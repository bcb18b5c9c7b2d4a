"""A person's computer on which lambda_service.py runs against the cloud of fake_lambda_api.py, with a ledger of its own.

    with opened(checkout, folder, lost("launch"), train=training(steps=3)) as scene:
        tool = scene.train("--max-hours=1")
        scene.ended(tool, 0, "the training ended with exit code 0")

At the end of the block whoever is left must end what is left: `settle`. To be quick, the machine's python3 is a shell
script that makes environments out of nothing, and train.py is a few lines. Seconds are the tool's.
"""

import json
import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import fake_instances
import faults
from conftest import ROOT
from fake_lambda_api import StandIn
from faults import ALWAYS, Fault
from test_layout import MODULES, closure

from launch.lambda_api import CONSOLE
from launch.lambda_run import TAG

SECOND = 0.01  # real ones in one of the tool's
WANDB_KEY = f"wandb-secret-{secrets.token_hex(16)}"
NEEDED = (closure("lambda_service") | {"lambda_service"}) & MODULES.keys()
FILES = [
    *(str(MODULES[name].relative_to(ROOT)) for name in sorted(NEEDED)),
    *(
        f"{folder}/__init__.py"
        for folder in sorted({name.partition(".")[0] for name in NEEDED if "." in name})
    ),
    *(
        "launch/remote_run.sh",
        "requirements-dev.txt",
        "config/train_default.py",
        "data/arithmetic/prepare.py",
    ),
]


# ------------------------------------------------------------------------------------------------------------
# the machine's side


def training(steps: int = 3, code: int = 0, then: str = "", asked="asked.append(1)") -> str:
    """A train.py that prints a line a step, does `then`, saves and ends with `code`. When it is asked to stop it
    saves and ends with 0.
    """
    return f"""
import os, signal, sys, time
from pathlib import Path
out = Path(sys.argv[-1].removeprefix("--out_dir="))
asked = []
signal.signal(signal.SIGTERM, lambda *_: {asked})
for step in range({steps}):
    print("step", step, flush=True)
    with open(out / "metrics.jsonl", "a") as file:
        print(step, file=file)
    time.sleep(0.05)
    if asked:
        print("asked to stop: saved", flush=True)
        sys.exit(0)
{then}
(out / "result").write_text("done")
sys.exit({code})
"""


ENDLESS = training(steps=10**6)
DEAF = training(steps=10**6, asked="None")
PYTHON = """
case "$*" in
"-m venv"*) for folder; do :; done; mkdir -p "$folder/bin"; cp "$0" "$folder/bin/python" ;;
"-m pip install"*) {pip} ;;
"-m pip"*) ;;
"- "*.*) {has_torch} ;;
"- "*) {check_torch} ;;
*) exec {real} "$@" ;;
esac"""


def python(pip=":", has_torch=":", check_torch="echo 1 x nothing") -> Fault:
    """The machine's python3 and that of its environments. `- 2.6 cpu` asks whether there is a PyTorch as new as
    that, `- cpu` has it compute; everything else is for the real one.
    """
    known = dict(pip=pip, has_torch=has_torch, check_torch=check_torch, real=sys.executable)
    return faults.program("python3", PYTHON.format(**known))


# ------------------------------------------------------------------------------------------------------------
# the person's side


class Tool:
    """A lambda_service.py that runs, and what it has printed."""

    def __init__(self, argv: list[str], output: Path, **options):
        self.output = output
        with open(output, "wb") as file:
            given = dict(stdin=subprocess.DEVNULL, stdout=file, stderr=file) | options
            self.process = subprocess.Popen(argv, start_new_session=True, **given)

    @property
    def text(self) -> str:
        return self.output.read_text(errors="replace").replace("\r\n", "\n")

    def says(self, pattern: str, seconds: float = 30) -> None:
        """Waits until it has."""
        deadline = time.monotonic() + seconds
        while not re.search(pattern, self.text):
            ended = self.process.poll() is not None and not re.search(pattern, self.text)
            assert not ended and time.monotonic() < deadline, f"never said {pattern!r}:\n{self.text}"
            time.sleep(0.02)

    def signal(self, number: int) -> None:
        os.kill(self.process.pid, number)

    def ends(self, seconds: float = 60) -> int:
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"does not end:\n{self.text}") from None


class Scene:
    def __init__(self, folder: Path, cloud: StandIn):
        self.folder, self.cloud, self.tools = folder, cloud, []
        self.checkout, self.state, self.home = (folder / name for name in ("checkout", "state", "home"))

    # ------------------------------------------------------------------------------------ doing

    def start(self, *words: str, stdio: dict | None = None, **environment: str) -> Tool:
        own = {"HOME": self.home, "LAMBDA_STATE": self.state, "WANDB_API_KEY": WANDB_KEY}
        environment = {**os.environ, **self.cloud.environment(), **own, **environment}
        argv = [sys.executable, str(self.checkout / "lambda_service.py"), *words]
        output = self.folder / f"output-{len(self.tools)}"
        self.tools.append(Tool(argv, output, cwd=self.checkout, env=environment, **stdio or {}))
        return self.tools[-1]

    def train(self, *words: str, **more) -> Tool:
        return self.start("train", "config/train_default.py", "--device=cpu", *words, **more)

    def run(self, *words: str, **environment: str) -> tuple[int, str]:
        """Exit code and output of a command that ends by itself."""
        tool = self.start(*words, **environment)
        return tool.ends(), tool.text

    def kill_all(self) -> None:
        """The service and its watchdog, as when the computer is switched off."""
        for pid in self.processes():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        for tool in self.tools:
            tool.process.wait()

    # ------------------------------------------------------------------------------------ looking

    @property
    def ledger(self) -> dict:
        """Of the newest run; empty while there is none."""
        found = sorted(self.state.glob("*/run.json"), key=lambda path: path.parent.stat().st_ctime)
        return json.loads(found[-1].read_text()) if found else {}

    @property
    def results(self) -> Path:
        return Path(self.ledger["out_dir"])

    def kept(self, name: str) -> str:
        """A file of the newest run's folder in the ledger."""
        return (self.state / self.ledger["name"] / name).read_text(errors="replace")

    def ours(self) -> list[fake_instances.Instance]:
        """The machines that the tool has launched and that are not gone."""
        tagged = [each for each in self.cloud.running() if any(tag["key"] == TAG for tag in each.tags)]
        return [each for each in tagged if each.machine]

    def processes(self, word: str = "lambda_service.py") -> dict[int, str]:
        """The command lines that have the word, of programs which know our ledger."""
        found = {}
        for path in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):
                if f"LAMBDA_STATE={self.state}\0".encode() in (path / "environ").read_bytes():
                    found[int(path.name)] = (path / "cmdline").read_text().replace("\0", " ")
        return {pid: line for pid, line in found.items() if word in line}

    # ------------------------------------------------------------------------------------ judging

    def ended(self, tool: Tool, code: int, outcome: str, kept: bool = False) -> None:
        """The exit code, the outcome on one line, and what must be so in every case: nothing that was rented is
        left, or code 90 says so and the output names it. `kept` where a person wanted it left.
        """
        ended = tool.ends()
        assert ended == code, f"exit code {ended}, not {code}:\n{tool.text}"
        before = r"(?:\d\d:\d\d:\d\d |error: )?(?:the machine says: error: )?"
        said = re.findall(f"^{before}{outcome}", tool.text, re.MULTILINE)
        assert len(said) == 1, tool.text
        for instance in self.ours():
            if kept:
                assert re.search("the machine is kept until|detached; the machine", tool.text), tool.text
                continue
            assert code == 90, f"{instance.status(self.cloud.now())} after exit code {code}:\n{tool.text}"
            warning = re.search("A MACHINE MAY STILL BE RUNNING: .*", tool.text)[0]
            for fact in (instance.name, instance.id, "0.75", CONSOLE, f"terminate {instance.name}"):
                assert fact in warning
        assert "Traceback" not in tool.text
        assert not self.cloud.violations, self.cloud.violations
        for hidden in (*self.cloud.hidden(), WANDB_KEY):
            assert hidden not in tool.text

    def settle(self, seconds: float = 20) -> None:
        """All is well with the service again: the watchdog ends what is left, makes no mistake, and goes."""
        self.cloud.faults.clear()
        for instance in self.cloud.instances:
            instance.lingers = 0
        self.cloud.wait(lambda: not self.ours(), seconds)
        is_known = not self.ledger or self.ledger["instance_id"] or not self.ledger["launched"]
        if is_known:  # otherwise it looks for half an hour
            self.cloud.wait(lambda: not self.processes("lambda_service.py watch"), seconds)
            phases = [json.loads(path.read_text())["phase"] for path in self.state.glob("*/run.json")]
            assert set(phases) <= {"gone"}, phases
        for path in self.state.glob("*/*.log"):
            assert "Traceback" not in path.read_text(), path.read_text()


def make_checkout(folder: Path) -> Path:
    """What a person has cloned, as far as the tool looks at it."""
    for name in FILES:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / name)
    (folder / "train.py").write_text(training())
    commit(folder)
    return folder


def commit(folder: Path) -> None:
    author = ["-c", "user.name=me", "-c", "user.email=me@localhost"]
    for words in (["init", "-q", "--template="], ["add", "-A"], [*author, "commit", "-q", "-m", "all"]):
        subprocess.run(["git", *words], cwd=folder, check=True)


@contextmanager
def opened(
    checkout: Path, folder: Path, *given: Fault, train: str = training(), second: float = SECOND
) -> Iterator[Scene]:
    shutil.copytree(checkout, folder / "checkout")
    (folder / "checkout/train.py").write_text(train)
    (folder / "home").mkdir()
    brief = faults.born(times=ALWAYS, boot=20, address=10)
    with StandIn(second, [brief, python(), *given]) as cloud:
        scene = Scene(folder, cloud)
        try:
            yield scene
            scene.settle()
        finally:
            scene.kill_all()
