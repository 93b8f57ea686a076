"""A sharded run goes on from its state at other numbers of replicas and of shards; nothing is lost on the way."""

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.nn.parallel import DistributedDataParallel as DDP

import distopt
from distopt.attach.saving import FORMAT
from distopt.numerics.storage import unpack
from tests.processes import run_ranks
from tests.sharding.models import Model, loss_of, sharded, tokens, train, whole, worst

LOW_RANK = distopt.PowerSGD(rank=2, min_saving=0.4)
"""At four shards some blocks of rows are too small for this saving: other parameters are compressed than at two."""


def plain_optimizer(model):
    """Without a state: how an optimizer saves its own is torch's affair."""
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)


def go_on(model, rank, first, steps):
    """Some steps with the batches of four ranks, however many there are."""
    optimizer, each = plain_optimizer(model), 4 // dist.get_world_size()
    for step in range(first, first + steps):
        optimizer.zero_grad()
        loss_of(model, torch.cat([tokens(each * rank + i, step) for i in range(each)])).backward()
        optimizer.step()


def fresh(shape, reducer, parameters):
    """A new model with given parameters."""
    model = Model()
    model.load_state_dict({**model.state_dict(), **parameters})
    return sharded(shape, reducer, model)


def whole_means(registration, replicas):
    """Means over replicas of all residuals, made whole by hand."""
    engine = registration._engine
    found = {}
    for name in engine.slots:
        kept = engine.state.residuals.get(name)
        there = torch.tensor([float(kept is not None)])
        dist.all_reduce(there)
        if there.item() == 0:
            continue
        mine = torch.zeros(engine.slots[name].parameter.shape, dtype=torch.float64)
        if kept is not None:
            mine.copy_(unpack(kept, torch.float64))
        full = torch.zeros(engine.shards.cuts[name].shape, dtype=torch.float64)
        cut = engine.shards.cuts[name]
        begin = sum(cut.length(i, engine.shards.count) for i in range(engine.shards.index))
        full.narrow(cut.dim, begin, mine.shape[cut.dim]).copy_(mine / replicas)
        dist.all_reduce(full)
        found[name] = full
    return found


def save_job(rank, folder):
    """Save at 2 x 2, and resume at 2 x 2, 4 x 1 and 1 x 4 with the state itself, and out of a DCP checkpoint."""
    model, registration = sharded((2, 2), LOW_RANK)
    go_on(model, rank, 0, 3)
    kept = whole_means(registration, 2)
    state, parameters = registration.state_dict(), whole(model)
    for name, mean in kept.items():
        torch.testing.assert_close(state["residuals"][name], mean, rtol=0, atol=1e-15)
    torch.save(state, f"{folder}/state{rank}")
    state = torch.load(f"{folder}/state{rank}", weights_only=True)
    dcp.save({"registration": registration}, checkpoint_id=f"{folder}/dcp")
    model_at_8 = go_on(model, rank, 3, 3) or whole(model)
    for shape in ((2, 2), (4, 1), (1, 4)):
        for from_dcp in (False, True):
            other, resumed = fresh(shape, LOW_RANK, parameters)
            if from_dcp:
                dcp.load({"registration": resumed}, checkpoint_id=f"{folder}/dcp")
            else:
                resumed.load_state_dict(state)
            assert resumed._engine.state.step == 3
            means = whole_means(resumed, shape[0])
            for name, residual in state["residuals"].items():
                zero = torch.zeros_like(residual)
                torch.testing.assert_close(means.get(name, zero), residual, rtol=0, atol=1e-15)
        if shape == (2, 2):
            go_on(other, rank, 3, 3)
            resumed.check_replicas()
            assert worst(whole(other), model_at_8) == 0.0
    return state, parameters


def resume_job(rank, shape, state, parameters, reducer, first, steps):
    model, registration = fresh(shape, reducer, parameters)
    registration.load_state_dict(state)
    go_on(model, rank, first, steps)
    return whole(model)


def interrupted_job(rank, shape, reducer, steps):
    """Some steps, and what was saved after four."""
    model, registration = sharded(shape, reducer)
    go_on(model, rank, 0, 4)
    saved = registration.state_dict(), whole(model)
    go_on(model, rank, 4, steps - 4)
    return saved, whole(model)


def test_residuals_are_conserved_at_other_layouts(tmp_path):
    found = run_ranks(4, save_job, str(tmp_path), timeout=120.0)
    first, *others = [state for state, _ in found]
    assert any(residual.any() for residual in first["residuals"].values())
    for other in others:
        assert other["factors"] == first["factors"]
        assert worst(other["residuals"], first["residuals"]) == 0.0
        assert other["tally"] == first["tally"]
    run_ranks(2, resume_job, (2, 1), *found[0], LOW_RANK, 3, 2)


@pytest.mark.parametrize("reducer", [distopt.AllReduce(), distopt.PowerSGD(rank=2, min_saving=0.0)], ids=str)
def test_a_resumed_run_is_the_continued_one(reducer):
    """Exact at all layouts; PowerSGD with as many shards, whose factors go on, and another number of replicas."""
    exact = reducer == distopt.AllReduce()
    steps = 20 if exact else 10
    (saved, expected), *_ = run_ranks(4, interrupted_job, (2, 2) if exact else (4, 1), reducer, steps)
    layouts = [(4, 1), (1, 4), (2, 1)] if exact else [(2, 1)]
    for shape in layouts:
        found = run_ranks(shape[0] * shape[1], resume_job, shape, *saved, reducer, 4, steps - 4)[0]
        assert worst(found, expected) < (1e-12 if exact else 1e-9)


@pytest.fixture
def alone():
    """A world of one rank in this process."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_a_state_goes_from_ddp_to_one_shard_and_back(alone):
    ours, theirs = Model(), DDP(Model())
    ours, theirs = distopt.shard(ours, ours.blocks, reducer=LOW_RANK), distopt.register(theirs, LOW_RANK)
    state = theirs.state_dict()
    ours.load_state_dict(state)
    assert worst(ours._engine.state.factors, theirs._engine.state.factors) == 0.0
    theirs.load_state_dict(ours.state_dict())
    assert state["format"] == FORMAT


def test_what_does_not_fit_is_refused_in_one_line(alone):
    model = Model()
    registration = distopt.shard(model, model.blocks, reducer=LOW_RANK)
    train(model, 0, 1)
    state = registration.state_dict()
    name = next(iter(state["residuals"]))
    for change, message in (
        ({"factors": b"nonsense"}, "the factors cannot be read"),
        ({"residuals": {name: torch.zeros(2, 2)}}, "has shape \\(2, 2\\) there"),
        ({"reducer": "TopK(0.1)"}, "the state is of the reducer TopK"),
    ):
        with pytest.raises(distopt.StateError, match=message) as caught:
            registration.load_state_dict({**state, **change})
        assert "\n" not in str(caught.value)
