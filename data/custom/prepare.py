"""Your own text as a data set, data/<name>/.

    python data/custom/prepare.py --name=mine --input=train.txt                        # characters, a stream
    python data/custom/prepare.py --name=mine --input=train.txt --val=val.txt --tokenizer=bpe --vocab_size=999
    python data/custom/prepare.py --name=mine --input=problems.txt --documents=lines   # each line by itself
    python train.py --dataset=mine

Without --val a tenth is kept for validation: the end of a stream, or lines chosen by their hash, so that
equal lines are on the same side. The text is UTF-8; CRLF becomes a newline, and blank lines are no documents.
"""

import hashlib
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from configurator import load, run_script, setting  # noqa: E402
from data.loader import read_meta, sha256_of, summary, write_dataset  # noqa: E402
from data.tokenizer import build  # noqa: E402

DATA_DIR = Path(__file__).resolve().parents[1]
PIECE_CHARS = 1 << 20  # a stream is encoded in pieces of about this length


@dataclass(frozen=True)
class Settings:
    input: str = setting("", "the text file")
    val: str = setting("", "a text file for validation; empty takes a tenth of the input")
    name: str = setting("", "of the data set, as in train.py --dataset=NAME")
    tokenizer: str = setting("char", "how text becomes tokens", choices=("char", "byte", "gpt2", "bpe"))
    vocab_size: int | None = setting(None, "of a bpe tokenizer, which is trained on the input", minimum=257)
    documents: str = setting(
        "stream", "one stream, or every line a document that is never cut", choices=("lines", "stream")
    )
    out_dir: str = setting("", "where the data set is written; empty is data/<name>")
    overwrite: bool = setting(False, "replace a data set that was prepared from something else")

    def check(self):
        if not self.input or not self.name:
            raise ValueError("both are needed: --input=FILE --name=NAME")
        if not re.fullmatch(r"\w[\w.-]*", self.name):
            raise ValueError(f"name={self.name!r}: write it with letters, digits, '_', '-' and '.' alone")
        if (DATA_DIR / self.name / "prepare.py").exists():
            raise ValueError(f"name={self.name!r} belongs to data/{self.name}/prepare.py: choose another")


def read_text(path: str) -> str:
    content = Path(path).read_bytes()
    try:
        text = content.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 at byte {error.start}: convert it, e.g. with iconv") from error
    if not text.strip():
        raise ValueError(f"{path} has no text in it")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def pieces(text: str) -> Iterator[str]:
    """The text cut after line ends into pieces of some PIECE_CHARS."""
    start = 0
    while start < len(text):
        end = text.find("\n", start + PIECE_CHARS) + 1 or len(text)
        yield text[start:end]
        start = end


def is_val(line: str) -> bool:
    return hashlib.sha256(line.encode()).digest()[0] < 26  # of 256


def split_text(settings: Settings) -> dict[str, list[str]]:
    """-> the documents or pieces of train and val"""
    texts = [read_text(path) for path in (settings.input, settings.val) if path]
    if settings.documents == "lines":
        lines = [[line for line in text.split("\n") if line.strip()] for text in texts]
        train, val = (
            lines
            if settings.val
            else (
                [line for line in lines[0] if not is_val(line)],
                [line for line in lines[0] if is_val(line)],
            )
        )
    else:
        cut = int(0.9 * len(texts[0]))
        train, val = map(list, map(pieces, texts if settings.val else (texts[0][:cut], texts[0][cut:])))
    return {"train": train, "val": val}


def refuse_to_overwrite(out_dir: Path, origin: dict):
    if (out_dir / "meta.json").exists() and read_meta(out_dir)["prepare"] != origin:
        raise ValueError(
            f"{out_dir} holds a data set prepared from something else: choose another --name, "
            f"or say --overwrite=True"
        )


def prepare(settings: Settings) -> dict:
    out_dir = Path(settings.out_dir or DATA_DIR / settings.name)
    splits = split_text(settings)
    origin = {key: getattr(settings, key) for key in ("tokenizer", "vocab_size", "documents")}
    origin |= {key: sha256_of(path) for key in ("input", "val") if (path := getattr(settings, key))}
    if not settings.overwrite:
        refuse_to_overwrite(out_dir, origin)
    # characters that only val has are in the vocabulary too; what bpe joins is learned from train alone
    known = splits.values() if settings.tokenizer == "char" else [splits["train"]]
    tokenizer = build(settings.tokenizer, (text for texts in known for text in texts), settings.vocab_size)
    return write_dataset(
        out_dir, settings.name, tokenizer, splits, documents=settings.documents == "lines", prepare=origin
    )


def main():
    settings = load(Settings)
    print(f"{settings.name}: {summary(prepare(settings))}")
    print(f"next: python train.py --dataset={settings.name}")


if __name__ == "__main__":
    run_script(main)
