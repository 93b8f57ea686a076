"""What is measured of a step: that the figures are true, that a profiler sees the phases, and when a warning is due."""

import math
import warnings

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.profiler import ProfilerActivity, profile

import distopt
from distopt.comm.requests import Gather, Swap, Within
from distopt.reducers.hierarchical import INSIDE
from tests.attach.models import batch, gradients, mlp, wrap
from tests.processes import run_ranks
from tests.reducers.test_contract import DTYPES, REDUCERS, ROUNDED_RESIDUALS, SHAPES, draw, every_name, every_reducer
from tests.simulation import Ranks

PADDED = {"PowerSGD bfloat16 wire", "PowerSGD float16 wire, alternate"}
"""Whose payload, of all factors together, is filled up to a multiple of the ranks, and scaled: of no one layer."""


class CountingRanks(Ranks):
    """Counts bytes as `Communicator` does, summed over all ranks."""

    bytes_sent = 0

    def _answer(self, requests):
        for request in requests:
            if isinstance(request, Within):
                continue
            sent = request.rows if isinstance(request, Swap) else request
            sent = sent.tensor if isinstance(sent, Gather) else sent
            returning = isinstance(request, Gather) and request.returning
            self.bytes_sent += 0 if returning else sent.numel() * sent.element_size()
        if isinstance(requests[0], Within) and requests[0].part == INSIDE:
            before = self.bytes_sent
            answer = super()._answer(requests)
            self.bytes_sent = before
            return answer
        return super()._answer(requests)


def measured(ranks, fed):
    """Take a step that is measured; what is delivered, and the figures of each rank."""
    for state in ranks.states:
        state.figures = {}
    outputs = ranks.step(fed)
    return outputs, [state.figures for state in ranks.states]


def norm(tensor):
    return float(torch.linalg.vector_norm(tensor.double()))


@every_name
@given(dtype=st.sampled_from(list(DTYPES)), world=st.integers(1, 3), seed=st.integers(0, 2**31))
def test_figures_are_what_one_computes_by_hand(name, dtype, world, seed):
    """Gradient, input and residual, from what goes in and what is kept; on one rank, from what comes out."""
    ranks = Ranks(REDUCERS[name], SHAPES, world, dtype=dtype)
    for step in range(3):
        fed = draw(world, seed + step, dtype)
        before = [{n: ranks.residual(rank, n).double().clone() for n in SHAPES} for rank in range(world)]
        outputs, figures = measured(ranks, fed)
        for rank in range(world):
            for n, of_layer in figures[rank].items():
                given = fed[rank][n].double() + before[rank][n]
                kept = given - outputs[rank][n].double() if world == 1 else ranks.residual(rank, n).double()
                rounding = 2e-6 if world == 1 else max(2e-6, ROUNDED_RESIDUALS.get(name, 0.0))
                allowed = rounding * norm(given) * math.sqrt(given.numel())
                assert of_layer.gradient_norm == pytest.approx(norm(fed[rank][n]), rel=1e-5)
                assert of_layer.input_norm == pytest.approx(norm(given), rel=1e-5)
                assert of_layer.residual_norm == pytest.approx(norm(kept), abs=allowed)
                assert of_layer.reconstruction_error == pytest.approx(norm(kept) / norm(given), abs=allowed)
                assert of_layer.residual_ratio == pytest.approx(norm(kept) / norm(fed[rank][n]), abs=allowed * 10)


@every_name
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("world", [1, 3])
def test_bytes_are_those_that_are_sent(name, dtype, world):
    """One layer a bucket, so that nothing else is sent; what has no figures went whole."""
    for layer in (n for n, shape in SHAPES.items() if len(shape) > 1 and math.prod(shape) > 0):
        ranks = CountingRanks(REDUCERS[name], {layer: SHAPES[layer]}, world, dtype=dtype)
        for step in range(3):
            ranks.bytes_sent = 0
            fed = [{layer: rank[layer]} for rank in draw(world, step, dtype)]
            _, figures = measured(ranks, fed)
            raw = fed[0][layer].numel() * fed[0][layer].element_size()
            said = [of_rank[layer] for of_rank in figures if layer in of_rank]
            padding = 4 * world**2 * len(ranks.payload_sizes) if name in PADDED and said else 0
            assert len(said) in (0, world)
            assert all(of_layer.bytes_uncompressed == raw for of_layer in said)
            total = sum(of_layer.bytes_sent for of_layer in said) if said else world * raw
            assert total <= ranks.bytes_sent <= total + padding


