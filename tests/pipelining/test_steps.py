"""A pipeline does what the sequential model does: losses, gradients, parameters, on every schedule and mesh."""

import itertools

import pytest
import torch
from torch import nn

from distopt.pipelining.schedules import bubble_share, idle_shares
from tests.pipelining.models import (
    batch,
    blocks,
    gradients,
    loss_fn,
    mesh_of,
    optimizer_of,
    piped,
    sequential_step,
    worst,
)
from tests.processes import run_ranks

MICROBATCHES = 4


def local_gradients(pipe):
    """Copies of this rank's pieces."""
    return {name: p.grad.to_local().clone() for name, p in pipe.named_parameters() if p.grad is not None}


class Pair:
    """A pipeline and the sequential model, which are given the same batches."""

    def __init__(self, rank, shape=None, **options):
        self.pipe = piped(mesh=None if shape is None else mesh_of(*shape), **options)
        self.model = blocks()
        self.mean = options.get("mean", True)
        grid = torch.arange(4).reshape(*shape, *[1] * (3 - len(shape))) if shape else torch.zeros(1, 1, 1)
        replicas, shards = grid.shape[1:]
        self.columns = range(replicas * shards)
        self.column = rank % (replicas * shards)  # stages come first in the mesh
        self.optimizers = [optimizer_of(each.parameters()) for each in (self.pipe, self.model)]

    def step(self, seed, rows=8, clip=None, peek=False):
        """Differences of loss, gradients, norm and parameters after a step, with an evaluation in the middle of it."""
        batches = [batch(100 * seed + column, rows) for column in self.columns]
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        x, target = batches[self.column]
        loss = self.pipe.step(x if self.pipe.is_first else None, target=target if self.pipe.is_last else None)
        wanted = sequential_step(self.model, batches, MICROBATCHES, self.mean)
        found = [abs(loss.item() - wanted), self.gradients()]
        if peek:  # what was gathered for it must not outlive the optimizer's step
            found.append(self.evaluation(5))
        if clip is not None:
            norms = (
                self.pipe.registration.clip_grad_norm_(clip),
                nn.utils.clip_grad_norm_(self.model.parameters(), clip),
            )
            found.append(abs(norms[0].item() - norms[1].item()))
        for optimizer in self.optimizers:
            optimizer.step()
        return max(*found, worst(dict(self.pipe.named_parameters()), dict(self.model.named_parameters())))

    def gradients(self):
        mine = {name: p.grad for name, p in self.pipe.named_parameters() if p.grad is not None}
        reference = {name: p.grad for name, p in self.model.named_parameters() if p.grad is not None}
        assert mine.keys() == {name for name in reference if name in dict(self.pipe.named_parameters())}
        return worst(mine, reference)

    def evaluation(self, seed):
        """The difference of losses; gradients are there and stay."""
        before, batches = local_gradients(self.pipe), [batch(seed + column) for column in self.columns]
        x, target = batches[self.column]
        loss = self.pipe.evaluate(x, target=target).item()
        after = local_gradients(self.pipe)
        assert all(torch.equal(after[name], gradient) for name, gradient in before.items())
        assert all(module.training for module in self.pipe.module.modules())
        with torch.no_grad():
            parts = [zip(*(t.chunk(MICROBATCHES) for t in pair), strict=True) for pair in batches]
            losses = [sum(loss_fn(self.model(a), b).item() for a, b in part) / MICROBATCHES for part in parts]
        return abs(loss - sum(losses) / len(losses))


def schedule_job(rank, stages, schedule):
    """Steps, an evaluation between them, other batch sizes; and what the ranks did in which order."""
    pair = Pair(rank, stages=stages, schedule=schedule)
    errors = [
        pair.step(0),
        pair.step(1),
        pair.evaluation(7),
        pair.step(2, 4, peek=True),
        pair.step(3),
        pair.evaluation(8),
    ]
    return errors, pair.pipe.actions(), pair.pipe.split


def two_ranks_job(rank):
    found = {schedule: schedule_job(rank, stages, schedule) for schedule, stages in KINDS[2].items()}
    return found, sum_job(rank), odd_job(rank)


def sum_job(rank):
    """A loss that is a sum over samples; and gradients that nobody took away add up."""
    pair = Pair(rank, stages=2, mean=False)
    error = pair.step(0)
    pair = Pair(rank, stages=2)
    sums = None
    for seed in (0, 1):
        x, target = batch(seed)
        pair.pipe.step(x, target=target)
        sequential_step(pair.model, [(x, target)], MICROBATCHES)
        mine = [None if p.grad is None else p.grad.clone() for p in pair.model.parameters()]
        sums = mine if sums is None else [None if a is None else a + b for a, b in zip(sums, mine, strict=True)]
    for parameter, gradient in zip(pair.model.parameters(), sums, strict=True):
        parameter.grad = gradient
    return error, pair.gradients()


