"""Token ids -> the numbers their text spells: where they stand, what they are, and since when that is known.

    lexer = Lexer([b"0", ..., b"9", b" ", b"-", b"=", ...], separator_id, num_inputs=8)
    numerals = lexer(ids)         # ids of "12 - -3.5=", (1, 10); at its last position:
    numerals.value[0, -1]         # [-3.5, 12., 0., ...]: the newest first
    numerals.mantissa[0, -1], numerals.places[0, -1]         # [-35, 12, 0, ...] and [1, 0, 0, ...]

A number is [sign] digits [point digits], and a digit is a token of one ASCII digit:

- "-" and "+" are signs directly before a digit, unless an operand ends before them ("5-3", "5 - 3", "(2)-1")
  or a letter stands directly before them ("covid-19"). Some end a longer token (" -", "(-"): those are glued
- a digit directly after a letter or "_" opens no number ("gpt2"), and no run of digits with two points is one
- everything else separates: "1,234" is 1 and 234, "1e3" is 1, ".5" is 5
- unless `thousands` are read: "1,234.5" is one number then, and commas that leave other than 1 to 3 digits
  before them and 3 between make a run none ("1,23", "1234,567", "1,2,3"); behind a point they separate
- nothing looks ahead: a number is visible once it is certain to be over, a token after its last digit, or two
  where a point or comma might have continued it ("30. ")
- a separator resets everything: it is the last token of its document

Lexer does this for a whole batch in a fixed number of tensor operations. Reader does it token by token, in
plain Python, and is the reference. Letters, digits and blanks are those of ASCII.

Legend: B batch, T tokens, K numbers, V vocabulary.
"""

import string
from collections import deque
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F

DIGITS = 18  # any integer of so many fits int64
SPANS = (1, 2, 4, 8, 16)  # doubling them reaches 32 tokens: DIGITS, six commas and a point


def _characters(text: str) -> tuple[bytes, ...]:
    return tuple(char.encode() for char in text)


WORD = _characters(string.ascii_letters + string.digits + "_")
OPERAND = _characters(string.digits + ")]")


class Lexeme(NamedTuple):
    """What a token means to a number."""

    digit: int = -1  # 0 to 9
    sign: int = 0  # -1 or +1: its last character may be the sign of a number
    alone: bool = False  # and is the whole token
    bare: bool = False  # and has nothing but blanks before it: what it is depends on earlier tokens
    point: bool = False
    comma: bool = False  # of thousands, where they are read
    slash: bool = False
    separator: bool = False
    blank: bool = False
    # Ends in a letter: a digit after it opens no number, "-" after it is a hyphen. Also GPT-2's "2000", which
    # no text encodes to, but which a model may generate.
    word: bool = False
    operand: bool = False  # ends in an operand, blanks aside: "-" after it subtracts

    @classmethod
    def of(cls, token: bytes, thousands: bool) -> "Lexeme":
        before = token[:-1]
        is_digit = len(token) == 1 and token.isdigit()
        is_sign = (
            token.endswith((b"-", b"+"))
            and not before.endswith(WORD)
            and not before.rstrip().endswith(OPERAND)
        )
        return cls(
            digit=int(token) if is_digit else -1,
            sign=is_sign * (-1 if token.endswith(b"-") else 1),
            alone=is_sign and not before,
            bare=is_sign and not before.strip(),
            point=token == b".",
            comma=thousands and token == b",",
            slash=token == b"/",
            blank=not token.strip(),
            word=token.endswith(WORD) and not is_digit,
            operand=token.rstrip().endswith(OPERAND),
        )

    def unary(self, after_operand: bool, after_word: bool) -> int:
        """-1 or +1 where the token ends in the sign of a number that may follow."""
        return 0 if (self.bare and after_operand) or (self.alone and after_word) else self.sign


