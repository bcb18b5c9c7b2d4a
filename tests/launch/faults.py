"""What can go wrong with a rented machine, a few lines each: StandIn(faults=[lost("launch"), unhealthy(60)]).

A fault is about requests (`on`: a key of REQUESTS), about instances as they are launched ("born"), or about
the stand-in as it starts ("here"). It strikes `times` times, after it has spared `skip`. Several that strike
one request are nested, the first outermost. Seconds are the tool's (fake_lambda_api.py).

One of your own, which kills the caller when it has just rented a machine:
Fault("launch", lambda call: call.do() and os.kill(caller.pid, 9))
"""

import email.utils
import json
import math
import shutil
import time
from dataclasses import dataclass, field
from typing import Any, Callable

ALWAYS = math.inf
LONGEST = 60  # seconds that anybody must wait, whatever Retry-After says
REQUESTS = {  # how "METHOD /path" begins
    "any": "",
    "launch": "POST /instance-operations/launch",
    "terminate": "POST /instance-operations/terminate",
    "list": "GET /instances",  # of all and of one
    "types": "GET /instance-types",
    "keys": "GET /ssh-keys",
    "images": "GET /images",
}
KINDS = (*REQUESTS, "born", "here")


@dataclass
class Answer:
    """What goes back over the wire. `cut`: the connection ends in the middle of the body."""

    status: int
    body: bytes
    headers: dict[str, str] = field(default_factory=dict)
    cut: bool = False
    code: str = ""

    def __str__(self) -> str:
        return f"{self.status} {self.code}".strip()


def data(value: Any) -> Answer:
    return Answer(200, json.dumps({"data": value}).encode())


def error(status: int, code: str, message: str = "", **headers: str) -> Answer:
    envelope = {
        "code": code,
        "message": message or code.rpartition("/")[2].replace("-", " ").capitalize() + ".",
    }
    body = {"error": {**envelope, "suggestion": "Try something else.", "request_id": "0f1e2d"}}
    return Answer(status, json.dumps(body).encode(), headers, code=code)


def page(status: int, title: str, **headers: str) -> Answer:
    html = f"<html><head><title>{title}</title></head><body><center><h1>{title}</h1></center></body></html>"
    return Answer(status, html.encode(), {"Content-Type": "text/html", **headers})


@dataclass
class Fault:
    on: str  # of REQUESTS, "born" or "here"
    act: Callable  # of a stand_in.Call, giving an Answer, or None to hang up; of an Instance; of the StandIn
    times: float = 1
    skip: int = 0
    met: int = 0

    def __post_init__(self):
        if self.on not in KINDS:
            raise ValueError(f"no fault can be on {self.on!r}: there are {', '.join(KINDS)}")

    def strikes(self) -> bool:
        self.met += 1
        return self.skip < self.met <= self.skip + self.times


# ------------------------------------------------------------------------------------------------------------
# refused: nothing was done


def refused(status: int, code: str, on="any", times=ALWAYS, skip=0) -> Fault:
    return Fault(on, lambda call: error(status, code), times, skip)


def bad_key() -> Fault:
    return refused(401, "global/invalid-api-key")


def inactive(on="launch") -> Fault:
    return refused(403, "global/account-inactive", on)


def forbidden(on="launch") -> Fault:
    return refused(403, "global/forbidden", on)


def over_quota() -> Fault:
    return refused(400, "global/quota-exceeded", "launch")


def no_capacity(times=2, skip=0) -> Fault:
    return refused(400, "instance-operations/launch/insufficient-capacity", "launch", times, skip)


def sold_out(seconds=60) -> Fault:
    """For so long after the stand-in's start nothing is to be had, and the list of types says so."""
    return Fault("here", lambda cloud: vars(cloud).update(sold_out=seconds))


def too_many(on="any", times=1, retry_after: float | None = None, as_date=False, skip=0) -> Fault:
    """429. After `retry_after` (seconds) asking the same sooner is a mistake."""

    def act(call):
        if retry_after is None:
            return error(429, "global/rate-limited")
        if as_date:
            later = time.time() + max(1, retry_after * call.cloud.second)
            when = email.utils.formatdate(later, usegmt=True)
        else:
            when = f"{retry_after:.0f}"
            call.cloud.not_before[call.request] = call.cloud.now() + min(retry_after, LONGEST)
        return error(429, "global/rate-limited", **{"Retry-After": when})

    return Fault(on, act, times, skip)


def too_many_says_proxy(on="any", times=1, skip=0) -> Fault:
    """429 in HTML, from a proxy: whether the service saw the request is not known."""
    return Fault(on, lambda call: page(429, "error code: 1015"), times, skip)


# ------------------------------------------------------------------------------------------------------------
# unanswered: nobody knows what was done


