"""Every statistic computed by hand on a tiny example, and that looking changes nothing."""

import copy
import math
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from conftest import DENSE, SEPARATOR, VOCABULARY, random_text
from torch.testing import assert_close

from dag.dense import DenseState, Plan
from dag.plan_search import Plans, Target
from dag.planner import Sight
from data.tokenizer import CharTokenizer
from evals import dag_metrics
from evals.answers import Problem
from evals.dag_metrics import (
    Record,
    Watch,
    depth_used,
    hit_statistics,
    observe,
    parameter_gradients,
    probe_values,
)

TOKENIZER = CharTokenizer(b"".join(VOCABULARY).decode())
SYSTEMS = {
    "searched": {},
    "sampled": dict(dag_plan="sampled"),
    "learned": dict(dag_values="learned"),
    "straight_through": dict(dag_plan="straight_through"),
    "sequence": DENSE["sequence"],
    "soft token": DENSE["token"] | dict(dag_plan="soft"),
}
SUMS = dict(separator_id=SEPARATOR, dag_ops="add,identity", dag_num_inputs=2, dag_depth=2)


@pytest.fixture(autouse=True)
def same_ids():
    assert TOKENIZER.vocabulary == VOCABULARY, "the tokenizer sorts: bring VOCABULARY in its order"


def encode(text: str) -> torch.Tensor:
    return torch.tensor([TOKENIZER.encode(text)])


def watch_text(model, text: str, problems=()) -> Watch:
    tokens = encode(text)
    return Watch.of(model, TOKENIZER, tokens[:, :-1], tokens[:, 1:], problems)


def watch_random(model, *shape) -> Watch:
    return Watch.of(model, TOKENIZER, random_text(*shape), random_text(*shape))


def floats(tensors) -> dict[str, float]:
    return {name: float(value) for name, value in tensors.items()}


def nats(*weights) -> float:
    return -sum(w / sum(weights) * math.log(w / sum(weights)) for w in weights)


# ----------------------------------------------------------------------------------------------------
# Gate and norms


def test_where_numbers_follow_and_where_nothing_is_written(tiny_gpt):
    text = "12+7*3=33\nb 4 c 5\n5 2/3\n"
    follow = (
        "..x.x.x........x...x..."  # behind these comes a number that has others before it, and no denominator
    )
    nothing = ".........xx..xx..x....."  # behind these none, not even a first one, and none is being written
    watch = watch_text(tiny_gpt(separator_id=SEPARATOR), text)
    marks = ["".join(".x"[flag] for flag in part[0].tolist()) for part in (watch.on_numbers, watch.elsewhere)]
    assert marks == [follow, nothing]


def test_gate_statistics_by_hand():
    watch = SimpleNamespace(
        on_numbers=torch.tensor([[False, True, False, True]]),
        elsewhere=torch.tensor([[True, False, False, False]]),
    )
    statistics = floats(dag_metrics.gate_statistics(torch.tensor([[0.2, 0.4, 0.6, 0.8]]), watch))
    assert statistics == pytest.approx(
        {
            "gate_mean": 0.5,
            "gate_std": math.sqrt((0.09 + 0.01) / 2),
            "gate_open": 0.5,
            "gate_mean_on_numbers": 0.6,
            "gate_std_on_numbers": 0.2,
            "gate_open_on_numbers": 0.5,
            "gate_mean_elsewhere": 0.2,
            "gate_std_elsewhere": 0.0,
            "gate_open_elsewhere": 0.0,
        },
        rel=1e-6,
        abs=1e-7,
    )


def test_norms_by_hand():
    record = Record()
    record.hidden = torch.tensor([[[3.0, 4.0], [0.0, 5.0]]])  # both of length 5
    record.mixed = torch.tensor([[[0.0, 0.0], [0.0, 6.0]]])
    record.state = SimpleNamespace(folded=torch.tensor([[6.0, 8.0]]))
    assert floats(dag_metrics.norm_statistics(record)) == pytest.approx(
        dict(hidden_norm=5.0, dag_norm=10.0, mixed_norm=3.0, change_norm=(5 + 1) / 2, dag_ratio=2.0)
    )


