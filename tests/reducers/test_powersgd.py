"""What PowerSGD promises besides the laws that every reducer keeps."""

import copy
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import distopt
from distopt import PowerSGD
from distopt.numerics.orthogonal import IDENTITY
from distopt.numerics.reference import power_sgd
from distopt.reducers.lowrank import LowRankPlan
from distopt.reducers.reducer import Place, Slot
from tests.simulation import Ranks

seeds = st.integers(0, 2**31)
ALWAYS = -1e9  # a min_saving that compresses whatever can be


def generator_of(seed):
    return torch.Generator().manual_seed(seed)


def low_rank(rows, columns, rank, generator, dtype=torch.float64):
    left = torch.randn(rows, rank, generator=generator, dtype=dtype)
    return left @ torch.randn(rank, columns, generator=generator, dtype=dtype)


@given(seed=seeds, world=st.integers(1, 4), rows=st.integers(2, 12), extra=st.integers(0, 12), rank=st.integers(1, 4))
def test_equals_the_reference(seed, world, rows, extra, rank):
    """The fast path is the paper's equations, step by step."""
    generator, columns = generator_of(seed), rows + extra
    ranks = Ranks(PowerSGD(rank=rank, min_saving=ALWAYS), {"w": (rows, columns)}, world, dtype=torch.float64)
    residuals = [torch.zeros(rows, columns, dtype=torch.float64)] * world
    for step in range(3):
        gradients = [torch.randn(rows, columns, generator=generator, dtype=torch.float64) for _ in range(world)]
        plan = ranks.plans[0]
        factor = ranks.states[0].factors["w"] if step else plan.first_factor(plan.matrices[0])
        expected = power_sgd(gradients, residuals, factor, IDENTITY)
        delivered = ranks.step([{"w": g} for g in gradients])[0]["w"]
        assert torch.allclose(delivered, expected.average, rtol=0, atol=1e-9)
        for rank_, residual in enumerate(expected.residuals):
            assert torch.allclose(ranks.residual(rank_, "w"), residual, rtol=0, atol=1e-9)
        residuals = [ranks.residual(r, "w").clone() for r in range(world)]


@given(seed=seeds, world=st.integers(1, 3), true_ranks=st.lists(st.integers(0, 3), min_size=2, max_size=6))
def test_exact_where_rank_suffices_on_every_step(seed, world, true_ranks):
    """Columns of Q that have died are drawn anew: a gradient of higher rank than the last one is still delivered."""
    generator = generator_of(seed)
    ranks = Ranks(PowerSGD(rank=5, min_saving=ALWAYS), {"w": (9, 14)}, world, dtype=torch.float64)
    for true_rank in true_ranks:
        shared = torch.randn(9, true_rank, generator=generator, dtype=torch.float64)
        gradients = [
            shared @ torch.randn(true_rank, 14, generator=generator, dtype=torch.float64) for _ in range(world)
        ]
        delivered = ranks.step([{"w": g} for g in gradients])[0]["w"]
        mean = sum(gradients) / world
        assert torch.allclose(delivered, mean, rtol=0, atol=1e-3 * max(1.0, float(mean.abs().max())))


def test_exact_after_a_jump_to_an_orthogonal_gradient():
    """The case that columns' lengths do not show: Q's columns are long, but all of them parallel."""
    ranks = Ranks(PowerSGD(rank=3, min_saving=ALWAYS), {"w": (8, 8)}, 1, dtype=torch.float64)
    unit = torch.eye(8, dtype=torch.float64)
    steps = [torch.outer(unit[0], unit[0]), torch.outer(unit[1], unit[1]), low_rank(8, 8, 3, generator_of(0))]
    for gradient in steps:
        assert torch.allclose(ranks.step([{"w": gradient}])[0]["w"], gradient, atol=1e-3)


@given(seed=seeds, world=st.integers(1, 4))
def test_full_rank_equals_all_reduce(seed, world):
    generator = generator_of(seed)
    ranks = Ranks(PowerSGD(rank=99, min_saving=ALWAYS), {"w": (6, 10)}, world, dtype=torch.float64)
    for _ in range(4):
        gradients = [torch.randn(6, 10, generator=generator, dtype=torch.float64) for _ in range(world)]
        delivered = ranks.step([{"w": g} for g in gradients])[0]["w"]
        assert torch.allclose(delivered, sum(gradients) / world, rtol=0, atol=1e-12)


