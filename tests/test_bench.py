"""Turns with a fake clock, what is read and by whom, training, decoding, the arithmetic, and the command."""

import copy
import itertools
import json
import statistics
from dataclasses import asdict

import pytest
import torch
from conftest import SEPARATOR

import bench
from bench import BenchConfig, RandomText
from configurator import to_dict
from dag_model import GPT, GPTConfig
from data.loader import Loader, write_dataset
from data.tokenizer import CharTokenizer
from training import checkpoint
from training.optim import make_optimizer
from training.train_config import TrainConfig

SHAPE = dict(block_size=16, n_layer=1, n_head=2, n_embd=16, dag_depth=2)
TINY = dict(SHAPE, batch_size=2, steps=2, warmup=1)
CPU = torch.device("cpu")
TOKENIZER = CharTokenizer("0123456789+=\n")
READ = dict(vocab_size=TOKENIZER.vocab_size, separator_id=TOKENIZER.separator_id)


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    """A folder with one dataset, sums: 300 documents such as "12+7=19"."""
    folder = tmp_path_factory.mktemp("data")
    lines = [f"{n % 50}+{n % 7}={n % 50 + n % 7}" for n in range(300)]
    write_dataset(
        folder / "sums", "sums", TOKENIZER, {"train": lines[:200], "val": lines[200:]}, documents=True
    )
    return folder


@pytest.fixture
def tiny(data_dir):
    """tiny(steps=3, ...) -> the settings of a small measurement on the sums."""
    return lambda **fields: BenchConfig(**TINY | dict(data_dir=str(data_dir), dataset="sums") | fields)


@pytest.fixture
def run_dir(data_dir, tmp_path):
    """A run with a checkpoint on the sums, of another shape than SHAPE."""
    model = GPT(GPTConfig(**SHAPE | READ | dict(n_embd=32, dag_depth=3)), TOKENIZER.vocabulary)
    state = checkpoint.Checkpoint(
        step=7,
        model=model.state_dict(),
        optimizer={},
        model_config=asdict(model.config),
        train_config=to_dict(TrainConfig(data_dir=str(data_dir), dataset="sums")),
        tokenizer=TOKENIZER.to_json(),
        loader={},
        rng={},
    )
    checkpoint.save(tmp_path / "run", "best", state)
    return tmp_path / "run"


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


# what is read, and by whom


def test_a_fresh_model_is_as_train_would_make_it(tiny, data_dir):
    text, models = bench.text_and_models(tiny())
    assert list(models) == ["dag", "plain"]
    assert models["dag"].config == GPTConfig(**SHAPE, **READ)
    assert models["plain"].config == GPTConfig(**SHAPE | dict(dag_depth=0), **READ)
    loader = Loader(data_dir / "sums", "train", batch_size=2, block_size=16, seed=3)
    for x, y in text.batches("train", 4, 2, 16, seed=3):
        assert all(map(torch.equal, (x, y), loader.next_batch()))


def test_a_trained_model_is_measured_in_its_own_shape_beside_a_fresh_trunk_of_it(run_dir, data_dir):
    text, models = bench.text_and_models(BenchConfig(out_dir=str(run_dir), n_layer=5))
    saved = checkpoint.load(run_dir)
    for name, tensor in models["dag"].state_dict().items():
        assert torch.equal(tensor, saved.model[name]), name
    assert asdict(models["plain"].config) == saved.model_config | dict(dag_depth=0)
    assert not torch.equal(models["plain"].lm_head.weight, models["dag"].lm_head.weight)
    assert text.data_dir == data_dir / "sums"


def test_a_trained_model_must_know_the_text(run_dir, monkeypatch):
    meta = bench.dataloader.read_meta
    other = CharTokenizer("=+9876543210\n").to_json()
    monkeypatch.setattr(bench.dataloader, "read_meta", lambda path: meta(path) | dict(tokenizer=other))
    with pytest.raises(ValueError, match="vocabulary"):
        bench.text_and_models(BenchConfig(out_dir=str(run_dir)))


@pytest.mark.parametrize("size", [7, 300])
def test_random_tokens_have_a_vocabulary_with_digits(size):
    text = RandomText(size)
    assert len(text.vocabulary) == size and f"random tokens, {size}" in text.title
    assert text.vocabulary[:10] == [b"0", b"1", b"2", b"3", b"4", b"5", b"6", b"7", b"8", b"9"][:size]
    assert all(len(token) == 1 for token in text.vocabulary) and text.vocabulary[95:] == [b"x"] * (size - 95)
    batches = text.batches("train", 40, 2, 8, seed=1)
    seen = torch.stack([x for x, _ in batches])
    assert seen.min() == 0 and seen.max() >= size - 5 and len(seen.unique(dim=0)) == 40
    assert all(torch.equal(x[:, 1:], y[:, :-1]) for x, y in batches)
    assert all(map(torch.equal, seen, (x for x, _ in text.batches("train", 40, 2, 8, seed=1))))


