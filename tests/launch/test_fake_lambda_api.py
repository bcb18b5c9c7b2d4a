"""The cloud on loopback notices what the real one would refuse, bills as it would, and fails as told."""

import base64
import inspect
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from email.utils import parsedate_to_datetime
from pathlib import Path

import fake_instances
import faults
import pytest
import requests
import ssh_server
from api_rules import Rate
from conftest import ROOT
from fake_lambda_api import StandIn

LAUNCH = {"region_name": "us-east-1", "instance_type_name": "gpu_1x_a10", "ssh_key_names": ["stand-in"]}
needs_machine = pytest.mark.skipif(bool(ssh_server.missing()), reason=str(ssh_server.missing()))


class Caller:
    """One that keeps to the rules where it is not told otherwise."""

    def __init__(self, cloud: StandIn):
        self.cloud, self.base = cloud, cloud.environment()["LAMBDA_API_BASE"]
        self.headers = {"User-Agent": "tests", "Authorization": f"Bearer {cloud.key}"}

    def ask(self, path, body=None, method=None, **headers):
        method = method or ("GET" if body is None else "POST")
        chosen = {name: value for name, value in {**self.headers, **headers}.items() if value is not None}
        with requests.Session() as session:
            session.trust_env = False
            session.headers.clear()
            options = dict(headers=chosen, json=body, timeout=10, allow_redirects=False)
            return session.request(method, self.base + path, **options)

    def launch(self, **fields):
        return self.ask("/instance-operations/launch", LAUNCH | fields)

    def rent(self, **fields) -> str:
        return self.launch(**fields).json()["data"]["instance_ids"][0]

    def look(self, id) -> dict:
        return self.ask(f"/instances/{id}").json()["data"]

    def terminate(self, *ids):
        return self.ask("/instance-operations/terminate", {"instance_ids": list(ids)})


@contextmanager
def frozen(*given, second=1.0, **options):
    """(cloud, its caller) without a machine; its clock stands where `cloud.at` says."""
    with StandIn(second, list(given), sshd=False, **options) as cloud:
        cloud.at = 1000.0
        cloud.now = lambda: cloud.at
        yield cloud, Caller(cloud)


def code_of(answer) -> str:
    return answer.json()["error"]["code"].rpartition("/")[2]


# ------------------------------------------------------------------------------------------------------------
# a life


def test_an_instance_boots_runs_ends_and_is_forgotten():
    with frozen() as (cloud, caller):
        id = caller.rent(name="dag-1", tags=[{"key": "by", "value": "me"}])
        history = []
        for cloud.at in (1000, 1059, 1060, 1179, 1180, 1300):
            seen = caller.look(id)
            history.append((seen["status"], seen.get("ip")))
        assert (
            history
            == [("booting", None)] * 2 + [("booting", "127.0.0.1")] * 2 + [("active", "127.0.0.1")] * 2
        )
        assert (seen["name"], seen["tags"]) == ("dag-1", [{"key": "by", "value": "me"}])
        assert seen["instance_type"]["price_cents_per_hour"] == 75
        assert [each["id"] for each in caller.ask("/instances").json()["data"]] == [id]

        assert caller.terminate(id).json()["data"]["terminated_instances"][0]["status"] == "terminating"
        cloud.at = 1319
        assert caller.look(id)["status"] == "terminating" and cloud.running()
        cloud.at = 1320
        assert caller.look(id)["status"] == "terminated" and not cloud.running()
        cloud.at = 1420
        gone = caller.ask(f"/instances/{id}")
        assert (gone.status_code, code_of(gone)) == (404, "object-does-not-exist")
        assert caller.ask("/instances").json()["data"] == []
        assert caller.terminate(id).ok


def test_the_bill_is_by_the_minute_from_active_until_terminate():
    with frozen() as (cloud, caller):
        first, second = caller.rent(), caller.rent(instance_type_name="gpu_1x_a100_sxm4")
        cloud.at = 1180
        assert cloud.bill() == 0
        cloud.at = 1181
        assert cloud.bill() == pytest.approx((0.75 + 1.29) / 60)
        cloud.at = 1180 + 61
        caller.terminate(first)
        caller.terminate(first)
        cloud.at = 1180 + 3600
        assert cloud.bill() == pytest.approx(2 * 0.75 / 60 + 1.29)
        assert [each.id for each in cloud.running()] == [second]


