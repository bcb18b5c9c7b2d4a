"""The client against a real HTTP server on loopback that gives scripted answers."""

import base64
import fcntl
import gc
import itertools
import json
import logging
import os
import re
import threading
import time
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import quote

import pytest
import requests
from hypothesis import given
from hypothesis import strategies as st

from launch import lambda_api
from launch.lambda_api import (
    Api,
    ApiError,
    Clock,
    InstanceType,
    NoCapacity,
    Pace,
    Refused,
    Unanswered,
    redact,
)

KEY = "secret_dag_0123456789.abc+/="
SECOND = 0.004  # of the tool, in real seconds
MACHINE = {
    "id": "0920582c7ff041399e34823a0be62549",
    "name": "dag-1",
    "ip": "198.51.100.2",
    "status": "active",
    "ssh_key_names": ["laptop"],
    "file_system_names": [],
    "region": {"name": "us-east-1", "description": "Virginia"},
    "instance_type": {"name": "gpu_1x_a10", "price_cents_per_hour": 75, "specs": {"gpus": 1}},
    "tags": [{"key": "made-by", "value": "dag-gpt"}],
    "jupyter_token": "live-credential",
    "jupyter_url": "https://jupyter/?token=live-credential",
    "actions": {},
}
WANTED = dict(
    name="dag-1", region="us-east-1", instance_type="gpu_1x_a10", ssh_key="laptop", tags={"run": "7"}
)


def ok(data):
    return 200, {"data": data}


def no(status, code, **headers):
    return status, {"error": {"code": code, "message": "so it is"}}, headers


LAUNCHED = ok({"instance_ids": ["abc"]})
LIMITED = no(429, "global/rate-limited")
HTML = 502, b"<html>Bad gateway</html>"
TRUNCATED = 200, b'{"data": {"instance_ids": ["ab'
HANG_UP, SILENCE = "close the connection without an answer", "answer too late"


class Server:
    """Gives `answers` one by one, the last for ever, and keeps what was asked."""

    def __init__(self):
        self.answers, self.requests, self.lock = [ok([])], [], threading.Lock()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def answer(self):
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                request = SimpleNamespace(
                    method=self.command,
                    path=self.path,
                    headers=self.headers,
                    body=json.loads(body) if body else None,
                    time=time.time(),
                )
                with outer.lock:
                    outer.requests.append(request)
                    answer = outer.answers.pop(0) if len(outer.answers) > 1 else outer.answers[0]
                answer = answer(request) if callable(answer) else answer
                if answer is SILENCE:
                    time.sleep(0.5)
                if answer in (HANG_UP, SILENCE):
                    return
                status, content, *headers = answer
                content = content if isinstance(content, bytes) else json.dumps(content).encode()
                self.send_response(status)
                for name, value in {
                    "Content-Length": len(content),
                    **(headers[0] if headers else {}),
                }.items():
                    self.send_header(name.replace("_", "-"), str(value))
                self.end_headers()
                self.wfile.write(content)

            do_GET = do_POST = answer

            def log_message(self, *_):
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.base = f"http://127.0.0.1:{self.http.server_port}/api/v1"
        threading.Thread(target=self.http.serve_forever, args=(0.01,), daemon=True).start()

    def stop(self):
        self.http.shutdown()
        self.http.server_close()

    def gaps(self):
        """Seconds of the tool from one request to the next."""
        return [(b.time - a.time) / SECOND for a, b in itertools.pairwise(self.requests)]


@pytest.fixture
def server():
    server = Server()
    yield server
    server.stop()


@pytest.fixture
def other():
    other = Server()
    yield other
    other.stop()


@pytest.fixture(autouse=True)
def clean(monkeypatch):
    for name in list(os.environ):
        if name.startswith(("LAMBDA_", "WANDB_")) or name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)
    monkeypatch.setattr(lambda_api, "_secrets", set())


@pytest.fixture
def said():
    return []


@pytest.fixture
def api(server, said):
    return Api(KEY, server.base, Clock(SECOND), said.append)


def failure(call, *arguments, **options) -> ApiError:
    with pytest.raises(ApiError) as raised:
        call(*arguments, **options)
    return raised.value


# what is sent


def test_a_request_names_us_and_carries_the_key(api, server):
    assert api.instances() == []
    (request,) = server.requests
    assert (request.method, request.path, request.body) == ("GET", "/api/v1/instances", None)
    assert request.headers["Authorization"] == f"Bearer {KEY}"
    assert request.headers["User-Agent"] == "nanogpt-dag/lambda_service (+requests)"
    assert "Cookie" not in request.headers