def test_a_zero_gradient_leaves_the_factor_alone():
    ranks = Ranks(PowerSGD(rank=2, min_saving=ALWAYS), {"w": (6, 10)}, 1)
    gradient = low_rank(6, 10, 2, generator_of(0), torch.float32)
    ranks.step([{"w": gradient}])
    ranks.states[0].residuals["w"].zero_()
    before = ranks.states[0].factors["w"].clone()
    ranks.step([{"w": torch.zeros(6, 10)}])
    assert torch.equal(ranks.states[0].factors["w"], before)


@given(seed=seeds, world=st.integers(2, 4), later=st.integers(1, 4))
def test_the_mean_residual_decides_the_future(seed, world, later):
    """Saved as their mean and given to any number of ranks, residuals lead to the same deliveries."""
    generator = generator_of(seed)
    shapes = {"w": (8, 12)}
    ranks = Ranks(PowerSGD(rank=2), shapes, world, dtype=torch.float64)
    for _ in range(3):
        ranks.step([{"w": torch.randn(8, 12, generator=generator, dtype=torch.float64)} for _ in range(world)])
    mean = sum(state.residuals["w"] for state in ranks.states) / world
    others = Ranks(PowerSGD(rank=2), shapes, later, dtype=torch.float64)
    for state in others.states:
        state.step = 3
        state.residuals["w"] = mean.clone()
        state.factors = copy.deepcopy(ranks.states[0].factors)
    for _ in range(3):
        gradient = torch.randn(8, 12, generator=generator, dtype=torch.float64)
        one = ranks.step([{"w": gradient}] * world)[0]["w"]
        other = others.step([{"w": gradient}] * later)[0]["w"]
        assert torch.allclose(one, other, rtol=0, atol=1e-11)


def test_error_feedback_delivers_a_constant_gradient():
    """What rank 1 cannot carry at once arrives over time: the sum of what is delivered approaches the sum of what is fed."""
    gradient = torch.randn(8, 12, generator=generator_of(0), dtype=torch.float64)
    ranks = Ranks(PowerSGD(rank=1, min_saving=ALWAYS), {"w": (8, 12)}, 1, dtype=torch.float64)
    delivered = sum(ranks.step([{"w": gradient}])[0]["w"] for _ in range(400)) / 400
    assert torch.allclose(delivered, gradient, atol=0.1)


def test_a_float16_result_out_of_range_drops_the_step():
    """Two finite gradients of 60,000 and their residuals may add up to more than float16 holds."""
    ranks = Ranks(PowerSGD(rank=1, min_saving=ALWAYS), {"w": (4, 4)}, 1, dtype=torch.float16)
    gradient = torch.full((4, 4), 60000.0, dtype=torch.float16)
    assert ranks.step([{"w": gradient}]) is not None
    ranks.states[0].residuals["w"].fill_(30000.0)
    before = ranks.snapshot()
    assert ranks.step([{"w": gradient}]) is None
    assert torch.equal(ranks.snapshot()[0]["residuals.w"], before[0]["residuals.w"])


def test_start_step_counts_taken_steps_and_is_exact_before():
    ranks = Ranks(PowerSGD(rank=1, start_step=2), {"w": (8, 12)}, 2)
    generator = generator_of(1)
    for step in range(4):
        gradients = [torch.randn(8, 12, generator=generator) for _ in range(2)]
        delivered = ranks.step([{"w": g} for g in gradients])[0]["w"]
        exact = sum(g * 0.5 for g in gradients)
        assert torch.equal(delivered, exact) is (step < 2)


def compressed_names(reducer, shapes, exempt=()):
    slots = [Slot(name, nn.Parameter(torch.zeros(shape)), exempt=name in exempt) for name, shape in shapes.items()]
    plan = reducer.plan(slots, Place())
    return {m.slot.name: m for m in plan.matrices} if isinstance(plan, LowRankPlan) else {}


def test_what_is_compressed():
    shapes = {
        "w": (64, 64),
        "conv": (32, 16, 3, 3),
        "small": (4, 4),
        "vector": (64,),
        "column": (64, 1),
        "emb": (99, 64),
    }
    chosen = compressed_names(PowerSGD(rank=4), shapes, exempt={"emb"})
    assert set(chosen) == {"w", "conv"}
    assert chosen["conv"].shape == (32, 144)
    assert set(compressed_names(PowerSGD(rank=4, uncompressed=["c*"]), shapes, {"emb"})) == {"w"}
    assert set(compressed_names(PowerSGD(rank=4, uncompressed=lambda name, p: p.ndim == 2), shapes)) == {"conv"}


