"""Storing in fewer bits: errors, scales, storing again, and what stochastic rounding is for."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from distopt.errors import SettingError
from distopt.numerics.minifloat import PIECE
from distopt.numerics.storage import Packed, check_storage, clamped, nbytes, pack, unpack

REDUCED = [torch.bfloat16, torch.float16, "1-6-9"]
SCALED = [torch.float16, "1-6-9"]
BITS = {torch.bfloat16: 8, torch.float16: 11, "1-6-9": 10}  # with the implicit one
DEPTH = {torch.bfloat16: 2.0**-100, torch.float16: 2.0**-28, "1-6-9": 2.0**-61}  # of full precision, to the largest
formats = pytest.mark.parametrize("dtype", REDUCED, ids=str)
scaled_formats = pytest.mark.parametrize("dtype", SCALED, ids=str)
keys = st.sampled_from([(), (0, "w"), (1, "w", 7)])
seeds = st.integers(0, 2**31)


def wide(seed, count=200, binades=80, dtype=torch.float32):
    """Numbers of very different size, zeros of both signs among them."""
    g = torch.Generator().manual_seed(seed)
    sizes = torch.rand(count, generator=g, dtype=dtype) * -binades
    numbers = torch.randn(count, generator=g, dtype=dtype) * 2.0**sizes
    numbers[::17], numbers[::19] = 0.0, -0.0
    return numbers


def same(first, second):
    """Equal to the bit, sign of zero, exponent and type included."""
    if isinstance(first, Packed):
        return first[1:] == second[1:] and same(first.codes, second.codes)
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[first.element_size()]
    return first.dtype == second.dtype and torch.equal(first.view(integer), second.view(integer))


def largest_near(power, offset, seed):
    """A tensor whose largest element is ``2**power * (1 + offset)``."""
    numbers = wide(seed, 50)
    return torch.cat([numbers / numbers.abs().max() * 2.0 ** (power - 1), torch.tensor([-(2.0**power) * (1 + offset)])])


@formats
@given(seed=seeds, key=keys, binades=st.sampled_from([1, 30, 80, 120]))
def test_errors_are_bounded(dtype, seed, key, binades):
    numbers = wide(seed, binades=binades)
    error = (unpack(pack(numbers, dtype, *key)) - numbers).abs().double()
    floor = DEPTH[dtype] * float(numbers.abs().max())
    relative = 2.0 ** -(BITS[dtype] - (1 if key else 0))
    assert bool((error <= relative * numbers.abs().double().clamp_min(floor)).all())


@formats
@given(seed=seeds, key=keys, k=st.integers(-40, 40))
def test_a_power_of_two_changes_the_exponent_alone(dtype, seed, key, k):
    numbers = wide(seed, binades=60)
    before, after = pack(numbers, dtype, *key), pack(numbers * 2.0**k, dtype, *key)
    if isinstance(before, Packed):
        assert same(after, before._replace(exponent=before.exponent + k))
    assert same(unpack(after), unpack(before) * 2.0**k)


@formats
@given(seed=seeds, key=keys, binades=st.sampled_from([1, 30, 80, 120]))
def test_storing_again_changes_nothing(dtype, seed, key, binades):
    stored = pack(wide(seed, binades=binades), dtype, *key)
    assert same(pack(unpack(stored), dtype), stored)
    assert same(pack(unpack(stored), dtype, "another key"), stored)


@formats
@given(
    seed=seeds,
    key=keys,
    power=st.integers(-60, 60),
    sign=st.sampled_from([-1, 0, 1]),
    distance=st.sampled_from([2.0**-23, 2.0**-13, 2.0**-12, 2.0**-11, 2.0**-10, 2.0**-9, 2.0**-8]),
)
def test_storing_again_changes_nothing_where_the_largest_is_rounded_to_a_power_of_two(
    dtype, seed, key, power, sign, distance
):
    stored = pack(largest_near(power, sign * distance / 2, seed), dtype, *key)
    assert same(pack(unpack(stored), dtype), stored)


@scaled_formats
def test_both_ways_of_rounding_the_largest_are_met(dtype):
    numbers = largest_near(0, 0.3 * 2.0 ** -(BITS[dtype] - 1), 0)
    exponents = {pack(numbers, dtype, draw).exponent for draw in range(50)}
    assert len(exponents) == 2


@formats
@given(power=st.integers(-149, 127), key=keys, seed=seeds)
def test_extreme_sizes(dtype, power, key, seed):
    numbers = torch.rand(30, generator=torch.Generator().manual_seed(seed)) * 2.0**power
    numbers[0] = torch.finfo(torch.float32).max if power == 127 else 2.0**power
    stored = pack(numbers, dtype, *key)
    values = unpack(stored)
    spacing = 2.0 ** -(BITS[dtype] - 1) * float(numbers.max())
    assert bool(values.isfinite().all())
    assert bool(((values.double() - numbers.double()).abs() <= max(spacing, 2.0**-133)).all())
    assert same(pack(values, dtype), stored)
    assert clamped(stored) == 0


@formats
@pytest.mark.parametrize("key", [(), (3,)], ids=["nearest", "stochastic"])
@pytest.mark.parametrize("shape", [(), (0,), (2, 0), (3, 4), (PIECE + 5,)], ids=str)
@pytest.mark.parametrize("fill", [0.0, -0.0, 0.75], ids=str)
def test_shapes_and_zeros(dtype, key, shape, fill):
    numbers = torch.full(shape, fill)
    stored = pack(numbers, dtype, *key)
    assert same(unpack(stored), numbers)
    assert same(pack(unpack(stored), dtype), stored)
    assert nbytes(stored) == 2 * numbers.numel()


@formats
@pytest.mark.parametrize("source", [torch.float32, torch.float64], ids=str)
def test_stochastic_rounding_is_unbiased(dtype, source):
    rows = 4000
    numbers = wide(5, 64, binades=35, dtype=source)
    values = unpack(pack(numbers.expand(rows, 64), dtype, "mean"), torch.float64)
    low, high = values.amin(0), values.amax(0)
    assert bool(((low <= numbers) & (numbers <= high)).all())
    deviation = ((high - numbers) * (numbers - low) / rows).sqrt()
    # Float64 goes to bfloat16 by way of float32, which is not random.
    slack = 2.0**-24 * numbers.abs() if source == torch.float64 else 0
    assert bool(((values.mean(0) - numbers).abs() <= 5 * deviation + slack).all())


@formats
def test_small_increments_add_up_in_expectation_and_vanish_under_nearest_rounding(dtype):
    increment, steps, width = 2.0**-16, 256, 4096
    nearest = stochastic = pack(torch.ones(width), dtype)
    for step in range(steps):
        nearest = pack(unpack(nearest) + increment, dtype)
        stochastic = pack(unpack(stochastic) + increment, dtype, "sum", step)
    moved = float(unpack(stochastic).double().mean()) - 1
    spacing = 2.0 ** -(BITS[dtype] - 1)
    assert same(unpack(nearest), torch.ones(width))
    assert abs(moved - increment * steps) < 5 * math.sqrt(steps * increment * spacing / width)


@formats
def test_the_key_decides_alone(dtype):
    numbers = wide(0, 1000)
    torch.manual_seed(0)
    first = pack(numbers, dtype, 0, "w")
    state = torch.random.get_rng_state()
    assert same(first, pack(numbers, dtype, 0, "w"))
    assert not same(unpack(first), unpack(pack(numbers, dtype, 0, "v")))
    assert torch.equal(torch.random.get_rng_state(), state)


def test_the_bits_of_a_key_are_the_same_in_every_process():
    numbers = torch.arange(1.0, 9.0) / 7
    assert pack(numbers, "1-6-9", 0, "w").codes.tolist() == [30281, 30793, 31086, 31305, 31451, 31598, 31744, 31817]
    assert pack(numbers, torch.float16, 0, "w").codes.view(torch.int16).tolist() == [
        26770,
        27794,
        28380,
        28819,
        29111,
        29403,
        29696,
        29842,
    ]
    assert pack(numbers, torch.bfloat16, 0, "w").view(torch.int16).tolist() == [
        15890,
        16018,
        16092,
        16147,
        16183,
        16219,
        16256,
        16274,
    ]


def test_nearest_float_16_agrees_with_rounding_float64_once():
    numbers = wide(1, 5000, binades=40)
    assert same(pack(numbers, torch.float16), pack(numbers.double(), torch.float16))
    barely = torch.tensor([1.0, 1 + 2.0**-11 + 2.0**-40], dtype=torch.float64)  # a tie to float32's eye
    assert unpack(pack(barely, torch.float16)).tolist() == [1.0, 1 + 2.0**-10]


@scaled_formats
def test_float64_beyond_the_range_of_float32(dtype):
    numbers = torch.tensor([1e300, -3e299], dtype=torch.float64)
    values = unpack(pack(numbers, dtype), torch.float64)
    assert bool(((values - numbers).abs() <= 2.0 ** -BITS[dtype] * numbers.abs()).all())
    assert same(pack(values, dtype), pack(numbers, dtype))


def test_plain_formats():
    numbers = wide(0)
    assert pack(numbers, None) is numbers
    assert pack(numbers, torch.float32) is numbers
    assert unpack(numbers) is numbers
    double = numbers.double()
    assert pack(double, None) is double
    assert same(pack(double, torch.float32), numbers)
    assert same(pack(numbers, torch.float64), double)
    assert same(pack(numbers, torch.bfloat16), numbers.to(torch.bfloat16))
    assert (nbytes(numbers), nbytes(double), clamped(numbers)) == (800, 1600, 0)


@formats
@pytest.mark.parametrize("key", [(), (3,)], ids=["nearest", "stochastic"])
def test_strides_do_not_matter_and_the_input_is_not_changed(dtype, key):
    base = wide(0, 48).view(6, 8)
    for view in (base.T, base[:, ::2], base[:1].expand(4, 8), base.to(torch.bfloat16)):
        before = view.clone()
        stored = pack(view, dtype, *key)
        assert same(unpack(stored), unpack(pack(view.float().contiguous(), dtype, *key)))
        assert torch.equal(view, before)


@formats
@pytest.mark.parametrize("key", [(), (3,)], ids=["nearest", "stochastic"])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_refused(dtype, key, bad):
    with pytest.raises(ValueError, match="not finite"):
        pack(torch.tensor([1.0, bad, 2.0]), dtype, *key)


def test_bfloat16_refuses_what_is_beyond_its_range():
    with pytest.raises(ValueError, match="not finite"):
        pack(torch.tensor([1e39], dtype=torch.float64), torch.bfloat16)


def test_settings_are_checked():
    for allowed in (None, torch.float32, torch.bfloat16, torch.float16, "1-6-9"):
        check_storage("PowerSGD.residual_dtype", allowed)
    for wrong in (torch.float64, torch.int16, "float16", "1-5-10", 16, 0, False, [], ["1-6-9"]):
        with pytest.raises(
            SettingError, match=r"PowerSGD.residual_dtype is .*, but must be one of None, torch.float32, "
        ):
            check_storage("PowerSGD.residual_dtype", wrong)
    with pytest.raises(SettingError, match=r"PowerSGD.wire_dtype is '1-6-9', but must be one of None, torch.bfloat16"):
        check_storage("PowerSGD.wire_dtype", "1-6-9", (None, torch.bfloat16))
    with pytest.raises(SettingError, match=r"dtype is torch.int8"):
        pack(torch.ones(1), torch.int8)