def test_a_password_in_netrc_does_not_replace_the_key(api, server, tmp_path, monkeypatch):
    netrc = tmp_path / "netrc"
    netrc.write_text("machine 127.0.0.1 login eve password wrong\ndefault login eve password wrong\n")
    netrc.chmod(0o600)
    monkeypatch.setenv("NETRC", str(netrc))
    requests.get(server.base)
    api.instances()
    api._on_loopback = False  # as towards the service, where proxies of the environment are used
    api.instances()
    assert [r.headers["Authorization"].split()[0] for r in server.requests] == ["Basic", "Bearer", "Bearer"]


def test_a_proxy_is_for_the_service_and_never_for_loopback(api, server, other, monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY", "ALL_PROXY"):
        monkeypatch.setenv(name, other.base.removesuffix("/api/v1"))
    api.instances()
    assert len(server.requests) == 1 and not other.requests
    api._on_loopback = False
    api.instances()
    assert len(server.requests) == 1 and len(other.requests) == 1


@pytest.mark.parametrize("status", [301, 302, 307, 308])
def test_a_redirect_is_not_followed(api, server, other, status):
    server.answers = [(status, b"", {"Location": other.base + "/instances"})]
    for error in failure(api.instances), failure(api.launch, **WANTED):
        assert isinstance(error, Unanswered) and "redirect" in str(error) and error.status == status
    assert len(server.requests) == 2 and not other.requests


def test_the_body_of_a_launch(api, server):
    server.answers = [LAUNCHED]
    assert api.launch(**WANTED, image_family="lambda-stack-22-04", file_systems=["data"]) == "abc"
    (request,) = server.requests
    assert (request.method, request.path) == ("POST", "/api/v1/instance-operations/launch")
    assert request.headers["Content-Type"] == "application/json"
    assert request.body == {
        "name": "dag-1",
        "region_name": "us-east-1",
        "instance_type_name": "gpu_1x_a10",
        "ssh_key_names": ["laptop"],
        "tags": [{"key": "run", "value": "7"}],
        "image": {"family": "lambda-stack-22-04"},
        "file_system_names": ["data"],
    }
    assert set(lambda_api.launch_body(**WANTED)) == set(request.body) - {"image", "file_system_names"}


@pytest.mark.parametrize(
    "wrong",
    [
        dict(name=""),
        dict(name="n" * 65),
        dict(tags={"Run": "7"}),
        dict(tags={"r": "7"}),
        dict(tags={"run\n": "7"}),
        dict(tags={"r" * 56: "7"}),
        dict(tags={"run": "7" * 129}),
    ],
)
def test_a_launch_that_the_service_would_refuse_is_not_sent(api, server, wrong):
    with pytest.raises(ValueError) as raised:
        api.launch(**WANTED | wrong)
    assert not isinstance(raised.value, ApiError) and not server.requests
    limits = dict(name="n" * 64, tags={"r" * 55: "7" * 128, "a:1-b": ""})
    server.answers = [LAUNCHED]
    assert api.launch(**WANTED | limits) == "abc"


# questions


def waits(said):
    return [int(re.search(r"again in (\d+) s$", line)[1]) for line in said]


def test_a_question_is_asked_until_it_is_answered(api, server, said):
    timeout = no(408, "global/timeout")
    again = [LIMITED, no(500, "global/internal-error"), HTML, TRUNCATED, HANG_UP, timeout, (429, b"")]
    server.answers = [*again, ok([MACHINE])]
    assert [machine.id for machine in api.instances()] == [MACHINE["id"]]
    assert all("GET /instances" in line for line in said) and len(server.requests) == len(again) + 1
    for wait, gap, least in zip(waits(said), server.gaps(), (1, 2, 4, 8, 16, 30, 30), strict=True):
        assert least <= wait <= min(30, least * 1.25) and gap >= wait - 0.5


@pytest.mark.parametrize("header, wait", [("7", 7), ("3600", 60), (None, 1), ("soon", 1)])
def test_the_service_may_say_when_to_come_back(api, server, said, header, wait):
    server.answers = [no(429, "global/rate-limited", **({"Retry_After": header} if header else {})), ok([])]
    api.instances()
    assert waits(said) == [wait] and server.gaps()[0] >= wait * 0.97


@pytest.mark.parametrize(
    "text, wait",
    [("0", 0), ("5", 5), (" 59 ", 59), ("61", 60), ("-1", None), ("5.5", None), ("soon", None), ("", None)],
)
def test_retry_after(text, wait):
    assert lambda_api.retry_after({"Retry-After": text}, Clock()) == wait


def test_retry_after_as_a_date():
    def wait(seconds):
        return lambda_api.retry_after(
            {"Retry-After": formatdate(time.time() + seconds, usegmt=True)}, Clock()
        )

    assert 27 < wait(30) <= 30 and wait(3600) == 60 and wait(-30) is None


@pytest.mark.parametrize("answer, kind", [(HTML, Unanswered), (LIMITED, Refused)])
@pytest.mark.parametrize("deed", [False, True])
def test_patience_ends(server, said, answer, kind, deed):
    api = Api(KEY, server.base, Clock(SECOND), said.append, patience=90)
    server.answers = [answer]
    start = time.monotonic()
    error = failure(api.terminate, ["abc"], give_up=90) if deed else failure(api.instances)
    assert type(error) is kind and len(server.requests) == len(said) + 1 > 3
    assert 90 - 30 <= (time.monotonic() - start) / SECOND < 90 + 200 and sum(waits(said)) < 92


@pytest.mark.parametrize(
    "status, code, words",
    [
        (401, "global/invalid-api-key", "LAMBDA_API_KEY"),
        (403, "global/account-inactive", lambda_api.CONSOLE),
        (403, "global/forbidden", "key"),
        (400, "global/quota-exceeded", "quota"),
        (400, "instance-operations/launch/file-system-in-wrong-region", "region"),
        (418, "tea/new", "so it is"),
    ],
)
def test_a_clear_no_is_final_and_says_what_to_do(api, server, status, code, words):
    server.answers = [no(status, code)]
    for error in failure(api.instances), failure(api.launch, **WANTED):
        assert type(error) is Refused and (error.status, error.code) == (status, code)
        assert "so it is" in str(error) and words in str(error).replace("LAMBDA_API_KEY", "LAMBDA_API_KEY ")
    assert len(server.requests) == 2


def test_the_services_own_suggestion_is_shown(api, server):
    server.answers = [(400, {"error": {"code": "new/thing", "message": "No.", "suggestion": "Try tea."}})]
    assert str(failure(api.instances)) == "GET /instances: No. (HTTP 400, new/thing): Try tea."


def test_silence_has_an_end(api, server, monkeypatch):
    api.patience, server.answers = 0, [SILENCE]
    monkeypatch.setattr(lambda_api, "TIMEOUT", (1, 0.1))
    assert str(failure(api.instances)) == "GET /instances: no answer in time"
    monkeypatch.setattr(lambda_api, "TIMEOUT", (1, 5))
    monkeypatch.setattr(lambda_api, "LAUNCH_TIMEOUT", (1, 0.1))
    assert "no answer in time" in str(failure(api.launch, **WANTED))
    assert lambda_api.cause(requests.ConnectTimeout("...")) == "no connection within 1 s"


def test_connection_trouble_is_told_in_a_few_words(server, said):
    server.stop()
    error = failure(Api(KEY, server.base, Clock(SECOND), said.append, patience=0).instances)
    assert str(error) == "GET /instances: [Errno 111] Connection refused" and error.status is None
    assert re.search("closed", lambda_api.cause(requests.ConnectionError(ConnectionError("it: closed"))))


# launches: what happens to money


@pytest.mark.parametrize(
    "answer",
    [
        HTML,
        TRUNCATED,
        HANG_UP,
        no(500, "global/internal-error"),
        no(503, "instance-operations/launch/insufficient-capacity"),
        no(400, "global/unknown"),
        no(400, "provider/timeout"),
        no(408, "global/timeout"),
        (400, b"<html>"),
        (403, b"error code: 1010"),
        (429, b"error code: 1015"),
        (400, {"error": "no"}),
        (400, {"error": {"message": "no"}}),
        (400, {"error": {"code": 7}}),
        (200, b""),
        (200, b"\xff\xfe"),
        (200, b"[" * 100_000),
        (200, {"error": {"code": "global/quota-exceeded"}}),
        ok({"instance_ids": []}),
        ok({"instance_ids": ["a", "b"]}),
        ok({"instance_ids": [7]}),
        ok({"instance_ids": [""]}),
        ok({"instance_ids": "abc"}),
        ok(None),
        ok([]),
    ],
    ids=lambda answer: str(answer)[:60],
)
def test_an_unclear_launch_is_never_repeated(api, server, said, answer):
    server.answers = [answer, LAUNCHED]
    assert type(failure(api.launch, **WANTED)) is Unanswered
    assert len(server.requests) == 1 and not said


@given(st.sampled_from([200, 201, 204, 400, 404, 409, 429, 499, 500, 599]), st.data())
def test_whatever_comes_back_a_refusal_needs_a_code(status, data):
    keys = st.sampled_from(["error", "data", "code", "message", "instance_ids"])
    values = st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(max_size=8) | st.just("global/unknown"),
        lambda inner: st.lists(inner, max_size=2) | st.dictionaries(keys, inner, max_size=3),
    )
    body = data.draw(st.binary(max_size=20) | values.map(lambda value: json.dumps(value).encode()))
    answer = requests.Response()
    answer.status_code, answer._content = status, body
    try:
        lambda_api.read("POST", answer, Clock())
        assert status < 300 and "data" in json.loads(body)
    except Refused:
        code = json.loads(body)["error"]["code"]
        assert 400 <= status < 500 and code and code != "global/unknown"
    except Unanswered:
        pass