@every_reducer
@given(seed=st.integers(0, 2**31))
def test_figures_of_zero_gradients(reducer, seed):
    """Nothing divides by zero: no error where there is no input, an infinite ratio where only a residual is left."""
    ranks = Ranks(reducer, SHAPES, 2)
    nothing = [{name: torch.zeros(shape) for name, shape in SHAPES.items()}] * 2
    _, figures = measured(ranks, nothing)
    for of_layer in figures[0].values():
        assert (of_layer.reconstruction_error, of_layer.residual_ratio) == (0.0, 0.0)
    ranks.step(draw(2, seed))
    _, figures = measured(ranks, nothing)
    for n, of_layer in figures[0].items():
        assert of_layer.gradient_norm == 0.0
        assert of_layer.reconstruction_error <= 1.0 + 1e-6
        assert of_layer.residual_ratio == (math.inf if ranks.residual(0, n).any() else 0.0)


@every_reducer
def test_no_figures_of_what_no_rank_used(reducer):
    ranks = Ranks(reducer, SHAPES, 2, optional=True)
    for step in range(3):
        ranks.step(draw(2, step))
    fed = draw(2, 9)
    for rank in fed:
        rank["wide"] = torch.zeros(6, 20)
    _, figures = measured(ranks, fed)
    assert all("wide" not in of_rank for of_rank in figures)


@pytest.mark.parametrize("scale", [1e-30, 1e30])
@every_reducer
def test_norms_neither_vanish_nor_overflow(reducer, scale):
    """Squares of such numbers do, in float32."""
    ranks = Ranks(reducer, {"w": (16, 24)}, 2)
    fed = [{"w": scale * torch.randn(16, 24)} for _ in range(2)]
    _, figures = measured(ranks, fed)
    for of_layer in figures[0].values():
        assert of_layer.gradient_norm == pytest.approx(norm(fed[0]["w"]), rel=1e-5)
        assert of_layer.input_norm == pytest.approx(norm(fed[0]["w"]), rel=1e-5)
        assert of_layer.residual_ratio < 2


def figures_job(rank, options):
    """What three measured steps say, next to what the gradients and the residuals are."""
    torch.manual_seed(0)
    model = wrap(mlp(), **options)
    registration = distopt.register(model, distopt.PowerSGD(rank=2), measure_every=2)
    seen = []
    for step in range(4):
        before = registration.stats().residual_norm
        with model.no_sync():
            model(batch(rank, step)).square().mean().backward()
        alone = {n: norm(g) for n, g in gradients(model).items()}
        model.zero_grad()
        model(batch(rank, step)).square().mean().backward()
        model.zero_grad()
        seen.append((before, alone, registration.stats().residual_norm, registration.figures()))
    return seen


@pytest.mark.parametrize("options", [{}, {"gradient_as_bucket_view": True}], ids=["copy", "view"])
def test_figures_of_a_ddp_model(options):
    """Each rank tells of its own gradients, in the steps that are measured and in no other."""
    for seen in run_ranks(2, figures_job, options):
        for step in (0, 2):
            _, alone, after, figures = seen[step]
            assert figures.keys() == {f"{i}.weight" for i in range(5)}
            for name, of_layer in figures.items():
                assert of_layer.gradient_norm == pytest.approx(alone[name], rel=1e-5)
                assert of_layer.residual_norm == pytest.approx(after[name], rel=1e-5)
                assert (of_layer.bytes_uncompressed, of_layer.bytes_sent) == (4 * 48 * 48, 4 * 2 * 2 * 48)
            assert seen[step + 1][3] == figures


def scaled_job(rank):
    """The same steps at loss scales 1 and 1024."""
    figures = []
    for scale in (1.0, 1024.0):
        model = wrap(mlp())
        registration = distopt.register(model, distopt.PowerSGD(rank=2), measure_every=1)
        registration.set_loss_scale(scale)
        for step in range(3):
            (scale * model(batch(rank, step)).square().mean()).backward()
            model.zero_grad()
        figures.append(registration.figures())
    return figures


