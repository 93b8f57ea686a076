"""Both networks in both kinds: shapes, what depends on what, and which weights are normalised."""

import pytest
import torch
from distopt.integrations.biggan.discriminator import Discriminator
from distopt.integrations.biggan.generator import Generator
from distopt.integrations.biggan.layers import ConditionalBatchNorm, SelfAttention
from distopt.integrations.biggan.sizes import Sizes
from torch.nn.utils import parametrize

from distopt.errors import SettingError

KINDS = ("hierarchical", "deep")


def _sizes(kind, size=16):
    return Sizes(classes=4, size=size, width=8, noise=12, shared=5, attention=size // 2 if size > 8 else 0, kind=kind)


def _inputs(rows=3):
    torch.manual_seed(1)
    return torch.randn(rows, 12), torch.arange(rows) % 4


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [8, 16, 32])
def test_shapes_and_gradients(kind, size):
    torch.manual_seed(0)
    sizes = _sizes(kind, size)
    generator, discriminator = Generator(sizes), Discriminator(sizes)
    noise, classes = _inputs()
    pictures = generator(noise, classes)
    assert pictures.shape == (3, 3, size, size)
    assert pictures.abs().max() <= 1
    scores = discriminator(pictures, classes)
    assert scores.shape == (3,)
    scores.sum().backward()
    without = [n for network in (generator, discriminator) for n, p in network.named_parameters() if p.grad is None]
    assert without == []


@pytest.mark.parametrize("kind", KINDS)
def test_every_part_of_the_noise_and_the_class_matter(kind):
    torch.manual_seed(0)
    generator = Generator(_sizes(kind)).eval()
    noise, classes = _inputs(1)
    plain = generator(noise, classes)
    for part in range(3):
        other = noise.clone()
        other[:, 4 * part : 4 * part + 4] += 1
        assert not torch.equal(generator(other, classes), plain)
    assert not torch.equal(generator(noise, classes + 1), plain)


def test_hierarchical_noise_reaches_its_own_block_alone():
    """The last chunk changes the condition of the last block, and nothing before."""
    torch.manual_seed(0)
    generator = Generator(_sizes("hierarchical")).eval()
    noise, classes = _inputs(1)
    seen = []
    generator.blocks[0].register_forward_hook(lambda _, __, out: seen.append(out))
    generator(noise, classes)
    generator(noise + torch.tensor([0.0] * 8 + [1.0] * 4), classes)
    generator(noise + torch.tensor([0.0] * 4 + [1.0] * 4 + [0.0] * 4), classes)
    assert torch.equal(seen[0], seen[1])
    assert not torch.equal(seen[0], seen[2])


def test_the_score_is_a_projection():
    """The class enters by an inner product: the difference of two classes' scores is linear in the features."""
    torch.manual_seed(0)
    discriminator = Discriminator(_sizes("hierarchical")).eval()
    pictures = torch.rand(5, 3, 16, 16)
    seen = []
    discriminator.score.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    difference = discriminator(pictures, torch.full((5,), 2)) - discriminator(pictures, torch.full((5,), 1))
    embedding = discriminator.classes.weight
    assert torch.allclose(difference, seen[0] @ (embedding[2] - embedding[1]), atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_all_matrices_are_normalised_but_the_generators_embedding(kind):
    for network, free in ((Generator(_sizes(kind)), ["classes"]), (Discriminator(_sizes(kind)), [])):
        matrices = [
            (name, module)
            for name, module in network.named_modules()
            if isinstance(getattr(module, "weight", None), torch.Tensor) and module.weight.dim() > 1
        ]
        assert [name for name, module in matrices if not parametrize.is_parametrized(module)] == free
        assert len(matrices) > 5


def test_attention_starts_as_nothing_and_mixes_places_later():
    torch.manual_seed(0)
    attention, picture = SelfAttention(8), torch.randn(1, 8, 4, 4)
    assert torch.equal(attention(picture), picture)
    attention.gain.data.fill_(1.0)
    other = picture.clone()
    other[..., 0, 0] += 10
    assert (attention(other) - attention(picture))[..., 3, 3].abs().max() > 1e-3


def test_a_condition_of_zero_is_a_plain_batch_norm():
    torch.manual_seed(0)
    norm, pictures = ConditionalBatchNorm(3, 2), torch.randn(6, 3, 4, 4) * 5 + 2
    normed = norm(pictures, torch.zeros(6, 2))
    assert torch.allclose(normed.mean((0, 2, 3)), torch.zeros(3), atol=1e-5)
    assert torch.allclose(normed.var((0, 2, 3), correction=0), torch.ones(3), atol=1e-3)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"size": 12}, "Sizes.size is 12, but must be a power of two of at least 8"),
        ({"width": 12}, "Sizes.width is 12, but must be a multiple of 8"),
        ({"noise": 13}, "Sizes.noise is 13, but must be a multiple of 3"),
        ({"attention": 16}, "Sizes.attention is 16, but must be 0 or one of 8"),
        ({"kind": "wide"}, "Sizes.kind is 'wide'"),
        ({"classes": 0}, "Sizes.classes is 0, but must be at least 1"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(change, words):
    with pytest.raises(SettingError, match=words):
        Generator(Sizes(**{"classes": 4, **change}))
