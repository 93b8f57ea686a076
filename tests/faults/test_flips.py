"""One flipped bit in one replica is found at the next check, with its tensor and its rank."""

import random

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP

import distopt
from tests.faults.draw import WIDTH, chunks, count
from tests.processes import run_ranks

WORLDS = [3, 2, 4]
INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


class Mixed(nn.Module):
    """Parameters of several dtypes and layouts, one of them frozen; only float32 ones are used."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.body = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 1))
        self.transposed = nn.Parameter(torch.randn(WIDTH, 3).t())
        self.scalar = nn.Parameter(torch.randn(()))
        self.narrow = nn.Parameter(torch.randn(5, dtype=torch.bfloat16), requires_grad=False)
        self.wide = nn.Parameter(torch.randn(2, 2, dtype=torch.float64), requires_grad=False)

    def forward(self, x):
        return self.body(x) * self.scalar + (x @ self.transposed.t()).sum(1, keepdim=True)


def flip(tensor, seed):
    """Flip one bit of one element, in place; the same again if called twice."""
    chance = random.Random(seed)
    index = tuple(chance.randrange(side) for side in tensor.shape)
    bits = 8 * tensor.element_size()
    bit = chance.randrange(bits)
    with torch.no_grad():
        tensor.view(INTEGERS[tensor.element_size()])[index] ^= -(1 << bit) if bit == bits - 1 else 1 << bit


def caught(act):
    try:
        act()
    except RuntimeError as error:
        return str(error)
    return ""


def flips_job(rank, world, seeds):
    """By seed: what an explicit check said, and the same of the periodic one; with the bit flipped, and without."""
    told = []
    reducer = distopt.PowerSGD(rank=1, min_saving=0.1)
    model = DDP(Mixed())
    registration = distopt.register(model, reducer, check_replicas_every=0)
    model(torch.randn(2, WIDTH)).sum().backward()
    for seed in seeds:
        chance = random.Random(seed)
        victim, periodic = chance.randrange(world), seed % 4 == 0
        names = [name for name, _ in model.module.named_parameters()]
        factors = sorted(registration._engine.state.factors)
        name = chance.choice(names + factors)
        what = chance.choice([name, f"the factor of {name}"]) if name in factors and not periodic else name
        if periodic:
            watched = DDP(Mixed())
            distopt.register(watched, reducer, check_replicas_every=1)
            tensor = watched.module.get_parameter(name)
        else:
            tensor = registration._engine.state.factors[name] if what != name else model.module.get_parameter(name)
        if rank == victim:
            flip(tensor, seed)
        if periodic:
            said, healthy = caught(lambda: watched(torch.randn(2, WIDTH)).sum().backward()), ""  # noqa: B023
        else:
            said = caught(registration.check_replicas)
            if rank == victim:
                flip(tensor, seed)
            healthy = caught(registration.check_replicas)
        told.append((what, victim, said, healthy))
    return told


@pytest.mark.parametrize("seeds", chunks(count(20, 200), 10), ids=str)
def test_one_flipped_bit_is_found(seeds, record_property):
    world = WORLDS[seeds.start // 10 % len(WORLDS)]
    by_rank = run_ranks(world, flips_job, world, seeds)
    failures = {}
    for seed, told in zip(seeds, zip(*by_rank, strict=True), strict=True):
        what, victim = told[0][:2]
        others = [other for other in range(world) if other != victim]
        where = f"differs on rank {victim} from ranks {', '.join(map(str, others))}"
        where = "differs between rank 0 and rank 1" if world == 2 else where
        expected = f"replicas drifted apart: tensor {what!r} {where}"
        if any(expected not in said or healthy for _, _, said, healthy in told):
            failures[seed] = (expected, told)
    record_property("promise", "A flipped bit in one replica is found, with its tensor and its rank")
    record_property("trials", len(seeds))
    record_property("passed", len(seeds) - len(failures))
    assert not failures, "\n".join(map(str, failures.items()))
