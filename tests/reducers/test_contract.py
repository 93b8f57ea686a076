"""The laws that every reducer keeps, each through one table; see docs/design.md."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import distopt
from distopt import AllReduce, ByName, Cast, EnergyRank, Hierarchical, PowerSGD, Quantize, RandomK, Sign, TopK
from distopt.reducers.reducer import Reducer
from tests.simulation import Ranks, plain

REDUCERS = {
    "AllReduce": AllReduce(),
    "PowerSGD": PowerSGD(rank=2),
    "PowerSGD rank 1": PowerSGD(rank=1, min_saving=0.0),
    "PowerSGD by fraction": PowerSGD(rank=0.5, min_saving=-9.0, seed=3),
    "PowerSGD from step 2": PowerSGD(rank=2, start_step=2),
    "PowerSGD by schedule": PowerSGD(rank={1: 3, 2: 1}, min_saving=-9.0),
    "PowerSGD by energy": PowerSGD(EnergyRank(0.8, most=4, every=2), min_saving=-9.0),
    "PowerSGD fixed": PowerSGD(rank=2, basis="fixed"),
    "PowerSGD fresh": PowerSGD(rank=2, basis="fresh"),
    "PowerSGD alternate": PowerSGD(rank=2, passes="alternate"),
    "PowerSGD stacked": PowerSGD(rank=1, stacked={"wide": 3, "conv": 2}, min_saving=0.0),
    "PowerSGD bfloat16 wire": PowerSGD(rank=2, wire_dtype=torch.bfloat16, factor_dtype=torch.bfloat16),
    "PowerSGD float16 wire, alternate": PowerSGD(rank=2, wire_dtype=torch.float16, passes="alternate"),
    "PowerSGD bfloat16 residual": PowerSGD(rank=2, residual_dtype=torch.bfloat16),
    "PowerSGD float16 residual": PowerSGD(rank=2, residual_dtype=torch.float16, factor_dtype=torch.float16),
    "PowerSGD 1-6-9": PowerSGD(rank=2, residual_dtype="1-6-9", factor_dtype="1-6-9"),
    "Cast bfloat16": Cast(torch.bfloat16),
    "Cast float16": Cast(torch.float16),
    "TopK": TopK(0.1),
    "RandomK": RandomK(0.1),
    "Quantize 8": Quantize(8),
    "Quantize 4": Quantize(4),
    "Sign": Sign(),
    "ByName": ByName({"wide": PowerSGD(rank=2), "tall": TopK(0.2), "bias": Cast(torch.bfloat16)}, default=Quantize()),
    "Hierarchical, one rank a node": Hierarchical(AllReduce(), PowerSGD(rank=2), ranks_per_node=1),
}
ROUNDED_RESIDUALS = {
    "PowerSGD bfloat16 residual": 2.0**-7,
    "PowerSGD float16 residual": 2.0**-10,
    "PowerSGD 1-6-9": 2.0**-9,
}
"""What a residual in 16 bits may lose each step, of its largest number."""
DISCRETE = {"Quantize 8", "Quantize 4", "Sign", "TopK", "ByName", "PowerSGD bfloat16 wire"}
"""What rounds coarsely: the last bit of an input may turn a whole step of the result. Powers of two do not."""
ROUNDS = {"ByName": 8, "Hierarchical, one rank a node": 4}
"""Most rounds a bucket takes, where it is not two: those of all reducers, and two more inside the node."""
SHAPES = {
    "wide": (6, 20),
    "tall": (18, 5),
    "conv": (8, 4, 3, 3),
    "twin": (6, 20),
    "bias": (7,),
    "scalar": (),
    "none": (0, 4),
}
DTYPES = {torch.float64: 1e-13, torch.float32: 1e-5, torch.bfloat16: 1e-5, torch.float16: 1e-5}

every_reducer = pytest.mark.parametrize("reducer", REDUCERS.values(), ids=REDUCERS.keys())
every_name = pytest.mark.parametrize("name", REDUCERS)
dtypes = st.sampled_from(list(DTYPES))
worlds = st.integers(1, 4)
seeds = st.integers(0, 2**31)


def draw(world, seed, dtype=torch.float32, scale=1.0):
    """One gradient a rank, different on each."""
    generator = torch.Generator().manual_seed(seed)
    return [
        {
            name: (scale * torch.randn(shape, generator=generator, dtype=torch.float64)).to(dtype)
            for name, shape in SHAPES.items()
        }
        for _ in range(world)
    ]


def same(left, right):
    return left.keys() == right.keys() and all(torch.equal(plain(left[name]), plain(right[name])) for name in left)


def test_the_table_is_not_empty():
    public = {n for n in dir(distopt) if isinstance(kind := getattr(distopt, n), type) and issubclass(kind, Reducer)}
    assert {type(reducer).__name__ for reducer in REDUCERS.values()} == public


@every_name
@given(dtype=dtypes, world=worlds, seed=seeds)
def test_conservation(name, dtype, world, seed):
    """What was fed is what was delivered plus what the residuals hold, over all ranks, rounding included."""
    ranks = Ranks(REDUCERS[name], SHAPES, world, dtype=dtype)
    tolerance = max(DTYPES[dtype], ROUNDED_RESIDUALS.get(name, 0.0))
    for step in range(4):
        fed = draw(world, seed + step, dtype)
        before = [{n: ranks.residual(rank, n).double().clone() for n in SHAPES} for rank in range(world)]
        delivered = ranks.step(fed)
        for n in SHAPES:
            total = sum(fed[rank][n].double() + before[rank][n] for rank in range(world))
            kept = sum(ranks.residual(rank, n).double() for rank in range(world))
            allowed = tolerance if n in ranks.states[0].residuals else torch.finfo(dtype).eps * 4
            size = max(1.0, float(total.abs().max())) if total.numel() else 1.0
            assert torch.allclose(
                world * delivered[0][n].double() + kept, total, rtol=0, atol=allowed * size * world
            ), n


@every_reducer
@given(dtype=dtypes, world=worlds, seed=seeds)
def test_agreement(reducer, dtype, world, seed):
    """The averaged gradient is bitwise the same on all ranks, and so are the factors."""
    ranks = Ranks(reducer, SHAPES, world, dtype=dtype)
    for step in range(3):
        outputs = ranks.step(draw(world, seed + step, dtype))
        assert all(same(outputs[0], other) for other in outputs)
        assert all(same(ranks.states[0].factors, state.factors) for state in ranks.states)


@pytest.mark.parametrize("name", [name for name in REDUCERS if name not in DISCRETE])
@given(world=worlds, seed=seeds, exponent=st.floats(-12, 12))
def test_units(name, world, seed, exponent):
    """Reducing c times a gradient gives c times the result."""
    c = 10.0**exponent
    one, other = Ranks(REDUCERS[name], SHAPES, world), Ranks(REDUCERS[name], SHAPES, world)
    tolerance = 0.1 if "16" in name or "1-6-9" in name else 2e-4
    for step in range(3):
        plain = one.step(draw(world, seed + step))[0]
        scaled = other.step(draw(world, seed + step, scale=c))[0]
        for n, value in plain.items():
            assert torch.allclose(scaled[n] / c, value, rtol=0, atol=tolerance), n


@every_reducer
@given(seed=seeds, exponent=st.integers(-40, 40))
def test_units_of_two_are_exact(reducer, seed, exponent):
    """A power of two changes no bit of the result but its exponent."""
    one, other = Ranks(reducer, SHAPES, 2), Ranks(reducer, SHAPES, 2)
    for step in range(3):
        gradients = draw(2, seed + step)
        plain = one.step(gradients)[0]
        scaled = other.step([{name: g * 2.0**exponent for name, g in rank.items()} for rank in gradients])[0]
        assert same({name: g * 2.0**exponent for name, g in plain.items()}, scaled)


@every_reducer
@given(dtype=dtypes, world=worlds, seed=seeds, bad=st.sampled_from([math.nan, math.inf, -math.inf]), data=st.data())
def test_a_non_finite_gradient_leaves_no_trace(reducer, dtype, world, seed, bad, data):
    """A step with a non-finite number on one rank is dropped on all; the run is then as if it had not been."""
    ranks, control = Ranks(reducer, SHAPES, world, dtype=dtype), Ranks(reducer, SHAPES, world, dtype=dtype)
    when = data.draw(st.integers(0, 3))
    for step in range(4):
        if step == when:
            poisoned = draw(world, seed + 99, dtype)
            name = data.draw(st.sampled_from([name for name, shape in SHAPES.items() if math.prod(shape) > 0]))
            flat = poisoned[data.draw(st.integers(0, world - 1))][name].view(-1)
            flat[data.draw(st.integers(0, flat.numel() - 1))] = bad
            before = ranks.snapshot()
            assert ranks.step(poisoned) is None
            assert all(same(now, then) for now, then in zip(ranks.snapshot(), before, strict=True))
        gradients = draw(world, seed + step, dtype)
        assert same(ranks.step(gradients)[0], control.step(gradients)[0])


@every_reducer
def test_an_infinity_is_seen_where_the_factor_is_zero(reducer):
    """Infinity times zero is no number, so a factor whose rows have died hides nothing."""
    ranks = Ranks(reducer, {"w": (6, 20)}, 2)
    gradient = torch.zeros(6, 20)
    gradient[:3, :5] = torch.randn(3, 5)
    for _ in range(3):
        assert ranks.step([{"w": gradient}, {"w": gradient}]) is not None
    gradient[5, 19] = math.inf
    assert ranks.step([{"w": gradient}, {"w": torch.zeros(6, 20)}]) is None


@every_reducer
@given(dtype=dtypes, world=worlds, seed=seeds, zeros=st.integers(1, 3))
def test_zero_gradients(reducer, dtype, world, seed, zeros):
    """Zero gradients give finite results, and no later step suffers from them."""
    ranks = Ranks(reducer, SHAPES, world, dtype=dtype)
    nothing = [{name: torch.zeros(shape, dtype=dtype) for name, shape in SHAPES.items()}] * world
    for _ in range(zeros):
        assert all(not value.any() for value in ranks.step(nothing)[0].values())
    after = ranks.step(draw(world, seed, dtype))[0]
    assert all(torch.isfinite(value).all() for value in after.values())


@every_name
@given(world=st.integers(2, 4), seed=seeds)
def test_at_most_two_rounds_and_none_empty(name, world, seed):
    ranks = Ranks(REDUCERS[name], SHAPES, world)
    for step in range(3):
        ranks.step(draw(world, seed + step))
        assert 1 <= len(ranks.payload_sizes) <= ROUNDS.get(name, 2) * (world if "node" in name else 1)
        assert all(size > 0 for size in ranks.payload_sizes)


@every_reducer
def test_an_empty_bucket_needs_no_collective(reducer):
    ranks = Ranks(reducer, {"none": (0, 4)}, 2)
    assert ranks.step([{"none": torch.zeros(0, 4)}] * 2) is not None
    assert ranks.payload_sizes == []


@every_reducer
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_residuals_are_bounded_under_noise(reducer, dtype):
    """Zero-mean noise does not pile up; a random walk would have doubled the residual between the two windows."""
    ranks = Ranks(reducer, {"w": (16, 24), "bias": (7,)}, 2, dtype=dtype)
    generator = torch.Generator().manual_seed(0)
    norms = []
    for _ in range(600):
        ranks.step(
            [
                {"w": torch.randn(16, 24, generator=generator).to(dtype), "bias": torch.zeros(7, dtype=dtype)}
                for _ in range(2)
            ]
        )
        norms.append(float(ranks.residual(0, "w").norm()))
    assert max(norms[500:]) <= 1.3 * max(norms[100:200])


@every_reducer
@given(seed=seeds)
def test_optional_gradients_absent_everywhere_are_left_alone(reducer, seed):
    """What is written to a parameter that no rank used is lost: nothing may be delivered there."""
    ranks = Ranks(reducer, SHAPES, 2, optional=True)
    for step in range(3):
        ranks.step(draw(2, seed + step))
    gradients, before = draw(2, seed + 9), [ranks.residual(rank, "wide").clone() for rank in range(2)]
    for rank in gradients:
        rank["wide"] = torch.zeros(6, 20)
    assert not ranks.step(gradients)[0]["wide"].any()
    assert all(torch.equal(ranks.residual(rank, "wide"), before[rank]) for rank in range(2))