@pytest.mark.parametrize("system", SYSTEMS)
def test_the_norms_are_those_of_the_model_s_own_states(tiny_gpt, system):
    """The head sees the mixed states; a shut gate leaves the hidden ones as they are."""
    model = tiny_gpt(separator_id=SEPARATOR, **SYSTEMS[system])
    watch = watch_random(model, 4, 16)
    statistics = observe(model, watch)
    with torch.no_grad():
        mixed = model.hidden_states(watch.idx)[0]
        model.silent = True
        hidden = model.hidden_states(watch.idx)[0]
    if model.reads_numbers:  # what counts is where something is offered
        offered = model.inspect(watch.idx).offers.symbol >= 0
        hidden, mixed = hidden[offered], mixed[offered]
    assert_close(statistics["mixed_norm"], mixed.norm(dim=-1).mean())
    assert_close(statistics["hidden_norm"], hidden.norm(dim=-1).mean())
    assert_close(statistics["change_norm"], (mixed - hidden).norm(dim=-1).mean())
    assert statistics["change_norm"] > 0


# ----------------------------------------------------------------------------------------------------
# Plans


def test_statistics_of_plans_by_hand(tiny_gpt):
    """K = 2 inputs in slots 0 and 1, D = 2 steps into slots 2 and 3."""
    model = tiny_gpt(dag_ops="add,log,identity", dag_num_inputs=2, dag_depth=2, separator_id=SEPARATOR)
    state = model.inspect(encode("1+2=3"))
    plans = [
        [(0, 0, 1), (2, 2, 0)],  # slot 0 + slot 1, and the end
        [(2, 0, 0), (2, 2, 0)],  # slot 0 is the result: the second step is not chosen
        [(1, 1, 0), (0, 2, 0)],  # log of slot 1, plus slot 0
    ]
    state = state._replace(
        row=torch.zeros(3),
        plans=Plans(*torch.tensor(plans).unbind(-1)),
        log_probability=torch.tensor([0.5, 0.25, 0.75]).log(),
        written=["7", None, "8"],
    )
    statistics = floats(dag_metrics.plan_statistics(state, model.dag))
    assert statistics == pytest.approx(
        {
            "plans": 3.0,
            "valid_final": 2 / 3,
            "plan_probability": 0.5,
            "depth_used": (1 + 0 + 2) / 3,
            "operation_entropy": nats(2, 1, 2),
            "operand1_entropy": nats(2, 1, 2),  # slots 0, 2; 0; 1, 2
            "operand2_entropy": nats(1, 1),  # slot 1; none; slot 0
            "operands_from_results": 2 / 7,
            "use/add": 2 / 5,
            "use/log": 1 / 5,
            "use/identity": 2 / 5,
            "operand_use/input_0": 3 / 7,
            "operand_use/input_1": 2 / 7,
        },
        rel=1e-6,
    )
    nothing = state._replace(row=torch.zeros(0), written=[])
    assert floats(dag_metrics.plan_statistics(nothing, model.dag)) == {"plans": 0.0}


def test_every_step_of_mixed_plans_is_chosen(tiny_gpt):
    model = tiny_gpt(dag_plan="soft", dag_ops="add,identity", dag_num_inputs=2, dag_depth=2)
    state = model.inspect(encode("1+2=3"))
    plans = Plans(*torch.tensor([[(1, 0, 1), (0, 1, 0)]]).unbind(-1))  # identity does not end these
    state = state._replace(row=torch.zeros(1), plans=plans, written=["3"], log_probability=torch.zeros(1))
    statistics = floats(dag_metrics.plan_statistics(state, model.dag))
    assert statistics["use/add"] == statistics["use/identity"] == 0.5
    assert statistics["depth_used"] == 1


