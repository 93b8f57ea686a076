"""Codes for the wire: what comes back, how far off it is, and that nothing bad is hidden."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from distopt.numerics.codecs import FloatCodec, IntegerCodec, PlainCodec, SignCodec

CODECS = {
    "plain": PlainCodec(),
    "bfloat16": FloatCodec(torch.bfloat16),
    "float16": FloatCodec(torch.float16),
    "8 bits": IntegerCodec(8),
    "4 bits": IntegerCodec(4),
    "8 bits, blocks of 4": IntegerCodec(8, block=4),
    "sign": SignCodec(),
    "sign, blocks of 8": SignCodec(block=8),
}
every_codec = pytest.mark.parametrize("codec", CODECS.values(), ids=CODECS.keys())
every_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
sizes = st.sampled_from([1, 2, 3, 7, 8, 9, 255, 256, 257, 511, 512, 513, 1025])
seeds = st.integers(0, 2**31)


def draw(rows, columns, seed, dtype=torch.float32):
    """Numbers of different sizes, zeros of both signs among them."""
    generator = torch.Generator().manual_seed(seed)
    numbers = torch.randn(rows, columns, generator=generator, dtype=dtype)
    numbers *= 2.0 ** torch.randint(-8, 3, (rows, columns), generator=generator)
    numbers.view(-1)[::11], numbers.view(-1)[::13] = 0.0, -0.0
    return numbers


def there_and_back(codec, rows, seed=0):
    codes = codec.encode(rows, torch.Generator().manual_seed(seed))
    return codec.decode(codes, rows.shape[1], rows.dtype)


def bound(codec, rows):
    """How far off each number may come back."""
    result = torch.zeros_like(rows)
    if isinstance(codec, FloatCodec):
        largest = rows.abs().amax(dim=1, keepdim=True)
        floor = 2.0**-13 if codec.dtype == torch.float16 else 0.0  # beneath it the spacing no longer shrinks
        half_spacing = 2.0**-11 if codec.dtype == torch.float16 else 2.0**-8
        result = half_spacing * torch.maximum(rows.abs(), 2.0**-15 * floor * largest)
    for first in range(0, rows.shape[1], getattr(codec, "block", rows.shape[1])):
        block = rows[:, first : first + getattr(codec, "block", rows.shape[1])]
        largest = block.abs().amax(dim=1, keepdim=True).expand_as(block)
        if isinstance(codec, IntegerCodec):
            result[:, first : first + block.shape[1]] = largest * 1.00001 / (2 ** (codec.bits - 1) - 1)
        if isinstance(codec, SignCodec):
            result[:, first : first + block.shape[1]] = largest * 1.00001
    return result


@every_codec
@every_dtype
@given(rows=st.integers(1, 4), columns=sizes, seed=seeds, power=st.integers(-60, 60))
def test_errors_are_bounded_whatever_the_unit(codec, dtype, rows, columns, seed, power):
    numbers = draw(rows, columns, seed, dtype) * 2.0**power
    back = there_and_back(codec, numbers, seed)
    assert back.shape == numbers.shape
    assert back.dtype == dtype
    assert bool(((back - numbers).abs() <= bound(codec, numbers)).all())


@every_codec
@every_dtype
@given(rows=st.integers(1, 4), columns=sizes, seed=seeds)
def test_a_code_is_as_long_as_stated(codec, dtype, rows, columns, seed):
    code = codec.encode(draw(rows, columns, seed, dtype), torch.Generator())
    assert code.dtype == torch.uint8
    assert code.shape == (rows, codec.nbytes(columns, dtype))


@every_codec
@every_dtype
@given(columns=sizes, seed=seeds, power=st.integers(-70, 70))
def test_a_power_of_two_changes_no_bit_but_the_exponent(codec, dtype, columns, seed, power):
    numbers = draw(2, columns, seed, dtype)
    assert torch.equal(there_and_back(codec, numbers) * 2.0**power, there_and_back(codec, numbers * 2.0**power))


@every_codec
@every_dtype
@given(columns=sizes, seed=seeds, bad=st.sampled_from([math.nan, math.inf, -math.inf]), data=st.data())
def test_what_is_not_finite_is_seen_by_the_reader_and_spoils_no_other_row(codec, dtype, columns, seed, bad, data):
    numbers = draw(3, columns, seed, dtype)
    place = data.draw(st.integers(0, columns - 1))
    numbers[1, place] = bad
    back = there_and_back(codec, numbers, seed)
    assert not math.isfinite(back[1, place])
    assert torch.isfinite(back[[0, 2]]).all()


@every_codec
@every_dtype
@pytest.mark.parametrize("size", ["largest", "tiny", "smallest"])
def test_the_ends_of_the_range(codec, dtype, size):
    """Finite numbers come back finite; in float64 bfloat16 and sums end earlier, which the reader then sees."""
    info = torch.finfo(dtype)
    value = {"largest": info.max / 1.01, "tiny": info.tiny, "smallest": info.smallest_normal * info.eps}[size]
    numbers = torch.tensor([[1.0, -1.0, 0.5, 0.0]], dtype=dtype) * value
    back = there_and_back(codec, numbers)
    sooner = isinstance(codec, SignCodec) or codec == FloatCodec(torch.bfloat16)
    if dtype == torch.float64 and size == "largest" and sooner:
        assert not torch.isfinite(back[0, :3]).any()
        return
    assert torch.isfinite(back).all()
    assert bool(((back - numbers).abs() <= value).all())


@every_codec
@given(columns=sizes)
def test_zeros_stay_zeros(codec, columns):
    assert not there_and_back(codec, torch.zeros(2, columns)).any()
    assert not there_and_back(codec, torch.full((2, columns), -0.0)).any()


@every_codec
def test_strides_do_not_matter_and_the_input_is_not_changed(codec):
    base = draw(6, 40, 0)
    for view in (base.T, base[:, ::3], base[:1].expand(4, 40)):
        before = view.clone()
        assert torch.equal(there_and_back(codec, view), there_and_back(codec, view.contiguous()))
        assert torch.equal(view, before)


@every_codec
@every_dtype
@given(columns=sizes, offset=st.integers(0, 8), seed=seeds)
def test_codes_may_lie_anywhere(codec, dtype, columns, offset, seed):
    """Several tensors travel in one message: a code begins at any byte of it, and its rows lie apart."""
    code = codec.encode(draw(3, columns, seed, dtype), torch.Generator())
    message = torch.zeros(3, (code.shape[1] + 15) // 8 * 8, dtype=torch.uint8)
    place = message[:, offset : offset + code.shape[1]]
    place.copy_(code)
    before = message.clone()
    codec.decode(place, columns, dtype).add_(1.0)
    assert torch.equal(message, before)
    assert torch.equal(codec.decode(place, columns, dtype), codec.decode(code, columns, dtype))


@given(columns=sizes, seed=seeds)
def test_no_loss_in_plain(columns, seed):
    numbers = draw(2, columns, seed)
    assert torch.equal(there_and_back(PlainCodec(), numbers).view(torch.int32), numbers.view(torch.int32))


@given(columns=sizes, seed=seeds)
def test_bfloat16_is_a_conversion(columns, seed):
    numbers = draw(2, columns, seed)
    assert torch.equal(there_and_back(FloatCodec(torch.bfloat16), numbers), numbers.bfloat16().float())


@given(columns=sizes, seed=seeds)
def test_float16_is_a_conversion_where_the_largest_is_near_the_top(columns, seed):
    numbers = draw(2, columns, seed)
    numbers *= 20000.0 / numbers.abs().amax(dim=1, keepdim=True).clamp_min(1e-9)
    assert torch.equal(there_and_back(FloatCodec(torch.float16), numbers), numbers.half().float())


@pytest.mark.parametrize("codec", [IntegerCodec(8), IntegerCodec(4), IntegerCodec(4, block=8)], ids=str)
@every_dtype
def test_integers_are_the_numbers_on_average(codec, dtype):
    rows = 4000
    numbers = draw(1, 300, 3, dtype)
    back = there_and_back(codec, numbers.expand(rows, -1).contiguous(), 7).double()
    numbers = numbers.double()
    step = bound(codec, numbers)
    levels = numbers / step
    share = levels - levels.floor()
    deviation = step * (share * (1 - share) / rows).sqrt()
    assert bool(((back.mean(0) - numbers).abs() <= 5 * deviation + 2.0**-15 * step).all())


@pytest.mark.parametrize("bits", [8, 4])
@given(columns=sizes, seed=seeds)
def test_integers_are_one_of_the_two_next_to_the_number(bits, columns, seed):
    """The oracle, number by number: a step below or above it, the largest of its block always met."""
    numbers = draw(1, columns, seed, torch.float64)
    back = there_and_back(IntegerCodec(bits), numbers, seed)[0].tolist()
    steps = 2 ** (bits - 1) - 1
    for first in range(0, columns, 256):
        block = numbers[0, first : first + 256].tolist()
        scale = max(map(abs, block)) or 1.0
        for number, got in zip(block, back[first : first + 256], strict=True):
            level = got / scale * steps
            assert level == pytest.approx(round(level), abs=1e-9)
            assert abs(level - number / scale * steps) < 1 + 1e-4
            if abs(number) == scale:
                assert got == number


@given(columns=sizes, seed=seeds)
def test_signs_carry_the_mean_of_their_block(columns, seed):
    numbers = draw(2, columns, seed)
    back = there_and_back(SignCodec(), numbers)
    for row, got in zip(numbers.tolist(), back.tolist(), strict=True):
        for first in range(0, columns, 512):
            block = row[first : first + 512]
            mean = math.fsum(map(abs, block)) / len(block)
            expected = [mean if number >= 0 else -mean for number in block]
            assert got[first : first + 512] == pytest.approx(expected, rel=1e-6)


def test_each_draw_differs_and_the_generator_decides_alone():
    numbers = draw(2, 600, 0)
    codec = IntegerCodec(8)
    generator = torch.Generator().manual_seed(1)
    first, second = codec.encode(numbers, generator), codec.encode(numbers, generator)
    assert not torch.equal(first, second)
    assert torch.equal(first, codec.encode(numbers, torch.Generator().manual_seed(1)))
    assert not torch.equal(first[0], codec.encode(numbers[[0, 0]], torch.Generator().manual_seed(1))[1])
