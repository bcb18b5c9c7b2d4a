"""Lexer agrees with a regular expression that sees the whole text, with Reader, and with its own past.

Positions are checked by what they promise: a number may open where a digit, appended, is the first of one.
"""

import bisect
import itertools
import math
import random
import re
from fractions import Fraction
from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dag.number_lexer import Lexer, Numerals, Reader
from data.tokenizer import ByteTokenizer, build

K = 3
WORDS = ["gpt", "covid", "is", " -", " +", "(-", "=-", "--", "+-", " (", "..", ".-", " /", " a", "é", "\t "]
SAMPLE = "".join(f"{word}{n % 7}" for n in range(20) for word in WORDS)
PIECES = [
    *"00123456789" * 2,
    *".-+" * 5,
    *" ()]/,=a_" * 2,
    *["1.5", ".2", "0.3."] * 3,
    *["1,234", ",567", "12,34", "1,234.5", "8,"] * 2,
    *WORDS,
    None,
]  # None: the separator
TOKENIZERS = [build("char", [SAMPLE, *filter(None, PIECES)]), ByteTokenizer(), build("bpe", SAMPLE, 320)]
RUN = {False: r"[0-9]+(\.[0-9]+)*", True: r"[0-9]+(,[0-9]+)*(\.[0-9]+)*"}  # with thousands
NUMBER = {False: r"[0-9]+(\.[0-9]+)?", True: r"([0-9]+|[0-9]{1,3}(,[0-9]{3})+)(\.[0-9]+)?"}


def lexer_of(tok, num_inputs: int = K, thousands: bool = False) -> Lexer:
    vocabulary = [tok.token_bytes(id) for id in range(tok.vocab_size)]
    return Lexer(vocabulary, tok.separator_id, num_inputs, thousands)


LEXERS = {
    (tok.kind, thousands): lexer_of(tok, thousands=thousands)
    for tok in TOKENIZERS
    for thousands in (False, True)
}
with_or_without_thousands = pytest.mark.parametrize("thousands", [False, True], ids=["plain", "thousands"])


def all_lexers(test):
    tokenizers = pytest.mark.parametrize("tok", TOKENIZERS, ids=lambda tok: tok.kind)
    return tokenizers(with_or_without_thousands(test))


def encode(tok, pieces) -> list[int]:
    """Piece by piece, so that the tokens of bpe meet in ways that no text brings about."""
    return [id for piece in pieces for id in ([tok.separator_id] if piece is None else tok.encode(piece))]


def random_rows(tok, rows: int, length: int) -> torch.Tensor:
    return torch.tensor([encode(tok, random.choices(PIECES, k=length))[:length] for _ in range(rows)])


def read(text: str, num_inputs: int = 8, thousands: bool = False) -> Numerals:
    """Of a text, a byte a token, as one row."""
    return lexer_of(ByteTokenizer(), num_inputs, thousands)(torch.tensor([list(text.encode())]))


class Span(NamedTuple):
    """A number of the text, and the tokens that it stands at."""

    document: int
    first: int
    last: int
    seen: int
    sign: int
    mantissa: int
    places: int


def spans(tok, ids: list[int], thousands: bool) -> list[Span]:
    """All numbers of a row that are over, by the grammar as it is told, on the text."""
    found, begin = [], 0
    ends = [t for t, id in enumerate(ids) if id == tok.separator_id]
    for document, end in enumerate([*ends, len(ids)]):
        tokens = [tok.token_bytes(id).decode("latin-1") for id in ids[begin:end]]
        for match in re.finditer(RUN[thousands], "".join(tokens)):
            span = span_of(match, tokens, begin, document, thousands)
            if span is not None and span.seen < len(ids):
                found.append(span)
        begin = end + 1
    return found


def span_of(match: re.Match, tokens: list[str], begin: int, document: int, thousands: bool) -> Span | None:
    before, digits = match.string[: match.start()], match.group()
    if re.search("[A-Za-z_]$", before) or not re.fullmatch(NUMBER[thousands], digits):
        return None
    sign = ""
    if before.endswith(("+", "-")) and not re.search(r"([A-Za-z_]|[0-9)\]][ \t]*)$", before[:-1]):
        sign = before[-1]
    offsets = list(itertools.accumulate(map(len, tokens), initial=0))
    first, last = (bisect.bisect_right(offsets, at) - 1 for at in (match.start(), match.end() - 1))
    pending = tokens[last + 1 : last + 2] in ([["."], [","]] if thousands and "." not in digits else [["."]])
    first -= sign != "" and tokens[first - 1] == sign
    whole, _, decimals = digits.replace(",", "").partition(".")
    mantissa, sign = int(f"{sign}{whole}{decimals}"), int(f"{sign}1") * (sign != "")
    seen = begin + last + 1 + pending
    return Span(document, begin + first, begin + last, seen, sign, mantissa, len(decimals))