def test_a_launch_waits_for_the_rate_limiter(api, server, said):
    server.answers = [LIMITED, no(429, "global/rate-limited", Retry_After="2"), LAUNCHED]
    assert api.launch(**WANTED) == "abc"
    assert len(server.requests) == 3 and min(server.gaps()) >= 12 * 0.99 and len(said) == 2


def test_a_limiter_that_never_yields(server, said):
    server.answers = [LIMITED]
    error = failure(Api(KEY, server.base, Clock(SECOND), said.append, patience=40).launch, **WANTED)
    assert type(error) is Refused and error.status == 429 and 2 <= len(server.requests) <= 5


def test_no_capacity(api, server):
    server.answers = [no(400, "instance-operations/launch/insufficient-capacity")]
    assert type(failure(api.launch, **WANTED)) is NoCapacity and len(server.requests) == 1


# the end of a machine


def test_terminate_goes_on_through_everything_that_may_pass(api, server):
    portal = (302, b"", {"Location": "http://portal/"})
    early = no(400, "instance-operations/terminate/not-launched")
    trouble = [
        LIMITED,
        HTML,
        HANG_UP,
        portal,
        (404, b"<html>"),
        (200, b"<html>Log in</html>"),
        TRUNCATED,
        early,
    ]
    server.answers = [*trouble, ok({"terminated_instances": []})]
    assert api.terminate(["abc"]) == []
    assert [request.body for request in server.requests] == [{"instance_ids": ["abc"]}] * 9
    assert {request.path for request in server.requests} == {"/api/v1/instance-operations/terminate"}


