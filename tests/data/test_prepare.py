"""Data sets made of downloads or of the user's own text: whole and repeatable, or one line on what to do."""

import importlib.util
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest

import configurator
from data.loader import Loader, open_shard, read_meta
from data.tokenizer import from_json

ROOT = Path(__file__).resolve().parents[2]
SHAKESPEARE = ROOT.parent / "shared/data/tinyshakespeare.txt"


def script(name: str):
    spec = importlib.util.spec_from_file_location(f"prepare_{name}", ROOT / "data" / name / "prepare.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


shakespeare, openwebtext, custom = map(script, ("shakespeare_char", "openwebtext", "custom"))


def prepare(module, **settings) -> dict:
    """As the script does it with --key=value."""
    config, _ = configurator.parse(module.Settings, [f"--{key}={value}" for key, value in settings.items()])
    return module.prepare(config)


def decoded(folder, split: str) -> str:
    meta = read_meta(folder)
    shards = [open_shard(Path(folder) / name) for name in meta["splits"][split]["shards"]]
    return from_json(meta["tokenizer"]).decode(np.concatenate(shards).tolist())


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# ----------------------------------------------------------------------------------------- shakespeare_char


@pytest.fixture
def server():
    """A web server that sends `content` after some `failures`: an error and half of it in turns."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.server.requests += 1
            fails, content = self.server.requests <= self.server.failures, self.server.content
            busy = fails and self.server.requests % 2
            self.send_response(503 if busy else 200)
            self.send_header("Content-Length", str(4 if busy else len(content)))
            self.end_headers()
            self.wfile.write(b"busy" if busy else content[: len(content) // (1 + fails)])

        def log_message(self, *args):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.requests, server.failures, server.content = 0, 0, b""
        server.url = f"http://127.0.0.1:{server.server_port}/input.txt"
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield server
        server.shutdown()


@pytest.mark.skipif(not SHAKESPEARE.exists(), reason="no copy of tiny Shakespeare outside the repository")
def test_shakespeare_is_downloaded_with_patience_and_the_same_as_from_a_file(server, tmp_path):
    text = SHAKESPEARE.read_text()
    server.failures, server.content = 2, text.encode()
    prepare(shakespeare, out_dir=tmp_path / "url", url=server.url, backoff=0.01)
    meta = prepare(shakespeare, out_dir=tmp_path / "file", input=SHAKESPEARE)
    assert server.requests == 3
    assert files(tmp_path / "url") == files(tmp_path / "file")
    assert [meta["splits"][split]["tokens"] for split in ("train", "val")] == [1_003_854, 111_540]
    assert len(meta["tokenizer"]["chars"]) == 65
    assert decoded(tmp_path / "url", "train") + decoded(tmp_path / "url", "val") == text


def test_a_download_that_never_comes_says_how_to_go_on(server, tmp_path):
    server.failures, server.content = 99, b"text"
    with pytest.raises(OSError, match="--input=FILE"):
        prepare(shakespeare, out_dir=tmp_path / "x", url=server.url, backoff=0.01, attempts=3)
    assert server.requests == 3
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("source", ["url", "input"])
def test_a_wrong_checksum_leaves_nothing_behind(server, tmp_path, source):
    server.content = b"Before we proceed any further, hear me speak!\n" * 100
    (tmp_path / "input.txt").write_bytes(server.content)
    given = {"url": server.url, "input": tmp_path / "input.txt"}[source]
    with pytest.raises(ValueError, match="is not tiny Shakespeare"):
        prepare(shakespeare, out_dir=tmp_path / "x", **{source: given})
    assert not (tmp_path / "x").exists()


# ---------------------------------------------------------------------------------------------- openwebtext


@pytest.fixture(scope="module")
def articles(tmp_path_factory) -> tuple[Path, list[str]]:
    texts = [f"article {i}\n\nwith {i * i} 'quotes', é and\ttabs {'x' * (i % 50)}" for i in range(300)]
    path = tmp_path_factory.mktemp("articles") / "articles.jsonl"
    path.write_text("".join(json.dumps({"text": text, "url": "a"}) + "\n" for text in texts))
    return path, texts


def prepare_articles(path, out_dir) -> dict:
    pytest.importorskip("datasets", reason="openwebtext is read with the optional package datasets")
    return prepare(
        openwebtext, source=f"json:{path}", tokenizer="byte", val_every=20, shard_tokens=2000, out_dir=out_dir
    )


@pytest.mark.extras
def test_openwebtext_has_every_document_once_in_its_split(articles, tmp_path):
    path, texts = articles
    meta = prepare_articles(path, tmp_path)
    assert decoded(tmp_path, "val") == "".join(text + "\n" for text in texts[::20])
    assert decoded(tmp_path, "train") == "".join(text + "\n" for i, text in enumerate(texts) if i % 20)
    assert len(meta["splits"]["train"]["shards"]) > 5


@pytest.mark.extras
def test_openwebtext_interrupted_twice_gives_the_same_files(articles, tmp_path, monkeypatch):
    path, _ = articles
    prepare_articles(path, tmp_path / "whole")
    stream, starts = openwebtext.stream_documents, []

    def interrupted(source, start):
        starts.append(start)
        for i, text in enumerate(stream(source, start), start):
            if i == (100, 230, None)[len(starts) - 1]:
                raise KeyboardInterrupt
            yield text

    monkeypatch.setattr(openwebtext, "stream_documents", interrupted)
    monkeypatch.setattr(openwebtext, "DOCUMENTS_AT_ONCE", 10)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            prepare_articles(path, tmp_path / "cut")
        assert not (tmp_path / "cut/meta.json").exists()
    prepare_articles(path, tmp_path / "cut")
    assert starts[0] == 0 and 50 < starts[1] <= 100 and 150 < starts[2] <= 230
    assert files(tmp_path / "cut") == files(tmp_path / "whole")


@pytest.mark.extras
def test_openwebtext_without_datasets_or_a_text_column(articles, tmp_path, monkeypatch):
    pytest.importorskip("datasets", reason="openwebtext is read with the optional package datasets")
    (tmp_path / "a.jsonl").write_text('{"story": "x"}\n')
    with pytest.raises(ValueError, match="a column `text`"):
        prepare_articles(tmp_path / "a.jsonl", tmp_path / "x")
    with pytest.raises(FileNotFoundError, match="b.jsonl does not exist"):
        prepare_articles(tmp_path / "b.jsonl", tmp_path / "x")
    monkeypatch.setitem(openwebtext.sys.modules, "datasets", None)
    with pytest.raises(ImportError, match="pip install datasets"):
        prepare(openwebtext, tokenizer="byte", out_dir=tmp_path / "x")
    assert not (tmp_path / "x").exists()


# --------------------------------------------------------------------------------------------------- custom

TEXT = "".join(f"{a}+{b}={a + b}\tok é\n" for a in range(20) for b in range(15))


@pytest.fixture
def own(tmp_path):
    """own(content, **settings) prepares a text in tmp_path/mine and returns its meta."""

    def run(content=TEXT, **settings):
        (tmp_path / "train.txt").write_bytes(content if isinstance(content, bytes) else content.encode())
        defaults = dict(input=tmp_path / "train.txt", name="mine", out_dir=tmp_path / "mine")
        return prepare(custom, **defaults | settings)

    return run


@pytest.mark.parametrize("tokenizer", ["char", "byte", "bpe"])
def test_a_stream_comes_back_as_it_was(own, tmp_path, tokenizer):
    own(tokenizer=tokenizer)
    train, val = decoded(tmp_path / "mine", "train"), decoded(tmp_path / "mine", "val")
    assert train + val == TEXT
    assert len(val) == pytest.approx(0.1 * len(TEXT), abs=1)
    Loader(tmp_path / "mine", "val", batch_size=2, block_size=32, seed=0).next_batch()


@pytest.mark.parametrize("tokenizer", ["char", "byte", "bpe"])
def test_lines_are_documents_and_equal_lines_on_one_side(own, tmp_path, tokenizer):
    meta = own(TEXT + TEXT, documents="lines", tokenizer=tokenizer)
    separator = from_json(meta["tokenizer"]).separator
    train, val = (decoded(tmp_path / "mine", split).split(separator)[:-1] for split in ("train", "val"))
    assert sorted(train + val) == sorted((TEXT + TEXT).splitlines())
    assert not set(train) & set(val)
    assert 0.05 < len(val) / 600 < 0.15
    assert meta["documents"] and meta["splits"]["val"]["documents"] == len(val)


def test_the_vocabulary_covers_a_file_for_validation(own, tmp_path):
    (tmp_path / "val.txt").write_text("ß only here\n")
    for documents in ("stream", "lines"):
        own(val=tmp_path / "val.txt", documents=documents, overwrite=True)
        assert decoded(tmp_path / "mine", "val") == "ß only here\n"
        assert decoded(tmp_path / "mine", "train") == TEXT


def test_line_ends_and_a_byte_order_mark_do_not_matter(own, tmp_path):
    tidy = own(documents="lines")
    before = files(tmp_path / "mine")
    with_blank_lines_and_no_last_newline = TEXT.replace("\n", "\r\n\r\n  \r\n").rstrip()
    sloppy = own("\ufeff" + with_blank_lines_and_no_last_newline, documents="lines", overwrite=True)
    assert sloppy["splits"] == tidy["splits"]
    assert files(tmp_path / "mine").keys() == before.keys()
    assert files(tmp_path / "mine")["train_000000.bin"] == before["train_000000.bin"]


def test_a_long_stream_is_encoded_in_pieces(monkeypatch):
    monkeypatch.setattr(custom, "PIECE_CHARS", 10)
    for text in (TEXT, TEXT[:-1], "x" * 50, "\n" * 30):
        pieces = list(custom.pieces(text))
        assert "".join(pieces) == text
        assert all(len(piece) > 10 and piece.endswith("\n") for piece in pieces[:-1])
    assert len(list(custom.pieces(TEXT))) > 100


@pytest.mark.parametrize(
    "content, settings, message",
    [
        (b"", {}, "has no text"),
        (b" \n\n", {}, "has no text"),
        (b"abc\xff\n", {}, "not UTF-8 at byte 3"),
        (b"one line\n", {"documents": "lines"}, "split: more is needed"),
        (b"text\n" * 9, {"val": "nowhere.txt"}, "nowhere.txt"),
        (b"text\n" * 9, {"input": "nowhere.txt"}, "nowhere.txt"),
        (b"text\n" * 9, {"input": ""}, "--input=FILE --name=NAME"),
        (b"text\n" * 9, {"name": ""}, "--input=FILE --name=NAME"),
        (b"text\n" * 9, {"name": "../x"}, "name='../x'"),
        (b"text\n" * 9, {"name": ".."}, "name='..'"),
        (b"text\n" * 9, {"name": "custom"}, "belongs to data/custom/prepare.py"),
        (b"text\n" * 9, {"name": "openwebtext"}, "belongs to data/openwebtext/prepare.py"),
        (b"text\n" * 9, {"vocab_size": 300}, "goes with .*bpe"),
        (b"text\n" * 9, {"tokenizer": "word"}, "char, byte, gpt2, bpe"),
    ],
)
def test_mistakes_are_told_and_leave_nothing(own, tmp_path, content, settings, message):
    with pytest.raises((ValueError, OSError), match=message):
        own(content, **settings)
    assert {path.name for path in tmp_path.iterdir()} == {"train.txt"}


def test_a_set_of_another_text_is_not_overwritten(own, tmp_path):
    own()
    before = files(tmp_path / "mine")
    own()  # the same again is no harm
    for content, settings in ((TEXT + "more\n", {}), (TEXT, {"tokenizer": "byte"})):
        with pytest.raises(ValueError, match="--overwrite=True"):
            own(content, **settings)
        assert files(tmp_path / "mine") == before
    own(TEXT + "more\n", overwrite=True)
    assert decoded(tmp_path / "mine", "val").endswith("more\n")


def test_the_script_tells_a_mistake_on_one_line(run_script, tmp_path):
    (tmp_path / "bad.txt").write_bytes(b"abc\xff")
    result = run_script("data/custom/prepare.py", f"--input={tmp_path}/bad.txt", "--name=mine")
    assert result.returncode == 2 and result.stdout == ""
    assert result.stderr == f"error: {tmp_path}/bad.txt is not UTF-8 at byte 3: convert it, e.g. with iconv\n"