def numbers_at(numerals: Numerals, row: int, t: int) -> list[Span]:
    """The visible ones, the newest first, with 0 for "+"; also that the others are all 0."""
    minus = -numerals.negative.long()
    known = (numerals.first, numerals.last, numerals.seen, minus, numerals.mantissa, numerals.places)
    visible = numerals.visible[row, t].tolist()
    for fact in (*known, numerals.value, numerals.fits):
        assert not fact[row, t][~numerals.visible[row, t]].any()
    columns = zip(*(fact[row, t].tolist() for fact in known), strict=True)
    document = numerals.document[row, t].item()
    return [Span(document, *facts) for facts, shown in zip(columns, visible, strict=True) if shown]


def has_comma(tok, ids: list[int], span: Span) -> bool:
    return any(tok.token_bytes(id) == b"," for id in ids[span.first : span.last])


@all_lexers
def test_numbers_are_those_of_the_text(tok, thousands):
    rows = random_rows(tok, rows=100, length=32)
    numerals = LEXERS[tok.kind, thousands](rows)
    met = grouped = 0
    for row, ids in enumerate(rows.tolist()):
        found = spans(tok, ids, thousands)
        met += len(found)
        grouped += sum(has_comma(tok, ids, span) for span in found)
        document = 0
        for t, id in enumerate(ids):
            assert numerals.document[row, t] == document
            now = [span for span in found if span.document == document and span.seen <= t]
            expected = [span._replace(sign=min(span.sign, 0)) for span in now[::-1][:K]]
            assert numbers_at(numerals, row, t) == expected, (tok.decode(ids), t)
            document += id == tok.separator_id
    assert met > 300 and (grouped > 30) == thousands  # enough of them to mean something


@all_lexers
def test_positions_keep_what_they_promise(tok, thousands):
    """Up to three digits and a blank are appended, and the text read again: which number has grown?"""
    rows = random_rows(tok, rows=60, length=24)
    numerals = LEXERS[tok.kind, thousands](rows)
    digit, blank = tok.encode("7")[0], tok.encode(" ")[0]
    for row, ids in enumerate(rows.tolist()):
        for t, id in enumerate(ids):
            if id == tok.separator_id:
                assert not (numerals.may_open[row, t] or numerals.offset[row, t] or numerals.sign[row, t])
                continue
            text = (tok.decode(ids), t)
            endings = [[*[digit] * n, blank] for n in range(4)]
            over = [spans(tok, ids[: t + 1] + ending, thousands) for ending in endings]
            newest = [found[-1] for n, found in enumerate(over) if found and found[-1].seen == t + 1 + n]
            within = [span.first for span in newest if span.first <= t]
            assert numerals.offset[row, t] == (t + 1 - within[0] if within else 0), text
            opens = [span for span in over[1] if span.first == t + 1]
            assert numerals.may_open[row, t] == bool(opens), text
            assert numerals.sign[row, t] == (opens[0].sign if opens else 0), text


@all_lexers
@given(pieces=st.lists(st.sampled_from(PIECES), min_size=1, max_size=24))
@settings(max_examples=150)
def test_reader_agrees_with_lexer(tok, thousands, pieces):
    lexer, ids = LEXERS[tok.kind, thousands], encode(tok, pieces)
    numerals, reader = lexer(torch.tensor([ids])), Reader(lexer)
    for t, id in enumerate(ids):
        reader.feed(id)
        assert reader.offset == numerals.offset[0, t]
        assert reader.may_open == numerals.may_open[0, t]
        assert reader.digit == numerals.digit[0, t]
        assert reader.sign == numerals.sign[0, t]
        known = [(span.mantissa, span.places) for span in numbers_at(numerals, 0, t)]
        assert list(reader.numbers) == known
        assert reader.completed == (numerals.seen[0, t, 0].item() == t > 0)


