"""How fast a model trains and writes, what it needs, and what the DAG costs.

    python bench.py                                          # the default model, with the DAG and without
    python bench.py --out_dir=out/train_default-001          # a trained one: it plans less than a fresh one
    python bench.py config/train_gpt2.py --vocab_size=50257 --batch_size=4 --decode_tokens=0
    python bench.py --dtype=float32 --compile=false --json   # one JSON object as the last line

Takes every setting of train.py and its own below. The models read the dataset, as what a DAG over numbers
does depends on the text. A step is what train.py does for one micro-batch: forward, backward, clipping,
AdamW; the batches are drawn before the clock runs. Decoding reads validation text token by token and says
after each what would come next. The model with the DAG and the plain GPT take turns, a few steps at a time,
on the same text, so that whatever else the machine does slows both. A step's time is the median over turns; a
token's is the mean, as few of them cost a plan.

FLOPs are 6 N + 12 L C T a token (PaLM, 2204.02311, appendix B); MFU is their share of the device's peak.
"""

import gc
import itertools
import json
import re
import resource
import statistics
import string
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from configurator import load, pick, run_script, setting, to_dict
from dag_model import GPT, GPTConfig
from data import loader as dataloader
from data import tokenizer as tokenizers
from gpt.kv_cache import KVCache
from inference import engine
from training import checkpoint
from training import device as runtime
from training.optim import make_optimizer
from training.train_config import TrainConfig

STEPS_PER_TURN = 5  # long enough to bring a model's weights back into the caches
TOKENS_PER_TURN = 16
PRINTABLE = string.digits + string.ascii_letters + string.punctuation + " "

# dense bf16 FLOP/s of NVIDIA's data sheets, SXM where there are several
PEAK_FLOPS = {"A10": 125e12, "A100": 312e12, "H100": 989e12, "H200": 989e12}


@dataclass(frozen=True)
class BenchConfig(TrainConfig):
    out_dir: str = setting(
        "",
        "run whose model is measured, in its shape and on its dataset; empty is a fresh model",
        section="run",
    )
    steps: int = setting(100, "timed steps a model", minimum=1, section="bench")
    warmup: int = setting(10, "steps before the clock runs", minimum=1)
    vocab_size: int = setting(
        0,
        "random tokens of so many made-up ids, for shapes whose dataset is not at hand: they hold little to "
        "compute, and the DAG costs less than on text with numbers; 0 reads the dataset",
        minimum=0,
    )
    decode_tokens: int = setting(512, "tokens read with and without the cache; 0 skips that", minimum=0)
    json: bool = setting(False, "print the results as a JSON object too, as the last line")

    def check(self) -> None:
        super().check()
        if self.out_dir and self.vocab_size:
            raise ValueError(
                "out_dir measures a model on its dataset, vocab_size on random tokens: leave out one"
            )


# ----------------------------------------------------------------------------------------------------
# What is read, and by whom

Batch = tuple[torch.Tensor, torch.Tensor]  # tokens and targets, (B, T) each


class DatasetText:
    def __init__(self, data_dir: Path):
        meta = dataloader.read_meta(data_dir)
        self.data_dir, self.title = data_dir, f"text of {data_dir}"
        self.vocabulary = tokenizers.from_json(meta["tokenizer"]).vocabulary
        self.separator_id = meta["separator_id"] if meta["documents"] else -1

    def batches(self, split: str, count: int, batch_size: int, block_size: int, seed: int) -> list[Batch]:
        sizes = dict(batch_size=batch_size, block_size=block_size)
        loader = dataloader.Loader(self.data_dir, split, seed=seed, **sizes)
        return [loader.next_batch() for _ in range(count)]


