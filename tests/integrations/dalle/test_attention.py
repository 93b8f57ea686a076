"""The paper's masks against a definition in slow loops, and which layer has which."""

import collections

import pytest
import torch
from distopt.integrations.dalle.attention import (
    CONV,
    FULL,
    Pattern,
    attend_densely,
    image_mask,
    layer_kinds,
    stream_mask,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

KINDS = ("full", "row", "column", "conv")
patterns = st.builds(
    Pattern,
    st.sampled_from(KINDS),
    text=st.integers(2, 6),
    grid=st.integers(1, 8),
    kernel=st.sampled_from((1, 3, 5, 7, 11)),
)


def walk(grid: int, row: int, column: int) -> int | None:
    """The slot at a place that may lie beside the grid: who leaves a row on one side enters the next on the other."""
    while column < 0:
        row, column = row - 1, column + grid
    while column >= grid:
        row, column = row + 1, column - grid
    return row * grid + column if 0 <= row < grid else None


def seen_by(pattern: Pattern, slot: int) -> set[int]:
    """Which slots a slot sees, from the words of the paper's appendix B.1."""
    grid, half = pattern.grid, pattern.kernel // 2
    row, column = slot // grid, slot % grid
    if pattern.kind == "full":
        seen = set(range(slot + 1))
    elif pattern.kind == "row":
        seen = {slot}
        back = slot
        for _ in range(grid):
            back -= 1
            seen.add(back)
    elif pattern.kind == "column":
        seen = {above * grid + column for above in range(row + 1)}
    else:
        places = [(row + a, column + b) for a in range(-half, half + 1) for b in range(-half, half + 1)]
        seen = {other for place in places if (other := walk(grid, *place)) is not None and other <= slot}
    return {other for other in seen if other is not None and other >= 0}


def brute_force(pattern: Pattern) -> Tensor:
    mask = torch.zeros(pattern.positions, pattern.positions, dtype=torch.bool)
    for query in range(pattern.positions):
        for key in range(pattern.positions):
            if query < pattern.text:
                mask[query, key] = key <= query
            elif key < pattern.text:
                mask[query, key] = True
            else:
                mask[query, key] = key - pattern.text in seen_by(pattern, query - pattern.text)
    return mask


@given(patterns)
@settings(max_examples=150, deadline=None)
def test_masks_are_those_of_the_brute_force_definition(pattern: Pattern) -> None:
    assert torch.equal(stream_mask(pattern, torch.device("cpu")), brute_force(pattern))


@pytest.mark.parametrize("grid", range(1, 9))
@pytest.mark.parametrize("kind", KINDS)
def test_every_small_grid_is_right(kind: str, grid: int) -> None:
    pattern = Pattern(kind, text=3, grid=grid, kernel=3)
    assert torch.equal(stream_mask(pattern, torch.device("cpu")), brute_force(pattern))


@given(patterns)
@settings(max_examples=50, deadline=None)
def test_nobody_sees_the_future_and_everybody_sees_itself_and_the_one_above(pattern: Pattern) -> None:
    mask = image_mask(pattern)
    assert not mask.triu(1).any()
    assert mask.diagonal().all()
    if pattern.kernel > 1 or pattern.kind != CONV:
        assert mask.diagonal(-pattern.grid).all()


def test_the_papers_example_of_6_and_16_positions() -> None:
    """Figure 11: 22 positions; the row mask has 5 slots of a 4-wide grid."""
    row, column, conv = (stream_mask(Pattern(kind, 6, 4, 3), torch.device("cpu")) for kind in KINDS[1:])
    assert row.shape == (22, 22)
    assert row[6:, 6:].sum(1).tolist() == [1, 2, 3, 4, *[5] * 12]
    assert column[6:, 6:].sum(1).tolist() == [1] * 4 + [2] * 4 + [3] * 4 + [4] * 4
    assert [slot for slot in range(16) if conv[6 + 10, 6 + slot]] == [5, 6, 7, 9, 10]
    # On the left edge the square goes on at the right edge of the row above, and of the row above that one.
    assert [slot for slot in range(16) if conv[6 + 8, 6 + slot]] == [3, 4, 5, 7, 8]
    for mask in (row, column, conv):
        assert mask[6:, :6].all()
        assert not mask[:6, 6:].any()


def test_windows_at_the_papers_size() -> None:
    sizes = {kind: len(Pattern(kind, 257, 32, 11).offsets) for kind in KINDS}
    assert sizes == {"full": 1024, "row": 33, "column": 32, "conv": 61}


def test_64_layers_are_47_of_rows_16_of_columns_and_a_last_convolution() -> None:
    kinds = layer_kinds("paper", 64)
    assert collections.Counter(kinds) == {"row": 47, "column": 16, "conv": 1}
    assert kinds[:6] == ("row", "column", "row", "row", "row", "column")
    assert kinds[-1] == "conv"


@given(st.integers(1, 130))
def test_the_order_of_the_layers_at_any_depth(layers: int) -> None:
    expected = []
    for i in range(1, layers + 1):
        expected.append("conv" if i == layers else "column" if (i - 2) % 4 == 0 else "row")
    assert layer_kinds("paper", layers) == tuple(expected)
    assert layer_kinds("full", layers) == (FULL,) * layers


@given(patterns, st.integers(0, 1000), st.data())
@settings(max_examples=40, deadline=None)
def test_dense_attention_of_any_prefix_is_a_softmax_over_what_is_seen(
    pattern: Pattern, seed: int, data: st.DataObject
) -> None:
    n = data.draw(st.integers(1, pattern.positions))
    generator = torch.Generator().manual_seed(seed)
    queries, keys, values = torch.randn(3, 2, 3, n, 4, generator=generator, dtype=torch.float64)
    scores = queries @ keys.transpose(-1, -2) / 2
    scores = scores.masked_fill(~brute_force(pattern)[:n, :n], -torch.inf)
    torch.testing.assert_close(attend_densely(queries, keys, values, pattern), scores.softmax(-1) @ values)


def test_a_mask_made_in_inference_mode_serves_training() -> None:
    pattern = Pattern("row", 2, 3, 1)
    stream_mask.cache_clear()
    tensors = [torch.randn(1, 1, 11, 4, requires_grad=True) for _ in range(3)]
    with torch.inference_mode():
        attend_densely(*(tensor.detach() for tensor in tensors), pattern)
    attend_densely(*tensors, pattern).sum().backward()
    assert tensors[0].grad is not None
