"""The device functions of the 16-bit formats: the plain editions' bits, no bias, draws that an index decides."""

import numpy as np
import pytest
import torch
import triton
import triton.language as tl

from distopt.kernels.formats import decode, draw_at, draws_of, encode_nearest, encode_stochastic
from distopt.numerics.minifloat import FLOAT_0_6_10, FLOAT_1_6_9, MiniFloat
from tests.kernels import philox
from tests.kernels.compiling import compiled

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FLOAT16 = MiniFloat(1, 5, 10, bias=15)
DTYPES = {"1-6-9": torch.int16, "0-6-10": torch.int16, "float16": torch.float16, "bfloat16": torch.bfloat16}
SMALLEST = {"1-6-9": 2.0**-68, "0-6-10": 2.0**-69, "float16": 2.0**-24, "bfloat16": 2.0**-133}
all_forms = pytest.mark.parametrize("form", list(DTYPES))
BLOCK = 8192


@triton.jit
def _encode(values, codes, inverse, seed, FORM: tl.constexpr, STOCHASTIC: tl.constexpr, BLOCK: tl.constexpr):
    first = tl.program_id(0) * BLOCK
    at = first + tl.arange(0, BLOCK)
    numbers = tl.load(values + at)
    if STOCHASTIC:
        low = tl.program_id(0) * (BLOCK // 8) + tl.arange(0, BLOCK // 8)
        tl.store(codes + at, encode_stochastic(numbers, inverse, draws_of(seed, low * 0, low), FORM))
    else:
        tl.store(codes + at, encode_nearest(numbers, inverse, FORM))


@triton.jit
def _decode(codes, values, scale, FORM: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(values + at, decode(tl.load(codes + at), scale, FORM))


@triton.jit
def _draw(runs, singles, seed, BLOCK: tl.constexpr):
    low = tl.program_id(0) * (BLOCK // 8) + tl.arange(0, BLOCK // 8)
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(runs + at, draws_of(seed, low * 0 + 3, low))
    tl.store(singles + at, draw_at(seed, at * 0 + 3, at))


@triton.jit
def _round(values, draws, codes, FORM: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(codes + at, encode_stochastic(tl.load(values + at), 1.0, tl.load(draws + at), FORM))


def encoded(values, form, *, scale=1.0, seed=None):
    padded = torch.zeros(-(-values.numel() // BLOCK) * BLOCK, device=DEVICE)
    padded[: values.numel()] = values
    codes = torch.empty(padded.shape, dtype=DTYPES[form], device=DEVICE)
    _encode[(codes.numel() // BLOCK,)](padded, codes, 1 / scale, seed or 0, form, seed is not None, BLOCK)
    return codes[: values.numel()].cpu()


def decoded(codes, form, *, scale=1.0):
    codes = codes.to(DEVICE)
    values = torch.empty(codes.shape, device=DEVICE)
    _decode[(codes.numel() // BLOCK,)](codes, values, scale, form, BLOCK)
    return values.cpu()


def drawn(seed, count=16_384, block=BLOCK):
    runs, singles = (torch.empty(count, dtype=torch.int32, device=DEVICE) for _ in range(2))
    _draw[(count // block,)](runs, singles, seed, block)
    return runs.cpu(), singles.cpu()


def plain(values, form, scale=1.0):
    if form == "bfloat16":
        return values.to(torch.bfloat16)
    form = {"1-6-9": FLOAT_1_6_9, "0-6-10": FLOAT_0_6_10, "float16": FLOAT16}[form]
    return form.encode(values if form.sign_bits else values.abs(), scale=1 / scale)[0]


def bits(codes):
    return codes.view(torch.int16)


def all_codes(form):
    """Of finite numbers."""
    codes = torch.arange(-(2**15), 2**15).to(torch.int16).view(DTYPES[form])
    return codes if codes.dtype == torch.int16 else codes.nan_to_num(0.0, 0.0, 0.0)


def numbers(form, seed=0, count=20_000):
    """Random ones over all binades of the format, and midpoints between codes with their float32 neighbours."""
    g = torch.Generator().manual_seed(seed)
    power = torch.randint(-150, 110, (count,), generator=g) if form == "bfloat16" else None
    power = torch.randint(-80, 6, (count,), generator=g) if power is None else power
    values = torch.randn(count, generator=g) * torch.exp2(power.float())
    exact = decoded(all_codes(form), form).sort().values
    middle = (exact[1:] + exact[:-1]) / 2
    least, most = torch.tensor(-torch.inf), torch.tensor(torch.inf)
    return torch.cat([values, middle, middle.nextafter(most), middle.nextafter(least)]).nan_to_num(0.0, 0.0, 0.0)


@all_forms
def test_every_code_is_read_and_written_as_it_is(form):
    codes = all_codes(form)
    values = decoded(codes, form, scale=0.25)
    if form in ("1-6-9", "0-6-10"):
        assert torch.equal(values, (FLOAT_1_6_9 if form == "1-6-9" else FLOAT_0_6_10).decode(codes, scale=0.25))
    else:
        assert torch.equal(values, codes.float() * (1.0 if form == "bfloat16" else 0.25))
    assert torch.equal(bits(encoded(values, form, scale=0.25)), bits(codes))
    assert torch.equal(bits(encoded(values, form, scale=0.25, seed=5)), bits(codes))


@all_forms
def test_the_nearest_codes_are_those_of_the_plain_edition(form):
    values = numbers(form)
    if form == "bfloat16":
        values = values[values.abs() < 2.0**127]
    assert torch.equal(bits(encoded(values, form)), bits(plain(values, form)))


@pytest.mark.parametrize("form", ["1-6-9", "0-6-10", "float16"])
@pytest.mark.parametrize("power", [-40, 100])
def test_scales_move_all_values_alike(form, power):
    values = numbers(form, count=2000)[:2000]
    codes = encoded(values * 2.0**power, form, scale=2.0**power)
    kept = values.abs() > 2.0**-86  # the product with the scale was exact
    assert torch.equal(bits(codes)[kept], bits(encoded(values, form))[kept])


@all_forms
def test_what_is_too_large_becomes_the_largest(form):
    values = torch.tensor([1e38, -1e38, torch.inf, -torch.inf, 3.4e38])
    codes = encoded(values, form)
    back = decoded(torch.cat([codes, codes.new_zeros(BLOCK - 5)]), form)[:5]
    if form == "bfloat16":
        limit = torch.finfo(torch.bfloat16).max
        assert back[[2, 3]].isinf().all()
        assert torch.equal(back[[4]], torch.tensor([limit]))
    else:
        largest = {"1-6-9": 15.984375, "0-6-10": 15.9921875, "float16": 65504.0}[form]
        assert torch.equal(back.abs(), torch.full((5,), largest))
    assert torch.equal(encoded(values, form, seed=1), codes) or form == "bfloat16"


def test_bfloat16_keeps_nan():
    quiet_and_narrow = torch.tensor([0x7FC00000, 0x7F800001, -1], dtype=torch.int32).view(torch.float32)
    assert encoded(quiet_and_narrow, "bfloat16").isnan().all()
    assert encoded(quiet_and_narrow, "bfloat16", seed=1).isnan().all()


@all_forms
def test_stochastic_rounding_takes_a_neighbour_and_is_right_on_average(form):
    smallest = SMALLEST[form]
    exact = decoded(all_codes(form), form).double().unique()
    for value in (1.0003, 3.3, 1000.3 * smallest, 0.3 * smallest, 17.7 * smallest):
        value = float(torch.tensor(value))
        count = 40_960
        codes = encoded(torch.full((count,), value), form, seed=11)
        values = decoded(codes, form).double()
        below, above = values.min().item(), values.max().item()
        assert (below, above) == (exact[exact <= value].max().item(), exact[exact > value].min().item())
        spread = (above - below) / count**0.5
        assert abs(values.mean().item() - value) < 3 * spread


@all_forms
def test_all_draws_together_give_the_value_itself(form):
    """No number of samples shows a bias of 2**-14 of a unit in the last place; every draw taken once shows any."""
    smallest = SMALLEST[form]
    g = torch.Generator().manual_seed(1)
    normal = [float(each) for each in torch.rand(6, generator=g) * 8]
    draws = torch.arange(2**16, dtype=torch.int32, device=DEVICE)
    for value in (*normal, 1.0, 1 + 2.0**-23, 2 - 2.0**-23, 0.3 * smallest, 17.7 * smallest, 0.0):
        value = float(torch.tensor(value))
        codes = torch.empty(2**16, dtype=DTYPES[form], device=DEVICE)
        _round[(2**16 // BLOCK,)](torch.full((2**16,), value, device=DEVICE), draws, codes, form, BLOCK)
        mean = decoded(codes, form).double().mean().item()
        # What is below a format's normal range lies at the end of float32's, on its way, and is rounded there.
        assert mean == value or (value < 1e-3 and abs(mean - value) <= 2.0**-14 * smallest), (value, mean)


def test_draws_are_those_of_the_generator():
    """To the bit: there is no other bias in them than its own."""
    for seed in (0, 7, 2**40 + 5):
        wanted = philox.draws(seed, 3, np.arange(2048))
        assert torch.equal(drawn(seed)[0], wanted)


def test_the_generator_is_the_published_one():
    """Its authors' known answers, of ten rounds."""
    assert philox.philox(0, (0, 0, 0, 0), 10).tolist() == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    ones = philox.philox(2**64 - 1, (2**32 - 1,) * 4, 10)
    assert ones.tolist() == [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]


def test_a_draw_follows_from_seed_and_index_alone():
    runs, singles = drawn(7)
    assert torch.equal(runs, singles)
    assert torch.equal(runs, drawn(7, block=4096)[0])
    assert not torch.equal(runs, drawn(8)[0])


def test_draws_are_uniform_and_independent():
    draws = drawn(123, count=65_536)[0]
    assert draws.min() >= 0
    assert draws.max() < 2**16
    for shift in range(16):
        share = ((draws >> shift) & 1).double().mean().item()
        assert abs(share - 0.5) < 0.01
    centred = draws.double() - draws.double().mean()
    for distance in (1, 2, 4, 8):
        correlation = (centred[distance:] * centred[:-distance]).mean() / centred.square().mean()
        assert abs(correlation) < 0.02


def launches():
    """As real kernels would call them."""
    for form, dtype in DTYPES.items():
        values, codes = torch.empty(4096), torch.empty(4096, dtype=dtype)
        _encode[(1,)](values, codes, 0.5, 1, form, True, 4096)
        _decode[(1,)](codes, values, 0.5, form, 4096)
    _encode[(1,)](values, codes.view(torch.int16), 0.5, 1, "1-6-9", False, 4096)


def test_they_compile_for_gpus():
    kernels = compiled("tests.kernels.test_formats")
    assert len(kernels) == 9
    assert all(each.spilled == 0 and each.shared <= 16 * 1024 for each in kernels)
