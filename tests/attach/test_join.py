"""Ranks with unequal numbers of inputs (torch's ``Join``), several models in one process, and chosen process groups."""

import contextlib

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms.join import Join
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel as DDP

import distopt
from tests.attach.models import batch, mlp, parameters, same, wrap
from tests.processes import run_ranks


def uneven(model, rank, inputs, divide, *, accumulate=1, lr=0.05):
    """Train each rank on as many inputs as it has; the sum of the gradients that this rank saw."""
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    seen = {name: torch.zeros_like(p) for name, p in model.module.named_parameters()}
    with Join([model], divide_by_initial_world_size=divide):
        for step in range(inputs):
            last = (step + 1) % accumulate == 0
            with contextlib.nullcontext() if last else model.no_sync():
                model(batch(rank, step, dtype=next(model.parameters()).dtype)).square().mean().backward()
            if last:
                for name, parameter in model.module.named_parameters():
                    seen[name] += parameter.grad
                optimizer.step()
                optimizer.zero_grad()
    return seen


def exact_job(rank, divide, accumulate, options):
    ours, plain = wrap(mlp(), **options), wrap(mlp(), **options)
    registration = distopt.register(ours, distopt.AllReduce(), check_replicas_every=1)
    uneven(ours, rank, 2 + 3 * rank, divide, accumulate=accumulate)
    uneven(plain, rank, 2 + 3 * rank, divide, accumulate=accumulate)
    registration.check_replicas()
    left, right = parameters(ours), parameters(plain)
    return same(left, right), max(float((left[n] - right[n]).abs().max()) for n in left)


@pytest.mark.parametrize("divide", [True, False], ids=["all", "active"])
@pytest.mark.parametrize(("world", "accumulate"), [(2, 1), (3, 1), (2, 3)])
def test_exact_reduction_under_join_is_plain_ddp(world, divide, accumulate):
    """To the bit where it divides by all ranks, up to rounding where it divides by those that are left."""
    for equal, error in run_ranks(world, exact_job, divide, accumulate, {}):
        assert equal or (not divide and error < 1e-7)


def test_exact_reduction_under_join_with_unused_parameters():
    assert all(equal for equal, _ in run_ranks(2, exact_job, True, 1, {"find_unused_parameters": True}))


def without_agreement_job(rank):
    """Who has joined is found out all the same, as the division asks for it."""
    ours, plain = wrap(mlp()), wrap(mlp())
    distopt.register(ours, distopt.AllReduce(), agreement=False, check_replicas_every=1)
    uneven(ours, rank, 2 + 3 * rank, False)
    uneven(plain, rank, 2 + 3 * rank, False)
    return same(parameters(ours), parameters(plain))


def test_join_without_the_comparison_of_steps():
    assert all(run_ranks(2, without_agreement_job))


def conserved_job(rank):
    """Rank 0 runs out first: what it still keeps back must be delivered by the steps of the others."""
    model = wrap(mlp(3, dtype=torch.float64))
    registration = distopt.register(model, distopt.PowerSGD(rank=2))
    inputs = 2 + 3 * rank
    seen = uneven(model, rank, inputs, True, lr=0.0)
    names = list(seen)
    fed = {name: torch.zeros_like(p) for name, p in seen.items()}
    for step in range(inputs):
        loss = model.module(batch(rank, step, dtype=torch.float64)).square().mean()
        for name, gradient in zip(names, torch.autograd.grad(loss, list(model.module.parameters())), strict=True):
            fed[name] += gradient
    kept = registration.state_dict()["residuals"]
    missing = 0.0
    for name in names:
        dist.all_reduce(fed[name])
        mean = fed[name] / dist.get_world_size()
        delivered = seen[name].clone()
        dist.broadcast(delivered, dist.get_world_size() - 1)  # the last rank saw every step
        missing = max(missing, float((mean - delivered - kept.get(name, 0.0)).abs().max()))
    return missing, registration.stats().steps


@pytest.mark.parametrize("world", [2, 3])
def test_a_rank_that_has_joined_still_delivers_its_residual(world):
    for missing, steps in run_ranks(world, conserved_job):
        assert missing < 1e-13
        assert steps == 2 + 3 * (world - 1)


