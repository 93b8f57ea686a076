"""Ranks that do different things are found within a step, and told who differs in what; ranks that agree never are."""

import contextlib
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP

import distopt
from tests.faults.draw import WIDTH, batch, loss, net
from tests.processes import run_ranks

ODD = 1


def parameters(**changes):
    """Named parameters, in their order; ``None`` takes one away."""
    torch.manual_seed(0)
    shapes = {"first.weight": (8, 8), "first.bias": (8,), "second.weight": (8, 8)}
    named = {name: nn.Parameter(torch.randn(shape)) for name, shape in shapes.items()}
    return [(name, p) for name, p in {**named, **changes}.items() if p is not None]


def swapped():
    named = parameters()
    return [named[2], named[1], named[0]]


# What one rank of three gives to register, where the others give `parameters()`, and what all are told.
AT_REGISTER = {
    "a parameter less": (
        lambda: parameters(**{"first.bias": None}),
        "rank 1 has no parameter 'first.bias', which ranks 0, 2 have",
    ),
    "a parameter more": (
        lambda: parameters(extra=nn.Parameter(torch.ones(3))),
        "rank 1 has parameter 'extra', which ranks 0, 2 have not",
    ),
    "two of one shape swapped": (
        swapped,
        "order differs: rank 1 has 'second.weight' where ranks 0, 2 have 'first.weight'",
    ),
    "another shape": (
        lambda: parameters(**{"first.bias": nn.Parameter(torch.ones(9))}),
        "parameter 'first.bias' differs: rank 1 has float32 [9] with gradient where ranks 0, 2 have float32 [8] with "
        "gradient",
    ),
    "another dtype": (
        lambda: parameters(**{"first.bias": nn.Parameter(torch.ones(8, dtype=torch.bfloat16))}),
        "parameter 'first.bias' differs: rank 1 has bfloat16 [8] with gradient where ranks 0, 2 have float32 [8] with "
        "gradient",
    ),
    "a frozen one": (
        lambda: parameters(**{"first.bias": nn.Parameter(torch.ones(8), requires_grad=False)}),
        "parameter 'first.bias' differs: rank 1 has float32 [8] where ranks 0, 2 have float32 [8] with gradient",
    ),
    "other settings": (
        parameters,
        "setting 'reducer' differs: rank 1 has PowerSGD(rank=8) where ranks 0, 2 have PowerSGD(rank=4)",
    ),
}


# What does not show in the reducer's text, and what all are told.
UNSEEN = {
    "a rank by a callable": (
        lambda odd: (distopt.PowerSGD(rank=lambda name, _: 3 if odd and name == "second.weight" else 2), {}),
        "the reduction of parameter 'second.weight' differs: rank 1 has sent whole where ranks 0, 2 have 8 x 8 at rank "
        "2",
    ),
    "left out by a callable": (
        lambda odd: (distopt.PowerSGD(rank=1, uncompressed=lambda name, _: odd), {}),
        "the reduction of parameter 'first.weight' differs: rank 1 has sent whole where ranks 0, 2 have 8 x 8 at rank "
        "1",
    ),
    "how often replicas are checked": (
        lambda odd: (distopt.AllReduce(), {"check_replicas_every": 3 if odd else 1000}),
        "setting 'check_replicas_every' differs: rank 1 has 3 where ranks 0, 2 have 1000",
    ),
    "agreement": (
        lambda odd: (distopt.AllReduce(), {"agreement": not odd}),
        "setting 'agreement' differs: rank 1 has False where ranks 0, 2 have True",
    ),
}


class Swapped(nn.Module):
    """Two layers of one shape, in either order; DDP compares shapes, and sees no difference."""

    def __init__(self, swap: bool) -> None:
        super().__init__()
        for name in ("right", "left") if swap else ("left", "right"):
            setattr(self, name, nn.Linear(WIDTH, WIDTH))

    def forward(self, x):
        return self.right(self.left(x))


def told(act, *args, **kwargs):
    try:
        act(*args, **kwargs)
    except RuntimeError as error:
        return type(error).__name__, str(error)
    return None


