"""A bucket that is worked on all at once: as the plain way does it, but that nothing is asked of the device."""

import copy
import math

import pytest
import torch
from torch import nn

import distopt
from distopt import PowerSGD
from distopt.numerics.storage import nbytes, pack, tensors_of, unpack
from distopt.reducers import fused
from distopt.reducers.memory import clone
from distopt.reducers.reducer import Bucket, Place, Slot, State
from tests.attach.models import batch, gradients, mlp, same, wrap
from tests.processes import run_ranks

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SHAPES = [(5, 7), (24, 16), (9,), (16, 24), (24, 16), (6, 4, 3)]


def powersgd(**settings):
    return PowerSGD(settings.pop("rank", 3), min_saving=-1e9, stacked={"5": 2}, **settings)


@pytest.fixture
def editions(monkeypatch):
    """A function that makes a run of either edition."""

    def make(reducer, dtype=torch.float32, *, fused=True):
        with monkeypatch.context() as context:
            context.setattr("distopt.reducers.fused.chosen", lambda device: fused)
            run = Run(reducer, dtype)
        assert (run.plan._fused is not None) == fused
        return run

    return make


class Run:
    """A plan and its state, fed with the gradients of one bucket by the only rank there is."""

    def __init__(self, reducer, dtype):
        slots = [
            Slot(str(i), nn.Parameter(torch.zeros(shape, dtype=dtype, device=DEVICE)), exempt=len(shape) < 2)
            for i, shape in enumerate(SHAPES)
        ]
        self.plan, self.state = reducer.plan(slots, Place()), State()

    def propose(self, fed, figures=None):
        """The bucket, and what came of its reduction."""
        flat, self.state.figures = fed.clone(), figures
        segments = flat.split([math.prod(shape) for shape in SHAPES])
        gradients = [segment.view(shape) for segment, shape in zip(segments, SHAPES, strict=True)]
        reduction = self.plan.reduce(Bucket(gradients, segments, flat), self.state)
        try:
            request = next(reduction)
            while True:
                request = reduction.send(request)
        except StopIteration as returned:
            return flat, returned.value

    def step(self, fed, figures=None):
        """What is delivered, if the step is taken."""
        flat, proposal = self.propose(fed, figures)
        if proposal is None or (proposal.sound is not None and not bool(proposal.sound)):
            return None
        proposal.commit()
        self.state.step += 1
        return flat


