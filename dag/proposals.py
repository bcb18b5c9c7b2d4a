"""What the DAG writes: a result's characters, offered one by one for as long as the text goes along.

    12 + 7 * 3 =          a plan is made at "=", its result is written "33"
    12 + 7 * 3 = 3        the text has followed: now "3" again is offered, and after it OVER

One plan a number: it is made at the position before the number and holds until the text departs from it. None is
made behind the bar of a fraction, which belongs to the plan before its numerator.

Legend: B batch, T tokens, N plans, L symbols: characters and OVER.
"""

from itertools import chain
from typing import NamedTuple

import torch
import torch.nn.functional as F

NOTHING = -1  # as an offer


class Offers(NamedTuple):
    symbol: torch.Tensor  # (B, T) int64: a token id, vocab_size where the number is over, or NOTHING
    log_probability: torch.Tensor  # (B, T), of the plan behind it; 0 for nothing
    written: torch.Tensor  # (B, T) int64: how many of the plan's symbols the text has written so far
    plan: torch.Tensor  # (B, T) int64: which of the N plans; N for nothing


def spell(text: str | None, sign: int, char_ids: dict[str, int], over: int) -> list[int]:
    """A result's tokens and `over` behind them; [] where there is none, or the vocabulary lacks a character.

    Where the text has written a sign already, `sign` -1 or 1, only a result with this sign has anything to add.
    """
    if text is None or (sign != 0 and text.startswith("-") != (sign < 0)):
        return []
    tokens = [char_ids.get(char) for char in text[1 if sign < 0 else 0 :]]
    return [] if None in tokens else [*tokens, over]


def spread(
    written: list[list[int]],
    row: torch.Tensor,
    position: torch.Tensor,
    log_p: torch.Tensor,
    idx: torch.Tensor,
    inside: torch.Tensor,
) -> Offers:
    """What N plans, made at (row, position), offer at all positions of the tokens (B, T): as long as these write what was
    offered, and are `inside` (B, T) a number or a fraction.
    """
    B, T = idx.shape
    N, lengths = len(written), torch.tensor([len(tokens) for tokens in written], dtype=torch.long)
    L = max([1, *map(len, written)])
    symbols = torch.full((N, L), NOTHING)
    symbols[torch.arange(L) < lengths[:, None]] = torch.tensor(
        list(chain.from_iterable(written)), dtype=torch.long
    )
    symbols = symbols.to(idx.device)  # (N, L)
    at = position[:, None] + torch.arange(L, device=idx.device)  # (N, L): where symbol k is offered
    tokens = (row[:, None], at.clamp(max=T - 1)[:, 1:])
    follows = F.pad((idx[tokens] == symbols[:, :-1]) & inside[tokens], (1, 0), value=True)
    holds = follows.long().cumprod(1).bool() & (at < T) & (symbols != NOTHING)
    plan, k = holds.nonzero(as_tuple=True)  # the host waits for the device
    owner = idx.new_full((B * T,), N)
    owner[row[plan] * T + at[plan, k]] = plan  # one a position: no plan is made inside a number
    owner = owner.view(B, T)
    offered = owner < N
    k = (torch.arange(T, device=idx.device) - F.pad(position, (0, 1))[owner]).where(offered, 0)
    symbol = F.pad(symbols, (0, 0, 0, 1), value=NOTHING)[owner, k]
    return Offers(symbol, F.pad(log_p, (0, 1))[owner], k, owner)


def digit_weights(written: list[str | None], symbols: list[list[int]]) -> torch.Tensor:
    """How much symbol k of N results moves when the result grows by 1: 10^-place for a digit, 0 for all else, negative
    in a negative number. (N + 1, L), the last row for no plan.
    """
    rows = []
    for text, tokens in zip(written, symbols):
        text = text or ""
        chars = text[len(text) + 1 - len(tokens) :] if tokens else ""  # without a sign written before
        whole = len(chars.partition(".")[0])
        sign = -1.0 if text.startswith("-") else 1.0
        place = [whole - 1 - k + (k > whole) for k in range(len(chars))]
        rows.append(
            [sign * 10.0**-p if char.isdigit() else 0.0 for p, char in zip(place, chars)]
            + [0.0] * bool(tokens)
        )
    L = max([1, *map(len, rows)])
    return torch.tensor([row + [0.0] * (L - len(row)) for row in [*rows, []]], dtype=torch.float64)