def test_what_ends_before_it_is_active_costs_nothing():
    with frozen() as (cloud, caller):
        id = caller.rent()
        cloud.at += 179
        caller.terminate(id)
        cloud.at += 3600
        assert cloud.bill() == 0 and not cloud.running()


def test_terminate_takes_all_or_none():
    with frozen() as (cloud, caller):
        id = caller.rent()
        assert caller.terminate(id, "0" * 32).status_code == 404
        cloud.at += 100
        assert caller.look(id)["status"] == "booting"


def test_instances_of_others():
    with frozen() as (cloud, caller):
        other = cloud.add(tags=[{"key": "by", "value": "you"}])
        assert caller.look(other.id)["status"] == "active" and cloud.running() == [other]


def test_capacity_and_file_systems_depend_on_the_region():
    with frozen() as (cloud, caller):
        assert code_of(caller.launch(region_name="us-east-3")) == "insufficient-capacity"
        assert code_of(caller.launch(file_system_names=["archive"])) == "file-system-in-wrong-region"
        assert caller.launch(file_system_names=["datasets"]).ok
        cloud.capacity["gpu_1x_a10"] = []
        assert code_of(caller.launch()) == "insufficient-capacity"
        types = caller.ask("/instance-types").json()["data"]
        assert types["gpu_1x_a10"]["regions_with_capacity_available"] == []
        assert types["gpu_1x_a100_sxm4"]["regions_with_capacity_available"][0]["name"] == "us-east-1"


@pytest.mark.parametrize("path", ["ssh-keys", "images", "file-systems", "regions"])
def test_the_other_lists(path):
    with frozen() as (cloud, caller):
        assert all(item["name"] for item in caller.ask(f"/{path}").json()["data"])
        assert not cloud.violations


# ------------------------------------------------------------------------------------------------------------
# rules


TAG = {"key": "run:id-1", "value": ""}
ALLOWED = [
    {"name": "x" * 64, "hostname": "h", "tags": [TAG, {"key": "a" * 55, "value": "v" * 128}]},
    {"image": {"family": "lambda-stack-24-04"}, "user_data": "#cloud-config"},
    {"image": {"id": "lambda-stack-22-04-us-east-1"}, "firewall_rulesets": [{"id": "1"}]},
    {"file_system_mounts": [{"mount_point": "/data", "file_system_id": "datasets-id"}]},
]
WRONG = [
    *({"quantity": 1}, {"gpu": "a10"}, {"name": ""}, {"name": "x" * 65}, {"name": None}, {"hostname": 1}),
    *({"ssh_key_names": []}, {"ssh_key_names": ["stand-in"] * 2}, {"ssh_key_names": "stand-in"}),
    *({"image": "lambda-stack-22-04"}, {"image": {"id": "a", "family": "b"}}, {"image": {}}),
    *({"tags": {"a": "b"}}, {"tags": [{"key": "A", "value": ""}]}, {"tags": [{"key": "a", "value": ""}]}),
    *({"tags": [{"key": "a" * 56, "value": ""}]}, {"tags": [{"key": "ab", "value": "v" * 129}]}),
    *({"tags": [{"key": "ab"}]}, {"tags": [{**TAG, "more": 1}]}, {"tags": [{"key": "ab", "value": 1}]}),
    *(
        {"user_data": "x" * ((1 << 20) + 1)},
        {"file_system_names": "datasets"},
        {"region_name": ["us-east-1"]},
    ),
]


@pytest.mark.parametrize("fields", ALLOWED, ids=lambda fields: "+".join(fields))
def test_launches_that_the_document_allows(fields):
    with frozen() as (cloud, caller):
        assert caller.launch(**fields).ok
        assert not cloud.violations


@pytest.mark.parametrize("fields", WRONG, ids=lambda fields: str(fields)[:40])
def test_launches_that_it_does_not(fields):
    with frozen() as (cloud, caller):
        answer = caller.launch(**fields)
        assert (answer.status_code, code_of(answer)) == (400, "invalid-parameters")
        assert [*fields][0] in cloud.violations[0] and not cloud.instances


