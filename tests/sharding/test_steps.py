"""A step of a sharded model is a transaction, loses nothing, and may be made of several passes."""

import math

import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp import MixedPrecisionPolicy

import distopt
from distopt.numerics.storage import unpack
from tests.processes import run_ranks
from tests.sharding.models import (
    Model,
    gradients,
    loss_of,
    mesh_of,
    optimizer_of,
    sharded,
    tokens,
    train,
)

LOW_RANK = distopt.PowerSGD(rank=2, min_saving=0.0)


def all_bits(registration):
    """What lasts, as one tensor."""
    state = registration._engine.state
    kept = [*state.residuals.values(), *state.factors.values()]
    return torch.cat([torch.zeros(0), *(unpack(stored, torch.float64).flatten() for stored in kept)])


def mean_over(group, tensor):
    """The average over the ranks of a group."""
    tensor = tensor.clone()
    dist.all_reduce(tensor, group=group)
    return tensor / group.size()


def transaction_job(rank):
    """Every gradient of one rank is NaN in step 2, then one row of one gradient: nothing of these steps may last."""
    model, registration = sharded((2, 2), LOW_RANK, check_replicas_every=1)
    optimizer = optimizer_of(model)
    skipped = []
    for step in range(5):
        optimizer.zero_grad()
        before = all_bits(registration)
        model.poisoned = (rank, step) == (1, 3)
        loss = loss_of(model, tokens(rank, step))
        (loss * math.nan if (rank, step) == (1, 2) else loss).backward()
        finite = [bool(torch.isfinite(g).all()) for g in gradients(model).values() if g.numel()]
        if not all(finite):
            assert not any(finite)
            assert torch.equal(all_bits(registration), before)
            skipped.append(step)
        else:
            optimizer.step()
    assert registration.stats().skipped_steps == 2
    assert registration._engine.state.step == 3
    return skipped


def conservation_job(rank):
    """Fed = delivered + kept, over the replicas, for every rank's piece."""
    model, registration = sharded((2, 2), LOW_RANK)
    plain, _ = sharded((2, 2), distopt.AllReduce())
    group = mesh_of((2, 2)).get_group(0)
    fed = delivered = None
    for step in range(4):
        for each in (model, plain):
            each.zero_grad()
            loss_of(each, tokens(rank, step)).backward()
        mine = gradients(plain)
        fed = mine if fed is None else {name: fed[name] + mine[name] for name in fed}
        mine = gradients(model)
        delivered = mine if delivered is None else {name: delivered[name] + mine[name] for name in delivered}
    residuals = registration._engine.state.residuals
    assert residuals
    worst_error = 0.0
    for name in fed:
        kept = unpack(residuals[name], torch.float64) if name in residuals else torch.zeros_like(fed[name])
        error = fed[name] - delivered[name] - mean_over(group, kept)
        worst_error = max(worst_error, float(error.abs().max()) if error.numel() else 0.0)
    return worst_error, max(float(r.abs().max()) for r in residuals.values() if r.numel())


def passes_job(rank):
    """Several passes make one step, with no_sync, or in sum without zero_grad."""
    found = {}
    for reducer in (distopt.AllReduce(), LOW_RANK):
        sums, ones = [], []
        for silent in (True, False):
            model, registration = sharded((2, 2), reducer)
            for window in range(3):
                model.zero_grad()
                micros = [tokens(rank, 2 * window + i) for i in range(2)]
                if silent:
                    with model.no_sync():
                        loss_of(model, micros[0]).backward()
                    loss_of(model, micros[1]).backward()
                else:
                    (loss_of(model, micros[0]) + loss_of(model, micros[1])).backward()
                (sums if silent else ones).append(gradients(model))
            assert registration.stats().steps == 3
        found[str(reducer)] = max(worst_local(a, b) for a, b in zip(sums, ones, strict=True))
    model, registration = sharded((2, 2), distopt.AllReduce())
    for step in range(2):
        loss_of(model, tokens(rank, step)).backward()
    found["no zero_grad"] = worst_local(gradients(model), together(rank, 2))
    return found


def together(rank, steps):
    model, _ = sharded((2, 2), distopt.AllReduce())
    sum(loss_of(model, tokens(rank, step)) for step in range(steps)).backward()
    return gradients(model)


def worst_local(left, right):
    assert left.keys() == right.keys()
    return max(float((left[name] - right[name]).abs().max()) for name in left if left[name].numel())


def precision_job(rank):
    """Mixed precision: gradients come out in the dtype of the parameters, whatever they are summed in."""
    exact, _ = sharded((2, 2), distopt.AllReduce(), Model(dtype=torch.float32))
    loss_of(exact, tokens(rank, 0)).backward()
    found = []
    for reduce_dtype in (torch.float32, torch.bfloat16, torch.float16):
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=reduce_dtype)
        model, _ = sharded((2, 2), distopt.AllReduce(), Model(dtype=torch.float32), mp_policy=policy)
        loss_of(model, tokens(rank, 0)).backward()
        wanted, ours = gradients(exact), gradients(model)
        assert all(g.dtype == torch.float32 for g in ours.values())
        norm = torch.cat([g.flatten() for g in wanted.values()]).norm()
        found.append(float(torch.cat([(ours[n] - g).flatten() for n, g in wanted.items()]).norm() / norm))
        compressed, registration = sharded((2, 2), LOW_RANK, Model(dtype=torch.float32), mp_policy=policy)
        train(compressed, rank, 2)
        registration.check_replicas()
    return found


def norm_job(rank):
    """The norm that is clipped, of two passes without a step between them: factors know the last one's only."""
    model, registration = sharded((2, 2), LOW_RANK)
    for number in range(2):
        loss_of(model, tokens(rank, number)).backward()
    squares = sum((g.square().sum() for g in gradients(model).values()), torch.zeros((), dtype=torch.float64))
    dist.all_reduce(squares)
    return float(registration.clip_grad_norm_(1e9)), float((squares / 2).sqrt())  # two replicas of each piece


def everything_job(rank):
    jobs = (transaction_job, conservation_job, passes_job, precision_job, norm_job)
    return tuple(job(rank) for job in jobs)


@pytest.fixture(scope="module")
def found():
    """What four ranks found, two replicas of two shards."""
    return run_ranks(4, everything_job, timeout=120.0)


def test_all_ranks_drop_the_same_step_and_nothing_of_it_lasts(found):
    assert [skipped for skipped, *_ in found] == [[2, 3]] * 4


def test_nothing_is_lost(found):
    for _, (error, kept), *_ in found:
        assert error < 1e-13
        assert kept > 1e-4  # there was something to lose


def test_passes_add_up(found):
    for _, _, differences, *_ in found:
        assert max(differences.values()) < 1e-13, differences


def test_mixed_precision(found):
    assert max(max(errors) for _, _, _, errors, _ in found) < 0.03


def test_the_norm_of_a_sum_is_that_of_the_sum(found):
    for *_, (clipped, of_gradients) in found:
        assert clipped == pytest.approx(of_gradients, rel=1e-12)
