"""Gradients that go straight into the residuals: the same reduction, with one buffer instead of two."""

import math

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP

import distopt
from tests.attach.models import batch, mlp, same
from tests.processes import run_ranks

REDUCERS = [distopt.AllReduce(), distopt.PowerSGD(rank=2), distopt.TopK(0.1)]


def update(model):
    with torch.no_grad():
        for p in model.parameters():
            p.sub_(p.grad, alpha=0.05)
            p.grad = None


def as_usual_job(rank, reducer, dtype):
    """Two micro-batches a step, against the attachment that leaves gradients where they are."""
    usual, lean = mlp(3, dtype=dtype), mlp(3, dtype=dtype)
    registrations = (
        distopt.register(usual.named_parameters(), reducer),
        distopt.register(lean.named_parameters(), reducer, accumulate=True, check_replicas_every=1),
    )
    freed = True
    for step in range(4):
        for model, registration in zip((usual, lean), registrations, strict=True):
            for micro in range(2):
                model(batch(rank, 2 * step + micro, dtype=dtype)).square().mean().backward()
            freed &= model is usual or all(p.grad is None for p in model.parameters())
            registration.reduce()
            update(model)
    error = max(float((p - q).detach().abs().max()) for p, q in zip(usual.parameters(), lean.parameters(), strict=True))
    first, second = (registration.stats() for registration in registrations)
    return error, freed, first.bytes_sent == second.bytes_sent


@pytest.mark.parametrize("reducer", REDUCERS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_it_is_the_same_reduction(reducer, dtype):
    for error, freed, same_bytes in run_ranks(2, as_usual_job, reducer, dtype):
        assert error < (1e-11 if dtype == torch.float64 else 0.02)
        assert freed
        assert same_bytes


def conservation_job(rank, reducer, bad):
    """What was fed, finite gradients of a dropped step included, is delivered or kept."""
    model = mlp(3, dtype=torch.float64)
    names = [name for name, _ in model.named_parameters()]
    registration = distopt.register(model.named_parameters(), reducer, accumulate=True)
    fed, delivered = dict.fromkeys(names, 0.0), dict.fromkeys(names, 0.0)
    taken = []
    for step in range(6):
        registration.set_loss_scale(2.0**step)
        loss = model(batch(rank, step, dtype=torch.float64)).square().mean()
        poisoned = step in bad and rank == 1
        local = torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)
        handle = model[1].weight.register_hook(lambda g: torch.full_like(g, math.inf)) if poisoned else None
        (loss * 2.0**step).backward()
        if handle:
            handle.remove()
        for name, gradient in zip(names, local, strict=True):
            if poisoned and name == "1.weight":
                gradient = torch.zeros_like(gradient)
            gradient = gradient.clone()
            dist.all_reduce(gradient)
            fed[name] = fed[name] + gradient / dist.get_world_size()
        taken.append(registration.reduce())
        for name, parameter in model.named_parameters():
            if taken[-1]:
                delivered[name] = delivered[name] + parameter.grad / 2.0**step
            else:
                assert bool(parameter.grad.isnan().all())
            parameter.grad = None
    kept = registration.state_dict()["residuals"]
    missing = max(float((fed[n] - delivered[n] - kept.get(n, 0.0)).abs().max()) for n in names)
    return missing, taken, registration.stats().skipped_steps


@pytest.mark.parametrize("reducer", REDUCERS, ids=str)
@pytest.mark.parametrize("bad", [(), (0, 3)], ids=["sound", "bad"])
def test_a_dropped_step_delays_its_gradients(reducer, bad):
    for missing, taken, skipped in run_ranks(2, conservation_job, reducer, bad):
        assert missing < 1e-13
        assert taken == [step not in bad for step in range(6)]
        assert skipped == len(bad)


def resume_job(rank):
    model = mlp(3)
    registration = distopt.register(model.named_parameters(), distopt.PowerSGD(rank=2), accumulate=True)

    def steps(bare, registered, which):
        for step in which:
            bare(batch(rank, step)).square().mean().backward()
            registered.reduce()
            update(bare)

    steps(model, registration, range(3))
    state = registration.state_dict()
    again = mlp(3)
    again.load_state_dict(model.state_dict())
    resumed = distopt.register(again.named_parameters(), distopt.PowerSGD(rank=2), accumulate=True)
    resumed.load_state_dict(state)
    steps(model, registration, range(3, 5))
    steps(again, resumed, range(3, 5))
    return same(dict(model.named_parameters()), dict(again.named_parameters()))


def test_it_resumes_bit_for_bit():
    assert all(run_ranks(2, resume_job))


@pytest.mark.usefixtures("alone")
def test_what_cannot_accumulate_is_refused_by_name():
    with pytest.raises(distopt.RegistrationError, match="accumulate=True is for lists of parameters"):
        distopt.register(DDP(mlp(1)), distopt.AllReduce(), accumulate=True)
    nodes = distopt.Hierarchical(distopt.AllReduce(), distopt.PowerSGD(rank=2), ranks_per_node=1)
    with pytest.raises(distopt.RegistrationError, match="accumulate=True needs every rank to keep every residual"):
        distopt.register(mlp(1).parameters(), nodes, accumulate=True)
    registration = distopt.register(mlp(1).parameters(), distopt.PowerSGD(rank=2), accumulate=True)
    with pytest.raises(distopt.RegistrationError, match="accumulate=True needs every rank to keep every residual"):
        registration.set_reducer(nodes)
    with pytest.raises(distopt.RegistrationError, match="accumulate=True cannot be paused"):
        registration.pause()
    words = nn.Embedding(9, 4, sparse=True)
    distopt.register([("words", words.weight)], distopt.AllReduce(), accumulate=True)
    with pytest.raises(distopt.RegistrationError, match="the gradient of 'words' is sparse"):
        words(torch.tensor([1])).sum().backward()
