"""Lambda Cloud's HTTP API, as much of it as renting a machine takes.

    api = Api.from_environment()                              # LAMBDA_API_KEY
    kind = next(kind for kind in api.instance_types() if kind.regions)
    machine = api.launch(
        name="dag-1", region=kind.regions[0], instance_type=kind.name, ssh_key="laptop", tags={}
    )
    api.instance(machine).status                              # "booting"
    api.terminate([machine])

Money hangs on the difference between two failures: `Refused`, the service said no and nothing was done, and
`Unanswered`, nobody knows. Questions are asked again and so is `terminate`, which may be repeated; a launch is
repeated after a clear refusal by the rate limiter alone, as the API has no idempotency keys.

Written from Lambda's OpenAPI document 1.10.0 (https://docs.lambda.ai/api/cloud), not tried on the live service.
"""

import base64
import dataclasses
import email.utils
import fcntl
import hashlib
import itertools
import json
import os
import random
import re
import shutil
import sys
import tempfile
import time
import urllib.parse
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

import requests
import urllib3

T = TypeVar("T")

API_BASE = "https://cloud.lambda.ai/api/v1"
CONSOLE = "https://cloud.lambda.ai/instances"
SERVICE = r"https://cloud\.lambda\.ai(/[\w./-]*)?"
LOOPBACK = r"http://(127(\.\d{1,3}){3}|localhost|\[::1\])(:\d+)?(/[\w./-]*)?"
LAUNCH, TERMINATE = "/instance-operations/launch", "/instance-operations/terminate"

USER_AGENT = "nanogpt-dag/lambda_service (+requests)"
TIMEOUT, LAUNCH_TIMEOUT = (10, 30), (10, 60)  # (to connect, between two bytes), in real seconds
GAPS = {"launch": 12, "request": 1}  # the service's rates: seconds from one to the next
LONGEST_WAIT = 60  # seconds, whatever Retry-After says

NO_CAPACITY = "instance-operations/launch/insufficient-capacity"
GONE = "global/object-does-not-exist"
UNCLEAR = ("global/internal-error", "global/unknown", "provider/")  # codes that do not say what was done
REMEDIES = {
    "global/invalid-api-key": "check LAMBDA_API_KEY",
    "global/account-inactive": f"the account cannot rent; see what {CONSOLE} asks for",
    "global/forbidden": "this key may not do that; use one of another account or role",
    "global/quota-exceeded": "terminate a machine, or ask Lambda for a larger quota",
    "instance-operations/launch/file-system-in-wrong-region": "launch in the region of the file system",
    NO_CAPACITY: "try another region or instance type, or wait",
}


@dataclass(frozen=True)
class Clock:
    """Time as the tool counts it: `second` is how long one of its seconds really lasts, less than 1 in trials."""

    second: float = 1.0

    def now(self) -> float:
        return time.time()

    def sleep(self, seconds: float) -> None:
        time.sleep(max(0.0, seconds) * self.second)

    def after(self, seconds: float) -> float:
        """The epoch at which so many of our seconds will have passed."""
        return self.now() + seconds * self.second

    def seconds_since(self, epoch: float) -> float:
        return (self.now() - epoch) / self.second


# ------------------------------------------------------------------------------------------------------------
# what must not be seen

KEYS = ("LAMBDA_API_KEY", "WANDB_API_KEY")  # in the environment
_secrets: set[str] = set()


def keep_secret(value: str) -> None:
    """`redact` hides this value from now on, even when no environment variable holds it any more."""
    _secrets.add(value)


def redact(text: str) -> str:
    """The text without LAMBDA_API_KEY and WANDB_API_KEY: plain, quoted for a URL, or in basic authentication."""
    values = _secrets | {os.environ.get(name, "") for name in KEYS}
    forms = set()
    for value in filter(None, map(str.strip, values)):
        basic = {base64.b64encode(form.encode()).decode() for form in (value, value + ":", "api:" + value)}
        forms |= {value, urllib.parse.quote(value), urllib.parse.quote(value, safe=""), *basic}
    for form in sorted(forms, key=len, reverse=True):
        text = text.replace(form, "[redacted]")
    return text


def one_safe_line(text: str) -> str:
    """Foreign text for a terminal: no secrets, no escape sequences, one line of readable length."""
    line = redact("".join(char for char in " ".join(text.split()) if char.isprintable()))
    return line if len(line) <= 400 else line[:400] + "..."


