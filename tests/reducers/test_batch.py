"""Small matrices of one shape that are worked on together: nothing but the time may tell it."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from distopt import PowerSGD
from distopt.numerics.orthogonal import orthogonalize, orthonormal_rows
from distopt.reducers.batch import Member, runs_of
from distopt.reducers.matrix import Matrix
from distopt.reducers.reducer import Bucket, Place, Slot, State

LAYER = [(12, 8), (12,), (8, 8), (6, 16), (6,)]
SHAPES = [(5, 7), *LAYER, *LAYER, *LAYER, (16, 6)]


def slots_of(shapes, dtype=torch.float32):
    return [Slot(str(i), nn.Parameter(torch.zeros(s, dtype=dtype)), exempt=len(s) < 2) for i, s in enumerate(shapes)]


def powersgd(rank, passes="both", **settings):
    return PowerSGD(rank, passes=passes, min_saving=-1e9, **settings)


class Run:
    """A plan and its state, fed with the gradients of one bucket."""

    def __init__(self, reducer, dtype=torch.float32, *, in_one_piece=True):
        self.plan, self.state = reducer.plan(slots_of(SHAPES, dtype), Place()), State()
        self.in_one_piece = in_one_piece

    def step(self, fed, figures=None, taken=True):
        """What is delivered of flat gradients; the answer is what was asked for."""
        flat, self.state.figures = fed.clone(), figures
        segments = flat.split([math.prod(shape) for shape in SHAPES])
        gradients = [segment.view(shape) for segment, shape in zip(segments, SHAPES, strict=True)]
        reduction = self.plan.reduce(Bucket(gradients, segments, flat if self.in_one_piece else None), self.state)
        try:
            request = next(reduction)
            while True:
                request = reduction.send(request)
        except StopIteration as returned:
            if taken:
                returned.value.commit()
                self.state.step += 1
        return flat


def fed(seed, dtype=torch.float32):
    numbers = sum(math.prod(shape) for shape in SHAPES)
    return torch.randn(numbers, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("passes", ["both", "alternate"])
@given(seed=st.integers(0, 2**31), rank=st.integers(1, 5))
def test_together_is_as_alone(passes, dtype, seed, rank):
    together, alone = Run(powersgd(rank, passes), dtype), Run(powersgd(rank, passes), dtype, in_one_piece=False)
    tolerance = 1e-9 if dtype == torch.float64 else 0.05
    for step in range(4):
        gradients = fed(seed + step).to(dtype)
        measured = ({}, {}) if step == 2 else (None, None)
        one, other = together.step(gradients, measured[0]), alone.step(gradients, measured[1])
        assert torch.allclose(one, other, rtol=0, atol=tolerance)
        for name, figures in (measured[0] or {}).items():
            assert figures.bytes_sent == measured[1][name].bytes_sent
            assert figures.input_norm == pytest.approx(measured[1][name].input_norm, rel=tolerance)
            assert figures.residual_norm == pytest.approx(measured[1][name].residual_norm, rel=tolerance)
    assert together.state.residuals.keys() == alone.state.residuals.keys()
    for name, residual in alone.state.residuals.items():
        assert torch.allclose(together.state.residuals[name], residual, rtol=0, atol=tolerance)


@pytest.mark.parametrize("passes", ["both", "alternate"])
def test_a_resumed_run_is_the_same_bit_for_bit(passes):
    one, other = Run(powersgd(2, passes)), Run(powersgd(2, passes))
    for seed in range(3):
        one.step(fed(seed))
    other.state.step = one.state.step
    other.state.residuals = {name: residual.clone() for name, residual in one.state.residuals.items()}
    other.state.factors = {name: factor.clone() for name, factor in one.state.factors.items()}
    for seed in range(3, 6):
        assert torch.equal(one.step(fed(seed)), other.step(fed(seed)))
    for name, residual in one.state.residuals.items():
        assert torch.equal(residual, other.state.residuals[name])


def test_a_dropped_step_leaves_no_trace():
    run = Run(powersgd(2))
    run.step(fed(0))
    before = {name: residual.clone() for name, residual in run.state.residuals.items()}
    factors = {name: factor.clone() for name, factor in run.state.factors.items()}
    run.step(fed(1), taken=False)
    assert all(torch.equal(residual, before[name]) for name, residual in run.state.residuals.items())
    assert all(torch.equal(factor, factors[name]) for name, factor in run.state.factors.items())


def test_two_states_of_one_plan_do_not_meet():
    run, alone = Run(powersgd(2)), Run(powersgd(2))
    first, second = run.state, State()
    for seed in range(3):
        run.state = first
        mine = run.step(fed(seed))
        run.state = second
        run.step(fed(seed + 100))
        assert torch.equal(mine, alone.step(fed(seed)))


def test_all_residuals_together_take_no_more_memory():
    run = Run(powersgd(2))
    run.step(fed(0))
    residuals = run.state.residuals.values()
    held = {r.untyped_storage().data_ptr(): r.untyped_storage().nbytes() for r in residuals}
    assert sum(held.values()) == sum(r.numel() * r.element_size() for r in residuals)


def test_which_matrices_are_worked_on_together():
    slots = slots_of([(4, 6)] * 5 + [(6, 4)])
    matrices = [Matrix.of(slot, 1)[0] for slot in slots]
    offsets = [0, 30, 60, 100, 130, 154]
    members = [Member(i, i, offset, m) for i, (offset, m) in enumerate(zip(offsets, matrices, strict=True))]
    assert [run.indices for run in runs_of(members)] == [[0, 1, 2], [3, 4]]
    assert [run.indices for run in runs_of(members, block=48)] == [[0, 1], [2, 3]]
    assert runs_of(members, block=47) == []


def test_a_gradient_that_is_transposed_in_memory_is_worked_on_alone():
    shapes = [(8, 8)] * 3
    plan, state = powersgd(8).plan(slots_of(shapes), Place()), State()
    flat = torch.randn(192)
    expected = flat.clone()
    segments = flat.split(64)
    gradients = [segments[0].view(8, 8), segments[1].view(8, 8).T, segments[2].view(8, 8)]
    reduction = plan.reduce(Bucket(gradients, segments, flat), state)
    try:
        request = next(reduction)
        while True:
            request = reduction.send(request)
    except StopIteration as returned:
        returned.value.commit()
    assert torch.allclose(flat, expected, atol=1e-4)


@given(seed=st.integers(0, 2**31), rank=st.integers(1, 4), heights=st.lists(st.integers(4, 30), min_size=1, max_size=4))
def test_stacks_are_orthogonalised_as_their_matrices(seed, rank, heights):
    generator = torch.Generator().manual_seed(seed)
    stacks = [torch.randn(2, rank, n, generator=generator, dtype=torch.float64) for n in heights]
    for stack, rows in zip(stacks, orthonormal_rows(stacks), strict=True):
        expected = orthogonalize(stack.mT)
        assert torch.allclose(rows.mT @ rows, expected @ expected.mT, atol=1e-9)
        assert torch.allclose(rows @ rows.mT, torch.eye(rank, dtype=torch.float64), atol=1e-12)
