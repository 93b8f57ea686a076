"""Laws of the transformer: causal everywhere, pads count, losses are the paper's."""

import dataclasses
import math

import pytest
import torch
from distopt.integrations.dalle import sparse_attention
from distopt.integrations.dalle.text import PAD
from distopt.integrations.dalle.transformer import Transformer, TransformerSettings
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from distopt.errors import SettingError

SETTINGS = TransformerSettings(
    text_vocabulary=11, text_length=5, codes=13, grid=4, width=32, layers=2, heads=4, code_width=8
)


FAITHFUL: dict[str, int | str] = {
    "attention": "paper",
    "kernel": 3,
    "code_width": 0,
    "neighbours": 0,
    "activation": "gelu",
}
"""What the presets of the paper's sizes have."""


def build(seed: int = 0, **changes: int | str) -> Transformer:
    torch.manual_seed(seed)
    return Transformer(dataclasses.replace(SETTINGS, **changes)).eval()


def batch(seed: int, n: int = 3) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    text = torch.randint(11, (n, 5), generator=generator)
    for row, length in zip(text, torch.randint(0, 6, (n,), generator=generator), strict=True):
        row[length:] = PAD
    return text, torch.randint(13, (n, 16), generator=generator)


@given(st.integers(0, 15), st.integers(0, 3), st.sampled_from(("full", "paper")), st.integers(0, 1000))
@settings(max_examples=60, deadline=None)
def test_an_image_token_changes_only_what_follows(slot: int, neighbours: int, attention: str, seed: int) -> None:
    model = build(neighbours=neighbours, attention=attention, kernel=3)
    text, image = batch(seed)
    other = image.clone()
    other[:, slot] = (other[:, slot] + 1) % 13
    (text_a, image_a), (text_b, image_b) = model.logits(text, image), model.logits(text, other)
    assert torch.equal(text_a, text_b)
    assert torch.equal(image_a[:, : slot + 1], image_b[:, : slot + 1])
    if slot < 15:
        assert not torch.allclose(image_a[:, slot + 1], image_b[:, slot + 1])


@given(st.integers(0, 4), st.sampled_from(("full", "paper")), st.integers(0, 1000))
@settings(max_examples=30, deadline=None)
def test_a_text_token_changes_only_what_follows(position: int, attention: str, seed: int) -> None:
    model = build(attention=attention)
    text, image = batch(seed)
    text[:, position] = 1
    other = text.clone()
    other[:, position] = 2
    (text_a, image_a), (text_b, image_b) = model.logits(text, image), model.logits(other, image)
    assert torch.equal(text_a[:, : position + 1], text_b[:, : position + 1])
    assert not torch.allclose(image_a[:, 0], image_b[:, 0])


@pytest.mark.parametrize("position", range(5))
def test_every_text_position_has_a_pad_of_its_own_that_is_attended_to(position: int) -> None:
    model = build()
    text, image = torch.full((1, 5), PAD), torch.zeros(1, 16, dtype=torch.int64)
    before = model.logits(text, image)[1]
    change = torch.randn(32, generator=torch.Generator().manual_seed(position))
    with torch.no_grad():
        model.padding_embedding.weight[position] += change
    assert not torch.allclose(before, model.logits(text, image)[1])
    text[:, position] = 3
    with_word = model.logits(text, image)[1]
    with torch.no_grad():
        model.padding_embedding.weight[position] += change
    assert torch.equal(with_word, model.logits(text, image)[1])


@pytest.mark.parametrize(
    ("neighbours", "slot", "expected"), [(3, 5, {4, 1, 2, 0}), (3, 4, {3, 0, 1}), (0, 5, {4}), (3, 0, set())]
)
def test_a_slot_is_fed_the_previous_code_and_those_above(neighbours: int, slot: int, expected: set[int]) -> None:
    model = build(neighbours=neighbours)
    _, image = batch(1)
    seen = set()
    for source in range(16):
        other = image.clone()
        other[:, source] = (other[:, source] + 1) % 13
        here = slice(slot, slot + 1)
        if not torch.equal(model.embed_image(image, here), model.embed_image(other, here)):
            seen.add(source)
    assert seen == expected


@given(st.integers(0, 16), st.integers(0, 1000))
@settings(max_examples=30, deadline=None)
def test_embedding_needs_only_the_codes_before_a_slot(known: int, seed: int) -> None:
    model = build()
    _, image = batch(seed)
    slots = slice(0, min(known + 1, 16))
    torch.testing.assert_close(model.embed_image(image[:, :known], slots), model.embed_image(image, slots))


def test_losses_are_means_over_tokens_of_their_kind() -> None:
    model = build()
    text, image = batch(7, n=6)
    losses = model(text, image)
    text_logits, image_logits = model.logits(text, image)
    each = [F.cross_entropy(text_logits[b, t], text[b, t]) for b in range(6) for t in range(5) if text[b, t] != PAD]
    torch.testing.assert_close(losses.text, torch.stack(each).mean())
    each = [F.cross_entropy(image_logits[b, i], image[b, i]) for b in range(6) for i in range(16)]
    torch.testing.assert_close(losses.image, torch.stack(each).mean())
    torch.testing.assert_close(losses.total(), losses.text / 8 + 7 * losses.image / 8)


