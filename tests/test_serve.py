"""serve.py over real sockets, with a model that has just learned to add and subtract."""

import functools
import json
import random
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict
from http.client import HTTPConnection

import pytest
import requests
import torch
import uvicorn
from conftest import DENSE, ROOT

import serve
from configurator import run_script as run_main
from dag_model import GPT, GPTConfig
from data.tokenizer import ByteTokenizer, CharTokenizer
from inference.explain import explain
from training import checkpoint

BYTES = ByteTokenizer()
ABOUT = {"run": "here", "step": 0, "dataset": "sums", "parameters": 0, "context": 64, "dag_steps": 2}
ABOUT |= {"operations": ["add"], "plans": True, "gate": True, "max_new_tokens": 50, "examples": ["12+34="]}


@functools.cache
def adder() -> GPT:
    """It adds and subtracts numbers of two digits, after seconds of training. Its answers end with a newline."""
    random.seed(0)
    torch.manual_seed(0)
    sizes = dict(
        block_size=64, vocab_size=256, n_layer=1, n_head=2, n_embd=32, separator_id=BYTES.separator_id
    )
    model = GPT(
        GPTConfig(dag_depth=2, dag_leaves=2, dag_ops="add,subtract,identity", **sizes), BYTES.vocabulary
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(150):
        pairs = [(random.randrange(10, 100), random.randrange(10, 100)) for _ in range(32)]
        lines = [random.choice([f"{a}+{b}={a + b}\n", f"{a}-{b}={a - b}\n"]) for a, b in pairs]
        idx = torch.tensor([BYTES.encode(line.ljust(11, "\n")) for line in lines])
        model(idx[:, :-1], idx[:, 1:])[1].backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


@contextmanager
def serving(model=None, tokenizer=BYTES, documents=True, **settings):
    """The address of a server in a thread of this process."""
    config = serve.ServeConfig(out_dir="here", **{"max_new_tokens": 50, **settings})
    writer = serve.Writer(model or adder(), tokenizer, documents, config.max_new_tokens, torch.float32)
    listener = serve.listen("127.0.0.1", 0)
    app = serve.build_app(writer, ABOUT, config)
    server = uvicorn.Server(uvicorn.Config(app, log_level="error", timeout_graceful_shutdown=1))
    thread = threading.Thread(target=server.run, args=([listener],))
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()


def ask(url, prompt="12+34=", **fields):
    return requests.post(f"{url}/generate", json={"prompt": prompt, **fields}, timeout=20)


@pytest.fixture(scope="module")
def url():
    with serving() as address:
        yield address


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run folder with the adder."""
    folder, model = tmp_path_factory.mktemp("run") / "sums-1", adder()
    state = dict(model=model.state_dict(), model_config=asdict(model.config), tokenizer=BYTES.to_json())
    state |= dict(train_config={"dataset": "sums"}, loader={"documents": True}, optimizer={}, rng={})
    checkpoint.save(folder, "best", checkpoint.Checkpoint(step=150, **state))
    return folder


def test_serve_as_a_person_runs_it(run):
    command = [sys.executable, str(ROOT / "serve.py"), f"--out_dir={run}", "--port=0"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        url = process.stdout.readline().split()[1]
        assert "<textarea" in requests.get(url, timeout=20).text
        assert requests.get(f"{url}/model", timeout=20).json()["run"] == "sums-1"
        assert ask(url, "60+17=").json()["text"] == "60+17=77"
    finally:
        process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=20) == ("", "")
    assert process.returncode == 0


# ------------------------------------------------------------------------------------------------------------
# answers


def test_an_answer_is_the_text_and_what_was_thought(url):
    answer = ask(url, "12+34=").json()
    assert answer["text"] == "12+34=46" == "".join(token["text"] for token in answer["tokens"])
    assert (answer["prompt_tokens"], answer["ended"]) == (6, True)
    look = explain(adder(), BYTES, BYTES.encode("12+34=46"))
    for kind in ("thoughts", "unplanned"):
        assert answer[kind] == json.loads(json.dumps([asdict(number) for number in getattr(look, kind)]))
    unplanned = [number["text"] for number in answer["unplanned"]]
    assert unplanned[:1] == ["12"] and "46" not in unplanned  # there is nothing to compute 12 from
    assert answer["thoughts"][-1]["expression"] == "12 + 34 = 46"


def test_a_token_has_the_gate_and_the_probability_it_was_written_with(url):
    tokens = ask(url, "12+34=").json()["tokens"]
    assert (tokens[0]["gate"], tokens[0]["probability"]) == (None, None)
    assert [token["gate"] > 0.5 for token in tokens[1:]] == [False] * 5 + [True] * 2
    ids = BYTES.encode("12+34=46")
    for t in range(1, len(ids)):
        logits = adder()(torch.tensor([ids[:t]]))[0][0, -1]
        odds = logits.softmax(-1).detach()
        assert tokens[t]["probability"] == pytest.approx(float(odds[ids[t]]), abs=1e-4)
        assert tokens[t]["likeliest"][0] == [chr(odds.argmax()), pytest.approx(float(odds.max()), abs=1e-4)]


def test_a_stream_is_the_new_tokens_and_then_the_answer(url):
    fields = dict(temperature=3, seed=1, max_new_tokens=20)
    *tokens, last = map(json.loads, ask(url, **fields, stream=True).text.splitlines())
    assert last == ask(url, **fields).json()
    assert "12+34=" + "".join(event["token"] for event in tokens) == last["text"].rstrip("\ufffd")
    assert len(tokens) == len(last["tokens"]) - last["prompt_tokens"] > 2


def test_a_text_is_that_of_its_seed(url):
    texts = [ask(url, temperature=3, seed=seed).json()["text"] for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


def test_a_text_may_be_cut_short_and_says_so(url):
    answer = ask(url, max_new_tokens=1).json()
    assert (answer["text"], answer["ended"]) == ("12+34=4", False)


def test_a_character_comes_with_the_last_of_its_tokens(url):
    answer = ask(url, "\u20ac12+34=", max_new_tokens=1).json()
    assert [token["text"] for token in answer["tokens"][:4]] == ["", "", "\u20ac", "1"]


def test_a_text_longer_than_the_context_goes_on(tiny_gpt):
    tokenizer = CharTokenizer("0123456789+-*/=(). \nabcdefghi")
    with serving(tiny_gpt(), tokenizer, documents=False) as url:
        answer = ask(url, "1+1=", max_new_tokens=50, temperature=1, seed=1).json()
    assert [token["probability"] is not None for token in answer["tokens"]] == [False] + [True] * 53
    assert all(0 <= token["gate"] < 1 for token in answer["tokens"][1:])
    assert min(number["first"] for number in answer["thoughts"] + answer["unplanned"]) == 0
    assert len(answer["text"]) == 54 and not answer["ended"]


def test_a_plain_gpt_thinks_nothing(tiny_gpt):
    with serving(tiny_gpt(dag_depth=0), CharTokenizer("0123456789+-*/=(). \nabcdefghi")) as url:
        answer = ask(url, "1+1=", max_new_tokens=5).json()
    assert answer["thoughts"] == [] and {token["gate"] for token in answer["tokens"][1:]} == {0.0}


def test_the_model_describes_itself(tiny_gpt):
    tokenizer = CharTokenizer("\n" + "".join(sorted(set("12+7*3=To be, or not to be"))))
    saved = checkpoint.Checkpoint(7, {}, {}, {}, {"dataset": "both"}, {}, {}, {})
    config = serve.ServeConfig(max_new_tokens=9)
    about = serve.describe("here", tiny_gpt(dag_ops="add,identity"), tokenizer, saved, config)
    assert about.keys() == ABOUT.keys()
    assert about["examples"] == ["12+7*3=", "To be, or not to be"]
    assert (about["operations"], about["context"]) == (["add", "identity"], 16)
    kinds = dict(dag_depth=0), dict(), DENSE["token"], dict(DENSE["token"], dag_gate=False)
    told = [serve.describe("", tiny_gpt(**fields), tokenizer, saved, config) for fields in kinds]
    assert [(one["plans"], one["gate"]) for one in told] == [
        (False, False),
        (True, True),
        (False, True),
        (False, False),
    ]


# ------------------------------------------------------------------------------------------------------------
# refusals


@pytest.mark.parametrize(
    "body, problem",
    [
        ({}, "prompt: Field required"),
        ({"prompt": ""}, "prompt: "),
        ({"prompt": 12}, "prompt: "),
        ({"prompt": "1" * 65}, "a prompt of 65 tokens does not fit the context: shorten it to 64"),
        ({"prompt": "1", "max_new_tokens": 51}, "max_new_tokens=51: expected 50 or less"),
        ({"prompt": "1", "max_new_tokens": 0}, "max_new_tokens: "),
        ({"prompt": "1", "temperature": -1}, "temperature: "),
        ({"prompt": "1", "temperature": float("inf")}, "temperature: "),
        ({"prompt": "1", "seed": 2**63}, "seed: "),
        ({"prompt": "1", "top": 1}, "top: "),
        (["1"], "expected a JSON object"),
    ],
)
def test_what_makes_no_sense_is_refused_in_words(url, body, problem):
    json_header = {"Content-Type": "application/json"}
    reply = requests.post(f"{url}/generate", data=json.dumps(body), headers=json_header, timeout=20)
    assert reply.status_code == 422 and reply.json()["error"].startswith(problem)


@pytest.mark.parametrize("body", ["{", '{"prompt": "\\ud800"}', "", "\xff", "[" * 60_000])
def test_a_broken_body_is_refused(url, body):
    headers = {"Content-Type": "application/json"}
    reply = requests.post(f"{url}/generate", data=body.encode("latin-1"), headers=headers, timeout=20)
    assert reply.status_code in (400, 422) and reply.json()["error"]


def test_a_character_outside_the_vocabulary_is_named(tiny_gpt):
    with serving(tiny_gpt(), CharTokenizer("0123456789+-*/=(). \nabcdefghi")) as url:
        reply = ask(url, "12+x=")
    assert reply.status_code == 422
    assert reply.json()["error"].startswith("character 'x' at position 3 is not in the vocabulary")


def test_a_body_is_limited(url):
    assert ask(url, "1" * 70_000).status_code == 413
    chunks = iter([b'{"prompt": "1"}'])
    assert requests.post(f"{url}/generate", data=chunks, timeout=20).status_code == 411
    with socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2])), timeout=20) as other:
        head = "POST /generate HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
        both = "Content-Length: 2\r\nTransfer-Encoding: chunked\r\nConnection: close\r\n\r\n"
        other.sendall(f"{head}{both}{70_000:x}\r\n{' ' * 70_000}\r\n0\r\n\r\n".encode())
        assert other.recv(12) == b"HTTP/1.1 411"


@pytest.mark.parametrize(
    "headers, status",
    [
        ({"Host": "localhost:8000"}, 200),
        ({"Host": "[::1]"}, 200),
        ({"Host": "evil.example:8000"}, 403),
        ({"Host": "127.0.0.1.evil.example"}, 403),
        ({"Host": "localhost", "Origin": "http://localhost"}, 200),
        ({"Host": "localhost:8000", "Origin": "http://localhost:8001"}, 403),
        ({"Origin": "http://evil.example"}, 403),
        ({"Origin": "null"}, 403),
    ],
)
def test_other_sites_are_turned_away(url, headers, status):
    body = {"prompt": "1", "max_new_tokens": 1}
    assert requests.post(f"{url}/generate", json=body, headers=headers, timeout=20).status_code == status
    assert requests.get(f"{url}/model", headers=headers, timeout=20).status_code == status


def test_a_server_for_the_network_has_any_name_but_no_foreign_pages():
    with serving(host="0.0.0.0") as url:
        mine, theirs = {"Host": "my.box"}, {"Host": "my.box", "Origin": "http://evil.example"}
        assert requests.get(f"{url}/model", headers=mine, timeout=20).status_code == 200
        assert requests.get(f"{url}/model", headers=theirs, timeout=20).status_code == 403


@pytest.mark.parametrize("path", ["/", "/page.js", "/model", "/nowhere", "/../serve.py", "/%2e%2e/serve.py"])
def test_every_answer_forbids_foreign_scripts(url, path):
    reply = requests.Request("GET", url).prepare()
    reply.url = url + path
    reply = requests.Session().send(reply, timeout=20)
    assert "script-src 'self';" in reply.headers["Content-Security-Policy"]
    assert reply.status_code == (200 if path in ("/", "/page.js", "/model") else 404)


# ------------------------------------------------------------------------------------------------------------
# many at once


def has_room(url) -> bool:
    """Whether it answers within seconds: a place is left a moment after its client has gone."""
    end = time.monotonic() + 10
    while (status := ask(url, max_new_tokens=1).status_code) == 429 and time.monotonic() < end:
        time.sleep(0.02)
    return status == 200


@contextmanager
def endless(url):
    """A text that is being written. On leaving, its client goes away."""
    body = {"prompt": "1+", "stream": True}
    with requests.post(f"{url}/generate", json=body, stream=True, timeout=20) as reply:
        assert reply.status_code == 200
        lines = reply.iter_lines()  # kept: once it is collected, the connection is closed
        assert next(lines)
        yield


@pytest.fixture(scope="module")
def narrow():
    """One text at a time, which would take minutes, and no other may wait."""
    with serving(documents=False, max_new_tokens=10**6, at_once=1, queue=0) as address:
        yield address


def test_too_many_are_told_to_come_back_and_who_goes_away_makes_room(narrow):
    for _ in range(2):
        with endless(narrow):
            reply = ask(narrow, max_new_tokens=1)
            assert (reply.status_code, reply.headers["Retry-After"]) == (429, "1")
            assert requests.get(f"{narrow}/model", timeout=20).status_code == 200  # does not wait
        assert has_room(narrow)


def test_who_goes_away_without_a_stream_makes_room(narrow):
    with pytest.raises(requests.Timeout):
        requests.post(f"{narrow}/generate", json={"prompt": "1+"}, timeout=0.5)
    assert has_room(narrow)


def test_a_refused_request_leaves_its_place(narrow):
    for _ in range(3):
        assert ask(narrow, "").status_code == ask(narrow, "1" * 100).status_code == 422
        assert ask(narrow, max_new_tokens=1).status_code == 200


def test_who_waits_gets_the_turn():
    with serving(documents=False, max_new_tokens=10**6, at_once=1, queue=1) as url:
        patient = HTTPConnection(url.removeprefix("http://"), timeout=20)
        with endless(url):
            body = json.dumps({"prompt": "12+34=", "max_new_tokens": 1})
            patient.request("POST", "/generate", body, {"Content-Type": "application/json"})
            requests.get(f"{url}/model", timeout=20)  # by now it has the last place
            assert ask(url).status_code == 429
            assert not select.select([patient.sock], [], [], 0.2)[0]  # and no answer yet
        assert json.load(patient.getresponse())["text"] == "12+34=4"


def test_two_are_written_at_once_where_that_is_asked_for():
    with serving(documents=False, max_new_tokens=10**6, at_once=2, queue=0) as url, endless(url):
        assert ask(url, max_new_tokens=1).json()["text"] == "12+34=4"


def test_a_failure_is_an_answer_and_leaves_its_place(monkeypatch):
    def fail(*_):
        raise RuntimeError("as a bug would")

    with serving(at_once=1, queue=0) as url:
        with monkeypatch.context() as patch:
            patch.setattr(serve, "explain", fail)
            for _ in range(2):
                reply = ask(url)
                assert reply.status_code == 500 and "its log" in reply.json()["error"]
        assert ask(url).status_code == 200


def test_texts_written_at_once_do_not_mix(url):
    prompts = [f"{a}{sign}{b}=" for a in (12, 57, 90) for b in (10, 34) for sign in "+-"]
    alone = [ask(url, prompt).json() for prompt in prompts]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(lambda prompt: ask(url, prompt).json(), prompts)) == alone
    assert all(answer["text"] == answer["thoughts"][-1]["expression"].replace(" ", "") for answer in alone)


# ------------------------------------------------------------------------------------------------------------
# the command line


@pytest.fixture
def call(monkeypatch, capsys):
    """call("--port=1") -> exit code, stdout, stderr; in this process, and without staying."""

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["serve.py", *map(str, arguments)])
        monkeypatch.setattr(serve.uvicorn.Server, "run", lambda self, sockets: sockets[0].close())
        monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
        code = 0
        try:
            run_main(serve.main)
        except SystemExit as end:
            code = end.code
        return code, *capsys.readouterr()

    return call


def test_mistakes_are_one_line(call, run):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        mistakes = {
            (): "--out_dir=RUN",
            ("--out_dir=nowhere",): "no checkpoint in nowhere",
            (
                f"--out_dir={run}",
                f"--port={port}",
            ): f"port {port} is in use: choose another, such as --port={port + 1}",
            (f"--out_dir={run}", "--host=203.0.113.7", "--port=0"): "cannot listen at 203.0.113.7",
            (
                f"--out_dir={run}",
                "--host=no.such.host.invalid",
                "--port=0",
            ): "cannot listen at no.such.host.invalid",
            (f"--out_dir={run}", "--port=65536"): "port='65536'",
        }
        for arguments, words in mistakes.items():
            code, out, err = call(*arguments)
            assert (code, out, err.count("\n")) == (2, "", 1) and words in err


def test_listening_to_the_network_is_warned_of(call, run):
    code, out, err = call(f"--out_dir={run}", "--host=0.0.0.0", "--port=0")
    assert code == 0 and err.startswith("warning: ") and "0.0.0.0" in err and err.count("\n") == 1
    assert call(f"--out_dir={run}", "--port=0")[2] == ""
