"""Numbers and times as people read them."""

import math

import pytest

from treegrpo.readable import duration, number, with_error


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0 s"),
        (0.0653, "0.065 s"),
        (2.41, "2.4 s"),
        (59.4, "59 s"),
        (59.6, "1 min"),
        (192, "3 min 12 s"),
        (599.6, "10 min"),
        (1490, "25 min"),
        (3599, "1 h"),
        (7500, "2 h 5 min"),
        (86399, "1 d"),
        (1500 * 60, "1 d 1 h"),
        (26 * 3600, "1 d 2 h"),
    ],
)
def test_durations_have_two_units_at_most(seconds: float, text: str) -> None:
    assert duration(seconds) == text


@pytest.mark.parametrize(
    ("value", "error", "text"),
    [
        (0.28123, 0.0031, "0.2812 ± 0.0031"),  # digits that mean something
        (0.28123, 0.031, "0.281 ± 0.031"),
        (1234.56, 12.3, "1235 ± 12"),
        (0.28123, None, "0.2812"),
        (0.5, 0.0, "0.5000"),
        (12345.6, None, "12346"),
        (0.00012, None, "0.00012"),
        (math.nan, None, "nan"),
    ],
)
def test_means_have_the_digits_that_their_errors_warrant(
    value: float, error: float | None, text: str
) -> None:
    assert with_error(value, error) == text


def test_changes_have_a_sign() -> None:
    assert with_error(0.05, 0.012, "+") == "+0.050 ± 0.012"
    assert number(-0.05, None, "+") == "-0.0500"