@all_lexers
def test_later_tokens_change_nothing_earlier(tok, thousands):
    rows = random_rows(tok, rows=64, length=24)
    lexer = LEXERS[tok.kind, thousands]
    whole = lexer(rows)
    for length in range(1, 24):
        for full, part in zip(whole, lexer(rows[:, :length]), strict=True):
            assert torch.equal(full[:, :length], part)


@all_lexers
def test_following_is_the_number_that_the_text_goes_on_with(tok, thousands):
    rows = torch.cat([random_rows(tok, 100, 32), fractions_of(tok, 150, 32)])
    lexer = LEXERS[tok.kind, thousands]
    following, may_open = lexer.following(rows), lexer(rows).may_open
    met, commas = {"opens": 0, "slash": 0}, 0
    for row, ids in enumerate(rows.tolist()):
        found = spans(tok, ids, thousands)
        first = {span.first: span for span in found if not has_comma(tok, ids, span)}
        commas += len(found) - len(first)
        for t in range(len(ids) - 1):
            is_here = t + 1 in first and may_open[row, t].item()
            expected = expect_following(tok, ids, first, first[t + 1]) if is_here else [0] * len(following)
            assert [fact[row, t].item() for fact in following] == expected, (tok.decode(ids), t)
            met["opens"] += expected[0]
            met["slash"] += following.slash[row, t].item()
    assert met["opens"] > 500 and met["slash"] > 30 and (commas > 30) == thousands, (met, commas)


def fractions_of(tok, rows: int, length: int) -> torch.Tensor:
    pieces = [*"/" * 12, *"123468" * 3, *"-. (+" * 2, *[".5", " /"] * 2, ",567", None]
    return torch.tensor([encode(tok, random.choices(pieces, k=length))[:length] for _ in range(rows)])


def expect_following(tok, ids: list[int], first: dict[int, Span], span: Span) -> list:
    value = span.mantissa / 10**span.places
    expected = [True, span.last, value, span.mantissa, span.places, True]
    below = first.get(span.last + 2)
    if (
        below is not None
        and tok.token_bytes(ids[span.last + 1]) == b"/"
        and tok.token_bytes(ids[below.first]).isdigit()
        and span.places == below.places == 0
        and below.mantissa > 1
        and math.gcd(span.mantissa, below.mantissa) == 1
    ):
        return [*expected, True, below.mantissa, below.last, span.mantissa / below.mantissa]
    return [*expected, False, 0, 0, 0.0]


@pytest.mark.parametrize("text", ["1234567890123456789/2", "2/1234567890123456789", "3/4"])
def test_a_fraction_of_long_numbers_is_none(text):
    following = lexer_of(ByteTokenizer()).following(torch.tensor([list(f"={text} ".encode())]))
    assert following.opens[0, 0]
    assert following.slash[0, 0] == (text == "3/4")
    assert following.fits[0, 0] == (not text.startswith("1"))


@pytest.mark.parametrize(
    "text, numbers",
    [
        ("12+7*3=", [12, 7, 3]),
        ("5-3 5 - 3 5 -3 ", [5, 3, 5, 3, 5, 3]),
        ("5 - -3; (-5) x=-5 *-3 --5 ", [5, -3, -5, -5, -3, -5]),
        ("is -5 or +5? (2)-1 [2] -1 ", [-5, 5, 2, 1, 2, 1]),
        ("gpt-2 covid-19 gpt2 b2b _7 a1.5 ", [2, 19]),
        ("0.50 007, -0.5. 30. 1..2 ", [0.5, 7, -0.5, 30, 1, 2]),
        ("1.2.3 1.2.3.4 1.2. ", [1.2]),
        ("1,234 5th ", [1, 234, 5]),
        ("7\n-3 ", [-3]),  # another document
        ("8 12", [8]),  # 12 may go on
        ("8 12.", [8]),
    ],
)
def test_examples(text, numbers):
    assert values_at_the_end(read(text)) == numbers


def values_at_the_end(numerals: Numerals) -> list[float]:
    return numerals.value[0, -1][numerals.visible[0, -1]].tolist()[::-1]


