"""Replicas of a stage through a reducer: the bits of DDP, no step taken by some ranks only, and a state for other stages."""

import copy
import math

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel as DDP

import distopt
from distopt.errors import StateError
from distopt.numerics.storage import unpack
from tests.pipelining.models import batch, blocks, gradients, loss_fn, mesh_of, optimizer_of, piped, whole, worst
from tests.processes import run_ranks

POWER = distopt.PowerSGD(rank=2, min_saving=0.0)
SPARSE = distopt.TopK(0.2)
MICROBATCHES = 4


def of_replica(step, replica):
    return batch(10 * step + replica)


def run(pipe, optimizer, replica, steps):
    """Steps, and their losses."""
    losses = []
    for step in steps:
        optimizer.zero_grad()
        x, target = of_replica(step, replica)
        losses.append(pipe.step(x, target=target).item())
        optimizer.step()
    return losses


def both_ddp_job(rank):
    return [ddp_job(rank, reducer) for reducer in (SPARSE, POWER)]


def ddp_job(rank, reducer):
    """The same under DDP, with the micro-batches of a step one after the other."""
    model = DDP(blocks(), find_unused_parameters=False)
    registration = distopt.register(model, reducer)
    optimizer = optimizer_of(model.parameters())
    for step in range(3):
        optimizer.zero_grad()
        pairs = list(zip(*(t.chunk(MICROBATCHES) for t in of_replica(step, rank)), strict=True))
        with model.no_sync():
            for x, target in pairs[:-1]:
                (loss_fn(model(x), target) / MICROBATCHES).backward()
        (loss_fn(model(pairs[-1][0]), pairs[-1][1]) / MICROBATCHES).backward()
        optimizer.step()
    return {name: p.detach() for name, p in model.module.named_parameters()}, registration.state_dict()


def bits(registration):
    """What lasts, as one tensor."""
    state = registration._engine.state
    kept = [*state.residuals.values(), *state.factors.values()]
    return torch.cat([torch.zeros(0), *(unpack(stored, torch.float64).flatten() for stored in kept)])


def without_state(pipe):
    """An optimizer that goes on by itself."""
    return torch.optim.SGD(pipe.parameters(), lr=0.1)


def bits_job(rank):
    """Two stages of two replicas, three steps; then the state goes on with other stages."""
    pipe = piped(stages=2, mesh=mesh_of(2, 2), reducer=POWER)
    optimizer = optimizer_of(pipe.parameters())
    run(pipe, optimizer, rank % 2, range(3))
    state, after = pipe.registration.state_dict(), whole(pipe)
    everyone = [None] * 4
    dist.all_gather_object(everyone, after)
    parameters = {name: value for part in everyone for name, value in part.items()}
    losses = run(pipe, without_state(pipe), rank % 2, range(3, 6))
    return {"state": state, "parameters": parameters, "losses": losses, "resumed": resumed(rank, parameters, state)}


def resumed(rank, parameters, state):
    """Losses from the saved state on: the same stages, others, others that are interleaved, and other replicas."""
    found = {}
    for name, shape, options in (
        ("same", (2, 2), {"stages": 2}),
        ("others", (2, 2), {"stages": 2, "costs": [5, 1, 1, 1, 1, 1]}),
        ("interleaved", (2, 2), {"stages": 4, "schedule": "interleaved"}),
        ("one replica", (4, 1), {"stages": 4}),
        ("shards", (2, 1, 2), {"stages": 2}),
    ):
        model = blocks()
        model.load_state_dict({**model.state_dict(), **parameters})
        pipe = piped(model, mesh=mesh_of(*shape), reducer=POWER, **options)
        pipe.registration.load_state_dict(state)
        again = pipe.registration.state_dict()
        kept = [torch.equal(again["residuals"][key], value) for key, value in state["residuals"].items()]
        assert all(kept)
        assert again["step"] == 3
        found[name] = None
        if shape == (2, 2):
            found[name] = run(pipe, without_state(pipe), rank % 2, range(3, 6))
    return found


