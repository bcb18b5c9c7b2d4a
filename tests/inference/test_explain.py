"""inference/explain.py and inference/token_stats.py against the model itself, and against brute force."""

import importlib.util
import json
import random
import re
from dataclasses import asdict, replace
from fractions import Fraction
from itertools import product

import pytest
import torch
from conftest import DENSE, ROOT, SEPARATOR, VOCABULARY, random_text

from dag import exact_arithmetic
from dag.plan_search import Plans
from data.tokenizer import CharTokenizer
from inference import engine
from inference.explain import explain, likeliest
from inference.token_stats import choices

TOKENIZER = CharTokenizer(b"".join(VOCABULARY).decode())
NUMBER = re.compile(r"\d+(\.\d+)?")
ARMS = {
    "searched": dict(),
    "sampled": dict(dag_plan="sampled"),
    "learned": dict(dag_values="learned"),
    "soft": dict(dag_plan="soft"),
    "straight_through": dict(dag_plan="straight_through", dag_values="learned"),
}


@pytest.fixture(scope="module")
def lines():
    """Of every kind that the arithmetic set has, as it is generated."""
    path = ROOT / "data" / "arithmetic" / "prepare.py"
    spec = importlib.util.spec_from_file_location("prepare_arithmetic", path)
    prepare = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(prepare)
    settings, rng = prepare.Settings(), random.Random(0)
    kinds = prepare.interpolation(settings) | prepare.extrapolation(settings, prepare.VAL_TEMPLATES)
    drawn = [draw(rng).line + "\n" for draw in kinds.values() for _ in range(4)]
    return CharTokenizer(prepare.ALPHABET), drawn


@pytest.fixture
def talkative(tiny_gpt):
    """A tiny model that plans wherever a number may open."""

    def build(**fields):
        settings = dict(block_size=64, separator_id=SEPARATOR, dag_depth=3, dag_num_inputs=4)
        model = tiny_gpt(**(settings | fields))
        torch.manual_seed(2)  # with these weights it varies its plans
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.normal_(std=0.3)
            model.dag.wanted.bias.fill_(5.0)
        return model

    return build


def all_plans(names: list[str], K: int, D: int, inputs: list[bool]) -> list[tuple]:
    """By the definition in dag/planner.py: operations and slots of D steps, what has ended passes its result on."""

    def grow(steps):
        s = len(steps)
        if s == D:
            return [steps]
        if any(name == "identity" for name, *_ in steps):
            return grow((*steps, ("identity", K - 1 + s, 0)))
        slots = [k for k in range(K) if inputs[k]] + [K + r for r in range(s)]
        made = []
        for name in names:
            seconds = slots if exact_arithmetic.OPERATIONS[name].binary else [0]
            made += [plan for a, b in product(slots, seconds) for plan in grow((*steps, (name, a, b)))]
        return made

    return grow(())


@pytest.mark.parametrize("text", ["12+7=", "12=", "a 7 "])
def test_the_beam_finds_what_brute_force_finds(tiny_gpt, text):
    model = tiny_gpt(dag_depth=2, dag_num_inputs=2, dag_ops="add,identity,log")
    torch.nn.init.constant_(model.dag.wanted.bias, 5.0)
    state = model.inspect(torch.tensor([TOKENIZER.encode(text)]))
    planner, sight = model.dag.planner, state.sight[torch.tensor([len(state.row) - 1])]
    names, inputs = model.dag.names, sight.inputs[0].tolist()
    every = all_plans(names, 2, 2, inputs)
    assert len(every) == (92 if all(inputs) else (1 + 1) * (4 + 2 + 2) + 1)
    plans = Plans(*torch.tensor([[[names.index(n), a, b] for n, a, b in plan] for plan in every]).unbind(-1))
    known = *planner.read(sight.hidden, sight.readers), sight.inputs
    log_p, formats = planner.log_probability(
        *(part.expand(len(every), *part.shape[1:]) for part in known), plans
    )
    assert log_p.exp().sum().item() == pytest.approx(1, abs=1e-5)  # these are all that there are
    best, format = formats.max(-1)
    expected = {plan: (p, f) for plan, p, f in zip(every, (log_p + best).tolist(), format.tolist())}

    found, found_log_p, found_format = likeliest(planner, *known, 500)
    steps = [
        tuple((names[operation], a, b) for operation, a, b in plan)
        for plan in torch.stack(tuple(found), dim=-1).tolist()
    ]
    assert sorted(steps) == sorted(every)
    assert found_log_p.tolist() == sorted(found_log_p.tolist(), reverse=True)
    for plan, p, f in zip(steps, found_log_p.tolist(), found_format.tolist()):
        assert (p, f) == (pytest.approx(expected[plan][0], abs=1e-4), expected[plan][1])
    few = likeliest(planner, *known, 4)[1].tolist()
    assert len(few) == 4 and few[0] == pytest.approx(found_log_p[0].item(), abs=1e-4)