# ------------------------------------------------------------------------------------------------------------
# what can go wrong


class ApiError(ValueError):
    """A request that failed, on one line without secrets. `status` is None where no answer came."""

    def __init__(
        self, message: str, status: int | None = None, code="", remedy="", wait: float | None = None
    ):
        self.message, self.code, self.status = one_safe_line(message), one_safe_line(code), status
        self.wait = wait  # seconds, where the service said when to come back
        details = ", ".join(filter(None, [f"HTTP {status}" if status else "", self.code]))
        line = self.message + (f" ({details})" if details else "") + (f": {remedy}" if remedy else "")
        super().__init__(one_safe_line(line))


class Refused(ApiError):
    """The service said no, and nothing was done."""


class NoCapacity(Refused):
    """No machine of this type is free in this region now."""


class Unanswered(ApiError):
    """Nobody knows whether it happened: a timeout, a lost connection, 5xx, or an answer that makes no sense."""


def may_pass(error: ApiError) -> bool:
    """Whether the same question may well be answered later."""
    return error.status in (None, 408, 429) or error.status < 300 or error.status >= 500


def is_gone(error: ApiError) -> bool:
    """The service, and not a proxy on the way to it, does not know what was asked for."""
    return isinstance(error, Refused) and (error.code == GONE or error.status == 404)


def is_final(error: ApiError) -> bool:
    """Whether it is no use to go on terminating. Other refusals may pass: a machine may not be up far enough."""
    return is_gone(error) or (isinstance(error, Refused) and error.status in (401, 403))


def retry_after(headers, clock: Clock) -> float | None:
    """Seconds to wait, from a number or an HTTP date; None where neither is there."""
    text = headers.get("Retry-After", "").strip()
    if re.fullmatch(r"\d{1,9}", text):
        return min(int(text), LONGEST_WAIT)
    try:
        wait = -clock.seconds_since(email.utils.parsedate_to_datetime(text).timestamp())
    except (ValueError, OverflowError, TypeError):
        return None
    return min(wait, LONGEST_WAIT) if wait > 0 else None


def cause(error: BaseException) -> str:
    """What lies at the bottom of an exception of requests: "Connection refused" rather than three lines."""
    if isinstance(error, requests.ConnectTimeout):
        return f"no connection within {TIMEOUT[0]} s"
    if isinstance(error, requests.Timeout):
        return "no answer in time"
    inner = getattr(error, "reason", None)
    inner = inner if isinstance(inner, BaseException) else error.args[-1] if error.args else None
    return cause(inner) if isinstance(inner, BaseException) else str(error).split(": ")[-1]


def read(what: str, answer: requests.Response, clock: Clock) -> Any:
    """The `data` of an answer; raises Refused only where the service itself clearly said no."""
    try:
        content = json.loads(answer.content)
    except (ValueError, RecursionError):
        content = None
    content = content if isinstance(content, dict) else {}
    status = answer.status_code
    if 200 <= status < 300 and "data" in content:
        return content["data"]
    if 300 <= status < 400:
        raise Unanswered(f"{what}: a redirect, which is not followed", status, remedy="a proxy or a portal?")
    error = content.get("error")
    error = error if isinstance(error, dict) else {}
    code = error["code"] if isinstance(error.get("code"), str) else ""
    remedy = REMEDIES.get(code) or str(error.get("suggestion") or "")
    clear = 400 <= status < 500 and status != 408 and code and not code.startswith(UNCLEAR)
    kind = Unanswered if not clear else NoCapacity if code == NO_CAPACITY else Refused
    message = str(error.get("message") or "an answer that is not the service's JSON")
    raise kind(f"{what}: {message}", status, code, remedy, retry_after(answer.headers, clock))


# ------------------------------------------------------------------------------------------------------------
# what the service describes


def at(path: str, kind: type = str, **options: Any) -> Any:
    """A field found at "region.name" in nested objects. Options: `default` where it may lack, `then` to convert."""
    return dataclasses.field(metadata=dict(path=path, kind=kind, **options))


def parse(cls: type[T], item: Any) -> T:
    """Only what a class declares: jupyter_token and jupyter_url of an instance stop here. LookupError(path)."""
    values = []
    for path, kind, options in ((f.metadata["path"], f.metadata["kind"], f.metadata) for f in fields(cls)):
        value = item
        for key in path.split("."):
            value = value.get(key) if isinstance(value, dict) else None
        if not isinstance(value, kind) or isinstance(value, bool):
            if "default" not in options:
                raise LookupError(path)
            value = options["default"]
        values.append(options["then"](value) if "then" in options else value)
    return cls(*values)


