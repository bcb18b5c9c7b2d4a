"""A cloud on loopback: it rents out this computer through the documented API, bills, and fails when told to.

    python tests/launch/fake_lambda_api.py                               # prints what to export, serves until Ctrl-C
    python tests/launch/fake_lambda_api.py --faults=no_capacity:2,lost   # and goes wrong on the way (tests/launch/faults.py)

    with StandIn(faults=[no_capacity(2), lost("launch")]) as cloud:
        subprocess.run([..., "train", ...], env={**os.environ, **cloud.environment()})
        assert not cloud.running() and not cloud.violations and cloud.bill() < 0.1

Every request is checked against the document (tests/launch/api_rules.py). A rented machine is a real ssh server at
one port (tests/launch/fake_instances.py): its home is a new folder, its Python is this one, and its pip finds no network.

Seconds are the tool's: one lasts `second` real ones, so that three minutes of boot can take 1.8 s.
"""

import base64
import json
import os
import secrets
import signal
import socket
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # for a script, too

import api_rules
from api_rules import FAMILIES, FILE_SYSTEMS, IMAGES, REGIONS, TYPES
from fake_instances import Instance, Keeper, new_folder, remove, write_programs
from faults import NAMED, REQUESTS, Answer, Fault, data, error, page, parse

from configurator import load, run_script, setting

JITTER = 0.05  # real seconds by which a busy computer may bring two requests closer together
SSH_KEY = "stand-in"


@dataclass
class Call:
    """A request; `do` gives what would answer it without the fault that looks at it."""

    cloud: "StandIn"
    time: float
    method: str
    path: str
    headers: Any
    body: bytes
    do: Callable[[], Answer | None] | None = None
    outcome: str = "not answered yet"

    @property
    def request(self) -> str:
        return f"{self.method} {self.path}"

    def is_(self, kind: str) -> bool:
        """Of this kind, a key of faults.REQUESTS."""
        return self.request.startswith(REQUESTS[kind])

    def __str__(self) -> str:
        return f"{self.time:7.1f} s  {self.request} {self.body.decode(errors='replace')}  -> {self.outcome}"


