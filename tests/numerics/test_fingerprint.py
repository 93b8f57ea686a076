"""No flipped bit escapes the fingerprint, whatever the dtype, shape and layout."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from distopt.numerics import fingerprint as module
from distopt.numerics.fingerprint import digest, fingerprint

DTYPES = [
    *(torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.complex64),
    *(torch.complex128, torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
]
dtypes = st.sampled_from(DTYPES)
shapes = st.lists(st.integers(0, 5), max_size=3)


def random_bits(shape, dtype, seed):
    """Any bits, NaNs and infinities among them (0 and 1 for bool)."""
    generator = torch.Generator().manual_seed(seed)
    size = torch.empty((), dtype=dtype).element_size()
    high = 2 if dtype == torch.bool else 256
    data = torch.randint(0, high, (*shape, size), dtype=torch.uint8, generator=generator)
    return data.view(dtype).reshape(shape)


def print_of(tensor):
    result = fingerprint(tensor)
    assert (result.shape, result.dtype) == ((), torch.int64)
    return int(result)


def every_flip(tensor):
    """The fingerprint after each single flip, by bit."""
    data = tensor.view(torch.uint8)
    for place in range(data.numel()):
        for bit in range(8):
            data[place] ^= 1 << bit
            yield place, bit, print_of(tensor)
            data[place] ^= 1 << bit


@given(shapes, dtypes, st.integers(0, 1000))
@settings(max_examples=40, deadline=None)
def test_every_single_bit_counts(shape, dtype, seed):
    flat = random_bits(shape, dtype, seed).reshape(-1)
    flat = flat.view(torch.uint8) if dtype == torch.bool else flat
    before = print_of(flat)
    prints = [value for _, _, value in every_flip(flat)]
    assert before not in prints
    assert len(set(prints)) == len(prints)
    assert print_of(flat) == before


@pytest.mark.parametrize("value", [0, -1, 1 << 62])
def test_every_single_bit_counts_in_any_chunk(value, monkeypatch):
    """The bits of highest value too, in every word of three chunks."""
    monkeypatch.setattr(module, "CHUNK", 8)
    module._weights.cache_clear()
    try:
        words = torch.full((20,), value)
        assert print_of(words) not in [print_ for _, _, print_ in every_flip(words)]
    finally:
        module._weights.cache_clear()


@given(dtypes.filter(lambda dtype: dtype != torch.bool), st.integers(2, 40), st.data())
@settings(max_examples=200, deadline=None)
def test_elements_that_change_places_count(dtype, size, data):
    tensor = random_bits((size,), dtype, data.draw(st.integers(0, 10**6)))
    first = data.draw(st.integers(0, size - 1))
    second = data.draw(st.integers(0, size - 1))
    swapped = tensor.clone()
    swapped[[first, second]] = tensor[[second, first]]
    same = torch.equal(tensor.view(torch.uint8), swapped.view(torch.uint8))
    assert (print_of(tensor) == print_of(swapped)) == same


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.complex64, torch.complex128])
@pytest.mark.parametrize("distance", [1, 2, 64, 4096])
def test_numbers_of_opposite_sign_that_change_places_count(dtype, distance):
    """They differ in the highest bits only, which weights that differ by even numbers would not see."""
    value = 1 + 1j if dtype.is_complex else 1
    tensor = torch.full((5000,), value, dtype=dtype)
    tensor[10] = -value
    moved = torch.full((5000,), value, dtype=dtype)
    moved[10 + distance] = -value
    assert print_of(tensor) != print_of(moved)


@given(st.lists(st.integers(1, 5), min_size=2, max_size=4), dtypes, st.integers(0, 1000), st.data())
@settings(deadline=None)
def test_the_layout_in_memory_does_not_count(shape, dtype, seed, data):
    tensor = random_bits(shape, dtype, seed)
    order = data.draw(st.permutations(range(len(shape))))
    permuted = tensor.permute(order)
    elsewhere = permuted.contiguous().permute([order.index(i) for i in range(len(order))])
    assert print_of(tensor) == print_of(elsewhere)
    wide = torch.cat([tensor, tensor])
    assert print_of(wide[: shape[0]]) == print_of(tensor) == print_of(wide[shape[0] :])


@given(st.integers(0, 30), st.integers(0, 8), dtypes)
@settings(deadline=None)
def test_a_piece_of_a_buffer_at_any_offset(length, offset, dtype):
    buffer = random_bits((40,), dtype, 3)
    piece = buffer[offset : offset + length]
    assert print_of(piece) == print_of(piece.clone())


@pytest.mark.parametrize("size", [module.CHUNK * 2 - 1, module.CHUNK * 2, module.CHUNK * 2 + 1, 5 * module.CHUNK + 3])
def test_large_tensors(size):
    tensor = torch.zeros(size)
    seen = {print_of(tensor)}
    for place in (0, size // 2, size - 1):
        tensor[place] = -0.0
        seen.add(print_of(tensor))
    assert len(seen) == 4


def test_chunks_that_change_places_count():
    halves = torch.arange(4 * module.CHUNK, dtype=torch.int32).view(2, -1)
    assert print_of(halves) != print_of(halves.flip(0))


def test_every_weight_is_odd_and_its_own():
    """What the proof in `fingerprint` rests on."""
    weights = module._weights(torch.device("cpu"))
    assert bool((weights & 1).all())
    assert weights.unique().numel() == module.CHUNK
    assert module._STIR % 2 == module._GOLDEN % 2 == 1


def test_special_tensors():
    assert print_of(torch.tensor(1.0)) == print_of(torch.ones(1))
    assert print_of(torch.tensor(0.0)) != print_of(torch.tensor(-0.0))
    assert print_of(torch.full((3,), math_nan := float("nan"))) == print_of(torch.full((3,), math_nan))
    assert len({print_of(torch.zeros(n)) for n in range(9)}) == 9  # zeros at the end count
    assert print_of(torch.ones(3, 0)) == print_of(torch.ones(0))
    parameter = torch.nn.Parameter(torch.ones(3))
    assert not fingerprint(parameter).requires_grad
    turned = torch.tensor([1 + 2j, 3 - 4j]).conj()
    assert print_of(turned) == print_of(turned.resolve_conj())
    assert print_of(turned.imag) == print_of(turned.imag.resolve_neg())


def test_it_is_the_same_number_on_every_machine():
    assert (print_of(torch.arange(10)), digest("a", "b")) == (5003221494591665218, 2833458332866829543)


@given(st.lists(st.text()), st.lists(st.text()))
def test_texts_have_the_same_digest_only_if_equal(first, second):
    assert (digest(*first) == digest(*second)) == (first == second)
    assert 0 <= digest(*first) < 1 << 63
    torch.tensor(digest(*first))
