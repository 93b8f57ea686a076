"""The 16-bit formats: every code, every rounding, against a table of all values."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from distopt.errors import SettingError
from distopt.numerics.minifloat import FLOAT_1_6_9, PIECE, MiniFloat

UNSIGNED = MiniFloat(0, 6, 10, bias=60)
HALF = MiniFloat(1, 5, 10, bias=15)
TINY = MiniFloat(1, 4, 3, bias=7)
FORMATS = [FLOAT_1_6_9, UNSIGNED, HALF, TINY]
IDS = ["1-6-9", "0-6-10", "1-5-10", "1-4-3"]
FLOATS = [torch.float32, torch.float64]
formats = pytest.mark.parametrize("form", FORMATS, ids=IDS)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def all_codes(form):
    bits = form.sign_bits + form.exponent_bits + form.significand_bits
    return torch.arange(2**bits).to(torch.int16)


def value(form, code):
    """What a code means, from the definition alone."""
    code &= 0xFFFF
    exponent = code >> form.significand_bits & 2**form.exponent_bits - 1
    fraction = (code & 2**form.significand_bits - 1) / 2**form.significand_bits
    magnitude = 2.0 ** (exponent - form.bias) * (1 + fraction) if exponent else 2.0 ** (1 - form.bias) * fraction
    return math.copysign(magnitude, -1 if form.sign_bits and code >> form.exponent_bits + form.significand_bits else 1)


def table(form):
    """All values that are not negative, in order: the place is the code."""
    return np.array([value(form, code) for code in range(2 ** (form.exponent_bits + form.significand_bits))])


def oracle(form, numbers):
    """Codes nearest to float64 numbers, ties to the even code, by search in the table; every difference is exact."""
    values = table(form)
    magnitudes = np.minimum(np.abs(numbers), values[-1])
    above = np.clip(np.searchsorted(values, magnitudes), 1, None)
    up, down = values[above] - magnitudes, magnitudes - values[above - 1]
    codes = np.where((up < down) | ((up == down) & (above % 2 == 0)), above, above - 1)
    return codes | np.signbit(numbers).astype(np.int64) << form.exponent_bits + form.significand_bits


def difficult(form, count, dtype, seed=0):
    """Numbers of all sizes, subnormals, exact ties, ties missed by one unit in the last place, around max and zero."""
    rng = np.random.default_rng(seed)
    exponents = rng.integers(1 - form.bias - form.significand_bits - 3, 2**form.exponent_bits - form.bias + 1, count)
    numbers = np.ldexp(rng.uniform(1, 2, count), exponents).astype(str(dtype).removeprefix("torch."))
    values = table(form).astype(numbers.dtype)
    ties = (values[1:] + values[:-1]) / 2
    edges = np.array([0.0, form.max, form.max * (1 + 2.0**-20), form.max * 2, form.smallest_subnormal / 2, 1e-40])
    exact = np.concatenate([values, ties, edges.astype(numbers.dtype)])
    close = [np.nextafter(exact, numbers.dtype.type(limit)) for limit in (np.inf, 0)]
    together = torch.from_numpy(np.concatenate([numbers, exact, *close]))
    return torch.cat([together, -together]) if form.sign_bits else together


@formats
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_every_code_means_what_the_definition_says(form, dtype):
    decoded = form.decode(all_codes(form), dtype)
    expected = torch.tensor([value(form, code) for code in range(len(decoded))], dtype=torch.float64)
    assert decoded.dtype == dtype
    assert torch.equal(decoded.double(), expected)
    assert torch.equal(decoded.signbit(), expected.signbit())


@formats
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("draw", [None, generator()], ids=["nearest", "stochastic"])
def test_every_code_comes_back(form, dtype, draw):
    codes, clamped = form.encode(form.decode(all_codes(form), dtype), generator=draw)
    assert codes.dtype == torch.int16
    assert torch.equal(codes, all_codes(form))
    assert clamped == 0


@formats
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_nearest_agrees_with_the_search_in_the_table(form, dtype):
    numbers = difficult(form, 400_000, dtype)
    codes, clamped = form.encode(numbers)
    expected = oracle(form, numbers.double().numpy())
    assert torch.equal(codes, torch.from_numpy(expected).to(torch.int16))
    assert clamped == int((numbers.abs() > form.max).sum()) > 0


@formats
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_stochastic_takes_one_of_the_two_neighbours(form, dtype):
    numbers = difficult(form, 100_000, dtype).clamp(-form.max, form.max)
    below = np.searchsorted(table(form), numbers.abs().double().numpy(), side="right") - 1
    below = torch.from_numpy(below)
    exact = torch.from_numpy(table(form))[below] == numbers.abs()
    mask = 2 ** (form.exponent_bits + form.significand_bits) - 1
    codes = form.encode(numbers, generator=generator(1))[0]
    step = (codes.long() & mask) - below
    assert torch.equal(form.decode(codes).signbit(), numbers.signbit())
    assert bool(((step == 0) | (step == 1)).all())
    assert not step[exact].any()
    assert 0.4 < float(step[~exact].double().mean()) < 0.6


@formats
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_relative_errors_of_normal_numbers(form, dtype):
    numbers = difficult(form, 100_000, dtype)
    numbers = numbers[(numbers.abs() >= form.smallest_normal) & (numbers.abs() <= form.max)]
    for draw, bound in ((None, form.significand_bits + 1), (generator(), form.significand_bits)):
        decoded = form.decode(form.encode(numbers, generator=draw)[0], torch.float64)
        assert float(((decoded - numbers) / numbers).abs().max()) <= 2.0**-bound


@given(numbers=st.lists(st.floats(-20, 20, width=32), min_size=2, max_size=50))
def test_encoding_keeps_the_order(numbers):
    decoded = FLOAT_1_6_9.decode(FLOAT_1_6_9.encode(torch.tensor(sorted(numbers)))[0])
    assert bool((decoded.diff() >= 0).all())


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize(
    "number",
    [1 + 2.0**-12, -(1 + 5 * 2.0**-11), 15.98, 2.0**-59 * (1 + 2.0**-11), 2.0**-68 / 7, -41.3 * 2.0**-68, 2.0**-80],
)
def test_stochastic_rounding_is_unbiased(dtype, number):
    draws = 1_000_000
    exact = float(torch.tensor(number, dtype=dtype))
    codes, _ = FLOAT_1_6_9.encode(torch.full((draws,), number, dtype=dtype), generator=generator(2))
    decoded = FLOAT_1_6_9.decode(codes, torch.float64)
    low, high = float(decoded.min()), float(decoded.max())
    assert low <= exact <= high
    deviation = math.sqrt((high - exact) * (exact - low) / draws)
    assert abs(float(decoded.mean()) - exact) < 5 * deviation


def test_neighbouring_elements_are_rounded_independently():
    up = FLOAT_1_6_9.encode(torch.full((1 << 20,), 1 + 2.0**-10), generator=generator())[0].double()
    up -= up.mean()
    for lag in (1, 2, 3, 4, 8, PIECE):
        assert abs(float((up[lag:] * up[:-lag]).mean() / up.var())) < 5 / math.sqrt(len(up) - lag)


@formats
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@given(place=st.integers(0, 29), bad=st.sampled_from([math.nan, math.inf, -math.inf]), draws=st.booleans())
def test_what_is_not_finite_is_refused(form, dtype, place, bad, draws):
    numbers = torch.ones(30, dtype=dtype)
    numbers[place] = bad
    draw = generator() if draws else None
    with pytest.raises(ValueError, match="not finite"):
        form.encode(numbers, generator=draw)
    if draw is not None:
        assert torch.equal(draw.get_state(), generator().get_state())


def test_a_format_without_sign_refuses_negative_numbers_and_keeps_zero():
    assert UNSIGNED.encode(torch.tensor([-0.0, 2.0]))[0].tolist() == [0, (61 << 10) - 2**16]
    with pytest.raises(ValueError, match="negative value"):
        UNSIGNED.encode(torch.tensor([1.0, -1e-30]))


@pytest.mark.parametrize("draw", [None, generator()], ids=["nearest", "stochastic"])
def test_too_large_is_clamped_and_counted(draw):
    numbers = torch.tensor([15.984375, 15.984376, -16.0, 3e38, 1.0])
    codes, clamped = FLOAT_1_6_9.encode(numbers, generator=draw)
    assert FLOAT_1_6_9.decode(codes).tolist() == [15.984375, 15.984375, -15.984375, 15.984375, 1.0]
    assert clamped == 3
    assert FLOAT_1_6_9.encode(numbers, scale=0.5, generator=draw)[1] == 1
    assert FLOAT_1_6_9.encode(torch.tensor([7.0, 8.0]), scale=2.0, generator=draw)[1] == 1
    many = FLOAT_1_6_9.encode(torch.full((1 << 18,), 1000.0), generator=draw)[0]
    assert bool((many == 2**15 - 1).all())


@given(k=st.integers(-60, 60), seed=st.integers(0, 99), draws=st.booleans())
def test_the_scale_is_a_multiplication(k, seed, draws):
    numbers = torch.randn(50, generator=generator(seed))
    scaled = FLOAT_1_6_9.encode(numbers * 2.0**k, scale=2.0**-k, generator=generator(seed) if draws else None)[0]
    plain = FLOAT_1_6_9.encode(numbers, generator=generator(seed) if draws else None)[0]
    assert torch.equal(scaled, plain)
    assert torch.equal(FLOAT_1_6_9.decode(plain, scale=2.0**k), FLOAT_1_6_9.decode(plain) * 2.0**k)


@pytest.mark.parametrize("shape", [(), (0,), (3, 0), (2, 3, 4), (PIECE + 3,)], ids=str)
@pytest.mark.parametrize("draw", [None, generator()], ids=["nearest", "stochastic"])
def test_any_shape(shape, draw):
    codes, clamped = FLOAT_1_6_9.encode(torch.full(shape, 0.5), generator=draw)
    assert codes.shape == shape
    assert torch.equal(FLOAT_1_6_9.decode(codes), torch.full(shape, 0.5))
    assert clamped == 0


def test_strides_do_not_matter_and_the_input_is_not_changed():
    base = torch.randn(6, 8, generator=generator())
    for view in (base.T, base[:, ::2], base[:1].expand(4, 8), base.to(torch.bfloat16)):
        before = view.clone()
        for draw in (None, 3):
            codes, again = (
                FLOAT_1_6_9.encode(each, generator=None if draw is None else generator(draw))[0]
                for each in (view, view.float().contiguous())
            )
            assert torch.equal(codes, again)
        assert torch.equal(view, before)


def test_the_same_generator_state_gives_the_same_codes():
    numbers = torch.randn(1000, generator=generator()) * 2.0**-60  # with subnormals
    first, second, third = (FLOAT_1_6_9.encode(numbers, generator=generator(seed))[0] for seed in (1, 1, 2))
    assert torch.equal(first, second)
    assert not torch.equal(first, third)


def test_flushing_hardware_subnormals_changes_nothing():
    numbers = difficult(FLOAT_1_6_9, 1000, torch.float32)
    expected = FLOAT_1_6_9.encode(numbers)[0]
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor cannot flush")
    try:
        assert torch.equal(FLOAT_1_6_9.encode(numbers)[0], expected)
        assert torch.equal(FLOAT_1_6_9.encode(FLOAT_1_6_9.decode(all_codes(FLOAT_1_6_9)))[0], all_codes(FLOAT_1_6_9))
    finally:
        torch.set_flush_denormal(False)


def test_the_numbers_of_the_paper():
    assert FLOAT_1_6_9.max == 16 - 2.0**-6
    assert FLOAT_1_6_9.smallest_normal == 2.0**-59
    assert FLOAT_1_6_9.smallest_subnormal == 2.0**-68
    assert 15.99 < UNSIGNED.max < 16


@pytest.mark.parametrize(
    ("fields", "culprit"),
    [
        ((2, 6, 8, 60), "sign_bits"),
        ((1, 0, 9, 60), "exponent_bits"),
        ((1, 6, 10, 60), "significand_bits"),
        ((1, 6, 0, 60), "significand_bits"),
        ((1, 6, 9, 119), "bias"),
        ((1, 6, 9, -51), "bias"),
    ],
)
def test_impossible_formats_are_refused(fields, culprit):
    with pytest.raises(SettingError, match=f"MiniFloat.{culprit} is"):
        MiniFloat(*fields)


@pytest.mark.parametrize("bias", [118, -50])
def test_the_widest_biases_work(bias):
    form = MiniFloat(1, 6, 9, bias)
    numbers = difficult(form, 1000, torch.float32)
    numbers = numbers[numbers.isfinite()]
    assert torch.equal(form.encode(numbers)[0], torch.from_numpy(oracle(form, numbers.double().numpy())).short())
    assert torch.equal(form.encode(form.decode(all_codes(form)))[0], all_codes(form))
