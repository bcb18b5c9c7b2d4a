"""dag/exact_arithmetic.py against fractions.Fraction, and its logs and powers against decimal with 300 digits."""

import decimal
import random
import re
import time
from fractions import Fraction

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from dag.exact_arithmetic import DIGITS, FORMATS, OPERATIONS, matching_formats, read, run, write

ROUNDING_FORMATS = FORMATS[1:-1]
ARITHMETIC = {
    "add": lambda x, y: x + y,
    "subtract": lambda x, y: x - y,
    "multiply": lambda x, y: x * y,
    "divide": lambda x, y: x / y if y else None,
    "identity": lambda x, y: x,
    "max": max,
    "min": min,
}
REFERENCE = decimal.Context(prec=300)


def apply(name, x, y=None, digits=DIGITS):
    """Operation.apply on Fractions, or on whatever makes one."""
    value = OPERATIONS[name].apply(pair(x), None if y is None else pair(y), digits)
    if value is None:
        return None
    assert value == pair(Fraction(*value)), "in lowest terms"
    return Fraction(*value)


def pair(x):
    return Fraction(x).as_integer_ratio()


def in_range(x, digits):
    """The reference for the limit of digits."""
    return x if x is not None and max(len(str(abs(part))) for part in pair(x)) <= digits else None


def draw(rng, digits):
    """A rational of any length up to so many digits: an integer, a decimal, or some fraction."""
    numerator = rng.choice((-1, 1)) * rng.randrange(10 ** rng.randint(0, digits))
    kind = rng.random()
    if kind < 0.4:
        return Fraction(numerator)
    return Fraction(numerator, 10 ** rng.randrange(digits) if kind < 0.7 else rng.randrange(1, 10**digits))


def integers(digits):
    return st.integers(1 - 10**digits, 10**digits - 1)


def rationals(digits=DIGITS):
    """Integers, decimals and fractions, small ones and those that just fit."""
    decimals = st.builds(
        lambda n, places: Fraction(n, 10**places), integers(digits), st.integers(0, digits - 1)
    )
    return st.one_of(
        integers(3).map(Fraction),
        decimals,
        st.builds(Fraction, integers(digits), st.integers(1, 10**digits - 1)),
    )


# ------------------------------------------------------------------------------------------------------------
# operations


def check_arithmetic(x, y, digits):
    for name, reference in ARITHMETIC.items():
        value = OPERATIONS[name].apply(pair(x), pair(y), digits)
        expected = in_range(reference(x, y), digits)
        assert value == (None if expected is None else pair(expected)), (name, x, y)


@pytest.mark.parametrize("digits", [5, 36, 120])
@pytest.mark.parametrize("length", [2, 36, 120])
def test_arithmetic_is_that_of_fractions_in_lowest_terms(digits, length):
    rng = random.Random(length)
    for _ in range(400):
        check_arithmetic(draw(rng, length), draw(rng, length), digits)


@given(rationals(), rationals())
@example(Fraction(0), Fraction(0))
@example(Fraction(-1, 3), Fraction(1, 3))
def test_arithmetic_at_the_edges(x, y):
    check_arithmetic(x, y, DIGITS)


@given(
    st.one_of(integers(3).map(Fraction), rationals(4)), st.integers(-60, 60), st.sampled_from([6, 36, 120])
)
def test_an_integer_power_is_that_of_fractions(x, exponent, digits):
    expected = None if x == 0 and exponent < 0 else in_range(x**exponent, digits)
    assert apply("power", x, exponent, digits) == expected


@given(rationals(3).map(abs), st.integers(1, 9), st.integers(-5, 5))
def test_a_root_that_is_rational_comes_out_exact(root, index, exponent):
    x = root**index
    expected = None if x == 0 and exponent < 0 else in_range(root**exponent, DIGITS)
    assert apply("power", x, Fraction(exponent, index), DIGITS) == expected


def test_exact_cases():
    assert apply("power", 4, Fraction(1, 2)) == 2
    assert apply("power", Fraction(9, 4), Fraction(-1, 2)) == Fraction(2, 3)
    assert apply("power", 8, Fraction(1, 3)) == 2
    assert apply("power", 10**34, Fraction(1, 34)) == 10
    assert apply("power", 2, 119) == 2**119
    assert apply("power", 2, 120) is None  # 37 digits
    assert apply("power", -2, -3) == Fraction(-1, 8)
    assert apply("power", 0, 0) == 1
    assert apply("power", 0, Fraction(1, 3)) == 0
    assert apply("power", 1, Fraction(10**30, 7)) == 1
    assert apply("power", -1, 10**35 + 1) == -1
    assert apply("log", 1) == 0


