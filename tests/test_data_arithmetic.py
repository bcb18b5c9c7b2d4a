"""Every answer is right, no numbers are in two splits, and what is held out is never seen."""

import ast
import importlib.util
import random
import re
from collections import Counter
from fractions import Fraction
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from configurator import ConfigError, parse
from dataloader import Loader, open_shard
from tokenizer import from_json

SCRIPT = Path(__file__).parents[1] / "data" / "arithmetic" / "prepare.py"
spec = importlib.util.spec_from_file_location("prepare_arithmetic", SCRIPT)
prepare = importlib.util.module_from_spec(spec)
spec.loader.exec_module(prepare)

MEANING = {  # what the words say, restated
    "add {a} and {b}. ": "a+b",
    "add {a} to {b}: ": "b+a",
    "what is {a} plus {b}? ": "a+b",
    "the sum of {a} and {b} is ": "a+b",
    "subtract {a} from {b}. ": "b-a",
    "take {a} away from {b}: ": "b-a",
    "what is {a} minus {b}? ": "a-b",
    "multiply {a} by {b}. ": "a*b",
    "what is {a} times {b}? ": "a*b",
    "the product of {a} and {b} is ": "a*b",
    "add {a} and {b}, then multiply by {c}. ": "(a+b)*c",
    "multiply {a} by {b}, then subtract {c}. ": "(a*b)-c",
    "{name} has {a} {item} and buys {b} more. how many? ": "a+b",
    "{name} had {a} {item} and gave {b} away. how many are left? ": "a-b",
    "{name} has {a} {item} and loses {b}. how many are left? ": "a-b",
    "there are {a} boxes of {b} {item}. how many in all? ": "a*b",
    "{a} {item} cost {b} cents each. how much in all? ": "a*b",
    "{name} has {a} {item}, buys {b} and loses {c}. how many? ": "(a+b)-c",
    "{name} has {a} boxes of {b} {item} and {c} more. how many? ": "(a*b)+c",
    "{name} had {a} boxes of {b} {item} and lost {c}. how many? ": "(a*b)-c",
    "find {a} plus {b}. ": "a+b",
    "if {a} is added to {b} we get ": "b+a",
    "from {a} subtract {b}. ": "a-b",
    "{a} multiplied by {b} is ": "a*b",
    "take the product of {a} and {b} and add {c}. ": "(a*b)+c",
    "{name} buys {a} {item} and then {b} more. how many in all? ": "a+b",
    "of {a} {item} {name} gave away {b}. how many are left? ": "a-b",
    "{name} has {b} {item} in each of {a} boxes. how many? ": "a*b",
}


def pattern(template):
    words = re.sub(r"\\{(name|item)\\}", "[a-z]+", re.escape(template))
    return re.compile(re.sub(r"\\{([abc])\\}", r"(?P<\1>\\d+)", words))


SENTENCES = {pattern(template): formula for template, formula in MEANING.items()}
UNSEEN = [pattern(template) for template in prepare.UNSEEN_TEMPLATES]
DECOYS = [pattern(template) for template in prepare.DECOYS]


def evaluate(text: str) -> Fraction:
    """The value of an expression, over the syntax tree and in fractions."""

    def walk(node):
        match node:
            case ast.Constant(value=value):
                return Fraction(str(value))
            case ast.UnaryOp(op=ast.USub(), operand=operand):
                return -walk(operand)
            case ast.BinOp(left=left, op=op, right=right):
                a, b = walk(left), walk(right)
                return {ast.Add: a + b, ast.Sub: a - b, ast.Mult: a * b}[type(op)]

    return walk(ast.parse(text, mode="eval").body)


def solve(prompt: str) -> Fraction:
    if prompt.rstrip().endswith("="):
        return evaluate(prompt.rstrip(" ="))
    [(found, formula)] = [(m, f) for p, f in SENTENCES.items() if (m := p.fullmatch(prompt))]
    return evaluate(re.sub("[abc]", lambda m: found[m[0]], formula))


def numbers_in(text: str) -> list[str]:
    return re.findall(r"\d+(?:\.\d+)?", text)


def numbers_of(line: str) -> tuple[str, ...]:
    """The numbers of its prompt: every line ends with its answer."""
    return tuple(sorted(numbers_in(line)[:-1]))


def is_decoy(line: str) -> bool:
    return any(p.fullmatch(line) for p in DECOYS)


class Prepared:
    """A data set, read back from its files."""

    def __init__(self, folder, **settings):
        self.folder = folder
        self.meta = prepare.prepare(prepare.Settings(out_dir=str(folder), **settings))
        self.tokenizer = from_json(self.meta["tokenizer"])
        self.problems = {
            path.stem: [tuple(line.split("\t")) for line in path.read_text().splitlines()]
            for path in (folder / "problems").glob("*.tsv")
        }

    def lines(self, split):
        [shard] = self.meta["splits"][split]["shards"]
        return self.tokenizer.decode(open_shard(self.folder / shard)).splitlines()


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return Prepared(tmp_path_factory.mktemp("arithmetic"), lines=6000, problems_per_split=40)


