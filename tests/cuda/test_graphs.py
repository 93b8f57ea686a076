"""A CUDA graph computes what its operations do one by one, at every replay, from what its inputs hold by then."""

import pytest
import torch
from torch import nn

from distopt.kernels.compression import Compression, Residual
from distopt.kernels.lowrank_jobs import Piece
from distopt.kernels.scaling import noted, scaled
from distopt.numerics.orthogonal import orthonormal_rows
from distopt.optim import AdamW

DEVICE = torch.device("cuda")


def captured(function):
    """A function that replays another, which has run before, as graphs want it; and what the other returned."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        function()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = function()
    return graph.replay, result


def drawn(*shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


@pytest.mark.parametrize(("rank", "rows"), [(1, 500), (8, 300), (32, 4096), (48, 200)])
def test_orthonormal_columns(rank, rows):
    stack = drawn(3, rank, rows, seed=0)
    replay, (found,) = captured(lambda: orthonormal_rows([stack]))
    for seed in (1, 2):
        stack.copy_(drawn(3, rank, rows, seed=seed))
        replay()
        assert torch.equal(found, orthonormal_rows([stack])[0])


class Matrix:
    """A matrix that is compressed at rank 3, step by step."""

    def __init__(self, form):
        rows, columns, rank = 72, 40, 3
        codes = {"float32": torch.float32, "bfloat16": torch.bfloat16, "1-6-9": torch.int16}[form]
        self.kernels = Compression([Piece(0, 0, rows, columns, rank, 0, 0, 5)], form, [7], DEVICE)
        self.gradient = torch.zeros(rows * columns, device=DEVICE)
        scales = torch.zeros(1, 2, dtype=torch.int32, device=DEVICE)
        self.residual = Residual(torch.zeros(rows * columns, dtype=codes, device=DEVICE), scales)
        self.right = drawn(rank * rows, seed=3)
        self.count = torch.zeros((), dtype=torch.int32, device=DEVICE)
        self.alive = torch.tensor([True, False, True]).to(DEVICE)

    def step(self, count=None):
        """One step; ``count`` is known to the host, or else to the device alone."""
        kernels, gradient, flags = self.kernels, self.gradient, self.kernels.flags()
        count = self.count if count is None else count
        left, right = (torch.empty(3 * side, device=DEVICE) for side in (40, 72))
        kernels.multiply("left", gradient, self.residual, self.right, left, writes=True, flags=flags)
        kernels.inspect(left, flags, 0)
        left = orthonormal_rows([left.view(1, 3, 40)])[0].reshape(-1)
        kernels.multiply("right", gradient, None, left, right)
        kernels.inspect(right, flags, 1)
        kernels.exceed(gradient, left, right, flags, 1e30)
        kernels.settle(gradient, self.residual, (left, right, left, right), flags, count, adds=False)
        self.right.copy_(kernels.revive("right", right, self.alive, self.right, count))
        self.count.add_(1)

    def kept(self):
        """All that lasts, and what was delivered."""
        return [t.clone() for t in (self.gradient, *self.residual, self.right, self.count)]


@pytest.mark.parametrize("form", ["float32", "bfloat16", "1-6-9"])
def test_the_compression_of_a_bucket(form):
    replayed, eager = Matrix(form), Matrix(form)
    start = replayed.kept()
    replay, _ = captured(replayed.step)
    for tensor, value in zip(
        (replayed.gradient, *replayed.residual, replayed.right, replayed.count), start, strict=True
    ):
        tensor.copy_(value)
    for step in range(3):
        for each in (replayed, eager):
            each.gradient.copy_(drawn(72 * 40, seed=10 + step))
        replay()
        eager.step(step)
        assert all(torch.equal(mine, other) for mine, other in zip(replayed.kept(), eager.kept(), strict=True))
    assert bool(eager.residual.codes.any())


def test_the_scaler():
    gradient, factor = drawn(64, 1000, seed=0), torch.tensor(4.0, device=DEVICE)
    peak = torch.zeros((), device=DEVICE)
    replay, (narrow, wide) = captured(lambda: (scaled(gradient, factor, torch.float16), noted(gradient, peak, factor)))
    for power in (2.0**3, 2.0**14):
        gradient.copy_(drawn(64, 1000, seed=1))
        factor.fill_(power)
        peak.zero_()
        replay()
        assert torch.equal(narrow, scaled(gradient, factor, torch.float16))
        assert torch.equal(wide, gradient * power)
        assert float(peak) == float(gradient.abs().max())


class Training:
    """Parameters whose gradients lie still, as in a graph, and their optimizer."""

    def __init__(self, moments, **settings):
        shapes = [(64, 80), (3, 5000), (7,)]
        self.parameters = [nn.Parameter(drawn(*shape, seed=i)) for i, shape in enumerate(shapes)]
        for parameter in self.parameters:
            parameter.grad = torch.zeros_like(parameter)
        self.lr = torch.tensor(0.01, device=DEVICE)
        lr = self.lr if settings.get("capturable") else 0.01
        self.optimizer = AdamW(self.parameters, lr=lr, moments=moments, max_variance=5.0, **settings)

    def feed(self, step):
        for i, parameter in enumerate(self.parameters):
            parameter.grad.copy_(drawn(*parameter.shape, seed=100 * step + i))

    def kept(self):
        states = [t for state in self.optimizer.state.values() for t in state.values()]
        return [t.detach() for t in (*self.parameters, *states)]


@pytest.mark.parametrize("moments", ["packed16", "bfloat16", "float32"])
def test_adamw(moments):
    """A step before the capture, replays with another learning rate, and a step of the host's in between."""
    replayed, eager, known = (Training(moments, capturable=each) for each in (True, True, False))
    replayed.feed(0)
    start = [parameter.detach().clone() for parameter in replayed.parameters]
    replay, _ = captured(replayed.optimizer.step)
    for parameter, value in zip(replayed.parameters, start, strict=True):
        parameter.detach().copy_(value)
    for state in replayed.optimizer.state.values():
        for tensor in state.values():
            tensor.zero_()
    for step in range(4):
        for each in (replayed, eager, known):
            each.feed(step)
            each.lr.fill_(0.01 / (1 + step))
        known.optimizer.param_groups[0]["lr"] = float(known.lr)
        (replayed.optimizer.step if step == 2 else replay)()
        eager.optimizer.step()
        known.optimizer.step()
        assert all(torch.equal(mine, other) for mine, other in zip(replayed.kept(), eager.kept(), strict=True))
    for mine, other in zip(eager.parameters, known.parameters, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-6)


