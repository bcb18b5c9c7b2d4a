"""Problem files are read strictly, attempts are judged by the text up to the separator."""

from fractions import Fraction

import pytest
import torch

from data.loader import Loader, write_dataset
from data.tokenizer import BPETokenizer, ByteTokenizer, CharTokenizer
from evals import answers
from evals.answers import Attempt, Problem, is_close, read_problems, solve, splits, to_number


def write(path, content: bytes):
    path.write_bytes(content)
    return path


def test_read_problems(tmp_path):
    path = write(tmp_path / "p.tsv", "12+7*3=\t33\r\n\n 1. \t-0.5\ncaf\u00e9 \t1/2".encode())
    expected = [Problem("12+7*3=", "33"), Problem(" 1. ", "-0.5"), Problem("caf\u00e9 ", "1/2")]
    assert read_problems(path) == expected


@pytest.mark.parametrize("line", [b"1+1=2", b"1+1=\t2\t3", b"\t2", b"1+1=\t", b"1+1=\t "])
def test_a_malformed_line_is_refused_with_its_number(tmp_path, line):
    path = write(tmp_path / "p.tsv", b"1+2=\t3\n\n" + line + b"\n4+4=\t8\n")
    with pytest.raises(ValueError, match=r"p\.tsv:3: expected prompt<TAB>answer"):
        read_problems(path)


@pytest.mark.parametrize(
    "content, words", [(b"", "no problems"), (b"\n \n", "no problems"), (b"1\xff\t2", "not UTF-8")]
)
def test_a_file_without_problems_is_refused(tmp_path, content, words):
    with pytest.raises(ValueError, match=words):
        read_problems(write(tmp_path / "p.tsv", content))


def test_a_prompt_outside_the_vocabulary_is_refused_with_its_line(tmp_path):
    path = write(tmp_path / "p.tsv", b"1+2=\t3\n\n1+x=\tx\n")
    with pytest.raises(ValueError, match=r"p\.tsv:3: prompt '1\+x=': character 'x' at position 2") as error:
        read_problems(path, CharTokenizer("\n+0123456789="))
    assert "\n" not in str(error.value)
    assert len(read_problems(path, ByteTokenizer())) == 2


def test_splits_leave_decoys_out(tmp_path):
    (tmp_path / "problems").mkdir()
    for name in ("val_b.tsv", "val_a.tsv", "val_decoys.tsv", "test_a.tsv", "digits_8.tsv", "val_a.txt"):
        (tmp_path / "problems" / name).touch()
    assert list(splits(tmp_path)) == ["val_a", "val_b"]
    assert list(splits(tmp_path, prefix="")) == ["digits_8", "test_a", "val_a", "val_b"]
    assert splits(tmp_path)["val_a"] == tmp_path / "problems" / "val_a.tsv"
    assert splits(tmp_path / "nowhere") == {}


class Parrot:
    """Answers from a list, in place of engine.generate."""

    def __init__(self, answers: dict[str, str]):
        self.answers, self.batches = answers, []

    def __call__(self, model, prompts, max_new_tokens, *, temperature, stop):
        assert temperature == 0 and stop == [[ord("\n")]]
        self.batches.append((len(prompts), max_new_tokens))
        return [list(self.answers[bytes(prompt).decode()].encode())[:max_new_tokens] for prompt in prompts]


def test_solve(monkeypatch, tiny_gpt):
    said = {"1+1=": "2\n", "1+2=": " 3 \n", "9*9=": "8", "5+5=": "100\n", "2-7=": "-5", "0+0=": "\n"}
    right = {"1+1=": "2", "1+2=": "3", "9*9=": "81", "5+5=": "10", "2-7=": "-5", "0+0=": "0"}
    parrot = Parrot(said)
    monkeypatch.setattr(answers, "generate", parrot)
    attempts = solve(tiny_gpt(), ByteTokenizer(), [Problem(*pair) for pair in right.items()], batch_size=4)
    assert [attempt.prompt for attempt in attempts] == list(right)
    assert [attempt.answer for attempt in attempts] == list(right.values())
    assert [attempt.output for attempt in attempts] == ["2", " 3 ", "8", "100", "-5", ""]
    assert [attempt.correct for attempt in attempts] == [True, True, False, False, True, False]
    assert [bytes(attempt.tokens).decode() for attempt in attempts] == [
        attempt.output for attempt in attempts
    ]
    assert parrot.batches == [(4, 10), (2, 10)]  # the longest answer of the batch, and 8