def fed(seed, dtype=torch.float32):
    numbers = sum(math.prod(shape) for shape in SHAPES)
    return torch.randn(numbers, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def bits(state):
    kept = [(kind, n, s) for kind in ("residuals", "factors") for n, s in getattr(state, kind).items()]
    return {(kind, n, i): t.clone() for kind, n, s in kept for i, t in enumerate(tensors_of(s))}


FORMATS = [None, torch.bfloat16, torch.float16, "1-6-9"]
every_format = pytest.mark.parametrize("residual_dtype", FORMATS, ids=str)
some_formats = pytest.mark.parametrize("residual_dtype", [None, "1-6-9"], ids=str)
either_way = pytest.mark.parametrize(
    ("passes", "residual_dtype"),
    [("both", None), ("alternate", None), ("both", "1-6-9"), ("alternate", torch.float16)],
    ids=str,
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@either_way
def test_it_is_as_the_plain_way(editions, passes, dtype, residual_dtype):
    reducer = powersgd(passes=passes, residual_dtype=residual_dtype)
    fused, plain = editions(reducer, dtype), editions(reducer, dtype, fused=False)
    tolerance = 1e-4 if dtype == torch.float32 and residual_dtype is None else 0.1
    for step in range(3):
        gradients, measured = fed(step, dtype), ({}, {}) if step == 1 else (None, None)
        one, other = fused.step(gradients, measured[0]), plain.step(gradients, measured[1])
        assert torch.allclose(one, other, rtol=0, atol=tolerance)
        for name, figures in (measured[0] or {}).items():
            expected = measured[1][name]
            assert figures.bytes_sent == expected.bytes_sent
            assert figures.gradient_norm == pytest.approx(expected.gradient_norm, rel=1e-5)
            assert figures.input_norm == pytest.approx(expected.input_norm, rel=tolerance)
            # Of a matrix that is delivered exactly; Triton's interpreter cuts off what bfloat16 has no room for.
            assert figures.residual_norm == pytest.approx(expected.residual_norm, rel=tolerance, abs=tolerance)
    assert fused.state.residuals.keys() == plain.state.residuals.keys()
    for name, residual in plain.state.residuals.items():
        kept = fused.state.residuals[name]
        assert nbytes(kept) == nbytes(residual)
        one, other = tensors_of(kept)[0], tensors_of(residual)[0]
        assert (one.shape, one.dtype) == (other.shape, other.dtype)
        assert torch.allclose(unpack(kept), unpack(residual), rtol=0, atol=tolerance)
    for name, factor in plain.state.factors.items():
        assert torch.allclose(fused.state.factors[name], factor, rtol=0, atol=tolerance)


@pytest.mark.parametrize(
    ("passes", "residual_dtype"), [*(("both", each) for each in FORMATS), ("alternate", "1-6-9")], ids=str
)
def test_nothing_is_lost(editions, passes, residual_dtype):
    """What is delivered and what is left are what was there: of one rank, no average comes in between."""
    run, before = editions(powersgd(passes=passes, rank=2, residual_dtype=residual_dtype)), {}
    rounding = {None: 0, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10, "1-6-9": 2.0**-9}[residual_dtype]
    for step in range(3):
        gradients = fed(step)
        delivered = run.step(gradients)
        at = 0
        for i, shape in enumerate(SHAPES):
            here = slice(at, at + math.prod(shape))
            at = here.stop
            left, kept = gradients[here] - delivered[here], torch.zeros(1, device=DEVICE)
            if str(i) in run.state.residuals:
                left += before.get(str(i), torch.zeros(1, device=DEVICE))
                kept = unpack(run.state.residuals[str(i)]).flatten()
            assert bool(((left - kept).abs() <= rounding * kept.abs() + 1e-5).all())
        before = {name: unpack(residual).flatten().clone() for name, residual in run.state.residuals.items()}


@either_way
def test_a_resumed_run_is_the_same_bit_for_bit(editions, passes, residual_dtype):
    reducer = powersgd(passes=passes, residual_dtype=residual_dtype)
    one, other = editions(reducer), editions(reducer)
    for step in range(2):
        one.step(fed(step))
        other.step(fed(step + 7))  # which leaves residuals of its own behind
    other.state = copy.deepcopy(one.state)
    for step in range(2, 4):
        assert torch.equal(one.step(fed(step)), other.step(fed(step)))
    kept = bits(other.state)
    assert all(torch.equal(tensor, kept[key]) for key, tensor in bits(one.state).items())


@every_format
@pytest.mark.parametrize("from_fused", [True, False])
def test_either_edition_goes_on_from_the_other(editions, from_fused, residual_dtype):
    """From its very numbers, though the power of two of a residual is another."""
    reducer = powersgd(residual_dtype=residual_dtype)
    first, second = editions(reducer, fused=from_fused), editions(reducer, fused=not from_fused)
    for step in range(2):
        first.step(fed(step))
    second.step(fed(9))
    second.state = State(first.state.step, {n: clone(r) for n, r in first.state.residuals.items()}, {})
    second.state.factors.update(first.state.factors)
    if not from_fused:
        second.plan._fused._residual(second.state)
        for name, kept in second.plan._fused.named().items():
            assert torch.equal(unpack(kept), unpack(first.state.residuals[name]))
    one, other = first.step(fed(2)), second.step(fed(2))
    assert torch.allclose(one, other, rtol=0, atol=1e-4)
    for name, kept in first.state.residuals.items():
        spacing = {None: 1e-4, torch.bfloat16: 2.0**-6, torch.float16: 2.0**-9, "1-6-9": 2.0**-8}[residual_dtype]
        assert torch.allclose(unpack(kept), unpack(second.state.residuals[name]), rtol=spacing, atol=1e-4)


@some_formats
def test_a_copy_of_the_state_is_worked_on_apart(editions, residual_dtype):
    """As when ranks of a node commit to a copy until all of them know that the step is sound."""
    run = editions(powersgd(residual_dtype=residual_dtype))
    run.step(fed(0))
    original, before = run.state, bits(run.state)
    copies = {name: clone(residual) for name, residual in original.residuals.items()}
    apart = run.state = State(original.step, copies, dict(original.factors))
    run.step(fed(1))
    assert all(torch.equal(tensor, before[key]) for key, tensor in bits(original).items())
    apart = State(1, {name: clone(residual) for name, residual in apart.residuals.items()}, dict(apart.factors))
    before = bits(apart)
    run.step(fed(2) * 2.0**20)
    assert all(torch.equal(tensor, before[key]) for key, tensor in bits(apart).items())


@either_way
@pytest.mark.parametrize(("bad", "where"), [(math.nan, 3), (math.inf, 3), (math.nan, 35 + 384 + 2)])
def test_a_step_that_is_not_sound_leaves_no_trace(editions, passes, bad, where, residual_dtype):
    """The bad number may be in what is compressed, or in what is sent whole."""
    reducer = powersgd(passes=passes, residual_dtype=residual_dtype)
    run, witness = editions(reducer), editions(reducer)
    for each in (run, witness):
        each.step(fed(0))
    before, spoilt = bits(run.state), fed(1)
    spoilt[where] = bad
    assert run.step(spoilt) is None
    assert all(torch.equal(tensor, before[key]) for key, tensor in bits(run.state).items())
    assert torch.equal(run.step(fed(2)), witness.step(fed(2)))


def test_what_a_narrow_gradient_cannot_hold_is_not_sound(editions):
    """As in the plain edition: finite numbers whose average, within the range, is found beyond it after rounding."""
    run = editions(powersgd(), torch.float16)
    assert run.step(fed(0, torch.float16) * 100) is not None
    large = torch.full_like(fed(0, torch.float16), 60000.0)
    large[::7] = 65504.0
    residual = run.state.residuals["1"]
    residual.fill_(9000.0)
    assert run.step(large) is None


@pytest.mark.parametrize(("residual_dtype", "exponent"), [("1-6-9", -40), ("1-6-9", 40), (torch.float16, 40)], ids=str)
def test_the_unit_of_gradients_is_in_the_power_of_two_alone(editions, residual_dtype, exponent):
    """From 1e-12 to 1e12, bit for bit; and a gradient that grows that much from one step to the next is kept as well."""
    reducer = powersgd(residual_dtype=residual_dtype)
    one, other = editions(reducer), editions(reducer)
    for step in range(2):
        wanted, found = one.step(fed(step)), other.step(fed(step) * 2.0**exponent)
        assert torch.equal(wanted * 2.0**exponent, found)
    for name, kept in one.state.residuals.items():
        assert torch.equal(kept.codes, other.state.residuals[name].codes)
        assert int(kept.exponent) + exponent == int(other.state.residuals[name].exponent)
    whole = fed(5).double() * 2.0**-exponent
    whole[:35] += unpack(other.state.residuals["0"]).flatten().double()
    delivered = other.step(fed(5) * 2.0**-exponent).double()
    kept = unpack(other.state.residuals["0"]).flatten().double()
    assert torch.allclose(delivered[:35] + kept, whole[:35], rtol=0, atol=1e-3 * float(whole[:35].abs().max()))


@either_way
def test_zero_gradients_leave_factors_alone(editions, passes, residual_dtype):
    run = editions(powersgd(passes=passes, residual_dtype=residual_dtype))
    run.step(fed(0) * 0)
    before = bits(run.state)
    run.step(fed(0) * 0)
    assert all(torch.equal(tensor, before[key]) for key, tensor in bits(run.state).items())


def test_columns_without_a_direction_are_drawn_anew(editions):
    """A gradient of rank 1 leaves one; the next gradient of full rank needs all of them."""
    run, plain = editions(powersgd()), editions(powersgd(), fused=False)
    ones = torch.ones_like(fed(0))
    for each in (run, plain):
        assert torch.allclose(each.step(ones), ones, atol=1e-4)
    for name, factor in run.state.factors.items():
        assert torch.allclose(factor.norm(dim=0), torch.ones(factor.shape[1], device=DEVICE), atol=1e-5)
        assert torch.linalg.matrix_rank(factor) == factor.shape[1], name


def trained(rank, is_fused, saved=None, steps=range(3)):
    """What a registration saves after some steps, and the gradients that the next one delivers."""
    fused.chosen = lambda device: is_fused
    model = wrap(mlp(layers=3), 9)
    registration = distopt.register(model, distopt.PowerSGD(rank=2, residual_dtype="1-6-9"))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    if saved is not None:
        model.module.load_state_dict(saved["model"])
        registration.load_state_dict(saved["hook"])
    for step in steps:
        model(batch(rank, step)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    state = {"hook": registration.state_dict(), "model": copy.deepcopy(model.module.state_dict())}
    model(batch(rank, 3)).square().mean().backward()
    assert all((plan._fused is not None) == is_fused for plan in registration._engine._plans.values())
    return state, gradients(model)


def test_a_saved_state_is_the_same_to_both_editions_at_any_world_size():
    saved, wanted = run_ranks(2, trained, True)[0]
    residuals = saved["hook"]["residuals"]
    assert any(bool(residual.any()) for residual in residuals.values())
    for world, is_fused in ((2, True), (1, False)):
        again, found = run_ranks(world, trained, is_fused, saved, range(0))[0]
        for name, residual in residuals.items():
            # The mean is rounded to the format by whoever loads it.
            nearest = unpack(pack(residual, "1-6-9"))
            assert torch.equal(again["hook"]["residuals"][name], nearest)
            assert world == 1 or torch.allclose(found[name], wanted[name], rtol=1e-3, atol=1e-5)
        assert not (world == 2 and is_fused) or same(found, wanted)


def test_what_it_does_not_know_goes_the_plain_way(monkeypatch):
    monkeypatch.setattr("distopt.reducers.fused.chosen", lambda device: True)
    slots = [Slot("0", nn.Parameter(torch.zeros(8, 9, dtype=torch.float64)))]
    assert powersgd().plan(slots, Place())._fused is None
    optional = [Slot("0", nn.Parameter(torch.zeros(8, 9)), optional=True)]
    assert powersgd().plan(optional, Place())._fused is None
    scattered = powersgd().plan([Slot(name, nn.Parameter(torch.zeros(8, 9))) for name in "01"], Place())
    gradients, state = [torch.ones(8, 9), torch.ones(8, 9)], State()
    next(scattered.reduce(Bucket(gradients, [gradient.view(-1) for gradient in gradients]), state))
    assert scattered._fused._known is None


@pytest.mark.parametrize(("largest", "fused"), [(72, True), (71, False)])
def test_a_matrix_with_more_elements_than_kernels_count_goes_the_plain_way(monkeypatch, largest, fused):
    monkeypatch.setattr("distopt.reducers.fused.chosen", lambda device: True)
    monkeypatch.setattr("distopt.reducers.fused._LARGEST", largest)
    plan = powersgd().plan([Slot("0", nn.Parameter(torch.zeros(8, 9)))], Place())
    assert (plan._fused is not None) == fused
