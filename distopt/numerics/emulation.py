"""16-bit matrix products on a CPU that has no instructions for them.

Most CPUs multiply float16 and bfloat16 matrices some tens of times slower than float32 ones. ``emulated_16bit``
computes such products in float32 and rounds the result to 16 bits. The native kernels also sum in float32 and round
the result once: they differ in the order of the sums alone. Native convolutions and attentions round in between, too.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode

_HALVES = (torch.float16, torch.bfloat16)
_ATEN = torch.ops.aten
_NAMES = ("mm", "addmm", "bmm", "baddbmm", "addbmm", "mv", "addmv", "dot", "vdot", "_addmm_activation")
_CONVOLUTIONS = (_ATEN.convolution.default, _ATEN.convolution_backward.default)
_ATTENTION = _ATEN._scaled_dot_product_flash_attention_for_cpu.default
_ATTENTIONS = (_ATTENTION, _ATEN._scaled_dot_product_flash_attention_for_cpu_backward.default)


class emulated_16bit(TorchDispatchMode):
    """Compute 16-bit products on the CPU as float32 products that are rounded to 16 bits.

    A context manager. In it, matrix products, convolutions and ``scaled_dot_product_attention`` whose operands are
    float16 or bfloat16 CPU tensors take these as they are, compute in float32 and round the result; what overflows
    becomes infinite. This covers products under ``torch.autocast("cpu", ...)``, products of 16-bit parameters, what
    torch makes of such products (``nn.Linear``, ``einsum``, ``nn.MultiheadAttention``), and the backward pass. All
    else runs as it would: other operations, types and devices, and products of mixed types, which torch refuses.

    The backward pass must run in the context too, or its products are as slow as ever. Recurrent layers keep their own
    kernels. Functions made by ``torch.compile`` run uncompiled in the context.

    Matrix products are within one unit in the last place of the native kernels' (torch 2.13) and mostly identical.
    Convolutions and attentions are within three of the largest element's.

    Example:
        >>> x = torch.full((2, 2), 300.0, dtype=torch.float16)
        >>> with emulated_16bit():
        ...     (x @ x).dtype, bool((x @ x).isinf().all())
        (torch.float16, True)
    """

    def __torch_dispatch__(
        self,
        func: OpOverload,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Called by torch for every operation in the context."""
        kwargs = kwargs or {}
        product = _PRODUCTS.get(func)
        if product is None:
            # Out of inference mode torch takes linear, matmul and the like apart before they come here.
            if torch.is_inference_mode_enabled() and func._can_decompose():  # pyright: ignore[reportPrivateUsage]
                with self:
                    return func.decompose(*args, **kwargs)
            return func(*args, **kwargs)
        half = args[0].dtype
        if half not in _HALVES or not _emulable(func, (*args, *kwargs.values()), half):
            return func(*args, **kwargs)
        out = kwargs.get("out")
        wide = {name: _widen(value) for name, value in kwargs.items() if name != "out"}
        result = _narrow(func, product(*map(_widen, args), **wide), half)
        if func is product:
            return result
        if out is None:
            return args[0].copy_(result)
        return out.resize_(result.shape).copy_(result)


def _overloads() -> dict[OpOverload, OpOverload]:
    """All products, each with its form that returns a new tensor."""
    products = {op: op for op in (*_CONVOLUTIONS, *_ATTENTIONS)}
    for name in _NAMES:
        packet = getattr(_ATEN, name)
        products[packet.default] = packet.default
        products[packet.out] = packet.default
        inplace = getattr(_ATEN, name + "_", None)
        if inplace is not None:
            products[inplace.default] = packet.default
    return products


_PRODUCTS = _overloads()


def _emulable(func: OpOverload, values: Sequence[Any], half: torch.dtype) -> bool:
    """Whether all tensors are on the CPU and of type ``half``; an attention also takes float32 ones, its own sums."""
    types = (half, torch.float32, torch.bool) if func in _ATTENTIONS else (half,)
    return all(v.device.type == "cpu" and v.dtype in types for v in values if isinstance(v, Tensor))


def _widen(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.dtype in _HALVES else value


def _narrow(func: OpOverload, result: Any, half: torch.dtype) -> Any:
    if isinstance(result, Tensor):
        return result.to(half)
    if func is _ATTENTION:
        # The second result, the logarithms of the sums, is float32 in the native kernel as well.
        return result[0].to(half), result[1]
    return tuple(None if part is None else part.to(half) for part in result)
