"""`python lambda_service.py`, as a person runs it, against a cloud on loopback, a real ssh server and real rsync.

Whatever goes wrong: at the end nothing that was rented is left, or the tool said so with exit code 90 and named it
(`Scene.ended`), and a watchdog that is left ends it (`Scene.settle`). dev/FAULTS.md is the table of it in words.
"""

import json
import os
import pty
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from copy import deepcopy
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import fake_instances
import faults
import pytest
import ssh_server
from conftest import IMPOSSIBLE, ROOT
from faults import (
    ALWAYS,
    Fault,
    arm64,
    bad_gateway,
    bad_key,
    connection_dropped,
    cuda_broken,
    cut_off,
    delayed,
    disk_full,
    done_and_bad_gateway,
    forbidden,
    host_key_replaced,
    hung_up,
    inactive,
    internal_error,
    lingers,
    lost,
    no_address,
    no_capacity,
    no_rsync,
    offline,
    over_quota,
    portal,
    preempted,
    redirected,
    rsync_partial,
    rsync_torn,
    seen_late,
    sold_out,
    ssh_denied,
    ssh_refused,
    stuck_booting,
    terminate_fails,
    too_many,
    too_many_says_proxy,
    truncated,
    unhealthy,
    unknown_at_first,
    unreachable,
    wrong_shape,
)
from scenario import (
    DEAF,
    ENDLESS,
    SECOND,
    WANDB_KEY,
    Scene,
    Tool,
    commit,
    make_checkout,
    opened,
    python,
    training,
)

from configurator import parse
from launch import upload
from launch.lambda_run import TAG
from training.train_config import TrainConfig

pytestmark = pytest.mark.skipif(bool(ssh_server.missing()), reason=str(ssh_server.missing()))
slow = pytest.mark.slow
AT_ONCE = 3  # scenarios; they wait more than they work
FOREVER = 10**9
ENDS = "the training ended with exit code 0$"
LEFT = "A MACHINE MAY STILL BE RUNNING"


@pytest.fixture(scope="session")
def checkout(tmp_path_factory):
    return make_checkout(tmp_path_factory.mktemp("checkout"))


@pytest.fixture
def scene(checkout, tmp_path):
    """scene(fault, ..., train=SOURCE) is a Scene; for a with block."""
    return partial(opened, checkout, tmp_path)


needs_mount = pytest.mark.skipif(
    not fake_instances.may_mount(), reason="small disks are tmpfs, which only root may mount"
)

# ------------------------------------------------------------------------------------------------------------
# what may be so at the end


def whole(scene: Scene, tool: Tool) -> None:
    """All that the training printed was shown and kept once, and what it saved is here."""
    log = scene.kept("train.log")
    printed = [line for line in tool.text.splitlines() if re.fullmatch(r"step \d+", line)]
    assert printed == [line for line in log.splitlines() if line.startswith("step")]
    assert printed == [f"step {step}" for step in range(len(printed))]
    assert (scene.results / "result").read_text() == "done"
    assert len((scene.results / "metrics.jsonl").read_text().split()) == len(printed)


def saved(scene: Scene, tool: Tool) -> None:
    """The training could save before it was stopped, and that is here."""
    assert "asked to stop: saved" in tool.text and "asked to stop: saved" in scene.kept("train.log")
    steps = (scene.results / "metrics.jsonl").read_text().split()
    assert steps == [str(step) for step in range(len(steps))] and steps


def fetched(scene: Scene, tool: Tool) -> None:
    assert (scene.results / "metrics.jsonl").read_text().startswith("0\n1\n")


def nothing_asked(scene: Scene, tool: Tool) -> None:
    assert not scene.cloud.asked("launch")


def launches(count: int) -> Callable[[Scene, Tool], None]:
    def check(scene: Scene, tool: Tool) -> None:
        assert len(scene.cloud.asked("launch")) == count

    return check


def image_is(family: str) -> Callable[[Scene, Tool], None]:
    def check(scene: Scene, tool: Tool) -> None:
        [call] = scene.cloud.asked("launch")
        assert json.loads(call.body)["image"] == {"family": family}

    return check


def kill_sessions(machine: ssh_server.Sshd) -> None:
    ssh_server.kill([pid for pid in machine.processes() if pid != machine.listener])


def bill_is_at_most(dollars: float) -> Callable[[Scene, Tool], None]:
    def check(scene: Scene, tool: Tool) -> None:
        assert scene.cloud.bill() <= dollars

    return check


def size_is(size: int) -> Callable[[Scene, Tool], None]:
    def check(scene: Scene, tool: Tool) -> None:
        assert (scene.results / "big").stat().st_size == size

    return check


# ------------------------------------------------------------------------------------------------------------
# what goes wrong by itself


@dataclass
class Case:
    """`also` is what must be so besides: functions of the Scene and the Tool."""

    code: int
    outcome: str  # a pattern that one line of the output has
    faults: list[Fault] = field(default_factory=list)
    options: list[str] = field(default_factory=list)
    train: str = training()
    also: list[Callable[[Scene, Tool], None]] = field(default_factory=list)
    second: float = SECOND
    needs_mount: bool = False


