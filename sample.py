"""Generate text with a trained model and look at it.

    python sample.py --out_dir=out/train_default-001 --start="12+7*3="
    python sample.py --out_dir=out/train_default-001 --start=FILE:prompt.txt --num_samples=5 --temperature=0.8
    python sample.py --out_dir=out/train_default-001 --interactive=true --show_dag=true
    python sample.py --out_dir=out/train_default-001 --start="9*8+2=" --colorize_output=gate --dag_png=dag.png
    python sample.py --init_from=gpt2 --start="The answer is" --top_k=200   # pretrained; needs `transformers`

The first sample appears as it is written; the others are written beside it, as one batch, and follow.
--show_dag tells of every number that was written:

    12+7*3=33
        33: 12 + (7 * 3 = 21) = 33
            gate 1.00, plan probability 1.00
            next best plan: 12 * (7 + 3 = 10) = 120, probability 7e-08

- probabilities are the model's own, at temperature 1, whatever the text was sampled with
- coloured text appears when it is complete; NO_COLOR, FORCE_COLOR and what is no terminal are respected, and
  the text is the same with colours and without
- pictures beyond the first, of more samples, prompts or pages, are called dag-2.png, dag-3.png, ...

The settings are those of nanoGPT's sample.py (https://github.com/karpathy/nanoGPT) where both have them.
"""

import codecs
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.segment import Segment, Segments
from rich.style import Style

from configurator import load, one_line, run_script, setting
from dag_model import GPT
from data import tokenizer as tokenizers
from inference.engine import check, generate
from inference.explain import Thought, Unplanned, explain
from inference.token_stats import MODES, Choice, Mode, choices, has_gate, legend
from plots import plan_figures
from training import checkpoint
from training import device as runtime

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
        1337,
        "of the first sample, the next has seed + 1; none is new every time",
        minimum=0,
        below=1 << 62,
    )
    show_dag: bool = setting(False, "explain the plan of every number that is written", section="looking")
    dag_png: str = setting("", "picture of these plans, a name that ends in .png")
    colorize_output: str = setting(
        "none",
        "colour tokens by how sure the model was of them; true is probability",
        choices=("none", "true", *MODES),
    )
    show_heatmaps: bool = setting(False, "draw the likeliest tokens of every step, to heatmap_png")
    heatmap_png: str = setting("heatmap.png", "name of that picture")
    interactive: bool = setting(False, "ask for prompts, one after another, until one is empty")
    device: str = setting("auto", "auto, cpu, cuda, cuda:N or mps", section="system")
    dtype: str = setting("float32", "of matrix products", choices=("float32", "bfloat16"))

    def check(self) -> None:
        if self.init_from == "resume" and not self.out_dir:
            raise ValueError("which run? give its folder as --out_dir=RUN")
        if self.interactive and self.start:
            raise ValueError("interactive asks for prompts: leave out --start, or --interactive")
        for name in ("dag_png", "heatmap_png"):
            path = getattr(self, name)
            if path and Path(path).suffix != ".png":
                raise ValueError(f"{name}={path}: expected a name that ends in .png")

    @property
    def mode(self) -> str:
        """What to colour by, a key of MODES or none."""
        return "probability" if self.colorize_output == "true" else self.colorize_output


class Sample:
    """The text of one row, decoded as its tokens come."""

    def __init__(self, tokenizer: tokenizers.Tokenizer, stop: str):
        self.tokenizer, self.stop = tokenizer, stop
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")  # holds incomplete characters back
        self.text = ""
        self.shown = 0  # characters
        self.tokens, self.ends = [], []  # those of the stop too; how many characters there were after each

    def add(self, token: int) -> bool:
        """True where the text has come to the stop, which is then cut off."""
        self.text += self.decoder.decode(self.tokenizer.token_bytes(token))
        self.tokens.append(token)
        self.ends.append(len(self.text))
        if not self.stop or self.stop not in self.text:
            return False
        self.text = self.text[: self.text.index(self.stop)]
        self.decoder.reset()
        return True

    def finish(self) -> None:
        """No token follows: of a character that is not complete U+FFFD is left."""
        self.text += self.decoder.decode(b"", final=True)

    def show(self, final: bool = False) -> None:
        """Print what is new; until the end, nothing that may turn out to be the beginning of the stop."""
        held = 0
        if final:
            self.finish()
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


# ----------------------------------------------------------------------------------------------------
# Looking at what was written


def segments(sample: Sample, told: list[Choice], mode: Mode) -> Iterator[Segment]:
    """The text in colours. A character of several tokens has that of the last."""
    begin = 0
    for choice, end in zip(told, sample.ends):
        yield Segment(sample.text[begin:end], Style(color=mode.color(choice)))
        begin = end
    yield Segment(sample.text[begin:])


def explanation(number: Thought | Unplanned) -> list[str]:
    """A number that was written and why, in lines."""
    if isinstance(number, Unplanned):
        return [f"{number.text}: no plan, {number.reason}"]
    departs = "" if number.followed else ", which the text does not follow"
    format = "" if number.format == "exact" else f", in the format {number.format}"
    lines = [
        f"{number.text}: {number.expression}{format}{departs}",
        f"    gate {odds(number.gate)}, plan probability {odds(number.probability)}",
    ]
    for other in number.alternatives[:1]:
        lines.append(f"    next best plan: {other.expression}, probability {odds(other.probability)}")
    return lines


def odds(p: float) -> str:
    return f"{p:.2f}" if p >= 0.005 else f"{p:.0e}"


