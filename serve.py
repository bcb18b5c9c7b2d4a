"""A page to play with: type a text, watch it go on, press a number and see how it was computed.

    python serve.py --out_dir=out/train_default-001             # then open the address that it prints
    python serve.py --out_dir=RUN --host=0.0.0.0 --port=8080    # for the whole network: there is no password

The page is inference/web/: plain HTML, CSS and JavaScript, nothing from elsewhere. Programs ask the same model:

    curl http://127.0.0.1:8000/generate --json '{"prompt": "12+7*3="}'
    {"text": "12+7*3=33",
     "prompt_tokens": 7,                 the first tokens are the prompt's
     "ended": true,                      by the model, not at max_new_tokens
     "tokens": [{"text": "1", "probability": null, "gate": null, "likeliest": []}, ...],
     "thoughts": [{"text": "33", "expression": "12 + (7 * 3 = 21) = 33", ...}],
     "unplanned": [{"text": "7", "reason": "the gate was shut", ...}, ...]}

- the texts of all tokens joined are the text; what is said of each is a Choice of inference/token_stats.py, of which the
  first token is none. The gate says how much of a token is the DAG's
- thoughts and unplanned numbers are those of inference/explain.py, field by field. Their `first`, `last` and `position`
  count tokens
- {"prompt": ..., "max_new_tokens": 50, "temperature": 0.8, "seed": 1}: all but the prompt may be left out.
  Temperature 0, which is the default, is greedy; no seed is a new one every time
- with "stream": true the answer is a line of JSON an event, {"token": "3"} as soon as it is written, and the
  above last. A client that goes away ends its text
- what is wrong is said as {"error": "what is wrong: what to do"}: 422 for a request that makes no sense, 413 and
  411 for its length, 403 for one from a page of another site, 429 with Retry-After where too many are waiting

GET /model says what model it is.
"""

import codecs
import dataclasses
import errno
import ipaddress
import json
import re
import socket
import sys
from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import partial
from pathlib import Path

import anyio
import torch
import uvicorn
from anyio import from_thread, to_thread
from fastapi import FastAPI, HTTPException
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from fastapi.staticfiles import StaticFiles
from pydantic import BaseModel, ConfigDict, Field
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException as AnyHTTPException

from configurator import load, run_script, setting
from dag_model import GPT
from data.tokenizer import Tokenizer
from inference.engine import check, generate
from inference.explain import explain
from inference.token_stats import choices, has_gate
from training import checkpoint
from training import device as runtime

WEB = Path(__file__).resolve().parent / "inference" / "web"
BODY_LIMIT = 1 << 16  # bytes of a request
LOOPBACK = re.compile(r"(localhost|127(\.\d+){3}|\[::1\])(:\d+)?")  # as a Host header
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    "require-trusted-types-for 'script'; trusted-types 'none'",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-cache",
}
EXAMPLES = (  # the page offers those that the model can read
    "12+7*3=",
    "(5 - -20) * 3 = ",
    "sam has 9 apples and buys 4 more. how many? ",
    "123456789 + 987654321 = ",
    "room 12 is on floor ",
    "To be, or not to be",
)


@dataclasses.dataclass(frozen=True)
class ServeConfig:
    out_dir: str = setting("", "run folder whose model answers", section="model")
    checkpoint: str = setting("best", "which of its checkpoints", choices=("best", "last"))
    host: str = setting("127.0.0.1", "address to listen at; 0.0.0.0 is the whole network", section="server")
    port: int = setting(8000, "port to listen at; 0 is any free one", minimum=0, below=1 << 16)
    max_new_tokens: int = setting(200, "tokens that one request may ask for", minimum=1)
    at_once: int = setting(
        2, "texts written at the same time: a long one does not hold up a short one", minimum=1
    )
    queue: int = setting(16, "requests that may wait for their turn", minimum=0)
    device: str = setting("auto", "auto, cpu, cuda, cuda:N or mps", section="system")
    dtype: str = setting("float32", "of matrix products", choices=("float32", "bfloat16"))
    num_threads: int = setting(
        1, "CPU threads; 0 is PyTorch's choice, better from 100 M parameters on", minimum=0
    )

    def check(self) -> None:
        if not self.out_dir:
            raise ValueError("which run? give its folder as --out_dir=RUN")


