"""The largest numbers and their places."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from distopt import AllReduce, SettingError, TopK
from tests.reducers.convergence import final_loss
from tests.simulation import Ranks

SHAPES = {"w": (6, 9), "v": (4, 4), "bias": (5,)}
seeds = st.integers(0, 2**31)


def draw(world, seed, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return [{n: torch.randn(s, generator=generator).to(dtype) for n, s in SHAPES.items()} for _ in range(world)]


@given(world=st.integers(1, 4), seed=seeds, fraction=st.floats(0.001, 1))
def test_the_oracle_picks_the_largest_of_each_rank(world, seed, fraction):
    ranks = Ranks(TopK(fraction), SHAPES, world, dtype=torch.float64)
    residuals = [{n: [0.0] * torch.Size(s).numel() for n, s in SHAPES.items()} for _ in range(world)]
    for step in range(3):
        fed = draw(world, seed + step, torch.float64)
        delivered = ranks.step(fed)[0]
        for n in ("w", "v"):
            count = max(1, round(fraction * fed[0][n].numel()))
            average = [0.0] * fed[0][n].numel()
            for rank in range(world):
                values = [g + e for g, e in zip(fed[rank][n].view(-1).tolist(), residuals[rank][n], strict=True)]
                for i in sorted(range(len(values)), key=lambda i: -abs(values[i]))[:count]:
                    average[i] += values[i] / world
                    values[i] = 0.0
                residuals[rank][n] = values
                assert ranks.residual(rank, n).view(-1).tolist() == pytest.approx(values, abs=1e-13)
            assert delivered[n].view(-1).tolist() == pytest.approx(average, abs=1e-13)


@given(world=st.integers(1, 4), seed=seeds)
def test_all_of_them_are_the_average(world, seed):
    fed = draw(world, seed)
    ranks = Ranks(TopK(1.0), SHAPES, world)
    delivered, exact = ranks.step(fed)[0], Ranks(AllReduce(), SHAPES, world).step(fed)[0]
    assert all(torch.allclose(delivered[n], exact[n], rtol=0, atol=1e-6) for n in SHAPES)
    assert not any(ranks.residual(rank, n).any() for rank in range(world) for n in SHAPES)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("world", [1, 3, 8])
def test_bytes_sent_are_what_is_stated(dtype, world):
    ranks = Ranks(TopK(0.1), {"w": (20, 30)}, world, dtype=dtype)
    ranks.step([{"w": torch.randn(20, 30).to(dtype)} for _ in range(world)])
    assert [4 * size for size in ranks.payload_sizes] == [ranks.plans[0]._bytes()[1]]
    assert ranks.payload_sizes == [60 * (3 if dtype == torch.float64 else 2)]


def test_what_is_not_picked_is_delivered_later():
    ranks = Ranks(TopK(0.1), {"w": (2, 5)}, 1)
    total = torch.zeros(2, 5)
    for _ in range(2000):
        total += ranks.step([{"w": torch.arange(1.0, 11.0).view(2, 5)}])[0]["w"]
    assert torch.allclose(total / 2000, torch.arange(1.0, 11.0).view(2, 5), rtol=0.05)


def test_error_feedback_is_what_makes_it_converge():
    exact = final_loss(AllReduce())
    assert final_loss(TopK(0.05)) < 2 * exact + 0.01
    assert final_loss(TopK(0.05), forget=True) > 8 * (exact + 0.01)


@pytest.mark.parametrize("wrong", [0, 0.0, -0.1, 1.1, float("nan"), float("inf"), "0.1", None, True])
def test_settings(wrong):
    with pytest.raises(SettingError, match=r"TopK\.fraction is .*, but must be a number in \(0, 1\]"):
        TopK(wrong)