def test_solve_does_not_depend_on_the_batch_size(tiny_gpt):
    model = tiny_gpt(vocabulary=ByteTokenizer().vocabulary, dag_depth=2)
    problems = [Problem(str(number) * (1 + number % 3), "12") for number in range(9)]
    before = torch.get_rng_state()
    assert solve(model, ByteTokenizer(), problems, batch_size=1) == solve(model, ByteTokenizer(), problems)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_prompt_outside_the_vocabulary_is_named(tiny_gpt):
    with pytest.raises(ValueError, match=r"prompt '1\+x=': character 'x' at position 2"):
        solve(tiny_gpt(), CharTokenizer("\n+0123456789="), [Problem("1+1=", "2"), Problem("1+x=", "2")])


def test_a_prompt_beyond_the_context_is_a_failed_attempt(monkeypatch, tiny_gpt):
    monkeypatch.setattr(answers, "generate", Parrot({"1+1=": "2"}))
    attempts = solve(tiny_gpt(), ByteTokenizer(), [Problem("1" * 17, "2"), Problem("1+1=", "2")])
    assert [(attempt.output, attempt.correct) for attempt in attempts] == [("", False), ("2", True)]


@pytest.mark.parametrize(
    "text, number",
    [
        ("-12", -12),
        ("+7", 7),
        ("3.50", Fraction(7, 2)),
        (".5", Fraction(1, 2)),
        ("5.", 5),
        ("-6/8", Fraction(-3, 4)),
        ("1e-3", Fraction(1, 1000)),
        ("2.5E2", 250),
        ("1" * 40, int("1" * 40)),
        *dict.fromkeys(
            [
                "",
                ".",
                "-",
                "3/0",
                "3/00",
                "1/2/3",
                "1.5/2",
                "3/-4",
                "e5",
                "1e",
                "1e9999",
                "nan",
                "inf",
                "1_0",
                "1 2",
                "12a",
            ]
        ).items(),
    ],
)
def test_to_number(text, number):
    assert to_number(text) == number


@pytest.mark.parametrize(
    "answer, output, rel_tol, expected",
    [
        ("10000", "10001", 1e-4, True),
        ("10000", "9999", 1e-4, True),
        ("10000", "10001.0001", 1e-4, False),
        ("-10", "-13", 0.3, True),  # 0.3 the float is less than 0.3
        ("-10", "-13.0000000001", 0.3, False),
        ("-10", "10", 1.9, False),
        ("0", "0.0001", 1e-4, True),
        ("0", "-0.00011", 1e-4, False),
        ("3/4", "0.75", 0, True),
        ("0.3333", "1/3", 1e-3, True),
        ("33", " 33 ", 0, True),
        ("33", "33.0", 0, True),
        ("33", "33x", 10, False),
        ("33", "", 10, False),
        ("yes", "1", 10, False),
    ],
)
def test_is_close(answer, output, rel_tol, expected):
    assert is_close(Attempt("", answer, output, output == answer), rel_tol) == expected


def test_what_is_correct_is_close_even_where_it_is_no_number():
    assert is_close(Attempt("", "yes", " yes", True), 0)


def test_bytes_per_token(tmp_path):
    texts = ["ab\u00e9", "a", "\u20ac\u20acb"] * 4
    tokenizer = CharTokenizer("\nab\u00e9\u20ac")
    write_dataset(tmp_path, "x", tokenizer, {"val": texts}, documents=True)
    loader = Loader(tmp_path, "val", batch_size=2, block_size=7, seed=1)
    predicted = "".join(
        tokenizer.decode(row[row >= 0].tolist()) for _ in range(3) for row in loader.next_batch()[1]
    )
    ratio = len(predicted.encode()) / len(predicted)
    assert 1 < ratio < 2
    assert answers.bytes_per_token(loader, 3, tokenizer) == pytest.approx(ratio)
    assert answers.bytes_per_token(loader, 3, tokenizer) == pytest.approx(ratio)  # from the start again


def test_a_separator_is_a_byte_whatever_its_name(tmp_path):
    tokenizer = BPETokenizer([chr(byte) for byte in range(256)])
    write_dataset(tmp_path, "x", tokenizer, {"val": ["abc"] * 9}, documents=True)
    loader = Loader(tmp_path, "val", batch_size=1, block_size=4, seed=1)
    assert answers.bytes_per_token(loader, 2, tokenizer) == 1