def test_ratios_do_not_depend_on_the_loss_scale():
    plain, scaled = run_ranks(2, scaled_job)[0]
    for name, of_layer in plain.items():
        assert scaled[name].gradient_norm == 1024 * of_layer.gradient_norm
        assert scaled[name].reconstruction_error == of_layer.reconstruction_error
        assert scaled[name].residual_ratio == of_layer.residual_ratio


def skipped_job(rank):
    """A step that should have been measured is dropped, another is paused: whether anything is known after each."""
    model = wrap(mlp())
    registration = distopt.register(model, distopt.PowerSGD(rank=2), measure_every=2)
    known = []
    for bad, paused in [(True, False), (False, False), (False, False), (False, True)]:
        registration.pause() if paused else registration.resume()
        x = batch(rank, 0)
        if bad and rank == 1:
            x[0, 0] = math.nan
        model(x).square().mean().backward()
        model.zero_grad()
        known.append(bool(registration.figures()))
    return known


def test_the_next_sound_step_is_measured_in_place_of_one_that_was_dropped():
    assert run_ranks(2, skipped_job) == [[False, True, True, True]] * 2


LABELS = {"distopt::compress", "distopt::communicate", "distopt::decompress"}


def profiled_job(rank, threads):
    """The labels that a profiler saw, and how often: of a DDP step, and of a plain list of gradients."""
    model = wrap(mlp())
    registration = distopt.register(model, distopt.PowerSGD(rank=2))
    layers = mlp()
    by_hand = distopt.register(layers.named_parameters(), distopt.PowerSGD(rank=2))
    layers(batch(rank, 0)).square().mean().backward()
    seen = []
    for work in (lambda: model(batch(rank, 0)).square().mean().backward(), by_hand.reduce):
        with profile(activities=[ProfilerActivity.CPU], experimental_config=threads and everything()) as profiler:
            work()
            registration.stats()
        seen.append({e.key: e.count for e in profiler.key_averages() if e.key.startswith("distopt::")})
    return seen, len(registration._attachment.layout())


def everything():
    """A setting of the profiler: look at all threads, not only at the one that started it."""
    return torch._C._profiler._ExperimentalConfig(profile_all_threads=True)


def test_a_profiler_of_all_threads_sees_every_phase_of_a_ddp_step():
    for (ddp, by_hand), buckets in run_ranks(2, profiled_job, True):
        assert LABELS <= ddp.keys()
        # Two rounds a bucket; each begins with the compression whose result it sends.
        assert (ddp["distopt::communicate"], ddp["distopt::compress"]) == (2 * buckets, 3 * buckets)
        assert ddp["distopt::decompress"] == 1
        assert LABELS <= by_hand.keys()


def test_a_profiler_sees_every_phase_of_what_is_reduced_on_its_own_thread():
    for (ddp, by_hand), _ in run_ranks(2, profiled_job, None):
        assert LABELS <= by_hand.keys()
        assert ddp.keys() == {"distopt::wait"}  # what backward waits for, on its own thread


class Lopsided(nn.Module):
    """Its first weight gets gradients of noise, which pile up; its second gets the same of rank one, which do not."""

    def __init__(self):
        super().__init__()
        self.noisy = nn.Parameter(torch.zeros(64, 64))
        self.plain = nn.Parameter(torch.zeros(64, 64))

    def forward(self, noise, ones):
        return (self.noisy * noise).sum() + (self.plain * ones).sum()


def warned_job(rank, bound):
    """Every warning of twenty steps."""
    model = wrap(Lopsided())
    distopt.register(model, distopt.PowerSGD(rank=1), measure_every=1, residual_bound=bound)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step in range(20):
            model(batch(rank, step, 64, rows=64), torch.ones(64, 64)).backward()
            model.zero_grad()
        return [str(warning.message) for warning in caught]


def test_a_residual_beyond_its_bound_is_warned_of_once():
    """By the name of the parameter and the figures, not at every step, and of no other parameter."""
    for messages in run_ranks(2, warned_job, 2.0):
        assert len(messages) == 1
        assert "'noisy'" in messages[0]
        assert "beyond the bound of 2" in messages[0]
    assert run_ranks(2, warned_job, 50.0) == [[], []]