def test_random_tokens_or_a_run():
    with pytest.raises(ValueError, match="leave out one"):
        BenchConfig(out_dir="run", vocab_size=5).check()


# training


@pytest.mark.parametrize("depth", [2, 0])
def test_a_step_is_a_training_step_on_the_next_batch(tiny, depth):
    config = tiny(grad_clip=0.01, weight_decay=0.5, dag_depth=depth)
    text, models = bench.text_and_models(config)
    ours = models["dag" if depth else "plain"]
    theirs, start = copy.deepcopy(ours), copy.deepcopy(ours)
    batches = text.batches("train", 3, 2, 16, seed=1)
    torch.manual_seed(1)  # of the search for plans
    step = bench.make_step(ours, batches, config, CPU, torch.float32)
    step(), step(), step()

    torch.manual_seed(1)
    optimizer = make_optimizer(theirs, 1e-3, (0.9, 0.99), 0.5)
    for x, y in batches:
        optimizer.zero_grad()
        theirs(x, y)[1].backward()
        torch.nn.utils.clip_grad_norm_(theirs.parameters(), 0.01)
        optimizer.step()
    for (name, a), b in zip(ours.named_parameters(), theirs.parameters()):
        assert torch.equal(a, b), name
    assert not torch.equal(ours.lm_head.weight, start.lm_head.weight)


def test_models_read_the_same_batches_and_a_trained_one_stays_what_it_is(run_dir, monkeypatch):
    read = {"dag": [], "plain": []}
    forward, load_model, loaded = GPT.forward, checkpoint.load_model, []

    def recording(self, idx, targets=None):
        read["plain" if self.dag is None else "dag"].append(idx)
        return forward(self, idx, targets)

    monkeypatch.setattr(GPT, "forward", recording)
    monkeypatch.setattr(
        checkpoint, "load_model", lambda *args: (loaded.append(load_model(*args)), loaded[0])[1]
    )
    config = BenchConfig(out_dir=str(run_dir), batch_size=2, steps=7, warmup=3, decode_tokens=0)
    bench.measure(config, CPU, torch.float32)
    assert len(read["dag"]) == 3 + 10  # in turns of five
    assert all(map(torch.equal, read["dag"], read["plain"]))
    assert len(torch.stack(read["dag"]).unique(dim=0)) == 13
    saved = checkpoint.load(run_dir).model
    assert all(torch.equal(tensor, saved[name]) for name, tensor in loaded[0][0].state_dict().items())


# decoding


@pytest.mark.parametrize("fields", [dict(dag_depth=0), dict(dag_depth=3, separator_id=SEPARATOR)], ids=str)
@pytest.mark.parametrize("cached", [True, False])
def test_reading_says_what_the_model_says_of_the_text_as_it_stands(tiny_gpt, monkeypatch, fields, cached):
    model, rows, lengths = tiny_gpt(**fields), torch.randint(29, (3, 16)), []
    expected = model(rows)[0].argmax(-1)
    assert (expected[:, :-1] == rows[:, 1:]).float().mean() < 0.5, "the text is what the model would write"
    hidden_states = model.hidden_states

    def recording(idx, cache):
        lengths.append(idx.size(1))
        return hidden_states(idx, cache)

    monkeypatch.setattr(model, "hidden_states", recording)
    said = list(itertools.islice(bench.reading(model, rows.tolist(), cached), 48 + 5))
    assert said == [*expected.flatten().tolist(), *expected[0, :5].tolist()]
    assert lengths[:20] == ([1] * 20 if cached else [*range(1, 17), 1, 2, 3, 4])


@pytest.fixture
def decoding(monkeypatch):
    """What decode_speeds reads, and by whom; clocks are replaced."""
    calls = []

    def reading(model, rows, cached):
        assert not model.training
        calls.append((model, rows, cached))
        return itertools.count()

    def take_turns(steps, count, device, per_turn):
        assert [step() for step in steps.values()] == [0, 0]
        cached = calls[-1][2]
        return {"dag": [0.125, 0.125, 0.5] if cached else [2.0], "plain": [0.125, 0.125] if cached else [1.0]}

    monkeypatch.setattr(bench, "reading", reading)
    monkeypatch.setattr(bench, "take_turns", take_turns)
    return calls


