"""Parameter groups, the fused kernel against the plain one, and schedules by hand and by property."""

import math

import pytest
import torch
import torch.nn as nn
from conftest import VOCABULARY
from hypothesis import given
from hypothesis import strategies as st

from dag_model import GPT, GPTConfig
from training.optim import SCHEDULES, learning_rate_at, make_optimizer

SMALL = dict(block_size=8, vocab_size=29, n_layer=1, n_head=2, n_embd=16, bias=True, dag_depth=2)
PEAK = dict(learning_rate=1.0, min_lr=0.1, warmup_iters=4, decay_iters=12)
COSINE = dict(PEAK, schedule="cosine", wsd_decay_iters=0)
WSD = dict(PEAK, schedule="wsd", wsd_decay_iters=3)


def test_matrices_decay_and_everything_else_does_not():
    model = GPT(GPTConfig(**SMALL), VOCABULARY)
    decayed, others = make_optimizer(model, 1e-3, (0.9, 0.99), weight_decay=0.3).param_groups
    assert (decayed["weight_decay"], others["weight_decay"]) == (0.3, 0.0)
    name_of = {parameter: name for name, parameter in model.named_parameters()}  # the tied head counts once
    decayed, others = ({name_of[p] for p in group["params"]} for group in (decayed, others))
    assert not decayed & others and decayed | others == set(name_of.values())
    assert {
        "transformer.wte.weight",
        "transformer.h.0.attn.c_attn.weight",
        "dag.planner.context.weight",
    } <= decayed
    assert {
        "transformer.ln_f.weight",
        "dag.dag_scale",
        "dag.over_vector",
        "dag.planner.context.bias",
    } <= others


def test_frozen_parameters_stay_out():
    model = GPT(GPTConfig(**SMALL), VOCABULARY)
    model.transformer.requires_grad_(False)
    groups = make_optimizer(model, 1e-3, (0.9, 0.99), 0.1).param_groups
    assert sum(len(group["params"]) for group in groups) == len(list(model.dag.parameters()))


def test_decay_pulls_matrices_alone():
    model = nn.Linear(2, 2)
    with torch.no_grad():
        model.weight.fill_(1.0), model.bias.fill_(1.0)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    make_optimizer(model, 0.1, (0.9, 0.99), weight_decay=0.5).step()
    assert torch.equal(model.weight, torch.full((2, 2), 0.95)) and torch.equal(model.bias, torch.ones(2))


def two_steps() -> tuple[bool, torch.Tensor]:
    torch.manual_seed(0)
    model = nn.Linear(4, 3)
    optimizer = make_optimizer(model, 1e-2, (0.9, 0.99), 0.1)
    for _ in range(2):
        model(torch.ones(1, 4)).square().sum().backward()
        optimizer.step()
    return bool(optimizer.defaults["fused"]), model.weight.detach()


def test_where_there_is_no_fused_kernel_the_plain_one_does_the_same(monkeypatch):
    fused, weight = two_steps()
    assert fused
    plain_init = torch.optim.AdamW.__init__

    def refuse_fused(self, *args, fused=None, **kwargs):
        if fused:
            raise RuntimeError("`fused=True` requires all the params to be on supported devices")
        plain_init(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.AdamW, "__init__", refuse_fused)
    fused, plain_weight = two_steps()
    assert not fused
    torch.testing.assert_close(plain_weight, weight)


def test_warmup_by_hand():
    assert [learning_rate_at(step, **COSINE) for step in range(5)] == [0.2, 0.4, 0.6, 0.8, 1.0]


def test_cosine_by_hand():
    quarter = 0.5 * (1 + math.sqrt(0.5))
    for step, height in ((4, 1), (6, quarter), (8, 0.5), (10, 1 - quarter), (12, 0), (1000, 0)):
        assert learning_rate_at(step, **COSINE) == pytest.approx(0.1 + 0.9 * height, rel=1e-12), step


def test_wsd_by_hand():
    rates = [learning_rate_at(step, **WSD) for step in range(4, 14)]
    assert rates == pytest.approx([1, 1, 1, 1, 1, 1, 0.7, 0.4, 0.1, 0.1], rel=1e-12)


def test_constant_by_hand():
    config = COSINE | dict(schedule="constant", min_lr=0.0)
    assert [learning_rate_at(step, **config) for step in (0, 4, 12, 10**6)] == [0.2, 1.0, 1.0, 1.0]


@st.composite
def schedules(draw):
    """Settings whose ramps do not overlap."""
    warmup, stable, decay = (draw(st.integers(0, 300)) for _ in range(3))
    peak = draw(st.floats(1e-6, 1.0))
    return dict(
        schedule=draw(st.sampled_from(sorted(SCHEDULES))),
        learning_rate=peak,
        min_lr=peak * draw(st.floats(0, 1)),
        warmup_iters=warmup,
        decay_iters=warmup + stable + decay,
        wsd_decay_iters=decay,
    )


@given(schedules(), st.integers(0, 1000))
def test_positive_and_never_above_the_peak(config, step):
    rate = learning_rate_at(step, **config)
    assert 0 <= rate <= config["learning_rate"] * (1 + 1e-12)
    if step < config["decay_iters"]:
        assert rate > 0


@given(schedules())
def test_reaches_the_peak_and_ends_at_min_lr(config):
    if config["decay_iters"] > config["warmup_iters"]:
        assert learning_rate_at(config["warmup_iters"], **config) == config["learning_rate"]
    end = config["learning_rate"] if config["schedule"] == "constant" else config["min_lr"]
    for step in (config["decay_iters"], config["decay_iters"] + 1, 10**6):
        assert learning_rate_at(step, **config) == pytest.approx(end, rel=1e-12)


@given(schedules(), st.integers(0, 1000))
def test_no_jumps(config, step):
    """A step changes the rate by at most the steepest slope of the schedule's parts."""
    warmup, decay = config["warmup_iters"], config["decay_iters"] - config["warmup_iters"]
    slopes = {
        "cosine": math.pi / 2 / max(1, decay),
        "wsd": 1 / max(1, config["wsd_decay_iters"]),
        "constant": 0.0,
    }
    steepest = config["learning_rate"] * max(1 / (warmup + 1), slopes[config["schedule"]])
    change = learning_rate_at(step + 1, **config) - learning_rate_at(step, **config)
    assert abs(change) <= steepest * (1 + 1e-9)


@given(schedules(), st.integers(0, 1000))
def test_up_then_down(config, step):
    change = learning_rate_at(step + 1, **config) - learning_rate_at(step, **config)
    assert (change >= 0) if step < config["warmup_iters"] else (change <= 1e-12 * config["learning_rate"])