@pytest.fixture(scope="module")
def other_seed(tmp_path_factory):
    return Prepared(tmp_path_factory.mktemp("other"), lines=6000, problems_per_split=40, seed=8)


def test_every_answer_is_right_and_fully_written(data):
    for name, problems in data.problems.items():
        if "decoys" not in name:
            for prompt, answer in problems:
                assert solve(prompt) == Fraction(answer), f"{name}: {prompt}{answer}"
                assert re.fullmatch(r"0|-?([1-9]\d*|\d+\.\d*[1-9])", answer), f"{name}: {prompt}{answer}"


def test_every_line_of_the_corpus_is_a_decoy_or_right(data):
    kinds = Counter()
    for line in data.lines("train") + data.lines("val"):
        answer = re.search(r"-?\d+(\.\d+)?$", line)[0]
        prompt = line.removesuffix(answer)
        kind = "decoy" if is_decoy(line) else "expression" if "=" in line else "sentence"
        kinds[kind] += 1
        assert kind == "decoy" or solve(prompt) == Fraction(answer), line
        assert "how m" not in line or not answer.startswith("-"), line  # a count
    shares = {kind: count / kinds.total() for kind, count in kinds.items()}
    assert shares == pytest.approx({"expression": 0.7, "sentence": 0.2, "decoy": 0.1}, abs=0.03)


def test_the_table_of_meanings_is_complete():
    assert set(MEANING) == set(prepare.TEMPLATES) | set(prepare.UNSEEN_TEMPLATES)


@given(st.integers(0, 10**9), st.integers(2, 8), st.integers(1, 20))
def test_trees_are_written_as_they_are_computed(seed, count, digits):
    rng = random.Random(seed)
    problem = prepare.draw_integers(rng, count, range(1, digits + 1))
    assert evaluate(problem.prompt.rstrip("= ")) == int(problem.answer)


def test_expressions_show_what_they_should(data):
    text = "\n".join(data.lines("train"))
    for wanted in (
        r"\(\d+\+\d+\)\*\d",
        r"^\d+\+\d+\*\d+=",
        r"-\(",
        r"--\d",
        r"=-\d",
        r"= -\d",
        r"^-\d",
        r"\d \* \d",
        r"^\d+\.\d+\+\d+=\d+\.\d+$",
        r"\. -\d+$",
    ):
        assert re.search(wanted, text, re.M), wanted
    for unwanted in (r"[-+*(] ?-0(?![.\d])", r"^-0(?![.\d])", r"(?<![\d.])0\d", r"\.\d*0(?!\d)"):
        assert not re.search(unwanted, text, re.M), unwanted


def test_no_numbers_are_in_two_splits(data, other_seed):
    def numbers(lines):
        return {numbers_of(line) for line in lines}

    scored = {
        name: numbers(prompt + answer for prompt, answer in problems)
        for name, problems in data.problems.items()
    }
    val = numbers(data.lines("val")).union(*(scored[name] for name in scored if name.startswith("val_")))
    test = set().union(*(scored[name] for name in scored if not name.startswith("val_")))
    for train in (numbers(data.lines("train")), numbers(other_seed.lines("train"))):
        assert train and not train & val and not train & test
    assert not val & test


@given(st.permutations(["3", "14", "2.5"]), st.tuples(*[st.sampled_from("+-*")] * 2), st.booleans())
def test_split_ignores_order_signs_and_words(numbers, signs, negative):
    a, b, c = numbers
    expression = prepare.Problem(f"{'-' * negative}{a}{signs[0]}({b} {signs[1]} {c})=", "")
    sentence = prepare.Problem(f"{a} eggs, {b} pens. {c} of them? ", "7")
    assert prepare.split_of(expression) == prepare.split_of(sentence)


def test_splits_have_their_shares_and_never_move():
    splits = [prepare.split_of(prepare.Problem(f"{i}+{i + 1}=", "")) for i in range(20000)]
    assert Counter(splits)["val"] / 20000 == pytest.approx(prepare.VAL, abs=0.006)
    assert Counter(splits)["test"] / 20000 == pytest.approx(prepare.TEST, abs=0.006)
    # a data set made by another machine, Python or year must not show what is held out here
    assert [i for i in range(60) if splits[i] != "train"] == [19, 29, 42, 51, 52, 58, 59]


def test_problems_are_distinct(data):
    for name, problems in data.problems.items():
        assert len(problems) == 40, name
        assert len({prompt.replace(" ", "") for prompt, _ in problems}) == 40, name
    assert len(set(data.lines("val"))) == len(data.lines("val")) > 200


def test_equal_seeds_give_equal_files_and_others_do_not(data, other_seed, tmp_path):
    random.seed(99)  # the state of the global generator is no part of it
    again = Prepared(tmp_path, lines=6000, problems_per_split=40)
    assert again.meta["splits"] == data.meta["splits"] and again.problems == data.problems
    assert other_seed.tokenizer.to_json() == data.tokenizer.to_json()
    for split in ("train", "val"):
        assert other_seed.meta["splits"][split]["sha256"] != data.meta["splits"][split]["sha256"]
    assert all(other_seed.problems[name] != data.problems[name] for name in data.problems)


