"""What is timed is of a sensible size, and what is charged for compression is what it does."""

import math

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import distopt
from distopt.comm.requests import Gather, Swap
from distopt.planning import measuring, overheads
from distopt.planning.costs import ALTERNATE, BOTH, CAST
from distopt.planning.measuring import measure, measure_processor
from distopt.reducers.reducer import Bucket, Place, Slot, State
from tests.processes import run_ranks
from tests.reducers.test_passes import traffic

VIEWS = {
    "view", "t", "transpose", "split", "slice", "select", "detach", "alias", "unsqueeze", "expand", "_unsafe_view",
    "unbind", "split_with_sizes", "as_strided", "permute", "empty", "new_empty", "empty_like",
}  # fmt: skip


class Traffic(TorchDispatchMode):
    """Counts the bytes that operations read and write, each operation by itself."""

    nbytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func.__name__.split(".")[0] not in VIEWS:
            tensors = [t for t in tree_leaves((args, kwargs, out)) if isinstance(t, torch.Tensor)]
            self.nbytes += sum(t.numel() * t.element_size() for t in tensors)
        return out


def passes_of(reducer, side=512, steps=3):
    """Over a gradient, before its bucket is through and after, in a step that is not the first."""
    plan, state = reducer.plan([Slot("w", nn.Parameter(torch.empty(side, side)))], Place(0, 1)), State()
    counted = ()
    for _ in range(steps):
        flat = torch.randn(side * side)
        with torch.no_grad(), Traffic() as traffic:
            reduction = plan.reduce(Bucket([flat.view(side, side)], [flat], flat), state)
            try:
                asked = next(reduction)
                while True:
                    answer = asked.rows if isinstance(asked, Swap) else asked
                    asked = reduction.send(asked.tensor[None].clone() if isinstance(asked, Gather) else answer)
            except StopIteration as returned:
                before = traffic.nbytes
                returned.value.commit()
        state.step += 1
        counted = before / (4 * side**2), (traffic.nbytes - before) / (4 * side**2)
    return counted


@pytest.mark.parametrize(
    ("reducer", "efforts"),
    [
        (distopt.PowerSGD(1), BOTH),
        (distopt.PowerSGD(1, passes="alternate"), ALTERNATE),
        (distopt.Cast(torch.bfloat16), CAST),
    ],
    ids=["both", "alternate", "16 bits"],
)
def test_passes_are_those_of_the_reducers(reducer, efforts):
    """An operation may read again what is still in a cache, so that a few more are counted than charged for."""
    for effort, counted in zip(efforts, passes_of(reducer), strict=True):
        assert effort.passes - 0.5 <= counted <= effort.passes + 4.5


@pytest.mark.parametrize(("passes", "efforts"), [("both", BOTH), ("alternate", ALTERNATE)])
def test_passes_are_those_over_memory(passes, efforts):
    """Exactly, where what stays in the cache is not counted twice."""
    counted = traffic(passes, torch.float32, in_place=False, steps=2)
    assert sum(effort.passes for effort in efforts) == sum(counted)


def measured(rank):
    measuring._LARGEST, measuring._SIDE = 2**22, 256  # for a rough answer, soon
    overheads._STEPS, overheads._WARM_UP, overheads._SCRATCH = 2, 1, 1
    timed = []
    measuring.measure_overheads = lambda group: timed.append(overheads.measure_overheads(group)) or timed[0]
    return *measure(algorithm="ring"), timed[0]


def test_two_ranks_measure_the_same_link():
    (link, processor, timed), (other, *_) = run_ranks(2, measured)
    assert link == other
    for rate in (*link, processor.memory_rate, processor.flops_rate):
        assert 0 < rate < math.inf  # how large is the machine's business
    # The constants are those of training steps.
    assert (processor.bucket_seconds, processor.matrix_seconds) == timed
    assert 0 <= min(timed) < max(timed) < math.inf


def test_a_rate_that_is_not_told_is_timed(monkeypatch):
    monkeypatch.setattr("distopt.planning.measuring._SIDE", 64)
    processor = measure_processor("cpu")
    monkeypatch.setattr("distopt.planning.plan.measure_processor", lambda: processor)
    found = distopt.plan([("w", (64, 64), torch.float32)], world_size=2, bandwidth="1Gbit")
    assert found.processor == processor