@pytest.mark.parametrize("arm", ARMS)
def test_a_look_says_what_the_model_does(talkative, arm):
    model = talkative(**ARMS[arm])
    planned = 0
    for tokens in random_text(10, 40).tolist():
        look, state = explain(model, TOKENIZER, tokens), model.inspect(torch.tensor([tokens]))
        assert look.gates == tuple(state.gate[0, :, 0].tolist())
        for thought in look.thoughts:
            (n,) = (state.position == thought.position).nonzero()[0].tolist()
            assert thought.first == thought.position + 1
            assert TOKENIZER.decode(tokens[thought.first : thought.last + 1]) == thought.text
            assert (thought.written, exact_arithmetic.FORMATS.index(thought.format)) == (
                state.written[n],
                state.format[n],
            )
            assert thought.probability == pytest.approx(state.log_probability[n].exp().item())
            assert thought.gate == state.gate[0, thought.position, 0]
            assert thought.expression.endswith(f" = {thought.written or 'nothing'}")
            assert thought.followed == (thought.text == thought.written)
            planned += 1
        for number in look.unplanned:
            assert number.first - 1 not in state.position
        json.loads(json.dumps(asdict(look), allow_nan=False))
    assert planned > 20


def test_every_number_is_explained_once(talkative, lines):
    tokenizer, lines = lines
    model = talkative(vocabulary=tokenizer.vocabulary, separator_id=tokenizer.separator_id, block_size=128)
    for line in lines:
        look = explain(model, tokenizer, tokenizer.encode(line))
        spans = sorted((n.first, n.last + 1) for n in [*look.thoughts, *look.unplanned])
        digits = [(span[0] + line[span[0]].startswith("-"), span[1]) for span in spans]
        assert digits == [match.span() for match in NUMBER.finditer(line)]
        (first,) = (number for number in look.unplanned if number.reason == "no number before it")
        assert first.first == spans[0][0]


def test_a_shut_gate_is_given_as_the_reason(talkative):
    model = talkative()
    torch.nn.init.constant_(model.dag.wanted.bias, -1000.0)
    look = explain(model, TOKENIZER, TOKENIZER.encode("1+2=3"))
    assert [number.reason for number in look.unplanned] == ["no number before it"] + ["the gate was shut"] * 2
    assert not look.thoughts


def test_inputs_spell_their_values_the_newest_first(talkative, lines):
    tokenizer, lines = lines
    model = talkative(vocabulary=tokenizer.vocabulary, separator_id=tokenizer.separator_id, block_size=128)
    for line in lines:
        tokens = tokenizer.encode(line)
        for thought in explain(model, tokenizer, tokens).thoughts:
            spelled = [tokenizer.decode(tokens[n.first : n.last + 1]) for n in thought.inputs]
            assert [n.value for n in thought.inputs] == [
                exact_arithmetic.write(exact_arithmetic.read(text), "exact") for text in spelled
            ]
            before = [match[0] for match in NUMBER.finditer(line[: thought.first])]
            assert [text.lstrip("-") for text in spelled] == before[::-1][:4]
            assert [n.slot for n in thought.inputs] == list(range(len(spelled)))


def test_an_expression_evaluates_to_what_is_written(talkative):
    model = talkative(dag_ops="add,subtract,multiply,identity", dag_digits=100)
    lengths = set()
    for tokens in random_text(20, 40).tolist():
        for thought in explain(model, TOKENIZER, tokens).thoughts:
            formula = thought.expression.rpartition(" = ")[0]
            while " = " in formula:  # the values of its parts, which each part must have
                part = re.search(r"\(([^()]*) = ([^()]*)\)", formula)
                assert evaluated(part[1]) == Fraction(part[2])
                formula = formula.replace(part[0], part[2])
            value = evaluated(formula)
            assert (
                exact_arithmetic.write((value.numerator, value.denominator), thought.format, 100)
                == thought.written
            )
            lengths.add(len(thought.steps))
    assert lengths >= {0, 3}


def evaluated(formula: str) -> Fraction:
    a, operation, b = (formula.split(" ") + ["+", "0"])[:3]
    a, b = Fraction(a), Fraction(b)
    return {"+": a + b, "-": a - b, "*": a * b}[operation]