def test_what_is_held_out_is_not_in_the_corpus(data):
    for line in data.lines("train") + data.lines("val"):
        assert not any(p.match(line) for p in UNSEEN), line
        prompt = numbers_in(line)[:-1]
        assert len(prompt) <= 4 and all(len(n.partition(".")[0]) <= 3 for n in prompt), line


@pytest.mark.parametrize(
    "name, count, digits",
    [
        ("digits_8", {2}, {8}),
        ("digits_18", {2}, {18}),
        ("sentence_digits_7", {2, 3}, {7}),
        ("operands_5", {5}, {1, 2, 3}),
        ("operands_6", {6}, {1, 2, 3}),
        ("unseen_templates", {2, 3}, {1, 2, 3}),
    ],
)
def test_extrapolation_goes_beyond(data, name, count, digits):
    prompts = [prompt for prompt, _ in data.problems[name]]
    assert {len(numbers_in(prompt)) for prompt in prompts} == count
    assert {len(n) for prompt in prompts for n in numbers_in(prompt)} == digits
    assert max(len(prompt + answer) for prompt, answer in data.problems[name]) <= 127


def test_unseen_templates_hold_no_others(data):
    for prompt, _ in data.problems["unseen_templates"]:
        assert any(p.fullmatch(prompt) for p in UNSEEN), prompt


def test_scored_kinds_are_what_they_are_called(data):
    for split in ("val", "test"):
        for kind, count in (("two_numbers", 2), ("three_numbers", 3), ("four_numbers", 4)):
            for prompt, _ in data.problems[f"{split}_{kind}"]:
                assert len(numbers_in(prompt)) == count and "." not in prompt
        assert all("." in prompt for prompt, _ in data.problems[f"{split}_decimals"])
        assert all(is_decoy(prompt + answer) for prompt, answer in data.problems[f"{split}_decoys"])
        assert any("(" in prompt for prompt, _ in data.problems[f"{split}_four_numbers"])


def test_decoys_cannot_be_computed():
    rng = random.Random(0)
    decoys = [prepare.draw_decoy(rng, range(1, 3)) for _ in range(2000)]  # short: they meet by chance
    for decoy in decoys:
        numbers = [Fraction(n) for n in numbers_in(decoy.line)]
        assert numbers[-1] == Fraction(decoy.answer)
        for i in range(1, len(numbers)):
            results = set(numbers[:i])
            for a, b in product(numbers[:i], repeat=2):
                results |= {a + b, a - b, a * b} | ({a / b} if b else set())
            assert numbers[i] not in results, decoy.line


def test_decoys_cannot_be_predicted():
    rng = random.Random(0)
    pairs = [numbers_in(prepare.draw_decoy(rng, range(1, 4)).line)[-2:] for _ in range(4000)]
    lengths = np.array([[len(a), len(b)] for a, b in pairs])
    last_digits = np.array([[int(a[-1]), int(b[-1])] for a, b in pairs])
    assert abs(np.corrcoef(lengths.T)[0, 1]) < 0.06 and abs(np.corrcoef(last_digits.T)[0, 1]) < 0.06
    assert np.bincount(lengths[:, 1])[1:] / 4000 == pytest.approx([1 / 3] * 3, abs=0.07)


def test_lines_fit_and_keep_to_the_alphabet(data):
    lines = data.lines("train") + data.lines("val")
    problems = [prompt + answer for problems in data.problems.values() for prompt, answer in problems]
    assert set("".join(lines + problems)) <= set(prepare.ALPHABET) == set(data.tokenizer.chars)
    assert max(map(len, lines)) <= prepare.MAX_LINE
    assert np.percentile([len(line) for line in lines], 85) <= 40
    x, y = Loader(data.folder, "train", batch_size=16, block_size=64, seed=0).next_batch()
    assert (y == data.tokenizer.separator_id).any()


def test_long_numbers_stay_within_the_line():
    settings = prepare.Settings(lines=1500, max_digits=6)
    lines = prepare.draw_corpus(settings)["train"]
    assert max(map(len, lines)) <= prepare.MAX_LINE
    assert max(len(n) for line in lines for n in numbers_in(line)[:-1]) >= 6


def test_fewer_operands_leave_kinds_out():
    kinds = prepare.interpolation(prepare.Settings(max_operands=2))
    assert set(prepare.MIX) - set(kinds) == {"three_numbers", "four_numbers"}
    assert set(prepare.interpolation(prepare.Settings())) == set(prepare.MIX)


@pytest.mark.parametrize("flag", ["--max_digits=7", "--max_operands=5", "--lines=0", "--digits=3"])
def test_settings_that_would_spoil_the_splits_are_refused(flag):
    with pytest.raises(ConfigError, match=flag.split("=")[0].strip("-")):
        parse(prepare.Settings, [flag])


def test_too_few_problems_say_what_to_do(tmp_path):
    settings = prepare.Settings(out_dir=str(tmp_path), lines=100, max_digits=1, problems_per_split=60)
    with pytest.raises(ValueError, match="raise --max_digits or lower --problems_per_split=60"):
        prepare.prepare(settings)
    assert not (tmp_path / "meta.json").exists()