@pytest.mark.parametrize(
    "text, numbers, offset",
    [
        ("1,234; -1,234.5 1,234,567, ", [1234, -1234.5, 1234567], 0),
        ("30, 1234, 5 ", [30, 1234, 5], 0),
        ("1,23 1234,567 0001,234 1,2,3 1,23,456 1,2345 1,23.4 gpt1,234 ", [], 0),
        ("1.5,2 1.5,234 .5,234 ", [1.5, 2, 1.5, 234, 5234], 0),
        ("1,,2 1,.5 1.,5 1,-5 ", [1, 2, 1, 5, 1, 5, 1, -5], 0),
        ("max(12,345) max(12, 345) ", [12345, 12, 345], 0),
        ("7 1,234", [7], 5),  # it may go on
        ("7 1,234,", [7], 6),
        ("7; -1,2", [7], 4),  # no number, but 1,234 may come of it
        ("7 12,34,", [7], 0),
        ("7 1234,", [7], 5),
        ("7 1234,5", [7], 0),
    ],
)
def test_examples_with_thousands(text, numbers, offset):
    numerals = read(text, num_inputs=12, thousands=True)
    assert values_at_the_end(numerals) == numbers
    assert numerals.offset[0, -1] == offset


@with_or_without_thousands
def test_what_is_written_with_commas_opens_nothing_for_the_loss(thousands):
    lexer = lexer_of(ByteTokenizer(), thousands=thousands)
    following = lexer.following(torch.tensor([list(b"=1,234 =30, =3/4, =3/1,234 ")]))
    opens = following.opens[0].nonzero().flatten().tolist()
    assert opens == ([7, 12, 14, 18] if thousands else [0, 2, 7, 12, 14, 18, 20, 22])
    assert following.slash[0].nonzero().flatten().tolist() == [12]


def test_the_example_of_the_docstring():
    numerals = read("12 - -3.5=", num_inputs=3)
    assert numerals.value[0, -1].tolist() == [-3.5, 12, 0]
    assert numerals.mantissa[0, -1].tolist() == [-35, 12, 0]
    assert numerals.places[0, -1].tolist() == [1, 0, 0]


def long_numbers(rows: int, thousands: bool) -> list[str]:
    """Signed, with up to 300 digits, zeros and nines in front and a point anywhere; many near 18 digits, and
    half of them with commas.
    """
    texts = []
    for _ in range(rows):
        length = random.choice([random.randint(1, 24), random.randint(14, 20), random.randint(1, 300)])
        zeros = random.choice([0, 0, random.randint(0, length - 1)])
        digits = "0" * zeros + "".join(random.choices(random.choice(["0123456789", "9"]), k=length - zeros))
        at = random.choice([length, random.randint(1, length)])
        point = "." * (at < length)
        whole = digits[:at]
        if thousands and random.random() < 0.5:
            whole = re.sub(r"(?<=\d)(?=(\d{3})+$)", ",", whole)
        texts.append(random.choice(["", "-", "+"]) + whole + point + digits[at:])
    return texts


@pytest.mark.parametrize("rows", [400, pytest.param(20_000, marks=pytest.mark.slow)])
@with_or_without_thousands
def test_values_are_as_exact_as_they_can_be(rows, thousands):
    texts = long_numbers(rows, thousands)
    ids = [list(text.encode()) for text in texts]
    lexer = lexer_of(ByteTokenizer(), 1, thousands)
    numerals = lexer(torch.tensor([row + [ord(" ")] * (404 - len(row)) for row in ids]))
    assert numerals.visible[:, -1].all()
    for row, text in enumerate(texts):
        value, mantissa, places, fits = (
            fact[row, -1, 0].item()
            for fact in (numerals.value, numerals.mantissa, numerals.places, numerals.fits)
        )
        exact, size = Fraction(text.replace(",", "")), sum(map(str.isdigit, text))
        assert fits == (size <= 18)
        assert places == len(text.partition(".")[2])
        assert mantissa == (exact * 10**places if fits else 0)
        if size <= 15:
            assert value == float(exact)
        assert abs(Fraction(value) - exact) <= abs(exact) * Fraction(1, 10**15), text
        first, last = numerals.first[row, -1, 0].item(), numerals.last[row, -1, 0].item()
        assert lexer.read_number(ids[row], first, last) == (exact * 10**places, places)


