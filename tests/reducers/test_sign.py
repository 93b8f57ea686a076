"""One bit on the wire."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from distopt import AllReduce, Sign
from tests.reducers.convergence import final_loss
from tests.simulation import Ranks


def signs(values):
    """The oracle: up to 512 numbers as their signs times their mean absolute value."""
    mean = sum(abs(v) for v in values) / len(values)
    return [mean if v >= 0 else -mean for v in values]


@given(world=st.integers(1, 4), seed=st.integers(0, 2**31))
def test_the_oracle_step_by_step(world, seed):
    numel, generator = 24, torch.Generator().manual_seed(seed)
    ranks = Ranks(Sign(), {"w": (4, 6)}, world, dtype=torch.float64)
    residuals = [[0.0] * numel for _ in range(world)]
    each = numel // world
    for _ in range(3):
        fed = [{"w": torch.randn(4, 6, generator=generator, dtype=torch.float64)} for _ in range(world)]
        inputs = [
            [g + e for g, e in zip(r["w"].view(-1).tolist(), res, strict=True)]
            for r, res in zip(fed, residuals, strict=True)
        ]
        rows = [range(first, first + each) for first in range(0, numel, each)]
        own = [[v for row in rows for v in signs([values[i] for i in row])] for values in inputs]
        mean = [sum(values) / world for values in zip(*own, strict=True)]
        expected = [v for row in rows for v in signs([mean[i] for i in row])]
        for owner, row in enumerate(rows):
            for i in row:
                own[owner][i] += world * (expected[i] - mean[i])
        residuals = [[v - o for v, o in zip(*pair, strict=True)] for pair in zip(inputs, own, strict=True)]
        delivered = ranks.step(fed)
        assert delivered[0]["w"].view(-1).tolist() == pytest.approx(expected, abs=1e-12)
        for rank in range(world):
            assert ranks.residual(rank, "w").view(-1).tolist() == pytest.approx(residuals[rank], abs=1e-12)


@pytest.mark.parametrize("world", [1, 2, 4, 8])
def test_a_bit_a_number_whatever_the_ranks(world):
    ranks = Ranks(Sign(), {"w": (64, 64)}, world)
    ranks.step([{"w": torch.randn(64, 64)} for _ in range(world)])
    assert ranks.payload_sizes == [ranks.plans[0]._bytes()[1]] == [64 * 64 // 8 + 4 * 8]


def test_error_feedback_is_what_makes_it_converge():
    exact = final_loss(AllReduce())
    assert final_loss(Sign()) < 2 * exact + 0.01
    assert final_loss(Sign(), forget=True) > 8 * (exact + 0.01)
