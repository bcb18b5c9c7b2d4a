"""Token data sets on disk, and the batches a model is trained on.

A data set is a folder of shards, `train_000000.bin`, `val_000000.bin`, ..., and a `meta.json`. A shard is as
in llm.c and modded-nanogpt: 256 little-endian int32 (magic, version, number of tokens, zeros), then the
tokens, uint16 in version 1; version 2 is our own, uint32 for vocabularies beyond 65,536. Two kinds of sets:

- a stream (`"documents": false`): rows are random windows of one long text, as in nanoGPT
- documents: each ends with the separator, and a row holds whole documents, so that a problem is never cut

    loader = Loader("data/arithmetic", "train", batch_size=12, block_size=64, seed=1337)
    x, y = loader.next_batch()    # int64 (B, T); y is x shifted by one, -1 where nothing is to be predicted

Shard layout: https://github.com/karpathy/llm.c and https://github.com/KellerJordan/modded-nanogpt
B batch, T tokens (block_size).
"""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch

MAGIC = 20240520
HEADER_BYTES = 256 * 4
TOKEN_TYPES = {1: np.dtype("<u2"), 2: np.dtype("<u4")}  # shard version -> how a token is stored
META_FORMAT = 1
IGNORE = -1  # target of padding; the loss skips it
SCAN_TOKENS = 1 << 24  # looked at in one go when documents are counted
BUFFER_TOKENS = 1 << 20  # collected before they are written
AGAIN = "prepare the data set again"
ROOT = Path(__file__).resolve().parents[1]


# ----------------------------------------------------------------------------------------------------------
# reading


def prepared(data_dir: Path, dataset: str) -> Path:
    """The folder of a data set in `data_dir`; runs data/<dataset>/prepare.py first where it is missing.

    ValueError where there is no such script; SystemExit with the script's exit code where it fails.
    """
    folder, script = data_dir / dataset, ROOT / "data" / dataset / "prepare.py"
    if not (folder / "meta.json").exists():
        if not script.exists():
            raise ValueError(
                f"no dataset {folder}: prepare your own text with "
                f"`python data/custom/prepare.py --input=FILE --name={dataset}`"
            )
        print(f"preparing {folder} (once): python {script} --out_dir={folder}", flush=True)
        code = subprocess.run([sys.executable, str(script), f"--out_dir={folder}"]).returncode
        if code:
            raise SystemExit(code)  # the script has said what is wrong
    return folder


def read_meta(data_dir) -> dict:
    """The meta.json of a prepared data set."""
    path = Path(data_dir) / "meta.json"
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing: prepare the data set, python data/<name>/prepare.py")
    try:
        meta = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}): {AGAIN}") from error
    if not isinstance(meta, dict) or meta.get("format") != META_FORMAT:
        raise ValueError(f"{path} is not a meta.json of format {META_FORMAT}: {AGAIN}")
    return meta


def open_shard(path) -> np.memmap:
    """The tokens of a shard, memory-mapped. ValueError if the file is truncated or is no such shard."""
    if not os.path.exists(path):
        raise FileNotFoundError(f"{path} is missing: {AGAIN}")
    header = np.fromfile(path, "<i4", count=256)
    if len(header) < 256 or header[0] != MAGIC:
        raise ValueError(f"{path} is not a token shard: {AGAIN}")
    version, count = int(header[1]), int(header[2])
    if version not in TOKEN_TYPES:
        raise ValueError(f"{path} is a token shard of unknown version {version}: {AGAIN}")
    dtype = TOKEN_TYPES[version]
    found = (os.path.getsize(path) - HEADER_BYTES) / dtype.itemsize
    if found != count or count < 1:
        raise ValueError(f"{path} should hold {count} tokens and has {found:g}: {AGAIN}")
    return np.memmap(path, dtype, "r", offset=HEADER_BYTES, shape=(count,))