@pytest.mark.parametrize("field", LAUNCH)
def test_what_a_launch_needs(field):
    with frozen() as (cloud, caller):
        body = {name: value for name, value in LAUNCH.items() if name != field}
        assert caller.ask("/instance-operations/launch", body).status_code == 400
        assert f"{field} is missing" in cloud.violations[0] and not cloud.instances


@pytest.mark.parametrize(
    "request_",
    [
        dict(path="/instance-operations/terminate", body={"instance_ids": []}),
        dict(path="/instance-operations/terminate", body={"instance_ids": "all"}),
        dict(path="/instance-operations/terminate", body={}),
        dict(path="/instance-operations/terminate", body=[1]),
        dict(path="/instance-operations/launch", method="GET"),
        dict(path="/instances", body={}),
        dict(path="/instances", method="DELETE"),
        dict(path="/instances?limit=5"),
        dict(path="/nothing"),
    ],
    ids=str,
)
def test_other_requests_that_it_does_not_allow(request_):
    with frozen() as (cloud, caller):
        assert caller.ask(**request_).status_code == 400
        assert len(cloud.violations) == 1


def test_a_key_that_does_not_exist_is_refused_and_no_violation():
    with frozen() as (cloud, caller):
        assert code_of(caller.launch(ssh_key_names=["laptop"])) == "object-does-not-exist"
        assert code_of(caller.launch(image={"family": "windows"})) == "object-does-not-exist"
        assert not [problem for problem in cloud.violations if "less than" not in problem]


def test_credentials():
    with frozen() as (cloud, caller):
        basic = base64.b64encode(f"{cloud.key}:".encode()).decode()
        assert caller.ask("/instances", Authorization=f"Basic {basic}").ok
        cloud.at += 1
        assert code_of(caller.ask("/instances", Authorization="Bearer wrong")) == "invalid-api-key"
        assert not cloud.violations
        cloud.at += 1
        assert caller.ask("/instances", Authorization=None).status_code == 401
        assert "credentials" in cloud.violations[0]


@pytest.mark.parametrize("agent", ["python-requests/2.32", "Python-urllib/3.11", ""])
def test_default_user_agents_are_turned_away(agent):
    with frozen() as (cloud, caller):
        answer = caller.ask("/instances", **{"User-Agent": agent})
        assert answer.status_code == 403 and "1010" in answer.text
        assert "User-Agent" in cloud.violations[0]


def test_secrets_in_a_request_are_noticed():
    with frozen() as (cloud, caller):
        caller.launch(user_data=f"export KEY={cloud.key}")
        assert "secret" in cloud.violations[0]


def test_one_request_a_second():
    with frozen() as (cloud, caller):
        for gap in (1, 0.96, 5, 1):
            caller.ask("/instances")
            cloud.at += gap
        assert not cloud.violations
        caller.ask("/instances")
        cloud.at += 0.5
        caller.ask("/images")
        assert "less than 1 s" in cloud.violations[0]


def test_one_launch_in_12_seconds():
    with frozen() as (cloud, caller):
        caller.launch()
        cloud.at += 12
        caller.launch()
        assert not cloud.violations
        cloud.at += 11
        caller.launch()
        assert "less than 12 s" in cloud.violations[0]


def test_the_rate_forgives_what_a_busy_computer_delays_and_no_burst():
    rate = Rate(1, jitter=5)
    assert not any(rate.too_fast(now) for now in (0, 1.9, 2, 3, 4))
    assert [rate.too_fast(now) for now in (10, 10, 10, 10)] == [False, False, True, True]


# ------------------------------------------------------------------------------------------------------------
# faults of requests


def outcome(fault, kind="list"):
    """(status, code, JSON or "hung up" or "broken"; whether something was launched)"""
    with frozen(fault) as (cloud, caller):
        try:
            answer = caller.launch() if kind == "launch" else caller.ask("/instances")
            status, said = answer.status_code, answer.json()
        except requests.exceptions.ChunkedEncodingError:
            status, said = None, "cut off"
        except requests.ConnectionError:
            status, said = None, "hung up"
        except ValueError:
            status, said = answer.status_code, "no JSON"
        if isinstance(said, dict) and "error" in said:
            said = said["error"]["code"].rpartition("/")[2]
        return status, said, len(cloud.instances)


