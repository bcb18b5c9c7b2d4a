"""The DAG over the numbers of the text: plans, offers, causality, decoding, exactness, and learning.

Legend as in dag_model.py: B batch, T tokens, K inputs, D steps, S = K + D slots, O operations, N plans.
"""

import itertools
import os
import random
import subprocess
import sys
from decimal import Context, Decimal
from fractions import Fraction

import pytest
import torch
import torch.nn.functional as F
from conftest import GLUED, ROOT, SEPARATOR, VOCABULARY, random_text

from dag import exact_arithmetic, plan_loss
from dag.plan_loss import compared_enough, format_weights
from dag.plan_search import Plans, run
from dag.proposals import NOTHING
from dag_model import GPT, DAGPlanPredictor, GPTConfig
from gpt.kv_cache import KVCache
from gpt.model_config import CHOICES_BY_INPUTS
from inference.engine import generate

NAMES = list(exact_arithmetic.OPERATIONS)
CHAR_IDS = {char.decode(): id for id, char in enumerate(VOCABULARY)}


def tokens(text: str) -> list[int]:
    return [CHAR_IDS[char] for char in text]


def text_of(ids, vocabulary=VOCABULARY) -> str:
    return b"".join(vocabulary[id] for id in ids).decode()


# the planner

K, D = 3, 4


@pytest.fixture
def planner(tiny_gpt) -> DAGPlanPredictor:
    return tiny_gpt(dag_num_inputs=K, dag_depth=D, std=0.5).dag.planner


def situation(planner: DAGPlanPredictor, N: int):
    """Random contexts and slot keys, and some of the inputs there, the newest always."""
    E = planner.context.out_features
    inputs = torch.arange(planner.num_inputs) < torch.randint(1, planner.num_inputs + 1, (N, 1))
    return torch.randn(N, E), torch.randn(N, planner.num_slots, E), inputs