class Numerals(NamedTuple):
    """What the tokens up to and including each one say. All about a number is 0 where it is not visible."""

    document: torch.Tensor  # (B, T) int64, its index in the row; a separator belongs to the one it ends
    offset: torch.Tensor  # (B, T) int64, tokens read of a number, or of what may become one; 0 outside
    digit: torch.Tensor  # (B, T) bool, the token is a digit
    may_open: torch.Tensor  # (B, T) bool, a digit next would open a number; False at separators
    sign: torch.Tensor  # (B, T) int64, -1 or +1: the token ends in the glued sign of a number that may follow
    visible: torch.Tensor  # (B, T, K) bool, the K newest numbers of the document, the newest first
    first: torch.Tensor  # (B, T, K) int64, position of the first token: a digit, or a sign of its own
    last: torch.Tensor  # (B, T, K) int64, position of the last digit
    seen: torch.Tensor  # (B, T, K) int64, position at which it became visible
    negative: torch.Tensor  # (B, T, K) bool, written with "-", be it -0
    value: torch.Tensor  # (B, T, K) float64, correctly rounded up to 15 digits, else within 1e-15 of itself
    mantissa: torch.Tensor  # (B, T, K) int64: mantissa / 10^places is the number, where it `fits`
    places: torch.Tensor  # (B, T, K) int64
    fits: torch.Tensor  # (B, T, K) bool, at most 18 digits; `Lexer.read_number` reads all others exactly


class Following(NamedTuple):
    """The number that opens with the next token and is over within the row. (B, T); 0 where there is none.

    One with commas is none: results are written without, so that no plan could be credited with it.
    """

    opens: torch.Tensor  # bool
    last: torch.Tensor  # int64, position of its last digit
    value: torch.Tensor  # float64
    mantissa: torch.Tensor  # int64, as in Numerals
    places: torch.Tensor  # int64
    fits: torch.Tensor  # bool
    slash: torch.Tensor  # bool, the numerator of a fraction in lowest terms: 3/4, not 6/8, not 4/1
    denominator: torch.Tensor  # int64
    fraction_last: torch.Tensor  # int64, position of the denominator's last digit
    fraction_value: torch.Tensor  # float64


class Number(NamedTuple):
    """What Numerals says about a number, under the same names."""

    first: torch.Tensor
    last: torch.Tensor
    negative: torch.Tensor
    value: torch.Tensor
    mantissa: torch.Tensor
    places: torch.Tensor
    fits: torch.Tensor


class Scan(NamedTuple):
    """What forward and following share. (B, T) each"""

    document: torch.Tensor
    separator: torch.Tensor  # bool
    slash: torch.Tensor  # bool
    offset: torch.Tensor
    digit: torch.Tensor  # bool
    may_open: torch.Tensor
    sign: torch.Tensor
    comma: torch.Tensor  # bool: in a run
    in_run: torch.Tensor  # bool: a digit, or a point or comma of its number directly after one
    live: torch.Tensor  # bool: in a run that is a number if it ends here
    start: torch.Tensor  # position of the run's first digit, where live
    number: Number  # that the run spells if it ends here, where live


