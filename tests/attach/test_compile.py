"""torch.compile around a DDP model: DDP's own splitting of the graph, and the compiled form of its hook."""

import contextlib
import shutil

import pytest
import torch
import torch._dynamo
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP

import distopt
from tests.attach.models import batch, gradients, mlp
from tests.processes import run_ranks

inductor = pytest.param(
    "inductor", marks=pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
)
each_backend = pytest.mark.parametrize("backend", ["eager", "aot_eager", inductor])
REDUCER = distopt.PowerSGD(rank=2)


def train(model, call, rank, steps, accumulate=1):
    """A plain loop over ``call``; the gradients of every step."""
    seen = []
    for step in range(steps):
        for micro in range(accumulate):
            with contextlib.nullcontext() if micro == accumulate - 1 else model.no_sync():
                call(batch(rank, step * accumulate + micro, dtype=torch.float64)).square().mean().backward()
        seen.append(gradients(model))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.sub_(parameter.grad, alpha=0.05)
                parameter.grad = None
    return seen


def difference(left, right):
    return max(float((a[n] - b[n]).abs().max()) for a, b in zip(left, right, strict=True) for n in a)


def compiled_job(rank, backend):
    """Difference from an eager model's gradients, and what was compiled after two steps and in the end."""
    eager, model = DDP(mlp(3, dtype=torch.float64)), DDP(mlp(3, dtype=torch.float64))
    distopt.register(eager, REDUCER)
    expected = train(eager, eager, rank, 4)
    compiled = torch.compile(model, backend=backend)
    registration = distopt.register(compiled, REDUCER)
    torch._dynamo.utils.counters.clear()
    seen = train(model, compiled, rank, 2)
    early = dict(torch._dynamo.utils.counters["frames"])
    train(model, compiled, rank, 3)
    late = dict(torch._dynamo.utils.counters["frames"])
    registration.check_replicas()
    return difference(seen, expected[:2]), early, late, list(registration.stats().residual_norm)


@each_backend
def test_a_compiled_ddp_model_is_reduced_like_an_eager_one(backend):
    """And compiled once: our counting of forward passes asks for no other graph."""
    for error, early, late, names in run_ranks(2, compiled_job, backend, timeout=300):
        assert error < 1e-12
        assert early["ok"] > 0
        assert early == late
        assert sorted(names) == ["0.weight", "1.weight", "2.weight"]


def python_reducer_job(rank, backend, reducer, accumulate):
    """The compiled form of the hook against the usual one."""
    usual = DDP(mlp(3, dtype=torch.float64))
    distopt.register(usual, reducer)
    expected = train(usual, usual, rank, 4, accumulate)
    torch._dynamo.config.optimize_ddp = "python_reducer"
    model = DDP(mlp(3, dtype=torch.float64))
    compiled = torch.compile(model, backend=backend)
    registration = distopt.register(compiled, reducer, check_replicas_every=1)
    torch._dynamo.utils.counters.clear()
    seen = train(model, compiled, rank, 4, accumulate)
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    with pytest.raises(distopt.RegistrationError, match="DDP's backward pass reduces the gradients"):
        registration.reduce()
    return difference(seen, expected), graphs, registration.stats().steps


@each_backend
def test_the_compiled_form_of_the_hook(backend):
    for error, graphs, steps in run_ranks(2, python_reducer_job, backend, REDUCER, 1, timeout=300):
        assert error < 1e-9  # PowerSGD amplifies rounding, and the order of sums differs
        assert graphs == 1
        assert steps == 4


def test_the_compiled_form_averages_exactly_and_counts_no_micro_batches():
    for error, _, steps in run_ranks(2, python_reducer_job, "aot_eager", distopt.AllReduce(), 3, timeout=300):
        assert error < 1e-15
        assert steps == 4


class Choosy(nn.Module):
    """Uses one of its layers."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList([nn.Linear(48, 48), nn.Linear(48, 48)])

    def forward(self, x, which):
        return self.layers[which](x)


def choosy_job(rank):
    """Ranks use different layers; a backward pass that fails on the way does not silence the next."""
    torch._dynamo.config.optimize_ddp = "python_reducer"
    model = DDP(Choosy())
    registration = distopt.register(model, distopt.AllReduce())
    x = batch(rank, 0)
    model(x, rank).square().mean().backward()
    both = gradients(model)
    model.zero_grad()
    y = model(x, 0)
    y.register_hook(lambda gradient: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        y.sum().backward()
    model(torch.full_like(x, float("nan")) if rank else x, 0).sum().backward()
    spoilt = all(bool(p.grad.isnan().all()) for p in model.module.layers[0].parameters())
    return both, spoilt, registration.stats().steps, registration.stats().skipped_steps


def test_the_compiled_form_with_a_gradient_on_one_rank_only_and_a_bad_one():
    first, second = run_ranks(2, choosy_job)
    for name, gradient in first[0].items():
        assert bool(gradient.any())
        assert torch.equal(gradient, second[0][name])
    assert first[1:] == second[1:] == (True, 2, 1)


def compiled_autograd_job(rank):
    torch._dynamo.config.optimize_ddp = "python_reducer"
    model = DDP(mlp(2))
    distopt.register(model, REDUCER)
    compiled = torch.compile(model, backend="eager")
    loss = compiled(batch(rank, 0)).square().mean()
    with (
        torch._dynamo.compiled_autograd._enable(torch.compile(backend="eager")),
        pytest.raises(distopt.RegistrationError, match="compiled autograd does not tell when a backward pass is over"),
    ):
        loss.backward()
    return True


def test_compiled_autograd_is_refused_by_name():
    assert all(run_ranks(2, compiled_autograd_job, timeout=300))
