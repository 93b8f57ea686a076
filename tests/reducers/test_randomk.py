"""Numbers at random places, the same on all ranks."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from distopt import AllReduce, RandomK, SettingError
from tests.reducers.convergence import final_loss
from tests.simulation import Ranks

SHAPES = {"w": (6, 9), "v": (4, 4), "bias": (5,)}
seeds = st.integers(0, 2**31)


def draw(world, seed):
    generator = torch.Generator().manual_seed(seed)
    return [{n: torch.randn(s, generator=generator) for n, s in SHAPES.items()} for _ in range(world)]


@given(world=st.integers(1, 4), seed=seeds, fraction=st.floats(0.001, 1))
def test_the_places_are_as_many_as_asked_and_the_same_on_all_ranks(world, seed, fraction):
    ranks = Ranks(RandomK(fraction, seed=seed), SHAPES, world)
    fed = draw(world, seed)
    delivered, exact = ranks.step(fed)[0], Ranks(AllReduce(), SHAPES, world).step(fed)[0]
    for n in ("w", "v"):
        here = delivered[n] != 0
        assert int(here.sum()) == max(1, round(fraction * here.numel()))
        assert torch.allclose(delivered[n], torch.where(here, exact[n], 0.0), atol=1e-6)
        for rank in range(world):
            assert torch.equal(ranks.residual(rank, n), torch.where(here, 0.0, fed[rank][n]))


@given(world=st.integers(1, 4), seed=seeds)
def test_all_of_them_are_the_average_bit_for_bit(world, seed):
    fed = draw(world, seed)
    delivered, exact = Ranks(RandomK(1.0), SHAPES, world).step(fed)[0], Ranks(AllReduce(), SHAPES, world).step(fed)[0]
    assert all(torch.equal(delivered[n], exact[n]) for n in SHAPES)


@pytest.mark.parametrize(("fraction", "numel"), [(0.1, 100), (0.3, 100), (0.07, 101), (0.9, 64)])
def test_every_place_gets_its_turn_about_equally_often(fraction, numel):
    ranks = Ranks(RandomK(fraction), {"w": (1, numel)}, 1)
    steps = 1500
    counts = torch.zeros(numel)
    for _ in range(steps):
        ranks.states[0].residuals.clear()
        counts += ranks.step([{"w": torch.ones(1, numel)}])[0]["w"][0]
    count = max(1, round(fraction * numel))
    low, high = 1 / -(-numel // count), 1 / (numel // count)  # pieces differ by one number
    slack = 5 * (steps * 0.25) ** 0.5
    assert bool((counts >= steps * low - slack).all())
    assert bool((counts <= steps * high + slack).all())
    assert int(counts.sum()) == steps * count


def test_steps_names_and_seeds_draw_anew():
    def places(seed, steps, name="w"):
        ranks = Ranks(RandomK(0.1, seed=seed), {name: (30, 30)}, 1)
        for _ in range(steps):
            ranks.states[0].residuals.clear()
            seen = ranks.step([{name: torch.ones(30, 30)}])[0][name]
        return seen

    first = places(0, 1)
    assert torch.equal(first, places(0, 1))
    assert not any(torch.equal(first, other) for other in (places(1, 1), places(0, 2), places(0, 1, "u")))


@pytest.mark.parametrize("world", [1, 3, 8])
def test_bytes_sent_are_what_is_stated(world):
    ranks = Ranks(RandomK(0.1), {"w": (20, 30)}, world)
    ranks.step([{"w": torch.randn(20, 30)} for _ in range(world)])
    assert [4 * size for size in ranks.payload_sizes] == [ranks.plans[0]._bytes()[1]] == [240]


def test_it_converges_where_the_rate_allows_for_the_delay():
    exact = final_loss(AllReduce())
    assert final_loss(RandomK(0.2)) < 2 * exact + 0.01
    assert final_loss(RandomK(0.2), forget=True) > 8 * (exact + 0.01)


@pytest.mark.parametrize("wrong", [0, -0.1, 1.1, float("nan"), "0.1", None, True])
def test_settings(wrong):
    with pytest.raises(SettingError, match=r"RandomK\.fraction is .*, but must be a number in \(0, 1\]"):
        RandomK(wrong)
    with pytest.raises(SettingError, match=r"RandomK\.seed"):
        RandomK(0.1, seed=None)
