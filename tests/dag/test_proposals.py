"""Offers against a reader that goes through the text token by token, and what is spelled."""

import random
from itertools import takewhile

import pytest
import torch

from dag.proposals import NOTHING, Offers, spell, spread

CHARACTERS = "0123456789-./"
CHAR_IDS = {char: 10 + index for index, char in enumerate(CHARACTERS)}
OVER = 40


def ids(text: str) -> list[int]:
    return [CHAR_IDS[char] for char in text]


def held(written, row, position, idx, inside):
    """(plan, symbol) at every position of row 0 that has an offer: it lasts as long as the text says what is
    offered, and is inside a number.
    """
    offers, plan, left = [], None, []
    for t, token in enumerate(idx):
        left = left[1:] if left[:1] == [token] and inside[t] else []
        for n in range(len(written)):
            if (row[n], position[n]) == (0, t) and written[n]:
                assert not left, "a plan is made while an earlier one holds"
                plan, left = n, written[n]
        offers.append((plan, left[0]) if left else (len(written), NOTHING))
    return offers


def random_text(length: int) -> list[int]:
    """Few characters, so that offers are often right."""
    return [random.choice(ids("012/")) for _ in range(length)]


def random_plans(idx: list[list[int]], count: int):
    """At most `count` plans, in order; some write what the text says. None is made while another holds."""
    T, at, written = len(idx[0]), [], []
    places = [(row, position) for row in range(len(idx)) for position in range(T)]
    free = (0, 0)  # the first place where nothing holds
    for row, position in sorted(random.sample(places, count)):
        if (row, position) < free:
            continue
        follows = idx[row][position + 1 :]
        right = follows[: random.randint(0, 5)] + random_text(random.randint(0, 2))
        symbols = random.choice([[], random_text(random.randint(1, 4)), right])
        at.append((row, position))
        written.append([*symbols, OVER] if symbols else [])
        agreed = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(symbols, follows)))
        free = (row, position + agreed + 1)
    return at, written


@pytest.mark.parametrize("count", [0, 1, 4, 20])
def test_offers_are_those_of_a_reader(count):
    for _ in range(30):
        idx = [random_text(12) for _ in range(3)]
        at, written = random_plans(idx, count)
        row, position = torch.tensor(at, dtype=torch.long).view(-1, 2).T
        log_p = -torch.rand(len(at))
        inside = torch.rand(3, 12) < 0.9
        offers = spread(written, row, position, log_p, torch.tensor(idx), inside)
        assert offers.symbol.shape == offers.plan.shape == offers.log_probability.shape == (3, 12)
        for r in range(3):
            expected = held(
                written, [row - r for row, _ in at], [position for _, position in at], idx[r], inside[r]
            )
            found = list(zip(offers.plan[r].tolist(), offers.symbol[r].tolist()))
            assert found == expected, (idx[r], at, written)
        padded = torch.cat([log_p, torch.zeros(1)])
        assert torch.equal(offers.log_probability, padded[offers.plan])
        _, t = offered = (offers.plan < len(at)).nonzero(as_tuple=True)
        assert torch.equal(offers.written[offered], t - position[offers.plan[offered]])


def offered(text: str, plans: dict[int, str]) -> str:
    """What is offered at each position; "|" for a number that is over, " " for nothing."""
    row = torch.zeros(len(plans), dtype=torch.long)
    written = [spell(result, 0, CHAR_IDS, OVER) for result in plans.values()]
    idx = torch.tensor([ids(text)])
    offers = spread(
        written,
        row,
        torch.tensor(list(plans)),
        torch.zeros(len(plans)),
        idx,
        torch.ones_like(idx, dtype=torch.bool),
    )
    names = {id: char for char, id in CHAR_IDS.items()} | {OVER: "|", NOTHING: " "}
    return "".join(names[symbol] for symbol in offers.symbol[0].tolist())


def test_offers_by_hand():
    assert offered("0/33/0", {1: "33"}) == " 33|  "
    assert offered("0/34/0", {1: "33"}) == " 33   "  # the text departs
    assert offered("0/3", {1: "3456"}) == " 34"  # and the row may end at any point
    assert offered("0/-3.5/", {1: "-3.5"}) == " -3.5| "
    assert offered("/1/2/", {0: "1", 2: "2", 4: "77"}) == "1|2|7"
    assert offered("/3/4/", {0: "3/4"}) == "3/4| "
    assert offered("/3/9/", {0: "3/4"}) == "3/4  "


def test_nothing_is_offered_by_plans_without_a_result():
    idx = torch.zeros(2, 3, dtype=torch.long)
    offers = spread([[], []], torch.tensor([0, 1]), torch.tensor([0, 1]), torch.ones(2), idx, idx == 0)
    assert (offers.symbol == NOTHING).all() and (offers.plan == 2).all() and not offers.log_probability.any()
    assert isinstance(offers, Offers)


@pytest.mark.parametrize(
    "text, sign, expected",
    [
        ("33", 0, "33"),
        ("-3.5", 0, "-3.5"),
        ("-7/2", -1, "7/2"),  # the sign has been written
        ("7/2", 1, "7/2"),
        ("7", -1, None),  # and with that sign no longer right
        ("-7", 1, None),
        (None, 0, None),
        (None, -1, None),
    ],
)
def test_results_are_spelled_behind_a_glued_sign(text, sign, expected):
    assert spell(text, sign, CHAR_IDS, OVER) == ([] if expected is None else [*ids(expected), OVER])


def test_what_the_vocabulary_cannot_spell_is_not_begun():
    digits = {char: id for char, id in CHAR_IDS.items() if char.isdigit()}
    assert spell("12", 0, digits, OVER) == [*ids("12"), OVER]
    for text in ("-12", "1.2", "1/2"):
        assert spell(text, 0, digits, OVER) == []
    assert spell("-12", -1, digits, OVER) == [*ids("12"), OVER]
