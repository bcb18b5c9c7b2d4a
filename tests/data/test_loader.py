"""Batches hold every document whole and once an epoch, differ between processes, and resume exactly."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data import loader as dataloader
from data.loader import IGNORE, DatasetWriter, Loader, open_shard, read_meta, write_dataset
from data.tokenizer import ByteTokenizer, CharTokenizer

ROOT = Path(__file__).resolve().parents[2]
BYTES = ByteTokenizer()


class LargeVocabulary(ByteTokenizer):
    vocab_size = 100_000


def sums(count: int) -> list[str]:
    """Different documents of 3 to 13 characters."""
    rng = np.random.default_rng(0)
    return [f"{i}=" + "x" * rng.integers(0, 9) for i in range(count)]


@pytest.fixture(params=["documents", "stream"])
def data_dir(request, tmp_path):
    """300 documents, or 9,000 tokens of which each is its own position, in several shards."""
    if request.param == "documents":
        splits = {"train": sums(300), "val": sums(100)}
        write_dataset(tmp_path, "sums", BYTES, splits, documents=True, shard_tokens=700)
    else:
        pieces = np.split(np.arange(9_000), 9)
        write_dataset(
            tmp_path, "numbers", LargeVocabulary(), {"train": pieces}, documents=False, shard_tokens=3_000
        )
    assert len(read_meta(tmp_path)["splits"]["train"]["shards"]) >= 3
    return tmp_path


def loader(data_dir, split="train", **changes) -> Loader:
    return Loader(data_dir, split, **dict(batch_size=4, block_size=20, seed=7) | changes)


def batches(loader: Loader, count: int) -> list[bytes]:
    """Comparable and hashable."""
    return [b"".join(tensor.numpy().tobytes() for tensor in loader.next_batch()) for _ in range(count)]


def texts(loader: Loader, count: int) -> list[str]:
    """The rows of batches, without padding; checks that y is x shifted by one and that padding is ignored."""
    rows = []
    for _ in range(count):
        x, y = loader.next_batch()
        assert x.dtype == y.dtype == torch.int64 and x.shape == y.shape
        for x_T, y_T in zip(x.tolist(), y.tolist()):
            real = sum(target != IGNORE for target in y_T)
            assert x_T[1:real] == y_T[: real - 1] and set(y_T[real:]) <= {IGNORE}
            assert set(x_T[real + 1 :]) <= {ord("\n")}
            rows.append(BYTES.decode(x_T[:real] + y_T[real - 1 : real]))
    return rows


# ----------------------------------------------------------------------------------------------- rows


@settings(max_examples=50)
@given(st.lists(st.integers(1, 16), min_size=1, max_size=60), st.integers(1, 5), st.booleans())
def test_no_document_is_cut_and_each_comes_once_an_epoch(tmp_path_factory, lengths, batch_size, shuffle):
    documents = [chr(ord("A") + i) * length for i, length in enumerate(lengths)]
    path = tmp_path_factory.mktemp("set")
    write_dataset(path, "x", BYTES, {"train": documents}, documents=True, shard_tokens=50)
    try:
        rows = loader(path, batch_size=batch_size, block_size=16, shuffle=shuffle)
    except ValueError as error:
        assert "lower --batch_size" in str(error) and sum(lengths) + len(lengths) < 17 * batch_size
        return
    seen, n = [], len(documents)
    while len(seen) < 3 * n:
        for text in texts(rows, 1):
            assert text.endswith("\n") and len(text) <= 17
            seen += text.splitlines()
    for start in (0, n, 2 * n):
        assert sorted(seen[start : start + n]) == documents


def test_rows_are_as_full_as_the_order_allows(tmp_path):
    write_dataset(tmp_path, "sums", BYTES, {"train": sums(100)}, documents=True)
    rows = texts(loader(tmp_path, shuffle=False), 10)
    assert all(len(row) + following.index("\n") + 1 > 21 for row, following in zip(rows, rows[1:]))
    assert "".join(rows).splitlines()[:100] == sums(100)[: len("".join(rows).splitlines())]


def test_a_window_is_a_stretch_of_the_stream_across_shards(tmp_path):
    pieces = np.split(np.arange(90), 9)
    write_dataset(tmp_path, "x", LargeVocabulary(), {"train": pieces}, documents=False, shard_tokens=10)
    windows = loader(tmp_path, batch_size=64)
    x, y = windows.next_batch()
    assert torch.equal(y, x + 1) and torch.equal(x, x[:, :1] + torch.arange(20))
    starts = {int(start) for _ in range(30) for start in windows.next_batch()[0][:, 0]}
    assert starts == set(range(70))  # the first and the last possible one, too


def test_windows_without_shuffling_lie_side_by_side(tmp_path):
    write_dataset(tmp_path, "x", BYTES, {"train": [np.arange(101)]}, documents=False)
    x, y = loader(tmp_path, batch_size=5, shuffle=False).next_batch()
    assert x.flatten().tolist() == list(range(100)) and y.flatten().tolist() == list(range(1, 101))


# ------------------------------------------------------------------------------- seeds, ranks, resuming


def test_seeds_and_epochs_give_other_orders_and_equal_seeds_the_same(data_dir):
    first, again, other = (batches(loader(data_dir, seed=seed), 200) for seed in (7, 7, 8))
    assert first == again
    assert len(set(first)) == len(first) and not set(first) & set(other)


@pytest.mark.parametrize("world_size", [2, 3])
def test_processes_share_out_the_batches_of_one(data_dir, world_size):
    one = batches(loader(data_dir), 120)  # more than an epoch of the documents
    shares = [
        batches(loader(data_dir, rank=rank, world_size=world_size), 120 // world_size)
        for rank in range(world_size)
    ]
    assert [batch for step in zip(*shares) for batch in step] == one


def test_resumed_equals_uninterrupted(data_dir):
    whole = batches(loader(data_dir), 150)
    first = loader(data_dir)
    for stop in (1, 37, 120):
        batches(first, stop - first.next)
        resumed = loader(data_dir)
        resumed.load_state_dict(json.loads(json.dumps(first.state_dict())))
        assert batches(resumed, 150 - stop) == whole[stop:]


def test_reset_starts_over(data_dir):
    val = loader(data_dir)
    first = batches(val, 100)
    val.reset()
    assert batches(val, 100) == first


@pytest.mark.parametrize("key, value", [("seed", 8), ("batch_size", 5)])
def test_a_state_of_other_settings_is_refused(data_dir, key, value):
    with pytest.raises(ValueError, match=f"{key}={value}.*resume with"):
        loader(data_dir).load_state_dict(loader(data_dir, **{key: value}).state_dict())


def test_a_state_of_other_data_is_refused(tmp_path):
    loaders = []
    for name in "ab":
        write_dataset(tmp_path / name, "x", BYTES, {"train": [name * 100]}, documents=False)
        loaders.append(loader(tmp_path / name))
    with pytest.raises(ValueError, match="data="):
        loaders[0].load_state_dict(loaders[1].state_dict())


# ------------------------------------------------------------------------------------------------ files


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's /proc")
def test_resident_memory_does_not_grow(tmp_path):
    def mapped_mb() -> float:  # RssFile is of mapped files alone, so that other allocations do not blur it
        return int(re.search(r"RssFile:\s*(\d+)", Path("/proc/self/status").read_text())[1]) / 1024

    tokens = np.random.default_rng(0).integers(0, 60_000, 20_000_000)
    write_dataset(tmp_path, "x", LargeVocabulary(), {"train": [tokens]}, documents=False)  # 80 MB
    rows = loader(tmp_path, batch_size=64)
    rows.next_batch()
    before = mapped_mb()
    for _ in range(100):  # 6,400 windows; the kernel maps 64 KiB around each, most of the file in the end
        rows.next_batch()
    assert mapped_mb() - before < 4


def test_the_layout_of_a_shard(tmp_path):
    for tokenizer, version, dtype in (BYTES, 1, "<u2"), (LargeVocabulary(), 2, "<u4"):
        write_dataset(tmp_path, "x", tokenizer, {"train": ["abc"]}, documents=True)
        raw = (tmp_path / "train_000000.bin").read_bytes()
        header = np.frombuffer(raw, "<i4", 256)
        assert header[:3].tolist() == [20240520, version, 4] and not header[3:].any()
        assert np.frombuffer(raw[1024:], dtype).tolist() == [97, 98, 99, 10]


def test_shards_together_are_what_was_given(tmp_path):
    documents = sums(500)
    splits = {"train": documents, "val": documents[:5]}
    meta = write_dataset(tmp_path, "x", BYTES, splits, documents=True, shard_tokens=90)
    info = meta["splits"]["train"]
    shards = [open_shard(tmp_path / name) for name in info["shards"]]
    assert all(len(shard) <= 90 and shard[-1] == 10 for shard in shards)
    assert BYTES.decode(np.concatenate(shards).tolist()) == "".join(f"{d}\n" for d in documents)
    assert (info["tokens"], info["documents"]) == (sum(map(len, shards)), 500)
    assert meta == read_meta(tmp_path)


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_what_could_not_be_written_leaves_the_old_set_or_nothing(tmp_path):
    def write(path, documents):
        splits = {"train": documents, "val": sums(100)}
        write_dataset(path, "x", BYTES, splits, documents=True, shard_tokens=300)

    def failing():
        yield from sums(100)
        raise OSError("no space left on device")

    with pytest.raises(OSError):
        write(tmp_path / "new", failing())
    assert not list(tmp_path.iterdir())

    write(tmp_path, sums(200))
    before = files(tmp_path)
    with pytest.raises(OSError):
        write(tmp_path, failing())
    assert files(tmp_path) == before

    write(tmp_path, sums(100))  # fewer shards: none of the old ones stays
    shards = read_meta(tmp_path)["splits"]["train"]["shards"]
    assert {path.name for path in tmp_path.glob("train*")} == set(shards)


KILLED_WHILE_WRITING = """
import os, signal, sys
from data.loader import DatasetWriter
from data.tokenizer import ByteTokenizer
writer = DatasetWriter(sys.argv[1], "x", ByteTokenizer(), documents=True, shard_tokens=300, resume=True)
for i in range(writer.consumed, 400):
    if i == int(sys.argv[2]):
        os.kill(os.getpid(), signal.SIGKILL)
    writer.add("val" if i % 7 == 0 else "train", f"{i}=" + "x" * (i % 9))
