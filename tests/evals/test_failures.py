"""Every part of a model is blamed for what it did alone; gates are read where the answer is."""

import pytest
import torch
from conftest import DENSE

from dag import exact_arithmetic
from dag.plan_search import Plans
from data.tokenizer import CharTokenizer, Tokenizer
from evals import failures
from evals.answers import Attempt, Problem
from evals.failures import diagnose, gates_at_answers, gates_at_numbers, unread

TOKENIZER = CharTokenizer("0123456789+-*/=(),. \nabcdefghi")
K, D = 3, 3
R1, R2, R3 = K, K + 1, K + 2  # slots of results
END = ("identity", R2, 0)


def build(tiny_gpt, plans, wanted=0.9, gate=0.9, tokenizer=TOKENIZER, **fields):
    """A model that makes these plans, each (steps, format), at the last of the positions where it makes any,
    whatever it has learned. Its gate is as open as `gate`; where `wanted` is 0.04 nothing is planned."""
    sizes = dict(dag_num_inputs=K, dag_depth=D, block_size=64, separator_id=tokenizer.separator_id)
    model = tiny_gpt(vocabulary=tokenizer.vocabulary, **(sizes | fields))
    dag, names = model.dag, model.dag.names

    def planner(context, keys, inputs):
        N = len(context)
        made = (plans[:1] * N + plans[1:])[-N:] if N else []
        steps = torch.tensor([[(names.index(name), a, b) for name, a, b in steps] for steps, _ in made])
        formats = torch.full((N, len(exact_arithmetic.FORMATS)), -20.0)
        for n, (_, form) in enumerate(made):
            formats[n, exact_arithmetic.FORMATS.index(form)] = 0.0
        return Plans(*steps.view(N, D, 3).unbind(-1)), torch.zeros(N), formats

    dag.planner.forward = planner
    with torch.no_grad():
        wanted, gate = torch.logit(torch.tensor([wanted, gate]))
        for layer, logit in ((dag.wanted, wanted), (dag.trusted, gate - wanted)):
            layer.weight.zero_()
            layer.bias.fill_(logit)
    return model


def attempt(prompt, answer, output, tokenizer=TOKENIZER):
    return Attempt(prompt, answer, output, False, tuple(tokenizer.encode(output)))


def part_and_plan(model, *texts, tokenizer=TOKENIZER):
    (diagnosed,) = diagnose(model, tokenizer, [attempt(*texts, tokenizer)])
    assert (diagnosed.prompt, diagnosed.answer, diagnosed.output) == texts
    return diagnosed.part, diagnosed.plan


PRODUCT_FIRST = ([("multiply", 1, 0), ("add", 2, R1), END], "exact")  # of 12+7*3: slots 0, 1, 2 are 3, 7, 12
SUM_FIRST = ([("add", 2, 1), ("multiply", R1, 0), END], "exact")
QUOTIENT = [("divide", 1, 0), ("identity", R1, 0), END]
DIFFERENCE = ([("subtract", 1, 0), ("identity", R1, 0), END], "exact")
SUM = ([("add", 1, 0), ("identity", R1, 0), END], "exact")
POWER = ([("multiply", 0, 0), ("multiply", R1, R1), ("multiply", R2, R2)], "exact")


@pytest.mark.parametrize("output", ["34", "3", "331", " 34", "", "  ", "ab"])
def test_right_text_that_was_offered_is_lost_in_writing_or_at_the_gate(tiny_gpt, output):
    lost = "12+7*3=", "33", output
    plan = "12 + (7 * 3 = 21) = 33"
    assert part_and_plan(build(tiny_gpt, [PRODUCT_FIRST]), *lost) == ("writing", plan)
    assert part_and_plan(build(tiny_gpt, [PRODUCT_FIRST], gate=0.4), *lost) == ("gate", plan)
    assert part_and_plan(build(tiny_gpt, [PRODUCT_FIRST], wanted=0.04), *lost) == ("gate", "")


@pytest.mark.parametrize("output, position", [("4", 6), ("34", 7), ("331", 8)])
def test_the_gate_that_counts_is_that_of_the_first_wrong_token(tiny_gpt, monkeypatch, output, position):
    model = build(tiny_gpt, [PRODUCT_FIRST])
    look = model.inspect
    for at in range(12):

        def inspect(idx):
            state = look(idx)
            return state._replace(
                gate=(torch.arange(idx.size(1)) == at).float().expand(len(idx), -1)[..., None]
            )

        monkeypatch.setattr(model, "inspect", inspect)
        part = "writing" if at == position else "gate"
        assert part_and_plan(model, "12+7*3=", "33", output)[0] == part, at


