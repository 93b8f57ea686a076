"""Seconds of compression and of a step, by hand: one rate at a time, all others without limit."""

import math

import pytest
import torch

from distopt.planning.candidates import plain
from distopt.planning.costs import Estimator
from distopt.planning.foreseen import HALF, WHOLE
from distopt.planning.machine import Network, Processor
from distopt.planning.workload import gradients_of

SLOT, WIDE, VECTOR = gradients_of([
    ("w", (30, 50), torch.float32), ("v", (20, 100), torch.float32), ("b", (40,), torch.float32)
])  # fmt: skip
QUICK = Processor(math.inf, math.inf, 0.0)


def estimator(network=None, processor=QUICK, buckets=((SLOT,),), compute=0.0):
    return Estimator(buckets, network or Network(math.inf, 0.0, 2), processor, compute)


@pytest.mark.parametrize(
    ("way", "alternate", "mixed", "before", "after"),
    [
        (3, False, False, 5, 3),
        (3, True, False, 4, 3),
        (HALF, False, False, 37, 9),
        (WHOLE, False, True, 2, 2),  # copied beside the factors
        (WHOLE, False, False, 0, 0),  # nothing to be copied beside
    ],
)
def test_passes_over_memory(way, alternate, mixed, before, after):
    found = estimator(processor=Processor(4.0, math.inf, 0.0)).computing(SLOT, way, alternate=alternate, mixed=mixed)
    assert found == (before * 1500, after * 1500)


@pytest.mark.parametrize(("alternate", "products"), [(False, 2), (True, 1)])
def test_products_and_reflections(alternate, products):
    """The shorter factor, of 30 rows, is orthonormalised: 4 n r²."""
    found = estimator(processor=Processor(math.inf, 1.0, 0.0)).computing(SLOT, 3, alternate=alternate, mixed=False)
    assert found == (2 * products * 1500 * 3 + 4 * 30 * 9, 2 * 2 * 1500 * 3)


def test_a_matrix_takes_its_constant_once_and_others_none():
    processor = Processor(math.inf, math.inf, 100.0, 7.0)
    for way, seconds in ((3, 7.0), (HALF, 0.0), (WHOLE, 0.0)):
        assert estimator(processor=processor).computing(SLOT, way, alternate=False, mixed=True) == (seconds, 0.0)


def test_one_gradient_alone_travels():
    """To one other rank, so that as many bytes go out as there are: both factors, one of them in turn, two bytes each."""
    found = estimator(Network(1.0, 0.0, 2))
    assert found.alone(SLOT, WHOLE) == 6000
    assert found.alone(SLOT, HALF) == 3000
    assert found.alone(SLOT, 3) == 4 * 80 * 3
    assert found.alone(SLOT, 3, alternate=True) == 4 * 80 * 3 / 2
    assert found.alone(SLOT, 3, wire_dtype=torch.float16) == 2 * 80 * 3


def test_buckets_are_met_in_their_order():
    """Forward takes 1 s, backward 2: of 8 kB, then of 6 kB and a vector. A kB takes a second to send."""
    buckets = [[WIDE], [SLOT, VECTOR]]
    sizes = [8.0, 6.16]
    total = sum(sizes)
    slots = [slot for bucket in buckets for slot in bucket]
    for order, (first, second) in ((1, sizes), (-1, sizes[::-1])):
        found = estimator(Network(1000.0, 0.0, 2), buckets=buckets[::order], compute=3.0).estimate(plain(slots))
        assert found.step_seconds == pytest.approx(max(1 + 2 * first / total + first, 3.0) + second)