class Ask(BaseModel):
    """The body of POST /generate."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    prompt: str = Field(min_length=1)
    max_new_tokens: int | None = Field(None, ge=1)  # None: as many as are allowed
    temperature: float = Field(0.0, ge=0)
    seed: int | None = Field(None, ge=0, lt=1 << 63)
    stream: bool = False


# ------------------------------------------------------------------------------------------------------------
# the model


class Writer:
    """A model that goes on with texts and says what it thought. `documents`: a separator ends the text."""

    def __init__(self, model: GPT, tokenizer: Tokenizer, documents: bool, limit: int, dtype: torch.dtype):
        self.model, self.tokenizer = model, tokenizer
        self.limit, self.dtype = limit, dtype
        self.ending = tokenizer.separator_id if documents else -1

    def read(self, ask: Ask) -> list[int]:
        """The prompt's tokens. ValueError for what cannot be asked of this model."""
        if ask.max_new_tokens is not None and ask.max_new_tokens > self.limit:
            raise ValueError(f"max_new_tokens={ask.max_new_tokens}: expected {self.limit} or less")
        tokens = self.tokenizer.encode(ask.prompt)
        check([tokens], self.model.config.block_size, self.limit, ask.temperature, None, None)
        return tokens

    def write(self, prompt: list[int], ask: Ask, on_text: Callable[[str], None]) -> dict:
        """The answer to `ask`; calls on_text with every new token's text."""
        decode = codecs.getincrementaldecoder("utf-8")("replace").decode

        def on_token(_: int, token: int) -> bool:
            if token != self.ending:
                on_text(decode(self.tokenizer.token_bytes(token)))
            return token == self.ending

        with runtime.autocast(self.model.lm_head.weight.device, self.dtype):
            count = ask.max_new_tokens or self.limit
            sampling = dict(temperature=ask.temperature, seed=ask.seed)
            (new,) = generate(self.model, [prompt], count, on_token=on_token, **sampling)
            ended = new[-1] == self.ending
            tokens = prompt + new[: len(new) - ended]
            look = explain(self.model, self.tokenizer, tokens)
            told = choices(self.model, self.tokenizer, tokens)
        known = [(None, None, ()), *((one.probability, one.gate, one.likeliest) for one in told)]
        fields = "text", "probability", "gate", "likeliest"
        texts = pieces(self.tokenizer, tokens)
        return {
            "text": "".join(texts),
            "prompt_tokens": len(prompt),
            "ended": ended,
            "tokens": [dict(zip(fields, (text, *one))) for text, one in zip(texts, known, strict=True)],
            "thoughts": [dataclasses.asdict(thought) for thought in look.thoughts],
            "unplanned": [dataclasses.asdict(number) for number in look.unplanned],
        }


def pieces(tokenizer: Tokenizer, tokens: list[int]) -> list[str]:
    """The text that each token adds. A character of several tokens comes with the last of them."""
    decode = codecs.getincrementaldecoder("utf-8")("replace").decode
    texts = [decode(tokenizer.token_bytes(token)) for token in tokens]
    return [*texts[:-1], texts[-1] + decode(b"", final=True)]


def describe(
    name: str, model: GPT, tokenizer: Tokenizer, saved: checkpoint.Checkpoint, config: ServeConfig
) -> dict:
    """What GET /model says."""
    return {
        "run": name,
        "step": saved.step,
        "dataset": saved.train_config["dataset"],
        "parameters": model.num_parameters(),
        "context": model.config.block_size,
        "dag_steps": model.config.dag_depth,
        "operations": [] if model.dag is None else model.dag.names,
        "plans": model.reads_numbers,  # it may have thoughts
        "gate": has_gate(model),
        "max_new_tokens": config.max_new_tokens,
        "examples": list(readable(tokenizer, EXAMPLES)),
    }


def readable(tokenizer: Tokenizer, texts: Iterable[str]) -> Iterable[str]:
    for text in texts:
        with suppress(ValueError):
            tokenizer.encode(text)
            yield text


# ------------------------------------------------------------------------------------------------------------
# the server


class Turns:
    """`at_once` texts are written at the same time, `queue` more wait; there is no room beyond."""

    def __init__(self, at_once: int, queue: int):
        self.limiter, self.room = anyio.CapacityLimiter(at_once), at_once + queue


