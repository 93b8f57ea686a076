"""Gathered attention equals the dense one, forward and backward, and is chosen where it pays."""

import pytest
import torch
from distopt.integrations.dalle import sparse_attention
from distopt.integrations.dalle.attention import Pattern, attend_densely
from distopt.integrations.dalle.sparse_attention import attend, attend_gathered, keys_per_query
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from distopt.numerics.emulation import emulated_16bit

patterns = st.builds(
    Pattern,
    st.sampled_from(("row", "column", "conv")),
    text=st.integers(2, 6),
    grid=st.integers(1, 8),
    kernel=st.sampled_from((1, 3, 5, 11)),
)


def tensors(pattern: Pattern, seed: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    # Laid out as the transformer's projection lays them out.
    together = torch.randn(2, pattern.positions, 3, 3, 4, generator=generator, dtype=dtype)
    return [tensor.requires_grad_() for tensor in together.permute(2, 0, 3, 1, 4).unbind()]


@given(patterns, st.integers(0, 1000))
@settings(max_examples=80, deadline=None)
def test_gathered_equals_dense_forward_and_backward(pattern: Pattern, seed: int) -> None:
    inputs = tensors(pattern, seed)
    gathered, dense = attend_gathered(*inputs, pattern), attend_densely(*inputs, pattern)
    torch.testing.assert_close(gathered, dense, rtol=1e-10, atol=1e-12)
    weights = torch.randn(dense.shape, generator=torch.Generator().manual_seed(seed), dtype=dense.dtype)
    expected = torch.autograd.grad((dense * weights).sum(), inputs)
    found = torch.autograd.grad((gathered * weights).sum(), inputs)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("kind", ["row", "column", "conv"])
def test_in_16_bits_it_stays_close_to_the_dense_one(kind: str) -> None:
    pattern = Pattern(kind, 3, 6, 3)
    inputs = tensors(pattern, 0, torch.float32)
    halves = [tensor.detach().bfloat16() for tensor in inputs]
    with emulated_16bit():
        out = attend_gathered(*halves, pattern)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), attend_densely(*inputs, pattern), rtol=0.05, atol=0.05)


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        (Pattern("row", 257, 32, 11), True),
        (Pattern("column", 257, 32, 11), True),
        (Pattern("conv", 257, 32, 11), True),
        (Pattern("row", 33, 16, 11), True),
        (Pattern("column", 33, 16, 11), True),
        (Pattern("conv", 33, 16, 11), False),
        (Pattern("row", 17, 6, 11), False),
        (Pattern("column", 17, 6, 11), False),
        (Pattern("full", 17, 32, 11), False),
    ],
)
def test_the_gathered_way_is_taken_where_it_was_faster(
    monkeypatch: pytest.MonkeyPatch, pattern: Pattern, expected: bool
) -> None:
    taken = []
    for name in ("attend_gathered", "attend_densely"):
        monkeypatch.setattr(sparse_attention, name, lambda *_, name=name: taken.append(name))
    whole = torch.empty(1, 1, pattern.positions, 1)
    attend(whole, whole, whole, pattern)
    attend(whole[:, :, :-1], whole, whole, pattern)  # a part of the stream, as a prompt is
    assert taken == ["attend_gathered" if expected else "attend_densely", "attend_densely"]


def test_a_band_is_as_high_as_the_mask_looks_back() -> None:
    assert keys_per_query(Pattern("row", 257, 32, 11)) == 257 + 2 * 32
    assert keys_per_query(Pattern("column", 257, 32, 11)) == 257 + 32
    assert keys_per_query(Pattern("conv", 257, 32, 11)) == 257 + 7 * 32
    assert keys_per_query(Pattern("conv", 17, 6, 11)) == 17 + 36