SHORT = ["--boot-timeout=2"]
NARROW = ["--instance=gpu_1x_a10", "--region=us-east-1"]
PIP_FAILS = "echo 'ERROR: No matching distribution found for torch>=2.6' >&2; exit 1"
ROOMY = faults.program("df", "printf 'Filesystem 1K Used Available\\nx 9 9 99999999 1%% /\\n'")
FILL = """
try:
    (out / "big").write_bytes(bytes(50 << 20))
except OSError as error:
    sys.exit(str(error))
"""
SERVICE = {
    "401 from the start": Case(2, ".*check LAMBDA_API_KEY", [bad_key()], also=[nothing_asked]),
    "401 once it is launched": Case(
        90, LEFT, [faults.refused(401, "global/invalid-api-key", skip=6)], second=0.004
    ),
    "403 account inactive": Case(91, ".*the account cannot rent", [inactive()], also=[launches(1)]),
    "403 forbidden": Case(91, ".*this key may not do that", [forbidden()], also=[launches(1)]),
    "quota exceeded": Case(91, ".*terminate a machine, or ask", [over_quota()], also=[launches(1)]),
    "429 with Retry-After": Case(0, ENDS, [too_many(times=4, retry_after=7, skip=2)], also=[whole]),
    "429 with a date": Case(0, ENDS, [too_many(retry_after=7, as_date=True)], also=[whole]),
    "429 without Retry-After": Case(0, ENDS, [too_many(times=3)], also=[whole]),
    "429 from a proxy": Case(0, ENDS, [too_many_says_proxy(times=3)], also=[whole]),
    "429 for the launch": Case(0, ENDS, [too_many("launch", 2, retry_after=15)], also=[launches(3), whole]),
    "429 for terminate": Case(0, ENDS, [too_many("terminate", 2, retry_after=15)], also=[whole]),
    "500": Case(0, ENDS, [internal_error("list", times=3, skip=2)], also=[whole]),
    "502 in HTML": Case(0, ENDS, [bad_gateway("any", times=3)], also=[whole]),
    "truncated JSON": Case(0, ENDS, [truncated("list", times=3)], also=[whole]),
    "answers of another shape": Case(91, ".*expected a list", [wrong_shape("list")], also=[nothing_asked]),
    "answers cut off": Case(0, ENDS, [cut_off("list", times=3)], also=[whole]),
    "a hotel's page": Case(0, ENDS, [portal("any", times=2)], also=[whole]),
    "a redirect": Case(2, ".*a redirect, which is not followed", [redirected()], also=[nothing_asked]),
    "offline for five minutes while it boots": Case(0, ENDS, [offline(300, skip=7)], also=[whole]),
    "offline for five minutes while it trains": Case(
        0, ENDS, [offline(300, skip=12)], train=training(steps=60), also=[whole]
    ),
}
LAUNCH = {
    "no capacity twice": Case(
        0, ENDS, [no_capacity(2)], [*NARROW, "--wait-capacity=5"], also=[launches(3), whole]
    ),
    "no capacity for the first choice": Case(
        0, ENDS, [no_capacity(1)], ["--instance=gpu_1x_a100_sxm4,gpu_1x_a10"], also=[launches(2), whole]
    ),
    "no capacity ever": Case(
        91,
        "no capacity anywhere: see --instance, --region and --wait-capacity$",
        [no_capacity(ALWAYS)],
        ["--wait-capacity=1"],
    ),
    "sold out": Case(91, "no capacity for that now", [sold_out(FOREVER)], also=[nothing_asked]),
    "sold out for a minute": Case(0, ENDS, [sold_out(150)], ["--wait-capacity=5"], also=[launches(1), whole]),
    "launch answered with 500": Case(
        90, f"{LEFT}.*unknown id", [internal_error("launch")], also=[launches(1)]
    ),
    "launch answered with 429 by a proxy": Case(
        90, f"{LEFT}.*unknown id", [too_many_says_proxy("launch")], also=[launches(1)], second=0.004
    ),
    "launch done and answered with 502": Case(0, ENDS, [done_and_bad_gateway()], also=[launches(1), whole]),
    "launch done, its answer lost": Case(0, ENDS, [lost("launch")], also=[launches(1), whole]),
    "launch done, its answer truncated": Case(0, ENDS, [truncated("launch")], also=[launches(1), whole]),
    "launch done, answer lost, listed late": Case(
        0, ENDS, [lost("launch"), seen_late(100)], also=[launches(1), whole]
    ),
    "launch done, answer lost, then offline": Case(
        0, ENDS, [lost("launch"), offline(150, "list", skip=1)], also=[launches(1), whole]
    ),
    "launch not done, connection lost": Case(
        90, f"{LEFT}.*unknown id", [hung_up("launch")], also=[launches(1)], second=0.004
    ),
    "launched twice under one name": Case(
        92, "2 machines came of one request", [Fault("launch", lambda call: call.do() and call.do() and None)]
    ),
    "listed late": Case(0, ENDS, [seen_late(100)], also=[whole]),
    "unknown at first, to be terminated": Case(
        92, "not active after", [unknown_at_first(170), stuck_booting()], ["--boot-timeout=0.5"]
    ),
}
MACHINE = {
    "stuck booting": Case(92, "not active after 2 min", [stuck_booting()], SHORT),
    "unhealthy from the start": Case(92, "the machine is unhealthy", [unhealthy()]),
    "unhealthy while it trains": Case(
        92, "the machine is unhealthy", [unhealthy(200)], [], ENDLESS, [fetched]
    ),
    "preempted while it boots": Case(92, "the machine is preempted", [preempted(0)]),
    "preempted while it trains": Case(92, "the machine is preempted", [preempted(200)], train=ENDLESS),
    "preempted, and it cannot be terminated": Case(
        92, "the machine is preempted", [preempted(0), faults.refused(400, "global/conflict", "terminate")]
    ),
    "no address": Case(92, "not active after 2 min", [no_address()], SHORT),
    "ssh refused for a minute": Case(0, ENDS, [ssh_refused(60)], also=[whole]),
    "ssh refused for ever": Case(92, "not reachable in time: .*refused", [ssh_refused(FOREVER)], SHORT),
    "ssh: authentication refused for a minute": Case(0, ENDS, [ssh_denied(60)], also=[whole]),
    "ssh: another host key": Case(
        92, "the host key of .* is not the one", [host_key_replaced(150)], train=ENDLESS
    ),
    "no GPU": Case(92, "no GPU answers", [faults.program("nvidia-smi", "exit 9")], ["--device=auto"]),
    "CUDA broken": Case(
        92,
        "PyTorch does not compute: RuntimeError: CUDA unknown error",
        [cuda_broken(), python(check_torch="echo 'RuntimeError: CUDA unknown error' >&2; exit 1")],
        ["--device=auto"],
    ),
    "disk full at the upload": Case(
        92, ".*(No space left|full disk).*: free some space$", [disk_full(0.05)], needs_mount=True
    ),
    "disk too small for the setup": Case(
        92, ".*disk is full: .* 2 GiB are needed", [disk_full(40)], needs_mount=True
    ),
    "disk full while it trains": Case(
        1,
        "the training ended with exit code 1",
        [disk_full(12), ROOMY],
        train=training(then=FILL),
        also=[fetched, lambda scene, tool: tool.says("No space left on device")],
        needs_mount=True,
    ),
    "arm64": Case(
        0,
        "1 x nothing; aarch64",
        [arm64()],
        ["--instance=gpu_1x_gh200"],
        also=[image_is("lambda-stack-24-04-arm"), whole],
    ),
    "arm64 without PyTorch": Case(
        92,
        "no torch>=2.6 .* for aarch64: ERROR: No matching distribution",
        [arm64(), ROOMY, python(PIP_FAILS, has_torch="exit 1")],
    ),
    "pip fails": Case(92, "pip: ERROR: No matching", [python(PIP_FAILS)]),
}
TRAINING = {
    "exit code 0": Case(0, ENDS, also=[image_is("lambda-stack-24-04"), whole]),
    "exit code 1": Case(1, "the training ended with exit code 1", train=training(code=1), also=[whole]),
    "killed, exit code 137": Case(
        137,
        "the training ended with exit code 137",
        train=training(then="os.kill(os.getpid(), 9)"),
        also=[fetched],
    ),
    "everything on the machine killed": Case(
        137, "the training ended with exit code 137", [faults.event(200, kill_sessions)], [], ENDLESS
    ),
    "connection dropped while it uploads or sets up": Case(
        0, ENDS, [connection_dropped(120), python(check_torch="sleep 1.5; echo 1 x nothing")], also=[whole]
    ),
    "connection dropped while it trains": Case(
        0, ENDS, [connection_dropped(150), connection_dropped(200)], [], training(60), [whole]
    ),
    "unreachable for a while": Case(0, ENDS, [unreachable(150, 150)], [], training(40), [whole]),
    "the time is up": Case(93, "the time is up$", [], ["--max-hours=0.2"], ENDLESS, [saved], second=0.02),
    "the time is up, and the training does not stop": Case(
        93, "the time is up$", [], ["--max-hours=0.2"], DEAF, [fetched], second=0.02
    ),
    "the time is up while it sets up": Case(
        93, "out of time", [python(check_torch="sleep 60")], ["--max-hours=0.05"]
    ),
    "the money is spent": Case(
        93,
        "the time is up$",
        [],
        ["--max-cost=0.15"],
        ENDLESS,
        [saved, lambda scene, tool: tool.says("at most 0.2 hours, .0.15;"), bill_is_at_most(0.15)],
        second=0.02,
    ),
}
FETCHING = {
    "rsync partial at the upload": Case(0, ENDS, [rsync_partial(23)], also=[whole]),
    "rsync vanished files": Case(0, ENDS, [rsync_partial(24, skip=1)], also=[whole]),
    "rsync partial, again and again": Case(
        94, "not everything was fetched", [rsync_partial(23, ALWAYS, skip=1)], second=0.004
    ),
    "rsync partial now and then while it trains": Case(
        0, ENDS, [rsync_partial(23, 4, skip=1)], ["--pull-every=0.5"], training(60), [whole]
    ),
    "upload torn": Case(0, ENDS, [rsync_torn(16, times=2)], also=[whole]),
    "fetch torn": Case(
        0,
        ENDS,
        [rsync_torn(100, times=3, skip=1)],
        train=training(then="(out / 'big').write_bytes(os.urandom(400_000))"),
        also=[whole, size_is(400_000)],
    ),
    "no rsync on the machine": Case(92, "rsync is not installed on the machine", [no_rsync()]),
}
TERMINATING = {
    "terminate fails three times": Case(0, ENDS, [terminate_fails(3)], also=[whole]),
    "terminate fails for ever": Case(90, LEFT, [terminate_fails(ALWAYS)], also=[whole], second=0.005),
    "terminate done, its answer lost": Case(0, ENDS, [lost("terminate")], also=[whole]),
    "terminate accepted, active for two minutes more": Case(0, ENDS, [lingers(120)], also=[whole]),
    "terminate accepted, active for ever": Case(90, LEFT, [lingers(FOREVER)], also=[whole], second=0.005),
    "offline from the training on": Case(
        90, LEFT, [offline(FOREVER, skip=12)], ["--max-hours=0.12"], ENDLESS
    ),
}
CASES = SERVICE | LAUNCH | MACHINE | TRAINING | FETCHING | TERMINATING


