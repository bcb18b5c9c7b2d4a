"""Layouts of whole rows against a reader that goes through the text token by token."""

import math

import pytest
import torch
from conftest import GLUED, SEPARATOR, VOCABULARY, random_text

from dag.number_lexer import Lexer
from dag.positions import DigitView, Row, fraction_bars, layout, may_compute, next_layout, open_bias

VOCABULARIES = {"char": VOCABULARY, "glued": GLUED}
K, OVER = 4, len(VOCABULARY)
VIEW = DigitView(full_digits=2, decay=0.5)


def tokens(text: str) -> torch.Tensor:
    return torch.tensor([[VOCABULARY.index(char.encode()) for char in text]], dtype=torch.long)


def layout_of(text: str):
    lexer = Lexer(VOCABULARY, SEPARATOR, K)
    return layout(tokens(text), SEPARATOR, lexer(tokens(text)), VIEW)


def test_long_numbers_take_no_more_room_than_short_ones():
    long = layout_of("12345+7=\n-678 9")
    assert long.positions[0].tolist() == [0, 1, 1, 1, 1, 2, 3, 4, 5, 0, 1, 1, 1, 2, 3]
    assert long.depth[0].tolist() == [1, 2, 2, 2, 2, 0, 1, 0, 0, 1, 2, 2, 2, 0, 1]
    halvings = (
        long.mask[0, 0].diagonal() / math.log(0.5)
    ).tolist()  # of the weight that attention gives a token
    assert halvings == pytest.approx([0, 0, 0, 1, 2, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0])


def test_a_full_stop_stands_out_however_long_the_number_before_it():
    decimal = layout_of("=12345.678. ")
    assert decimal.positions[0].tolist() == [0, 1, 2, 2, 2, 2, 3, 3, 3, 3, 4, 5]
    assert decimal.depth[0].tolist() == [0, 1, 2, 2, 2, 2, 2, 2, 2, 2, 2, 0]
    faded = decimal.mask[0, 0].diagonal() < 0
    assert faded.tolist() == [char.isdigit() and n > 3 for n, char in enumerate("=12345.678. ")]


def test_positions_behind_a_number_do_not_depend_on_its_length():
    behind = {
        layout_of("=" + "7" * length + "+2=").positions[0, -1].item()
        for length in range(VIEW.full_digits, 30)
    }
    assert len(behind) == 1


@pytest.fixture(params=VOCABULARIES)
def vocabulary(request):
    return VOCABULARIES[request.param]


@pytest.mark.parametrize("separator_id", [-1, SEPARATOR], ids=["endless", "documents"])
@pytest.mark.parametrize("with_numbers", [False, True], ids=["plain", "numbers"])
def test_rows_read_token_by_token_have_the_layout_of_the_whole(vocabulary, separator_id, with_numbers):
    """From prompts of all lengths on."""
    B, T = 60, 30
    idx = random_text(B, T, vocabulary=vocabulary)
    lexer = Lexer(vocabulary, separator_id, K) if with_numbers else None
    numerals = lexer(idx) if with_numbers else None
    whole = layout(idx, separator_id, numerals, VIEW)
    positions = whole.positions.expand(B, T)
    mask = (
        torch.ones(T, T, dtype=torch.bool).tril().expand(B, T, T) if whole.mask is None else whole.mask[:, 0]
    )
    if mask.dtype == torch.bool:
        mask = torch.zeros(B, T, T).masked_fill(~mask, -torch.inf)
    lengths = 1 + torch.arange(B) % (T - 10)
    rows = [Row(separator_id, lexer, VIEW) for _ in range(B)]
    prompts = [row[:length] for row, length in zip(idx.tolist(), lengths.tolist())]
    bias, b = open_bias(rows, prompts, T, "cpu"), torch.arange(B)
    for step in range(10):
        at = lengths + step
        for row, token in zip(rows, idx[b, at].tolist()):
            row.feed(token)
        newest = next_layout(rows, bias)
        assert torch.equal(newest.positions[:, 0], positions[b, at])
        assert torch.equal(newest.mask[:, 0, 0], mask[b, at])
        if with_numbers:
            assert torch.equal(newest.depth[:, 0], whole.depth[b, at])


def test_a_row_knows_what_the_lexer_knows(vocabulary):
    B, T = 40, 30
    idx = random_text(B, T, vocabulary=vocabulary)
    lexer = Lexer(vocabulary, SEPARATOR, K)
    numerals = lexer(idx)
    bars, computes = fraction_bars(lexer, idx, numerals), may_compute(lexer, idx, numerals)
    for b in range(B):
        row = Row(SEPARATOR, lexer, VIEW)
        for t, token in enumerate(idx[b].tolist()):
            row.feed(token)
            assert (row.at_bar, row.may_compute) == (bars[b, t], computes[b, t])
            assert list(row.seen) == numerals.seen[b, t][numerals.visible[b, t]].tolist()


def test_nothing_is_seen_across_a_separator_nor_ahead():
    idx = random_text(20, 30)
    numerals = Lexer(VOCABULARY, SEPARATOR, K)(idx)
    for facts in (None, numerals):
        result = layout(idx, SEPARATOR, facts, VIEW)
        sees = result.mask[:, 0] if facts is None else result.mask[:, 0] > -torch.inf
        for row, seen, positions in zip(idx.tolist(), sees, result.positions):
            for t in range(30):
                start = max([s + 1 for s in range(t) if row[s] == SEPARATOR], default=0)
                assert seen[t].nonzero().flatten().tolist() == list(range(start, t + 1))
                assert positions[start] == 0 and positions[t] <= t - start
                assert facts is not None or positions[t] == t - start


def test_one_endless_document_without_numbers_needs_no_mask():
    result = layout(random_text(2, 9), -1, None)
    assert result.mask is None and result.positions.tolist() == list(range(9))


def test_plans_are_made_where_a_number_may_open_but_not_behind_a_bar():
    text, row, computes = "12+3/4=7/ 8 /", Row(SEPARATOR, Lexer(VOCABULARY, SEPARATOR, K), VIEW), ""
    for char, token in zip(text, tokens(text)[0].tolist()):
        row.feed(token)
        computes += char if row.may_compute else "_"
    assert computes == "__+___=__ _ /"


@pytest.mark.parametrize(
    "offer, text, left",
    [
        ("34", "", "34"),
        ("34", "3", "4"),
        ("34", "34", ""),
        ("34", "5", None),
        ("34", "35", None),
        ("-34", "-", "34"),
        ("3/4", "3/", "4"),
        ("3/4", "3/4", ""),
        ("3.4", "3.", "4"),
    ],
)
def test_an_offer_lasts_while_the_text_follows_it(offer, text, left):
    row = Row(SEPARATOR, Lexer(VOCABULARY, SEPARATOR, K), VIEW)
    for token in tokens("9=")[0].tolist():
        row.feed(token)
    row.offer = [(symbol, None) for symbol in [*tokens(offer)[0].tolist(), OVER]]
    for token in tokens(text)[0].tolist():
        row.feed(token)
    expected = [] if left is None else [*tokens(left)[0].tolist(), OVER]
    assert [symbol for symbol, _ in row.offer] == expected


def test_an_offer_ends_where_the_text_means_something_else():
    row = Row(SEPARATOR, Lexer(VOCABULARY, SEPARATOR, K), VIEW)
    for token in tokens("(9)")[0].tolist():
        row.feed(token)
    row.offer = [(symbol, None) for symbol in [*tokens("-34")[0].tolist(), OVER]]
    row.feed(VOCABULARY.index(b"-"))  # it subtracts: another number may open here
    assert row.offer == [] and row.may_compute