def test_steps_were_chosen_from_their_odds(talkative):
    model = talkative(dag_ops="add,max,identity")
    swapped = 0
    for tokens in random_text(15, 40).tolist():
        state = model.inspect(torch.tensor([tokens]))
        for thought in explain(model, TOKENIZER, tokens).thoughts:
            first_operands = state.plans.operand1[state.position == thought.position][0].tolist()
            values = {number.slot: exact_arithmetic.read(number.value) for number in thought.inputs}
            for step in thought.steps:
                odds = step.operation_probability
                assert max(odds, key=odds.get) == step.operation
                assert set(odds) == set(model.dag.names) and sum(odds.values()) == pytest.approx(1)
                for slot, odds in zip(step.operands, step.operand_probability, strict=True):
                    assert max(odds, key=odds.get) == slot and sum(odds.values()) == pytest.approx(1)
                    assert all(other < step.slot for other in odds)
                if len(step.operands) == 2 and max(step.operands) < 4:
                    assert step.operands[0] >= step.operands[1]  # as in the text, and the newest is slot 0
                swapped += step.operands[0] != first_operands[step.slot - 4]
                values[step.slot] = exact_arithmetic.OPERATIONS[step.operation].apply(
                    *(values[s] for s in step.operands)
                )
                assert (step.value is None) == (values[step.slot] is None)
            assert thought.result == (thought.steps[-1].slot if thought.steps else thought.result) < 7
    assert swapped


def test_alternatives_are_other_plans_in_order(talkative):
    model = talkative(dag_depth=1, dag_ops="add,multiply,identity,log")
    seen = 0
    for n in range(30):
        numbers = random.sample(range(100), 4) if n % 3 else [7, 8, 7, 8]
        line = "{} {} {} {}\n".format(*numbers)
        for thought in explain(model, TOKENIZER, TOKENIZER.encode(line)).thoughts:
            others = thought.alternatives
            odds = [other.probability for other in others]
            assert odds == sorted(odds, reverse=True) and thought.probability + sum(odds) <= 1 + 1e-5
            assert all(other.expression.endswith(f" = {other.written or 'nothing'}") for other in others)
            plans = [thought.expression, *(other.expression for other in others)]
            if n % 3:  # no b + a after a + b
                plans = [" ".join(sorted(plan.split(" "))) for plan in plans]
            assert len(set(plans)) == len(plans)
            seen += len(odds)
    assert seen > 60


def test_only_numbers_from_the_start_on_are_told(talkative):
    model, tokens = talkative(), TOKENIZER.encode("12+7*3=33-1\n")
    look = explain(model, TOKENIZER, tokens)
    everything = [*look.thoughts, *look.unplanned]
    for start in range(len(tokens) + 1):
        later = explain(model, TOKENIZER, tokens, start)
        assert [*later.thoughts, *later.unplanned] == [n for n in everything if n.last >= start]
        assert later.gates == look.gates


@pytest.mark.parametrize("prompt", ["1", "1+2+3+4=10 abcde"])
def test_beyond_the_context_plans_are_those_that_wrote_the_numbers(talkative, monkeypatch, prompt):
    """Against what generation did, step by step."""
    model, prompt, steps = talkative(block_size=16), TOKENIZER.encode(prompt), []

    def spy(idx, *rest, hidden_states=model.hidden_states):
        hidden, state = hidden_states(idx, *rest)
        steps.append((idx.size(1) - 1, state))
        return hidden, state

    with monkeypatch.context() as patch:
        patch.setattr(model, "hidden_states", spy)
        (new,) = engine.generate(model, [prompt], 300, temperature=2.0, seed=1, cached=False)
    look, begins = explain(model, TOKENIZER, prompt + new, start=len(prompt)), set()
    gates = [float(state.gate[0, newest, 0]) for newest, state in steps]
    assert look.gates[len(prompt) - 1 : -1] == pytest.approx(gates, abs=1e-5)
    for number in [*look.thoughts, *look.unplanned]:
        newest, state = steps[number.first - len(prompt)]
        planned = (state.position == newest).nonzero().flatten().tolist()
        assert bool(planned) == (number in look.thoughts)
        for n in planned:
            begins.add(number.position - newest)
            assert number.written == state.written[n]
            assert [item.slot for item in number.inputs] == state.sight.inputs[n].nonzero().flatten().tolist()
            assert all(number.position - newest <= item.first for item in number.inputs)
    assert len(begins) > 5


@pytest.mark.parametrize(
    "text, told",
    [
        ("1 2=--5 ", ["1: before", "2", "-5: sign"]),
        ("1=-- 5", ["1: before", "5"]),
        ("1 3/4 7/", ["1: before", "3/4", "7"]),
        ("1 3/-4", ["1: before", "3", "-4: sign"]),
        ("1 3/4/-5-6 ", ["1: before", "3/4", "-5: sign", "6"]),
        ("1 -", ["1: before"]),
    ],
)
def test_where_a_number_begins_and_ends(talkative, text, told):
    look = explain(talkative(), TOKENIZER, TOKENIZER.encode(text))
    numbers = {number.first: number.text for number in look.thoughts}
    reasons = {"no number before it": "before", "it is behind a sign or a bar": "sign"}
    numbers |= {number.first: f"{number.text}: {reasons[number.reason]}" for number in look.unplanned}
    assert [numbers[first] for first in sorted(numbers)] == told