@pytest.mark.parametrize(
    "name, x, y",
    [
        ("divide", 1, 0),
        ("divide", 0, 0),
        ("power", 0, -1),
        ("power", 0, Fraction(-1, 2)),
        ("power", -8, Fraction(1, 3)),
        ("power", -4, Fraction(1, 2)),
        ("log", 0, 1),
        ("log", -1, 1),
        ("log", Fraction(-1, 3), 1),
    ],
)
def test_what_is_undefined_has_no_value(name, x, y):
    assert apply(name, x, y) is None
    assert apply(name, x, y, digits=120) is None


@pytest.mark.parametrize("digits", [1, 36, 120])
@pytest.mark.parametrize("sign", [1, -1])
def test_the_limit_is_on_the_digits_of_numerator_and_denominator(digits, sign):
    limit = 10**digits
    assert apply("add", sign * (limit - 2), sign, digits) == sign * (limit - 1)
    assert apply("add", sign * (limit - 1), sign, digits) is None
    assert apply("divide", sign, limit - 1, digits) == Fraction(sign, limit - 1)
    assert apply("multiply", Fraction(sign, limit // 10), Fraction(1, 10), digits) is None
    assert apply("identity", sign * limit, digits=digits) is None


def test_what_cannot_fit_is_refused_at_once():
    huge, long = 10**35 + 1, 10**119 + 1
    begin = time.perf_counter()
    for digits in (36, 120):
        for x in (9, Fraction(1, 9), -9, Fraction(huge, huge + 1), long, Fraction(3, long)):
            for exponent in (10**9, -(10**9), huge, -long):
                assert apply("power", x, exponent, digits) is None
        for exponent in (Fraction(huge, 2), Fraction(-long, 7), Fraction(10**20, 3)):
            assert apply("power", 10, exponent, digits) is None
            apply("power", Fraction(huge, huge + 1), exponent, digits)
        for x in (long, Fraction(1, long), Fraction(long, long + 1)):
            apply("log", x, digits=digits)
            apply("power", x, Fraction(1, huge), digits)
            apply("power", x, Fraction(huge, long), digits)
    assert time.perf_counter() - begin < 1  # takes milliseconds; some of the powers would take minutes


# ------------------------------------------------------------------------------------------------------------
# logs and powers that are irrational


def true_log(x):
    return Fraction(REFERENCE.ln(REFERENCE.divide(*pair(x))))


def true_power(x, y):
    power = Fraction(REFERENCE.power(REFERENCE.divide(*pair(x)), REFERENCE.divide(*pair(y))))
    near = power.limit_denominator(10**60)
    return near if abs(near - power) < abs(power) / 10**200 else power  # it is rational, and may be a tie


def check_inexact(value, true, digits=DIGITS):
    assert in_range(value, digits) == value
    assert value == true or abs(value - true) < abs(true) / 10**12
    for name in ROUNDING_FORMATS:
        check_rounded(write(pair(value), name, digits), name, true)


def draw_positive(rng):
    return abs(draw(rng, rng.choice((2, 4, 9, 36)))) or Fraction(1)


def test_logs_are_written_like_the_true_ones():
    rng = random.Random(1)
    for _ in range(150):
        x = draw_positive(rng)
        check_inexact(apply("log", x), true_log(x))


def test_powers_are_written_like_the_true_ones():
    rng = random.Random(2)
    written = 0
    while written < 150:
        x, y = draw_positive(rng), draw(rng, rng.choice((1, 2, 4)))
        value = apply("power", x, y)
        if value is not None:
            check_inexact(value, true_power(x, y))
            written += 1


@pytest.mark.parametrize("digits", [36, 120])
@pytest.mark.parametrize(
    "tie", ["0.1234567890125", "2.5", "0.0000005", "12.3456785", "1.00000000005", "0.95"]
)
def test_next_to_a_tie_a_log_or_a_root_falls_on_its_side(tie, digits):
    tie = Fraction(tie)
    exponential = Fraction(REFERENCE.exp(REFERENCE.divide(*pair(tie))))
    x = exponential.limit_denominator(
        10 ** (digits - len(str(int(exponential))))
    )  # to some 2 * digits places
    check_inexact(apply("log", x, digits=digits), true_log(x), digits)
    for index in (2, 3):
        for side in (-1, 1):
            x, root = tie**index + Fraction(side, 10 ** (digits - 4)), Fraction(1, index)
            check_inexact(apply("power", x, root, digits), true_power(x, root), digits)


@pytest.mark.parametrize("digits", [13, 20, 36, 120])
def test_an_irrational_result_that_would_be_written_wrong_has_no_value(digits):
    """Over all magnitudes: there is a value in the middle, it is right, and there is none at the ends."""
    exponents = [Fraction(2 * n + 1, 2) for n in range(-digits - 2, digits + 2)]
    values = [apply("power", 10, exponent, digits) for exponent in exponents]
    for exponent, value in zip(exponents, values, strict=True):
        if value is not None:
            check_inexact(value, true_power(10, exponent), digits)
    # 12 significant digits and one more of at most digits - 1 places; 6 places and one more
    fitting = [12 - (digits - 1) <= n < digits - 7 for n in range(-digits - 2, digits + 2)]
    assert [value is not None for value in values] == fitting


def test_an_irrational_result_can_be_computed_with():
    steps = [("log", 0, 0), ("multiply", 3, 1), ("subtract", 4, 2)]
    results = run(steps, [pair(7), pair(10**6), pair(1_945_910)])
    assert abs(Fraction(*results[0]) - true_log(7)) < Fraction(1, 10**29)
    assert write(results[2], "digits_12") == "0.149055313305"


def test_a_base_near_one_keeps_its_digits_under_a_huge_power():
    x, y = 1 + Fraction(1, 10**35), Fraction(10**35, 3)
    check_inexact(apply("power", x, y), true_power(x, y))


# ------------------------------------------------------------------------------------------------------------
# plans


def test_a_plan_runs_by_names_or_by_numbers():
    inputs = [(12, 1), (3, 1), (7, 2)]
    by_name = [("subtract", 0, 1), ("divide", 3, 2), ("max", 4, 1)]
    expected = [(9, 1), (18, 7), (3, 1)]
    assert run(by_name, inputs) == expected
    names = ["max", "divide", "subtract"]
    by_number = [(names.index(name), a, b) for name, a, b in by_name]
    assert run(by_number, inputs, operations=[OPERATIONS[name] for name in names]) == expected
    assert inputs == [(12, 1), (3, 1), (7, 2)]
    assert run([], inputs) == []


def test_what_is_computed_from_no_value_has_none_and_unary_operations_read_a_alone():
    steps = [("divide", 0, 1), ("add", 0, 3), ("add", 3, 0), ("identity", 0, 3), ("log", 3, 0), ("max", 2, 0)]
    assert run(steps, [(5, 1), (0, 1), None]) == [None, None, None, (5, 1), None, None]
    assert OPERATIONS["identity"].apply((5, 1)) == (5, 1)
    assert OPERATIONS["log"].apply((1, 1)) == (0, 1)


def test_a_plan_keeps_to_its_digits_at_every_step():
    steps = [("multiply", 0, 0), ("divide", 1, 0)]
    assert run(steps, [(10**20, 1)]) == [None, None]
    assert run(steps, [(10**20, 1)], digits=41) == [(10**40, 1), (10**20, 1)]


def test_the_table_of_operations():
    assert list(OPERATIONS) == "add subtract multiply divide identity power log max min".split()
    assert [name for name in OPERATIONS if not OPERATIONS[name].binary] == ["identity", "log"]
    assert [name for name in OPERATIONS if OPERATIONS[name].commutative] == ["add", "multiply", "max", "min"]


# ------------------------------------------------------------------------------------------------------------
# formats


def check_rounded(text, name, x):
    """That text is x, rounded half to even as the format says, in the one way that it may be written."""
    kind, count = name.split("_")
    places = int(count) if kind == "places" else int(count) - 1 - magnitude(x)
    assert Fraction(text) == round(x * Fraction(10) ** places) / Fraction(10) ** places, (text, name, x)
    check_canonical(text)
    if kind == "places":
        assert len(text.partition(".")[2]) == places
    else:
        assert "." not in text or text[-1] != "0"


def check_canonical(text):
    assert re.fullmatch(r"-?(0|[1-9][0-9]*)([.][0-9]+)?", text)
    assert Fraction(text) or "-" not in text


def magnitude(x):
    """The power of ten of the first digit."""
    power = 0
    while abs(x) >= Fraction(10) ** (power + 1):
        power += 1
    while 0 < abs(x) < Fraction(10) ** power:
        power -= 1
    return power


def ends(x, digits):
    """Whether x can be written out with so many digits, the 0 before the point among them."""
    places = next((n for n in range(digits) if x.denominator == 1 or 10**n % x.denominator == 0), digits)
    return places + len(str(int(abs(x)))) <= digits


def check_formats(x, digits=DIGITS):
    for name in ROUNDING_FORMATS:
        check_rounded(write(pair(x), name, digits), name, x)
    fraction = write(pair(x), "fraction", digits)
    assert fraction == str(x) and read(fraction) == pair(x)
    exact = write(pair(x), "exact", digits)
    assert (exact is not None) == ends(x, digits)
    if exact is not None:
        check_canonical(exact)
        assert "." not in exact or exact[-1] != "0"
        assert read(exact) == pair(x)


@given(rationals())
@example(Fraction(0))
@example(Fraction(1, 2**36))
@example(Fraction(10**36 - 1, 10))
@example(Fraction(10**36 - 1, 10**35))
@example(Fraction(1, 10**35))
@example(Fraction(10**35 + 1, 2**20))  # 36 digits as a fraction, 50 written out
@example(Fraction(9_999_999_999_995, 10**13))
def test_every_format_writes_the_value_it_should(x):
    check_formats(x)


@given(rationals(120))
@settings(max_examples=30)
def test_every_format_writes_long_values(x):
    check_formats(x, 120)


@given(st.integers(-(10**7), 10**7), st.integers(0, 7), st.integers(-1, 1))
def test_ties_go_to_the_even_neighbour(n, places, side):
    """Half a unit of the last place, or just off it."""
    check_formats(Fraction(2 * n + 1, 2 * 10**places) + Fraction(side, 10**25))


@pytest.mark.parametrize(
    "x, name, text",
    [
        ("7/2", "exact", "3.5"),
        ("-1200", "exact", "-1200"),
        ("1/3", "exact", None),
        ("3.5", "places_2", "3.50"),
        ("2.5", "places_0", "2"),
        ("3.5", "places_0", "4"),
        ("-2.5", "places_0", "-2"),
        ("-0.5", "places_0", "0"),
        ("-0.004", "places_2", "0.00"),
        ("-0.006", "places_2", "-0.01"),
        ("0.125", "places_2", "0.12"),
        ("123456", "digits_2", "120000"),
        ("0.00012345", "digits_3", "0.000123"),
        ("99.96", "digits_3", "100"),
        ("0.0999", "digits_2", "0.1"),
        ("-25", "digits_1", "-20"),
        ("3.5", "digits_12", "3.5"),
        ("0", "digits_4", "0"),
        ("0", "places_2", "0.00"),
        ("-3/4", "fraction", "-3/4"),
        ("3", "fraction", "3"),
    ],
)
def test_formats_by_example(x, name, text):
    assert write(pair(x), name) == text
    assert write(pair(x), FORMATS.index(name)) == text


def test_the_names_of_the_formats():
    places, digits = [f"places_{n}" for n in range(7)], [f"digits_{n}" for n in range(1, 13)]
    assert list(FORMATS) == ["exact", *places, *digits, "fraction"]


def test_matching_formats():
    def names(x, text):
        return [FORMATS[index] for index in matching_formats(pair(x), text)]

    assert names("3.5", "3.50") == ["places_2"]
    assert names("7/6", "1.17") == ["places_2", "digits_3"]
    assert names("3", "3") == ["exact", "places_0", *(f"digits_{n}" for n in range(1, 13)), "fraction"]
    assert names("3", "4") == []


@pytest.mark.parametrize(
    "text, value",
    [
        ("+7", (7, 1)),
        ("-3.50", (-7, 2)),
        ("007", (7, 1)),
        ("-0.00", (0, 1)),
        ("6/8", (3, 4)),
        ("-12/4", (-3, 1)),
    ],
)
def test_read(text, value):
    assert read(text) == value


@pytest.mark.parametrize(
    "text",
    [
        "",
        "-",
        ".5",
        "5.",
        "1.2.3",
        "--5",
        "1e5",
        "1,000",
        " 5",
        "5\n",
        "1_0",
        "١",
        "3/0",
        "3/-4",
        "1.5/2",
        "/2",
        "nan",
    ],
)
def test_what_is_no_number_cannot_be_read(text):
    with pytest.raises(ValueError, match=re.escape(repr(text))):
        read(text)


# ------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_many_more_of_everything():
    rng = random.Random(3)
    for _ in range(5_000):
        digits = rng.choice((8, 36, 120))
        x, y = draw(rng, digits), draw(rng, digits)
        check_arithmetic(x, y, digits)
        check_formats(x, digits)
    for _ in range(1_000):
        x, y = draw_positive(rng), draw(rng, rng.choice((1, 2, 4)))
        check_inexact(apply("log", x), true_log(x))
        if (value := apply("power", x, y)) is not None:
            check_inexact(value, true_power(x, y))
