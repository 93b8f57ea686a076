"""Rates and times as text."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distopt import SettingError
from distopt.planning.quantities import bytes_in_words, bytes_per_second, flops, in_words, seconds


@pytest.mark.parametrize(
    ("text", "rate"),
    [
        ("10Gbit", 1.25e9),
        ("10 Gbit/s", 1.25e9),
        ("800Mbps", 1e8),
        ("1.25GB", 1.25e9),
        ("3.35TB/s", 3.35e12),
        ("1GiB", 2**30),
        ("1e9", 1e9),
        ("10", 10.0),
        ("inf", math.inf),
        (125, 125.0),
    ],
)
def test_rates(text, rate):
    assert bytes_per_second("bandwidth", text) == rate


@given(st.floats(1e-3, 1e15))
def test_a_number_is_its_own_text(rate):
    assert bytes_per_second("bandwidth", repr(rate)) == bytes_per_second("bandwidth", rate) == rate


@given(st.integers(1, 10**6))
def test_eight_bits_are_a_byte(count):
    assert bytes_per_second("b", f"{count}Mbit") * 8 == pytest.approx(bytes_per_second("b", f"{count}MB"))


BEYOND = ["1e400Gbit", "1e300TB", "1e999999999GB", "1e-999999999GB", 10**400]
"""Beyond the range of a float, the last ones so far that they may not even be formed as fractions."""


@pytest.mark.parametrize("text", ["", "fast", "10gb", "-1GB", "0", "1GB 2", "nan", True, None, math.nan, -1.0, *BEYOND])
def test_what_is_no_rate(text):
    with pytest.raises(SettingError, match=r"^bandwidth is "):
        bytes_per_second("bandwidth", text)


def test_times_and_operations():
    assert [seconds("t", text) for text in ("20us", "1.5ms", "2s", 0.5, "0")] == [2e-5, 1.5e-3, 2.0, 0.5, 0.0]
    assert [flops("f", text) for text in ("50T", "300GFLOPS", 7)] == [5e13, 3e11, 7.0]
    with pytest.raises(SettingError, match=r"^t is 'inf'"):
        seconds("t", "inf")


@given(st.floats(1e-9, 1e6))
def test_words_are_near(value):
    number, unit = in_words(value).replace(",", "").split()
    assert float(number) * {"s": 1.0, "ms": 1e-3, "us": 1e-6}[unit] == pytest.approx(value, rel=6e-3)
    assert bytes_in_words(12_300_000) == "12.3 MB"