@given(saving=st.floats(-2, 0.99), rank=st.integers(1, 9), rows=st.integers(2, 40), columns=st.integers(2, 40))
def test_min_saving(saving, rank, rows, columns):
    """A matrix is compressed exactly where that removes at least ``min_saving`` of its bytes."""
    chosen = compressed_names(PowerSGD(rank=rank, min_saving=saving), {"w": (rows, columns)})
    used = min(rank, rows, columns)
    assert bool(chosen) is (1 - used * (rows + columns) / (rows * columns) >= saving)


def test_ranks_by_number_fraction_and_callable():
    shapes = {"a": (16, 32), "b": (100, 50)}
    assert [m.rank for m in compressed_names(PowerSGD(rank=99, min_saving=ALWAYS), shapes).values()] == [16, 50]
    assert {n: m.rank for n, m in compressed_names(PowerSGD(rank=0.25), shapes).items()} == {"a": 4, "b": 12}
    by_name = PowerSGD(rank=lambda name, p: {"a": 2, "b": 3}[name])
    assert {n: m.rank for n, m in compressed_names(by_name, shapes).items()} == {"a": 2, "b": 3}
    with pytest.raises(distopt.SettingError, match=r"PowerSGD.rank\('a'\) is 0"):
        compressed_names(PowerSGD(rank=lambda name, p: 0), shapes)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank": 0}, "PowerSGD.rank is 0, but must be an integer of at least 1"),
        ({"rank": -3}, "PowerSGD.rank is -3"),
        ({"rank": True}, "PowerSGD.rank is True"),
        ({"rank": 1.5}, "PowerSGD.rank is 1.5"),
        ({"rank": math.nan}, "PowerSGD.rank is nan"),
        ({"rank": "4"}, "PowerSGD.rank is '4'"),
        ({"min_saving": 1}, "PowerSGD.min_saving is 1, but must be a number below 1"),
        ({"min_saving": math.nan}, "PowerSGD.min_saving is nan"),
        ({"start_step": -1}, "PowerSGD.start_step is -1, but must be an integer of at least 0"),
        ({"start_step": 1.0}, "PowerSGD.start_step is 1.0"),
        ({"uncompressed": "head"}, "PowerSGD.uncompressed is 'head', but must be None, a list of glob patterns"),
        ({"uncompressed": [1]}, r"PowerSGD.uncompressed is \[1\]"),
        ({"seed": "x"}, "PowerSGD.seed is 'x', but must be an integer"),
        ({"rank": {}}, "PowerSGD.rank is {}"),
        ({"rank": {-1: 4}}, "PowerSGD.rank step is -1, but must be an integer of at least 0"),
        ({"rank": {0: 4, 9: 0}}, r"PowerSGD.rank\[9\] is 0, but must be an integer of at least 1"),
        ({"basis": "cold"}, "PowerSGD.basis is 'cold', but must be 'warm', 'fixed' or 'fresh'"),
        ({"passes": "one"}, "PowerSGD.passes is 'one', but must be 'both' or 'alternate'"),
        ({"passes": "alternate", "basis": "fixed"}, "PowerSGD.passes is 'alternate', but must be 'both' unless"),
        ({"passes": "alternate", "rank": distopt.EnergyRank()}, "PowerSGD.passes is 'alternate'"),
        ({"basis": "fresh", "rank": distopt.EnergyRank()}, "PowerSGD.basis is 'fresh', but must be 'warm'"),
        ({"stacked": ["qkv"]}, r"PowerSGD.stacked is \['qkv'\]"),
        ({"stacked": {"qkv": 0}}, "PowerSGD.stacked is {'qkv': 0}"),
        ({"residual_dtype": torch.float64}, "PowerSGD.residual_dtype is torch.float64, but must be one of None"),
        ({"factor_dtype": "1-5-10"}, "PowerSGD.factor_dtype is '1-5-10'"),
        ({"wire_dtype": "1-6-9"}, "PowerSGD.wire_dtype is '1-6-9', but must be None, torch.float32"),
    ],
)
def test_settings_out_of_range(settings, message):
    with pytest.raises(distopt.SettingError, match=message):
        PowerSGD(**settings)


def test_settings_cannot_be_changed():
    with pytest.raises(AttributeError):
        PowerSGD().rank = 2