@pytest.mark.parametrize("gate", [0.9, 0.1])
@pytest.mark.parametrize("output", ["57", "34", " 57"])
def test_another_value_is_the_plans_fault(tiny_gpt, output, gate):
    model = build(tiny_gpt, [SUM_FIRST], gate=gate)
    assert part_and_plan(model, "12+7*3=", "33", output) == ("plan", "(12 + 7 = 19) * 3 = 57")


@pytest.mark.parametrize("output", [" 34", "  34", " "])
def test_the_plan_that_counts_is_made_at_the_blanks_that_the_model_writes_first(tiny_gpt, output):
    plans = [SUM_FIRST] + [PRODUCT_FIRST] * (output.count(" "))
    assert part_and_plan(build(tiny_gpt, plans), "12+7*3=", "33", output)[0] == "writing"
    plans = [PRODUCT_FIRST] + [SUM_FIRST] * (output.count(" "))
    assert part_and_plan(build(tiny_gpt, plans), "12+7*3=", "33", output)[0] == "plan"


@pytest.mark.parametrize("until, part", [(7, "writing"), (6, "gate")])
def test_a_plan_made_before_the_blanks_counts_if_there_is_none_after(tiny_gpt, until, part):
    model = build(tiny_gpt, [PRODUCT_FIRST])
    model.dag.wanted.forward = lambda hidden: torch.full_like(hidden[..., :1], -9.0).index_fill_(
        1, torch.arange(until), 3.0
    )
    plan = "12 + (7 * 3 = 21) = 33" if part == "writing" else ""
    assert part_and_plan(model, "12+7*3=", "33", " 34") == (part, plan)


def test_a_plan_is_of_the_numbers_that_were_there_when_it_was_made(tiny_gpt):
    model = build(tiny_gpt, [(QUOTIENT, "fraction")])
    assert part_and_plan(model, "14/4=", "7/2", "7/3") == ("writing", "14 / 4 = 7/2")


def test_decimals_in_a_plan(tiny_gpt):
    assert part_and_plan(build(tiny_gpt, [SUM]), "1.50+2=", "5", "3") == ("plan", "1.5 + 2 = 3.5")


def test_a_plan_counts_that_was_made_before_a_sign_in_the_prompt(tiny_gpt):
    """The 5 of "-5" continues what the plan at "=" offers."""
    assert part_and_plan(build(tiny_gpt, [DIFFERENCE]), "3-8=-", "5", "6") == ("writing", "3 - 8 = -5")
    assert part_and_plan(build(tiny_gpt, [DIFFERENCE]), "3-8=-", "6", "7") == ("plan", "3 - 8 = -5")


def test_a_sign_that_the_model_writes_first(tiny_gpt):
    assert part_and_plan(build(tiny_gpt, [DIFFERENCE]), "3-8=", "-5", "-6") == ("writing", "3 - 8 = -5")
    assert part_and_plan(build(tiny_gpt, [DIFFERENCE]), "3-8=", "-5", "5")[0] == "writing"
    assert part_and_plan(build(tiny_gpt, [DIFFERENCE], gate=0.3), "3-8=", "-5", "5")[0] == "gate"
    assert part_and_plan(build(tiny_gpt, [DIFFERENCE]), "3-8=", "5", "-5")[0] == "plan"


@pytest.mark.parametrize(
    "output, kept",
    [("34", "3"), (" 34", " 3"), ("  331", "  33"), ("3 3", "3"), ("ab", ""), (" ", " "), ("", "")],
)
def test_an_output_is_right_up_to_where_it_departs_from_the_answer(output, kept):
    tokens = failures.right_beginning(TOKENIZER, attempt("12+7*3=", " 33 ", output))
    assert TOKENIZER.decode(tokens) == kept


class Pieces(Tokenizer):
    """Characters, and " -" as one token, which a model may write before a number."""

    separator_id = 0
    pieces = ["\n", " -", *"0123456789+-*/= "]
    vocab_size = len(pieces)

    def encode(self, text):
        ids = []
        while text:
            id = next(id for id, piece in enumerate(self.pieces) if text.startswith(piece))
            ids, text = [*ids, id], text[len(self.pieces[id]) :]
        return ids

    def token_bytes(self, id):
        return self.pieces[id].encode()


def test_a_sign_within_a_longer_token(tiny_gpt):
    """A plan is made after it, and offers the digits alone."""
    model = build(tiny_gpt, [SUM, DIFFERENCE], tokenizer=Pieces())
    assert part_and_plan(model, "3-8=", "-5", " -6", tokenizer=Pieces()) == ("writing", "3 - 8 = -5")
    model = build(tiny_gpt, [DIFFERENCE, SUM], tokenizer=Pieces())
    assert part_and_plan(model, "3-8=", "-5", " -6", tokenizer=Pieces()) == ("plan", "3 + 8 = 11")