def play_case(scene, case: Case) -> None:
    if case.needs_mount and not fake_instances.may_mount():
        pytest.skip("small disks are tmpfs, which only root may mount")
    with scene(*deepcopy(case.faults), train=case.train, second=case.second) as there:
        tool = there.train(*case.options)
        there.ended(tool, case.code, case.outcome)
        for check in case.also:
            check(there, tool)


# ------------------------------------------------------------------------------------------------------------
# what comes from outside, at any moment: signals, and the end of the program


@dataclass
class Moment:
    """`comes` waits for it. `code` and `outcome` are those of a run that is asked to stop then."""

    comes: Callable[[Scene, Tool], None]
    faults: list[Fault] = field(default_factory=list)
    options: list[str] = field(default_factory=list)
    train: str = training()
    code: int = 130
    outcome: str = "stopped by a signal$"
    also: list[Callable[[Scene, Tool], None]] = field(default_factory=list)


def says(pattern: str) -> Callable[[Scene, Tool], None]:
    return lambda scene, tool: tool.says(pattern)


def asks(kind: str) -> Callable[[Scene, Tool], None]:
    return lambda scene, tool: scene.cloud.wait(lambda: scene.cloud.asked(kind))


slow_fetch = faults.program("rsync", faults.counted(ALWAYS, 1, 'sleep 1; exec "$real" "$@"'))
MOMENTS = {
    "waiting for capacity": Moment(
        says("no capacity anywhere"), [sold_out(FOREVER)], ["--wait-capacity=60"], also=[nothing_asked]
    ),
    "before the launch": Moment(asks("images"), [delayed(60, "images")], also=[nothing_asked]),
    "launching": Moment(asks("launch"), [delayed(60, "launch")], also=[launches(1)]),
    "booting": Moment(says("to boot"), [stuck_booting()]),
    "waiting for ssh": Moment(says("not reachable yet"), [ssh_refused(FOREVER)]),
    "uploading": Moment(says("uploading"), [faults.program("rsync", "sleep 60")]),
    "setting up": Moment(says("installing"), [python(check_torch="sleep 60")]),
    "training": Moment(says("step 2"), train=ENDLESS, also=[saved]),
    "fetching": Moment(says("exit code 0"), [slow_fetch], code=0, outcome=ENDS, also=[whole]),
    "terminating": Moment(asks("terminate"), [lingers(60)], code=0, outcome=ENDS, also=[whole]),
}
SIGNALS = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]