def test_adamw_under_a_gradient_scaler():
    """A replay whose gradients overflowed changes nothing, and the host has not been asked."""
    training = Training("packed16", capturable=True)
    training.optimizer.found_inf = torch.zeros((), device=DEVICE)
    training.optimizer.grad_scale = torch.ones((), device=DEVICE)
    training.feed(0)
    replay, _ = captured(training.optimizer.step)
    before = [each.clone() for each in training.kept()]
    training.optimizer.found_inf.fill_(1.0)
    replay()
    assert all(torch.equal(mine, other) for mine, other in zip(training.kept(), before, strict=True))
    training.optimizer.found_inf.zero_()
    replay()
    assert not torch.equal(training.parameters[0], before[0])


def test_a_graph_with_backward_in_it():
    """Gradients lie in the graph's own memory then, which the optimizer sees for the first time when it is captured."""
    results = []
    for is_captured in (True, False):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(64, 128), nn.Tanh(), nn.Linear(128, 8)).to(DEVICE)
        optimizer = AdamW(model.parameters(), lr=1e-2, moments="packed16", capturable=True)
        inputs = torch.zeros(32, 64, device=DEVICE)

        def step(model=model, optimizer=optimizer, inputs=inputs):
            optimizer.zero_grad(set_to_none=True)
            model(inputs).square().mean().backward()
            optimizer.step()

        inputs.copy_(drawn(32, 64, seed=0))
        run = step
        if is_captured:
            run, _ = captured(step)
        else:
            step()
        for seed in range(1, 5):
            inputs.copy_(drawn(32, 64, seed=seed))
            run()
        results.append([parameter.detach().clone() for parameter in model.parameters()])
    for mine, other in zip(*results, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-6)