@dataclass(frozen=True)
class Named:
    name: str = at("name")


@dataclass(frozen=True)
class Tag:
    key: str = at("key")
    value: str = at("value", default="")


@dataclass(frozen=True)
class InstanceType:
    name: str = at("instance_type.name")
    description: str = at("instance_type.description", default="")
    gpu_description: str = at("instance_type.gpu_description", default="")  # "A100 (40 GB SXM4)"
    price_cents_per_hour: int = at("instance_type.price_cents_per_hour", int)
    vcpus: int = at("instance_type.specs.vcpus", int)
    memory_gib: int = at("instance_type.specs.memory_gib", int)
    storage_gib: int = at("instance_type.specs.storage_gib", int)
    gpus: int = at("instance_type.specs.gpus", int)
    regions: tuple[str, ...] = at(  # with capacity now
        "regions_with_capacity_available", list, then=lambda found: tuple(parse(Named, r).name for r in found)
    )

    @property
    def gpu_memory_gb(self) -> int | None:
        """Of one GPU; None where the description does not say."""
        found = re.search(r"(\d+) ?Gi?B", self.gpu_description)
        return int(found[1]) if found else None


@dataclass(frozen=True)
class SshKey:
    name: str = at("name")
    public_key: str = at("public_key", default="")


@dataclass(frozen=True)
class Image:
    id: str = at("id")
    name: str = at("name", default="")
    family: str = at("family", default="")
    architecture: str = at("architecture", default="")  # x86_64 or arm64
    region: str = at("region.name")


@dataclass(frozen=True)
class FileSystem:
    name: str = at("name")
    region: str = at("region.name")


@dataclass(frozen=True)
class Instance:
    id: str = at("id")
    name: str = at("name", default="")
    status: str = at("status")  # booting, active, unhealthy, terminating, terminated or preempted
    ip: str | None = at("ip", default=None, then=lambda ip: ip or None)
    region: str = at("region.name")
    type_name: str = at("instance_type.name")
    price_cents_per_hour: int = at("instance_type.price_cents_per_hour", int)
    ssh_key_names: tuple[str, ...] = at("ssh_key_names", list, default=(), then=tuple)
    tags: dict[str, str] = at(
        "tags",
        list,
        default=(),
        then=lambda tags: {t.key: t.value for t in (parse(Tag, tag) for tag in tags)},
    )


# ------------------------------------------------------------------------------------------------------------
# requests


class Bearer(requests.auth.AuthBase):
    """Being given an `auth`, requests leaves ~/.netrc alone, whose password would replace our header."""

    def __init__(self, key: str):
        self._key = key

    def __call__(self, request: requests.PreparedRequest) -> requests.PreparedRequest:
        request.headers["Authorization"] = f"Bearer {self._key}"
        return request


class Pace:
    """Keeps requests the service's GAPS apart, over threads and over all processes that use the same folder.

    A file's time of modification says when the next request may leave. Its lock is held for the booking only,
    never while waiting: a process that was stopped with Ctrl-Z must not keep another from terminating.
    """

    def __init__(self, clock: Clock, folder: Path):
        self.clock, self.folder = clock, folder

    def wait(self, kind: str) -> None:
        self.clock.sleep(self._book(kind, queue=True))

    def restart(self, kind: str) -> None:
        """The gap counts from the answer: how long a request was on its way to the service is not known."""
        self._book(kind, queue=False)

    def _book(self, kind: str, queue: bool) -> float:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with open(self.folder / f"next-{kind}", "a") as file:
                fcntl.flock(file, fcntl.LOCK_EX)
                now, free = self.clock.now(), os.stat(file.fileno()).st_mtime
                if free > self.clock.after(LONGEST_WAIT):  # the computer's clock was set back
                    free = now
                turn = max(now, free) if queue else now
                following = max(free, turn + GAPS[kind] * self.clock.second)
                os.utime(file.fileno(), (following, following))
            return (turn - now) / self.clock.second
        except OSError:  # a full disk must not keep anybody from terminating
            return GAPS[kind]


def to_stderr(line: str) -> None:
    print(line, file=sys.stderr)


