"""Exact arithmetic on the host: what a plan computes, and how its result is written. Plain Python integers.

    run([("add", 0, 1), ("divide", 2, 0)], inputs=[(3, 1), (1, 2)])  # [(7, 2), (7, 6)]
    write((7, 6), "places_3")  # "1.167", and "1.17" as digits_3, "7/6" as fraction, None as exact
    read("-3.50")  # (-7, 2)

- A value is a Rational: a tuple (numerator, denominator) in lowest terms, denominator > 0. A tuple, because a
  training step runs a thousand plans, and fractions.Fraction takes several times as long.
- No value is None, and what is computed from None is None. Nothing is clamped; these have no value: x/0; 0 to
  a negative power (0^0 is 1); a negative number to a power that is no integer; log (the natural one) of
  x <= 0; a result with more than `digits` decimal digits in its numerator or denominator.
- An irrational log or power is kept to INEXACT_DIGITS digits by ROUND_05UP, the rounding that another may
  follow: a format that rounds then writes what it would of the true number. Where too few digits fit for
  that, it has no value. "exact" and "fraction" write what was kept: they cannot know that there is more.

ROUND_05UP: https://speleotrove.com/decimal/damodel.html
"""

import decimal
import functools
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import NamedTuple

Rational = tuple[int, int]

DIGITS = 36  # of a numerator or a denominator
INEXACT_DIGITS = 30  # of an irrational result: more than any format shows, and room left to go on computing
MAX_PLACES, MAX_SIGNIFICANT = 6, 12  # of the formats that round


def reduced(numerator: int, denominator: int) -> Rational:
    divisor = math.gcd(numerator, denominator)
    if denominator < 0:
        divisor = -divisor
    return numerator // divisor, denominator // divisor


@functools.cache
def power_of_ten(exponent: int) -> int:
    return 10**exponent


@functools.cache
def context(precision: int) -> decimal.Context:
    return decimal.Context(prec=precision, rounding=decimal.ROUND_HALF_EVEN)


def from_decimal(mantissa: int, places: int) -> Rational:
    """mantissa / 10^places"""
    return reduced(mantissa, 10**places) if places else (mantissa, 1)


def from_float(value: float) -> Rational | None:
    """A float exactly as it is, None for NaN."""
    return None if math.isnan(value) else value.as_integer_ratio()


# ------------------------------------------------------------------------------------------------------------
# operations: (a, b, digits) -> value; Operation.apply is what holds it to so many digits


def add(a: Rational, b: Rational, digits: int) -> Rational:
    if a[1] == b[1] == 1:
        return a[0] + b[0], 1
    return reduced(a[0] * b[1] + b[0] * a[1], a[1] * b[1])


def subtract(a: Rational, b: Rational, digits: int) -> Rational:
    if a[1] == b[1] == 1:
        return a[0] - b[0], 1
    return reduced(a[0] * b[1] - b[0] * a[1], a[1] * b[1])


def multiply(a: Rational, b: Rational, digits: int) -> Rational:
    if a[1] == b[1] == 1:
        return a[0] * b[0], 1
    return reduced(a[0] * b[0], a[1] * b[1])


def divide(a: Rational, b: Rational, digits: int) -> Rational | None:
    return reduced(a[0] * b[1], a[1] * b[0]) if b[0] else None


def identity(a: Rational, b: Rational | None, digits: int) -> Rational:
    return a


def larger(a: Rational, b: Rational, digits: int) -> Rational:
    return a if a[0] * b[1] >= b[0] * a[1] else b


def smaller(a: Rational, b: Rational, digits: int) -> Rational:
    return a if a[0] * b[1] <= b[0] * a[1] else b


def power(a: Rational, b: Rational, digits: int) -> Rational | None:
    exponent, index = b
    if a[0] == 0 and exponent < 0 or a[0] < 0 and index > 1:
        return None
    if index == 1:
        return integer_power(a, exponent, digits)
    numerator, denominator = integer_root(a[0], index), integer_root(a[1], index)
    if numerator is None or denominator is None:
        return irrational_power(a, b, digits)
    return integer_power((numerator, denominator), exponent, digits)


def integer_power(a: Rational, exponent: int, digits: int) -> Rational | None:
    # the larger part is at least 2 ** bits, and 2 ** 10 > 10 ** 3: what cannot fit is not computed
    bits = max(abs(a[0]), a[1]).bit_length() - 1
    if 3 * bits * abs(exponent) > 10 * digits:
        return None
    numerator, denominator = a[0] ** abs(exponent), a[1] ** abs(exponent)
    return (numerator, denominator) if exponent >= 0 else reduced(denominator, numerator)