class RandomText:
    """Random tokens. Those of a large vocabulary are made up: single characters, and the others are "x"."""

    separator_id = -1

    def __init__(self, vocab_size: int):
        self.title = f"random tokens, {vocab_size} made-up ids"
        self.vocabulary = [char.encode() for char in PRINTABLE[:vocab_size]]
        self.vocabulary += [b"x"] * (vocab_size - len(self.vocabulary))

    def batches(self, split: str, count: int, batch_size: int, block_size: int, seed: int) -> list[Batch]:
        generator = torch.Generator().manual_seed(seed)
        shape = count, batch_size, block_size + 1
        rows = torch.randint(len(self.vocabulary), shape, generator=generator)
        return [(row[:, :-1], row[:, 1:]) for row in rows]


Text = DatasetText | RandomText


def fresh(shape: GPTConfig, text: Text, seed: int) -> GPT:
    torch.manual_seed(seed)
    return GPT(shape, text.vocabulary)


def text_and_models(config: BenchConfig) -> tuple[Text, dict[str, GPT]]:
    """What is read, and the models "dag" and "plain", or "plain" alone where there is no DAG."""
    if config.out_dir:
        model, _, saved = checkpoint.load_model(config.out_dir, "best")
        data_dir, dataset = saved.train_config["data_dir"], saved.train_config["dataset"]
        data_dir = dataloader.prepared(Path(data_dir), dataset)
        checkpoint.require_vocabulary(saved, dataloader.read_meta(data_dir))
        text = DatasetText(data_dir)
    else:
        if config.vocab_size:
            text = RandomText(config.vocab_size)
        else:
            text = DatasetText(dataloader.prepared(Path(config.data_dir), config.dataset))
        known = dict(vocab_size=len(text.vocabulary), separator_id=text.separator_id)
        model = fresh(pick(config, GPTConfig, **known), text, config.seed)
    if model.dag is None:
        return text, {"plain": model}
    return text, {"dag": model, "plain": fresh(replace(model.config, dag_depth=0), text, config.seed)}


# ----------------------------------------------------------------------------------------------------
# The clock


def synchronize(device: torch.device) -> None:
    """The host waits for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def seconds_of(action: Callable[[], object], device: torch.device) -> float:
    synchronize(device)
    start = time.perf_counter()
    action()
    synchronize(device)
    return time.perf_counter() - start


def peak_flops(device: torch.device, dtype: torch.dtype) -> tuple[float, str]:
    """FLOP/s that matrix products can reach on this device in this precision, and the number's source."""
    if device.type == "cuda" and dtype == torch.bfloat16:
        name = torch.cuda.get_device_name(device)  # "NVIDIA H100 80GB HBM3", "NVIDIA A100-SXM4-40GB"
        for word in re.split(r"[\s-]", name):
            if word in PEAK_FLOPS:
                return PEAK_FLOPS[word], f"{word} data sheet"
    size = 1024 if device.type == "cpu" else 8192
    a, b = torch.randn(2, size, size, device=device, dtype=dtype)
    fastest = min(seconds_of(lambda: a @ b, device) for _ in range(50))
    return 2 * size**3 / fastest, f"fastest of 50 products of {size} x {size}"


