"""How fast a model trains and writes, what it needs, and what the DAG costs.

    python bench.py                                          # the default model, with the DAG and without
    python bench.py config/train_gpt2.py --vocab_size=50257 --batch_size=4 --decode_tokens=0
    python bench.py --dtype=float32 --compile=false --json   # one JSON object as the last line

Takes every setting of train.py and its own below. The data are random tokens. A step is what train.py does
for one micro-batch: forward, backward, clipping, AdamW. The model with the DAG and the plain GPT take turns,
a few steps at a time, so that whatever else the machine does slows both; medians are over turns.

FLOPs are 6 N + 12 L C T a token (PaLM, 2204.02311, appendix B); MFU is their share of the device's peak.
"""

import json
import re
import resource
import statistics
import sys
import time
from dataclasses import dataclass
from typing import Callable

import torch
from rich.console import Console
from rich.table import Table

import engine
import runtime
from configurator import TrainConfig, load, pick, run_script, setting, to_dict
from dag_model import GPT, GPTConfig
from optim import make_optimizer

STEPS_PER_TURN = 5  # long enough to bring a model's weights back into the caches

# dense bf16 FLOP/s of NVIDIA's data sheets, SXM where there are several
PEAK_FLOPS = {"A10": 125e12, "A100": 312e12, "H100": 989e12, "H200": 989e12}


@dataclass(frozen=True)
class BenchConfig(TrainConfig):
    steps: int = setting(100, "timed steps a model", minimum=1, section="bench")
    warmup: int = setting(10, "steps before the clock runs", minimum=1)
    vocab_size: int = setting(65, "tokens in the vocabulary", minimum=1)
    decode_tokens: int = setting(512, "tokens written with and without the cache; 0 skips that", minimum=0)
    json: bool = setting(False, "print the results as a JSON object too, as the last line")


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


def make_step(
    model: GPT, config: BenchConfig, device: torch.device, dtype: torch.dtype
) -> Callable[[], None]:
    """A function that trains `model` for one step."""
    betas = (config.beta1, config.beta2)
    optimizer = make_optimizer(model, config.learning_rate, betas, config.weight_decay)
    tokens = torch.randint(config.vocab_size, (config.batch_size, config.block_size + 1), device=device)

    def backward(network) -> None:
        with runtime.autocast(device, dtype):
            _, loss = network(tokens[:, :-1], tokens[:, 1:])
        loss.backward()

    network = runtime.compile_model(model, config.compile, device, backward)

    def step() -> None:
        backward(network)
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip or torch.inf)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def decode_speed(config: BenchConfig, dag_depth: int, device: torch.device) -> dict[str, float]:
    """Tokens/s of greedy decoding from one token, in float32 as sample.py has it by default.

    The context is lengthened where need be, so that no window has to move.
    """
    block_size = max(config.block_size, config.decode_tokens + 1)
    shape = pick(config, GPTConfig, block_size=block_size, dag_depth=dag_depth)
    model = GPT(shape).to(device).eval()
    speeds = {}
    for name, cached in (("decode_tokens_per_second", True), ("decode_uncached_tokens_per_second", False)):

        def write(count: int) -> None:
            engine.generate(model, [[0]], count, temperature=0, cached=cached)

        write(min(8, config.decode_tokens))  # warm
        speeds[name] = config.decode_tokens / seconds_of(lambda: write(config.decode_tokens), device)
    return speeds


def process_memory() -> int:
    """Bytes, the most that this process ever held in RAM."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def warmed_up(config: BenchConfig, dag_depth: int, device: torch.device, dtype: torch.dtype):
    """A model, its step function, and a dict of what is known of it by now."""
    held = 0
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        held = torch.cuda.memory_allocated(device)  # by the model before
    torch.manual_seed(config.seed)
    model = GPT(pick(config, GPTConfig, dag_depth=dag_depth)).to(device)
    step = make_step(model, config, device, dtype)
    for _ in range(config.warmup):
        step()
    facts = {"parameters": model.num_parameters()}
    if device.type == "cuda":
        facts["gpu_memory_bytes"] = torch.cuda.max_memory_allocated(device) - held
    return model, step, facts


def measure(config: BenchConfig, device: torch.device, dtype: torch.dtype) -> dict:
    """All results, JSON-safe. "models" has "dag" and "plain", or "plain" alone where dag_depth is 0."""
    peak, source = peak_flops(device, dtype)
    depths = {"dag": config.dag_depth, "plain": 0} if config.dag_depth else {"plain": 0}
    models, steps, results = {}, {}, {}
    for name, depth in depths.items():
        models[name], steps[name], results[name] = warmed_up(config, depth, device, dtype)

    tokens = config.batch_size * config.block_size
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
    memory = process_memory()  # before decoding, which has a longer context
    if config.decode_tokens:
        for name, depth in depths.items():
            results[name] |= decode_speed(config, depth, device)
    return {
        "hardware": runtime.describe(device, dtype, runtime.Processes()),
        "peak_flops": peak,
        "peak_flops_source": source,
        "process_memory_bytes": memory,
        "models": results,
        "dag_overhead": results["dag"]["step_ms"] / results["plain"]["step_ms"] if "dag" in results else None,
    }


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
    console.print(f"{result['hardware']}, batch {config.batch_size} x {config.block_size} tokens")
    console.print(f"peak {result['peak_flops'] / 1e12:.3g} TFLOP/s ({result['peak_flops_source']})")
    console.print(f"process memory {result['process_memory_bytes'] / 2**20:,.0f} MiB at most, all models")
    titles = {"dag": f"DAG, depth {config.dag_depth}", "plain": "plain GPT"}
    table = Table("", *(titles[name] for name in result["models"]))
    for key, (label, written) in ROWS.items():
        numbers = [model[key] for model in result["models"].values() if key in model]
        if numbers:
            table.add_row(label, *map(written, numbers))
    console.print(table)
    if result["dag_overhead"]:
        console.print(f"a step with the DAG takes {result['dag_overhead']:.2f} times as long as one without")


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
