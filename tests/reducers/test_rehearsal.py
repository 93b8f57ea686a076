"""What a step would send, told without numbers, is what it sends with them."""

import math

import pytest
import torch
from torch import Tensor, nn

from distopt import AllReduce, Hierarchical, PowerSGD
from distopt.comm.requests import Gather, Swap, Within
from distopt.numerics.storage import nbytes
from distopt.reducers.allreduce import AllReducePlan
from distopt.reducers.reducer import Place, Proposal, Reducer, Slot
from distopt.reducers.rehearsal import rehearse
from tests.reducers.test_contract import REDUCERS, SHAPES, draw
from tests.simulation import Ranks

CASES = {
    **{name: reducer for name, reducer in REDUCERS.items() if name != "PowerSGD by energy"},  # that follows the numbers
    "Hierarchical, two ranks a node": Hierarchical(AllReduce(), PowerSGD(rank=2), ranks_per_node=2),
}


class Counting(Ranks):
    """Counts the bytes of the first rank, one copy, as the communicator does."""

    sent = 0

    def _answer(self, requests):
        first = requests[0]
        if not isinstance(first, Within) and any(first is r for r in self.first):
            asked = first.rows if isinstance(first, Swap) else first.tensor if isinstance(first, Gather) else first
            self.sent += 0 if isinstance(first, Gather) and first.returning else nbytes(asked)
        return super()._answer(requests)

    def _complete_groups(self, waiting):
        self.first = [getattr(waiting[0], "request", waiting[0])] if 0 in waiting else []
        return super()._complete_groups(waiting)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", CASES)
def test_bytes_are_those_of_a_real_step(name, dtype):
    world, first = 4, 2
    ranks = Counting(CASES[name], SHAPES, world, dtype=dtype)
    for step in range(first + 1):
        ranks.sent = 0
        assert ranks.step(draw(world, step, dtype)) is not None
    state, meta = ranks.states[0], meta_slots(ranks.slots)
    found = rehearse(CASES[name], meta, Place(0, world), first)
    assert found.sent == ranks.sent
    assert found.uncompressed == sum(math.prod(shape) for shape in SHAPES.values()) * dtype.itemsize
    assert found.residuals == sum(map(nbytes, state.residuals.values()))
    assert found.factors == sum(map(nbytes, state.factors.values()))


def meta_slots(slots):
    """The same parameters without memory."""
    return [Slot(s.name, nn.Parameter(s.parameter.detach().to("meta")), exempt=s.exempt) for s in slots]


class LooksAtNumbers(Reducer):
    """A user's own, whose code decides by numbers."""

    def plan(self, slots, place):
        return LooksAtNumbersPlan(slots)


class LooksAtNumbersPlan(AllReducePlan):
    """Sends half where the gradient is not zero."""

    def reduce(self, bucket, state):
        half: Tensor = bucket.segments[0][::2].contiguous()
        if half.sum().item() > 0:
            yield half
        return Proposal(lambda: None, (nbytes(bucket.segments[0]), nbytes(half)))


def test_code_that_looks_at_a_number_finds_one():
    slot = Slot("w", nn.Parameter(torch.empty(10, device="meta")))
    found = rehearse(LooksAtNumbers(), [slot], Place(0, 2))
    assert (found.sent, found.compressed) == (20, (40, 20))
