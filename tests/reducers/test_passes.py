"""How often a step of PowerSGD goes through memory as large as the gradient, to the element."""

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from distopt import PowerSGD
from distopt.reducers.reducer import Bucket, Place, Slot, State

SHAPES = [(512, 1024), (1024, 512), (256, 256, 2, 2)]
LARGE = 2**14
"""Elements from which on a tensor counts: more than a factor has, fewer than a block of a gradient."""


class Traffic(TorchDispatchMode):
    """Counts the elements of large tensors that operations read and write."""

    def __init__(self):
        super().__init__()
        self.read, self.written = 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if func.is_view:
            return result
        given = list(zip(func._schema.arguments, args, strict=False))
        given += [(a, kwargs[a.name]) for a in func._schema.arguments if a.name in kwargs]
        for argument, value in given:
            overwritten = argument.is_out or func._overloadpacket._qualified_op_name in ("aten::copy_", "aten::fill_")
            changed = argument.alias_info is not None and argument.alias_info.is_write
            self.read += 0 if changed and overwritten else large(value)
            self.written += large(value) if changed else 0
        if all(result is not value for _, value in given):
            self.written += large(result) if func.__name__ != "empty.memory_format" else 0
        return result


def large(value):
    values = value if isinstance(value, list | tuple) else [value]
    return sum(v.numel() for v in values if isinstance(v, torch.Tensor) and v.numel() >= LARGE)


def traffic(passes, dtype, *, in_place, steps):
    """Elements read and written in the last of some steps, as multiples of the gradients'."""
    slots = [Slot(str(shape), nn.Parameter(torch.zeros(shape, dtype=dtype))) for shape in SHAPES]
    plan, state = PowerSGD(1, passes=passes).plan(slots, Place()), State()
    for _ in range(steps):
        gradients = [torch.randn(shape).to(dtype) for shape in SHAPES]
        if in_place:  # the residual has been added up with the gradient, and is handed over as it
            state.residuals.clear()
        with Traffic() as count:
            reduction = plan.reduce(Bucket(gradients, [g.view(-1) for g in gradients]), state)
            answer = None
            try:
                while True:
                    answer = next(reduction) if answer is None else reduction.send(answer)
            except StopIteration as returned:
                returned.value.commit()
        state.step += 1
    total = sum(slot.parameter.numel() for slot in slots)
    return count.read / total, count.written / total


@pytest.mark.parametrize(("passes", "steps", "products"), [("both", 2, 2), ("alternate", 2, 1), ("alternate", 3, 1)])
def test_passes_over_memory_in_float32(passes, steps, products):
    """The sum in place; each product once; what was sent taken off, the average written.

    With the residual in place, where gradients are accumulated on top of it, there is no sum to be taken: five passes,
    four where one factor travels a step.
    """
    assert traffic(passes, torch.float32, in_place=True, steps=steps) == (products + 1, 2)
    assert traffic(passes, torch.float32, in_place=False, steps=steps) == (products + 3, 3)