def play_signal(scene, moment: Moment, number: int) -> None:
    with scene(*deepcopy(moment.faults), train=moment.train) as there:
        tool = there.train(*moment.options)
        moment.comes(there, tool)
        tool.signal(number)
        there.ended(tool, moment.code, moment.outcome)
        for check in moment.also:
            check(there, tool)


def play_two_signals(scene, name: str) -> None:
    """The second asks to terminate now: nothing is fetched any more."""
    moment = MOMENTS[name]
    with scene(
        *deepcopy(moment.faults), lingers(100), train=DEAF if name == "training" else moment.train
    ) as there:
        tool = there.train(*moment.options)
        moment.comes(there, tool)
        tool.signal(signal.SIGINT)
        time.sleep(0.7)  # one within half a second is thought to be the same
        tool.signal(signal.SIGINT)
        code = 0 if name == "terminating" else 130
        there.ended(
            tool,
            code,
            "terminated at once, as asked: nothing more is fetched$"
            if name == "training"
            else moment.outcome,
        )
        if name in ("training", "fetching"):
            assert not there.results.exists()
        if name == "fetching":
            assert "not everything was fetched: terminated at once, as asked" in tool.text


def play_two_kinds_of_signal(scene) -> None:
    """A terminal that is closed may send INT or TERM, and HUP, and HUP again: that is one wish."""
    saves_long = training(steps=10**6, asked="asked.append(time.sleep(1.5))")
    with scene(train=saves_long) as there:
        tool = there.train()
        tool.says("step 2")
        for number in (signal.SIGHUP, signal.SIGTERM, signal.SIGINT):
            tool.signal(number)
        time.sleep(0.7)
        tool.signal(signal.SIGTERM)
        tool.signal(signal.SIGHUP)
        there.ended(tool, 130, "stopped by a signal$")
        saved(there, tool)


KILLS = MOMENTS | {
    "the launch that is not done": Moment(
        asks("launch"), [Fault("launch", lambda call: call.cloud.sleep(100))]
    ),
    "training": Moment(says("step 2"), [], ["--boot-timeout=1"], training(steps=50)),  # long after the boot
}


def play_kill(scene, name: str) -> None:
    """The watchdog sees to it: a training that runs is followed to its end, everything else is terminated."""
    moment = KILLS[name]
    with scene(*deepcopy(moment.faults), train=moment.train) as there:
        tool = there.train(*moment.options)
        moment.comes(there, tool)
        tool.signal(signal.SIGKILL)
        assert tool.ends() == -signal.SIGKILL
        there.settle()
        assert len(there.cloud.instances) == len(there.cloud.asked("launch")) - (
            name == "the launch that is not done"
        )
        if name in ("training", "fetching", "terminating"):
            assert (there.results / "result").read_text() == "done"
            log = there.kept("train.log").splitlines()
            assert log == [f"step {step}" for step in range(len(log))] and log
            assert name == "terminating" or there.ledger["code"] == 0


# ------------------------------------------------------------------------------------------------------------
# with nothing left out


REAL = faults.program("python3", f'exec {sys.executable} "$@"')
TINY = "--max_iters=20 --eval_interval=10 --eval_iters=1 --eval_problems=4 --batch_size=4 --block_size=64"


