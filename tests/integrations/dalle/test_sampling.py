"""Laws of sampling: the cache changes nothing, filters keep what they say, the generator decides everything."""

import pytest
import torch
from distopt.integrations.dalle.cache import Cache
from distopt.integrations.dalle.sampling import filter_logits, sample
from distopt.integrations.dalle.text import PAD
from distopt.integrations.dalle.transformer import Transformer, TransformerSettings
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from distopt.errors import SettingError

SETTINGS = TransformerSettings(
    text_vocabulary=11, text_length=5, codes=13, grid=4, width=32, layers=3, heads=4, code_width=8
)


def build(seed: int = 0) -> Transformer:
    torch.manual_seed(seed)
    model = Transformer(SETTINGS).eval()
    with torch.no_grad():
        model.image_unembedding_in.weight.mul_(10)  # far from uniform, so that errors would show
    return model


def texts(n: int, seed: int = 1) -> Tensor:
    text = torch.randint(11, (n, 5), generator=torch.Generator().manual_seed(seed))
    text[::2, 3:] = PAD
    return text


@given(st.integers(0, 1000), st.integers(1, 4))
@settings(max_examples=20, deadline=None)
@torch.no_grad()
def test_the_cache_equals_full_recomputation(seed: int, n: int) -> None:
    model, text = build(), texts(n, seed)
    image = torch.randint(13, (n, 16), generator=torch.Generator().manual_seed(seed))
    _, full = model.logits(text, image)
    cache = Cache()
    model.hidden(model.embed_text(text), cache)
    for slot in range(16):
        hidden = model.hidden(model.embed_image(image[:, :slot], slice(slot, slot + 1)), cache)
        torch.testing.assert_close(model.image_logits(hidden[:, -1]), full[:, slot], atol=1e-5, rtol=0)


@torch.no_grad()
def test_the_greedy_sample_is_the_most_likely_code_everywhere() -> None:
    model, text = build(), texts(6)
    drawn = sample(model, text, temperature=0)
    assert torch.equal(model.logits(text, drawn)[1].argmax(-1), drawn)
    assert torch.equal(sample(model, text, top_k=1), drawn)


@torch.no_grad()
def test_samples_follow_the_model() -> None:
    model, n = build(), 3_000
    text = texts(1).expand(n, -1)
    first = sample(model, text, generator=torch.Generator().manual_seed(0))[:, 0]
    expected = model.logits(text[:1], torch.zeros(1, 16, dtype=torch.int64))[1][0, 0].softmax(-1)
    found = torch.bincount(first, minlength=13) / n
    assert (found - expected).abs().max() < 5 * 0.5 / n**0.5


def test_the_generator_decides_and_the_global_one_does_not() -> None:
    model, text = build(), texts(8)
    first = sample(model, text, generator=torch.Generator().manual_seed(3))
    torch.manual_seed(99)
    assert torch.equal(first, sample(model, text, generator=torch.Generator().manual_seed(3)))
    assert not torch.equal(first, sample(model, text, generator=torch.Generator().manual_seed(4)))
    assert first.shape == (8, 16)
    assert sample(model, text[:0]).shape == (0, 16)


@torch.no_grad()
def test_guidance_mixes_the_logits_with_those_of_an_empty_caption() -> None:
    model, text = build(), texts(6)
    drawn = sample(model, text, temperature=0, guidance=2.5)
    _, under = model.logits(text, drawn)
    _, empty = model.logits(torch.full_like(text, PAD), drawn)
    assert torch.equal((empty + 2.5 * (under - empty)).argmax(-1), drawn)


logits = st.lists(st.lists(st.floats(-8, 8), min_size=6, max_size=6), min_size=1, max_size=4).map(torch.tensor)


@given(logits, st.floats(0.1, 3), st.one_of(st.none(), st.integers(1, 8)), st.one_of(st.none(), st.floats(0.01, 1)))
@settings(max_examples=100, deadline=None)
def test_filters_keep_the_likely_and_their_proportions(
    values: Tensor, temperature: float, top_k: int | None, top_p: float | None
) -> None:
    kept = filter_logits(values, temperature=temperature, top_k=top_k, top_p=top_p)
    inside = kept.isfinite()
    assert inside.any(dim=-1).all()
    assert torch.equal(kept[inside], (values / temperature)[inside])
    for row, mask in zip(values / temperature, inside, strict=True):
        assert mask.all() or row[mask].min() >= row[~mask].max()
        probability = row.softmax(-1)
        if top_k is not None:
            assert mask.sum() <= top_k
        if top_k is None and top_p is not None:
            assert probability[mask].sum() >= min(top_p, 1) - 1e-5
            assert probability[mask].sum() - probability[mask].min() < top_p + 1e-5
        if top_k is None and top_p is None:
            assert mask.all()


@pytest.mark.parametrize(
    "setting", [{"temperature": -1.0}, {"temperature": float("nan")}, {"top_k": 0}, {"top_p": 0.0}, {"top_p": 1.5}]
)
def test_settings_out_of_range_are_named(setting: dict[str, float]) -> None:
    with pytest.raises(SettingError, match=next(iter(setting))):
        sample(build(), texts(2), **setting)  # pyright: ignore[reportArgumentType]