@all_lexers
def test_read_number_finds_the_sign_wherever_it_stands(tok, thousands):
    lexer = LEXERS[tok.kind, thousands]
    signs = 0
    for ids in random_rows(tok, rows=200, length=32).tolist():
        for span in spans(tok, ids, thousands):
            assert lexer.read_number(ids, span.first, span.last) == (span.mantissa, span.places)
            signs += span.sign < 0
    assert signs > 50


@pytest.mark.parametrize("separator_id", [None, -1])
def test_without_a_separator_a_row_is_one_document(separator_id):
    lexer = Lexer([bytes([byte]) for byte in range(256)], separator_id, num_inputs=2)
    numerals = lexer(torch.tensor([[255, *b"7\n-3 "]]))
    assert numerals.value[0, -1].tolist() == [3, 7]
    assert not numerals.document.any()


def test_beyond_float64_a_value_is_infinite_or_zero():
    numerals = read(f"{'9' * 330} 0.{'0' * 330}1 {'0' * 400} ")
    assert numerals.value[0, -1, :3].tolist() == [0, 0, math.inf]
    assert numerals.places[0, -1, :3].tolist() == [0, 331, 0]


def test_minus_zero_is_negative_in_writing_alone():
    numerals = read("-0 ")
    assert numerals.negative[0, -1, 0] and math.copysign(1, numerals.value[0, -1, 0]) == 1


def test_bpe_has_the_tokens_that_these_tests_are_about():
    tok = TOKENIZERS[-1]
    assert {" -", " +", "(-", "=-", "--", ".-", "..", "covid"} <= set(tok.tokens)
    ids = encode(tok, ["(-", "5", " +", " -", "5", "is", " -", "5", "--"])
    assert LEXERS["bpe", False](torch.tensor([ids])).sign[0].tolist() == [-1, 0, 0, -1, 0, 0, -1, 0, -1]


def test_the_characters_of_numbers_that_are_tokens():
    lexer = Lexer([b"ab", b"/", b"2000", b"7", b"-"], separator_id=None)
    assert lexer.char_ids == {"7": 3, "-": 4, "/": 1}
    numerals = lexer(torch.tensor([[2, 3, 0, 3, 1, 3, 1]]))  # "20007ab7/7/"
    assert numerals.first[0, -1][numerals.visible[0, -1]].tolist() == [5]


@pytest.mark.parametrize(
    "token, sign", [("covid-", 0), ("5) -", 0), ("] +", 0), ("is -", -1), (", +", 1), ("", 0)]
)
def test_a_token_may_say_by_itself_what_its_sign_is(token, sign):
    lexer = Lexer([token.encode(), b"7", b" "], separator_id=None)
    numerals, reader = lexer(torch.tensor([[1, 0, 1, 2]])), Reader(lexer)
    for id in (1, 0):
        reader.feed(id)
    assert numerals.sign[0, 1] == reader.sign == sign
    assert lexer.read_number([1, 0, 1, 2], 2, 2) == (-7 if sign < 0 else 7, 0)


def test_blanks_that_end_a_token_are_blanks():
    numerals = Lexer([b") ", b"-", b"7", b" "], separator_id=None)(torch.tensor([[0, 1, 2, 3]]))
    assert numerals.value[0, -1, 0] == 7


def test_a_change_of_precision_leaves_values_alone():
    lexer = lexer_of(ByteTokenizer())
    ids = torch.tensor([list(b"0.1 123456.78901 ")])
    before = lexer(ids)
    after = lexer.to(torch.bfloat16)(ids)
    assert torch.equal(before.value, after.value) and after.value.dtype == torch.float64
    assert lexer.state_dict() == {}


@with_or_without_thousands
def test_compiles_into_one_graph(thousands):
    tok = TOKENIZERS[1]
    lexer, rows = LEXERS[tok.kind, thousands], random_rows(tok, rows=4, length=16)
    for function in (lexer, lexer.following):
        compiled = torch.compile(function, backend="eager", fullgraph=True)
        assert all(map(torch.equal, compiled(rows), function(rows)))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_reads_the_same():
    rows = random_rows(TOKENIZERS[1], rows=64, length=64)
    lexer = lexer_of(TOKENIZERS[1])
    here = [*lexer(rows), *lexer.following(rows)]
    lexer.cuda()
    there = [*lexer(rows.cuda()), *lexer.following(rows.cuda())]
    assert all(torch.equal(a, b.cpu()) for a, b in zip(here, there, strict=True))