def compressed_join_job(rank, divide):
    model = wrap(mlp())
    registration = distopt.register(model, distopt.PowerSGD(rank=2), check_replicas_every=1)
    uneven(model, rank, 2 + 3 * rank, divide)
    registration.check_replicas()
    return registration.stats().skipped_steps, all(bool(p.isfinite().all()) for p in model.parameters())


@pytest.mark.parametrize("divide", [True, False], ids=["all", "active"])
def test_compressed_reduction_under_join(divide):
    assert run_ranks(3, compressed_join_job, divide) == [(0, True)] * 3


def adversaries_job(rank, reducer):
    """A GAN's steps: the generator's backward pass runs through the discriminator, whose gradients it leaves alone."""
    torch.manual_seed(0)
    maker, judge = DDP(nn.Linear(48, 48)), DDP(nn.Sequential(nn.Linear(48, 48), nn.Tanh(), nn.Linear(48, 1)))
    registrations = [distopt.register(m, reducer) for m in (maker, judge)] if reducer else []
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.05) for m in (maker, judge)]
    for step in range(4):
        noise, real = batch(rank, step), batch(rank, 100 + step)
        optimizers[1].zero_grad()
        (judge(maker(noise).detach()).mean() - judge.module(real).mean()).backward()
        optimizers[1].step()
        optimizers[0].zero_grad()
        judge.requires_grad_(False)
        (-judge.module(maker(noise)).mean()).backward()
        judge.requires_grad_(True)
        optimizers[0].step()
    for registration in registrations:
        registration.check_replicas()
    return {**parameters(maker), **{f"judge.{n}": p for n, p in parameters(judge).items()}}, [
        r.stats().steps for r in registrations
    ]


def test_two_models_that_take_turns():
    exact = run_ranks(2, adversaries_job, distopt.AllReduce())
    plain = run_ranks(2, adversaries_job, None)
    assert same(exact[0][0], plain[0][0])
    for _, steps in [*exact, *run_ranks(2, adversaries_job, distopt.PowerSGD(rank=2))]:
        assert steps == [4, 4]


def interleaved_job(rank):
    """One backward pass through two DDP models: their buckets come in turns, in an order that nobody promises."""
    first, second = wrap(mlp(3)), wrap(mlp(4))
    registrations = [distopt.register(m, distopt.PowerSGD(rank=2), check_replicas_every=1) for m in (first, second)]
    optimizer = torch.optim.SGD([*first.parameters(), *second.parameters()], lr=0.05)
    for step in range(4):
        y = first(batch(rank, step))
        (second(y).square().mean() + second.module(y).mean() + y.mean()).backward()
        optimizer.step()
        optimizer.zero_grad()
    for registration in registrations:
        registration.check_replicas()
    return [registration.stats().steps for registration in registrations]


def test_one_backward_pass_through_two_models():
    assert run_ranks(2, interleaved_job) == [[4, 4]] * 2


def mesh_job(rank):
    """Replicas across a 2 x 2 mesh: ranks 0, 2 and ranks 1, 3 average, as the outer dimension of HSDP does."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    model = DDP(mlp(3), process_group=mesh.get_group("replicate"))
    registration = distopt.register(model, distopt.PowerSGD(rank=2), check_replicas_every=1)
    plain = [(n, p) for n, p in mlp(3).named_parameters()]
    listed = distopt.register(plain, distopt.AllReduce(), process_group=mesh.get_group("replicate"))
    for step in range(3):
        model(batch(rank, step)).square().mean().backward()
        with torch.no_grad():
            for p in model.parameters():
                p.sub_(p.grad, alpha=0.05)
                p.grad = None
    registration.check_replicas()
    for _, p in plain:
        p.grad = torch.full_like(p, float(rank))
    listed.reduce()
    listed.state_dict()
    return registration._engine.communicator.ranks, float(plain[0][1].grad[0, 0]), parameters(model)


def test_a_dimension_of_a_mesh():
    ranks, means, ends = zip(*run_ranks(4, mesh_job), strict=True)
    assert ranks == ([0, 2], [1, 3], [0, 2], [1, 3])
    assert means == (1.0, 2.0, 1.0, 2.0)
    assert same(ends[0], ends[2])
    assert not same(ends[0], ends[1])
