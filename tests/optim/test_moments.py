"""Storing moments: what the codes mean, exactness, rounding without bias, any unit, noise that a key decides."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from distopt.numerics.minifloat import FLOAT_0_6_10, FLOAT_1_6_9
from distopt.optim.moments import FORMATS, Stored
from distopt.optim.pieces import BLOCK, Noise, in_memory_order, pieces

MEAN, VARIANCE = FORMATS["packed16"]
BRAIN = FORMATS["bfloat16"][0]
CPU = torch.device("cpu")
all_formats = pytest.mark.parametrize("form", [MEAN, VARIANCE, BRAIN], ids=["1-6-9", "0-6-10", "bfloat16"])
packed_formats = pytest.mark.parametrize("form", [MEAN, VARIANCE], ids=["1-6-9", "0-6-10"])
seeds = st.integers(0, 2**31)


def numbers_for(form, seed, count=300, binades=40, size=0):
    """Numbers of very different size, none below zero for the variance."""
    g = torch.Generator().manual_seed(seed)
    numbers = torch.randn(count, generator=g) * 2.0 ** (size - binades * torch.rand(count, generator=g))
    return numbers.abs() if form is VARIANCE else numbers


def kept(form, numbers):
    stored = Stored.zeros(form, numbers)
    stored.encode(numbers)
    return stored


def stochastic(form, numbers, *key):
    """The codes of numbers that are rounded with the draws of a key."""
    stored, noise = Stored.zeros(form, numbers), Noise(*key)
    for piece in pieces(numbers.numel(), CPU):
        target = piece.of(in_memory_order(stored.codes, stored.codes))
        draws = noise.draws(piece, form.dropped, CPU)
        form.store(piece.of(numbers.reshape(-1)).clone(), target, stored.scales_of(piece), draws)
    return stored


@packed_formats
def test_the_codes_are_those_of_the_format(form):
    """For every code, subnormal ones included, the value is the format's times the block's scale."""
    codes = torch.arange(-(2**15), 2**15).to(torch.int16)
    stored = Stored(form, codes, torch.tensor([2.0**67]))
    minifloat = FLOAT_1_6_9 if form is MEAN else FLOAT_0_6_10
    assert torch.equal(stored.decoded(), minifloat.decode(codes))


@all_formats
@given(seed=seeds, size=st.integers(-60, 40), binades=st.sampled_from([1, 30, 100]))
def test_what_was_stored_is_stored_again_without_change(form, seed, size, binades):
    for stored in (
        kept(form, numbers_for(form, seed, binades=binades, size=size)),
        stochastic(form, numbers_for(form, seed, binades=binades, size=size), seed),
    ):
        values = stored.decoded()
        again = kept(form, values).decoded()
        assert torch.equal(again, values)
        assert torch.equal(stochastic(form, values, "other key").decoded(), values)


@packed_formats
@given(power=st.integers(-50, 50), distance=st.integers(-13, -1), sign=st.sampled_from([-1, 0, 1]), seed=seeds)
def test_that_holds_where_the_largest_is_rounded_to_a_power_of_two(form, power, distance, sign, seed):
    numbers = numbers_for(form, seed, binades=75)
    numbers *= 2.0 ** (power - 1) / numbers.abs().max()
    numbers[0] = 2.0**power * (1 + sign * 2.0**distance)
    values = stochastic(form, numbers, seed).decoded()
    assert torch.equal(kept(form, values).decoded(), values)


@all_formats
@given(seed=seeds, size=st.integers(-60, 40), key=st.sampled_from([None, 3]))
def test_errors_are_bounded(form, seed, size, key):
    numbers = numbers_for(form, seed, size=size)
    stored = kept(form, numbers) if key is None else stochastic(form, numbers, key)
    bits = {MEAN: 9, VARIANCE: 10, BRAIN: 7}[form] + (key is None)
    assert bool(((stored.decoded() - numbers).abs() <= 2.0**-bits * numbers.abs()).all())


@packed_formats
@given(seed=seeds, size=st.integers(-40, 40))
def test_a_power_of_two_changes_the_scales_alone(form, seed, size):
    numbers = numbers_for(form, seed, binades=60)
    one, other = stochastic(form, numbers, seed), stochastic(form, numbers * 2.0**size, seed)
    assert torch.equal(one.codes, other.codes)
    assert torch.equal(one.scales * 2.0**size, other.scales)


@packed_formats
@pytest.mark.parametrize("power", [-126, -100, 0, 61])
def test_nothing_saturates(form, power):
    numbers = torch.tensor([2.0**power, 1.99 * 2.0**power])
    assert torch.allclose(kept(form, numbers).decoded(), numbers, rtol=2.0**-10, atol=0)


@packed_formats
@pytest.mark.parametrize("bad", [math.nan, math.inf, 2.0**63])
def test_what_cannot_be_stored_makes_its_block_not_a_number(form, bad):
    numbers = torch.ones(BLOCK + 3)
    numbers[-1] = bad
    values = kept(form, numbers).decoded()
    assert bool((values[:BLOCK] == 1).all())
    assert bool(values[BLOCK:].isnan().all())


def test_a_variance_is_held_above_zero_and_a_mean_is_not():
    numbers = torch.tensor([4.0, 1e-30, 0.0])
    assert kept(VARIANCE, numbers).decoded()[1:].tolist() == [2.0**-60, 2.0**-60]  # 4 is stored as 8
    assert kept(MEAN, numbers).decoded()[1:].tolist() == [0.0, 0.0]
    assert kept(VARIANCE, torch.zeros(3)).decoded().tolist() == [0.0, 0.0, 0.0]


@all_formats
def test_the_rounding_is_unbiased(form):
    """Over all places where a draw may begin, every value is met as often as the mean wants it."""
    numbers = numbers_for(form, 5, count=40, binades=20)
    rows = 4000
    values = torch.stack([stochastic(form, numbers, row).decoded() for row in range(rows)]).double()
    low, high = values.amin(0), values.amax(0)
    deviation = ((high - numbers) * (numbers - low) / rows).clamp_min(0).sqrt()
    assert bool(((values.mean(0) - numbers).abs() <= 5 * deviation + 2.0**-22 * numbers.abs()).all())


@pytest.mark.parametrize("bits", [13, 14, 16])
def test_a_draw_takes_every_value_equally_often(bits):
    piece = next(pieces(1, CPU))
    noise = Noise("any")
    found = []
    for start in range(1 << 16):
        noise._start = start
        found.append(noise.draws(piece, bits, CPU))
    counts = torch.cat(found).flatten().bincount(minlength=1 << bits)
    assert counts.tolist() == [1 << 16 - bits] * (1 << bits)


def test_the_number_of_threads_changes_no_bit():
    numbers = torch.randn(3 * BLOCK + 100, generator=torch.Generator().manual_seed(0))
    one = stochastic(MEAN, numbers, 1)
    torch.set_num_threads(2)
    two = stochastic(MEAN, numbers, 1)
    assert torch.equal(one.codes, two.codes)
    assert torch.equal(one.scales, two.scales)


def test_the_bits_of_a_key_are_the_same_in_every_process():
    numbers = torch.arange(1.0, 9.0) / 7
    assert stochastic(MEAN, numbers, 0, "w").codes.tolist() == [30281, 30793, 31085, 31305, 31451, 31598, 31744, 31817]
    assert Noise(1).draws(next(pieces(5, CPU)), 14, CPU).tolist() == [[8856, 9918, 10332, 9779, 9891]]


@pytest.mark.parametrize("layout", ["transposed", "channels_last", "gaps"])
def test_any_order_of_memory(layout):
    base = torch.randn(4, 6, 3, 2, generator=torch.Generator().manual_seed(0))
    numbers = {
        "transposed": base.transpose(0, 1),
        "channels_last": base.to(memory_format=torch.channels_last),
        "gaps": base[:, ::2],
    }[layout]
    stored = kept(MEAN, numbers)
    assert stored.decoded().shape == numbers.shape
    assert torch.allclose(stored.decoded(), numbers, rtol=2.0**-9)
    flat = in_memory_order(numbers, stored.codes)
    assert (flat.data_ptr() == numbers.data_ptr()) == (layout != "gaps")


@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 4), (BLOCK,), (BLOCK + 1,), (300, 500)], ids=str)
@all_formats
def test_any_shape(form, shape):
    numbers = torch.full(shape, 0.75)
    stored = kept(form, numbers)
    assert torch.equal(stored.decoded(), numbers)
    assert stored.codes.shape == shape
    assert stored.nbytes() == 2 * numbers.numel() + (4 * -(-numbers.numel() // BLOCK) if form is not BRAIN else 0)