"""


def test_a_killed_writer_goes_on_to_the_same_files(tmp_path, monkeypatch):
    def write(path, end=400):
        writer = DatasetWriter(path, "x", BYTES, documents=True, shard_tokens=300, resume=True)
        start = writer.consumed
        for i in range(start, end):
            writer.add("val" if i % 7 == 0 else "train", f"{i}=" + "x" * (i % 9))
        return writer, start

    write(tmp_path / "whole")[0].finish()
    killed = subprocess.run([sys.executable, "-c", KILLED_WHILE_WRITING, tmp_path / "cut", "150"], cwd=ROOT)
    assert killed.returncode == -signal.SIGKILL and not (tmp_path / "cut/meta.json").exists()
    monkeypatch.setattr(dataloader, "BUFFER_TOKENS", 1)  # so that shards go beyond the recorded progress
    write(tmp_path / "cut", end=301)
    writer, start = write(tmp_path / "cut")
    assert 150 < start <= 301
    writer.finish()
    assert files(tmp_path / "cut") == files(tmp_path / "whole")


def test_interruptions_while_files_are_moved_lose_nothing(tmp_path, monkeypatch):
    def write():
        writer = DatasetWriter(tmp_path, "x", BYTES, documents=True, shard_tokens=300, resume=True)
        for document in sums(400)[writer.consumed :]:
            writer.add("train", document)
        return writer.finish(["train"])

    replace, interruptions = os.replace, []

    def move_one_shard(source, target):
        replace(source, target)
        if target.suffix == ".bin":
            interruptions.append(target)
            raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", move_one_shard)
    meta = None
    while meta is None:
        try:
            meta = write()
        except KeyboardInterrupt:
            assert not (tmp_path / "meta.json").exists()
    assert len(interruptions) == len(meta["splits"]["train"]["shards"]) > 5
    shards = [open_shard(tmp_path / name) for name in meta["splits"]["train"]["shards"]]
    assert BYTES.decode(np.concatenate(shards).tolist()) == "".join(f"{d}\n" for d in sums(400))


def test_an_unfinished_set_of_other_settings_is_not_thrown_away(tmp_path):
    writer = DatasetWriter(tmp_path, "x", BYTES, documents=True, shard_tokens=10, resume=True)
    for document in sums(20):
        writer.add("train", document)
    with pytest.raises(ValueError, match="other settings"):
        DatasetWriter(tmp_path, "x", BYTES, documents=True, shard_tokens=10, prepare={"a": 1}, resume=True)
    assert DatasetWriter(tmp_path, "x", BYTES, documents=True, shard_tokens=10, resume=True).consumed > 10


# ------------------------------------------------------------------------------------------------ mistakes


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda raw: raw[:-3], r"should hold \d+ tokens and has"),
        (lambda raw: raw + b"12", r"should hold \d+ tokens and has"),
        (lambda raw: raw[:100], "is not a token shard"),
        (lambda raw: b"GIF8" + raw[4:], "is not a token shard"),
        (lambda raw: raw[:4] + bytes([9]) + raw[5:], "unknown version 9"),
    ],
)
def test_a_damaged_shard_is_named(data_dir, damage, message):
    path = data_dir / "train_000001.bin"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=rf"train_000001.bin .*{message}.*: prepare"):
        loader(data_dir)


def test_a_missing_shard_is_named(data_dir):
    (data_dir / "train_000001.bin").unlink()
    with pytest.raises(FileNotFoundError, match="train_000001.bin is missing: prepare"):
        loader(data_dir)


@pytest.mark.parametrize("content", ["", "[]", '{"format": 99}'])
def test_a_damaged_meta_is_named(data_dir, content):
    (data_dir / "meta.json").write_text(content)
    with pytest.raises(ValueError, match="meta.json .*prepare"):
        loader(data_dir)


def test_data_that_do_not_suffice(tmp_path):
    with pytest.raises(FileNotFoundError, match="prepare.py"):
        loader(tmp_path)
    write_dataset(tmp_path, "x", BYTES, {"train": ["ab", "a" * 30]}, documents=True)
    with pytest.raises(ValueError, match="document 1 has 31 tokens.*--block_size to 30"):
        loader(tmp_path, block_size=29)
    with pytest.raises(ValueError, match="2 documents fill 2 rows .* lower --batch_size"):
        loader(tmp_path, block_size=30, batch_size=3)
    assert texts(loader(tmp_path, block_size=30, batch_size=2, shuffle=False), 1) == ["ab\n", "a" * 30 + "\n"]
    with pytest.raises(ValueError, match="no split 'val', only train"):
        loader(tmp_path, "val")
    write_dataset(tmp_path, "x", BYTES, {"train": ["a" * 20]}, documents=False)
    with pytest.raises(ValueError, match="20 tokens are too few .* lower --block_size"):
        loader(tmp_path)
    assert loader(tmp_path, block_size=19).next_batch()[0].shape == (4, 19)


@pytest.mark.parametrize("document", ["", "1\n2"])
def test_a_document_is_not_empty_and_has_no_separator_within(tmp_path, document):
    with pytest.raises(ValueError, match="empty or holds the separator"):
        write_dataset(tmp_path, "x", BYTES, {"train": ["ok", document]}, documents=True)


def test_ids_beyond_the_vocabulary_are_not_written(tmp_path):
    with pytest.raises(AssertionError, match="vocabulary"):
        write_dataset(tmp_path, "x", CharTokenizer("\nab"), {"train": [np.array([3])]}, documents=False)


def test_another_number_of_processes_goes_on_where_the_run_was(data_dir):
    alone = loader(data_dir)
    batches(alone, 6)
    state = alone.state_dict()
    shares = [loader(data_dir, rank=rank, world_size=2) for rank in range(2)]
    for share in shares:
        share.load_state_dict(state)
    for share in shares:  # micro-batches 6 and 7
        (x, y), (expected_x, expected_y) = share.next_batch(), alone.next_batch()
        assert torch.equal(x, expected_x) and torch.equal(y, expected_y)
    with pytest.raises(ValueError, match="6 micro-batches, which 4 processes cannot share"):
        loader(data_dir, world_size=4).load_state_dict(state)


@pytest.mark.parametrize(
    "tokens, words", [(np.arange(99), "hold 99 tokens"), (np.full(100, 300), "beyond the voc")]
)
def test_a_shard_of_other_data_is_refused(tmp_path, tokens, words):
    write_dataset(tmp_path / "ours", "x", BYTES, {"train": [np.arange(100)]}, documents=False)
    write_dataset(tmp_path / "theirs", "x", LargeVocabulary(), {"train": [tokens]}, documents=False)
    shutil.copy(tmp_path / "theirs" / "train_000000.bin", tmp_path / "ours")
    with pytest.raises(ValueError, match=words):
        loader(tmp_path / "ours").next_batch()
