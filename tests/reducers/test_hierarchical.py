"""Exact inside a node, compressed between nodes: in one process, and in four."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import distopt
from distopt import AllReduce, ByName, Cast, Hierarchical, PowerSGD, Quantize, SettingError, Sign, TopK
from distopt.reducers.hierarchical import BETWEEN, INSIDE
from distopt.reducers.reducer import Place, Slot
from tests.attach.models import batch, gradients, mlp, parameters, same, wrap
from tests.processes import run_ranks
from tests.simulation import Ranks

SHAPES = {"wide": (6, 20), "tall": (18, 5), "conv": (8, 4, 3, 3), "twin": (6, 20), "bias": (7,), "none": (0, 4)}
OUTERS = {
    "AllReduce": AllReduce(),
    "PowerSGD": PowerSGD(rank=2),
    "PowerSGD bfloat16 wire": PowerSGD(rank=2, wire_dtype=torch.bfloat16),
    "Cast": Cast(torch.bfloat16),
    "TopK": TopK(0.1),
    "Sign": Sign(),
    "ByName": ByName({"wide": PowerSGD(rank=2), "tall": TopK(0.2)}, default=Quantize(8)),
}
every_outer = pytest.mark.parametrize("outer", OUTERS.values(), ids=OUTERS.keys())
nodes = st.sampled_from([(1, 2), (2, 1), (2, 2), (3, 2), (2, 3), (4, 1), (1, 4), (2, 8)])  # nodes, ranks of each
seeds = st.integers(0, 2**31)


def draw(world, seed, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return [
        {n: torch.randn(s, generator=generator, dtype=torch.float64).to(dtype) for n, s in SHAPES.items()}
        for _ in range(world)
    ]


def build(outer, count, size, dtype=torch.float32):
    return Ranks(Hierarchical(AllReduce(), outer, ranks_per_node=size), SHAPES, count * size, dtype=dtype)


@every_outer
@given(layout=nodes, seed=seeds, dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16]))
def test_conservation_and_agreement(outer, layout, seed, dtype):
    """A residual is that of its node: it weighs as much as all ranks of the node."""
    count, size = layout
    ranks = build(outer, count, size, dtype)
    world = count * size
    for step in range(3):
        fed = draw(world, seed + step, dtype)
        before = {n: sum(ranks.residual(rank, n).double().clone() for rank in range(world)) for n in SHAPES}
        delivered = ranks.step(fed)
        assert all(same(delivered[0], other) for other in delivered)
        for n in SHAPES:
            total = sum(fed[rank][n].double() for rank in range(world)) + size * before[n]
            kept = size * sum(ranks.residual(rank, n).double() for rank in range(world))
            # A node's average is rounded to the gradients' dtype before anything keeps account of it.
            tolerance = {torch.float64: 1e-13, torch.float32: 1e-5, torch.bfloat16: 3e-2}[dtype]
            assert torch.allclose(world * delivered[0][n].double() + kept, total, rtol=0, atol=4 * world * tolerance), n


@every_outer
@given(layout=nodes, seed=seeds)
def test_a_residual_is_kept_by_one_rank_of_a_node_always_the_same(outer, layout, seed):
    count, size = layout
    ranks = build(outer, count, size)
    keepers = []
    for step in range(2):
        ranks.step(draw(count * size, seed + step))
        keepers.append([sorted(state.residuals) for state in ranks.states])
    assert keepers[0] == keepers[1]
    for node in range(count):
        kept = [name for rank in keepers[0][node * size : (node + 1) * size] for name in rank]
        assert len(kept) == len(set(kept))
        assert kept or isinstance(outer, AllReduce)


@every_outer
@given(world=st.integers(1, 4), seed=seeds)
def test_one_rank_a_node_is_the_outer_reducer_bit_for_bit(outer, world, seed):
    ranks, alone = build(outer, world, 1), Ranks(outer, SHAPES, world)
    for step in range(3):
        fed = draw(world, seed + step)
        assert same(ranks.step(fed)[0], alone.step(fed)[0])
    assert all(same(a, b) for a, b in zip(ranks.snapshot(), alone.snapshot(), strict=True))


@given(size=st.integers(1, 5), seed=seeds)
def test_one_node_and_exact_between_is_an_all_reduce(size, seed):
    fed = draw(size, seed)
    assert same(build(AllReduce(), 1, size).step(fed)[0], Ranks(AllReduce(), SHAPES, size).step(fed)[0])


@every_outer
@given(layout=nodes, seed=seeds, bad=st.sampled_from([math.nan, math.inf, -math.inf]), data=st.data())
def test_a_non_finite_number_anywhere_drops_the_step_everywhere(outer, layout, seed, bad, data):
    """Whichever rank and parameter: also where its owner is on another rank than it."""
    count, size = layout
    ranks = build(outer, count, size)
    ranks.step(draw(count * size, seed))
    before = ranks.snapshot()
    for name in ("wide", "tall", "conv", "twin", "bias"):
        poisoned = draw(count * size, seed + 1)
        flat = poisoned[data.draw(st.integers(0, count * size - 1))][name].view(-1)
        flat[data.draw(st.integers(0, len(flat) - 1))] = bad
        assert ranks.step(poisoned) is None
        assert all(same(now, then) for now, then in zip(ranks.snapshot(), before, strict=True))


def test_what_is_left_of_an_earlier_reducer_is_not_kept_twice():
    """After a change of reducer all ranks hold the mean residual; from then on only its keeper does."""
    ranks = Ranks(PowerSGD(rank=1, min_saving=0.0), SHAPES, 4)
    ranks.step(draw(4, 0))
    for name in list(ranks.states[0].residuals):
        mean = sum(ranks.residual(rank, name) for rank in range(4)) / 4
        for state in ranks.states:
            state.residuals[name] = mean.clone()
    kept = {name: r.double() for name, r in ranks.states[0].residuals.items()}
    ranks.use(Hierarchical(AllReduce(), ByName({"wide": TopK(0.1)}), ranks_per_node=2))
    fed = draw(4, 1)
    delivered = ranks.step(fed)[0]
    for name, before in kept.items():
        total = sum(rank[name].double() for rank in fed) / 4 + before
        now = 2 * sum(ranks.residual(rank, name).double() for rank in range(4)) / 4
        assert torch.allclose(delivered[name].double() + now, total, atol=1e-5), name
    assert {name for state in ranks.states for name in state.residuals} == {"wide"}


def test_settings():
    inner, outer = AllReduce(), PowerSGD(rank=2)
    for wrong in (PowerSGD(), Cast(torch.bfloat16), None, AllReduce):
        with pytest.raises(SettingError, match=r"Hierarchical\.inner"):
            Hierarchical(wrong, outer)
    nested = Hierarchical(inner, outer, ranks_per_node=2)
    for wrong in (None, "PowerSGD", nested, ByName({"*": nested}), ByName({"*": ByName({"a": nested})})):
        with pytest.raises(SettingError, match=r"Hierarchical\.outer"):
            Hierarchical(inner, wrong)
    for wrong in (0, -1, 1.5, True, "2"):
        with pytest.raises(SettingError, match="ranks_per_node"):
            Hierarchical(inner, outer, ranks_per_node=wrong)
    with pytest.raises(SettingError, match="ranks_per_node is 3, but must be a divisor of the world size 4"):
        Hierarchical(inner, outer, ranks_per_node=3).parts(4)


@pytest.mark.parametrize(("text", "size"), [(None, 4), ("2", 2), ("1", 1)])
def test_the_environment_says_how_many_ranks_a_node_has(monkeypatch, text, size):
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    if text is not None:
        monkeypatch.setenv("LOCAL_WORLD_SIZE", text)
    parts = Hierarchical(AllReduce(), PowerSGD()).parts(4)
    assert [len(node) for node in parts[INSIDE]] == [size] * (4 // size)
    assert sorted(rank for ranks in parts[BETWEEN] for rank in ranks) == [0, 1, 2, 3]


@pytest.mark.parametrize("text", ["three", "0", "-2", "1.5", "3"])
def test_an_environment_that_does_not_fit_is_refused(monkeypatch, text):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", text)
    reducer = Hierarchical(AllReduce(), PowerSGD())
    with pytest.raises(SettingError):
        reducer.parts(4)
    with pytest.raises(SettingError):
        reducer.plan([Slot("w", torch.nn.Parameter(torch.zeros(4, 4)))], Place(0, 4))


def train_job(rank, reducers, poison):
    """A few steps on DDP; after them one step with a NaN for each parameter named, on the rank named."""
    outcome = {}
    for name, reducer in reducers.items():
        model = wrap(mlp(layers=3, width=16), bucket_kib=2)
        registration = distopt.register(model, reducer)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        for step in range(5):
            model(batch(rank, step, 16)).square().mean().backward()
            seen = gradients(model)
            optimizer.step()
            optimizer.zero_grad()
        before = registration.state_dict()["residuals"]
        spoiled = [_poisoned_step(model, rank, *where) for where in poison]
        after = registration.state_dict()["residuals"]
        outcome[name] = (seen, parameters(model), spoiled, same(before, after), registration.stats())
    return outcome


def _poisoned_step(model, rank, bad_rank, index):
    """Whether every gradient is NaN afterwards."""
    parameter = list(model.parameters())[index]
    handle = parameter.register_hook(lambda g: g * math.nan) if rank == bad_rank else None
    model(batch(rank, 9, 16)).square().mean().backward()
    if handle is not None:
        handle.remove()
    spoiled = all(bool(p.grad.isnan().all()) for p in model.parameters())
    model.zero_grad()
    return spoiled


def test_four_processes_on_two_nodes():
    reducers = {
        "two nodes": Hierarchical(AllReduce(), PowerSGD(rank=2, min_saving=0.0), ranks_per_node=2),
        "four nodes": Hierarchical(AllReduce(), PowerSGD(rank=2, min_saving=0.0), ranks_per_node=1),
        "flat": PowerSGD(rank=2, min_saving=0.0),
        "coded": Hierarchical(AllReduce(), Sign(), ranks_per_node=2),
        "part": ByName({"0.*": Hierarchical(AllReduce(), TopK(0.1), ranks_per_node=2)}, default=Cast(torch.bfloat16)),
    }
    poison = [(rank, index) for rank in range(4) for index in (0, 1, 4)]
    results = run_ranks(4, train_job, reducers, poison)
    for name in reducers:
        by_rank = [result[name] for result in results]
        assert all(same(by_rank[0][0], other[0]) and same(by_rank[0][1], other[1]) for other in by_rank), name
        assert all(all(spoiled) and untouched for _, _, spoiled, untouched, _ in by_rank), name
        assert all(stats.skipped_steps == len(poison) for *_, stats in by_rank), name
    first = results[0]
    assert same(first["four nodes"][1], first["flat"][1])
    # Between nodes, the ranks of a node send together what one rank would send alone.
    sent = [sum(r[name][4].matrix_bytes_sent for r in results[:2]) for name in ("two nodes", "flat")]
    assert sent[0] == sent[1] / 2
