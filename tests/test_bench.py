"""The clock and the turns with a fake clock, the arithmetic of the results, and the command itself."""

import copy
import json
import statistics

import pytest
import torch

import bench
from bench import BenchConfig
from dag_model import GPT, GPTConfig
from optim import make_optimizer

SHAPE = dict(block_size=8, n_layer=1, n_head=2, n_embd=16, dag_depth=2, vocab_size=11)
TINY = dict(SHAPE, batch_size=2, steps=2, warmup=1)
CPU = torch.device("cpu")


class Clock:
    """Stands in for the time module: only `work` lets time pass."""

    def __init__(self):
        self.now, self.log = 0.0, []

    def perf_counter(self) -> float:
        return self.now

    def work(self, name: str, seconds: float):
        def step():
            self.log.append(name)
            self.now += seconds * (1 + self.now / 100)  # the machine slows down all the while

        return step


def test_models_take_turns_so_that_drift_hits_both(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(bench, "time", clock)
    steps = {"dag": clock.work("dag", 0.3), "plain": clock.work("plain", 0.2)}
    seconds = bench.take_turns(steps, count=40, device=CPU, per_turn=2)
    assert clock.log[:8] == ["dag"] * 2 + ["plain"] * 4 + ["dag"] * 2
    assert clock.log.count("dag") == clock.log.count("plain") == 40
    assert seconds["dag"][0] == pytest.approx(0.3, rel=0.01)  # a step, not a turn
    assert max(seconds["dag"]) > 1.2 * min(seconds["dag"])
    ratio = statistics.median(seconds["dag"]) / statistics.median(seconds["plain"])
    assert ratio == pytest.approx(1.5, rel=0.01)


def test_at_least_as_many_steps_as_asked_for():
    calls = []
    seconds = bench.take_turns({"plain": lambda: calls.append(1)}, count=7, device=CPU, per_turn=5)
    assert len(calls) == 10 and len(seconds["plain"]) == 2


@pytest.mark.parametrize(
    "name, flops",
    [
        ("NVIDIA A10", 125e12),
        ("NVIDIA A100-SXM4-40GB", 312e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H200", 989e12),
    ],
)
def test_peak_of_known_gpus(monkeypatch, name, flops):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert bench.peak_flops(torch.device("cuda"), torch.bfloat16)[0] == flops


def test_peak_is_measured_elsewhere(monkeypatch):
    durations = iter([0.5] * 49 + [0.25])
    monkeypatch.setattr(bench, "seconds_of", lambda action, device: (action(), next(durations))[1])
    assert bench.peak_flops(CPU, torch.float32)[0] == 2 * 1024**3 / 0.25


def test_a_step_is_a_training_step(monkeypatch):
    config = BenchConfig(**TINY, grad_clip=0.01, weight_decay=0.5)
    model = GPT(GPTConfig(**SHAPE))
    ours, theirs = copy.deepcopy(model), copy.deepcopy(model)
    tokens = torch.randint(11, (2, 9))
    monkeypatch.setattr(torch, "randint", lambda *args, **kwargs: tokens)
    step = bench.make_step(ours, config, CPU, torch.float32)
    step(), step()

    optimizer = make_optimizer(theirs, 1e-3, (0.9, 0.99), 0.5)
    for _ in range(2):
        optimizer.zero_grad()
        theirs(tokens[:, :-1], tokens[:, 1:])[1].backward()
        torch.nn.utils.clip_grad_norm_(theirs.parameters(), 0.01)
        optimizer.step()
    for (name, a), b, start in zip(ours.named_parameters(), theirs.parameters(), model.parameters()):
        assert torch.equal(a, b), name
    assert not torch.equal(ours.lm_head.weight, model.lm_head.weight)


def test_results_fit_together(monkeypatch):
    monkeypatch.setattr(bench, "peak_flops", lambda device, dtype: (1e9, "pretended"))
    result = bench.measure(BenchConfig(**TINY, decode_tokens=0), CPU, torch.float32)
    json.dumps(result, allow_nan=False)
    assert list(result["models"]) == ["dag", "plain"]
    for name, depth in (("dag", 2), ("plain", 0)):
        row = result["models"][name]
        model = GPT(GPTConfig(**SHAPE | dict(dag_depth=depth)))
        assert row["parameters"] == model.num_parameters()
        assert row["flops_per_token"] == model.flops_per_token()
        assert row["tokens_per_second"] * row["step_ms"] / 1e3 == pytest.approx(2 * 8)
        assert row["mfu"] == pytest.approx(row["tokens_per_second"] * row["flops_per_token"] / 1e9)
        assert 0 < row["step_ms_min"] <= row["step_ms"] <= row["step_ms_max"]
    times = [row["step_ms"] for row in result["models"].values()]
    assert result["dag_overhead"] == pytest.approx(times[0] / times[1])
    assert 50 * 2**20 < result["process_memory_bytes"] < 64 * 2**30  # PyTorch alone is more than that


def test_a_plain_gpt_has_one_column():
    result = bench.measure(BenchConfig(**TINY | dict(dag_depth=0), decode_tokens=0), CPU, torch.float32)
    assert list(result["models"]) == ["plain"] and result["dag_overhead"] is None


def test_decoding_is_timed_with_and_without_the_cache(monkeypatch):
    calls = []

    def generate(model, prompts, count, *, temperature, cached):
        assert not model.training and model.dag is not None and temperature == 0
        assert len(prompts[0]) + count <= model.config.block_size  # one window
        calls.append((count, cached))

    seconds = iter([4.0, 16.0])
    monkeypatch.setattr(bench.engine, "generate", generate)
    monkeypatch.setattr(bench, "seconds_of", lambda action, device: (action(), next(seconds))[1])
    speeds = bench.decode_speed(BenchConfig(**TINY, decode_tokens=32), 2, CPU)
    assert speeds == {"decode_tokens_per_second": 8.0, "decode_uncached_tokens_per_second": 2.0}
    assert calls == [(8, True), (32, True), (8, False), (32, False)]  # the first of each warms up


def arguments(**settings) -> list[str]:
    settings = {**TINY, "device": "cpu", "num_threads": 1, **settings}
    return [f"--{name}={value}" for name, value in settings.items()]


def test_the_command_prints_a_table_and_json_last(run_script):
    done = run_script("bench.py", "--json", *arguments(decode_tokens=12))
    assert done.returncode == 0, done.stderr
    *table, last = done.stdout.splitlines()
    result = json.loads(last)
    assert result["config"]["n_embd"] == 16 and result["models"]["dag"]["decode_tokens_per_second"] > 0
    assert any("MFU" in line for line in table) and f"{result['dag_overhead']:.2f} times" in table[-1]


def test_a_mistake_is_one_line(run_script):
    done = run_script("bench.py", "--stpes=3")
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "did you mean 'steps'" in done.stderr


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("compiled", ["true", "false"])
def test_on_cuda(run_script, compiled):
    done = run_script("bench.py", "--json", *arguments(device="cuda", dtype="bfloat16", compile=compiled))
    assert done.returncode == 0, done.stderr
    dag = json.loads(done.stdout.splitlines()[-1])["models"]["dag"]
    assert dag["gpu_memory_bytes"] > 4 * dag["parameters"]
