"""Laws of the contrastive model: what a similarity is, what it does not depend on, and what its loss counts."""

import math

import numpy as np
import pytest
import torch
from distopt.integrations.dalle.contrast import Contrast, ContrastSettings
from distopt.integrations.dalle.text import PAD
from distopt.integrations.scenes.draw import Scenes, Thing, Triple, to_tensor
from hypothesis import given
from hypothesis import strategies as st

from distopt.errors import SettingError

SETTINGS = ContrastSettings(text_vocabulary=9, text_length=5, size=12, width=4, features=8, heads=2)


def model(**changes):
    torch.manual_seed(0)
    return Contrast(ContrastSettings(**{**vars(SETTINGS), **changes})).eval()


MODEL = model()
CAPTIONS = st.lists(st.lists(st.integers(0, 8), min_size=0, max_size=5), min_size=1, max_size=4)


def padded(rows):
    return torch.tensor([row + [PAD] * (5 - len(row)) for row in rows])


def pictures(n, seed=0, size=12):
    return torch.rand(n, 3, size, size, generator=torch.Generator().manual_seed(seed))


@given(CAPTIONS, st.integers(1, 3))
@torch.no_grad()
def test_a_similarity_is_the_sum_of_what_each_token_finds(rows, n):
    places, tokens = MODEL.places(pictures(n)), MODEL.tokens(padded(rows))
    found = MODEL.similarity(places, tokens)
    assert found.shape == (len(rows), n)
    for b, row in enumerate(rows):
        for g in range(n):
            total = 0.0
            for t in range(len(row)):
                inner = [float(tokens[b, t] @ place) for place in places[g]]
                total += math.log(sum(math.exp(10 * value) for value in inner) / len(inner)) / 10
            assert float(found[b, g]) == pytest.approx(total, abs=1e-5)


@given(CAPTIONS, st.data())
@torch.no_grad()
def test_a_caption_is_read_alone_and_pads_say_nothing(rows, data):
    text = padded(rows)
    together = MODEL.tokens(text)
    one = data.draw(st.integers(0, len(rows) - 1))
    assert torch.allclose(MODEL.tokens(text[one : one + 1]), together[one : one + 1], atol=1e-6)
    lengths = torch.linalg.vector_norm(together, dim=-1)
    assert torch.allclose(lengths, (text != PAD).float(), atol=1e-5)


@torch.no_grad()
def test_a_picture_is_seen_alone():
    seen = pictures(3)
    assert torch.allclose(MODEL.places(seen)[1:2], MODEL.places(seen[1:2]), atol=1e-6)
    assert torch.allclose(torch.linalg.vector_norm(MODEL.places(seen), dim=-1), torch.ones(3, 36), atol=1e-5)


@torch.no_grad()
def test_form_is_seen_in_every_colour_alike():
    blind = model(size=24)
    for parameter in blind.colour.parameters():
        parameter.zero_()
    red, green, black = (
        to_tensor(Scenes().draw(Triple(Thing(c, "ring"), "above", Thing(c, "cross")), np.random.default_rng(0))[None])
        for c in ("red", "green", "black")
    )
    assert torch.allclose(blind.places(red), blind.places(green), atol=1e-3)
    assert torch.allclose(blind.places(red), blind.places(black), atol=1e-2)
    assert not torch.allclose(model(size=24).places(red), model(size=24).places(green), atol=1e-2)


def test_sharp_maxima_are_maxima():
    soft, sharp = model(sharpness=1.0), model(sharpness=1e4)
    with torch.no_grad():
        places, tokens = soft.places(pictures(2)), soft.tokens(padded([[1, 2, 3]]))
        hard = (tokens @ places.flatten(0, 1).T).unflatten(-1, (2, -1)).amax(-1).sum(1)
        assert torch.allclose(sharp.similarity(places, tokens), hard, atol=0.01)
        assert (soft.similarity(places, tokens) < hard).all()


@given(st.integers(1, 3), st.integers(2, 4), st.integers(0, 2), st.integers(0, 99))
@torch.no_grad()
def test_the_loss_lets_each_side_choose_within_its_group(groups, each, spoilt, seed):
    rng = torch.Generator().manual_seed(seed)
    text = torch.randint(0, 9, (groups, each, 5), generator=rng)
    text[:, -1] = text[:, 0]  # the first and the last caption are the same: neither is a wrong answer to the other
    seen = pictures(groups * each, seed).unflatten(0, (groups, each))
    wrong = pictures(groups * 2, seed + 1).unflatten(0, (groups, 2))[:, :spoilt]
    if spoilt == 2:
        wrong[:, 1] = seen[:, 1]  # as it was: nothing is wrong about it
    found = MODEL(seen, text, wrong)
    losses, right = [], []
    for group in range(groups):
        shown = torch.cat([seen[group], wrong[group, :1]])
        logits = MODEL.similarity(MODEL.places(shown), MODEL.tokens(text[group])) * MODEL.log_scale.exp()
        for i in range(each):
            others = [j for j in range(each) if j == i or not torch.equal(text[group, j], text[group, i])]
            extra = [each] if spoilt else []
            losses.append(float(logits[others, i].logsumexp(0) - logits[i, i]))
            losses.append(float(logits[i, others + extra].logsumexp(0) - logits[i, i]))
            right.append(bool((logits[i, others + extra] <= logits[i, i]).all()))
    assert float(found.total) == pytest.approx(np.mean(losses), rel=1e-4, abs=1e-5)
    assert float(found.right) == pytest.approx(np.mean(right))


def test_a_caption_without_words_costs_no_infinity():
    text = padded([[], [1, 2]])[None]
    found = MODEL(pictures(2)[None], text, pictures(1, 1)[None])
    gradients = torch.autograd.grad(found.total, list(MODEL.parameters()), allow_unused=True)
    assert math.isfinite(found.total.item())
    assert all(bool(gradient.isfinite().all()) for gradient in gradients if gradient is not None)


@torch.no_grad()
def test_scores_are_similarities_to_ones_own_caption():
    text, seen = padded([[1, 2], [3]]), pictures(6).unflatten(0, (2, 3))
    scores = MODEL.scores(seen, text)
    assert scores.shape == (2, 3)
    for b in range(2):
        own = MODEL.similarity(MODEL.places(seen[b]), MODEL.tokens(text[b : b + 1]))[0]
        assert torch.allclose(scores[b], own, atol=1e-5)


@pytest.mark.parametrize(("size", "side"), [(8, 4), (12, 6), (24, 6), (30, 8), (64, 8), (100, 7)])
@torch.no_grad()
def test_pictures_of_every_size_become_few_places(size, side):
    assert MODEL.settings.size == 12
    assert model(size=size).places(pictures(1, size=size)).shape == (1, side * side, 8)


@pytest.mark.parametrize("wrong", [{"size": 0}, {"features": 9}, {"sharpness": 0.0}, {"width": 1.5}])
def test_sizes_that_cannot_be_are_refused(wrong):
    with pytest.raises(SettingError, match=next(iter(wrong))):
        ContrastSettings(**{**vars(SETTINGS), **wrong})


def test_a_gradient_reaches_everything():
    trained = model().train()
    text = padded([[1, 2], [2, 3], [4], [5, 6, 7]]).unflatten(0, (2, 2))
    found = trained(pictures(4).unflatten(0, (2, 2)), text, pictures(2, 1).unflatten(0, (2, 1)))
    found.total.backward()
    assert all(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in trained.parameters())