@pytest.mark.parametrize(
    "fault, status, said, launched",
    [
        (faults.bad_key(), 401, "invalid-api-key", 0),
        (faults.inactive(), 403, "account-inactive", 0),
        (faults.forbidden(), 403, "forbidden", 0),
        (faults.over_quota(), 400, "quota-exceeded", 0),
        (faults.no_capacity(), 400, "insufficient-capacity", 0),
        (faults.sold_out(2000), 400, "insufficient-capacity", 0),
        (faults.too_many(), 429, "rate-limited", 0),
        (faults.too_many_says_proxy(), 429, "no JSON", 0),
        (faults.too_many(retry_after=5), 429, "rate-limited", 0),
        (faults.internal_error(), 500, "internal-error", 0),
        (faults.bad_gateway(), 502, "no JSON", 0),
        (faults.done_and_bad_gateway(), 502, "no JSON", 1),
        (faults.lost(), None, "hung up", 1),
        (faults.hung_up(), None, "hung up", 0),
        (faults.offline(), None, "hung up", 0),
        (faults.truncated(), 200, "no JSON", 1),
        (faults.cut_off(), None, "cut off", 1),
        (faults.portal(), 200, "no JSON", 0),
        (faults.redirected(), 302, "no JSON", 0),
        (faults.wrong_shape(), 200, {"data": None}, 1),
    ],
    ids=lambda value: None,
)
def test_what_a_launch_meets(fault, status, said, launched):
    assert outcome(fault, "launch") == (status, said, launched)


def test_faults_strike_so_many_requests_of_their_kind():
    with frozen(faults.internal_error("launch", times=2, skip=1)) as (cloud, caller):
        assert [caller.launch().status_code for _ in range(5)] == [200, 500, 500, 200, 200]
        assert caller.ask("/instances").ok and caller.ask("/instance-types").ok


def test_kinds_of_requests_are_told_apart():
    with frozen(faults.internal_error("types", faults.ALWAYS), faults.bad_gateway("terminate")) as (
        cloud,
        caller,
    ):
        assert caller.ask("/instance-types").status_code == 500
        assert caller.ask("/instances").ok
        assert caller.terminate(caller.rent()).status_code == 502
        assert [len(cloud.asked(kind)) for kind in ("any", "types", "list", "launch", "terminate")] == [
            4,
            1,
            1,
            1,
            1,
        ]


def test_faults_are_nested_and_an_inner_one_waits_for_its_turn():
    with frozen(faults.internal_error("launch"), faults.no_capacity(1), faults.lost()) as (cloud, caller):
        assert caller.launch().status_code == 500
        assert code_of(caller.launch()) == "insufficient-capacity"
        with pytest.raises(requests.ConnectionError):
            caller.launch()
        assert caller.launch().ok and len(cloud.instances) == 2
    with frozen(faults.truncated("launch", times=2), faults.no_capacity(1)) as (cloud, caller):
        assert (caller.launch().status_code, caller.launch().status_code) == (400, 200)


def test_a_fault_of_ones_own_sees_both_sides_of_the_request():
    seen = []

    def act(call):
        seen.append(len(call.cloud.instances))
        answer = call.do()
        seen.append(len(call.cloud.instances))
        return answer

    with frozen(faults.Fault("launch", act)) as (cloud, caller):
        assert caller.launch().ok and seen == [0, 1]


def test_offline_is_over_after_its_time():
    with frozen(faults.offline(30, skip=1)) as (cloud, caller):
        assert caller.ask("/instances").ok
        for _ in range(2):
            with pytest.raises(requests.ConnectionError):
                caller.ask("/instances")
            cloud.at += 15
        assert caller.ask("/instances").ok


def test_delayed():
    with frozen(faults.delayed(20, "launch"), second=0.01) as (cloud, caller):
        start = time.monotonic()
        assert caller.launch().ok and time.monotonic() - start > 0.19