@pytest.mark.parametrize("trained", [True, False])
def test_decoding_reads_validation_text_with_and_without_the_cache(
    tiny, run_dir, decoding, data_dir, trained
):
    config = tiny(decode_tokens=40, **dict(out_dir=str(run_dir)) if trained else {})
    text, models = bench.text_and_models(config)
    speeds = bench.decode_speeds(models, text, config, CPU)
    cached, uncached = "decode_tokens_per_second", "decode_uncached_tokens_per_second"
    assert speeds == {"dag": {cached: 4.0, uncached: 0.5}, "plain": {cached: 8.0, uncached: 1.0}}
    rows = decoding[0][1]
    assert [model.dag is None for model, _, _ in decoding] == [
        False,
        True,
    ] * 4  # each twice: the first warms up
    assert all(call[1] is rows and call[2] == (i < 4) for i, call in enumerate(decoding))
    assert list(map(len, rows)) == ([16, 16, 16] if trained else [40])  # a fresh context holds all in one row
    assert all(len(rows[0]) == model.config.block_size for model, _, _ in decoding)
    assert all((model in models.values()) == trained for model, _, _ in decoding)
    lines = set(TOKENIZER.decode(rows[0]).split("\n")[:-1]) - {""}  # of padding
    assert lines and lines <= {f"{n % 50}+{n % 7}={n % 50 + n % 7}" for n in range(200, 300)}


# the results


def test_results_fit_together(tiny, monkeypatch):
    monkeypatch.setattr(bench, "peak_flops", lambda device, dtype: (1e9, "pretended"))
    result = bench.measure(tiny(decode_tokens=16), CPU, torch.float32)
    json.dumps(result, allow_nan=False)
    assert list(result["models"]) == ["dag", "plain"]
    for name, depth in (("dag", 2), ("plain", 0)):
        row = result["models"][name]
        model = GPT(GPTConfig(**SHAPE | READ | dict(dag_depth=depth)), TOKENIZER.vocabulary)
        assert row["parameters"] == model.num_parameters()
        assert row["flops_per_token"] == model.flops_per_token()
        assert row["tokens_per_second"] * row["step_ms"] / 1e3 == pytest.approx(2 * 16)
        assert row["mfu"] == pytest.approx(row["tokens_per_second"] * row["flops_per_token"] / 1e9)
        assert 0 < row["step_ms_min"] <= row["step_ms"] <= row["step_ms_max"]
    dag, plain = result["models"].values()
    assert result["dag_overhead"] == pytest.approx(dag["step_ms"] / plain["step_ms"])
    cached = "decode_tokens_per_second"
    assert result["decode_overhead"] == pytest.approx((1 / dag[cached]) / (1 / plain[cached]))
    assert 50 * 2**20 < result["process_memory_bytes"] < 64 * 2**30  # PyTorch alone is more than that


def test_a_plain_gpt_has_one_column(tiny):
    result = bench.measure(tiny(dag_depth=0, decode_tokens=0), CPU, torch.float32)
    assert list(result["models"]) == ["plain"]
    assert result["dag_overhead"] is None and result["decode_overhead"] is None


def arguments(**settings) -> list[str]:
    settings = {**TINY, "device": "cpu", "num_threads": 1, **settings}
    return [f"--{name}={value}" for name, value in settings.items()]


def test_the_command_prints_a_table_and_json_last(run_script, data_dir):
    done = run_script("bench.py", "--json", *arguments(decode_tokens=12, data_dir=data_dir, dataset="sums"))
    assert done.returncode == 0, done.stderr
    head, *table, step, token, last = done.stdout.splitlines()
    result = json.loads(last)
    assert result["config"]["n_embd"] == 16 and result["models"]["dag"]["decode_tokens_per_second"] > 0
    assert head.endswith(f"text of {data_dir / 'sums'}") and any("MFU" in line for line in table)
    assert "a step" in step and f"{result['dag_overhead']:.2f} times" in step
    assert "a cached token" in token and f"{result['decode_overhead']:.2f} times" in token


def test_the_command_needs_no_data_for_random_tokens(run_script, tmp_path):
    done = run_script("bench.py", *arguments(vocab_size=120, decode_tokens=0, data_dir=tmp_path))
    assert done.returncode == 0, done.stderr
    assert "random tokens, 120" in done.stdout.splitlines()[0]
    assert "DAG, depth 2" in done.stdout and "cached token" not in done.stdout


def test_a_mistake_is_one_line(run_script):
    done = run_script("bench.py", "--stpes=3")
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "did you mean 'steps'" in done.stderr


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("compiled", ["true", "false"])
def test_on_cuda(run_script, compiled):
    done = run_script(
        "bench.py", "--json", *arguments(vocab_size=120, device="cuda", dtype="bfloat16", compile=compiled)
    )
    assert done.returncode == 0, done.stderr
    dag = json.loads(done.stdout.splitlines()[-1])["models"]["dag"]
    assert dag["gpu_memory_bytes"] > 4 * dag["parameters"]
