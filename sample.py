"""Generate text with a trained model and look at it.

    python sample.py --out_dir=out/train_default-001 --start="12+7*3="
    python sample.py --out_dir=out/train_default-001 --start=FILE:prompt.txt --num_samples=5 --temperature=0.8
    python sample.py --init_from=gpt2 --start="The answer is" --top_k=200   # pretrained; needs `transformers`

The first sample appears as it is written; the others are written beside it, as one batch, and follow.
The settings are those of nanoGPT's sample.py (https://github.com/karpathy/nanoGPT) where both have them.
"""

import codecs
from dataclasses import dataclass
from pathlib import Path

import torch

import checkpoint
import runtime
import tokenizer as tokenizers
from configurator import load, run_script, setting
from dag_model import GPT
from engine import check, generate

FILE = "FILE:"


@dataclass(frozen=True)
class SampleConfig:
    out_dir: str = setting("", "run folder to sample from", section="model")
    checkpoint: str = setting("best", "which of its checkpoints", choices=("best", "last"))
    init_from: str = setting(
        "resume",
        "resume is the run in out_dir",
        choices=("resume", "gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl"),
    )
    start: str = setting(
        "",
        "prompt, or FILE:prompt.txt, of which a final newline is left out; empty begins a document",
        section="text",
    )
    num_samples: int = setting(1, "samples, written as one batch", minimum=1)
    max_new_tokens: int = setting(200, "tokens per sample at most", minimum=1)
    stop: str | None = setting(
        None,
        "text that ends a sample and is not shown; empty is nothing, none is "
        "the end of the document where the model was trained on documents",
    )
    temperature: float = setting(
        0.8, "0 is greedy, 1 is the model's own distribution", minimum=0, section="sampling"
    )
    top_k: int | None = setting(None, "choose among the k most likely tokens", minimum=1)
    top_p: float | None = setting(None, "choose among the fewest tokens with this probability together")
    seed: int | None = setting(
        1337, "of the first sample, the next has seed + 1; none is new every time", minimum=0
    )
    device: str = setting("auto", "auto, cpu, cuda, cuda:N or mps", section="system")
    dtype: str = setting("float32", "of matrix products", choices=("float32", "bfloat16"))

    def check(self) -> None:
        if self.init_from == "resume" and not self.out_dir:
            raise ValueError("which run? give its folder as --out_dir=RUN")


class Sample:
    """The text of one row, decoded as its tokens come."""

    def __init__(self, tokenizer: tokenizers.Tokenizer, stop: str):
        self.tokenizer, self.stop = tokenizer, stop
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")  # holds incomplete characters back
        self.text = ""
        self.shown = 0  # characters

    def add(self, token: int) -> bool:
        """True where the text has come to the stop, which is then cut off."""
        self.text += self.decoder.decode(self.tokenizer.token_bytes(token))
        if not self.stop or self.stop not in self.text:
            return False
        self.text = self.text[: self.text.index(self.stop)]
        return True

    def show(self, final: bool = False) -> None:
        """Print what is new; until the end, nothing that may turn out to be the beginning of the stop."""
        held = 0
        if final:
            self.text += self.decoder.decode(b"", final=True)
        else:
            held = max((n for n in range(len(self.stop)) if self.text.endswith(self.stop[:n])), default=0)
        new = self.text[self.shown : len(self.text) - held]
        print(new, end="\n" if final else "", flush=True)
        self.shown += len(new)


def read_start(start: str) -> str:
    if not start.startswith(FILE):
        return start
    path = Path(start.removeprefix(FILE))
    try:
        return path.read_text(encoding="utf-8-sig").removesuffix("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text (byte {error.start}): save it as UTF-8") from None


def load_source(config: SampleConfig, device: torch.device) -> tuple[GPT, tokenizers.Tokenizer, str]:
    """The model, its tokenizer, and what ends a document: nothing for a model of one long text."""
    if config.init_from != "resume":
        tokenizer = tokenizers.build("gpt2", "")
        model = GPT.from_huggingface(config.init_from, dag_depth=0).to(device).eval()
        return model, tokenizer, tokenizer.separator
    model, tokenizer, saved = checkpoint.load_model(config.out_dir, config.checkpoint, device)
    return model, tokenizer, tokenizer.separator if saved.loader["documents"] else ""


def main() -> None:
    config = load(SampleConfig)
    start = read_start(config.start)
    device = runtime.resolve_device(config.device)
    model, tokenizer, separator = load_source(config, device)
    prompt = tokenizer.encode(start) or [tokenizer.separator_id]
    stop = separator if config.stop is None else config.stop
    samples = [Sample(tokenizer, stop) for _ in range(config.num_samples)]

    def on_token(row: int, token: int) -> bool:
        ended = samples[row].add(token)
        if row == 0:
            samples[row].show()
        return ended

    sampling = dict(temperature=config.temperature, top_k=config.top_k, top_p=config.top_p)
    check([prompt], model.config.block_size, config.max_new_tokens, **sampling)  # before anything is shown
    print(start, end="", flush=True)
    with runtime.autocast(device, runtime.resolve_dtype(config.dtype, device)):
        generate(
            model,
            [prompt] * config.num_samples,
            config.max_new_tokens,
            seed=config.seed,
            on_token=on_token,
            **sampling,
        )
    samples[0].show(final=True)
    for sample in samples[1:]:
        print("-" * 20)
        print(start, end="")
        sample.show(final=True)


if __name__ == "__main__":
    run_script(main)