@pytest.mark.parametrize(
    "form, answer",
    [
        ("fraction", "3.5"),
        ("exact", "7/2"),
        ("digits_1", "3.50"),
        ("exact", "4"),
        ("digits_1", "+3.5"),
        ("digits_1", "35e-1"),
    ],
)
def test_the_right_value_in_another_format_is_lost_in_writing(tiny_gpt, form, answer):
    model = build(tiny_gpt, [(QUOTIENT, form)], gate=0.1)
    assert part_and_plan(model, "7/2=", answer, "9")[0] == "writing"
    assert part_and_plan(model, "7/3=", answer, "9")[0] != "writing"


def test_a_plan_without_a_value_fails_in_execution(tiny_gpt):
    model = build(tiny_gpt, [(QUOTIENT, "exact")])
    assert part_and_plan(model, "12/0=", "5", "6") == ("execution", "12 / 0 = nothing")
    model = build(tiny_gpt, [POWER], dag_digits=6)
    assert part_and_plan(model, "1+5=", "6", "7")[0] == "plan"  # 390625
    assert part_and_plan(model, "1+6=", "7", "8") == (
        "execution",
        "((6 * 6 = 36) * (6 * 6 = 36) = 1296) * ((6 * 6 = 36) * (6 * 6 = 36) = 1296) = nothing",
    )


@pytest.mark.parametrize(
    "prompt", ["1+2+3+4=", "1,234+5=", "a1+2=", "1e3+2=", ".5+1=", "1.2.3+1=", "1+2", "1+2a"]
)
@pytest.mark.parametrize("wanted", [0.9, 0.04])
def test_numbers_that_the_dag_does_not_see_fail_in_reading(tiny_gpt, prompt, wanted):
    assert part_and_plan(build(tiny_gpt, [SUM], wanted=wanted), prompt, "77", "78")[0] == "reading"


def test_without_numbers_there_is_nothing_to_plan_from(tiny_gpt):
    assert part_and_plan(build(tiny_gpt, [SUM]), "abc=", "7", "8") == ("reading", "")


def test_an_unread_number_is_not_held_against_a_plan_that_came_out_right(tiny_gpt):
    model = build(tiny_gpt, [SUM])
    assert part_and_plan(model, "1+2+3+4=", "7", "8") == ("writing", "3 + 4 = 7")
    assert part_and_plan(model, "1+2+3+4=", "7.0", "8")[0] == "writing"


@pytest.mark.parametrize(
    "prompt, numbers, expected",
    [
        ("5-3= -2.50 (7)", [(5, 1), (3, 1), (-5, 2), (7, 1)], False),
        ("4+4=", [(4, 1)], True),  # one of them
        ("max(12,345)=", [(12, 1), (345, 1)], False),
        ("max(1,234,567)=", [(1, 1), (234, 1), (567, 1)], False),
        ("add 12,345 to 1", [(1, 1), (12, 1), (345, 1)], True),
        ("1,2345", [(1, 1), (2345, 1)], False),
        ("3/4 of 8.", [(3, 1), (4, 1), (8, 1)], False),
        ("2e99999", [(2, 1)], True),
        ("no", [], False),
    ],
)
def test_unread(prompt, numbers, expected):
    assert unread(prompt, numbers) == expected


@pytest.mark.parametrize("prompt, answer, output", [("1+2" * 22, "3", ""), ("1+2" * 21 + "=", "63", "64")])
def test_what_outgrows_the_context_is_shown_as_such(tiny_gpt, prompt, answer, output):
    assert len(prompt + answer) > 64
    assert part_and_plan(build(tiny_gpt, [SUM]), prompt, answer, output) == ("context", "")
    assert (
        part_and_plan(
            tiny_gpt(vocabulary=TOKENIZER.vocabulary, block_size=64, dag_depth=0), prompt, answer, output
        )[0]
        == "context"
    )


def test_in_the_last_position_of_the_context_a_plan_counts(tiny_gpt):
    prompt = " " * 60 + "3+4="
    assert part_and_plan(build(tiny_gpt, [SUM]), prompt, "7", "8") == ("writing", "3 + 4 = 7")


@pytest.mark.parametrize("fields", [dict(dag_depth=0), *DENSE.values()], ids=["plain", *DENSE])
def test_without_this_dag_it_is_the_model(tiny_gpt, fields):
    model = tiny_gpt(vocabulary=TOKENIZER.vocabulary, **fields)
    assert part_and_plan(model, "1+2=", "3", "4") == ("model", "")