def test_a_step_has_as_many_digits_as_the_dag(talkative):
    model = talkative(dag_digits=100, dag_ops="multiply,identity")
    tokens = TOKENIZER.encode("1.2345678901234567 7.6543210987654321 1 2 3 4 5 6 7\n")
    thoughts = explain(model, TOKENIZER, tokens).thoughts
    values = {step.value for thought in thoughts for step in thought.steps}
    assert any(len(value) > exact_arithmetic.DIGITS + 1 for value in values)
    assert not any("/" in value for value in values)


def test_a_number_of_the_text_is_written_as_it_is(talkative):
    model, long = talkative(dag_digits=3), "1234567890.125"
    (thought,) = explain(model, TOKENIZER, TOKENIZER.encode(f"{long} 1")).thoughts
    assert [number.value for number in thought.inputs] == [long]


@pytest.mark.parametrize("count", [0, 1, 5])
def test_there_are_as_many_alternatives_as_are_asked_for(talkative, count):
    model, tokens = talkative(), TOKENIZER.encode("12+7*3=33-1\n")
    whole = explain(model, TOKENIZER, tokens, alternatives=5)
    look = explain(model, TOKENIZER, tokens, alternatives=count)
    for thought, same in zip(look.thoughts, whole.thoughts, strict=True):
        assert len(thought.alternatives) <= count and bool(thought.alternatives) == bool(count)
        assert replace(thought, alternatives=()) == replace(same, alternatives=())


@pytest.mark.parametrize("fields", [dict(dag_depth=0), DENSE["token"], DENSE["sequence"]])
def test_without_a_dag_over_numbers_there_are_no_thoughts(tiny_gpt, fields):
    model, tokens = tiny_gpt(**fields), TOKENIZER.encode("12+7=19\n")
    look, state = explain(model, TOKENIZER, tokens), model.inspect(torch.tensor([tokens]))
    assert (look.thoughts, look.unplanned) == ((), ())
    assert look.gates == ((0.0,) * len(tokens) if state is None else tuple(state.gate[0, :, 0].tolist()))
    assert explain(model, TOKENIZER, []).gates == ()


@pytest.mark.parametrize(
    "fields", [dict(dag_depth=0), dict(), DENSE["sequence"]], ids=["plain", "numbers", "dense"]
)
@pytest.mark.parametrize("prompt", ["1", "1+2+3+4=10 abcde"])
def test_choices_are_those_of_generation(tiny_gpt, monkeypatch, fields, prompt):
    """Beyond the context too, where inference/engine.py begins anew with its last half."""
    model, prompt, seen = tiny_gpt(**fields), TOKENIZER.encode(prompt), []

    def spy(logits, *settings, choose=engine.choose):
        seen.append(torch.log_softmax(logits[0].float(), dim=-1))
        return choose(logits, *settings)

    monkeypatch.setattr(engine, "choose", spy)
    (written,) = engine.generate(model, [prompt], 45, temperature=2.0, seed=1)
    told = choices(model, TOKENIZER, prompt + written, start=len(prompt))
    assert [choice.token for choice in told] == written
    for choice, log_p in zip(told, seen, strict=True):
        likeliest = [p for _, p in choice.likeliest]
        torch.testing.assert_close(choice.probability, log_p[choice.token].exp().item(), atol=1e-4, rtol=1e-3)
        torch.testing.assert_close(likeliest, log_p.exp().topk(10).values.tolist(), atol=1e-4, rtol=1e-3)
        assert choice.text == TOKENIZER.decode([choice.token])
        if choice.rank <= 10:
            assert likeliest[choice.rank - 1] == choice.probability
        above = log_p.exp() - choice.probability
        assert 1 + (above > 1e-4).sum() <= choice.rank <= 1 + (above > -1e-4).sum()
    assert max(choice.rank for choice in told) > 1


def test_a_choice_has_the_gate_of_the_position_before(talkative):
    model, tokens = talkative(), TOKENIZER.encode("12+7*3=33-1\n")
    gates = model.inspect(torch.tensor([tokens])).gate[0, :, 0].tolist()
    told = choices(model, TOKENIZER, tokens, start=3)
    assert [choice.gate for choice in told] == pytest.approx(gates[2:-1]) and max(gates) > 0.5