def test_depth_used_is_what_the_result_needs():
    """Against a recursion over one plan at a time."""
    names, K, D, N = ["add", "identity", "log"], 2, 4, 200
    slots = [torch.stack([torch.randint(K + s, (N,)) for s in range(D)], dim=1) for _ in "ab"]
    plans = Plans(torch.randint(3, (N, D)), *slots)

    def needed(n, slot) -> set:
        if slot < K:
            return set()
        name = names[plans.operation[n, slot - K]]
        own = set() if name == "identity" else {slot}
        below = needed(n, int(plans.operand1[n, slot - K]))
        return own | below | (needed(n, int(plans.operand2[n, slot - K])) if name == "add" else set())

    expected = [len(needed(n, K + D - 1)) for n in range(N)]
    assert len(set(expected)) == D + 1  # all depths occur
    assert depth_used(plans, K, names).tolist() == expected


def test_statistics_of_a_dense_dag_by_hand():
    """One row of two positions, K = 1 input and D = 2 steps, so S = 3; two operations; width 2."""
    operands = torch.tensor(
        [
            [[[1.0, 0, 0], [1, 0, 0]], [[0, 1, 0], [1, 0, 0]]],  # position 0: slots (0, 0), then (1, 0)
            [[[1.0, 0, 0], [1, 0, 0]], [[0.4, 0.6, 0], [0, 1, 0]]],  # position 1: then a mixture and 1
        ]
    )[None]
    operation = torch.tensor([[[1.0, 0], [1, 0]], [[1, 0], [0, 1]]])[None]
    state = DenseState(
        plan=Plan(operands, operation),
        values=torch.tensor([[[2.0, 4, 8], [3, 6, 9]]]),
        validity=torch.tensor([[[1.0, 1, 0], [1, 0.5, 1]]]),
        gate=torch.tensor([[[0.2], [0.8]]]),
        folded=torch.tensor([[[3.0, 4.0], [0.0, 1.0]]]),
    )
    statistics = floats(dag_metrics.dense_statistics(state, SimpleNamespace(names=["add", "log"])))
    assert statistics == pytest.approx(
        {
            "valid_results": 2.5 / 4,
            "valid_final": 0.5,
            "depth_used": 2.0,
            "operation_entropy": nats(3, 1),
            "operand1_entropy": nats(2.4, 1.6),
            "operand2_entropy": nats(3, 1),
            "operands_from_results": (1.6 + 1) / 8,
            "use/add": 3 / 4,
            "use/log": 1 / 4,
        },
        rel=1e-6,
    )


def test_hits_by_hand(tiny_gpt):
    """Three numbers: the model's own plan gives the first; a search finds 7 - 4; nothing is 1000."""
    model = tiny_gpt(**(SUMS | dict(dag_ops="add,subtract,identity")))
    C, add, end = model.config.n_embd, 0, 2
    plans = Plans(*torch.tensor([[(add, 0, 1), (end, 2, 0)]] * 3).unbind(-1))
    values = torch.tensor([[2.0, 3], [7, 4], [7, 4]]).double()
    sight = Sight(torch.randn(3, C), torch.randn(3, 2, C), torch.ones(3, 2, dtype=torch.bool), values)
    whole = torch.zeros(3, dtype=torch.long)
    target = Target(torch.tensor([5.0, 3.0, 1000.0]).double(), whole, whole.bool())
    model.dag.plan_loss(model.dag.planner, plans, sight, target, odds=torch.ones(3))
    assert model.dag.plan_loss.hits == Counter(numbers=3, own=1, searched=2, found=1, explained=2, plans=2)
    assert hit_statistics(model.dag.plan_loss.hits) == pytest.approx(
        dict(own_plan_explains=1 / 3, search_found=1 / 2, explained=2 / 3, hits_per_number=1.0)
    )
    model.dag.plan_loss(model.dag.planner, plans, sight, target, odds=torch.zeros(3))  # without a search
    assert model.dag.plan_loss.hits == Counter(numbers=6, own=2, searched=2, found=1, explained=3, plans=3)
    assert hit_statistics(Counter()) == {}