@pytest.mark.parametrize("separator_id", [TOKENIZER.separator_id, -1])
def test_a_diagnosis_does_not_depend_on_its_neighbours(tiny_gpt, separator_id):
    model = build(tiny_gpt, [SUM], separator_id=separator_id)
    texts = ("5*5=", "25", " 27"), ("1+2=", "3", "3 "), ("10+20=", "30", "31")
    attempts = [attempt(*some) for some in texts]
    attempts.append(Attempt("1+1=", "2", "2", True))
    alone = [diagnose(model, TOKENIZER, [one])[0] for one in attempts]
    assert diagnose(model, TOKENIZER, attempts) == alone == diagnose(model, TOKENIZER, attempts, batch_size=2)
    assert [one.part for one in alone] == ["plan", "writing", "writing", ""] and alone[-1] is attempts[-1]


@pytest.mark.parametrize(
    "steps, inputs, expected",
    [
        ([("identity", 1, 0)], [3, 7], "7 = 7"),
        ([("max", 0, 1), ("log", R1, 0)], [3, 7], "log((max(3, 7) = 7)) = 1.9459"),
        ([("divide", 1, 0), ("power", R1, 0)], [3, -7], "(-7 / 3 = -7/3) ^ 3 = -12.704"),
    ],
)
def test_plan_text(tiny_gpt, steps, inputs, expected):
    dag = tiny_gpt(dag_num_inputs=K).dag
    steps = [(dag.names.index(name), a, b) for name, a, b in steps]
    slots = [(n, 1) for n in inputs] + [None]
    slots += exact_arithmetic.run(steps, slots, operations=dag.operations)
    assert failures.plan_text(dag, steps, slots, expected.split(" = ")[-1]) == expected


# ----------------------------------------------------------------------------------------------------
# gates


def open_at(model, monkeypatch, at):
    """Nothing but position `at` has an open gate."""
    look = type(model).inspect

    def inspect(idx):
        gate = (torch.arange(idx.size(1)) == at).float() * 0.51
        return look(model, idx)._replace(gate=gate.expand(len(idx), -1)[..., None])

    monkeypatch.setattr(model, "inspect", inspect)


@pytest.mark.parametrize("fields", [dict(dag_num_inputs=2), *DENSE.values()], ids=["numbers", *DENSE])
@pytest.mark.parametrize(
    "problem, position",
    [
        (("1+12=", "13"), 4),
        (("1+12=", " 13"), 5),
        (("1-12=", "-11"), 4),
        (("a", "= 5"), 2),
        (("1+1=", "ab"), 3),  # not a number
        (("1+1=", "\u00e9"), 3),  # nor in the vocabulary
        (("1" * 15 + "=", "111"), 15),
    ],
)
def test_the_gate_of_an_answer(tiny_gpt, monkeypatch, problem, position, fields):
    model = tiny_gpt(
        vocabulary=TOKENIZER.vocabulary, separator_id=TOKENIZER.separator_id, dag_depth=2, **fields
    )
    problems = [Problem("1+1=", "2"), Problem(*problem)]
    for at in range(16):
        open_at(model, monkeypatch, at)
        assert gates_at_answers(model, TOKENIZER, problems) == [at == 3, at == position], at


def test_a_prompt_beyond_the_context_has_no_open_gate(tiny_gpt, monkeypatch):
    model = tiny_gpt(vocabulary=TOKENIZER.vocabulary, separator_id=TOKENIZER.separator_id)
    monkeypatch.setattr(failures, "OPEN", -1.0)
    assert gates_at_answers(model, TOKENIZER, [Problem("1+" * 8 + "1=", "9"), Problem("1+1=", "2")]) == [
        False,
        True,
    ]


def test_decoys_count_every_number_after_the_first(tiny_gpt, monkeypatch):
    model = tiny_gpt(vocabulary=TOKENIZER.vocabulary, separator_id=TOKENIZER.separator_id)
    decoys = [Problem("a 1 b 22 c", " -3"), Problem("ab ", "5"), Problem("3 ", "44")]
    for at in range(16):
        open_at(model, monkeypatch, at)
        flags = gates_at_numbers(model, TOKENIZER, decoys, batch_size=2)
        assert len(flags) == 3 and sum(flags) == (at in (5, 10)) + (at == 1), at


def test_behind_a_bar_no_number_could_be_computed(tiny_gpt, monkeypatch):
    model = tiny_gpt(vocabulary=TOKENIZER.vocabulary, separator_id=TOKENIZER.separator_id)
    for at in range(8):
        open_at(model, monkeypatch, at)
        flags = gates_at_numbers(model, TOKENIZER, [Problem("1 3/4 ", "5")])
        assert flags == [at == 1, at == 5]


def test_without_a_gate_there_are_none(tiny_gpt):
    for fields in (dict(dag_depth=0), DENSE["token"] | dict(dag_gate=False)):
        model = tiny_gpt(vocabulary=TOKENIZER.vocabulary, **fields)
        assert gates_at_answers(model, TOKENIZER, [Problem("1+1=", "2")]) == []
        assert gates_at_numbers(model, TOKENIZER, [Problem("1+1=", "2")]) == []
