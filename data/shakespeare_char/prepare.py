"""Tiny Shakespeare, a character a token: 1,003,854 for training and the last tenth, 111,540, for validation.

    python data/shakespeare_char/prepare.py                      # downloads 1.1 MB
    python data/shakespeare_char/prepare.py --input=input.txt    # or takes a copy, where there is no network

The text and the split are those of https://github.com/karpathy/nanoGPT (data/shakespeare_char).
"""

import hashlib
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import requests

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from configurator import load, run_script, setting  # noqa: E402
from data.loader import summary, write_dataset  # noqa: E402
from data.tokenizer import build  # noqa: E402

URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"


@dataclass(frozen=True)
class Settings:
    out_dir: str = setting(str(Path(__file__).parent), "where the data set is written")
    input: str = setting("", "a copy of the text; empty downloads it")
    url: str = setting(URL, "where it is downloaded from")
    attempts: int = setting(4, "to download it", minimum=1)
    backoff: float = setting(1.0, "seconds before the second attempt, doubled for the next", minimum=0)


def download(settings: Settings) -> bytes:
    for attempt in range(settings.attempts):  # urllib3's Retry would not repeat a download that breaks off
        if attempt:
            time.sleep(settings.backoff * 2 ** (attempt - 1))
        try:
            response = requests.get(settings.url, timeout=30)
            response.raise_for_status()
            return response.content
        except requests.RequestException as error:
            failure = error
    raise OSError(
        f"no download from {settings.url} ({failure}): get the file elsewhere and give it as --input=FILE"
    ) from failure


def prepare(settings: Settings) -> dict:
    source = settings.input or settings.url
    content = Path(settings.input).read_bytes() if settings.input else download(settings)
    if hashlib.sha256(content).hexdigest() != SHA256:
        raise ValueError(
            f"{source} is not tiny Shakespeare, its sha256 is not {SHA256}: get another copy, "
            f"or prepare a text of your own with data/custom/prepare.py"
        )
    text = content.decode("ascii")
    cut = int(0.9 * len(text))
    return write_dataset(
        settings.out_dir,
        "shakespeare_char",
        build("char", text),
        {"train": [text[:cut]], "val": [text[cut:]]},
        documents=False,
    )


def main():
    settings = load(Settings)
    print(f"{settings.out_dir}: {summary(prepare(settings))}")


if __name__ == "__main__":
    run_script(main)