def take_turns(
    steps: dict[str, Callable[[], object]], count: int, device: torch.device, per_turn: int = STEPS_PER_TURN
) -> dict[str, list[float]]:
    """Seconds a step of every turn, for at least `count` steps of each; who goes first alternates."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    order = list(steps)
    for _ in range(-(-count // per_turn)):
        for name in order:
            turn = seconds_of(lambda: [steps[name]() for _ in range(per_turn)], device)
            seconds[name].append(turn / per_turn)
        order.reverse()
    return seconds


# ----------------------------------------------------------------------------------------------------
# What is timed


def make_step(
    model: GPT,
    batches: list[Batch],
    config: BenchConfig,
    device: torch.device,
    dtype: torch.dtype,
) -> Callable[[], None]:
    """A function that trains `model` for one step, on the next batch each time."""
    rate = 0.0 if config.out_dir else config.learning_rate  # a trained model is to stay what it is
    optimizer = make_optimizer(model, rate, (config.beta1, config.beta2), config.weight_decay)
    upcoming = iter(batches)

    def backward(network, batch) -> None:
        with runtime.autocast(device, dtype):
            _, loss = network(*batch)
        loss.backward()

    network = runtime.compile_model(model, config.compile, device, lambda m: backward(m, batches[0]))

    def step() -> None:
        backward(network, next(upcoming))
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip or torch.inf)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


@torch.inference_mode()
def reading(model: GPT, rows: list[list[int]], cached: bool) -> Iterator[int]:
    """The likeliest token after each token of the rows, read one at a time, over and over. The text goes on
    as it stands whatever the model says, so that all models do the same work.
    """
    device = model.lm_head.weight.device
    for row in itertools.cycle(rows):
        cache = KVCache(1, model.config.block_size, device)
        for t, token in enumerate(row):
            if cached:
                logits = engine.advance(model, torch.tensor([token], device=device), cache)
            else:
                logits = engine.read(model, [row[: t + 1]], None)
            yield logits.argmax(-1).item()  # the host waits for the device


def seconds_a_token(
    models: dict[str, GPT], rows: list[list[int]], cached: bool, config: BenchConfig, device: torch.device
) -> dict[str, float]:
    for count in (config.warmup, config.decode_tokens):
        steps = {name: partial(next, reading(model, rows, cached)) for name, model in models.items()}
        seconds = take_turns(steps, count, device, TOKENS_PER_TURN)
    return {name: statistics.fmean(turns) for name, turns in seconds.items()}


def decode_speeds(
    models: dict[str, GPT], text: Text, config: BenchConfig, device: torch.device
) -> dict[str, dict[str, float]]:
    """Tokens/s of reading validation text a token at a time, in float32 as sample.py has it by default.

    The context of fresh models is lengthened where need be, so that one row holds all tokens.
    """
    block_size = models["plain"].config.block_size
    if not config.out_dir:
        block_size = max(block_size, config.decode_tokens)
        shapes = {name: replace(model.config, block_size=block_size) for name, model in models.items()}
        models = {name: fresh(shape, text, config.seed).to(device) for name, shape in shapes.items()}
    models = {name: model.eval() for name, model in models.items()}
    count = -(-config.decode_tokens // block_size)
    rows = [x[0].tolist() for x, _ in text.batches("val", count, 1, block_size, config.seed)]
    speeds: dict[str, dict[str, float]] = {name: {} for name in models}
    for key, cached in (("decode_tokens_per_second", True), ("decode_uncached_tokens_per_second", False)):
        for name, seconds in seconds_a_token(models, rows, cached, config, device).items():
            speeds[name][key] = 1 / seconds
    return speeds


def process_memory() -> int:
    """Bytes, the most that this process ever held in RAM."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def warmed_up(
    model: GPT, batches: list[Batch], config: BenchConfig, device: torch.device, dtype: torch.dtype
):
    """The step function of a model, and a dict of what is known of it by now."""
    held = 0
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        held = torch.cuda.memory_allocated(device)  # by the batches and the model before
    step = make_step(model.to(device).train(), batches, config, device, dtype)
    for _ in range(config.warmup):
        step()
    facts = {"parameters": model.num_parameters()}
    if device.type == "cuda":
        facts["gpu_memory_bytes"] = torch.cuda.max_memory_allocated(device) - held
    return step, facts


def overhead(results: dict[str, dict[str, float]], speed: str) -> float | None:
    """How many times as long the model with the DAG takes; None where that was not measured."""
    if speed not in results.get("dag", {}):
        return None
    return results["plain"][speed] / results["dag"][speed]