def play_all(scene) -> None:
    """The whole repository goes to the machine, which makes its environment and data, and trains a model."""
    words = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    with scene(deepcopy(REAL)) as there:
        for name in listed.split("\0"):
            if (ROOT / name).is_file():
                (there.checkout / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(ROOT / name, there.checkout / name)
        commit(there.checkout)
        tool = there.train(*TINY.split(), "--n_layer=1", "--n_embd=32", "--n_head=2")
        tool.ends(300)
        there.ended(tool, 0, ENDS)
        metrics = (there.results / "metrics.jsonl").read_text().splitlines()
        assert json.loads(metrics[-1])["step"] == 20
        words = [f"--out_dir={there.results}", "--start=1+1=", "--max_new_tokens=4", "--device=cpu"]
        speaks = subprocess.run([sys.executable, ROOT / "sample.py", *words], capture_output=True, text=True)
        assert speaks.returncode == 0 and speaks.stdout.strip(), speaks.stderr


PLAYS = {"a model is trained on the machine and speaks here": play_all}
PLAYS |= {name: partial(play_case, case=case) for name, case in CASES.items()}
PLAYS |= {
    f"{number.name.removeprefix('SIG')} while {name}": partial(play_signal, moment=moment, number=number)
    for name, moment in MOMENTS.items()
    for number in SIGNALS
}
PLAYS |= {f"two INT while {name}": partial(play_two_signals, name=name) for name in list(MOMENTS)[2:]}
PLAYS |= {"HUP, TERM and INT at once": play_two_kinds_of_signal}
PLAYS |= {f"kill -9 while {name}": partial(play_kill, name=name) for name in KILLS}
QUICK = [
    *(
        "launch done, its answer lost",
        "ssh: authentication refused for a minute",
        "terminate fails three times",
    ),
    *("exit code 1", "terminate accepted, active for ever", "kill -9 while launching"),
    *("INT while training", "TERM while setting up", "two INT while training"),
]
NAMES = [pytest.param(name, marks=[] if name in QUICK else slow, id=name.replace(" ", "_")) for name in PLAYS]


@pytest.fixture(scope="session")
def played(request, checkout, tmp_path_factory):
    """The futures of those plays that are asked for, by name; AT_ONCE of them run."""

    def play(name: str) -> None:
        PLAYS[name](partial(opened, checkout, tmp_path_factory.mktemp("scene")))

    items = [getattr(item, "callspec", None) for item in request.session.items]
    chosen = [item.params["play"] for item in items if item and "play" in item.params]
    pool = ThreadPoolExecutor(AT_ONCE)
    yield {name: pool.submit(play, name) for name in chosen}
    pool.shutdown(cancel_futures=True)


@pytest.mark.parametrize("play", NAMES)
def test_it_ends_well(played, play):
    played[play].result()


def test_the_quick_ones_exist():
    assert set(QUICK) <= set(PLAYS)


# ------------------------------------------------------------------------------------------------------------
# before anything is rented


@slow
def test_ctrl_c_before_anything_was_launched(scene):
    with scene(delayed(FOREVER, "types")) as there:
        tool = there.train()
        asks("types")(there, tool)
        tool.signal(signal.SIGINT)
        assert (tool.ends(), tool.text) == (130, "")


def test_types_and_doctor_spend_nothing(scene):
    with scene() as there:
        code, text = there.run("types", "--json")
        assert code == 0 and [kind["name"] for kind in json.loads(text)][:2] == [
            "cpu_4x_general",
            "gpu_1x_rtx6000",
        ]
        code, text = there.run("doctor", "config/train_default.py", "--json")
        assert code == 0 and all(check["ok"] for check in json.loads(text)), text
        there.cloud.faults.append(bad_key())
        code, text = there.run("doctor", "config/train_default.py")
        assert code == 1 and re.search("^FAILED +LAMBDA_API_KEY .*check LAMBDA_API_KEY", text, re.MULTILINE)
        assert {call.method for call in there.cloud.requests} == {"GET"}


@pytest.mark.parametrize("flags, complaint", IMPOSSIBLE)
def test_settings_that_train_refuses_are_refused_in_the_same_words(flags, complaint):
    messages = []
    for read in (partial(parse, TrainConfig), upload.training):
        with pytest.raises(ValueError) as refusal:
            read(["config/train_default.py", *flags])
        messages.append(str(refusal.value))
    assert messages[0] == messages[1] and complaint in messages[0]


def test_the_doctor_refuses_them_too(scene):
    with scene() as there:
        code, text = there.run("doctor", "config/train_default.py", "--dag_fold=value")
        assert code == 1 and "dag_fold is 'value'; choose from digits" in text
        assert {call.method for call in there.cloud.requests} == {"GET"}


def test_what_is_wrong_with_a_command_is_said_before_money_is_spent(scene):
    with scene() as there:
        for words, complaint in {
            ("--max_iter=3",): "unknown key 'max_iter', did you mean 'max_iters'",
            ("--dag_ops=plus",): "dag_ops names 'plus'; choose from add, subtract",
            ("--max-hours=0",): "expected a number above 0",
            ("--instance=gpu_1x_h1000",): "no instance type 'gpu_1x_h1000'",
            ("--identity=/nowhere",): "/nowhere: no such file",
        }.items():
            tool = there.train(*words)
            assert tool.ends() == 2 and complaint in tool.text and "Traceback" not in tool.text
        nothing_asked(there, tool)
        assert there.ledger == {}


@slow
def test_a_dry_run_asks_for_nothing_and_shows_no_secret(scene):
    with scene() as there:
        there.ended(there.train("--dry-run"), 0, "POST /instance-operations/launch ")
        assert {call.method for call in there.cloud.requests} == {"GET"}
        assert there.ledger == {} and not any((there.checkout / "out").iterdir())


@slow
def test_nothing_is_launched_without_a_watchdog(scene, tmp_path):
    (tmp_path / "sitecustomize.py").write_text("import os, sys\n'watch' in sys.orig_argv and os._exit(1)")
    with scene() as there:
        tool = there.train(PYTHONPATH=str(tmp_path))
        there.ended(tool, 91, "nothing is launched: the watchdog does not start")
        nothing_asked(there, tool)


@slow
@needs_mount
def test_nothing_is_launched_that_cannot_be_written_down(scene, tmp_path):
    def fill(call):
        fill_up(tmp_path / "state")
        return call.do()

    with small_disk(tmp_path / "state"), scene(Fault("images", fill)) as there:
        tool = there.train()
        there.ended(tool, 91, "the ledger cannot be written: No space left on device")
        nothing_asked(there, tool)
        (tmp_path / "state/filler").unlink()
        assert there.run("gc", "--yes")[0] == 0


# ------------------------------------------------------------------------------------------------------------
# disks here


@contextmanager
def small_disk(folder: Path, mib: float = 1):
    folder.mkdir(parents=True)
    fake_instances.mount(folder, mib)
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def fill_up(folder: Path) -> None:
    with suppress(OSError), open(folder / "filler", "wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))


@slow
@needs_mount
def test_a_full_disk_here_loses_what_does_not_fit_and_the_machine_is_terminated(scene, tmp_path):
    source = training(then="(out / 'big').write_bytes(os.urandom(3 << 20))")
    with scene(train=source, second=0.004) as there:
        with small_disk(there.checkout / "out"):
            tool = there.train()
            there.ended(tool, 94, "not everything was fetched: .*No space left on device.*free some space$")
            assert there.kept("train.log") == "step 0\nstep 1\nstep 2\n"


@slow
@needs_mount
def test_a_ledger_that_cannot_be_written_any_more_keeps_nothing_from_ending(scene, tmp_path):
    with small_disk(tmp_path / "state"), scene(train=training(steps=30)) as there:
        tool = there.train()
        tool.says("step 2")
        fill_up(there.state)
        there.ended(tool, 0, ENDS)
        assert "the ledger cannot be written (No space left on device): do not end this program" in tool.text
        assert (there.results / "result").read_text() == "done"
        (there.state / "filler").unlink()
        assert there.run("gc", "--yes")[0] == 0


# ------------------------------------------------------------------------------------------------------------
# nobody is there any more


@slow
def test_the_watchdog_looks_half_an_hour_for_what_may_have_been_launched(scene):
    with scene(Fault("launch", lambda call: call.cloud.sleep(100)), second=0.005) as there:
        tool = there.train()
        asks("launch")(there, tool)
        tool.signal(signal.SIGKILL)
        there.cloud.wait(lambda: there.ledger["phase"] == "gone", 20)
        assert there.cloud.now() > 30 * 60
        there.cloud.wait(lambda: not there.processes())


@slow
def test_the_watchdog_terminates_at_the_deadline_though_the_service_is_stopped(scene):
    with scene(train=ENDLESS) as there:
        tool = there.train("--max-hours=0.1")
        tool.says("step 2")
        tool.signal(signal.SIGSTOP)
        deadline = there.cloud.instances[0].launched + 360
        there.cloud.wait(lambda: not there.ours(), 20)
        assert deadline < there.cloud.instances[0].ended < deadline + 200
        tool.signal(signal.SIGCONT)
        there.ended(tool, 93, "out of time$")


@slow
def test_a_watchdog_that_was_killed_is_started_again(scene):
    with scene(train=ENDLESS) as there:
        tool = there.train()
        tool.says("step 2")
        [first] = there.processes("lambda_service.py watch")
        os.kill(first, signal.SIGKILL)
        there.cloud.wait(lambda: there.processes("lambda_service.py watch").keys() - {first})
        tool.signal(signal.SIGKILL)
        there.cloud.wait(lambda: there.ledger["phase"] == "training" and len(there.kept("train.log")) > 200)
        [second] = there.processes("lambda_service.py watch")
        os.kill(
            second, signal.SIGTERM
        )  # as when the computer shuts down: it ends its run, as the service would
        there.settle()
        assert (there.results / "metrics.jsonl").exists() and there.ledger["code"] == 130


def test_after_everything_was_killed_gc_ends_what_is_left(scene):
    with scene(train=ENDLESS) as there:
        there.train().says("step 2")
        there.kill_all()
        [row] = json.loads(there.run("list", "--json")[1])
        assert (row["keeper"], row["phase"]) == ("NOBODY: attach, or gc", "training")
        code, text = there.run("gc", "--yes")
        assert code == 0 and "the machine is gone" in text and not there.ours()
        assert there.run("gc") == (0, "nothing is left over\n")
        assert there.run("list") == (0, "no machine is running\n")


@slow
def test_after_everything_was_killed_attach_goes_on_where_it_was(scene):
    with scene(train=training(steps=60, code=3)) as there:
        first = there.train()
        first.says("step 2")
        there.kill_all()
        with open(there.state / there.ledger["name"] / "train.log", "a") as log:
            log.write("written, and not noted in the ledger any more\n")
        second = there.start("attach")
        there.ended(second, 3, "the training ended with exit code 3$")
        assert there.kept("train.log").splitlines() == [f"step {step}" for step in range(60)]
        assert (there.results / "result").read_text() == "done"
        assert there.run("logs") == (0, there.kept("train.log"))


@slow
def test_a_damaged_ledger_is_named_and_its_machine_can_be_terminated(scene):
    with scene(train=ENDLESS) as there:
        there.train().says("step 2")
        there.kill_all()
        [machine] = there.ours()
        path = there.state / there.ledger["name"] / "run.json"
        path.write_text(path.read_text()[:100])
        assert f"damaged: {path.parent}; its machine, if any, is named {machine.name}" in there.run("list")[1]
        assert there.run("terminate", machine.name, "--yes")[0] == 0 and not there.ours()
        path.unlink()


@slow
def test_attach_watches_what_a_watchdog_looks_after(scene):
    with scene(train=training(steps=80)) as there:
        there.ended(
            there.train("--detach"), 0, "detached; the machine is terminated after the training", kept=True
        )
        there.cloud.wait(lambda: "watchdog" in there.run("list")[1])
        leaves = there.start("attach")
        leaves.says("step 5")
        leaves.signal(signal.SIGINT)
        assert leaves.ends() == 0 and there.ours()
        stays = there.start("attach")
        there.ended(stays, 0, ENDS)
        assert (there.results / "result").read_text() == "done"


# ------------------------------------------------------------------------------------------------------------
# what a person asks for


@slow
def test_keep_leaves_the_machine_until_the_deadline(scene):
    with scene() as there:
        tool = there.train("--keep", "--max-hours=0.25", "--boot-timeout=1")
        there.ended(tool, 0, "the machine is kept until", kept=True)
        name = there.ledger["name"]
        assert there.run("ssh", name, "echo", "$HOME")[1] == f"{there.cloud.homes[0]}\n"
        shutil.rmtree(there.results)
        assert there.run("pull")[0] == 0 and (there.results / "result").exists()
        there.kill_all()
        attached = there.start("attach")
        attached.says("is looked after")
        attached.signal(signal.SIGINT)
        assert attached.ends() == 0 and there.ours()
        there.settle()
        kept = there.cloud.instances[0].ended - there.cloud.instances[0].launched
        assert 900 <= kept < 1100


@slow
def test_keep_on_failure_leaves_it_for_a_while_after_a_failure_alone(scene, tmp_path):
    with scene(train=training(code=1)) as there:
        tool = there.train("--keep-on-failure=4")
        there.ended(tool, 1, "the machine is kept until", kept=True)
        since = there.cloud.now()
        assert there.ours()
        there.settle()
        assert 180 < there.cloud.instances[0].ended - since < 400
    shutil.rmtree(tmp_path / "checkout"), shutil.rmtree(tmp_path / "home"), shutil.rmtree(tmp_path / "state")
    with scene() as there:
        there.ended(there.train("--keep-on-failure=4"), 0, ENDS)


@slow
def test_files_are_fetched_while_it_trains(scene):
    with scene(train=ENDLESS) as there:
        tool = there.train("--pull-every=0.5")
        tool.says("fetched; ")
        assert (there.results / "metrics.jsonl").read_text().startswith("0\n1\n")
        tool.signal(signal.SIGINT)
        there.ended(tool, 130, "stopped by a signal$")


@slow
def test_a_run_may_be_terminated_from_another_terminal(scene):
    with scene(train=ENDLESS) as there:
        tool = there.train()
        tool.says("step 2")
        code, text = there.run("terminate", there.ledger["name"], "--yes")
        assert code == 0 and "the machine is gone" in text
        there.ended(tool, 92, "the machine is (terminating|terminated|gone)$")


@slow
def test_terminate_and_gc_end_a_machine_that_was_to_be_kept(scene):
    with scene(train=ENDLESS) as there:
        there.train("--keep").says("step 2")
        assert there.run("terminate", there.ledger["name"], "--yes")[0] == 0 and not there.ours()
        there.tools[0].ends()
        second = there.train("--keep")
        second.says("step 2")
        there.kill_all()
        assert there.run("gc", "--yes")[0] == 0 and not there.ours()


@slow
def test_another_service_does_not_know_our_machines_so_it_does_not_write_them_off(scene):
    with scene(train=ENDLESS) as there:
        there.train().says("step 2")
        there.kill_all()
        name, base = there.ledger["name"], there.cloud.environment()["LAMBDA_API_BASE"]
        other = base.replace("127.0.0.1", "localhost")
        code, text = there.run("gc", "--yes", LAMBDA_API_BASE=other)
        assert code == 90 and name in text and "another key or service" in text
        assert there.ours() and there.ledger["phase"] != "gone"
        assert there.run("gc", "--yes")[0] == 0 and not there.ours()


@slow
def test_a_machine_that_is_still_looked_for_cannot_be_terminated(scene):
    with scene(sold_out(600)) as there:
        tool = there.train("--wait-capacity=60")
        tool.says("looking again")
        code, text = there.run("terminate", there.ledger["name"], "--yes")
        assert code == 2 and "still looking" in text
        tool.signal(signal.SIGINT)
        there.ended(tool, 130, "stopped by a signal$")


@slow
def test_a_detached_machine_has_a_watchdog_even_if_the_first_one_died(scene):
    with scene(train=ENDLESS) as there:
        tool = there.train("--detach")
        tool.says("waiting for")
        for pid in there.processes("lambda_service.py watch"):
            os.kill(pid, signal.SIGKILL)
        there.ended(tool, 0, "detached", kept=True)
        assert there.processes("lambda_service.py watch")
        assert there.run("terminate", "--all-mine", "--yes")[0] == 0


@slow
def test_without_the_name_of_the_ssh_key_all_mine_says_so(scene):
    with scene(train=ENDLESS) as there:
        there.ended(there.train("--detach"), 0, "detached", kept=True)
        code, text = there.run("terminate", "--all-mine", "--yes", LAMBDA_SSH_KEY="")
        assert code == 2 and "LAMBDA_SSH_KEY" in text and there.ours()
        assert there.run("terminate", "--all-mine", "--yes")[0] == 0


@slow
def test_the_watchdog_ends_the_machine_though_its_ledger_was_removed(scene):
    with scene(train=ENDLESS) as there:
        there.ended(there.train("--detach", "--max-hours=0.3"), 0, "detached", kept=True)
        shutil.rmtree(there.state)
        there.cloud.wait(lambda: not there.ours(), 60)


def test_terminate_all_mine_leaves_strangers_alone(scene):
    tag = [{"key": TAG, "value": "dag-x"}]
    with scene(train=ENDLESS) as there:
        theirs = [there.cloud.add("theirs"), there.cloud.add("of another key", tags=tag)]
        theirs[1].key = "another"
        elsewhere = there.cloud.add("dag-of-another-computer", tags=tag)
        there.ended(there.train("--detach"), 0, "detached", kept=True)
        assert there.run("terminate", "no-such-name", "--yes")[0] == 2
        assert len(there.cloud.running()) == 4
        code, text = there.run("terminate", "--all-mine", "--yes")
        assert code == 0, text
        assert there.cloud.running() == theirs and elsewhere.name in text
        there.cloud.wait(lambda: not there.processes())  # the watchdog has seen it
        code, text = there.run("terminate", "--all-mine")
        assert code == 0 and text.endswith("nothing to terminate\n") and theirs[1].name in text
        assert there.run("terminate", theirs[0].id, "--yes")[0] == 0
        assert there.cloud.running() == theirs[1:]


@slow
def test_an_unanswered_launch_adopts_no_stranger_of_the_same_name(scene):
    def namesake(call):
        call.cloud.add(made[0].ledger["name"])
        return call.do()

    made = []
    with scene(Fault("list", namesake), lost("launch")) as there:
        made.append(there)
        there.ended(there.train(), 0, ENDS)
        stranger, ours = there.cloud.instances
        assert there.cloud.running() == [stranger] and stranger.name == ours.name


# ------------------------------------------------------------------------------------------------------------
# terminals


class Terminal:
    """A pseudo-terminal: what a Tool prints there goes to its output file, and `type` answers it."""

    def __init__(self, scene: Scene, *words: str):
        self.master, slave = pty.openpty()
        self.tool = scene.train(*words, stdio=dict.fromkeys(("stdin", "stdout", "stderr"), slave))
        os.close(slave)
        self.reader = threading.Thread(target=self._read, daemon=True)
        self.reader.start()

    def _read(self) -> None:
        with suppress(OSError), open(self.tool.output, "ab", buffering=0) as file:
            while text := os.read(self.master, 4096):
                file.write(text)

    def type(self, text: str) -> None:
        os.write(self.master, text.encode())


@slow
def test_a_person_is_asked_first(scene):
    with scene() as there:
        terminal = Terminal(there)
        terminal.tool.says(r"Launch it\? \[y/N\]")
        terminal.type("n\n")
        assert terminal.tool.ends() == 130 and there.ledger == {}
        nothing_asked(there, terminal.tool)


@slow
@pytest.mark.parametrize("answer", ["d\n", "s\n"], ids=["detach", "stop"])
def test_a_person_who_presses_ctrl_c_may_leave_it_running(scene, answer):
    with scene(train=training(steps=100)) as there:
        terminal = Terminal(there)
        terminal.tool.says("Launch it")
        terminal.type("y\n")
        terminal.tool.says("step 2")
        terminal.tool.signal(signal.SIGINT)
        terminal.tool.says("etach and leave it running")
        terminal.type(answer)
        if answer == "s\n":
            there.ended(terminal.tool, 130, "stopped by a signal$")
            return
        there.ended(terminal.tool, 0, "detached; the machine is terminated", kept=True)
        assert there.ours()
        there.settle()
        assert (there.results / "result").read_text() == "done"


def train_unseen(there: Scene) -> Tool:
    reader, writer = os.pipe()
    os.close(reader)
    tool = there.train(stdio=dict(stdout=writer, stderr=writer))
    os.close(writer)
    return tool


@slow
def test_a_terminal_that_is_gone_keeps_nothing_from_ending(scene):
    with scene(bad_gateway("list", 2, skip=3), terminate_fails(3), train=training(steps=30)) as there:
        tool = train_unseen(there)
        assert tool.ends() == 0 and not there.ours()
        assert "the training ended with exit code 0" in there.kept("service.log")
        assert (there.results / "result").exists()


@slow
@pytest.mark.parametrize(
    "line, code", [("prune(local)", 94), ("state, code, size = head.groups()", 92)], ids=["fetch", "poll"]
)
def test_a_mistake_of_ours_that_nobody_reads_about_keeps_no_machine(scene, line, code):
    with scene() as there:
        path = there.checkout / "launch/remote.py"
        assert line in path.read_text()
        path.write_text(path.read_text().replace(line, "1 / 0"))
        assert train_unseen(there).ends() == code and not there.ours()
        assert "ZeroDivisionError" in there.kept("service.log")
        (there.state / there.ledger["name"] / "service.log").write_text("")  # settle finds no fault with it


@slow
def test_letters_that_the_terminal_does_not_know_end_nothing(scene):
    prints = "print('\\u2501 \\u00e9', flush=True)"
    with scene(train=training(then=prints)) as there:
        tool = there.train(PYTHONIOENCODING="ascii")
        there.ended(tool, 0, ENDS)
        assert "━ é" in there.kept("train.log")


# ------------------------------------------------------------------------------------------------------------
# secrets


CHECK = """
assert os.environ["WANDB_API_KEY"] and "LAMBDA_API_KEY" not in os.environ
"""


def command_lines() -> set[str]:
    found = set()
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):
            found.add(path.read_bytes().replace(b"\0", b" ").decode(errors="replace"))
    return found


def test_no_secret_is_seen_anywhere(scene):
    """In no command line while it runs; afterwards in no file here or there. The training has its own one."""
    seen, over = set(), threading.Event()

    def watch():
        while not over.wait(0.01):
            seen.update(command_lines())

    with scene(bad_gateway("list", 2), lost("terminate"), train=training(then=CHECK)) as there:
        notes = there.checkout / "config/notes.py"  # a key that was taken out stands in the diff
        notes.write_text(f"key = '{WANDB_KEY}'\n")
        commit(there.checkout)
        notes.write_text("key = None\n")
        watcher = threading.Thread(target=watch)
        watcher.start()
        try:
            there.ended(there.train("--pull-every=0.1", "--wandb_log=true"), 0, ENDS)
        finally:
            over.set()
            watcher.join()
        secrets = [*there.cloud.hidden(), WANDB_KEY]
        assert any("lambda_service.py" in line for line in seen) and any(
            "remote_run.sh" in line for line in seen
        )
        assert not [line for line in seen if any(secret in line for secret in secrets)]
        places = [there.state, there.checkout, there.home, *there.cloud.homes]
        files = [path for place in places for path in place.rglob("*") if path.is_file()]
        assert {"train.py", "run.json", "service.log", "train.log", "watchdog.log"} <= {
            path.name for path in files
        }
        for path in files:
            assert not any(secret.encode() in path.read_bytes() for secret in secrets), path
        assert "-key = '[redacted]'\n+key = None" in (there.results / "uploaded.diff").read_text()


@slow
def test_what_is_private_is_not_uploaded_and_not_noted(scene):
    with scene() as there:
        (there.checkout / ".env").write_text("TOKEN=\n")
        commit(there.checkout)
        (there.checkout / ".env").write_text("TOKEN=of somebody\n")
        there.ended(there.train(), 0, ENDS)
        assert "of somebody" not in (there.results / "uploaded.diff").read_text()
        for home in there.cloud.homes:
            assert not list(Path(home).rglob(".env"))


@slow
def test_a_tracked_file_that_holds_a_key_is_not_uploaded(scene):
    with scene() as there:
        (there.checkout / "config/notes.py").write_text(f"key = '{WANDB_KEY}'")
        commit(there.checkout)
        there.ended(there.train(), 2, "config/notes.py holds one of your keys")
        nothing_asked(there, there.tools[0])