def test_a_key_that_was_refused_will_not_terminate_later(api, server):
    server.answers = [no(401, "global/invalid-api-key")]
    assert failure(api.terminate, ["abc"]).status == 401 and len(server.requests) == 1


def test_an_unknown_machine_is_named_and_others_end_all_the_same(api, server):
    def answer(request):
        assert request.headers["Authorization"]
        (id,) = request.body["instance_ids"]
        return no(404, "global/object-does-not-exist") if id == "old" else ok({})

    server.answers = [answer]
    assert api.terminate(["old", "new"]) == ["old"] and api.terminate([]) == []
    assert [request.body["instance_ids"] for request in server.requests] == [["old"], ["new"]]


@pytest.mark.parametrize("trouble", [HTML, HANG_UP, no(403, "global/forbidden"), LIMITED])
def test_one_machine_in_trouble_does_not_keep_the_others_alive(api, server, trouble):
    server.answers = [lambda request: trouble if request.body["instance_ids"] == ["bad"] else ok({})]
    failure(api.terminate, ["bad", "good"], give_up=10)
    asked = [request.body["instance_ids"][0] for request in server.requests]
    assert asked[:2] == ["bad", "good"] and set(asked[2:]) == {"bad"}


# answers


def test_an_instance(api, server):
    server.answers = [ok(MACHINE)]
    machine = api.instance(MACHINE["id"])
    assert server.requests[0].path == f"/api/v1/instances/{MACHINE['id']}"
    assert machine == lambda_api.Instance(
        id=MACHINE["id"],
        name="dag-1",
        status="active",
        ip="198.51.100.2",
        region="us-east-1",
        type_name="gpu_1x_a10",
        price_cents_per_hour=75,
        ssh_key_names=("laptop",),
        tags={"made-by": "dag-gpt"},
    )
    assert "live-credential" not in repr(machine)
    sparse = {key: MACHINE[key] for key in ("id", "status", "region", "instance_type")}
    for absent in {}, dict(ip=None, name=None, tags=None), dict(ip=""):
        server.answers = [ok(sparse | absent)]
        machine = api.instance("abc")
        assert (machine.ip, machine.name, machine.tags, machine.ssh_key_names) == (None, "", {}, ())