def integer_root(n: int, index: int) -> int | None:
    """The root of n >= 0 where it is an integer."""
    if n <= 1:
        return n
    if index >= n.bit_length():  # between 1 and 2
        return None
    root, previous = 1 << -(-n.bit_length() // index), math.inf
    while root < previous:  # Newton's method, from above
        root, previous = ((index - 1) * root + n // root ** (index - 1)) // index, root
    return previous if previous**index == n else None


def irrational_power(a: Rational, b: Rational, digits: int) -> Rational | None:
    precise = working_context(digits)
    exponent = precise.multiply(precise.divide(*b), natural_log(a, digits))
    return kept(precise.exp(exponent), digits) if abs(exponent) < 3 * digits else None  # e ** 3 > 10


def log(a: Rational, b: Rational | None, digits: int) -> Rational | None:
    return kept(natural_log(a, digits), digits) if a[0] > 0 else None


def working_context(digits: int) -> decimal.Context:
    # twice the digits: unless it was made for it, nothing with so many has a log or power that close to a tie
    return context(2 * digits + 20)


@functools.lru_cache(maxsize=2**16)  # some 40 us each, and the numbers of a text come again
def natural_log(a: Rational, digits: int) -> decimal.Decimal:
    precise = working_context(digits)
    return precise.ln(precise.divide(*a))


def kept(x: decimal.Decimal, digits: int) -> Rational | None:
    """x to INEXACT_DIGITS digits or MAX_PLACES + 1 places, as far as they fit; None if formats need more."""
    magnitude = x.adjusted()  # 0 from 1 to 9.99, 1 from 10 to 99.9
    places = max(INEXACT_DIGITS - 1 - magnitude, MAX_PLACES + 1)
    places = min(places, digits - 1 - max(magnitude, 0))
    if places <= MAX_PLACES or places + magnitude < MAX_SIGNIFICANT:
        return None
    unit = decimal.Decimal((0, (1,), -places))
    return x.quantize(unit, decimal.ROUND_05UP, working_context(digits)).as_integer_ratio()


class Operation(NamedTuple):
    binary: bool  # a unary one takes no notice of b
    commutative: bool
    compute: Callable[[Rational, Rational, int], Rational | None]

    def apply(self, a: Rational | None, b: Rational | None = None, digits: int = DIGITS) -> Rational | None:
        if a is None or b is None and self.binary:
            return None
        value = self.compute(a, b, digits)
        if value is None:
            return None
        limit = power_of_ten(digits)
        return value if -limit < value[0] < limit and value[1] < limit else None


OPERATIONS = {
    "add": Operation(True, True, add),
    "subtract": Operation(True, False, subtract),
    "multiply": Operation(True, True, multiply),
    "divide": Operation(True, False, divide),
    "identity": Operation(False, False, identity),
    "power": Operation(True, False, power),
    "log": Operation(False, False, log),
    "max": Operation(True, True, larger),
    "min": Operation(True, True, smaller),
}


def run(
    steps: Iterable[tuple],
    inputs: Sequence[Rational | None],
    digits: int = DIGITS,
    operations: Mapping[str, Operation] | Sequence[Operation] = OPERATIONS,
) -> list[Rational | None]:
    """The result of every step (operation, slot of a, slot of b): the slots are the inputs, then the results.

    `operation` is what `operations` is indexed by: a name, or an integer where that is a list.
    """
    slots = list(inputs)
    for operation, a, b in steps:
        slots.append(operations[operation].apply(slots[a], slots[b], digits))
    return slots[len(inputs) :]


# ------------------------------------------------------------------------------------------------------------
# formats: (value, digits) -> text


def write_exact(value: Rational, digits: int) -> str | None:
    places = digits - 1
    scaled, rest = divmod(value[0] * power_of_ten(places), value[1])
    text = without_zeros(positional(scaled, places))
    return text if rest == 0 and len(text.lstrip("-").replace(".", "")) <= digits else None


def write_places(value: Rational, digits: int, places: int) -> str:
    numerator, denominator = value
    scaled, rest = divmod(numerator * power_of_ten(places), denominator)
    up = 2 * rest > denominator or 2 * rest == denominator and scaled % 2 == 1
    return positional(scaled + up, places)


def write_digits(value: Rational, digits: int, count: int) -> str:
    return without_zeros(f"{context(count).divide(*value):f}")


def write_fraction(value: Rational, digits: int) -> str:
    return str(value[0]) if value[1] == 1 else f"{value[0]}/{value[1]}"


def positional(scaled: int, places: int) -> str:
    """scaled / 10 ** places with so many places."""
    text = f"{abs(scaled):0{places + 1}d}"
    text = f"{text[:-places]}.{text[-places:]}" if places else text
    return "-" + text if scaled < 0 else text


def without_zeros(text: str) -> str:
    return text.rstrip("0").rstrip(".") if "." in text else text


WRITERS = {
    "exact": write_exact,
    **{f"places_{n}": partial(write_places, places=n) for n in range(MAX_PLACES + 1)},
    **{f"digits_{n}": partial(write_digits, count=n) for n in range(1, MAX_SIGNIFICANT + 1)},
    "fraction": write_fraction,
}
FORMATS = tuple(WRITERS)


def write(value: Rational, format: int | str, digits: int = DIGITS) -> str | None:
    """The value in a format of FORMATS, given by its name or index; never an exponent, never -0.

    exact: all of it; None where that does not end within `digits` digits
    places_n: rounded to n places, zeros and all: 3.50
    digits_n: rounded to n significant digits, without zeros at the end of its places: 3.5, 0.00012, 120000
    fraction: 7/2, and 3 for an integer

    Rounding is half to even.
    """
    return WRITERS[format if isinstance(format, str) else FORMATS[format]](value, digits)


def matching_formats(value: Rational, text: str, digits: int = DIGITS) -> list[int]:
    """The indices of the formats that write the value like this."""
    return [index for index in range(len(FORMATS)) if write(value, index, digits) == text]


NUMBER = re.compile(r"([+-]?)([0-9]+)(?:\.([0-9]+)|/([0-9]+))?")


def read(text: str) -> Rational:
    """What write() gives, whatever the format; a + may come first. ValueError for anything else."""
    match = NUMBER.fullmatch(text)
    if match is None:
        raise ValueError(f"{text!r} is no number: expected one like -12, 3.50 or 7/2")
    sign, whole, places, denominator = match.groups(default="")
    below = int(denominator) if denominator else 10 ** len(places)
    if below == 0:
        raise ValueError(f"{text!r} divides by zero")
    return reduced(int(sign + whole + places), below)