class Writing(Response):
    """What write(on_text) returns, as JSON; streamed, with a line for every text before it.

    It is written in a worker thread, when its turn comes, which ends as soon as the client has gone away.
    """

    def __init__(self, write: Callable[..., dict], stream: bool, turns: Turns):
        self.write, self.stream, self.turns = write, stream, turns
        self.status_code, self.background = 200, None
        self.media_type = "application/x-ndjson" if stream else "application/json"
        self.init_headers()
        self.begun = False

    async def __call__(self, scope, receive, send) -> None:
        if self.turns.room == 0:
            problem, headers = "too many are waiting: try again in a second", {"Retry-After": "1"}
            return await said(429, problem, headers)(scope, receive, send)
        self.turns.room -= 1
        answer = None
        try:
            async with anyio.create_task_group() as group:
                group.start_soon(self.hang_up, receive, group.cancel_scope)
                work = partial(self.work, partial(self.send, send))
                answer = await to_thread.run_sync(work, limiter=self.turns.limiter)
                group.cancel_scope.cancel()
        finally:
            self.turns.room += 1
        if answer is not None:
            await self.send(send, answer, more=False)

    @staticmethod
    async def hang_up(receive, scope: anyio.CancelScope) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        scope.cancel()

    def work(self, send) -> dict:
        def on_text(text: str) -> None:
            from_thread.check_cancelled()
            if self.stream:
                from_thread.run(send, {"token": text})

        return self.write(on_text=on_text)

    async def send(self, send, event: dict, more: bool = True) -> None:
        if not self.begun:  # only now: until here a failure is an answer of its own
            self.begun = True
            start = {"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers}
            await send(start)
        line = json.dumps(event, allow_nan=False) + "\n"
        await send({"type": "http.response.body", "body": line.encode(), "more_body": more})


class Guard:
    """Turns away what pages of other sites send, be it under a name of theirs that leads here (DNS rebinding),
    and what is too long. Adds HEADERS to every answer.
    """

    def __init__(self, app, local: bool):
        self.app, self.local = app, local

    async def __call__(self, scope, receive, send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)

        async def send_with_headers(message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(HEADERS)
            await send(message)

        refusal = self.refusal(scope["method"], Headers(scope=scope))
        app = self.app if refusal is None else said(*refusal)
        await app(scope, receive, send_with_headers)

    def refusal(self, method: str, headers: Headers) -> tuple[int, str] | None:
        host, length = headers.get("host", ""), headers.get("content-length")
        if self.local and not LOOPBACK.fullmatch(host):
            return 403, f"{host!r} is not this machine: open http://127.0.0.1 and the port"
        if "origin" in headers and headers["origin"].partition("://")[2] != host:
            return 403, "this request comes from a page of another site: use the page served here"
        if method == "POST" and (length is None or "transfer-encoding" in headers):
            return 411, "the request has no Content-Length, or comes in chunks: send it whole"
        if length is not None and int(length) > BODY_LIMIT:
            return 413, f"a request of {length} bytes: send {BODY_LIMIT} or less"
        return None


def said(status: int, problem: str, headers: dict[str, str] | None = None) -> JSONResponse:
    return JSONResponse({"error": problem}, status, headers)


def build_app(writer: Writer, about: dict, config: ServeConfig) -> Guard:
    app = FastAPI(openapi_url=None)
    turns = Turns(config.at_once, config.queue)

    @app.post("/generate")
    async def answer(ask: Ask) -> Response:
        try:
            prompt = writer.read(ask)
        except ValueError as error:
            raise HTTPException(422, str(error)) from None
        return Writing(partial(writer.write, prompt, ask), ask.stream, turns)

    @app.get("/model")
    async def model() -> dict:
        return about

    @app.exception_handler(AnyHTTPException)
    async def problem(_, error: AnyHTTPException) -> JSONResponse:
        return said(error.status_code, error.detail, error.headers)

    @app.exception_handler(RequestValidationError)
    async def misfit(_, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"][1:])) or "expected a JSON object sent as application/json"
        return said(422, f"{where}: {first['msg']}")

    @app.exception_handler(500)
    async def failure(_, error: Exception) -> JSONResponse:
        return said(500, "the server failed: its log says where")

    app.mount("/", StaticFiles(directory=WEB, html=True))
    return Guard(app, local=is_loopback(config.host))


def is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens there. ValueError with the remedy where that is not possible."""
    try:
        return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise ValueError(f"port {port} is in use: choose another, such as --port={port + 1}") from None
        raise ValueError(f"cannot listen at {host}, port {port} ({error.strerror}): use others") from None


def main() -> None:
    config = load(ServeConfig)
    if config.num_threads:
        torch.set_num_threads(config.num_threads)
    device = runtime.resolve_device(config.device)
    dtype = runtime.resolve_dtype(config.dtype, device)
    model, tokenizer, saved = checkpoint.load_model(config.out_dir, config.checkpoint, device)
    writer = Writer(model, tokenizer, saved.loader["documents"], config.max_new_tokens, dtype)
    about = describe(Path(config.out_dir).resolve().name, model, tokenizer, saved, config)
    app = build_app(writer, about, config)

    listener = listen(config.host, config.port)
    if not is_loopback(config.host):
        print(f"warning: whoever can reach {config.host} can use this; there is no password", file=sys.stderr)
    host = f"[{config.host}]" if ":" in config.host else config.host
    print(f"open http://{host}:{listener.getsockname()[1]} in a browser; Ctrl-C ends it", flush=True)
    options = dict(log_level="warning", server_header=False, ws="none", timeout_graceful_shutdown=1)
    with suppress(KeyboardInterrupt):
        uvicorn.Server(uvicorn.Config(app, **options)).run(sockets=[listener])


if __name__ == "__main__":
    run_script(main)
