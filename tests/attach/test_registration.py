"""What a registration lets one change while training goes on: pausing, and another reducer."""

import copy

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel as DDP

import distopt
from tests.attach.models import batch, gradients, mlp, parameters, same, wrap
from tests.processes import run_ranks


def one_step(model, rank, step, lr=0.05):
    """One plain SGD step; the gradients that it took."""
    model(batch(rank, step)).square().mean().backward()
    seen = gradients(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.sub_(parameter.grad, alpha=lr)
            parameter.grad = None
    return seen


def pause_job(rank, reducer):
    model, plain = wrap(mlp()), wrap(mlp())
    registration = distopt.register(model, reducer)
    for step in range(3):
        one_step(model, rank, step)
        one_step(plain, rank, step)
    plain.module.load_state_dict(model.module.state_dict())
    state = registration._engine.state
    before = copy.deepcopy((state.step, state.residuals, state.factors))
    registration.pause()
    equal = all(same(one_step(model, rank, step), one_step(plain, rank, step)) for step in range(3, 6))
    kept = state.step == before[0] and same(state.residuals, before[1]) and same(state.factors, before[2])
    registration.resume()
    compressed = not same(one_step(model, rank, 6), one_step(plain, rank, 6))
    return equal, kept, compressed, state.step, registration.stats().steps


@pytest.mark.parametrize("world", [1, 2, 3])
def test_paused_equals_plain_ddp_bit_for_bit(world):
    """And residuals, factors and the count of steps wait until it is resumed."""
    assert run_ranks(world, pause_job, distopt.PowerSGD(rank=2)) == [(True, True, True, 4, 7)] * world


def pausing_alone_job(rank):
    model = wrap(mlp())
    registration = distopt.register(model, distopt.PowerSGD(rank=2))
    one_step(model, rank, 0)
    if rank == 1:
        registration.pause()
    with pytest.raises(distopt.AgreementError, match="setting 'paused' differs: rank 1 has True where ranks 0, 2 have"):
        one_step(model, rank, 1)
    return True


def test_pausing_on_one_rank_is_found():
    assert all(run_ranks(3, pausing_alone_job))


def hierarchical(outer):
    return distopt.Hierarchical(distopt.AllReduce(), outer, ranks_per_node=2)


def conservation_job(rank, reducers):
    """Feed gradients through one reducer after the other; how much of their mean is missing in the end, by stage."""
    model = wrap(mlp(3, dtype=torch.float64))
    registration = distopt.register(model, reducers[0])
    names = list(parameters(model))
    fed, delivered = dict.fromkeys(names, 0.0), dict.fromkeys(names, 0.0)
    missing, kept = [], []
    for stage, reducer in enumerate(reducers):
        if stage:
            registration.set_reducer(reducer)
        for step in range(2):
            x = batch(rank, 10 * stage + step, dtype=torch.float64)
            local = torch.autograd.grad(model.module(x).square().mean(), list(model.parameters()))
            model(x).square().mean().backward()
            for name, gradient, parameter in zip(names, local, model.parameters(), strict=True):
                dist.all_reduce(gradient)
                fed[name] = fed[name] + gradient / dist.get_world_size()
                delivered[name] = delivered[name] + parameter.grad
                parameter.grad = None
        residuals = registration.state_dict()["residuals"]
        missing.append(max(float((fed[n] - delivered[n] - residuals.get(n, 0.0)).abs().max()) for n in names))
        kept.append(max((float(r.abs().max()) for r in residuals.values()), default=0.0))
    return missing, kept, sorted(registration._engine.state.residuals)


ON_TWO = [
    distopt.PowerSGD(rank=2),
    distopt.TopK(0.1),
    distopt.PowerSGD(rank=4),
    distopt.PowerSGD(rank=1, passes="alternate"),
    distopt.Quantize(8),
    distopt.PowerSGD(rank=2, basis="fixed"),
    distopt.Sign(),
    distopt.AllReduce(),
]
ON_FOUR = [
    distopt.PowerSGD(rank=2),
    hierarchical(distopt.PowerSGD(rank=2)),
    distopt.PowerSGD(rank=2),
    hierarchical(distopt.TopK(0.1)),
    hierarchical(distopt.AllReduce()),
    hierarchical(distopt.PowerSGD(rank=1)),
    distopt.AllReduce(),
]


@pytest.mark.parametrize(("world", "reducers"), [(2, ON_TWO), (4, ON_FOUR)], ids=["two", "four"])
def test_what_one_reducer_left_behind_the_next_delivers(world, reducers):
    for missing, kept, left in run_ranks(world, conservation_job, reducers):
        assert max(missing) < 1e-13
        for reducer, most in zip(reducers, kept, strict=True):
            assert (most == 0.0) == ("outer=AllReduce" in repr(reducer) or reducer == distopt.AllReduce())
        assert left == []


def agreement_after_handing_over_job(rank):
    """Factors of a hierarchy are spread over its ranks: all must have the same ones afterwards."""
    model = wrap(mlp(3))
    registration = distopt.register(model, hierarchical(distopt.PowerSGD(rank=2)))
    one_step(model, rank, 0)
    registration.set_reducer(distopt.PowerSGD(rank=2))
    registration.check_replicas()
    return len(registration._engine.state.factors)


def test_a_hierarchy_hands_its_factors_over():
    assert run_ranks(4, agreement_after_handing_over_job) == [3] * 4


def disagreement_job(rank):
    model = wrap(mlp())
    with pytest.raises(distopt.AgreementError):
        distopt.register(model, distopt.PowerSGD(rank=2 + rank))
    one_step(model, rank, 0)
    registration = distopt.register(model, distopt.PowerSGD(rank=2))  # nothing was done to the model
    one_step(model, rank, 0)
    mine = distopt.PowerSGD(rank=3) if rank == 2 else distopt.TopK(0.1)
    with pytest.raises(
        distopt.AgreementError, match=r"setting 'reducer' differs: rank 2 has PowerSGD\(rank=3\)"
    ) as error:
        registration.set_reducer(mine)
    one_step(model, rank, 1)
    return error.value.ranks, repr(registration.reducer)


def test_different_reducers_on_different_ranks_name_the_rank_and_change_nothing():
    assert run_ranks(3, disagreement_job) == [((2,), "PowerSGD(rank=2)")] * 3


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("rank", [1, 3])
def test_another_rank_keeps_the_warm_columns(rank):
    model = DDP(mlp(2))
    registration = distopt.register(model, distopt.PowerSGD(rank=2))
    one_step(model, 0, 0)
    engine = registration._engine
    warm = copy.deepcopy(engine.state.factors)
    registration.set_reducer(distopt.PowerSGD(rank=rank))
    for name, factor in engine.state.factors.items():
        assert factor.shape == (48, rank)
        assert torch.equal(factor[:, :2], warm[name][:, :rank])
    one_step(model, 0, 1)
    assert {tuple(factor.shape) for factor in engine.state.factors.values()} == {(48, rank)}


@pytest.mark.usefixtures("alone")
def test_an_impossible_reducer_changes_nothing():
    model = DDP(mlp(2))
    registration = distopt.register(model, distopt.PowerSGD(rank=2))
    one_step(model, 0, 0)
    before = registration.state_dict()
    with pytest.raises(distopt.SettingError, match="reducer is 'topk', but must be a reducer such as"):
        registration.set_reducer("topk")
    with pytest.raises(distopt.SettingError, match="is -1"):
        registration.set_reducer(distopt.PowerSGD(rank=lambda name, parameter: -1))
    assert registration.reducer == distopt.PowerSGD(rank=2)
    assert same(registration.state_dict()["residuals"], before["residuals"])


@pytest.mark.usefixtures("alone")
def test_what_waits_for_the_next_reducer_is_saved_too():
    model = DDP(mlp(2))
    registration = distopt.register(model, distopt.PowerSGD(rank=2))
    one_step(model, 0, 0)
    registration.set_reducer(distopt.AllReduce())
    state = registration.state_dict()
    assert set(state["residuals"]) == {"0.weight", "1.weight"}
    again = DDP(mlp(2))
    again.module.load_state_dict(model.module.state_dict())
    resumed = distopt.register(again, distopt.AllReduce())
    resumed.load_state_dict(state)
    assert same(one_step(model, 0, 1), one_step(again, 0, 1))
    assert resumed.state_dict()["residuals"] == {}


@pytest.mark.usefixtures("alone")
def test_reduce_is_not_for_ddp():
    registration = distopt.register(DDP(mlp(2)), distopt.AllReduce())
    with pytest.raises(distopt.RegistrationError, match="DDP's backward pass reduces the gradients"):
        registration.reduce()