class StandIn:
    """The account of one customer, with one API key and one ssh key.

    requests    every Call so far
    violations  lines: what no caller may send, or not so soon
    instances   every Instance so far; tests may change them, and `faults`, and `capacity` (type: regions)
    homes       the home folders of the machines so far
    sshd        the machine's server, an sshd.Sshd
    """

    def __init__(self, second=0.01, faults: list[Fault] = (), sshd=True, say: Callable[[str], Any] = str):
        self.second, self.faults, self.say = second, list(faults), say
        self.wants_sshd = sshd
        self.key = f"secret_stand-in_{secrets.token_hex(16)}"
        self.capacity = {name: list(regions) for name, (*_, regions) in TYPES.items()}
        self.sold_out = 0.0  # until when there is no capacity at all
        self.requests: list[Call] = []
        self.violations: list[str] = []
        self.instances: list[Instance] = []
        self.programs: dict[str, str] = {}  # shell scripts, first on the caller's PATH
        self.not_before: dict[str, float] = {}  # request: when it may come again, after Retry-After
        self.rates = {
            kind: api_rules.Rate(s, JITTER / second) for kind, s in {"any": 1, "launch": 12}.items()
        }
        self.lock = threading.RLock()
        self.ended = threading.Event()

    # ------------------------------------------------------------------------------------ its life

    def __enter__(self) -> "StandIn":
        self.start = time.monotonic()
        self.folder = new_folder()
        for fault in self.faults:
            if fault.on == "here":
                fault.act(self)
        write_programs(self.folder / "here", self.programs)
        self.keeper = Keeper(self.folder, self.instances, self.now) if self.wants_sshd else None
        self.server = Server(self)
        return self

    def __exit__(self, *_) -> None:
        self.ended.set()
        self.server.stop()
        try:
            if self.keeper:
                self.keeper.stop()
        finally:
            remove(self.folder)

    @property
    def sshd(self):
        return self.keeper and self.keeper.sshd

    @property
    def homes(self) -> list[Path]:
        return self.keeper.homes if self.keeper else []

    def environment(self) -> dict[str, str]:
        """What the caller's environment must say."""
        variables = {
            "LAMBDA_API_BASE": f"http://127.0.0.1:{self.server.server_port}/api/v1",
            "LAMBDA_API_KEY": self.key,
            "LAMBDA_SSH_KEY": SSH_KEY,
            "LAMBDA_SECOND": str(self.second),
            "NO_PROXY": "127.0.0.1",
        }
        if self.sshd:
            variables["LAMBDA_SSH_PORT"] = str(self.sshd.port)
            variables["LAMBDA_SSH_USER"] = self.sshd.user
            variables["LAMBDA_SSH_IDENTITY"] = str(self.sshd.client_key)
        if self.programs:
            variables["PATH"] = f"{self.folder / 'here'}:{os.environ['PATH']}"
        return variables

    def now(self) -> float:
        return (time.monotonic() - self.start) / self.second

    def sleep(self, seconds: float) -> None:
        self.ended.wait(seconds * self.second)

    # ------------------------------------------------------------------------------------ what tests ask

    def running(self) -> list[Instance]:
        """Those that are not gone; a terminating one is not, though it costs nothing any more."""
        return [i for i in list(self.instances) if i.status(self.now()) not in ("terminated", "preempted")]

    def bill(self) -> float:
        """Dollars so far."""
        return sum(instance.cents(self.now()) for instance in list(self.instances)) / 100

    def hidden(self) -> list[str]:
        """What may be seen nowhere: the key, plain and as Basic credentials have it, and Jupyter's tokens."""
        basic = base64.b64encode(f"{self.key}:".encode()).decode()
        return [self.key, basic, *(instance.token for instance in list(self.instances))]

    def asked(self, kind="any") -> list[Call]:
        """The requests of one kind, a key of faults.REQUESTS."""
        return [call for call in list(self.requests) if call.is_(kind)]

    def commands(self) -> list[str]:
        """The command lines of what runs on the machine."""
        lines = []
        for pid in self.sshd.processes() if self.sshd else []:
            with suppress(OSError):
                lines.append(Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ").strip())
        return lines

    def wait(self, condition: Callable[[], Any], real_seconds=30) -> None:
        """Until it is so: `cloud.wait(lambda: cloud.asked("launch"))`."""
        deadline = time.monotonic() + real_seconds
        while not condition():
            seen = "\n".join(map(str, list(self.requests)[-20:]))
            assert time.monotonic() < deadline, f"not so after {real_seconds} s:\n{seen}"
            time.sleep(0.01)

    def add(self, name="somebody's", type="gpu_1x_a10", region="us-east-1", **fields) -> Instance:
        """An instance from elsewhere, active for a minute; ssh reaches it where machine=True."""
        fields = dict(machine=False, boot=0, address=0, launched=self.now() - 60) | fields
        self.instances.append(Instance(name, type, region, SSH_KEY, **fields))
        return self.instances[-1]

    # ------------------------------------------------------------------------------------ requests

    def receive(self, call: Call) -> Answer | None:
        with self.lock:
            self.requests.append(call)
            self.violations += [f"{call.request}: {problem}" for problem in self.problems(call)]
        answer = self.through(list(self.faults), call)
        call.outcome = str(answer or "hung up")
        self.say(str(call))
        return answer

    def problems(self, call: Call) -> Iterator[str]:
        yield from api_rules.objections(call.method, call.path, call.headers, call.body)
        if any(text in call.path + call.body.decode(errors="replace") for text in self.hidden()):
            yield "a secret is in it"
        for kind, rate in self.rates.items():
            if call.is_(kind) and rate.too_fast(call.time):
                yield f"less than {rate.seconds} s after the one before"
        if call.time < self.not_before.pop(call.request, 0) - JITTER / self.second:
            yield "sooner than Retry-After allowed"

    def through(self, faults: list[Fault], call: Call) -> Answer | None:
        """What the first fault that strikes makes of what the others leave."""
        for index, fault in enumerate(faults):
            with self.lock:
                strikes = fault.on in REQUESTS and call.is_(fault.on) and fault.strikes()
            if strikes:
                return fault.act(replace(call, do=lambda: self.through(faults[index + 1 :], call)))
        with self.lock:
            return self.answer(call)

    def answer(self, call: Call) -> Answer:
        if api_rules.is_blocked(call.headers):
            return page(403, "error code: 1010")
        if call.headers.get("Authorization") not in (f"Bearer {self.key}", f"Basic {self.hidden()[1]}"):
            return error(401, "global/invalid-api-key")
        if wrong := "; ".join(api_rules.objections(call.method, call.path, call.headers, call.body)):
            return error(400, "global/invalid-parameters", wrong)
        if call.is_("launch"):
            return self.launch(json.loads(call.body))
        if call.is_("terminate"):
            return self.terminate(json.loads(call.body)["instance_ids"])
        return self.read(*call.path.split("/")[1:])

    def read(self, what: str, id: str | None = None) -> Answer:
        now = self.now()
        instances = [each.json(now) for each in self.instances if each.listed(now)]
        if id:
            found = [each for each in instances if each["id"] == id]
            return data(found[0]) if found else error(404, "global/object-does-not-exist")
        public = Path(f"{self.sshd.client_key}.pub").read_text().strip() if self.sshd else "ssh-ed25519 AAAA"
        lists = {
            "instances": instances,
            "instance-types": {name: self.offer(name) for name in TYPES},
            "ssh-keys": [{"id": "0a" * 16, "name": SSH_KEY, "public_key": public}],
            "images": IMAGES,
            "file-systems": [api_rules.file_system_json(name) for name in FILE_SYSTEMS],
            "regions": [api_rules.region_json(name) for name in REGIONS],
        }
        return data(lists[what])

    def where(self, type: str) -> list[str]:
        return [] if self.now() < self.sold_out else self.capacity[type]

    def offer(self, type: str) -> dict:
        regions = [api_rules.region_json(region) for region in self.where(type)]
        return {"instance_type": api_rules.type_json(type), "regions_with_capacity_available": regions}

    def launch(self, body: dict) -> Answer:
        type, region, image = body["instance_type_name"], body["region_name"], body.get("image", {})
        file_systems = body.get("file_system_names", [])
        known = type in TYPES and region in REGIONS and body["ssh_key_names"] == [SSH_KEY]
        known = known and image.get("family", "lambda-stack-22-04") in FAMILIES
        known = known and image.get("id", IMAGES[0]["id"]) in [each["id"] for each in IMAGES]
        if not known or not FILE_SYSTEMS.keys() >= set(file_systems):
            return error(400, "global/object-does-not-exist")
        if any(FILE_SYSTEMS[name] != region for name in file_systems):
            return error(400, "instance-operations/launch/file-system-in-wrong-region")
        if region not in self.where(type):
            return error(400, "instance-operations/launch/insufficient-capacity")
        instance = Instance(
            body.get("name"), type, region, SSH_KEY, self.now(), body.get("tags", []), file_systems
        )
        for fault in self.faults:
            if fault.on == "born" and fault.strikes():
                fault.act(instance)
        self.instances.append(instance)
        return data({"instance_ids": [instance.id]})

    def terminate(self, ids: list[str]) -> Answer:
        """All of them or none; one may ask again and again."""
        now = self.now()
        known = {each.id: each for each in self.instances if each.launched + each.known <= now}
        if not known.keys() >= set(ids):
            return error(404, "global/object-does-not-exist")
        for id in ids:
            known[id].ended = min(known[id].ended, now + known[id].lingers)
        return data({"terminated_instances": [known[id].json(now) for id in ids]})


# ------------------------------------------------------------------------------------------------------------


class Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64

    def __init__(self, cloud: StandIn):
        super().__init__(("127.0.0.1", 0), Handler)
        self.cloud, self.connections = cloud, set()
        self.thread = threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True)
        self.thread.start()

    def stop(self) -> None:
        self.shutdown()
        self.server_close()
        for connection in list(self.connections):
            hang_up(connection)
        self.thread.join()

    def handle_error(self, request, address) -> None:
        """Callers that are killed break their connections; everything else is a mistake of ours."""
        if not isinstance(sys.exc_info()[1], OSError):
            super().handle_error(request, address)


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def setup(self) -> None:
        super().setup()
        self.server.connections.add(self.connection)

    def finish(self) -> None:
        self.server.connections.discard(self.connection)
        super().finish()

    def serve(self) -> None:
        cloud, now = self.server.cloud, self.server.cloud.now()
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        path = self.path.removeprefix("/api/v1")
        answer = cloud.receive(Call(cloud, now, self.command, path, self.headers, body))
        self.close_connection = answer is None or answer.cut
        if answer is not None:
            self.write(answer)
        if self.close_connection:
            hang_up(self.connection)

    def write(self, answer: Answer) -> None:
        self.send_response(answer.status)
        for name, value in {"Content-Type": "application/json", **answer.headers}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(answer.body)))
        self.end_headers()
        self.wfile.write(answer.body[: len(answer.body) // 2] if answer.cut else answer.body)

    do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = serve

    def log_message(self, *_) -> None:
        pass


def hang_up(connection: socket.socket) -> None:
    with suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)


# ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Config:
    second: float = setting(0.1, "real seconds that one of boots, bills and rates lasts", minimum=0.001)
    faults: str = setting("", f"what goes wrong, as no_capacity:2,lost:terminate; of {' '.join(NAMED)}")


def main() -> None:
    config = load(Config)
    faults = parse(config.faults)
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.default_int_handler)
    with suppress(KeyboardInterrupt), StandIn(config.second, faults, say=partial(print, flush=True)) as cloud:
        try:
            print(*(f"export {name}={value}" for name, value in cloud.environment().items()), sep="\n")
            print("# Ctrl-C ends this cloud; until then it prints what it is asked", flush=True)
            signal.pause()
        finally:
            report(cloud)


def report(cloud: StandIn) -> None:
    print(f"\n{len(cloud.requests)} requests, {len(cloud.instances)} instances, ${cloud.bill():.2f}")
    for problem, times in Counter(cloud.violations).items():
        print(f"not allowed ({times} times): {problem}")
    for instance in cloud.running():
        print(f"still there: {instance.id} {instance.name!r} {instance.status(cloud.now())}")


if __name__ == "__main__":
    run_script(main)