# ----------------------------------------------------------------------------------------------------
# Gradients


@pytest.mark.parametrize("system", SYSTEMS)
def test_the_gradient_of_final_hidden_is_that_of_the_cross_entropy(tiny_gpt, system):
    """(p - one-hot of the target) times the head's weights, over the number of tokens."""
    model = tiny_gpt(separator_id=SEPARATOR, **SYSTEMS[system])
    watch = watch_random(model, 4, 16)
    with torch.no_grad():
        logits = model.lm_head(model.train().hidden_states(watch.idx, targets=watch.targets)[0])
        error = logits.softmax(-1) - torch.nn.functional.one_hot(watch.targets, len(VOCABULARY))
        expected = (error @ model.lm_head.weight / watch.targets.numel()).norm()
    assert_close(observe(model, watch)["gradient/final_hidden"], expected, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("system", ["sequence", "soft token"])
def test_the_gradient_of_final_values_by_finite_differences(tiny_gpt, system):
    model = tiny_gpt(**SYSTEMS[system]).train()
    watch = watch_random(model, 2, 4)

    def loss_with(row, position, change) -> float:
        def move(_, inputs):
            value = inputs[0].clone()
            value[row, position] += change
            return (value, *inputs[1:])

        handle = model.dag.fold.register_forward_pre_hook(move)
        loss = model(watch.idx, watch.targets)[1].item()
        handle.remove()
        return loss

    h = 0.02
    slopes = [(loss_with(row, t, h) - loss_with(row, t, -h)) / (2 * h) for row in range(2) for t in range(4)]
    found = float(observe(model, watch)["gradient/final_values"])
    assert found == pytest.approx(math.hypot(*slopes), rel=0.02) and found > 1e-4


def test_only_values_that_carry_a_gradient_have_one(tiny_gpt):
    for system, fields in SYSTEMS.items():
        model = tiny_gpt(separator_id=SEPARATOR, dag_ops="max,identity", **fields)
        if model.reads_numbers:
            model.dag.wanted.bias.data += 100.0  # an open gate: what fails is searched for with certainty
        found = observe(model, watch_text(model, "7 a 7 b 7 c 7\n"))
        assert ("gradient/final_values" in found) == (system not in ("searched", "sampled")), system
        drawn_or_searched_for = system == "learned"  # what it takes 7 for differs from place to place
        assert drawn_or_searched_for or found.get("gradient/plan_logits_operation", 0) > 0, system


def test_the_gradient_of_plan_logits_by_hand(tiny_gpt):
    """2+3=5 has one explanation, add slots 0 and 1, and the end: each step has its softmax minus that."""
    model = tiny_gpt(**SUMS).train()
    with torch.no_grad():
        model.dag.wanted.bias += 100.0  # an open gate: what fails is searched for with certainty
    watch = watch_text(model, "2+3=5\n")
    found = observe(model, watch)
    state = model.hidden_states(watch.idx, targets=watch.targets)[1]
    n = state.position.tolist().index(3)  # at "="
    sight, planner = state.sight[torch.tensor([n])], model.dag.planner
    right = Plans(*torch.tensor([[(0, 0, 1), (1, 2, 0)]]).unbind(-1))
    with torch.no_grad():
        known = *planner.read(sight.hidden, sight.readers), sight.inputs
        operation = planner.choices(*known, right)[0][0].exp()  # (D, O)
    error = operation - torch.eye(2)
    assert_close(found["gradient/plan_logits_operation"], error.norm(), rtol=1e-4, atol=1e-6)
    for o, name in enumerate(("add", "identity")):
        assert_close(found[f"gradient/plan_logits/{name}"], error[:, o].norm(), rtol=1e-4, atol=1e-6)
    assert found["gradient/plan_queries_operand1"] > 0 and found["gradient/plan_logits_format"] > 0


def test_gradients_of_parameters_by_hand(tiny_gpt):
    model = tiny_gpt(dag_depth=2, dag_ops="add,log", n_embd=2, n_head=1, **DENSE["token"])
    assert parameter_gradients(model.dag) == {}  # none yet
    scores = model.dag.planner.operation_score  # rows: step 0 add, step 0 log, step 1 add, step 1 log
    scores.weight.grad = torch.tensor([[3.0, 0], [1, 0], [0, 4], [0, 0]])
    model.dag.fold.project.weight.grad = torch.tensor([[6.0], [0]])
    model.dag.fold.project.bias.grad = torch.tensor([0.0, 8])
    model.lm_head.weight.grad = torch.ones_like(model.lm_head.weight)  # not the DAG's
    assert floats(parameter_gradients(model.dag)) == pytest.approx(
        {
            "gradient_norm/planner": math.sqrt(26),
            "gradient_norm/fold": 10.0,
            "gradient_norm/add": 5.0,
            "gradient_norm/log": 1.0,
        }
    )


def test_gradients_of_parameters_are_those_of_all_micro_steps(tiny_gpt):
    model = tiny_gpt(**SYSTEMS["soft token"]).train()
    x, y = random_text(4, 16), random_text(4, 16)
    model(x, y)[1].backward()
    whole = floats(parameter_gradients(model.dag))
    model.zero_grad()
    for half in (slice(0, 2), slice(2, 4)):
        (model(x[half], y[half])[1] / 2).backward()
    assert floats(parameter_gradients(model.dag)) == pytest.approx(whole, rel=1e-3)


# ----------------------------------------------------------------------------------------------------
# Probes


def test_probes_are_the_shortest_problems_that_can_be_written(tiny_gpt):
    problems = [Problem(prompt, "5") for prompt in ("2+3+0=", "1+4=", "10-5=", "7-2=")]
    problems.append(Problem("5=", "fünf"))
    watch = watch_text(tiny_gpt(), "1+1=2", problems)
    assert [probe.prompt for probe in watch.probes] == ["1+4=", "7-2=", "10-5="]


def test_probe_values_by_hand(tiny_gpt):
    model = tiny_gpt(**SUMS).train()
    with torch.no_grad():
        model.dag.planner.operation_score.bias += torch.tensor([100.0, 0.0])  # always add, in both steps
        model.dag.wanted.bias += 100.0
    watch = watch_text(model, "1+1=2", [Problem("2+3=", "5")])
    model.eval()
    state = model.inspect(encode("2+3="))
    n = state.position.tolist().index(3)
    slots = [3.0, 2.0]  # the newest first
    for a, b in zip(state.plans.operand1[n].tolist(), state.plans.operand2[n].tolist()):
        slots.append(slots[a] + slots[b])
    told = probe_values(model.train(), watch)
    assert model.training
    assert told == pytest.approx(
        {
            "probe/0/gate": float(state.gate[0, 3, 0]),
            "probe/0/plan_probability": float(state.log_probability[n].exp()),
            "probe/0/step_1": slots[2],
            "probe/0/step_2": slots[3],
        }
    )
    with torch.no_grad():
        model.dag.wanted.bias -= 1000.0
    assert probe_values(model, watch) == {"probe/0/gate": 0.0}


def test_probe_values_of_a_dense_dag_by_hand(tiny_gpt):
    model = tiny_gpt(dag_ops="add,divide", dag_depth=2, **DENSE["token"])
    watch = watch_text(model, "1+1=2", [Problem("2+3=", "5")])
    with torch.no_grad():
        bias = model.dag.planner.operation_score.bias
        bias += torch.tensor([1e4, 0.0, 0.0, 0.0])  # of step 0, add
        value = model.inspect(encode("2+3=")).values[0, -1, 0].item()
        assert probe_values(model, watch)["probe/0/step_1"] == 2 * value
        bias += torch.tensor([-1e5, 0.0, 0.0, 0.0])  # divide, 0 by 0
        model.dag.values.extract.weight.zero_()
        model.dag.values.extract.bias.zero_()
    assert not any("step" in name for name in probe_values(model, watch))
    assert 0 < probe_values(model, watch)["probe/0/gate"] < 1


def test_numbers_of_any_length_and_fractions_are_floats():
    assert [dag_metrics.to_float(text) for text in ("-3/4", "1.5", "9" * 400)] == [-0.75, 1.5, math.inf]


# ----------------------------------------------------------------------------------------------------
# All of it


@pytest.mark.parametrize("system", SYSTEMS)
def test_looking_changes_nothing(tiny_gpt, system):
    model = tiny_gpt(separator_id=SEPARATOR, dropout=0.2, **SYSTEMS[system]).train()
    watch = watch_random(model, 4, 16)
    watch.idx[0, :5] = encode("2+3=5")[0]
    model(watch.idx, watch.targets)[1].backward()
    before = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    hits = copy.copy(model.dag.plan_loss.hits) if model.reads_numbers else None
    random = torch.get_rng_state()
    assert observe(model, watch)
    assert torch.equal(torch.get_rng_state(), random) and model.training
    assert all(torch.equal(before[name], parameter.grad) for name, parameter in model.named_parameters())
    assert not any(module._forward_hooks for module in model.modules())
    assert hits is None or (model.dag.plan_loss.hits == hits and bool(hits) == (not model.dag.mixes))
    random = torch.get_rng_state()
    first = model(watch.idx, watch.targets)[1]
    observe(model, watch)
    torch.set_rng_state(random)
    assert torch.equal(model(watch.idx, watch.targets)[1], first)


def test_an_error_leaves_no_hook_behind(tiny_gpt):
    model = tiny_gpt().train()
    with pytest.raises(IndexError):
        observe(model, Watch.of(model, TOKENIZER, random_text(1, 8), torch.full((1, 8), 999)))
    assert model.training and not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("system", SYSTEMS)
def test_statistics_are_finite_under_autocast(tiny_gpt, system):
    model = tiny_gpt(separator_id=SEPARATOR, **SYSTEMS[system])
    watch = watch_random(model, 8, 16)
    exact = observe(model, watch)
    with torch.autocast("cpu", torch.bfloat16):
        found = observe(model, watch)
    assert found.keys() == exact.keys() and {"gradient/final_hidden", "depth_used"} <= found.keys()
    assert all(math.isfinite(value) for value in found.values())
    assert sum(value for name, value in found.items() if name.startswith("use/")) == pytest.approx(
        1, abs=1e-5
    )


def test_a_plain_gpt_and_a_text_without_numbers_have_nothing_to_tell(tiny_gpt):
    model = tiny_gpt(dag_depth=0)
    assert observe(model, watch_text(model, "1+1=2")) == {}
    model = tiny_gpt(separator_id=SEPARATOR)
    found = observe(model, watch_text(model, "abc def\n"))
    assert found["plans"] == 0 and found["gate_mean_elsewhere"] == 0
    assert math.isnan(found["gate_mean_on_numbers"]) and math.isnan(found["dag_norm"])


@pytest.mark.slow
@pytest.mark.parametrize("system", ["searched", "sequence"])
def test_a_compiled_model_is_not_compiled_again(tiny_gpt, system):
    model = tiny_gpt(separator_id=SEPARATOR, **SYSTEMS[system]).train()
    watch = watch_random(model, 4, 16)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager")
    compiled(watch.idx, watch.targets)[1].backward()
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    for _ in range(2):
        assert observe(model, watch)["gradient/final_hidden"] > 0
        compiled(watch.idx, watch.targets)[1].backward()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs > 0