def odd_job(rank):
    """A stage without parameters, costs that put it alone, and a last block that gives the loss."""

    class Square(nn.Module):
        def forward(self, x):
            return (x * x).mean()

    torch.manual_seed(0)
    model = [nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 2), Square()]
    pipe = piped(model, stages=4, schedule="interleaved", loss_fn=None, costs=[1, 1, 1, 1])
    x = torch.randn(8, 3, generator=torch.Generator().manual_seed(1))
    loss = pipe.step(x)
    wanted = sum(nn.Sequential(*model)(part) for part in x.chunk(4)) / 4
    wanted.backward()
    reference = {f"{i}.{name}": p.grad for i, block in enumerate(model) for name, p in block.named_parameters()}
    return abs(loss.item() - wanted.item()), worst(gradients(pipe), reference) if rank == 0 else 0.0


def frozen_job(rank):
    """Nothing of the first stage is trained, so that no gradient goes back to it."""
    model = blocks()
    for block in model[:3]:
        block.requires_grad_(False)
    pipe = piped(model, stages=2, costs=[1, 1, 1, 1, 1, 1])
    x, target = batch(0)
    loss = pipe.step(x, target=target)
    wanted = sequential_step(model, [(x, target)], MICROBATCHES)
    mine = gradients(pipe)
    assert bool(mine) == pipe.is_last
    norm = pipe.registration.clip_grad_norm_(1e9)
    reference = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    total = torch.stack([gradient.norm() for gradient in reference.values()]).norm()
    return abs(loss.item() - wanted), worst(mine, reference) if mine else 0.0, abs(norm - total).item()


KINDS = {2: {"gpipe": 2, "1f1b": 2, "interleaved": 4}}


@pytest.fixture(scope="module")
def two():
    """What two ranks found."""
    return run_ranks(2, two_ranks_job, timeout=110.0)


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b", "interleaved"])
def test_equal_to_the_sequential_model_bit_for_bit(two, schedule):
    for found, *_ in two:
        assert found[schedule][0] == [0.0] * 6


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b", "interleaved"])
def test_ranks_wait_as_the_formula_says(two, schedule):
    """By the order of what they did: no clock is read."""
    stages = KINDS[2][schedule]
    actions = [found[schedule][1] for found, *_ in two]
    assert sum(map(len, actions)) == 2 * stages * MICROBATCHES
    wanted = bubble_share(schedule, 2, stages, MICROBATCHES)
    assert idle_shares(actions) == pytest.approx([wanted] * 2)
    assert all(action.begin < action.end for row in actions for action in row)


def test_1f1b_keeps_no_more_micro_batches_than_there_are_stages(two):
    for schedule, wanted in (("gpipe", [MICROBATCHES] * 2), ("1f1b", [2, 1])):
        assert [kept(found[schedule][1]) for found, *_ in two] == wanted


def kept(actions):
    """The most micro-batches that have gone forward and not yet back."""
    steps = itertools.accumulate(1 if action.kind == "forward" else -1 for action in actions)
    return max(steps)


def test_sums(two):
    for _, errors, _ in two:
        assert errors == (0.0, 0.0)


def test_stages_without_parameters_and_without_a_loss_function(two):
    for _, _, errors in two:
        assert max(errors) < 1e-7


def test_a_first_stage_that_is_frozen():
    """In a world of its own: torch before 2.13 cannot do it."""
    for errors in run_ranks(2, frozen_job):
        assert errors[:2] == (0.0, 0.0)
        assert errors[2] < 1e-7


MESHES = {
    "stages": ((4,), {"stages": 4}),
    "stages x replicas": ((2, 2), {"stages": 2}),
    "interleaved x replicas": ((2, 2), {"stages": 4, "schedule": "interleaved"}),
    "stages x shards": ((2, 1, 2), {"stages": 2, "schedule": "gpipe"}),
    "gathered for every micro-batch": ((2, 1, 2), {"stages": 2, "reshard_after_forward": True, "recompute": True}),
    "replicas x shards": ((1, 2, 2), {"stages": 1}),
}


def four_ranks_job(rank):
    found = {}
    for name, (shape, options) in MESHES.items():
        pair = Pair(rank, shape, **options)
        found[name] = [pair.step(0), pair.step(1, peek=True), pair.step(2, clip=0.5)]
    return found


@pytest.fixture(scope="module")
def four():
    """What four ranks found."""
    return run_ranks(4, four_ranks_job, timeout=110.0)


@pytest.mark.parametrize("name", MESHES)
def test_replicas_and_shards(four, name):
    for found in four:
        assert max(found[name]) < 1e-14, found
        assert name != "stages" or max(found[name][:2]) == 0.0
