"""Laws of sampling: the cache changes nothing, filters keep what they say, the generator decides everything."""

import dataclasses

import pytest
import torch
from distopt.integrations.dalle.attention import layer_kinds
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


PAPER = dataclasses.replace(SETTINGS, attention="paper", kernel=3, layers=4)
FAITHFUL = dataclasses.replace(PAPER, code_width=0, neighbours=0, activation="gelu")
ALL = pytest.mark.parametrize("chosen", [SETTINGS, PAPER, FAITHFUL], ids=["full", "paper", "faithful"])


def build(chosen: TransformerSettings = SETTINGS, seed: int = 0) -> Transformer:
    torch.manual_seed(seed)
    model = Transformer(chosen).eval()
    with torch.no_grad():
        # Far from uniform, and every branch as large as the stream, so that errors would show.
        (model.image_unembedding_in if chosen.code_width else model.image_unembedding).weight.mul_(10)
        for block in model.blocks if chosen.attention == "paper" else ():
            block.attention_out.weight.mul_(3)
    return model


def texts(n: int, seed: int = 1) -> Tensor:
    text = torch.randint(11, (n, 5), generator=torch.Generator().manual_seed(seed))
    text[::2, 3:] = PAD
    return text


patterns = st.one_of(
    st.just(("full",) * 2),
    st.integers(1, 4).map(lambda layers: layer_kinds("paper", layers)),
    st.lists(st.sampled_from(("full", "row", "column", "conv")), min_size=1, max_size=3).map(tuple),
)


def with_masks(kinds: tuple[str, ...], grid: int, kernel: int) -> Transformer:
    """A transformer whose layers have the masks that are named."""
    chosen = dataclasses.replace(PAPER, layers=len(kinds), grid=grid, kernel=kernel)
    model = build(chosen)
    for block, kind in zip(model.blocks, kinds, strict=True):
        block.pattern = dataclasses.replace(block.pattern, kind=kind)
    return model


@given(patterns, st.integers(1, 5), st.sampled_from((1, 3, 5)), st.integers(0, 1000), st.data())
@settings(max_examples=30, deadline=None)
@torch.no_grad()
def test_the_cache_equals_full_recomputation(
    kinds: tuple[str, ...], grid: int, kernel: int, seed: int, data: st.DataObject
) -> None:
    model, n = with_masks(kinds, grid, kernel), 2
    generator = torch.Generator().manual_seed(seed)
    text, image = texts(n, seed), torch.randint(13, (n, grid * grid), generator=generator)
    _, full = model.logits(text, image)
    known = data.draw(st.integers(0, grid * grid))
    cache = Cache()
    given = torch.cat([model.embed_text(text), model.embed_image(image[:, :known], slice(0, known))], dim=1)
    hidden = model.hidden(given, cache)
    torch.testing.assert_close(model.image_logits(hidden[:, 6:]), full[:, :known], atol=1e-5, rtol=0)
    for slot in range(known, grid * grid):
        hidden = model.hidden(model.embed_image(image[:, :slot], slice(slot, slot + 1)), cache)
        torch.testing.assert_close(model.image_logits(hidden[:, -1]), full[:, slot], atol=1e-5, rtol=0)


def draw_slowly(
    model: Transformer, text: Tensor, *, guidance: float, prompt: Tensor | None = None, generator: torch.Generator
) -> Tensor:
    """Sampling as it is defined: all is computed anew for every code, and nothing is kept."""
    grid = model.settings.grid
    codes = torch.zeros(len(text), grid * grid, dtype=torch.int64)
    known = 0 if prompt is None else prompt.shape[1]
    if prompt is not None:
        codes[:, :known] = prompt
    for slot in range(known, grid * grid):
        under = model.logits(text, codes)[1][:, slot]
        empty = model.logits(torch.full_like(text, PAD), codes)[1][:, slot]
        logits = empty + guidance * (under - empty)
        codes[:, slot] = torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0]
    return codes


