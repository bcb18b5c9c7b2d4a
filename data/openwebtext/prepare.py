"""OpenWebText, the open copy of GPT-2's training text: 8 million documents, about 9 billion tokens, 18 GB.

    pip install datasets
    python data/openwebtext/prepare.py              # hours; if it is interrupted, the same command goes on
    python data/openwebtext/prepare.py --source=json:FILE --out_dir=data/mine    # {"text": ...} on each line

Documents are streamed, so the disk needs room for the shards alone, and become one stream in the order of
the source, <|endoftext|> behind each. Progress is on disk after each shard; going on from there gives the
same result as a run without interruption.

Source: https://huggingface.co/datasets/Skylion007/openwebtext
"""

import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from configurator import load, run_script, setting  # noqa: E402
from data.loader import DatasetWriter, summary  # noqa: E402
from data.tokenizer import build  # noqa: E402

DOCUMENTS_AT_ONCE = 1024  # encoded side by side


@dataclass(frozen=True)
class Settings:
    out_dir: str = setting(str(Path(__file__).parent), "where the data set is written")
    source: str = setting(
        "Skylion007/openwebtext",
        "a data set on the Hugging Face hub with a column text; "
        "or json:FILE, parquet:FILE or text:FILE (a document a line)",
    )
    tokenizer: str = setting("gpt2", "byte is for trials", choices=("gpt2", "byte"))
    val_every: int = setting(2000, "each document whose number is a multiple of this goes to val", minimum=2)
    shard_tokens: int = setting(100_000_000, "tokens in a shard", minimum=1)
    num_threads: int = setting(8, "for encoding", minimum=1)


def stream_documents(source: str, start: int) -> Iterator[str]:
    """The texts of the source from document `start` on."""
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise ImportError("openwebtext is read with the package datasets: pip install datasets") from error
    kind, _, file = source.partition(":")
    if file and not Path(file).exists():
        raise FileNotFoundError(f"{file} does not exist: give --source=json:FILE, parquet:FILE or text:FILE")
    try:
        data = load_dataset(kind, data_files=file or None, split="train", streaming=True)
        for row in data.skip(start):
            yield row["text"]
    except (RuntimeError, KeyError) as error:  # what datasets raises for sources it cannot read
        raise ValueError(
            f"{source} cannot be read ({error!r}): give a --source with a split `train` and a column `text`"
        ) from error


def prepare(settings: Settings) -> dict:
    tokenizer = build(settings.tokenizer, "")
    origin = {key: getattr(settings, key) for key in ("source", "val_every", "shard_tokens")}
    writer = DatasetWriter(
        settings.out_dir,
        "openwebtext",
        tokenizer,
        documents=False,
        shard_tokens=settings.shard_tokens,
        prepare=origin,
        resume=True,
    )
    if writer.consumed:
        print(f"continuing after {writer.consumed:,} documents")
    documents = stream_documents(settings.source, writer.consumed)
    with ThreadPoolExecutor(settings.num_threads) as threads:  # tiktoken encodes outside of Python's lock
        while batch := list(islice(documents, DOCUMENTS_AT_ONCE)):
            for ids in threads.map(tokenizer.encode_array, batch):
                split = "train" if writer.consumed % settings.val_every else "val"
                writer.add(split, np.append(ids, tokenizer.separator_id))
    return writer.finish()


def main():
    settings = load(Settings)
    print(f"{settings.out_dir}: {summary(prepare(settings))}")


if __name__ == "__main__":
    run_script(main)
