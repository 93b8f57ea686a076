"""What kernels ask of the host: nothing is read back from the device, and each runs where its tensors are.

On a CPU the interpreter computes for real, but out of sight: what is looked at is the code around the launches.
"""

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from triton.runtime.interpreter import InterpretedFunction
from triton.runtime.jit import JITFunction

from distopt import PowerSGD
from distopt.kernels.scaling import noted, scaled
from distopt.numerics.orthogonal import orthonormal_rows
from distopt.optim import AdamW
from distopt.reducers.reducer import Bucket, Place, Slot, State

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ASKED = (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default, torch.ops.aten.equal.default)
SHAPES = [(24, 16), (16, 24), (24, 16), (6, 4, 3)]


class Unasked(TorchDispatchMode):
    """Refuses operations for whose outcome the host would wait, copies between devices among them."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func not in ASKED, func
        result = func(*args, **(kwargs or {}))
        if func in (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default):
            devices = {t.device.type for t in (*args, result) if isinstance(t, torch.Tensor)}
            assert len(devices) == 1, devices
        return result


@pytest.fixture
def launched(monkeypatch):
    """Names of the kernels that were launched: each on its tensors' device, each out of sight of `Unasked`."""
    names, entered = [], []
    device_of = torch.cuda.device_of

    class Entered(device_of):
        def __enter__(self):
            entered.append(True)
            return super().__enter__()

        def __exit__(self, *details):
            entered.pop()
            return super().__exit__(*details)

    monkeypatch.setattr(torch.cuda, "device_of", Entered)
    for kind in (InterpretedFunction, JITFunction):
        run = kind.run

        def out_of_sight(self, *args, run=run, **kwargs):
            names.append(self.fn.__name__)
            assert entered, f"{self.fn.__name__} runs on the current device"
            with _disable_current_modes():
                return run(self, *args, **kwargs)

        monkeypatch.setattr(kind, "run", out_of_sight)
    for place in ("reducers.fused", "numerics.orthogonal", "optim.fused"):
        monkeypatch.setattr(f"distopt.{place}.chosen", lambda device: True)
    return names


def test_a_reading_is_found():
    """Or the tests below would show nothing."""
    for asks in (lambda: float(torch.ones(1)), lambda: torch.ones(2).nonzero(), lambda: bool(torch.ones(2).any())):
        with Unasked(), pytest.raises(AssertionError):
            asks()


@pytest.mark.parametrize("rank", [1, 5, 33])
def test_orthonormal_columns(launched, rank):
    stacks = [torch.randn(1, rank, 36, device=DEVICE), torch.randn(1, rank, 34, device=DEVICE)]
    orthonormal_rows(stacks)  # tables of these shapes are made once
    launched.clear()
    with Unasked():
        orthonormal_rows(stacks)
    assert launched


@pytest.mark.parametrize("passes", ["both", "alternate"])
@pytest.mark.parametrize("residual_dtype", [None, torch.float16, "1-6-9"], ids=str)
def test_a_bucket(launched, passes, residual_dtype):
    """A whole step, factors that are drawn anew included; whether it is sound stays on the device."""
    slots = [Slot(str(i), nn.Parameter(torch.zeros(shape, device=DEVICE))) for i, shape in enumerate(SHAPES)]
    reducer = PowerSGD(rank=3, min_saving=-1e9, passes=passes, residual_dtype=residual_dtype)
    plan, state = reducer.plan(slots, Place()), State()
    for step in range(3):
        flat = torch.randn(sum(slot.parameter.numel() for slot in slots), device=DEVICE)
        segments = flat.split([slot.parameter.numel() for slot in slots])
        gradients = [part.view(slot.parameter.shape) for part, slot in zip(segments, slots, strict=True)]
        reduction = plan.reduce(Bucket(gradients, segments, flat), state)
        if step == 2:
            launched.clear()
            with Unasked():
                committed(reduction)
        else:
            committed(reduction)
        state.step += 1
    assert set(launched) >= {"multiply", "inspect", "exceed", "settle", "revive"}
    assert ("rescale" in launched) == (residual_dtype is not None)


def committed(reduction):
    """Reduce over one rank, and take the step."""
    try:
        request = next(reduction)
        while True:
            request = reduction.send(request)
    except StopIteration as returned:
        returned.value.commit()


def test_the_scaler(launched):
    gradient, factor = torch.randn(64, 33, device=DEVICE), torch.tensor(4.0, device=DEVICE)
    with Unasked():
        scaled(gradient, factor, torch.float16)
        noted(gradient, torch.zeros((), device=DEVICE), factor)
    assert launched == ["_scale", "_note"]


@pytest.mark.parametrize("moments", ["packed16", "bfloat16", "float32"])
def test_adamw_that_counts_on_the_device(launched, moments):
    parameters = [nn.Parameter(torch.randn(shape, device=DEVICE)) for shape in ((64, 80), (7,))]
    optimizer = AdamW(parameters, moments=moments, capturable=True)
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    launched.clear()
    optimizer.found_inf, optimizer.grad_scale = torch.zeros((), device=DEVICE), torch.ones((), device=DEVICE)
    with Unasked():
        optimizer.step()
    assert set(launched) == {"_step"}