def test_coming_back_before_retry_after_is_a_violation():
    with frozen(faults.too_many("launch", 2, retry_after=30)) as (cloud, caller):
        assert caller.launch().headers["Retry-After"] == "30"
        cloud.at += 30
        assert caller.launch().status_code == 429 and not cloud.violations
        cloud.at += 15
        assert caller.launch().ok and "Retry-After" in cloud.violations[0]
    with frozen(faults.too_many("list", retry_after=3600)) as (cloud, caller):
        caller.ask("/instances")
        cloud.at += 60
        assert caller.ask("/instances").ok and not cloud.violations


def test_retry_after_as_a_date():
    with frozen(faults.too_many(retry_after=30, as_date=True)) as (cloud, caller):
        when = parsedate_to_datetime(caller.ask("/instances").headers["Retry-After"]).timestamp()
        assert 28 < when - time.time() < 31


# ------------------------------------------------------------------------------------------------------------
# faults of instances


@pytest.mark.parametrize(
    "fault, statuses, ip",
    [
        (faults.stuck_booting(), "booting booting booting", True),
        (faults.unhealthy(), "booting unhealthy unhealthy", True),
        (faults.unhealthy(60), "booting active unhealthy", True),
        (faults.preempted(60), "booting active preempted", True),
        (faults.no_address(), "booting active active", False),
        (faults.born(boot=20), "active active active", True),
    ],
    ids=lambda value: None,
)
def test_what_becomes_of_an_instance(fault, statuses, ip):
    with frozen(fault) as (cloud, caller):
        struck, other = caller.rent(), caller.rent()
        seen = []
        for cloud.at in (1100, 1200, 1250):
            seen.append(caller.look(struck))
        assert " ".join(each["status"] for each in seen) == statuses and ("ip" in seen[-1]) == ip
        assert caller.look(other)["status"] == "active" and "ip" in caller.look(other)


def test_the_bill_of_a_preempted_one_ends_and_of_an_unhealthy_one_does_not():
    with frozen(faults.preempted(60), faults.born(skip=1, unhealthy=60)) as (cloud, caller):
        caller.rent()
        cloud.at = 1180 + 3600
        assert cloud.bill() == pytest.approx(0.75 / 60) and not cloud.running()
        caller.rent()
        cloud.at += 180 + 3600
        assert cloud.bill() == pytest.approx(0.75 / 60 + 0.75) and len(cloud.running()) == 1


def test_seen_late():
    with frozen(faults.seen_late(30)) as (cloud, caller):
        id = caller.rent()
        cloud.at += 29
        assert caller.ask(f"/instances/{id}").status_code == 404
        assert caller.ask("/instances").json()["data"] == [] and cloud.running()
        cloud.at += 1
        assert caller.look(id)["status"] == "booting"


def test_an_unseen_instance_can_be_terminated_unless_it_is_unknown():
    with frozen(faults.seen_late(30)) as (cloud, caller):
        assert caller.terminate(caller.rent()).ok
    with frozen(faults.unknown_at_first(30)) as (cloud, caller):
        unknown = caller.rent()
        assert caller.terminate(unknown).status_code == 404
        cloud.at += 30
        assert caller.terminate(unknown).ok


def test_a_lingering_instance_is_paid_for():
    with frozen(faults.lingers(120)) as (cloud, caller):
        id = caller.rent()
        cloud.at = 1180 + 60
        assert caller.terminate(id).ok
        cloud.at += 119
        assert caller.look(id)["status"] == "active" and caller.terminate(id).ok
        cloud.at += 1
        assert caller.look(id)["status"] == "terminating"
        cloud.at += 3600
        assert cloud.bill() == pytest.approx(3 * 0.75 / 60) and not cloud.running()


def test_terminate_fails_so_often():
    with frozen(faults.terminate_fails(3)) as (cloud, caller):
        id = caller.rent()
        assert [caller.terminate(id).status_code for _ in range(4)] == [500, 500, 500, 200]


def test_sold_out():
    with frozen(faults.sold_out(1100)) as (cloud, caller):
        types = caller.ask("/instance-types").json()["data"].values()
        assert not any(each["regions_with_capacity_available"] for each in types)
        cloud.at = 1100
        assert caller.launch().ok