def internal_error(on="any", times=1, skip=0) -> Fault:
    """500 in the service's envelope, and nothing was done."""
    return refused(500, "global/internal-error", on, times, skip)


def bad_gateway(on="any", times=1, skip=0) -> Fault:
    """502 in HTML, from a proxy; nothing was done."""
    return Fault(on, lambda call: page(502, "502 Bad Gateway"), times, skip)


def done_and_bad_gateway(on="launch", times=1, skip=0) -> Fault:
    """502 in HTML, from a proxy, after the service did it."""
    return Fault(on, lambda call: call.do() and page(502, "502 Bad Gateway"), times, skip)


def lost(on="launch", times=1, skip=0) -> Fault:
    """It is done, and the connection is closed without an answer."""
    return Fault(on, lambda call: call.do() and None, times, skip)


def hung_up(on="any", times=1, skip=0) -> Fault:
    """Nothing is done, and the connection is closed without an answer: to the caller the same as `lost`."""
    return Fault(on, lambda call: None, times, skip)


def offline(seconds=60, on="any", skip=0) -> Fault:
    """From the first request on, every one is hung up for so long."""
    end = []

    def act(call):
        end.append(call.cloud.now() + seconds)
        return None if call.cloud.now() < end[0] else call.do()

    return Fault(on, act, ALWAYS, skip)


def delayed(seconds=5, on="any", times=1, skip=0) -> Fault:
    """Done at once, answered late."""
    return Fault(on, lambda call: (call.do(), call.cloud.sleep(seconds))[0], times, skip)