class Lexer(nn.Module):
    """Reads the numbers of token ids; `vocabulary` holds the bytes of every token. It has no weights.

    With separator_id None or -1 a row is one document. With `thousands`, "1,234" is one number, but so is the
    "12,345" of "max(12,345)", and nothing is read of "[1,2,3]". `char_ids` has the ids of those of
    "0123456789-./" that are tokens.
    """

    def __init__(
        self, vocabulary: list[bytes], separator_id: int | None, num_inputs: int = 8, thousands: bool = False
    ):
        super().__init__()
        self.num_inputs, self.thousands = num_inputs, thousands
        self.vocabulary = vocabulary
        self.lexemes = [Lexeme.of(token, thousands) for token in vocabulary]
        if separator_id is not None and separator_id >= 0:
            self.lexemes[separator_id] = Lexeme(separator=True)
        ids = {token: id for id, token in enumerate(vocabulary)}
        self.char_ids = {char: ids[char.encode()] for char in "0123456789-./" if char.encode() in ids}
        self.register_buffer(
            "table", torch.tensor(self.lexemes, dtype=torch.int8).T.contiguous(), persistent=False
        )
        powers = torch.tensor([float(f"1e{n}") for n in range(310)], dtype=torch.float64)  # 1e309 is infinity
        # as bits: model.to(torch.bfloat16) would round a buffer of floats
        self.register_buffer("power_bits", powers.view(torch.int64), persistent=False)

    def forward(self, ids: torch.Tensor) -> Numerals:
        """(B, T) int64 -> what is known at every position, from the tokens up to it alone."""
        if ids.device.type == "mps":
            raise ValueError("numbers are read in float64, which MPS does not have: use --device=cpu")
        scan = self.scan(ids)
        B, T = ids.shape
        position = torch.arange(T, device=ids.device)
        over = _before(scan.live) & ~scan.in_run
        count = over.cumsum(1)  # (B, T) numbers completed so far
        seen_at = ids.new_zeros(B, T + 1).scatter(1, (count - 1).where(over, T), position.expand(B, T))
        hidden = (count * _before(scan.separator)).cummax(1).values  # of which in earlier documents
        nth = count[..., None] - 1 - torch.arange(self.num_inputs, device=ids.device)  # (B, T, K)
        visible = nth >= hidden[..., None]
        nth = nth.clamp(min=0).flatten(1)
        seen = seen_at.gather(1, nth)
        end = (seen - 1).clamp(min=0)  # the last token of the run, (B, T * K)

        def known(fact):
            return fact.gather(1, end).view_as(visible).masked_fill(~visible, 0)

        return Numerals(
            document=scan.document,
            offset=scan.offset,
            digit=scan.digit,
            may_open=scan.may_open,
            sign=scan.sign,
            visible=visible,
            seen=seen.view_as(visible).masked_fill(~visible, 0),
            **Number(*map(known, scan.number))._asdict(),
        )

    def following(self, ids: torch.Tensor) -> Following:
        """(B, T + 1) -> (B, T). For the loss: it looks ahead, on purpose.

        A number whose end the row does not show does not count, nor does one that opens where `may_open` is
        false: that of "--5", as its first sign might have been its own.
        """
        scan = self.scan(ids)
        position = torch.arange(ids.size(1), device=ids.device)
        ends = scan.live & F.pad(~scan.in_run[:, 1:], (0, 1))
        # the first end from every position on; the last position, which is none, stands for no end
        next_end = position.where(ends, position[-1]).flip(1).cummin(1).values.flip(1)

        def at(fact, index):
            return fact.gather(1, index.clamp(max=ids.size(1) - 1))

        if self.thousands:
            ends = ends & (_count(scan.start, _before(scan.comma))[0] == 0)
        end = next_end[:, 1:]
        number = Number(*(at(fact, end) for fact in scan.number))
        opens = scan.may_open[:, :-1] & at(ends, end) & (number.first == position[1:])
        below = number.last + 2  # where a denominator would start
        end = at(next_end, below)
        denominator = Number(*(at(fact, end) for fact in scan.number))
        slash = opens & at(scan.slash, below - 1) & at(ends, end) & (at(scan.start, end) == below)
        slash = slash & (number.places == 0) & (denominator.places == 0)
        # a mantissa that does not fit is 0, and 0 is part of no such fraction
        slash = slash & (denominator.mantissa > 1) & (torch.gcd(number.mantissa, denominator.mantissa) == 1)

        facts = (number.last, number.value, number.mantissa, number.places, number.fits)
        fraction = (denominator.mantissa, denominator.last, number.value / denominator.value)
        return Following(
            opens,
            *(fact.masked_fill(~opens, 0) for fact in facts),
            slash,
            *(fact.masked_fill(~slash, 0) for fact in fraction),
        )

    def scan(self, ids: torch.Tensor) -> Scan:
        digit, sign, *flags = self.table[:, ids].unbind()
        alone, bare, point, comma, slash, separator, blank, word, operand = (flag.bool() for flag in flags)
        position = torch.arange(ids.size(1), device=ids.device)
        document = separator.cumsum(1) - separator.long()

        _, after_operand = _newest(position, blank, operand)
        after_word = _before(word)
        sign = sign.masked_fill((bare & after_operand) | (alone & after_word), 0)
        alone = alone & (sign != 0)

        is_digit = digit >= 0
        point = point & _before(is_digit)
        in_run = is_digit | point
        if self.thousands:
            comma, wrong, short = self._groups(position, is_digit, point, comma)
            in_run = in_run | comma
        start = (position * (is_digit & ~_before(in_run))).cummax(1).values
        points, digits, nonzero = _count(start, point, is_digit, digit > 0)
        places, significant = _count(start, is_digit & (points > 0), is_digit & (nonzero > 0))
        live = hopeful = in_run & ~after_word.gather(1, start) & (points - point.long() <= 1)
        if self.thousands:
            hopeful = live & ((position * wrong).cummax(1).values <= start)
            live = hopeful & ~short
        first = start - _before(alone).gather(1, start).long()
        negative = _before(sign < 0).gather(1, start)

        # 18 digits from the first that is not 0, and how many times ten they are to be taken
        head = self._mantissa(digit, position - start)
        head = head.gather(1, (position * (is_digit & (significant <= DIGITS))).cummax(1).values)
        head = head.where(~negative, -head)
        value = self._scaled(head, (significant - DIGITS).clamp(min=0) - places)

        fits = digits <= DIGITS
        last = position - (~is_digit).long()
        number = Number(first, last, negative, value, head.masked_fill(~fits, 0), places, fits)

        offset = (position - first + 1).where(hopeful, alone.long())
        may_open = (offset == 0) & ~in_run & ~word & ~separator
        sign = sign.long().masked_fill(alone, 0)
        facts = (document, separator, slash, offset, is_digit, may_open, sign, comma, in_run, live, start)
        return Scan(*facts, number)

    @staticmethod
    def _groups(position, is_digit, point, comma) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Which commas belong to a run; where they make it none from there on; where a group lacks digits."""
        _, decimals = _newest(position, is_digit, point)
        comma = comma & _before(is_digit) & ~decimals
        mark, later = _newest(position, is_digit, comma)  # before the group; a comma if it is not the first
        nth = position - mark  # 1 at the first digit of the group
        wrong = later & (is_digit != (nth <= 3))
        long = comma & ~later & (nth > 4)  # behind more than three digits: no other may follow
        return comma, wrong | _before(long), later & (nth < 3)

    @staticmethod
    def _mantissa(digit: torch.Tensor, back: torch.Tensor) -> torch.Tensor:
        """The integer that a run's digits spell; `back` counts the run's tokens before each.

        A digit is the map x -> 10 x + digit, all else the identity. Maps of adjacent spans are composed, and
        the spans double. Nonsense where there are more than 18 digits from the first that is not 0.
        """
        offset = digit.long().clamp(min=0)
        factor = torch.where(digit >= 0, 10, 1)
        for span in SPANS:
            if span >= digit.size(1):
                break
            reaches = back >= span
            offset = offset + factor * offset.roll(span, 1).masked_fill(~reaches, 0)
            factor = factor * factor.roll(span, 1).masked_fill(~reaches, 1)
        return offset

    def _scaled(self, head: torch.Tensor, exponent: torch.Tensor) -> torch.Tensor:
        """head * 10^exponent in float64, with one rounding up to 15 digits and 22 places, else three."""
        powers = self.power_bits.view(torch.float64)
        limit = len(powers) - 1
        return head.double() * powers[exponent.clamp(0, limit)] / powers[(-exponent).clamp(0, limit)]

    def read_number(self, ids: list[int], first: int, last: int) -> tuple[int, int]:
        """Mantissa and places, exact at any length, of the number at ids[first : last + 1].

        `ids` are those of its row from the start: where the sign is glued, it lies before `first`.
        """
        text = b"".join(self.vocabulary[id] for id in ids[first : last + 1])
        whole, _, decimals = text.replace(b",", b"").partition(b".")
        mantissa = int(whole + decimals)
        if first > 0 and self.lexemes[ids[first]].digit >= 0:
            earlier = (self.lexemes[id] for id in reversed(ids[: first - 1]))
            after_operand = next((lexeme.operand for lexeme in earlier if not lexeme.blank), False)
            # after_word=True: a sign alone before `first` is none of this number's
            if self.lexemes[ids[first - 1]].unary(after_operand, after_word=True) < 0:
                mantissa = -mantissa
        return mantissa, len(decimals)


class Reader:
    """What Lexer says at the newest token of one row: `feed` it token by token and look at its fields.

    `offset`, `digit`, `may_open` and `sign` are as in Numerals. `numbers` are those visible, the newest first, each as
    (mantissa, places), exact at any length; `completed` tells whether the newest has become visible just now.
    """

    def __init__(self, lexer: Lexer):
        self.lexemes = lexer.lexemes
        self.numbers: deque[tuple[int, int]] = deque(maxlen=lexer.num_inputs)
        self.offset, self.digit, self.may_open, self.sign, self.completed = 0, False, True, 0, False
        self._previous, self._after_operand, self._unary = Lexeme(), False, 0
        self._in_run = self._live = self._hopeful = False

    def feed(self, token: int) -> None:
        lexeme = self.lexemes[token]
        if self._previous.separator:
            self.numbers.clear()
        in_run = lexeme.digit >= 0 or (
            self._previous.digit >= 0 and (lexeme.point or (lexeme.comma and not self._points))
        )
        self.completed = self._live and not in_run
        if in_run:
            self._continue_run(lexeme)
        else:
            self._leave_run(lexeme)
        self.may_open = not (self.offset or self._in_run or lexeme.word or lexeme.separator)
        self.digit = lexeme.digit >= 0
        if not lexeme.blank:
            self._after_operand = lexeme.operand
        self._previous = lexeme

    def _continue_run(self, lexeme: Lexeme) -> None:
        if not self._in_run:
            self._in_run, self._hopeful, self._negative = True, not self._previous.word, self._unary < 0
            self._mantissa = self._points = self._places = 0
            self._group, self._grouped = 0, False  # digits since the newest comma, if there is one
        if lexeme.digit >= 0:
            self._group += not self._points
            self._hopeful &= self._points <= 1 and not (self._grouped and self._group > 3)
            self._mantissa = 10 * self._mantissa + lexeme.digit
            self._places += self._points
        else:
            self._hopeful &= not self._grouped or self._group == 3
            self._points += lexeme.point
        if lexeme.comma:  # to no more than three digits; behind more there is room for none
            self._group, self._grouped = (3 if self._group > 3 else 0), True
        self._live = self._hopeful and (lexeme.comma or not self._grouped or self._group == 3)
        self.offset = self.offset + 1 if self._hopeful else 0
        self.sign = 0

    def _leave_run(self, lexeme: Lexeme) -> None:
        if self.completed:
            self.numbers.appendleft((-self._mantissa if self._negative else self._mantissa, self._places))
        self._in_run = self._live = False
        self._unary = lexeme.unary(self._after_operand, self._previous.word)
        self.sign = 0 if lexeme.alone else self._unary
        self.offset = int(lexeme.alone and self._unary != 0)


def _before(x: torch.Tensor) -> torch.Tensor:
    """Of the token before each, 0 before the first."""
    return F.pad(x[:, :-1], (1, 0))


def _newest(position, skip: torch.Tensor, flag: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Of the newest token before each that is not to be skipped: its position, or -1, and its flag."""
    newest = (2 * position + flag).masked_fill(skip, -2).cummax(1).values
    newest = F.pad(newest[:, :-1], (1, 0), value=-2)
    return newest >> 1, (newest & 1).bool()


def _count(start: torch.Tensor, *flags: torch.Tensor) -> torch.Tensor:
    """How many tokens from `start` on have each flag, (flags, B, T)."""
    flags = torch.stack(flags).long()
    total = flags.cumsum(-1)
    return total - (total - flags).gather(-1, start.expand_as(total))
