"""The cache keeps what a mask looks back at, and no more; that it changes nothing is a law of sampling."""

import pytest
import torch
from distopt.integrations.dalle.attention import Pattern
from distopt.integrations.dalle.cache import Cache
from hypothesis import given, settings
from hypothesis import strategies as st

patterns = st.builds(
    Pattern,
    st.sampled_from(("full", "row", "column", "conv")),
    text=st.integers(2, 4),
    grid=st.integers(1, 5),
    kernel=st.sampled_from((1, 3, 5)),
)


@given(patterns, st.data())
@settings(max_examples=40, deadline=None)
def test_a_position_is_given_text_and_the_slots_that_it_sees(pattern: Pattern, data: st.DataObject) -> None:
    known = data.draw(st.integers(0, pattern.slots))
    names = torch.arange(float(pattern.positions)).reshape(1, 1, -1, 1)
    cache = Cache()
    first = names[:, :, : pattern.text + known]
    keys, values = cache.extend(0, pattern, first, -first)
    assert torch.equal(keys, first)
    assert torch.equal(values, -first)
    for slot in range(known, pattern.slots):
        here = names[:, :, pattern.text + slot : pattern.text + slot + 1]
        keys, values = cache.extend(0, pattern, here, -here)
        assert torch.equal(values, -keys)
        seen = {slot - distance + pattern.text for distance in pattern.offsets if distance <= slot}
        assert sorted(keys.flatten().tolist()) == [*range(pattern.text), *sorted(seen)]


def test_a_layer_of_rows_keeps_33_slots_at_the_papers_size() -> None:
    kept = {}
    for kind in ("full", "row", "column", "conv"):
        cache = Cache()
        text = torch.zeros(1, 1, 257, 1)
        cache.extend(0, Pattern(kind, 257, 32, 11), text, text)
        kept[kind] = cache.numbers // 2 - 257
    assert kept == {"full": 1024, "row": 33, "column": 993, "conv": 166}


def test_wrong_numbers_of_positions_are_refused() -> None:
    pattern, one = Pattern("row", 3, 2, 3), torch.zeros(1, 1, 1, 1)
    cache = Cache()
    with pytest.raises(ValueError, match="all 3 text positions at once, got 2"):
        cache.extend(0, pattern, one.expand(-1, -1, 2, -1), one.expand(-1, -1, 2, -1))
    cache.extend(0, pattern, one.expand(-1, -1, 6, -1), one.expand(-1, -1, 6, -1))
    with pytest.raises(ValueError, match="one position at a time, got 2"):
        cache.extend(0, pattern, one.expand(-1, -1, 2, -1), one.expand(-1, -1, 2, -1))
    cache.extend(0, pattern, one, one)
    with pytest.raises(ValueError, match="all 4 image positions"):
        cache.extend(0, pattern, one, one)