@pytest.mark.parametrize("name", faults.NAMED)
def test_every_fault_has_a_name_a_line_and_works_in_text(name):
    (made,) = faults.parse(name)
    assert isinstance(made, faults.Fault) and made.on in faults.KINDS


def test_no_fault_lacks_a_name():
    makers = [
        f
        for _, f in inspect.getmembers(faults, inspect.isfunction)
        if f.__annotations__.get("return") is faults.Fault
    ]
    general = {faults.refused, faults.born, faults.event, faults.program}
    assert set(makers) - general == set(faults.NAMED.values())


def test_faults_in_text():
    made = faults.parse("no_capacity:3,lost:terminate:2,seen_late:7.5")
    assert [(fault.on, fault.times) for fault in made] == [("launch", 3), ("terminate", 2), ("born", 1)]
    assert faults.parse("") == []
    for text in ("no_such", "lost:nowhere"):
        with pytest.raises(ValueError, match="there are"):
            faults.parse(text)


# ------------------------------------------------------------------------------------------------------------
# the machine


class Shell:
    """ssh to the machine of a cloud as its environment says."""

    def __init__(self, cloud: StandIn, folder: Path, strict="accept-new"):
        self.variables = cloud.environment()
        options = [f"StrictHostKeyChecking={strict}", f"UserKnownHostsFile={folder / 'known_hosts'}"]
        options += ["BatchMode=yes", "LogLevel=ERROR", "IdentitiesOnly=yes"]
        self.ssh = ["ssh", "-F", "none", "-i", self.variables["LAMBDA_SSH_IDENTITY"]]
        self.ssh += ["-p", self.variables["LAMBDA_SSH_PORT"]] + [f"-o{option}" for option in options]
        self.address = f"{self.variables['LAMBDA_SSH_USER']}@127.0.0.1"

    def run(self, command: str) -> subprocess.CompletedProcess:
        argv = [*self.ssh, self.address, command]
        return subprocess.run(argv, capture_output=True, text=True, timeout=20, stdin=subprocess.DEVNULL)

    def says(self, command: str) -> str:
        done = self.run(command)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def rsync(self, *arguments) -> subprocess.CompletedProcess:
        argv = ["rsync", "-a", "-e", " ".join(self.ssh), *map(str, arguments)]
        environment = {**os.environ, **self.variables}
        return subprocess.run(argv, capture_output=True, text=True, timeout=20, env=environment)


@contextmanager
def machine(folder: Path, *given, instances=1):
    """(cloud, caller, shell) of a cloud with a machine that ssh reaches soon."""
    quick = faults.born(faults.ALWAYS, boot=5, address=0)
    with StandIn(0.01, [quick, *given]) as cloud:
        caller = Caller(cloud)
        for _ in range(instances):
            caller.rent()
        shell = Shell(cloud, folder)
        yield cloud, caller, shell


def answers(shell) -> bool:
    return shell.run("true").returncode == 0


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


@needs_machine
def test_a_machine_lives_as_long_as_its_instance(tmp_path):
    with machine(tmp_path, instances=2) as (cloud, caller, shell):
        first, second = cloud.instances
        cloud.wait(lambda: answers(shell))
        home = Path(shell.says("echo $HOME"))
        assert home == cloud.homes[0] and shell.says("cd; pwd") == str(home)
        python = "import sys, sysconfig, requests; print(sys.version_info[:2])"
        assert shell.says(f'python3 -c "{python}"') == str(sys.version_info[:2])
        assert "PIP_NO_INDEX=1" in shell.says("env")
        detached = int(shell.says("cd; echo here >file; setsid nohup sleep 1000 >/dev/null 2>&1 & echo $!"))
        assert alive(detached) and any("sleep 1000" in line for line in cloud.commands())

        caller.terminate(first.id)
        cloud.wait(lambda: not alive(detached))
        assert (home / "file").read_text() == "here\n"
        renewed = Shell(cloud, tmp_path / "other")
        (tmp_path / "other").mkdir()
        cloud.wait(lambda: answers(renewed))
        assert renewed.says("cd; ls") == "" and "HOST IDENTIFICATION HAS CHANGED" in shell.run("true").stderr

        caller.terminate(second.id)
        cloud.wait(lambda: not cloud.commands())
        assert not answers(renewed)
        folder, keys = cloud.folder, Path(shell.variables["LAMBDA_SSH_IDENTITY"]).parent
    assert not folder.exists() and not keys.exists()