def test_a_batch_of_empty_captions_has_a_finite_gradient() -> None:
    model = build()
    losses = model(torch.full((2, 5), PAD), torch.zeros(2, 16, dtype=torch.int64))
    losses.total().backward()
    assert losses.text == 0
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_it_starts_near_the_uniform_guess() -> None:
    losses = build(width=64)(*batch(3, n=32))
    assert abs(losses.image.item() - math.log(13)) < 0.3
    assert abs(losses.text.item() - math.log(11)) < 0.3


def test_codes_start_at_their_vectors_in_any_unit() -> None:
    vectors = torch.randn(13, 8, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    model = Transformer(SETTINGS, vectors)
    torch.manual_seed(0)
    scaled = Transformer(SETTINGS, 1e-3 * vectors)
    torch.testing.assert_close(model.state_dict(), scaled.state_dict())
    similarity = F.cosine_similarity(model.code_embedding.weight[:-1], vectors)
    torch.testing.assert_close(similarity, torch.ones(13))
    with pytest.raises(SettingError, match="vectors is"):
        Transformer(SETTINGS, vectors[:, :4])


@pytest.mark.parametrize("code_width", [0, 8])
def test_unembeddings_can_be_told_by_name(code_width: int) -> None:
    vocabularies = {SETTINGS.text_vocabulary, SETTINGS.codes}
    modules = build(code_width=code_width, neighbours=0).named_modules()
    names = [n for n, m in modules if isinstance(m, torch.nn.Linear) and m.out_features in vocabularies]
    assert len(names) == 2
    assert all("unembed" in name for name in names)


@pytest.mark.parametrize("changes", [{}, FAITHFUL], ids=["default", "paper"])
def test_it_learns_a_batch_by_heart(changes: dict[str, int | str]) -> None:
    model = build(**changes).train()
    text, image = batch(5, n=4)
    text[:, 0] = torch.arange(4)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(120):
        loss = model(text, image).image
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.1


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("text_vocabulary", 0),
        ("grid", 0),
        ("layers", 1.5),
        ("width", 30),
        ("neighbours", -1),
        ("neighbours", 4),
        ("kernel", 4),
        ("code_width", -1),
        ("attention", "sparse"),
        ("activation", "tanh"),
    ],
)
def test_settings_out_of_range_are_named(field: str, value: object) -> None:
    with pytest.raises(SettingError, match=f"TransformerSettings.{field} is {value!r}"):
        dataclasses.replace(SETTINGS, **{field: value})


def test_codes_at_the_full_width_are_embedded_as_words_are() -> None:
    model = build(**FAITHFUL)
    assert model.code_embedding.weight.shape == (14, 32)
    assert model.image_unembedding.weight.shape == (13, 32)
    assert not list(model.code_projection.parameters())
    assert not list(model.image_unembedding_in.parameters())
    _, image = batch(1)
    slot = model.embed_image(image, slice(5, 6))
    place = model.row_embedding.weight[1] + model.column_embedding.weight[1]
    torch.testing.assert_close(slot[:, 0], model.code_embedding.weight[image[:, 4]] + place)
    with pytest.raises(SettingError, match="neighbours is 1, but must be at most 0"):
        dataclasses.replace(SETTINGS, code_width=0, neighbours=1)


@pytest.mark.parametrize("grid", [4, 10])
def test_training_is_the_same_by_either_way_of_attention(monkeypatch: pytest.MonkeyPatch, grid: int) -> None:
    model = build(**{**FAITHFUL, "layers": 3, "grid": grid}).double()
    text = batch(2)[0]
    image = torch.randint(13, (3, grid * grid), generator=torch.Generator().manual_seed(0))
    gradients = []
    for share in (0.0, 1.0):
        monkeypatch.setattr(sparse_attention, "_WORTHWHILE", share)
        model.zero_grad()
        model(text, image).total().backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    for dense, gathered in zip(*gradients, strict=True):
        torch.testing.assert_close(gathered, dense, atol=1e-9, rtol=1e-7)


def test_the_layers_have_the_papers_masks() -> None:
    kinds = [block.pattern.kind for block in build(attention="paper", layers=5).blocks]
    assert kinds == ["row", "column", "row", "row", "conv"]
    assert {block.pattern.kind for block in build().blocks} == {"full"}


def test_the_activation_is_the_one_that_was_chosen() -> None:
    text, image = batch(0)
    relu, gelu = (build(activation=name).logits(text, image)[1] for name in ("relu", "gelu"))
    assert not torch.allclose(relu, gelu)


def test_gradients_are_moderate_at_the_papers_depth() -> None:
    model = build(**{**FAITHFUL, "layers": 64})
    model(*batch(0)).total().backward()
    assert torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None]).norm() < 10