def launch_body(
    *,
    name: str,
    region: str,
    instance_type: str,
    ssh_key: str,
    tags: dict[str, str],
    image_family: str | None = None,
    file_systems: Iterable[str] = (),
) -> dict[str, Any]:
    """What `launch` sends. ValueError where the service would refuse the name or a tag."""
    if not 0 < len(name) <= 64:
        raise ValueError(f"name {name!r}: a machine's name has 1 to 64 characters")
    for key, value in tags.items():
        if not re.fullmatch(r"[a-z][a-z0-9:-]{1,54}", key) or len(value) > 128:
            raise ValueError(f"tag {key!r}={value!r}: keys are [a-z][a-z0-9-:]+, at most 55 long, values 128")
    body = {
        "name": name,
        "region_name": region,
        "instance_type_name": instance_type,
        "ssh_key_names": [ssh_key],
        "tags": [{"key": key, "value": value} for key, value in tags.items()],
    }
    if image_family:
        body["image"] = {"family": image_family}
    if file_systems:
        body["file_system_names"] = list(file_systems)
    return body


class Api:
    """The service, for one key. Every method may raise Refused or Unanswered; threads may share one Api.

    Questions are repeated while they may yet be answered, for up to `patience` seconds a call. `pace` is a folder
    through which several processes of one person keep to the service's rates together.
    """

    def __init__(
        self,
        key: str,
        base: str | None = None,
        clock: Clock = Clock(),
        say: Callable[[str], None] = to_stderr,
        pace: Path | None = None,
        patience: float = 120,
    ):
        if not re.fullmatch(r"[!-~]+", key):
            problem = "has blanks, line breaks or foreign characters" if key else "is not set"
            enter = "type `read -rs LAMBDA_API_KEY && export LAMBDA_API_KEY` and paste a key"
            raise ValueError(f"LAMBDA_API_KEY {problem}: {enter} from https://cloud.lambda.ai/api-keys")
        keep_secret(key)
        self.base = (base or API_BASE).rstrip("/")
        self.account = (
            f"{self.base} {hashlib.sha256(key.encode()).hexdigest()[:8]}"  # which machines it can see
        )
        self._on_loopback = bool(re.fullmatch(LOOPBACK, self.base))
        if not self._on_loopback and not re.fullmatch(SERVICE, self.base):
            raise ValueError(f"LAMBDA_API_BASE: expected {API_BASE} or http:// and a loopback address")
        if clock.second != 1 and not self._on_loopback:
            raise ValueError("LAMBDA_SECOND is for trials with LAMBDA_API_BASE on loopback: unset it")
        self.clock, self.patience, self._auth, self._say = clock, patience, Bearer(key), say
        if pace is None:
            pace = Path(tempfile.mkdtemp(prefix="lambda-api-"))
            weakref.finalize(self, shutil.rmtree, pace, ignore_errors=True)
        self._pace = Pace(clock, pace)

    @classmethod
    def from_environment(cls, say: Callable[[str], None] = to_stderr, pace: Path | None = None) -> "Api":
        """From LAMBDA_API_KEY and, for trials without the cloud, LAMBDA_API_BASE and LAMBDA_SECOND."""
        second = os.environ.get("LAMBDA_SECOND") or "1"
        if not re.fullmatch(r"1|0?\.0*[1-9]\d*", second):
            raise ValueError(f"LAMBDA_SECOND={second}: expected a number above 0, at most 1")
        base = os.environ.get("LAMBDA_API_BASE")
        return cls(os.environ.get("LAMBDA_API_KEY", ""), base, Clock(float(second)), say, pace)

    # questions

    def instance_types(self) -> list[InstanceType]:
        """Cheapest first."""
        types = self._list("/instance-types", InstanceType, container=dict)
        return sorted(types, key=lambda kind: (kind.price_cents_per_hour, kind.name))

    def ssh_keys(self) -> list[SshKey]:
        return self._list("/ssh-keys", SshKey)

    def images(self) -> list[Image]:
        return self._list("/images", Image)

    def file_systems(self) -> list[FileSystem]:
        return self._list("/file-systems", FileSystem)

    def instances(self) -> list[Instance]:
        return self._list("/instances", Instance)

    def instance(self, id: str) -> Instance | None:
        """None where the service does not know the id: long gone, or launched only moments ago."""
        if not re.fullmatch(r"[\w-]+", id):
            raise ValueError(f"{id!r} is not the id of an instance")
        try:
            return self._parse(f"/instances/{id}", Instance, self._get(f"/instances/{id}"))
        except Refused as error:
            if is_gone(error):
                return None
            raise

    # deeds

    def launch(self, **wanted: Any) -> str:
        """Rent a machine and return its id; takes what `launch_body` takes.

        Unanswered means that a machine may be running: look for its name before anything else. Nothing but a
        clear 429 is tried again here.
        """

        def limited(error: ApiError) -> bool:
            return isinstance(error, Refused) and error.status == 429

        match self._call("POST", LAUNCH, launch_body(**wanted), again=limited, limit=self.patience):
            case {"instance_ids": [str(id)]} if id:
                return id
        raise Unanswered(f"POST {LAUNCH}: the answer is not the id of one machine", 200)

    def terminate(self, ids: Iterable[str], give_up: float = 600) -> list[str]:
        """End machines and their bills; returns those ids that the service does not know.

        Tried for `give_up` seconds through everything but a refused key; raises the last error when every id has
        had its turn. An accepted request is not yet a machine that is gone, and an unknown id may be a machine
        that was launched only moments ago: look again.
        """
        assert not isinstance(ids, str), "a list of ids"
        todo, unknown, failure = list(ids), [], None
        for limit in (0, give_up) if len(todo) > 1 else (give_up,):  # each once, before any of them for long
            left, failure = [], None
            for id in todo:  # a request each: one that is refused must not keep the others alive
                body = {"instance_ids": [id]}
                try:
                    self._call("POST", TERMINATE, body, again=lambda e: not is_final(e), limit=limit)
                except ApiError as error:
                    if is_gone(error):
                        unknown.append(id)
                    else:
                        left, failure = [*left, id], error
            todo = left
        if failure:
            raise failure
        return unknown

    # the way there and back

    def _get(self, path: str) -> Any:
        return self._call("GET", path, None, again=may_pass, limit=self.patience)

    def _list(self, path: str, kind: type[T], container: type = list) -> list[T]:
        data = self._get(path)
        if not isinstance(data, container):
            raise Unanswered(f"GET {path}: expected a {container.__name__}", 200)
        items = data.values() if isinstance(data, dict) else data
        return [self._parse(path, kind, item) for item in items]

    def _parse(self, path: str, kind: type[T], item: Any) -> T:
        try:
            return parse(kind, item)
        except LookupError as missing:
            field = missing.args[0]
        raise Unanswered(f"GET {path}: the answer lacks {field}", 200)

    def _call(
        self, method: str, path: str, body: dict | None, *, again: Callable[[ApiError], bool], limit: float
    ) -> Any:
        """Ask until there is an answer, an error that is not to be tried `again`, or `limit` seconds have passed.

        Monotonic time: a laptop that was asleep for an hour has not used up its patience.
        """
        start = time.monotonic()
        for attempt in itertools.count():
            try:
                return self._ask(method, path, body)
            except ApiError as error:
                backoff = min(30, 2 ** min(attempt, 5) * random.uniform(1, 1.25))
                wait = backoff if error.wait is None else error.wait
                passed = (time.monotonic() - start) / self.clock.second
                if not again(error) or passed + wait > limit:
                    raise
                self._say(f"{error}; trying again in {wait:.0f} s")
            self.clock.sleep(wait)

    def _ask(self, method: str, path: str, body: dict | None) -> Any:
        """One request on a connection of its own: an idle one may be dead, and a launch would get lost on it."""
        kinds = ("launch", "request") if path == LAUNCH else ("request",)
        for kind in kinds:
            self._pace.wait(kind)
        try:
            with requests.Session() as session:
                session.trust_env = not self._on_loopback  # no proxy between us and this computer
                answer = session.request(
                    method,
                    self.base + path,
                    json=body,
                    auth=self._auth,
                    headers={"User-Agent": USER_AGENT, "Accept": "application/json"},
                    timeout=LAUNCH_TIMEOUT if path == LAUNCH else TIMEOUT,
                    allow_redirects=False,
                )
        except (OSError, urllib3.exceptions.HTTPError) as error:  # those of requests are OSErrors
            problem = cause(error)
        else:
            return read(f"{method} {path}", answer, self.clock)
        finally:
            for kind in kinds:
                self._pace.restart(kind)
        raise Unanswered(f"{method} {path}: {problem}")  # not a cause: that holds the request and its key