@pytest.mark.parametrize("explore", [None, 0.0, 0.5])
@torch.no_grad()
def test_a_plan_has_the_probability_it_was_made_with(planner, explore):
    known = situation(planner, 300)
    plans, log_p, formats = planner(*known, explore=explore)
    again, formats_again = planner.log_probability(*known, plans)
    torch.testing.assert_close(again, log_p, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(formats_again, formats, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(formats.exp().sum(-1), torch.ones(300))
    lengths = (plans.operation != planner.end).sum(1)
    assert lengths.unique().numel() > 2, "plans of one length prove little"


@torch.no_grad()
def test_the_probabilities_of_all_plans_sum_to_1(tiny_gpt):
    names, K, D = ["add", "log", "identity"], 2, 2
    planner = tiny_gpt(dag_num_inputs=K, dag_depth=D, dag_ops=",".join(names), std=0.5).dag.planner
    context, keys, _ = situation(planner, 1)
    for present in ([True, False], [True, True]):

        def choices(step):
            slots = [slot for slot in range(K) if present[slot]] + list(range(K, K + step))
            for name, a in itertools.product(names, slots):
                for b in slots if exact_arithmetic.OPERATIONS[name].binary else [0]:
                    yield names.index(name), a, b

        plans = []
        for first in choices(0):
            passed_on = [(planner.end, K, 0)]
            plans += [(first, second) for second in (passed_on if first[0] == planner.end else choices(1))]
        plans = Plans(*(part.contiguous() for part in torch.tensor(plans).unbind(-1)))
        N = len(plans.operation)
        known = context.expand(N, -1), keys.expand(N, -1, -1), torch.tensor([present]).expand(N, -1)
        assert planner.log_probability(*known, plans)[0].exp().sum().item() == pytest.approx(1, abs=1e-5)


@torch.no_grad()
def test_plans_are_drawn_as_often_as_they_are_probable(tiny_gpt):
    planner = tiny_gpt(dag_num_inputs=2, dag_depth=2, dag_ops="add,identity", std=0.5).dag.planner
    N = 4000
    context, keys, inputs = (part.expand(N, *part.shape[1:]) for part in situation(planner, 1))
    known = context, keys, torch.ones_like(inputs)
    plans, log_p, _ = planner(*known, explore=0.0)
    which = torch.cat(tuple(plans), dim=1).unique(dim=0, return_inverse=True)[1]
    for plan in which.unique():
        count, p = (which == plan).sum().item(), log_p[which == plan][0].exp().item()
        assert abs(count - N * p) < 4 * (N * p * (1 - p)) ** 0.5 + 4
    assert which.unique().numel() > 4


@torch.no_grad()
def test_what_is_not_there_is_never_chosen(planner):
    N = 500
    known = situation(planner, N)
    plans, _, _ = planner(*known, explore=0.9)
    visible = torch.zeros(N, D, K + D, dtype=torch.bool)
    visible[..., :K] = known[-1][:, None]
    visible[..., K:] = torch.ones(D, D, dtype=torch.bool).tril(-1)
    binary = torch.tensor([exact_arithmetic.OPERATIONS[name].binary for name in NAMES])[plans.operation]
    chosen = (plans.operation == planner.end).cumsum(1) <= 1
    for operand, matters in ((plans.operand1, chosen), (plans.operand2, chosen & binary)):
        assert visible.gather(2, operand[..., None]).squeeze(2)[matters].all()
        assert operand[matters].unique().numel() == K + D - 1  # and all others are, some time
    assert not plans.operand2[~binary].any()


@torch.no_grad()
def test_identity_ends_a_plan_and_its_result_is_passed_on(planner):
    plans, _, _ = planner(*situation(planner, 300), explore=0.5)
    over = (plans.operation == planner.end).cumsum(1) > 1
    assert over.any() and (plans.operation[over] == planner.end).all()
    assert torch.equal(plans.operand1[over], (K - 1 + torch.arange(D)).expand(300, D)[over])


@torch.no_grad()
def test_the_canonical_form_of_a_plan_computes_the_same(planner):
    known = situation(planner, 500)
    plans, _, _ = planner(*known, explore=0.9)
    canonical = planner.canonical(plans)
    values = torch.randint(-3, 9, (500, K)).double().masked_fill(~known[-1], torch.nan)
    torch.testing.assert_close(
        run(canonical, values, NAMES), run(plans, values, NAMES), rtol=0, atol=0, equal_nan=True
    )
    assert not torch.equal(canonical.operand1, plans.operand1)
    commutative = torch.tensor([exact_arithmetic.OPERATIONS[name].commutative for name in NAMES])[
        plans.operation
    ]
    assert (canonical.operand1 <= canonical.operand2)[commutative].all()
    assert torch.equal(canonical.operand1[~commutative], plans.operand1[~commutative])


# texts


def talker(tiny_gpt, vocabulary=VOCABULARY, **fields) -> GPT:
    """A model with large random weights that plans wherever it may, and says what it is offered."""
    defaults = dict(
        block_size=40,
        n_embd=36,
        separator_id=SEPARATOR,
        dag_num_inputs=4,
        dag_ops="add,subtract,divide,identity",
    )
    model = tiny_gpt(vocabulary=vocabulary, **defaults | fields)
    with torch.no_grad():
        model.transformer.wte.weight.copy_(torch.eye(len(vocabulary), 36))
        model.dag.wanted.bias.fill_(5.0)
        model.dag.trusted.bias.fill_(9.0)
        model.dag.dag_scale.fill_(30.0)
        for name in ("exact", "fraction"):
            model.dag.planner.format_score.bias[exact_arithmetic.FORMATS.index(name)] = 5.0
    return model


@pytest.fixture(params=["char", "glued"])
def speaker(request, tiny_gpt) -> GPT:
    return talker(tiny_gpt, {"char": VOCABULARY, "glued": GLUED}[request.param])


def own_texts(model: GPT, rows: int, length: int) -> torch.Tensor:
    """(rows, length) tokens: random ones, then what the model makes of them; it follows what it offers."""
    prompts = random_text(rows, length // 2, vocabulary=model.dag.lexer.vocabulary)
    said = generate(model, prompts.tolist(), length - length // 2, cached=False, temperature=0.7, seed=0)
    return torch.cat([prompts, torch.tensor(said)], dim=1)


@torch.no_grad()
def test_what_follows_never_changes_logits_nor_offers(speaker):
    idx = own_texts(speaker, 24, 30)
    logits, _ = speaker(idx)
    state = speaker.inspect(idx)
    assert len(state.row) > 100 and (state.offers.symbol != NOTHING).sum() > 100
    for t in range(1, 30):
        others = torch.cat([idx[:, :t], random_text(24, 30 - t)], dim=1)
        for continued in (idx[:, :t], others):
            torch.testing.assert_close(speaker(continued)[0][:, :t], logits[:, :t], rtol=0, atol=1e-4)
            assert torch.equal(speaker.inspect(continued).offers.symbol[:, :t], state.offers.symbol[:, :t])


@torch.no_grad()
def test_decoding_goes_on_from_any_point_of_a_text(speaker):
    """Prompts end within numbers, within what is offered, behind a separator, a sign, a point or a bar."""
    B, T = 128, 30
    idx, lengths = own_texts(speaker, B, T), torch.randint(1, T - 8, (B,))
    for n, char in enumerate("\n-./"):
        idx[4 * n : 4 * n + 4, 9], lengths[4 * n : 4 * n + 4] = CHAR_IDS[char], 10
    expected, state = speaker(idx)[0], speaker.inspect(idx)
    prompts = torch.where(torch.arange(T) < lengths[:, None], idx, random_text(B, T))[:, : int(lengths.max())]
    cache, rows = KVCache(B, speaker.config.block_size), torch.arange(B)
    hidden, _ = speaker.hidden_states(prompts, cache)
    cache.commit(lengths)
    torch.testing.assert_close(
        speaker.lm_head(hidden)[rows, lengths - 1], expected[rows, lengths - 1], rtol=0, atol=1e-4
    )
    for step in range(8):
        at = lengths + step
        hidden, _ = speaker.hidden_states(idx[rows, at][:, None], cache)
        cache.commit()
        torch.testing.assert_close(speaker.lm_head(hidden)[:, 0], expected[rows, at], rtol=0, atol=1e-4)

    last, numerals = lengths - 1, speaker.dag.lexer(idx)
    plan, position = state.offers.plan[rows, last], torch.cat([state.position, torch.tensor([T])])
    offered = state.offers.symbol[rows, last] != NOTHING
    assert (numerals.offset[rows, last] > 0).sum() > 5, "no prompt ends within a number"
    assert (offered & (position[plan] < last)).sum() > 5, "no prompt ends within an offered number"


@pytest.mark.parametrize("temperature", [0, 0.7])
def test_cached_generation_equals_uncached(speaker, temperature):
    prompts = [row[: 1 + length % 20] for length, row in enumerate(own_texts(speaker, 24, 20).tolist())]
    fast, slow = (
        generate(speaker, prompts, 30, temperature=temperature, seed=5, cached=c) for c in (True, False)
    )
    assert fast == slow
    speaker.silent = True
    assert generate(speaker, prompts, 30, temperature=temperature, seed=5) != fast, "nothing was offered"


def test_fractions_are_offered_over_their_bar(tiny_gpt, monkeypatch):
    model = talker(tiny_gpt)
    forced(monkeypatch, model, [("divide", 1, 0)], "fraction")
    prompts = [
        tokens(f"{a}*{b}={start}")
        for a, b, start in [(7, 12, ""), (7, 12, "7"), (7, 12, "7/"), (17, 5, "17/")]
    ]
    fast, slow = (generate(model, prompts, 8, temperature=0, cached=cached) for cached in (True, False))
    assert fast == slow
    for said, expected in zip(fast, ("7/12", "/12", "12", "5")):
        assert text_of(said).startswith(expected)


@torch.no_grad()
def test_training_offers_what_evaluation_does_wherever_the_gate_is_open(speaker):
    idx = random_text(24, 30)
    speaker.silent = True
    wishes = F.linear(speaker.hidden_states(idx)[0], speaker.dag.wanted.weight)
    speaker.dag.wanted.bias.copy_(torch.tensor(speaker.config.dag_min_gate_to_plan).logit() - wishes.median())
    state = speaker.inspect(idx)
    _, in_training = speaker.train().hidden_states(idx, targets=random_text(24, 30))
    offered = state.offers.symbol != NOTHING
    assert (
        torch.equal(in_training.offers.symbol[offered], state.offers.symbol[offered]) and offered.sum() > 20
    )
    torch.testing.assert_close(in_training.gate[offered], state.gate[offered])
    assert len(state.row) < len(in_training.row)


@torch.no_grad()
def test_a_shut_gate_plans_nothing(speaker):
    idx = random_text(4, 30)
    speaker.dag.wanted.weight.zero_()
    least = speaker.config.dag_min_gate_to_plan
    for openness, plans in ((least + 0.01, True), (least - 0.01, False)):
        speaker.dag.wanted.bias.fill_(torch.tensor(openness).logit())
        state = speaker.inspect(idx)
        assert (len(state.row) > 0) == plans
    assert not state.gate.any() and torch.equal(state.offers.symbol, torch.full((4, 30), NOTHING))


# exactness


def forced(monkeypatch, model: GPT, steps: list[tuple], format: str) -> None:
    """Whatever the model sees, it plans these steps (operation, slot, slot)."""
    ending = [
        ("identity", model.dag.planner.num_inputs + s, 0)
        for s in range(len(steps) - 1, model.config.dag_depth - 1)
    ]
    plan = [(model.dag.names.index(name), a, b) for name, a, b in [*steps, *ending]]

    def forward(context, *_, **__):
        formats = torch.full((len(context), len(exact_arithmetic.FORMATS)), -torch.inf)
        formats[:, exact_arithmetic.FORMATS.index(format)] = 0.0
        plans = torch.tensor([plan]).expand(len(context), -1, -1)
        return Plans(*(part.contiguous() for part in plans.unbind(-1))), torch.zeros(len(context)), formats

    monkeypatch.setattr(model.dag.planner, "forward", forward)


def random_number() -> str:
    """1 to 40 digits, half of them with a point, a third of them with a sign."""
    whole = "".join(random.choices("0123456789", k=random.randint(1, 40)))
    places = random.choice([0, 0, 1, 3, len(whole) - 1])
    text = f"{whole[:-places]}.{whole[-places:]}" if 0 < places < len(whole) else whole
    return random.choice(["", "", "-"]) + text


def decimal_of(name: str, a: str, b: str) -> str:
    number = getattr(Context(prec=200), name)(Decimal(a), Decimal(b))
    text = f"{number:f}"
    text = text.rstrip("0").rstrip(".") if "." in text else text
    return text if number else "0"


def fraction_of(name: str, a: str, b: str) -> str:
    return str(Fraction(a) / Fraction(b))


@pytest.mark.parametrize(
    "name, format, meaning",
    [
        ("add", "exact", decimal_of),
        ("subtract", "exact", decimal_of),
        ("multiply", "exact", decimal_of),
        ("divide", "fraction", fraction_of),
    ],
)
def test_answers_are_exact_at_any_length(tiny_gpt, monkeypatch, name, format, meaning):
    model = talker(tiny_gpt, block_size=200, dag_ops="add,subtract,multiply,divide,identity", dag_digits=100)
    forced(monkeypatch, model, [(name, 1, 0)], format)  # the newest number is in slot 0
    pairs = [(random_number(), random_number()) for _ in range(40)] + [
        ("2", "3"),
        ("-0.50", "0.25"),
        ("0", "-1"),
    ]
    pairs = [(a, b) for a, b in pairs if Fraction(b)]
    expected = [meaning(name, a, b) for a, b in pairs]
    assert max(map(len, expected)) > 40 and any("-" in text for text in expected)
    prompts = [tokens(f"{a}*{b}=") for a, b in pairs]
    longest = max(map(len, expected))
    for said, text in zip(generate(model, prompts, longest, temperature=0), expected):
        assert text_of(said)[: len(text)] == text

    answered = [prompt + tokens(text) for prompt, text in zip(prompts, expected)]
    length = max(map(len, answered))
    idx = torch.tensor([row + [SEPARATOR] * (length - len(row)) for row in answered])
    with torch.no_grad():
        offers = model.inspect(idx).offers
    for symbols, prompt, text in zip(offers.symbol.tolist(), prompts, expected):
        first = len(prompt) - 1
        assert symbols[first : first + len(text) + 1] == [*tokens(text), len(VOCABULARY)]  # and it is over


def test_a_chain_of_steps(tiny_gpt, monkeypatch):
    model = talker(tiny_gpt, dag_ops="add,multiply,identity", dag_num_inputs=3)
    forced(monkeypatch, model, [("multiply", 0, 1), ("add", 2, 3)], "exact")
    (said,) = generate(model, [tokens("12+7*3=")], 2, temperature=0)
    assert text_of(said) == "33"


@pytest.mark.parametrize(
    "steps", [[("divide", 1, 0)], [("divide", 1, 0), ("max", 0, 3)], [("log", 0, 0)]], ids=str
)
@torch.no_grad()
def test_a_plan_without_a_result_offers_nothing(tiny_gpt, monkeypatch, steps):
    model = talker(tiny_gpt, dag_ops="divide,log,max,identity", dag_num_inputs=3)
    forced(monkeypatch, model, steps, "fraction")
    state = model.inspect(torch.tensor([tokens("7 0="), tokens("7 2=")]))
    invalid, valid = (state.position == 3).nonzero().flatten().tolist()
    assert state.written[invalid] is None and state.written[valid] is not None
    assert state.offers.symbol[0, 3] == NOTHING and not state.gate[0, 3].any()
    assert state.gate[1, 3] > 0.9


# learning


def sums(rows: int, length: int = 40) -> torch.Tensor:
    """Rows of lines like "3742+453=4195", cut at a length."""
    lines = "".join(
        "{}+{}={}\n".format(a, b, a + b) for a, b in torch.randint(10**4, (rows * length // 5, 2)).tolist()
    )
    return torch.tensor(tokens(lines[: rows * length])).view(rows, length)


def fresh(**fields) -> GPT:
    """A small model with its real initialisation, in training mode."""
    sizes = dict(
        block_size=39, vocab_size=len(VOCABULARY), n_layer=1, n_head=2, n_embd=48, separator_id=SEPARATOR
    )
    simple = dict(dag_depth=1, dag_ops="add,subtract,multiply,identity", dag_num_inputs=3, dag_leaves=2)
    return GPT(GPTConfig(**sizes | simple | fields), VOCABULARY)


LEARNERS = [name for name in CHOICES_BY_INPUTS["numbers"]["dag_plan"] if name in ("searched", "sampled")]


@pytest.mark.parametrize("plan", LEARNERS)
def test_sums_are_learned_from_text_alone(plan):
    model = fresh(dag_plan=plan)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    losses = []
    for _ in range(80):
        rows = sums(16)
        losses.append(model(rows[:, :-1], rows[:, 1:])[1])
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < 0.4 * losses[0]
    model.eval()
    pairs = torch.randint(10**4, (20, 2)).tolist()  # of 50 million that there are
    answers = generate(model, [tokens(f"{a}+{b}=") for a, b in pairs], 8, temperature=0, stop=[[SEPARATOR]])
    assert sum(text_of(said) == f"{a + b}\n" for said, (a, b) in zip(answers, pairs)) >= 18
    model.silent = True
    answers = generate(model, [tokens(f"{a}+{b}=") for a, b in pairs], 8, temperature=0, stop=[[SEPARATOR]])
    assert (
        sum(text_of(said) == f"{a + b}\n" for said, (a, b) in zip(answers, pairs)) <= 1
    )  # it is the DAG's work


def test_the_loss_is_minus_the_log_probability_of_all_that_explains_the_text(monkeypatch):
    all_count = dict(dag_strict_probability=0.0, dag_other_format_weight=1.0)
    model = fresh(dag_ops="add,multiply,identity", dag_num_inputs=2, **all_count)
    idx = torch.tensor([tokens("2 2=4 ")])
    forced(
        monkeypatch, model, [("identity", 0, 0)], "exact"
    )  # right for the second number, wrong for the third
    planner, asked = model.dag.planner, []
    probability = planner.log_probability
    monkeypatch.setattr(
        planner, "log_probability", lambda *args: asked.append((args[-1], probability(*args))) or asked[0][1]
    )
    with torch.no_grad():
        model.dag.wanted.bias.fill_(9.0)  # where the gate is open, a plan is always searched for
    _, state = model.hidden_states(idx[:, :-1], targets=idx[:, 1:])

    (plans, (log_p, formats)) = asked[0]
    add, multiply, identity = range(3)
    term = {}
    for plan, p, q in zip(torch.cat(tuple(plans), dim=1).tolist(), log_p, formats):
        term[tuple(plan)] = p + q[exact_arithmetic.matching_formats((4, 1), "4")].logsumexp(0)
    assert term.keys() == {(identity, 0, 0), (add, 0, 1), (multiply, 0, 1)}
    second, third = term[identity, 0, 0], torch.logaddexp(term[add, 0, 1], term[multiply, 0, 1])
    assert state.plan_loss.item() == pytest.approx(-(second + third).item() / 2, rel=1e-5)


@pytest.fixture
def comparing() -> GPT:
    return fresh(dag_ops="add,max,min,identity", dag_num_inputs=3, dag_depth=2)


def plans_of(model: GPT, *steps: list[tuple]) -> Plans:
    """Of names and slots, ended by identity."""
    planner, names = model.dag.planner, model.dag.names
    ends = [("identity", planner.num_inputs + n - 1, 0) for n in range(planner.depth)]
    rows = [some + ends[len(some) :] for some in steps]
    rows = torch.tensor([[(names.index(name), a, b) for name, a, b in row] for row in rows])
    return Plans(*rows.unbind(-1))


COPY, LARGER = [("identity", 1, 0)], [("max", 0, 1)]
LARGEST, MIDDLE = [("max", 0, 1), ("max", 2, 3)], [("min", 0, 1), ("max", 2, 3)]
SUM, LARGER_SUM = [("add", 0, 1)], [("add", 0, 1), ("max", 2, 3)]


def test_only_comparisons_are_counted(comparing):
    plans = plans_of(comparing, COPY, LARGER, LARGEST, MIDDLE, SUM, LARGER_SUM)
    assert comparing.dag.planner.comparisons(plans).tolist() == [0, 1, 2, 2, -1, -1]


def test_of_copies_and_comparisons_the_strict_take_those_that_compare_the_most(comparing):
    number = torch.tensor([0, 0, 0, 1, 2, 2, 2])
    hits = plans_of(comparing, COPY, LARGER, LARGEST, COPY, COPY, LARGER, LARGER_SUM)
    compared = comparing.dag.planner.comparisons(hits)
    strict = compared_enough(compared, number, torch.ones(4, dtype=torch.bool))
    assert strict.tolist() == [False, False, True, True, False, True, True]
    assert compared_enough(compared, number, torch.zeros(4, dtype=torch.bool)).all()


@pytest.mark.parametrize("fitting, learned", [(1.0, "exact"), (0.85, "digits_3")])
def test_formats_that_round_win_only_where_numbers_have_to_be_rounded(fitting, learned):
    """To three digits 42 is 42, and 4242 is 4240: what is learned where so many need no rounding."""
    share, right = (
        torch.tensor([fitting, 1 - fitting]),
        torch.zeros(2, len(exact_arithmetic.FORMATS), dtype=torch.bool),
    )
    for row, (number, text) in zip(right, ((42, "42"), (4242, "4240"))):
        row[exact_arithmetic.matching_formats((number, 1), text)] = True
    scores = torch.zeros(len(exact_arithmetic.FORMATS))
    scores[plan_loss.EXACT] = -1.0
    scores.requires_grad_()
    optimizer = torch.optim.Adam([scores], lr=0.1)
    for _ in range(300):
        loss = -share @ (scores.log_softmax(0) + format_weights(right, 0.9)).logsumexp(1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert exact_arithmetic.FORMATS[scores.argmax()] == learned


def test_where_all_formats_are_right_numbers_are_written_exactly():
    """Those of training have at most five digits, as have those that DAGs to so many digits write."""
    model = fresh(dag_ops="add,identity", dag_num_inputs=2, block_size=79)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(60):
        rows = sums(16)
        model(rows[:, :-1], rows[:, 1:])[1].backward()
        optimizer.step()
        optimizer.zero_grad()
    pairs = [(random.randrange(10**30, 10**31), random.randrange(10**30, 10**31)) for _ in range(10)]
    idx = torch.tensor([tokens(f"{a}+{b}=") for a, b in pairs])
    state = model.eval().inspect(idx)
    assert set(state.format[state.position == idx.size(1) - 1].tolist()) == {
        exact_arithmetic.FORMATS.index("exact")
    }


def test_the_larger_of_two_numbers_is_computed_not_copied():
    """Even where one look at the first digit says which one to copy."""
    model = fresh(dag_ops="max,identity", dag_num_inputs=2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    pairs = torch.randint(1000, 10**4, (60, 32, 2)).tolist()
    for some in pairs:
        lines = [tokens(f"{a} {b}={max(a, b)}\n") for a, b in some]
        rows = torch.tensor(lines)
        model(rows[:, :-1], rows[:, 1:])[1].backward()
        optimizer.step()
        optimizer.zero_grad()
    idx = torch.tensor([tokens(f"{a} {b}=") for a, b in torch.randint(1000, 10**4, (20, 2)).tolist()])
    state = model.eval().inspect(idx)
    plans = state.plans[(state.position == idx.size(1) - 1).nonzero().squeeze(1)]
    assert len(plans.operation) == 20 and (plans.operation == model.dag.names.index("max")).all()


@pytest.mark.parametrize("plan", LEARNERS)
def test_plans_learn_from_their_loss_and_the_fold_from_the_text(plan):
    model, rows = fresh(dag_plan=plan, dag_depth=2), sums(16)
    hidden, state = model.hidden_states(rows[:, :-1], targets=rows[:, 1:])
    loss = F.cross_entropy(model.lm_head(hidden).flatten(0, 1), rows[:, 1:].flatten())
    names, parameters = zip(*model.named_parameters())

    def learns_from(loss) -> set[str]:
        gradients = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
        return {name for name, gradient in zip(names, gradients) if gradient is not None and gradient.any()}

    planner = {name for name in names if name.startswith("dag.planner.")}
    fold = {"dag.wanted.weight", "dag.wanted.bias", "dag.trusted.weight", "dag.trusted.bias", "dag.dag_scale"}
    assert state.plan_loss > 0
    assert learns_from(state.plan_loss) >= planner | {"transformer.wte.weight", "dag.near_digit.weight"}
    assert not learns_from(state.plan_loss) & (fold | {"dag.over_vector"})
    assert learns_from(loss) >= fold and not learns_from(loss) & planner
    assert model(rows[:, :-1], rows[:, 1:])[1] > loss  # the text's and the planner's
    model.eval()
    assert model(rows[:, :-1], rows[:, 1:])[1].item() == pytest.approx(
        loss.item(), rel=0.05
    )  # the text's alone


@pytest.mark.parametrize("plan", LEARNERS)
@pytest.mark.parametrize("text", ["abc", "1 7777 ", "2=", "7 8 9 ", "1.2.3.4.5"])
def test_every_parameter_has_a_gradient_whatever_the_text(plan, text):
    """Where there is nothing to learn for a part it is zero: None would keep other processes waiting."""
    model, idx = fresh(dag_plan=plan, dag_ops="add,identity"), torch.tensor([tokens(text)])
    model(idx[:, :-1], idx[:, 1:])[1].backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name


@pytest.mark.parametrize("plan", LEARNERS)
@pytest.mark.parametrize("characters", ["01 =", "019.-/= ", "0123456789+-*/=(). \na"])
def test_loss_and_gradients_are_finite_whatever_the_numbers(plan, characters):
    """Zeros, ones and nines under all nine operations: what has no value, and what is beyond all bounds."""
    model = fresh(dag_plan=plan, dag_ops="all", dag_depth=4)
    ids = torch.tensor(tokens(characters))
    idx = ids[torch.randint(len(ids), (64, 40))]
    targets = idx[:, 1:].clone()
    targets[::2, -1] = -1
    loss = model(idx[:, :-1], targets)[1]
    loss.backward()
    assert loss.isfinite()
    for name, parameter in model.named_parameters():
        assert parameter.grad.isfinite().all(), name


TWO_PROCESSES = """
import sys
sys.path[:0] = [{root!r}, {tests!r}, {here!r}]
import torch
import torch.distributed as dist
from test_dag import fresh, sums, tokens
dist.init_process_group("gloo")
torch.manual_seed(0)
model = torch.nn.parallel.DistributedDataParallel(fresh(dag_depth=2))
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
start = torch.cat([p.detach().flatten() for p in model.parameters()])
for step in range(3):
    rows = sums(4) if (dist.get_rank() + step) % 2 else torch.tensor([tokens("abc def")])
    model(rows[:, :-1], rows[:, 1:])[1].backward()
    optimizer.step()
    optimizer.zero_grad()
ours = torch.cat([p.detach().flatten() for p in model.parameters()])
theirs = [torch.empty_like(ours) for _ in range(2)]
dist.all_gather(theirs, ours)
assert torch.equal(*theirs) and (ours != start).float().mean() > 0.9
dist.barrier()
del model
dist.destroy_process_group()
"""


def test_two_processes_stay_equal_where_one_reads_no_numbers(tmp_path):
    script = tmp_path / "train.py"
    script.write_text(
        TWO_PROCESSES.format(root=str(ROOT), tests=str(ROOT / "tests"), here=str(ROOT / "tests" / "dag"))
    )
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node=2",
        str(script),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