@pytest.mark.parametrize("answer", [no(404, "global/x"), no(400, "global/object-does-not-exist")])
def test_an_instance_that_is_gone(api, server, answer):
    server.answers = [answer]
    assert api.instance("abc") is None and len(server.requests) == 1


def test_only_the_service_itself_can_say_that_a_machine_is_gone(api, server):
    server.answers = [(404, b"<html>")]
    assert type(failure(api.instance, "abc")) is Unanswered
    server.answers = [ok({})]
    assert "lacks id" in str(failure(api.instance, "abc"))
    for nothing in {}, None, "":
        server.answers = [ok(nothing)]
        assert type(failure(api.instances)) is Unanswered
    for id in "", "..", "a/b", "a?b", "a\n":
        with pytest.raises(ValueError, match="not the id"):
            api.instance(id)


@pytest.mark.parametrize(
    "path", ["id", "status", "region.name", "instance_type.name", "instance_type.price_cents_per_hour"]
)
@pytest.mark.parametrize("value", [None, True, [], "absent"])
def test_a_field_that_lacks_is_named(api, server, path, value):
    machine = json.loads(json.dumps(MACHINE))
    *above, last = path.split(".")
    owner = machine[above[0]] if above else machine
    if value == "absent":
        del owner[last]
    else:
        owner[last] = value
    server.answers = [ok([MACHINE, machine])]
    error = failure(api.instances)
    assert type(error) is Unanswered and f"lacks {path}" in str(error) and len(server.requests) == 1


def instance_type(name, cents, gpu="A10 (24 GB PCIe)", regions=()):
    specs = dict(vcpus=30, memory_gib=200, storage_gib=1400, gpus=1, new=1)
    kind = dict(name=name, description="one", gpu_description=gpu, price_cents_per_hour=cents, specs=specs)
    regions = [{"name": region, "description": ""} for region in regions]
    return {"instance_type": kind, "regions_with_capacity_available": regions}


def test_types_come_cheapest_first(api, server):
    kinds = {
        "b": instance_type("b", 75),
        "c": instance_type("c", 50, regions=["x", "y"]),
        "a": instance_type("a", 75),
    }
    server.answers = [ok(kinds)]
    cheapest, *rest = api.instance_types()
    assert [kind.name for kind in rest] == ["a", "b"]
    assert cheapest == InstanceType("c", "one", "A10 (24 GB PCIe)", 50, 30, 200, 1400, 1, ("x", "y"))
    del kinds["a"]["instance_type"]["specs"]["gpus"]
    assert "lacks instance_type.specs.gpus" in str(failure(api.instance_types))
    server.answers = [ok(list(kinds.values()))]
    assert type(failure(api.instance_types)) is Unanswered


@pytest.mark.parametrize(
    "text, gigabytes",
    [("A100 (40 GB SXM4)", 40), ("1x A10 (24 GB PCIe)", 24), ("H100 (80GiB)", 80), ("CPU", None), ("", None)],
)
def test_memory_of_a_gpu(api, server, text, gigabytes):
    server.answers = [ok({"t": instance_type("t", 1, text)})]
    assert api.instance_types()[0].gpu_memory_gb == gigabytes


def test_keys_images_and_file_systems(api, server):
    region = {"name": "us-east-1"}
    server.answers = [
        ok([{"id": "1", "name": "laptop", "public_key": "ssh-ed25519 A"}]),
        ok(
            [
                {
                    "id": "2",
                    "name": "Stack",
                    "family": "stack",
                    "architecture": "arm64",
                    "region": region,
                    "new": 1,
                }
            ]
        ),
        ok([{"id": "3", "name": "data", "region": region}]),
    ]
    assert api.ssh_keys() == [lambda_api.SshKey("laptop", "ssh-ed25519 A")]
    assert api.images() == [lambda_api.Image("2", "Stack", "stack", "arm64", "us-east-1")]
    assert api.file_systems() == [lambda_api.FileSystem("data", "us-east-1")]
    assert [r.path.removeprefix("/api/v1") for r in server.requests] == [
        "/ssh-keys",
        "/images",
        "/file-systems",
    ]


