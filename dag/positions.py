"""Where a token stands: in which document, at which position of it, and which tokens it attends to.

Attention and positions begin anew after a separator: the lines of a row do not see each other. With the numbers
of the text at hand (dag/number_lexer.py), the trunk reads long ones like short ones, and never meets an unseen length:

    1 2 3 4 5 + 7 =       tokens
    0 1 1 1 1 2 3 4       positions: digits beyond `full_digits` do not count,
    0 0 0 1 2 0 0 0       and each after the first of these halves the weight that attention gives it

Points are not faded: that of "12345. " ends a sentence, and looks like any other as long as nothing follows.

`layout` does this for whole rows, `Row` token by token while decoding.
"""

import math
from collections import deque
from typing import NamedTuple

import torch
import torch.nn.functional as F

from dag.number_lexer import Following, Lexer, Numerals, Reader


class DigitView(NamedTuple):
    """How the trunk sees the digits of a long number."""

    full_digits: int  # so many, a sign among them, are seen in full
    decay: float  # each digit beyond has this share of the attention weight of the one before

    def attention_bias(self, depth: torch.Tensor) -> torch.Tensor:
        """Return what is added to the attention logits of tokens so deep in a number, float32."""
        return (self.full_digits + 1 - depth).clamp(max=0) * -math.log(self.decay)


class Layout(NamedTuple):
    positions: torch.Tensor  # (B, T) or (T,) int64, from 0 in every document
    mask: torch.Tensor | None  # (B, 1, T, P) to add to attention's logits, or bool; None is causal
    depth: torch.Tensor | None = (
        None  # (B, T) int64 in 0..full_digits, how deep in a number; None without numbers
    )


def layout(
    idx: torch.Tensor, separator_id: int, numerals: Numerals | None, view: DigitView | None = None
) -> Layout:
    """The layout of rows of tokens (B, T) that begin with a document; separator_id -1 for one endless document."""
    position = torch.arange(idx.size(1), device=idx.device)
    if separator_id < 0 and numerals is None:
        return Layout(position, None)
    separator = idx == separator_id
    document = separator.cumsum(1) - separator.long()
    mask = (document[:, :, None] == document[:, None]).tril()[:, None]  # (B, 1, T, T)
    begins = F.pad(separator[:, :-1], (1, 0), value=True)
    start = position.where(begins, 0).cummax(1).values
    if numerals is None:
        return Layout(position - start, mask)
    depth = numerals.offset.where(numerals.digit, numerals.offset.clamp(max=view.full_digits))
    counted = (depth <= view.full_digits).cumsum(1)
    mask = view.attention_bias(depth)[:, None, None].masked_fill(~mask, -torch.inf)
    return Layout(counted - counted.gather(1, start), mask, depth.clamp(max=view.full_digits))


def fraction_bars(lexer: Lexer, idx: torch.Tensor, numerals: Numerals) -> torch.Tensor:
    """(B, T) bool: the bar of "3/4", directly behind a number."""
    return (idx == lexer.char_ids.get("/", -1)) & (F.pad(numerals.offset[:, :-1], (1, 0)) > 0)


def may_compute(lexer: Lexer, idx: torch.Tensor, numerals: Numerals) -> torch.Tensor:
    """(B, T) bool: whether a number may open next, and there are numbers to compute it from. Not behind the bar
    of "3/4": what computes a fraction stands before it.
    """
    return numerals.may_open & numerals.visible[..., 0] & ~fraction_bars(lexer, idx, numerals)


def following(lexer: Lexer, idx, targets, separator_id: int) -> Following:
    """The numbers that open behind each of the tokens (B, T), whose `targets` are the tokens behind them."""
    last = targets[:, -1:]
    return lexer.following(torch.cat([idx, last.where(last >= 0, max(separator_id, 0))], dim=1))


class Row:
    """A row while it is decoded: where its newest token stands, its numbers, and what the DAG offers there."""

    def __init__(self, separator_id: int, lexer: Lexer | None, view: DigitView):
        self.separator_id = separator_id
        self.view = view
        self.reader = None if lexer is None else Reader(lexer)
        self.slash_id = -1 if lexer is None else lexer.char_ids.get("/", -1)
        self.column, self.start, self.position = -1, 0, -1  # in the row; of the document; in the document
        self.ended = self.at_bar = False
        length = None if lexer is None else lexer.num_inputs
        self.readers, self.seen = deque(maxlen=length), deque(maxlen=length)  # hidden states (C,), columns
        self.offer: list[tuple] = []  # the next one first: symbol, gate (), vector (C,)

    def feed(self, token: int) -> None:
        self.column += 1
        self.at_bar = token == self.slash_id and self.offset > 0
        if self.ended:
            self.start, self.position = self.column, -1
            self.readers.clear()
            self.seen.clear()
        self.ended = token == self.separator_id
        if self.reader is not None:
            self.reader.feed(token)
            if self.reader.completed:
                self.seen.appendleft(self.column)
        self.position += self.depth <= self.view.full_digits
        goes_on = self.offer and self.offer[0][0] == token and (self.offset > 0 or self.at_bar)
        self.offer = self.offer[1:] if goes_on else []

    @property
    def offset(self) -> int:
        return 0 if self.reader is None else self.reader.offset

    @property
    def depth(self) -> int:
        """How deep in a number the trunk takes the newest token to be."""
        return (
            self.offset if self.offset == 0 or self.reader.digit else min(self.offset, self.view.full_digits)
        )

    @property
    def may_compute(self) -> bool:
        """As the function of this name, of the newest token."""
        return self.reader.may_open and len(self.reader.numbers) > 0 and not self.at_bar


def open_bias(rows: list[Row], prompts: list[list[int]], block_size: int, device) -> torch.Tensor:
    """Feeds rows their prompts -> what attention adds to the logits of every column, (B, block_size): -inf where a row
    does not see it, or has not come to it yet.
    """
    bias = torch.full((len(rows), block_size), -torch.inf, device=device)
    for of_row, row, tokens in zip(bias, rows, prompts):
        depths = []
        for token in tokens:
            row.feed(token)
            depths.append(row.depth)
        of_row[row.start : len(tokens)] = row.view.attention_bias(
            torch.tensor(depths[row.start :], device=device)
        )
    return bias


def next_layout(rows: list[Row], bias: torch.Tensor) -> Layout:
    """The layout of the newest token of every row, which is entered in their `bias` (B, P)."""
    for r, row in enumerate(rows):
        if row.column == row.start:  # a document begins
            bias[r] = -torch.inf
    facts = torch.tensor([[row.position, row.column, row.depth] for row in rows], device=bias.device)
    positions, column, depth = facts.T[..., None]  # (B, 1) each
    view = rows[0].view
    bias.scatter_(1, column, view.attention_bias(depth))
    return Layout(positions, bias[:, None, None], depth.clamp(max=view.full_digits))