def measure(config: BenchConfig, device: torch.device, dtype: torch.dtype) -> dict:
    """All results, JSON-safe. "models" has "dag" and "plain", or "plain" alone where there is no DAG."""
    peak, source = peak_flops(device, dtype)
    text, models = text_and_models(config)
    block_size = models["plain"].config.block_size
    count = config.warmup + config.steps + STEPS_PER_TURN - 1  # the last turn is a whole one
    batches = text.batches("train", count, config.batch_size, block_size, config.seed)
    batches = [(x.to(device), y.to(device)) for x, y in batches]
    steps, results = {}, {}
    for name, model in models.items():
        steps[name], results[name] = warmed_up(model, batches, config, device, dtype)
    gc.collect()
    gc.freeze()  # as train.py does

    tokens = config.batch_size * block_size
    for name, seconds in take_turns(steps, config.steps, device).items():
        median, flops = statistics.median(seconds), models[name].flops_per_token()
        results[name] |= {
            "step_ms": 1e3 * median,
            "step_ms_min": 1e3 * min(seconds),
            "step_ms_max": 1e3 * max(seconds),
            "tokens_per_second": tokens / median,
            "flops_per_token": flops,
            "mfu": flops * tokens / median / peak,
        }
    gc.unfreeze()  # generation does without
    memory = process_memory()  # before decoding, which has a longer context
    if config.decode_tokens:
        for name, speeds in decode_speeds(models, text, config, device).items():
            results[name] |= speeds
    return {
        "hardware": runtime.describe(device, dtype, runtime.Processes()),
        "text": text.title,
        "model_config": asdict(next(iter(models.values())).config),
        "peak_flops": peak,
        "peak_flops_source": source,
        "process_memory_bytes": memory,
        "models": results,
        "dag_overhead": overhead(results, "tokens_per_second"),
        "decode_overhead": overhead(results, "decode_tokens_per_second"),
    }


# ----------------------------------------------------------------------------------------------------
# What a person sees

# key of the results -> what it is called, and how a number of it is written
ROWS = {
    "parameters": ("parameters", lambda n: f"{n / 1e6:.2f} M"),
    "step_ms": ("step, median", lambda ms: f"{ms:.2f} ms"),
    "step_ms_min": ("  fastest turn", lambda ms: f"{ms:.2f} ms"),
    "step_ms_max": ("  slowest turn", lambda ms: f"{ms:.2f} ms"),
    "tokens_per_second": ("training tokens/s", lambda n: f"{n:,.0f}"),
    "flops_per_token": ("FLOPs a token", lambda n: f"{n / 1e6:.2f} M"),
    "mfu": ("MFU", lambda share: f"{share:.1%}"),
    "gpu_memory_bytes": ("peak GPU memory", lambda n: f"{n / 2**20:,.0f} MiB"),
    "decode_tokens_per_second": ("decoding tokens/s, cached", lambda n: f"{n:,.0f}"),
    "decode_uncached_tokens_per_second": ("decoding tokens/s, uncached", lambda n: f"{n:,.0f}"),
}


def show(result: dict, config: BenchConfig) -> None:
    console = Console(highlight=False)
    shape = result["model_config"]
    size = f"batch {config.batch_size} x {shape['block_size']}"
    console.print(f"{result['hardware']}, {size}, {result['text']}", soft_wrap=True)
    console.print(f"peak {result['peak_flops'] / 1e12:.3g} TFLOP/s ({result['peak_flops_source']})")
    console.print(f"process memory {result['process_memory_bytes'] / 2**20:,.0f} MiB at most, all models")
    titles = {"dag": f"DAG, depth {shape['dag_depth']}", "plain": "plain GPT"}
    table = Table("", *(titles[name] for name in result["models"]))
    for key, (label, written) in ROWS.items():
        numbers = [model[key] for model in result["models"].values() if key in model]
        if numbers:
            table.add_row(label, *map(written, numbers))
    console.print(table)
    for what, key in (("step", "dag_overhead"), ("cached token", "decode_overhead")):
        if result[key]:
            console.print(f"a {what} with the DAG takes {result[key]:.2f} times as long as one without")


def main() -> None:
    config = load(BenchConfig, ["--json=true" if a == "--json" else a for a in sys.argv[1:]])
    if config.num_threads:
        torch.set_num_threads(config.num_threads)
    torch.backends.cuda.matmul.allow_tf32 = True  # as train.py
    device = runtime.resolve_device(config.device)
    dtype = runtime.resolve_dtype(config.dtype, device)
    result = measure(config, device, dtype)
    show(result, config)
    if config.json:
        print(json.dumps(result | {"config": to_dict(config)}))


if __name__ == "__main__":
    run_script(main)