# rates


def test_threads_and_processes_keep_the_rate_together(server, said, tmp_path):
    apis = [
        Api(KEY, server.base, Clock(SECOND), said.append, pace=tmp_path / "new" / "folder") for _ in range(2)
    ]
    threads = [threading.Thread(target=apis[number % 2].instances) for number in range(8)]
    start = time.time()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    times = sorted(request.time - start for request in server.requests)
    assert len(times) == 8 and all(time >= 0.97 * n * SECOND for n, time in enumerate(times))


def test_one_books_at_a_time(tmp_path):
    file, pace = tmp_path / "next-request", Pace(Clock(0.05), tmp_path)
    pace.wait("request")
    thread = threading.Thread(target=pace.wait, args=("request",))
    with open(file) as booking:
        fcntl.flock(booking, fcntl.LOCK_EX)
        thread.start()
        time.sleep(0.1)
        turn = time.time() + 0.3
        os.utime(file, (turn, turn))
    thread.join()
    assert time.time() >= turn and file.stat().st_mtime == pytest.approx(turn + 0.05, abs=0.001)


def test_a_slow_answer_counts_as_the_last_request(api, server):
    late = []

    def slow(_):
        time.sleep(5 * SECOND)
        late.append(time.time())
        return ok([])

    server.answers = [slow, ok([])]
    api.instances()
    api.instances()
    assert server.requests[1].time - late[0] >= 0.97 * SECOND


def test_launches_keep_their_distance_and_hold_up_nothing_else(server, said):
    api = Api(KEY, server.base, Clock(0.03), said.append)
    server.answers = [no(400, "global/invalid-parameters")]
    failure(api.launch, **WANTED)
    launch = threading.Thread(target=failure, args=(api.launch,), kwargs=WANTED)
    launch.start()
    while (
        Path(api._pace.folder) / "next-launch"
    ).stat().st_mtime < time.time() + 15 * 0.03:  # not yet booked
        time.sleep(0.001)
    server.answers = [ok({}), no(400, "global/invalid-parameters")]
    api.terminate(["abc"])
    launch.join()
    assert ["launch" in request.path for request in server.requests] == [True, False, True]
    assert server.requests[2].time - server.requests[0].time >= 12 * 0.03 * 0.99


def test_a_clock_that_was_set_back_holds_up_nothing(tmp_path):
    pace = Pace(Clock(SECOND), tmp_path)
    pace.wait("request")
    os.utime(tmp_path / "next-request", (time.time() + 5,) * 2)
    start = time.monotonic()
    pace.wait("request")
    assert time.monotonic() - start < 3 and (tmp_path / "next-request").stat().st_mtime < time.time() + 1


def test_no_folder_for_the_pace_is_no_reason_to_fail(server, said, tmp_path):
    (tmp_path / "file").touch()
    api = Api(KEY, server.base, Clock(0.1), said.append, pace=tmp_path / "file")
    api.instances()
    api.instances()
    assert server.requests[1].time - server.requests[0].time >= 0.097


def test_the_private_folder_goes_with_its_api(server):
    api = Api(KEY, server.base, Clock(SECOND))
    folder = Path(api._pace.folder)
    assert folder.is_dir()
    del api
    gc.collect()
    assert not folder.exists()


def test_clock():
    clock = Clock(0.01)
    before = time.time()
    clock.sleep(2)
    clock.sleep(-1)
    after = time.time()
    assert after - before >= 0.02 and (after - before) * 100 <= clock.seconds_since(before) < 500
    assert after + 0.1 <= clock.after(10) <= time.time() + 0.1


# secrets


def leaks(text: str) -> bool:
    basic = base64.b64encode(f"{KEY}:".encode()).decode()
    return any(form in text for form in (KEY, quote(KEY), quote(KEY, safe=""), basic))