class TokenArray:
    """The shards of a split as one long array.

    Shards are mapped anew for every use: pages read through a lasting map stay in resident memory, which
    would grow over a run to the size of the data set.
    """

    def __init__(self, paths):
        shards = [open_shard(path) for path in paths]
        self.paths = list(paths)
        self.dtypes = [shard.dtype for shard in shards]
        self.counts = [len(shard) for shard in shards]
        self.ends = np.cumsum(self.counts)

    def __len__(self):
        return int(self.ends[-1])

    def shard(self, i) -> np.memmap:
        return np.memmap(self.paths[i], self.dtypes[i], "r", offset=HEADER_BYTES, shape=(self.counts[i],))

    def take(self, index: np.ndarray) -> np.ndarray:
        """The tokens at these positions, in the shape of `index`, as int64."""
        if len(self.paths) == 1:
            return self.shard(0)[index].astype(np.int64)
        tokens = np.empty(index.shape, np.int64)
        shard_of = np.searchsorted(self.ends, index, side="right")
        for i in np.unique(shard_of):
            here = shard_of == i
            tokens[here] = self.shard(i)[index[here] - (self.ends[i] - self.counts[i])]
        return tokens

    def positions_of(self, token: int) -> np.ndarray:
        """Where a token stands, found in one pass."""
        found = []
        for i, end in enumerate(self.ends):
            shard, offset = self.shard(i), end - self.counts[i]
            for start in range(0, len(shard), SCAN_TOKENS):
                found.append(np.flatnonzero(shard[start : start + SCAN_TOKENS] == token) + (offset + start))
        return np.concatenate(found)


# ----------------------------------------------------------------------------------------------------------
# batches: batch(g) -> tokens (B, T + 1), and how many in each row are real (B,)
# A pure function of the seed and g, the number of the micro-batch counted over all processes.


