"""The reducer in docs/reducers.md: what a user writes in a screenful keeps the laws of the others."""

import dataclasses
import linecache
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import distopt
from tests.attach.models import batch, gradients, mlp, same, wrap
from tests.docs.pages import blocks
from tests.processes import run_ranks
from tests.reducers.convergence import final_loss
from tests.simulation import Ranks

PAGE = Path(__file__).parents[2] / "docs" / "reducers.md"
SHAPES = {"wide": (6, 20), "conv": (8, 4, 3, 3), "bias": (7,), "none": (0, 4), "one": (1, 1)}
worlds = st.integers(1, 5)
seeds = st.integers(0, 2**31)


def source():
    (block,) = (block for block in blocks(PAGE) if "(Reducer)" in block.code)
    return block.code


def load():
    """A module of its own, outside the package."""
    names = {"__name__": "own_reducer"}
    exec(compile(source(), str(PAGE), "exec"), names)
    return names


OWN = load()
NaturalCompression, PowerCodec = OWN["NaturalCompression"], OWN["PowerCodec"]


def draw(world, seed, dtype=torch.float32, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    return [
        {n: (scale * torch.randn(s, generator=generator, dtype=torch.float64)).to(dtype) for n, s in SHAPES.items()}
        for _ in range(world)
    ]


def test_it_is_short():
    assert len(source().splitlines()) < 60
    assert dataclasses.is_dataclass(NaturalCompression)
    assert not linecache.getline(str(PAGE), 1).startswith("import")


@given(dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]), world=worlds, seed=seeds)
def test_conservation_and_agreement(dtype, world, seed):
    ranks = Ranks(NaturalCompression(), SHAPES, world, dtype=dtype)
    for step in range(3):
        fed = draw(world, seed + step, dtype)
        before = [{n: ranks.residual(rank, n).double().clone() for n in SHAPES} for rank in range(world)]
        delivered = ranks.step(fed)
        assert all(same(delivered[0], other) for other in delivered)
        for n in ("wide", "conv"):
            total = sum(fed[rank][n].double() + before[rank][n] for rank in range(world))
            kept = sum(ranks.residual(rank, n).double() for rank in range(world))
            assert torch.allclose(world * delivered[0][n].double() + kept, total, rtol=0, atol=1e-4 * world)


@given(world=worlds, seed=seeds, exponent=st.integers(-40, 40))
def test_units_and_zeros(world, seed, exponent):
    one, other = Ranks(NaturalCompression(), SHAPES, world), Ranks(NaturalCompression(), SHAPES, world)
    nothing = [{n: torch.zeros(s) for n, s in SHAPES.items()}] * world
    assert not any(value.any() for value in one.step(nothing)[0].values())
    assert not any(value.any() for value in other.step(nothing)[0].values())
    for step in range(2):
        plain = one.step(draw(world, seed + step))[0]
        scaled = other.step(draw(world, seed + step, scale=2.0**exponent))[0]
        assert same({n: g * 2.0**exponent for n, g in plain.items()}, scaled)


@given(world=worlds, seed=seeds, bad=st.sampled_from([math.nan, math.inf, -math.inf]), data=st.data())
def test_a_non_finite_number_leaves_no_trace(world, seed, bad, data):
    ranks = Ranks(NaturalCompression(), SHAPES, world)
    ranks.step(draw(world, seed))
    before, poisoned = ranks.snapshot(), draw(world, seed + 1)
    flat = poisoned[data.draw(st.integers(0, world - 1))][data.draw(st.sampled_from(["wide", "conv", "bias"]))].view(-1)
    flat[data.draw(st.integers(0, len(flat) - 1))] = bad
    assert ranks.step(poisoned) is None
    assert all(same(now, then) for now, then in zip(ranks.snapshot(), before, strict=True))


def test_the_codec_rounds_to_powers_of_two_without_bias():
    numbers = torch.tensor([[1.0, -0.75, 0.3, 1e-3, 0.0, -3.0, 1e-38]])
    rows = 20000
    codec = PowerCodec()
    back = codec.decode(codec.encode(numbers.expand(rows, -1), torch.Generator().manual_seed(0)), 7, torch.float32)
    mantissa = torch.frexp(back[:, [0, 1, 2, 3, 5]]).mantissa.abs()
    assert bool((mantissa == 0.5).all())
    assert not back[:, [4, 6]].any()
    expected = numbers[0, :6].double()
    deviation = 0.5 * expected.abs() / rows**0.5
    assert bool(((back[:, :6].double().mean(0) - expected).abs() <= 5 * deviation).all())


def test_it_converges():
    assert final_loss(NaturalCompression()) < 2 * final_loss(distopt.AllReduce()) + 1e-3


def ddp_job(rank):
    reducer = load()["NaturalCompression"]()
    model = wrap(mlp(width=16))
    registration = distopt.register(model, reducer)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    losses = []
    for step in range(40):
        loss = (model(batch(rank, step % 4, 16)) - 1.0).square().mean()
        loss.backward()
        losses.append(float(loss.detach()))
        optimizer.step()
        seen = gradients(model)
        optimizer.zero_grad()
    batch_of_nan = batch(rank, 0, 16) * (math.nan if rank == 1 else 1.0)
    model(batch_of_nan).square().mean().backward()
    spoiled = all(bool(p.grad.isnan().all()) for p in model.parameters())
    return losses, seen, registration.stats(), spoiled


def test_it_trains_a_ddp_model():
    results = run_ranks(2, ddp_job)
    assert same(results[0][1], results[1][1])
    for losses, _, stats, spoiled in results:
        assert sum(losses[-4:]) < 0.5 * sum(losses[:4])
        assert stats.matrix_bytes_sent == stats.steps * 5 * 2 * (16 * 16 // 2 + 2) - 5 * 2 * (16 * 16 // 2 + 2)
        assert stats.skipped_steps == 1
        assert spoiled


def test_a_wrong_reducer_is_refused():
    with pytest.raises(TypeError, match="abstract"):
        type("Empty", (distopt.reducers.reducer.Reducer,), {})()
