"""Laws of the codes' vectors: form and colour lie in components of their own, in any unit and on any ground."""

import numpy as np
import pytest
import torch
from distopt.integrations.dalle.codes import code_vectors
from distopt.integrations.dalle.context import Context
from distopt.integrations.dalle.transformer import TransformerSettings
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

GRID = 3
FORMS = torch.tensor(
    [
        [[1, 1, 1, 1]] * 4,
        [[1, 1, 0, 0]] * 4,
        [[1, 1, 1, 1], [1, 1, 1, 1], [0, 0, 0, 0], [0, 0, 0, 0]],
        [[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1]],
    ]
).float()
CORNERS = torch.tensor([[r, g, b] for r in (-1, 1) for g in (-1, 1) for b in (-1, 1)]).float()
CODES = 1 + len(FORMS) * len(CORNERS)


class Stamps:
    """Pictures of 12 x 12, plain but for one stamp in the middle: a form in a colour; and a codec that knows them all.

    Args:
        ground: colour of what is plain, three numbers.
        strength: how far the colours lie from it.
    """

    size = 4 * GRID

    def __init__(self, ground: Tensor, strength: float) -> None:
        self.ground, self.strength = ground.view(3, 1, 1), strength

    def pictures(self, n: int, rng: np.random.Generator) -> Tensor:
        return self.decode(torch.from_numpy(rng.permuted(np.arange(n) % (CODES - 1)) + 1))

    def decode(self, stamps: Tensor) -> Tensor:
        pictures = self.ground.expand(len(stamps), 3, self.size, self.size).clone()
        form, colour = FORMS[(stamps - 1) % len(FORMS)], CORNERS[(stamps - 1) // len(FORMS)]
        pictures[..., 4:8, 4:8] += self.strength * colour[:, :, None, None] * form[:, None]
        return pictures

    def tokenize(self, pictures: Tensor) -> Tensor:
        known = self.decode(torch.arange(1, CODES)).flatten(1)
        tokens = torch.zeros(len(pictures), GRID * GRID, dtype=torch.int64)
        tokens[:, GRID * GRID // 2] = 1 + (pictures.flatten(1)[:, None] - known).square().sum(2).argmin(1)
        return tokens


def vectors_of(source: Stamps, width: int = 16, codes: int = CODES) -> Tensor:
    model = TransformerSettings(text_vocabulary=4, text_length=2, codes=codes, grid=GRID, code_width=width)
    return code_vectors(source, source, model, Context())


@settings(max_examples=10, deadline=None)
@given(
    ground=st.tuples(*[st.floats(0.2, 0.8)] * 3),
    strength=st.floats(0.02, 0.2),
)
def test_form_and_colour_are_apart(ground: tuple[float, float, float], strength: float) -> None:
    vectors = vectors_of(Stamps(torch.tensor(ground), strength))[1:].view(len(CORNERS), len(FORMS), -1)
    between_colours = (vectors - vectors[:1]).flatten(0, 1)
    between_forms = (vectors - vectors[:, :1]).flatten(0, 1)
    size = vectors.square().sum(-1).mean().sqrt()
    # The square root of a spread that is all rounding is still a hundredth.
    assert float(between_colours[:, :-3].abs().max() / size) < 0.03
    assert float(torch.pdist(vectors[0, :, :-3]).min() / size) > 0.2
    # The colour of a small form counts a little less.
    assert float(between_forms[:, -3:].abs().max() / size) < 0.2
    assert float(torch.pdist(vectors[:, 0, -3:]).min() / size) > 0.4


def test_a_code_that_does_not_occur_is_zero_and_the_others_have_mean_zero() -> None:
    vectors = vectors_of(Stamps(torch.full((3,), 0.5), 0.2), codes=CODES + 3)
    assert not vectors[CODES:].any()
    torch.testing.assert_close(vectors[:CODES].mean(0), torch.zeros(16), atol=1e-5, rtol=0)


@pytest.mark.parametrize("width", [1, 2, 3, 4, 200])
def test_any_width_is_filled_as_far_as_there_is_something_to_say(width: int) -> None:
    vectors = vectors_of(Stamps(torch.full((3,), 0.5), 0.2), width)
    assert vectors.shape == (CODES, width)
    assert vectors.isfinite().all()
    assert vectors[:, 0].any()


def test_pictures_of_one_colour_give_finite_vectors() -> None:
    assert not vectors_of(Stamps(torch.full((3,), 0.5), 0.0)).any()


def test_codes_without_a_width_of_their_own_have_no_vectors() -> None:
    source = Stamps(torch.full((3,), 0.5), 0.2)
    model = TransformerSettings(text_vocabulary=4, text_length=2, codes=CODES, grid=GRID, code_width=0, neighbours=0)
    assert code_vectors(source, source, model, Context()) is None
