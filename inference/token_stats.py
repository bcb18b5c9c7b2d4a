"""How sure a model was of every token of a text: probabilities, ranks and gates, and colours for them.

    told = choices(model, tokenizer, tokens, start=1)
    told[0].probability, told[0].rank, told[0].gate
    told[0].likeliest                       # (("3", 0.994), ("1", 0.001), ...)
    MODES["rank"].color(told[0])            # "#1f73d0"

One forward pass over the finished text, so nothing in the way of generation knows of this.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from rich.segment import Segment
from rich.style import Style

from dag_model import GPT, DAGState, DenseState
from data.tokenizer import Tokenizer
from inference.engine import windows

LIKELIEST = 10  # tokens of a choice


@dataclass(frozen=True)
class Choice:
    """A token of a text, and what the model could have written in its place."""

    token: int
    text: str
    probability: float  # the model's own, at temperature 1
    rank: int  # 1 is the likeliest token
    gate: float  # how far the token is the DAG's: 0 where nothing was offered, without a DAG; see has_gate
    likeliest: tuple[tuple[str, float], ...]  # LIKELIEST tokens with their probabilities, the likeliest first


@torch.inference_mode()
def choices(model: GPT, tokenizer: Tokenizer, tokens: list[int], start: int = 1) -> list[Choice]:
    """What was chosen from at token `start` and at every later one, in the contexts in which engine.generate
    writes them: beyond the model's block_size by its window rule. Token 0 is no choice: nothing is before it.
    """
    assert not model.training, "dropout would be on: call model.eval() first"
    assert start > 0, f"start is {start}; the first token has nothing before it"
    told = []
    for begin, first, end in windows(len(tokens), model.config.block_size):
        if end <= start:
            continue
        first = max(first, start)
        idx = torch.tensor([tokens[begin : end - 1]], device=model.lm_head.weight.device)
        hidden, state = model.hidden_states(idx)
        log_p = F.log_softmax(model.lm_head(hidden[0, first - begin - 1 :]).float(), dim=-1)  # (T, V)
        gates = gates_of(state, idx.size(1))[first - begin - 1 :]
        chosen = torch.tensor(tokens[first:end], device=idx.device)[:, None]
        own = log_p.gather(1, chosen)
        ranks = (log_p > own).sum(1) + 1
        top, top_ids = log_p.topk(min(LIKELIEST, log_p.size(1)))
        columns = chosen[:, 0], own[:, 0].exp(), ranks, gates, top.exp(), top_ids
        for token, p, rank, gate, odds, ids in zip(*(column.tolist() for column in columns)):
            likeliest = tuple((tokenizer.decode([id]), q) for id, q in zip(ids, odds))
            told.append(Choice(token, tokenizer.decode([token]), p, rank, gate, likeliest))
    return told


def has_gate(model: GPT) -> bool:
    return model.dag is not None and (model.reads_numbers or model.config.dag_gate)


def gates_of(state: DAGState | DenseState | None, length: int) -> torch.Tensor:
    """(T,), 0 for a plain GPT, 1 for a DAG without a gate"""
    return torch.zeros(length) if state is None else state.gate[0, :, 0].float()


# ----------------------------------------------------------------------------------------------------
# Colours

# From sure to unsure. All have a contrast of 4.3 and more to white and to black, to be read on both, and are
# five colours in a terminal that has 16 too.
COLORS, GREY = ("#1f73d0", "#0f8268", "#867200", "#dd3322", "#b44ab4"), "#767676"


class Mode(NamedTuple):
    """What a token is coloured by."""

    measure: Callable[[Choice], float]
    least: tuple[float, ...]  # of it for every colour but the last
    legend: tuple[str, ...]
    colors: tuple[str, ...] = COLORS

    def color(self, choice: Choice) -> str:
        return self.colors[sum(self.measure(choice) < least for least in self.least)]


MODES = {
    "probability": Mode(
        lambda choice: choice.probability,
        (0.99, 0.9, 0.5, 0.1),
        ("99 % and more", "90 %", "50 %", "10 %", "less"),
    ),
    "rank": Mode(
        lambda choice: -choice.rank,
        (-1, -2, -5, -20),
        ("the likeliest token", "the 2nd", "to 5th", "to 20th", "beyond"),
    ),
    "gate": Mode(
        lambda choice: choice.gate,
        (0.99, 0.9, 0.5, 0.05),
        ("0.99 and more", "0.9", "0.5", "0.05", "less"),
        (*COLORS[:4], GREY),
    ),
}


def legend(name: str) -> Iterator[Segment]:
    """A line that says what the colours of MODES[name] are."""
    yield Segment(f"{name}:")
    for text, color in zip(MODES[name].legend, MODES[name].colors):
        yield Segment("  ")
        yield Segment(text, Style(color=color))
    yield Segment("\n")