class Desk:
    """A model at work: writes after a prompt, and shows of it what the settings ask for."""

    def __init__(self, config: SampleConfig):
        self.config = config
        self.device = runtime.resolve_device(config.device)
        self.model, self.tokenizer, separator = load_source(config, self.device)
        self.stop = separator if config.stop is None else config.stop
        self.saved = Counter()  # pictures under each name
        check_showable(config, self.model)
        self.console = Console()
        has_colors = self.console.color_system is not None and not self.console.no_color
        self.mode = MODES.get(config.mode) if has_colors else None
        self.legend = legend(config.mode) if self.mode else iter(())  # to be told once

    def write(self, start: str) -> None:
        """Samples that begin with `start`. ValueError for a bad prompt, before anything is shown."""
        config = self.config
        prompt = self.tokenizer.encode(start) or [self.tokenizer.separator_id]
        samples = [Sample(self.tokenizer, self.stop) for _ in range(config.num_samples)]
        sampling = dict(temperature=config.temperature, top_k=config.top_k, top_p=config.top_p)
        check([prompt], self.model.config.block_size, config.max_new_tokens, **sampling)

        def on_token(row: int, token: int) -> bool:
            ended = samples[row].add(token)
            if row == 0 and self.mode is None:
                samples[row].show()
            return ended

        self.paint(self.legend)
        print(start, end="", flush=True)
        with runtime.autocast(self.device, runtime.resolve_dtype(config.dtype, self.device)):
            generate(
                self.model,
                [prompt] * config.num_samples,
                config.max_new_tokens,
                seed=config.seed,
                on_token=on_token,
                **sampling,
            )
            for n, sample in enumerate(samples):
                if n > 0:
                    print("-" * 20)
                    print(start, end="", flush=True)
                self.show(prompt, sample)

    def show(self, prompt: list[int], sample: Sample) -> None:
        """What is still missing of a finished sample on the screen, and what else was asked for."""
        config, tokens, told = self.config, prompt + sample.tokens, []
        if self.mode or config.show_heatmaps:
            told = choices(self.model, self.tokenizer, tokens, start=len(prompt))
        if self.mode:
            sample.finish()
            self.paint(segments(sample, told, self.mode))
            print(flush=True)
        else:
            sample.show(final=True)
        if config.show_dag or config.dag_png:
            self.show_plans(tokens, start=len(prompt))
        if config.show_heatmaps:
            for first in range(0, len(told), plan_figures.STEPS):
                page = told[first : first + plan_figures.STEPS]
                self.save(plan_figures.draw_heatmap(page, 1 + first), config.heatmap_png)

    def show_plans(self, tokens: list[int], start: int) -> None:
        look = explain(self.model, self.tokenizer, tokens, start)
        if self.config.show_dag:
            for number in sorted([*look.thoughts, *look.unplanned], key=lambda number: number.first):
                print(*("    " + line for line in explanation(number)), sep="\n", flush=True)
            if not (look.thoughts or look.unplanned):
                print("    no number was written", flush=True)
        if not self.config.dag_png:
            return
        if not look.thoughts:
            print("nothing was planned, no picture of it", file=sys.stderr)
        texts = [self.tokenizer.decode([token]) for token in tokens]
        for first in range(0, len(look.thoughts), plan_figures.NUMBERS):
            page = look.thoughts[first : first + plan_figures.NUMBERS]
            self.save(plan_figures.draw_dag(page, texts), self.config.dag_png)

    def save(self, figure, name: str) -> None:
        self.saved[name] += 1
        path, n = Path(name), self.saved[name]
        path = path if n == 1 else path.with_stem(f"{path.stem}-{n}")
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path)
        print(f"wrote {path}", file=sys.stderr, flush=True)

    def paint(self, text: Iterator[Segment]) -> None:
        self.console.print(Segments(text), end="", soft_wrap=True)  # characters as they are: it wraps nothing


def check_showable(config: SampleConfig, model: GPT) -> None:
    if (config.show_dag or config.dag_png) and not model.reads_numbers:
        raise ValueError(
            "show_dag and dag_png are for a DAG over the numbers of the text, which this model has not: "
            "leave them out"
        )
    if config.mode == "gate" and not has_gate(model):
        raise ValueError("colorize_output=gate: this model has no gate; choose probability or rank")
    if config.dag_png or config.show_heatmaps:
        plan_figures.require_matplotlib()


def ask(desk: Desk) -> None:
    """Prompts line by line, until one is empty or there are no more. Ctrl-C ends an answer alone."""
    sys.stdin.reconfigure(
        errors="surrogateescape"
    )  # else bytes that are not UTF-8 lose the lines around them
    cursor = ""
    if sys.stdin.isatty():
        cursor = "> "
        try:
            import readline  # noqa: F401, gives `input` line editing and a history
        except ImportError:
            pass  # Windows has none, and edits lines itself
        print("a prompt a line; Ctrl-C stops an answer, Ctrl-D or an empty line ends", file=sys.stderr)
    while True:
        try:
            line = input(cursor)
            if not line:
                return
            desk.write(read_start(line))
        except EOFError:
            print()
            return
        except KeyboardInterrupt:
            print()
        except BrokenPipeError:
            raise
        except (ValueError, OSError) as error:
            print(f"error: {one_line(error)}", file=sys.stderr, flush=True)


def main() -> None:
    config = load(SampleConfig)
    start = read_start(config.start)
    desk = Desk(config)
    if config.interactive:
        ask(desk)
    else:
        desk.write(start)


if __name__ == "__main__":
    run_script(main)