class WindowRows:
    """Rows cut from a stream, at random places, or side by side if not shuffled."""

    def __init__(self, tokens: TokenArray, *, batch_size: int, block_size: int, seed: int, shuffle: bool):
        if len(tokens) < block_size + 1:
            raise ValueError(
                f"{len(tokens)} tokens are too few for rows of block_size={block_size}: lower "
                f"--block_size, or prepare a longer text"
            )
        self.tokens, self.batch_size, self.block_size = tokens, batch_size, block_size
        self.seed, self.shuffle = seed, shuffle
        self.columns = np.arange(block_size + 1)

    def batch(self, g: int) -> tuple[np.ndarray, np.ndarray]:
        B, T = self.batch_size, self.block_size
        if self.shuffle:
            starts = np.random.default_rng((self.seed, g)).integers(0, len(self.tokens) - T, B)
        else:
            starts = np.arange(g * B, (g + 1) * B) % ((len(self.tokens) - 1) // T) * T
        return self.tokens.take(starts[:, None] + self.columns), np.full(B, T + 1)


class DocumentRows:
    """Rows of whole documents, as many as fit into T + 1 tokens, and padding.

    Every epoch shuffles the documents and fills rows in that order; a row ends before the first document that
    does not fit. Batches are taken from the rows of all epochs, one after another.
    """

    def __init__(
        self,
        tokens: TokenArray,
        separator_id: int,
        *,
        batch_size: int,
        block_size: int,
        seed: int,
        shuffle: bool,
    ):
        ends = tokens.positions_of(separator_id) + 1
        if not np.isin(tokens.ends, ends).all():
            raise ValueError(f"a shard in {tokens.paths[0].parent} ends within a document: {AGAIN}")
        self.starts = np.concatenate([[0], ends[:-1]])
        self.lengths = ends - self.starts
        at, longest = self.lengths.argmax(), self.lengths.max()
        if longest > block_size + 1:
            raise ValueError(
                f"document {at} has {longest} tokens, too many for a row of "
                f"block_size={block_size}: raise --block_size to {longest - 1}"
            )
        self.tokens, self.separator_id = tokens, separator_id
        self.batch_size, self.capacity = batch_size, block_size + 1
        self.seed, self.shuffle = seed, shuffle
        self._open_epoch(0, first_row=0)
        if self.n_rows < batch_size:
            raise ValueError(
                f"{len(ends)} documents fill {self.n_rows} rows of block_size={block_size}, not "
                f"batch_size={batch_size}: lower --batch_size, or prepare more documents"
            )

    def _open_epoch(self, epoch: int, first_row: int):
        n = len(self.lengths)
        self.epoch, self.first_row = epoch, first_row
        self.order = np.arange(n)
        if self.shuffle:
            self.order = np.random.default_rng((self.seed, epoch)).permutation(n)
        # If a row began with document i, with which one would the next row begin? Asked for all i at once.
        filled = np.concatenate([[0], np.cumsum(self.lengths[self.order])])
        following = (np.searchsorted(filled, filled[:-1] + self.capacity, side="right") - 1).tolist()
        bounds = [0]
        while bounds[-1] < n:
            bounds.append(following[bounds[-1]])
        self.bounds = np.array(bounds)  # row r of the epoch holds documents order[bounds[r]:bounds[r + 1]]
        self.n_rows = len(bounds) - 1

    def _documents(self, row: int, limit: int) -> tuple[np.ndarray, np.ndarray]:
        """-> the documents of at most `limit` rows of an epoch from `row` on, and the tokens in each row"""
        if row < self.first_row:
            self._open_epoch(0, first_row=0)
        while row >= self.first_row + self.n_rows:
            self._open_epoch(self.epoch + 1, self.first_row + self.n_rows)
        bounds = self.bounds[row - self.first_row :][: limit + 1]
        documents = self.order[bounds[0] : bounds[-1]]
        return documents, np.add.reduceat(self.lengths[documents], bounds[:-1] - bounds[0])

    def batch(self, g: int) -> tuple[np.ndarray, np.ndarray]:
        row = g * self.batch_size
        documents, real = self._documents(row, self.batch_size)
        while len(real) < self.batch_size:  # the epoch ends within the batch
            more = self._documents(row + len(real), self.batch_size - len(real))
            documents, real = np.concatenate([documents, more[0]]), np.concatenate([real, more[1]])
        lengths = self.lengths[documents]
        ends = np.cumsum(lengths)
        index = np.arange(ends[-1]) + np.repeat(self.starts[documents] - (ends - lengths), lengths)
        rows = np.full((self.batch_size, self.capacity), self.separator_id)
        rows[np.arange(self.capacity) < real[:, None]] = self.tokens.take(index)
        return rows, real


class Loader:
    """Batches of one split, for one of `world_size` processes.

    Batch k of process r is micro-batch k * world_size + r: N processes see in one step what one process sees
    in N accumulation steps. `state_dict()` is plain JSON, the same for all processes, and resumes exactly,
    with another number of processes too.
    """

    def __init__(
        self,
        data_dir,
        split: str,
        *,
        batch_size: int,
        block_size: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        shuffle: bool = True,
    ):
        assert 0 <= rank < world_size, f"rank {rank} of {world_size}"
        meta = read_meta(data_dir)
        if split not in meta["splits"]:
            raise ValueError(f"{data_dir} has no split {split!r}, only {', '.join(meta['splits'])}")
        tokens = TokenArray([Path(data_dir) / name for name in meta["splits"][split]["shards"]])
        if len(tokens) != meta["splits"][split]["tokens"]:
            raise ValueError(
                f"the {split} shards in {data_dir} hold {len(tokens)} tokens, meta.json says "
                f"{meta['splits'][split]['tokens']}: {AGAIN}"
            )
        self.data_dir, self.vocab_size = data_dir, meta["vocab_size"]
        sizes = dict(batch_size=batch_size, block_size=block_size, seed=seed, shuffle=shuffle)
        self.rows = (
            DocumentRows(tokens, meta["separator_id"], **sizes)
            if meta["documents"]
            else WindowRows(tokens, **sizes)
        )
        self.columns = np.arange(block_size + 1)
        self.rank, self.world_size, self.next = rank, world_size, 0
        content = "".join(meta["splits"][split]["sha256"])
        self.identity = dict(
            data=hashlib.sha256(content.encode()).hexdigest()[:16],
            split=split,
            documents=meta["documents"],
            **sizes,
        )

    def next_batch(self) -> tuple[torch.Tensor, torch.Tensor]:
        """-> x, y: int64 (B, T) on the CPU"""
        rows, real = self.rows.batch(self.next * self.world_size + self.rank)
        if rows.max() >= self.vocab_size:  # on a GPU it would only be a device-side assert
            raise ValueError(
                f"a shard in {self.data_dir} holds token {rows.max()}, beyond the vocabulary of "
                f"{self.vocab_size}: {AGAIN}"
            )
        self.next += 1
        targets = np.where(self.columns[1:] < real[:, None], rows[:, 1:], IGNORE)
        return torch.from_numpy(np.ascontiguousarray(rows[:, :-1])), torch.from_numpy(targets)

    def reset(self):
        """Start over, so that a validation loader gives the same batches at every evaluation."""
        self.next = 0

    def state_dict(self) -> dict:
        return {"micro_batches": self.next * self.world_size, **self.identity}

    def load_state_dict(self, state: dict):
        for key, now in self.identity.items():
            if state.get(key) != now:
                raise ValueError(
                    f"the run read its data with {key}={state.get(key)}, now it is {key}={now}: "
                    f"resume with the data and the settings it began with"
                )
        self.next, remainder = divmod(state["micro_batches"], self.world_size)
        if remainder:
            raise ValueError(
                f"the run has read {state['micro_batches']} micro-batches, which "
                f"{self.world_size} processes cannot share: resume with a number that divides it"
            )


# ----------------------------------------------------------------------------------------------------------
# writing


class ShardWriter:
    """Appends pieces, documents or stretches of a stream, to the shards of one split. No piece is cut: a shard
    ends before the piece that would make it longer than `shard_tokens`.

    `progress` says what is written; a writer made from the progress of another goes on from there.
    """

    def __init__(
        self, folder: Path, split: str, vocab_size: int, shard_tokens: int, progress: dict | None = None
    ):
        self.folder, self.split, self.vocab_size, self.shard_tokens = folder, split, vocab_size, shard_tokens
        self.version = 1 if vocab_size <= 2**16 else 2
        self.dtype = TOKEN_TYPES[self.version]
        self.progress = progress or {"shards": [], "tokens": 0, "documents": 0, "sha256": [], "unfinished": 0}
        self.buffer, self.buffered, self.file = [], 0, None

    @property
    def path(self) -> Path:
        return self.folder / f"{self.split}_{len(self.progress['shards']):06d}.bin"

    def fits(self, tokens: np.ndarray) -> bool:
        unfinished = self.progress["unfinished"]
        return unfinished == 0 or unfinished + len(tokens) <= self.shard_tokens

    def append(self, tokens: np.ndarray):
        self.buffer.append(tokens)
        self.buffered += len(tokens)
        self.progress["documents"] += 1
        self.progress["tokens"] += len(tokens)
        self.progress["unfinished"] += len(tokens)
        if self.buffered >= BUFFER_TOKENS:
            self._write_buffer()

    def _write_buffer(self):
        if self.file is None:  # a new shard, or one that an interrupted writer took beyond its progress
            self.path.touch()
            self.file = open(self.path, "r+b")
            written = self.progress["unfinished"] - self.buffered
            self.file.truncate(HEADER_BYTES + written * self.dtype.itemsize)
            self.file.seek(0, os.SEEK_END)
        tokens = np.concatenate([np.empty(0, np.int64), *self.buffer])
        assert not len(tokens) or 0 <= tokens.min() <= tokens.max() < self.vocab_size, "not in the vocabulary"
        self.file.write(tokens.astype(self.dtype).tobytes())
        self.buffer, self.buffered = [], 0

    def sync(self):
        """Bring all that was appended to the disk."""
        if self.progress["unfinished"]:
            self._write_buffer()
            self.file.flush()
            os.fsync(self.file.fileno())

    def finish_shard(self):
        if not self.progress["unfinished"]:
            return
        self._write_buffer()
        header = np.zeros(256, "<i4")
        header[:3] = MAGIC, self.version, self.progress["unfinished"]
        self.file.seek(0)
        self.file.write(header.tobytes())
        self.sync()
        self.file.close()
        self.file = None
        self.progress["sha256"].append(sha256_of(self.path))
        self.progress["shards"].append(self.path.name)
        self.progress["unfinished"] = 0


class DatasetWriter:
    """Writes a data set in a hidden folder, and moves it into `out_dir` when it is whole.

    With `resume` the progress is recorded after every shard. After an interruption a writer with the same
    arguments goes on: skip the first `consumed` pieces and add the others, and the result is the same.
    """

    def __init__(
        self,
        out_dir,
        name: str,
        tokenizer,
        *,
        documents: bool,
        shard_tokens: int = 100_000_000,
        prepare: dict | None = None,
        resume: bool = False,
    ):
        self.out_dir, self.tokenizer, self.documents = Path(out_dir), tokenizer, documents
        self.shard_tokens, self.resume = shard_tokens, resume
        self.meta = {
            "format": META_FORMAT,
            "name": name,
            "tokenizer": tokenizer.to_json(),
            "documents": documents,
            "separator_id": tokenizer.separator_id,
            "vocab_size": tokenizer.vocab_size,
            "prepare": prepare or {},
        }
        self.folder = self.out_dir / (".partial" if resume else f".partial-{os.getpid()}")
        self.record = self.folder / "progress.json"
        self.consumed, self.writers = 0, {}
        if self.record.exists():
            self._go_on(json.loads(self.record.read_text(encoding="utf-8")))

    def _go_on(self, record: dict):
        if record["meta"] != self.meta:
            raise ValueError(
                f"{self.folder} holds an unfinished data set of other settings: finish it with "
                f"those, or delete the folder"
            )
        self.consumed = record["consumed"]
        self.writers = {split: self._writer(split, progress) for split, progress in record["splits"].items()}

    def _writer(self, split: str, progress: dict | None = None) -> ShardWriter:
        self.folder.mkdir(parents=True, exist_ok=True)
        return ShardWriter(self.folder, split, self.tokenizer.vocab_size, self.shard_tokens, progress)

    def _save_progress(self):
        for writer in self.writers.values():
            writer.sync()
        splits = {split: writer.progress for split, writer in self.writers.items()}
        write_json({"consumed": self.consumed, "splits": splits, "meta": self.meta}, self.record)

    def add(self, split: str, piece):
        """Append a text or an array of ids: a document without its separator, or a stretch of the stream."""
        tokens = self.tokenizer.encode_array(piece) if isinstance(piece, str) else np.asarray(piece)
        if self.documents:
            if len(tokens) == 0 or (tokens == self.tokenizer.separator_id).any():
                raise ValueError(f"a document is empty or holds the separator: {piece!r}")
            tokens = np.append(tokens, self.tokenizer.separator_id)
        if split not in self.writers:
            self.writers[split] = self._writer(split)
        writer = self.writers[split]
        if not writer.fits(tokens):
            writer.finish_shard()
            if self.resume:
                self._save_progress()
        writer.append(tokens)
        self.consumed += 1

    def finish(self, splits=("train", "val")) -> dict:
        """Move the data set to its place; -> its meta"""
        for split in splits:
            if split not in self.writers:
                raise ValueError(f"no text is left for the {split} split: more is needed")
            self.writers[split].finish_shard()
        if self.resume:
            self._save_progress()
        self.meta["splits"] = {split: dict(self.writers[split].progress) for split in splits}
        for info in self.meta["splits"].values():
            del info["unfinished"]
        shards = [name for info in self.meta["splits"].values() for name in info["shards"]]
        (self.out_dir / "meta.json").unlink(missing_ok=True)  # from here to write_json there is no data set
        for old in self.out_dir.glob("*_" + "[0-9]" * 6 + ".bin"):
            if old.name not in shards:
                old.unlink()
        for name in shards:
            if (self.folder / name).exists():  # not moved before an interruption
                os.replace(self.folder / name, self.out_dir / name)
        write_json(self.meta, self.out_dir / "meta.json")
        self.discard()
        return self.meta

    def discard(self):
        """Remove what is not finished."""
        if self.folder.exists():
            shutil.rmtree(self.folder)
            if not any(self.out_dir.iterdir()):
                self.out_dir.rmdir()


def write_dataset(
    out_dir,
    name: str,
    tokenizer,
    splits: dict,
    documents: bool,
    shard_tokens: int = 100_000_000,
    prepare: dict | None = None,
) -> dict:
    """Write a data set from {"train": texts or arrays of token ids, ...}; -> its meta

    With `documents` each of them is a document, and the separator is put behind it; otherwise they are pieces
    of a stream, written as they are. A data set that was in `out_dir` stays until the new one is whole.
    """
    writer = DatasetWriter(
        out_dir, name, tokenizer, documents=documents, shard_tokens=shard_tokens, prepare=prepare
    )
    try:
        for split, pieces in splits.items():
            for piece in pieces:
                writer.add(split, piece)
        return writer.finish(splits)
    except BaseException:
        writer.discard()
        raise


def summary(meta: dict) -> str:
    """The sizes of the splits, for people."""
    documents = " in {documents:,} documents" if meta["documents"] else ""
    return ", ".join(
        f"{split} {{tokens:,}} tokens{documents}".format(**info) for split, info in meta["splits"].items()
    )


def write_json(value, path: Path):
    """Atomic: whoever reads finds the old file or the new one."""
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "w", encoding="utf-8") as file:
        json.dump(value, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def sha256_of(path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
