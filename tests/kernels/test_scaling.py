"""Scaling, filtering and rounding in one launch: the plain edition's bits, for every value and order of memory."""

import pytest
import torch

from distopt.kernels import scaling
from distopt.scaling import boundary
from distopt.scaling.boundary import enter, launchable, leave
from distopt.scaling.installation import Gauge
from tests.kernels.compiling import compiled

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
BITS = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}


@pytest.fixture(params=[True, False], ids=["triton", "torch"])
def _edition(request, monkeypatch):
    monkeypatch.setattr(boundary, "chosen", lambda device: request.param)


def values(count, dtype, seed=0):
    """Of all sizes, with what is not finite among them."""
    g = torch.Generator().manual_seed(seed)
    drawn = torch.randn(count, generator=g) * torch.exp2(torch.randint(-30, 30, (count,), generator=g).float())
    special = torch.tensor([torch.nan, -torch.nan, torch.inf, -torch.inf, 0.0, -0.0, 65504.0, -65520.0, 1e-30])
    drawn[: min(count, 9)] = special[: min(count, 9)]
    return drawn.to(DEVICE, dtype)


def expected(gradient, factor, dtype):
    return (gradient.float() * factor).nan_to_num_(0.0, 0.0, 0.0).to(dtype)


def same(one, other):
    return torch.equal(one.contiguous().view(BITS[one.dtype]), other.contiguous().view(BITS[other.dtype]))


@pytest.mark.parametrize("source", DTYPES)
@pytest.mark.parametrize("target", DTYPES)
@pytest.mark.parametrize("power", [-10, 14])
def test_scaled_is_that_of_torch_bit_for_bit(source, target, power):
    factor = torch.tensor(2.0**power, device=DEVICE)
    gradient = values(5000, source)
    result = scaling.scaled(gradient, factor, target)
    assert result.dtype == target
    right = expected(gradient, factor, target)
    if target == torch.bfloat16 and source != target and DEVICE.type == "cpu":
        # The interpreter cuts instead of rounding to bfloat16.
        right = torch.where(right.float().abs() > (gradient.float() * factor).abs(), right.nextafter(right * 0), right)
    assert same(result, right)


def test_an_overflow_of_the_product_is_filtered_and_one_of_the_rounding_is_not():
    gradient = torch.tensor([1e30, 3.0], device=DEVICE)
    result = scaling.scaled(gradient, torch.tensor(2.0**100, device=DEVICE), torch.float16)
    assert result.tolist() == [0.0, torch.inf]


@pytest.mark.parametrize("shape", [(), (0,), (1,), (3, 0), (17, 300)], ids=str)
def test_any_shape(shape):
    gradient = torch.full(shape, 3.0, device=DEVICE)
    half = torch.tensor(0.5, device=DEVICE)
    peak = torch.zeros((), device=DEVICE)
    assert torch.equal(scaling.scaled(gradient, half, torch.bfloat16), (gradient * 0.5).bfloat16())
    assert torch.equal(scaling.noted(gradient, peak, half), gradient * 0.5)
    assert float(peak) == (3.0 if gradient.numel() else 0.0)


@pytest.mark.parametrize("layout", ["transposed", "channels_last", "gaps", "expanded"])
def test_any_order_of_memory(layout):
    base = values(4 * 6 * 3 * 2, torch.float32).view(4, 6, 3, 2)
    gradient = {
        "transposed": base.transpose(0, 1),
        "channels_last": base.to(memory_format=torch.channels_last),
        "gaps": base[:, ::2],
        "expanded": base[:1, :, :1].expand(4, 6, 3, 2),
    }[layout]
    factor = torch.tensor(4.0, device=DEVICE)
    assert same(scaling.scaled(gradient, factor, torch.float16), expected(gradient, factor, torch.float16))
    unscaled = scaling.noted(gradient, torch.zeros((), device=DEVICE), factor)
    assert torch.equal(unscaled.nan_to_num(7.0), (gradient * factor).nan_to_num(7.0))


@pytest.mark.usefixtures("_edition")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("counting", [True, False])
def test_a_gauge_notes_the_largest(dtype, counting):
    gauge = Gauge(3, DEVICE)
    gauge.set(torch.tensor([3.0, 4.0, 5.0], device=DEVICE))
    gauge.clear(counting=counting)
    gradients = [values(5000, dtype, seed)[9:] for seed in (1, 2)]
    for gradient in gradients:
        taken = gauge.take(1, gradient, narrow=dtype != torch.float32)
        assert same(taken, gradient if dtype != torch.float32 else gradient * 2.0**-4)
    largest = max(float(gradient.abs().max()) for gradient in gradients)
    assert gauge.peak.tolist() == [0.0, largest, 0.0]


@pytest.mark.usefixtures("_edition")
@pytest.mark.parametrize("bad", [torch.inf, -torch.inf, torch.nan])
def test_a_gauge_notes_what_is_not_finite(bad):
    gauge = Gauge(1, DEVICE)
    for gradient in (values(50, torch.float32)[9:], torch.tensor([1.0, bad], device=DEVICE), torch.ones(2).to(DEVICE)):
        gauge.take(0, gradient, narrow=False)
    assert not bool(torch.isfinite(gauge.peak[0]))
    assert bool(gauge.peak[0].isnan()) == (bad != bad)


@pytest.mark.usefixtures("_edition")
@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_through_a_branch(dtype):
    """Both ends, with an overflow in the middle that stays inside."""
    x = torch.ones(4, 30, device=DEVICE, requires_grad=True)
    scale = torch.tensor(2.0**12, device=DEVICE)
    inner = enter(x, 1 / scale).to(dtype)
    weights = torch.full((30,), 0.25, device=DEVICE, dtype=dtype)
    weights[3] = torch.inf
    leave(inner * weights, scale).mul(2.0**-8).sum().backward()
    right = torch.full((4, 30), 2.0**-10, device=DEVICE)
    right[:, 3] = 0.0
    assert torch.equal(x.grad, right)


def test_gradients_of_gradients_are_left_to_torch(monkeypatch):
    monkeypatch.setattr(boundary, "chosen", lambda device: True)
    x = torch.ones(3, device=DEVICE, requires_grad=True)
    (first,) = torch.autograd.grad((enter(x, torch.tensor(0.5, device=DEVICE)) ** 3).sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), x)
    assert torch.equal(second, torch.full((3,), 1.5, device=DEVICE))  # filtered on both ways
    assert launchable(x.detach())
    assert not launchable(x.detach().double())


def launches():
    """An activation's gradient and parameters', in the dtypes that mixed precision has."""
    factor, peak = torch.ones(()), torch.ones(())
    for dtype in (torch.float16, torch.bfloat16):
        scaling.scaled(torch.empty(4096, 1024), factor, dtype)
        scaling.scaled(torch.empty(4096, 1024, dtype=dtype), factor, torch.float32)
        scaling.scaled(torch.empty(4096, 1024, dtype=dtype), factor, dtype)
        scaling.noted(torch.empty(1024, 1024, dtype=dtype), peak, None)
    scaling.noted(torch.empty(1024, 1024), peak, factor)


@pytest.mark.parametrize("capability", [80, 90])
def test_it_compiles_for_gpus(capability):
    kernels = compiled("tests.kernels.test_scaling", capability)
    assert len(kernels) == 9
    assert all(each.spilled == 0 and each.registers <= 64 and each.shared <= 64 * 1024 for each in kernels)