@needs_machine
def test_the_end_of_the_cloud_ends_its_machine_and_an_exception_too(tmp_path):
    with pytest.raises(ZeroDivisionError):
        with machine(tmp_path) as (cloud, caller, shell):
            cloud.wait(lambda: answers(shell))
            detached = int(shell.says("setsid sleep 1000 >/dev/null 2>&1 & echo $!"))
            raise ZeroDivisionError
    assert not alive(detached) and not cloud.folder.exists()


@pytest.mark.slow
@needs_machine
def test_ssh_refused_then_denied_then_fine(tmp_path):
    given = faults.ssh_refused(60), faults.ssh_denied(100)
    with machine(tmp_path, *given) as (cloud, caller, shell):
        (instance,) = cloud.instances
        cloud.wait(lambda: instance.status(cloud.now()) == "active")
        cloud.wait(lambda: "Permission denied (publickey)" in shell.run("true").stderr)
        assert cloud.now() >= instance.active + 60
        cloud.wait(lambda: answers(shell))
        assert cloud.now() >= instance.active + 160


@needs_machine
def test_connections_drop_and_detached_work_goes_on(tmp_path):
    with machine(tmp_path, faults.connection_dropped(100)) as (cloud, caller, shell):
        cloud.wait(lambda: answers(shell))
        done = shell.run("setsid sleep 1000 >/dev/null 2>&1 & echo $!; sleep 10")
        assert done.returncode == 255 and alive(int(done.stdout)) and answers(shell)


@pytest.mark.slow
@needs_machine
def test_unreachable_for_a_while(tmp_path):
    with machine(tmp_path, faults.unreachable(50, 50)) as (cloud, caller, shell):
        cloud.wait(lambda: answers(shell))
        cloud.wait(lambda: "Connection refused" in shell.run("true").stderr)
        cloud.wait(lambda: answers(shell))


@pytest.mark.slow
@needs_machine
def test_the_host_key_is_replaced(tmp_path):
    with machine(tmp_path, faults.host_key_replaced(60)) as (cloud, caller, shell):
        cloud.wait(lambda: answers(shell))
        cloud.wait(lambda: "HOST IDENTIFICATION HAS CHANGED" in shell.run("true").stderr)
        (tmp_path / "known_hosts").unlink()
        assert answers(shell)


@needs_machine
@pytest.mark.skipif(not fake_instances.may_mount(), reason="mounting a tmpfs is not allowed here")
def test_the_disk_is_full(tmp_path):
    (tmp_path / "big").write_bytes(bytes(3 << 20))
    with machine(tmp_path, faults.disk_full(2)) as (cloud, caller, shell):
        cloud.wait(lambda: answers(shell))
        assert "No space left" in shell.run("cd; head -c 3M /dev/zero >big").stderr
        there = f"{shell.address}:{cloud.homes[0]}/"
        assert shell.rsync(tmp_path / "big", there).returncode in (11, 12)  # with or without a word
        folder = cloud.folder
    assert not folder.exists() and str(folder) not in Path("/proc/mounts").read_text()


@pytest.mark.slow
@needs_machine
def test_rsync_is_torn_and_goes_on_afterwards(tmp_path):
    (tmp_path / "big").write_bytes(os.urandom(1 << 18))
    with machine(tmp_path, faults.rsync_torn(64, times=2)) as (cloud, caller, shell):
        cloud.wait(lambda: answers(shell))
        there = f"{shell.address}:{cloud.homes[0]}/"
        (cloud.homes[0] / "far").write_bytes(os.urandom(1 << 18))
        assert shell.rsync(tmp_path / "big", there).returncode == 12
        assert shell.rsync(f"{there}far", tmp_path).returncode == 12
        assert shell.rsync(tmp_path / "big", there).returncode == 0
        assert (cloud.homes[0] / "big").read_bytes() == (tmp_path / "big").read_bytes()