def test_no_secret_leaves_through_errors_notices_or_logs(api, server, said, caplog):
    caplog.set_level(logging.DEBUG)
    basic = base64.b64encode(f"{KEY}:".encode()).decode()
    echo = f"bad header Bearer {KEY}, Basic {basic}, {quote(KEY, safe='')} {quote(KEY)}{KEY[:9]}\x00{KEY[9:]}\x1b[31m\nnext"
    answer = {"error": {"code": KEY, "message": echo, "suggestion": echo}}
    server.answers = [(500, answer), (500, answer), (400, answer)]
    error = failure(api.instances)
    seen = [
        str(error),
        repr(error),
        error.message,
        error.code,
        *map(str, error.args),
        *said,
        caplog.text,
        repr(api),
    ]
    assert len(said) == 2 and not any(map(leaks, seen)) and "[redacted]" in str(error)
    assert "Authorization" not in str(error) and str(error).isprintable() and said[0].isprintable()
    for answer in HANG_UP, TRUNCATED:  # what lies beneath would hold the request, the header and the body
        server.answers = [answer]
        error = failure(api.launch, **WANTED)
        assert error.__cause__ is None and error.__context__ is None


def test_redact(monkeypatch):
    assert redact("nothing set") == "nothing set"
    monkeypatch.setenv("LAMBDA_API_KEY", KEY)
    monkeypatch.setenv("WANDB_API_KEY", "wandb-key\n")
    assert redact(f"a {KEY} b wandb-key c") == "a [redacted] b [redacted] c"
    monkeypatch.delenv("WANDB_API_KEY")
    lambda_api.keep_secret("wandb-key")
    assert redact("wandb-key") == "[redacted]" and redact("") == ""


def test_a_long_message_is_cut_after_the_secret_is_gone():
    lambda_api.keep_secret(KEY)
    for length in range(350, 410):
        assert "secret_dag" not in lambda_api.one_safe_line("x" * length + KEY)


# the environment


def test_from_environment(server, monkeypatch, said, tmp_path):
    monkeypatch.setenv("LAMBDA_API_KEY", KEY)
    assert (
        Api.from_environment().base == "https://cloud.lambda.ai/api/v1"
        and Api.from_environment().clock == Clock()
    )
    monkeypatch.setenv("LAMBDA_API_BASE", server.base + "/")
    monkeypatch.setenv("LAMBDA_SECOND", str(SECOND))
    api = Api.from_environment(said.append, tmp_path)
    assert api.base == server.base and api.clock == Clock(SECOND) and api.instances() == []
    assert (tmp_path / "next-request").exists()


@pytest.mark.parametrize("key", ["", " ", "a b", "key\n", "\tkey", "k\u00e9y", "a\x00b"])
def test_a_key_that_cannot_be_one(key):
    with pytest.raises(ValueError, match="LAMBDA_API_KEY") as raised:
        Api(key)
    assert "\n" not in str(raised.value) and (len(key) < 2 or key not in str(raised.value))


@pytest.mark.parametrize(
    "base",
    [
        "http://127.0.0.1:8000/api/v1",
        "http://localhost",
        "http://[::1]:80/",
        "https://cloud.lambda.ai/api/v2/",
    ],
)
def test_places_that_may_see_the_key(base):
    assert Api(KEY, base).base == base.rstrip("/")


@pytest.mark.parametrize(
    "base",
    [
        "http://cloud.lambda.ai/api/v1",
        "https://cloud.lambda.ai.evil.com/",
        "https://cloudxlambda.ai",
        "https://cloud.lambda.ai@evil.com/",
        "https://cloud.lambda.ai:pw@evil.com/",
        "http://127.0.0.1@evil.com",
        "http://127.0.0.1.evil.com/",
        "http://127.0.0.1\\@evil.com/",
        "http://localhost.evil.com",
        "http://10.0.0.1/",
        "https://cloud.lambdalabs.com/api/v1",
        "https://127.0.0.1/",
        "http://127.0.0.1/?a",
        "file:///etc/passwd",
        "http://127.0.0.1\n",
    ],
)
def test_places_that_may_not(base):
    with pytest.raises(ValueError, match="LAMBDA_API_BASE"):
        Api(KEY, base)


@pytest.mark.parametrize("second", ["x", "0", "0.0", ".", "-1", "nan", "inf", "2", "1e-3", "0.5"])
def test_time_passes_faster_in_trials_alone(monkeypatch, second):
    monkeypatch.setenv("LAMBDA_API_KEY", KEY)
    monkeypatch.setenv("LAMBDA_SECOND", second)
    with pytest.raises(ValueError, match="LAMBDA_SECOND"):
        Api.from_environment()
