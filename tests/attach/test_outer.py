"""The outer optimizer, on all ranks in one process: equal to torch's SGD, and no round leaves half a trace."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from distopt.attach.outer import GlobalModel, Nesterov
from distopt.errors import SettingError, StateError

SHAPES = {"matrix": (5, 3), "vector": (4,), "scalar": (), "none": (0, 2)}
rates = st.floats(0.01, 2.0)
momenta = st.floats(0.0, 0.99)
worlds = st.integers(1, 4)
seeds = st.integers(0, 2**31)


def draw(seed, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for name, shape in SHAPES.items()
    }


def mean_movement(model, ranks):
    """What the ranks' collective would give."""
    movements = [model.movements(local) for local in ranks]
    return {name: sum(m[name] for m in movements) / len(ranks) for name in movements[0]}


def moved_by(start, seed, world):
    """The local parameters of each rank, some steps away from where they began."""
    return [{n: start[n] + 0.1 * t.to(start[n].dtype) for n, t in draw(seed + 7919 * r).items()} for r in range(world)]


@given(rates, momenta, worlds, seeds)
def test_equals_torch_sgd_for_20_outer_steps(lr, momentum, world, seed):
    start = draw(seed)
    model = GlobalModel(start, {}, Nesterov(lr, momentum))
    oracle = {name: torch.nn.Parameter(tensor.clone()) for name, tensor in start.items()}
    sgd = torch.optim.SGD(oracle.values(), lr=lr, momentum=momentum, nesterov=momentum > 0)
    for step in range(20):
        ranks = moved_by(model.tensors, seed + step, world)
        for name, parameter in oracle.items():
            parameter.grad = model.tensors[name] - sum(local[name] for local in ranks) / world
        assert model.take(ranks[0], mean_movement(model, ranks))
        sgd.step()
        for name, parameter in oracle.items():
            torch.testing.assert_close(model.tensors[name], parameter.detach(), rtol=1e-11, atol=1e-12)
            assert torch.equal(model.tensors[name], ranks[0][name])


@given(worlds, seeds, st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]))
def test_a_plain_outer_step_is_the_mean(world, seed, dtype):
    """Rounded once to the parameter's dtype, as an average in 16 bits would not be; with and without Nesterov(1, 0)."""
    start = draw(seed, dtype)
    plain, outer = GlobalModel(start, {}, None), GlobalModel(start, {}, Nesterov(lr=1.0, momentum=0.0))
    ranks = moved_by(start, seed, world)
    exact = {name: sum(local[name].double() for local in ranks) / world for name in SHAPES}
    moved = mean_movement(plain, ranks)
    assert plain.take(ranks[0], moved)
    assert outer.take(ranks[0], moved)
    wide = max(torch.finfo(dtype).bits, 32)
    slack = 8 * torch.finfo(torch.float64 if wide == 64 else torch.float32).eps
    for name, mean in exact.items():
        assert torch.equal(plain.tensors[name], outer.tensors[name])
        rounding = 0.5 * torch.finfo(dtype).eps * mean.abs()
        assert ((plain.tensors[name].double() - mean).abs() <= rounding + slack * (1 + mean.abs())).all()


@given(seeds, rates, momenta)
def test_where_no_rank_moves_nothing_changes(seed, lr, momentum):
    start = draw(seed, torch.float32)
    model = GlobalModel(start, {}, Nesterov(lr, momentum))
    assert model.take(dict(start), mean_movement(model, [start] * 3))
    assert all(torch.equal(model.tensors[name], start[name]) for name in SHAPES)


def test_buffers_are_averaged_whatever_the_outer_optimizer():
    variance = torch.tensor([1.0, 2.0])
    model = GlobalModel({}, {"variance": variance}, Nesterov(lr=2.0, momentum=0.9))
    ranks = [{"variance": torch.tensor([0.0, 1.0])}, {"variance": torch.tensor([0.5, 1.5])}]
    assert model.take(ranks[0], mean_movement(model, ranks))
    assert torch.equal(model.tensors["variance"], torch.tensor([0.25, 1.25]))
    assert model.velocity == {}


def test_an_outer_step_that_overflows_is_dropped_whole():
    """Finite on all ranks, and yet lr times the movement is more than float16 holds."""
    start = {"a": torch.tensor([1.0]), "b": torch.tensor([60000.0], dtype=torch.float16)}
    model = GlobalModel(start, {}, Nesterov(lr=1.0, momentum=0.9))
    local = {"a": torch.tensor([2.0]), "b": torch.tensor([65000.0], dtype=torch.float16)}
    assert not model.take(local, model.movements(local))
    assert all(torch.equal(model.tensors[name], start[name]) for name in start)
    assert all(not velocity.any() for velocity in model.velocity.values())
    model.restore(local)
    assert all(torch.equal(local[name], start[name]) for name in start)


def test_complex_parameters_step_like_their_parts():
    start = torch.randn(3, dtype=torch.complex64)
    local = start + torch.randn(3, dtype=torch.complex64)
    model = GlobalModel({"z": start}, {}, Nesterov())
    parts = GlobalModel({"z": torch.view_as_real(start)}, {}, Nesterov())
    for _ in range(2):
        mine, theirs = {"z": local.clone()}, {"z": torch.view_as_real(local).clone()}
        assert model.take(mine, model.movements(mine))
        assert parts.take(theirs, parts.movements(theirs))
        assert torch.equal(torch.view_as_real(model.tensors["z"]), parts.tensors["z"])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_what_is_sent_and_kept_of_16_bit_parameters_is_float32(dtype):
    model = GlobalModel({"w": torch.ones(1, dtype=dtype)}, {}, Nesterov())
    assert model.movements({"w": torch.zeros(1, dtype=dtype)})["w"].dtype == torch.float32
    assert model.velocity["w"].dtype == torch.float32
    assert model.tensors["w"].dtype == dtype


@pytest.mark.parametrize(
    ("settings", "field"),
    [
        ({"lr": 0.0}, "Nesterov.lr"),
        ({"lr": float("nan")}, "Nesterov.lr"),
        ({"lr": "0.7"}, "Nesterov.lr"),
        ({"lr": True}, "Nesterov.lr"),
        ({"momentum": 1.0}, "Nesterov.momentum"),
        ({"momentum": -0.1}, "Nesterov.momentum"),
        ({"momentum": None}, "Nesterov.momentum"),
    ],
    ids=str,
)
def test_settings_are_checked(settings, field):
    with pytest.raises(SettingError, match=field):
        Nesterov(**settings)


def test_momentum_without_a_place_is_refused_and_none_begins_anew():
    start = draw(0)
    with_momentum, without = GlobalModel(start, {}, Nesterov()), GlobalModel(start, {}, None)
    with pytest.raises(StateError, match="the momentum of 'matrix'"):
        without.check(with_momentum.tensors, with_momentum.velocity)
    with_momentum.velocity["matrix"].fill_(1.0)
    with_momentum.check(without.tensors, without.velocity)
    with_momentum.load(without.tensors, without.velocity)
    assert not with_momentum.velocity["matrix"].any()