@pytest.mark.slow
@needs_machine
def test_rsync_says_partial_at_the_callers_end(tmp_path):
    (tmp_path / "file").write_text("text")
    with machine(tmp_path, faults.rsync_partial(23, times=1, skip=1)) as (cloud, caller, shell):
        cloud.wait(lambda: answers(shell))
        there = f"{shell.address}:{cloud.homes[0]}/"
        codes = [shell.rsync(tmp_path / "file", there).returncode for _ in range(3)]
        assert codes == [0, 23, 0] and (cloud.homes[0] / "file").read_text() == "text"


@pytest.mark.slow
@needs_machine
def test_what_is_wrong_with_the_machines_programs(tmp_path):
    given = faults.no_rsync(), faults.arm64(), faults.cuda_broken(), faults.no_torch()
    with machine(tmp_path, *given) as (cloud, caller, shell):
        cloud.wait(lambda: answers(shell))
        assert shell.rsync(f"{shell.address}:file", tmp_path).returncode in (12, 127)
        assert shell.says("uname -m") == "aarch64" and shell.says("uname") == "Linux"
        assert "CUDA Version: 12.8" in shell.says("nvidia-smi")
        query = "nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader"
        assert shell.says(query) == "NVIDIA A10, 570.148.08, 22731 MiB"
        if sys.prefix != sys.base_prefix:
            base = shell.run(
                "cd; python3 -m venv --without-pip --system-site-packages x && x/bin/python -c 'import torch'"
            )
            assert "No module named 'torch'" in base.stderr


# ------------------------------------------------------------------------------------------------------------
# as a script


@contextmanager
def script(*arguments):
    """(process, the environment that it prints, a Caller)"""
    command = [
        sys.executable,
        str(ROOT / "tests" / "launch" / "fake_lambda_api.py"),
        "--second=0.01",
        *arguments,
    ]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        lines = list(
            iter(process.stdout.readline, "# Ctrl-C ends this cloud; until then it prints what it is asked\n")
        )
        exports = [line.removeprefix("export ").strip().split("=", 1) for line in lines]
        yield process, dict(exports)
    finally:
        process.kill()
        process.communicate()


class Exports:
    """What Caller and Shell want of a StandIn, from the environment that the script printed."""

    def __init__(self, variables):
        self.key, self.environment = variables["LAMBDA_API_KEY"], lambda: variables


@needs_machine
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_the_script(number):
    with script("--faults=no_capacity:1") as (process, variables):
        caller = Caller(Exports(variables))
        assert code_of(caller.launch()) == "insufficient-capacity"
        time.sleep(0.13)
        id = caller.rent(name="forgotten")
        process.send_signal(number)
        output, _ = process.communicate(timeout=20)
    assert process.returncode == 0
    assert "POST /instance-operations/launch" in output and "-> 400 instance-operations" in output
    assert "2 requests, 1 instances, $0.00" in output
    assert f"still there: {id} 'forgotten' booting" in output and "not allowed" not in output
    assert variables["LAMBDA_API_KEY"] not in output


@pytest.mark.slow
@needs_machine
def test_a_script_that_is_killed_leaves_no_process(tmp_path):
    with script() as (process, variables):
        caller, shell = Caller(Exports(variables)), Shell(Exports(variables), tmp_path)
        caller.rent()
        deadline = time.monotonic() + 20
        while not answers(shell):
            assert time.monotonic() < deadline
        detached = int(shell.says("setsid sleep 1000 >/dev/null 2>&1 & echo $!"))
        (folder,) = Path(tempfile.gettempdir()).glob(f"stand-in-{process.pid}-*")
        process.kill()
        process.wait()
        while alive(detached):
            assert time.monotonic() < deadline
            time.sleep(0.01)
    assert folder.exists()
    fake_instances.new_folder().rmdir()
    assert not folder.exists()
    shutil.rmtree(Path(variables["LAMBDA_SSH_IDENTITY"]).parent)


def test_the_script_explains_a_mistake():
    command = [sys.executable, str(ROOT / "tests" / "launch" / "fake_lambda_api.py"), "--faults=no_such"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and "no fault 'no_such'" in done.stderr and len(done.stderr.splitlines()) == 1