def transaction_job(rank):
    """A gradient in the middle of the last stage is infinite on one rank, then in the first stage on another one."""
    pipe = piped(stages=2, mesh=mesh_of(2, 2), reducer=POWER, check_replicas_every=1)
    optimizer = optimizer_of(pipe.parameters())
    skipped = []
    for step in range(5):
        optimizer.zero_grad()
        before = bits(pipe.registration)
        (block,) = [block for name, block in pipe.module.items() if name in ("2", "4")][:1]
        block.poisoned = (rank, step) in ((3, 2), (0, 3))
        x, target = of_replica(step, rank % 2)
        pipe.step(x, target=target)
        finite = [bool(torch.isfinite(g).all()) for g in gradients(pipe).values()]
        if all(finite):
            optimizer.step()
        else:
            assert not any(finite)
            assert all(bool(torch.isnan(g).all()) for g in gradients(pipe).values())
            assert torch.equal(bits(pipe.registration), before)
            assert math.isnan(pipe.registration.clip_grad_norm_(1.0).item())
            skipped.append(step)
    stats = pipe.registration.stats()
    assert (stats.steps, stats.skipped_steps) == (5, 2)
    pipe.registration.check_replicas()
    return skipped


def conservation_job(rank):
    """Fed = delivered + kept, over the replicas: residuals are in the unit of the mean loss."""
    pipes = [piped(stages=2, mesh=mesh_of(2, 2), reducer=reducer) for reducer in (POWER, distopt.AllReduce())]
    sums = [{}, {}]
    for step in range(4):
        x, target = of_replica(step, rank % 2)
        for pipe, total in zip(pipes, sums, strict=True):
            for parameter in pipe.parameters():
                parameter.grad = None
            pipe.step(x, target=target)
            for name, gradient in gradients(pipe).items():
                total[name] = total.get(name, 0) + gradient
    residuals = pipes[0].registration.state_dict()["residuals"]
    errors = [
        (sums[1][name] - delivered - residuals.get(name, torch.zeros(()))).abs().max().item()
        for name, delivered in sums[0].items()
    ]
    return max(errors), max(residual.abs().max().item() for residual in residuals.values())


def refusals_job(rank):
    """A state that fits some stages only is refused on all ranks, and changes nothing."""
    pipe = piped(stages=2, mesh=mesh_of(2, 2), reducer=POWER)
    run(pipe, optimizer_of(pipe.parameters()), rank % 2, range(1))
    state = pipe.registration.state_dict()
    wrong = copy.deepcopy(state)
    wrong["residuals"]["4.up.weight"] = torch.zeros(2, 2)
    strange = copy.deepcopy(state)
    strange["residuals"]["9.up.weight"] = torch.zeros(2, 2)
    told, before = [], bits(pipe.registration)
    for bad in (wrong, strange, {**state, "format": 0}, {**state, "reducer": "TopK(0.1)"}, {}):
        with pytest.raises(StateError) as raised:
            pipe.registration.load_state_dict(bad)
        told.append(str(raised.value))
        assert torch.equal(bits(pipe.registration), before)
    return told


def exact_job(rank):
    """As `bits_job`, through a reducer without matrix products, whose last bits depend on where a matrix lies."""
    pipe = piped(stages=2, mesh=mesh_of(2, 2), reducer=SPARSE)
    run(pipe, optimizer_of(pipe.parameters()), rank % 2, range(3))
    return whole(pipe), pipe.registration.state_dict()["residuals"]


def four_ranks_job(rank):
    return exact_job(rank), bits_job(rank), transaction_job(rank), conservation_job(rank), refusals_job(rank)


@pytest.fixture(scope="module")
def found():
    """What four ranks found."""
    return run_ranks(4, four_ranks_job, timeout=110.0)


def test_the_bits_of_ddp(found):
    """Also of residuals, which are in the unit of the mean loss."""
    sparse, power = run_ranks(2, both_ddp_job, timeout=110.0)[0]
    for (parameters, residuals), ours, *_ in found:
        assert worst(parameters, sparse[0]) == 0.0
        assert residuals.keys() == sparse[1]["residuals"].keys()
        assert worst(residuals, sparse[1]["residuals"]) == 0.0
        assert worst(ours["parameters"], power[0]) < 1e-14
        assert ours["state"]["residuals"].keys() == power[1]["residuals"].keys()
        assert worst(ours["state"]["residuals"], power[1]["residuals"]) < 1e-14


def test_a_state_goes_on_with_other_stages(found):
    for _, ours, *_ in found:
        losses = ours["resumed"]
        assert ours["losses"] == losses["same"] == losses["others"] == losses["interleaved"]


def test_all_ranks_of_all_stages_drop_the_same_step(found):
    assert [skipped for _, _, skipped, *_ in found] == [[2, 3]] * 4


def test_nothing_is_lost(found):
    for *_, (error, kept), _ in found:
        assert error < 1e-14
        assert kept > 1e-4  # there was something to lose


def test_a_state_that_does_not_fit(found):
    for *_, told in found:
        assert told == found[0][-1]
        assert "4.up.weight" in told[0]
        assert "9.up.weight" in told[1]
        assert not any("\n" in line for line in told)