def truncated(on="any", times=1, skip=0) -> Fault:
    """Done; half of the JSON arrives as if it were all."""

    def act(call):
        answer = call.do()
        return answer and Answer(answer.status, answer.body[: len(answer.body) // 2])

    return Fault(on, act, times, skip)


def cut_off(on="any", times=1, skip=0) -> Fault:
    """Done; the connection ends in the middle of the answer."""

    def act(call):
        answer = call.do()
        return answer and Answer(answer.status, answer.body, cut=True)

    return Fault(on, act, times, skip)


def portal(on="any", times=1, skip=0) -> Fault:
    """A hotel's network answers 200 with a page of its own, and nothing is done."""
    return Fault(on, lambda call: page(200, "Welcome to our Wi-Fi"), times, skip)


def redirected(on="any", times=1, to="http://127.0.0.1:9/") -> Fault:
    return Fault(on, lambda call: page(302, "Found", Location=to), times)


def wrong_shape(on="any", times=1, value: Any = None, skip=0) -> Fault:
    """Done; the answer is JSON of another shape."""
    return Fault(on, lambda call: call.do() and data(value), times, skip)


# ------------------------------------------------------------------------------------------------------------
# instances


def born(times=1, skip=0, **fields: Any) -> Fault:
    """Instances that get these values of stand_in.Instance's fields."""
    return Fault("born", lambda instance: vars(instance).update(fields), times, skip)


def seen_late(seconds=30, times=1) -> Fault:
    """For so long after the launch neither the list nor its own address shows it."""
    return born(times, seen=seconds)


def unknown_at_first(seconds=30, times=1) -> Fault:
    """As `seen_late`, and terminate does not know it either."""
    return born(times, seen=seconds, known=seconds)


def stuck_booting(times=1) -> Fault:
    return born(times, boot=math.inf)


def unhealthy(after=0, times=1) -> Fault:
    """From so long after boot on."""
    return born(times, unhealthy=after)


def preempted(after=60, times=1) -> Fault:
    """The machine is taken away so long after boot."""
    return born(times, preempted=after)


def no_address(times=1) -> Fault:
    """Active, and nobody says where."""
    return born(times, address=math.inf)


def lingers(seconds=120, times=1) -> Fault:
    """Terminate is accepted; it stays active, and is paid, for so long."""
    return born(times, lingers=seconds)


def terminate_fails(times=3) -> Fault:
    return internal_error("terminate", times)


# ------------------------------------------------------------------------------------------------------------
# machines: `after` and `seconds` count from the moment that ssh could answer


def event(after: float, act: Callable, times=1) -> Fault:
    """`act(sshd)` so long after the machine is there; at 0 just before it answers."""
    return Fault("born", lambda instance: instance.events.append((after, act)), times)


def ssh_refused(seconds=30, times=1) -> Fault:
    """Active for so long before ssh answers."""
    return born(times, ssh=seconds)


def ssh_denied(seconds=30, times=1) -> Fault:
    """ "Permission denied (publickey)" for so long: the key is not there yet."""

    def act(instance):
        instance.events.append((0, lambda sshd: sshd.deny_authentication()))
        instance.events.append((seconds, lambda sshd: sshd.allow_authentication()))

    return Fault("born", act, times)


def host_key_replaced(after=60, times=1) -> Fault:
    """Another machine, or a man in the middle, answers at the address."""
    return event(after, lambda sshd: sshd.replace_host_key(), times)


def connection_dropped(after=60, times=1) -> Fault:
    """All ssh sessions break at once; what was detached goes on."""
    return event(after, lambda sshd: sshd.drop_sessions(), times)


def unreachable(after=60, seconds=60, times=1) -> Fault:
    """All ssh sessions break, and nobody gets in for so long."""

    def act(instance):
        instance.events.append((after, lambda sshd: (sshd.refuse(), sshd.drop_sessions())))
        instance.events.append((after + seconds, lambda sshd: sshd.listen()))

    return Fault("born", act, times)


def disk_full(mib=1, times=1) -> Fault:
    """The machine's disk has so many MiB: a tmpfs, which only root may mount."""
    return born(times, disk_mib=mib)


def program(name: str, script: str, times=1) -> Fault:
    """`name` on the machine is this shell script."""
    return Fault("born", lambda instance: instance.programs.update({name: script}), times)


def no_rsync(times=1) -> Fault:
    return program("rsync", "echo 'bash: rsync: command not found' >&2; exit 127", times)


def arm64(times=1) -> Fault:
    return program("uname", 'case "$*" in *m*|*p*) echo aarch64 ;; *) echo Linux ;; esac', times)


def no_torch(times=1) -> Fault:
    """The image has no packages, and pip finds none. It takes a virtual environment of the tests' own."""
    return born(times, packages=False)


def cuda_broken(times=1) -> Fault:
    """nvidia-smi is content, and PyTorch finds no GPU, as it is with the CPU's build of it."""
    return program("nvidia-smi", NVIDIA_SMI, times)


NVIDIA_SMI = """
for argument; do
    case "$argument" in
    --query-gpu=*)
        echo "${argument#*=}," | sed 's/driver_version,/570.148.08, /; s/memory\\.[a-z]*,/22731 MiB, /g
            s/compute_cap,/8.6, /; s/name,/NVIDIA A10, /; s/index,/0, /; s/count,/1, /; s/, $//'
        exit ;;
    -L) echo 'GPU 0: NVIDIA A10 (UUID: GPU-6b1e)'; exit ;;
    esac
done
echo '| NVIDIA-SMI 570.148.08    Driver Version: 570.148.08    CUDA Version: 12.8 |'
"""


def counted(times: float, skip: float, otherwise: str) -> str:
    """A script for rsync: `otherwise` at the calls that are struck, the real program at the others."""
    return f"""real={shutil.which("rsync")}
echo >> "$0.calls"; met=$(wc -l < "$0.calls")
if [ "$met" -le {skip:.0f} ] || [ "$met" -gt {min(skip + times, 1e9):.0f} ]; then exec "$real" "$@"; fi
{otherwise}"""


def rsync_torn(kib=64, times=1, skip=0) -> Fault:
    """The machine's rsync ends after so many KiB in either direction: code 12 at the other end."""
    part = f"stdbuf -o0 head -c {kib * 1024:.0f}"
    script = f"""exec 3<&0
{{ {part} <&3 & echo $! >"$0.pid"; wait; }} | {{ "$real" "$@"; kill "$(cat "$0.pid")"; }} 2>/dev/null | {part}
exit 12"""
    return program("rsync", counted(times, skip, script))


def rsync_partial(code=23, times=1, skip=0) -> Fault:
    """The caller's rsync does its work and says 23, some files were not transferred, or another code."""
    script = counted(times, skip, f'"$real" "$@"; exit {code:.0f}')
    return Fault("here", lambda cloud: cloud.programs.update(rsync=script))


# ------------------------------------------------------------------------------------------------------------

NAMED = {
    made.__name__: made
    for made in [
        *(bad_key, inactive, forbidden, over_quota, no_capacity, sold_out, too_many, too_many_says_proxy),
        *(internal_error, bad_gateway, done_and_bad_gateway, lost, hung_up, offline, delayed),
        *(truncated, cut_off, portal, redirected, wrong_shape),
        *(
            seen_late,
            unknown_at_first,
            stuck_booting,
            unhealthy,
            preempted,
            no_address,
            lingers,
            terminate_fails,
        ),
        *(ssh_refused, ssh_denied, host_key_replaced, connection_dropped, unreachable),
        *(disk_full, no_rsync, arm64, no_torch, cuda_broken, rsync_torn, rsync_partial),
    ]
}


def parse(text: str) -> list[Fault]:
    """ "no_capacity:2,lost:terminate" -> faults; what follows a name are its arguments, in their order."""
    made = []
    for word in filter(None, text.split(",")):
        name, *arguments = word.split(":")
        if name not in NAMED:
            raise ValueError(f"no fault {name!r}: there are {', '.join(NAMED)}")
        made.append(NAMED[name](*[float(a) if a.replace(".", "", 1).isdigit() else a for a in arguments]))
    return made