def register_job(rank):
    """What each rank is told of each mismatch; one world for all, which every refusal must leave in order."""
    found = {}
    for case, (give, _) in AT_REGISTER.items():
        reducer = distopt.PowerSGD(rank=8 if rank == ODD and case == "other settings" else 4)
        found[case] = told(distopt.register, give() if rank == ODD else parameters(), reducer)
    found["DDP"] = told(distopt.register, DDP(Swapped(rank == ODD)), distopt.AllReduce())
    for case, (settings, _) in UNSEEN.items():
        reducer, options = settings(rank == ODD)
        found[case] = told(distopt.register, parameters(), reducer, **options)
    registration = distopt.register(parameters(), distopt.AllReduce())
    found["set_reducer"] = told(registration.set_reducer, distopt.TopK(0.1 if rank == ODD else 0.2))
    return found


def test_ranks_that_register_different_things(record_property):
    expected = {case: message for case, (_, message) in (AT_REGISTER | UNSEEN).items()}
    expected["DDP"] = "order differs: rank 1 has 'right.weight' where ranks 0, 2 have 'left.weight'"
    expected["set_reducer"] = (
        "setting 'reducer' differs: rank 1 has TopK(fraction=0.1) where ranks 0, 2 have TopK(fraction=0.2)"
    )
    by_rank = run_ranks(3, register_job)
    wrong = [found for found in by_rank if found != {case: ("AgreementError", m) for case, m in expected.items()}]
    record_property("promise", "Ranks that differ are found, and named with what differs")
    record_property("trials", len(expected))
    record_property("passed", len(expected) if not wrong else 0)
    assert not wrong


def step(model, rank, number=0):
    loss(model(batch(rank, number)), number).backward()


def ddp(layers=2, **settings):
    model = DDP(net(layers, seed=3))
    return model, distopt.register(model, distopt.PowerSGD(rank=2), check_replicas_every=0, **settings)


def steps_job(rank):
    """What goes apart between steps: found in the first step in which all ranks reduce."""
    found = {}
    model, registration = ddp()
    step(model, rank)
    with model.no_sync() if rank == ODD else contextlib.nullcontext():
        if rank == ODD:
            step(model, rank)
    found["no_sync"] = told(step, model, rank)
    model, registration = ddp()
    step(model, rank)
    if rank == ODD:
        registration.pause()
    found["paused"] = told(step, model, rank)
    model, registration = ddp()
    if rank == ODD:
        registration.set_loss_scale(64)
    found["loss scale"] = told(step, model, rank)
    registration = distopt.register(named := parameters(), distopt.PowerSGD(rank=2))
    if rank == ODD:
        registration.pause()
    for _, parameter in named:
        parameter.grad = torch.ones_like(parameter)
    found["paused, without DDP"] = told(registration.reduce)
    return found


def test_ranks_that_part_between_steps(record_property):
    expected = {
        "no_sync": "rank 1 did 2 forward passes since its last reduction where ranks 0, 2 did 1 forward pass: "
        "was it in no_sync() alone?",
        "loss scale": "the loss scale differs: rank 1 has 64 where ranks 0, 2 have 1",
        "paused": "setting 'paused' differs: rank 1 has True where ranks 0, 2 have False",
        "paused, without DDP": "setting 'paused' differs: rank 1 has True where ranks 0, 2 have False",
    }
    by_rank = run_ranks(3, steps_job)
    wrong = [found for found in by_rank if found != {case: ("AgreementError", m) for case, m in expected.items()}]
    record_property("promise", "Ranks that differ are found, and named with what differs")
    record_property("trials", len(expected))
    record_property("passed", len(expected) if not wrong else 0)
    assert not wrong


def absent_job(rank):
    """One rank never leaves ``no_sync``, and nothing of it arrives: the deadline tells."""
    model, _ = ddp(timeout=timedelta(seconds=2))
    over = dist.distributed_c10d._get_default_store()
    step(model, rank)
    if rank == ODD:
        with model.no_sync():
            step(model, rank, 1)
        over.wait(["over on 0", "over on 2"])
        return None
    found = told(step, model, rank, 1)
    over.set(f"over on {rank}", "")
    return found


def test_a_rank_that_never_reduces(record_property):
    by_rank = run_ranks(3, absent_job)
    expected = "rank 1 stopped answering in the comparison of steps at step 1 (deadline 2 s)"
    wrong = [found for rank, found in enumerate(by_rank) if rank != ODD and expected not in str(found)]
    record_property("promise", "Ranks that differ are found, and named with what differs")
    record_property("trials", 1)
    record_property("passed", 0 if wrong else 1)
    assert not wrong
