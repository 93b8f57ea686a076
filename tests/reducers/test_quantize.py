"""8 and 4 bits on the wire."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from distopt import AllReduce, Quantize, SettingError
from tests.reducers.convergence import final_loss
from tests.simulation import Ranks

bits = pytest.mark.parametrize("bits", [8, 4])


def draw(world, seed, shape):
    generator = torch.Generator().manual_seed(seed)
    return [{"w": torch.randn(shape, generator=generator)} for _ in range(world)]


@bits
@given(world=st.integers(1, 5), seed=st.integers(0, 2**31))
def test_each_number_is_off_by_a_step_of_its_input_and_one_of_the_average(bits, world, seed):
    fed = draw(world, seed, (9, 11))
    delivered = Ranks(Quantize(bits), {"w": (9, 11)}, world).step(fed)[0]["w"]
    step = max(float(rank["w"].abs().max()) for rank in fed) / (2 ** (bits - 1) - 1)
    exact = sum(rank["w"] for rank in fed) / world
    assert float((delivered - exact).abs().max()) <= 2.01 * step


@bits
def test_the_average_is_unbiased(bits):
    fed = draw(3, 0, (6, 8))
    exact = sum(rank["w"] for rank in fed) / 3
    runs = 600
    sample = torch.stack([Ranks(Quantize(bits, seed=i), {"w": (6, 8)}, 3).step(fed)[0]["w"] for i in range(runs)])
    assert bool(((sample.mean(0) - exact).abs() <= 5 * sample.std(0) / runs**0.5 + 1e-6).all())
    assert bool((sample.std(0) > 0).any())


@bits
@pytest.mark.parametrize("world", [1, 2, 4, 8])
def test_bytes_are_what_is_stated_and_do_not_grow(bits, world):
    ranks = Ranks(Quantize(bits), {"w": (64, 256)}, world)
    stated = ranks.plans[0]._bytes()
    ranks.step(draw(world, 0, (64, 256)))
    assert ranks.payload_sizes == [stated[1]]
    assert stated == (4 * 64 * 256, 64 * 256 * bits // 8 + 4 * 64)


@bits
def test_the_loss_of_the_exact_average(bits):
    assert final_loss(Quantize(bits)) < 1.05 * final_loss(AllReduce()) + 1e-4


def test_the_seed_and_the_step_decide():
    fed = draw(2, 0, (9, 11))
    one, same, other = (Ranks(Quantize(4, seed=seed), {"w": (9, 11)}, 2) for seed in (0, 0, 1))
    first = one.step(fed)[0]["w"]
    assert torch.equal(first, same.step(fed)[0]["w"])
    assert not torch.equal(first, other.step(fed)[0]["w"])
    for state in one.states:
        state.residuals.clear()
    assert not torch.equal(first, one.step(fed)[0]["w"])


@pytest.mark.parametrize("wrong", [16, 2, 8.0, "8", True, None])
def test_settings(wrong):
    with pytest.raises(SettingError, match=r"Quantize\.bits is .*, but must be 8 or 4"):
        Quantize(wrong)
    with pytest.raises(SettingError, match=r"Quantize\.seed"):
        Quantize(seed=1.5)