@ALL
@pytest.mark.parametrize(("guidance", "known"), [(1.0, None), (2.5, None), (1.0, 7), (2.5, 7), (0.0, 4), (2.5, 16)])
@torch.no_grad()
def test_samples_are_those_of_the_slow_definition(
    chosen: TransformerSettings, guidance: float, known: int | None
) -> None:
    model, text = build(chosen), texts(3)
    prompt = None if known is None else torch.randint(13, (3, known), generator=torch.Generator().manual_seed(5))
    fast, slow = (torch.Generator().manual_seed(2) for _ in range(2))
    drawn = sample(model, text, guidance=guidance, prompt=prompt, generator=fast)
    assert torch.equal(drawn, draw_slowly(model, text, guidance=guidance, prompt=prompt, generator=slow))


@ALL
def test_guidance_of_1_is_plain_sampling_bit_for_bit(
    monkeypatch: pytest.MonkeyPatch, chosen: TransformerSettings
) -> None:
    model, text = build(chosen), texts(6)
    plain = sample(model, text, generator=torch.Generator().manual_seed(0))
    sizes = set()
    hidden = model.hidden
    monkeypatch.setattr(model, "hidden", lambda x, cache: sizes.add(len(x)) or hidden(x, cache))
    for scale in (1, 1.0):
        assert torch.equal(plain, sample(model, text, guidance=scale, generator=torch.Generator().manual_seed(0)))
    assert sizes == {6}  # not even a look at the empty caption, which would round
    near = sample(model, text, guidance=1 + 1e-6, generator=torch.Generator().manual_seed(0))
    assert torch.equal(plain, near)
    assert sizes == {6, 12}


@given(st.integers(0, 16), st.sampled_from((0.5, 1.0, 3.0)), st.integers(0, 1000))
@settings(max_examples=20, deadline=None)
def test_what_is_given_is_kept_and_nothing_of_the_callers_is_touched(known: int, guidance: float, seed: int) -> None:
    model, text = build(PAPER), texts(3, seed)
    prompt = torch.randint(13, (3, known), generator=torch.Generator().manual_seed(seed))
    text_before, prompt_before = text.clone(), prompt.clone()
    drawn = sample(model, text, guidance=guidance, prompt=prompt, generator=torch.Generator().manual_seed(seed))
    assert torch.equal(drawn[:, :known], prompt_before)
    drawn.fill_(0)
    assert torch.equal(text, text_before)
    assert torch.equal(prompt, prompt_before)


@ALL
@pytest.mark.parametrize("known", [0, 1, 4, 15, 16])
def test_a_greedy_sample_continues_itself(chosen: TransformerSettings, known: int) -> None:
    model, text = build(chosen), texts(4)
    whole = sample(model, text, temperature=0, guidance=1.7)
    assert torch.equal(sample(model, text, temperature=0, guidance=1.7, prompt=whole[:, :known]), whole)


@pytest.mark.parametrize(
    "prompt",
    [
        torch.zeros(2, 17, dtype=torch.int64),
        torch.zeros(3, 4, dtype=torch.int64),
        torch.zeros(4, dtype=torch.int64),
        torch.full((2, 4), 13),
        torch.full((2, 4), -1),
        torch.zeros(2, 4),
    ],
)
def test_a_prompt_that_is_none_is_refused(prompt: Tensor) -> None:
    with pytest.raises(SettingError, match="prompt is"):
        sample(build(), texts(2), prompt=prompt)


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
    "setting",
    [
        {"temperature": -1.0},
        {"temperature": float("nan")},
        {"temperature": float("inf")},
        {"top_k": 0},
        {"top_p": 0.0},
        {"top_p": 1.5},
        {"guidance": -0.5},
        {"guidance": float("inf")},
    ],
)
def test_settings_out_of_range_are_named(setting: dict[str, float]) -> None:
    with pytest.raises(SettingError, match=next(iter(setting))):
        sample(build(), texts(2), **setting)  # pyright: ignore[reportArgumentType]
