"""AdamW over many parameters in one launch, each number read once and written once.

A program takes one block of a parameter: 4096 numbers, which share a scale in the packed formats and fit into a
multiprocessor's registers, so that the block's largest number is known before anything is written. Where the tensors
are stands in a table on the device, which is written anew only when one has moved. In a CUDA graph the table is the
graph's own, and what depends on the number of the step is computed on the device.

Source: Loshchilov and Hutter 2019 (arXiv:1711.05101), algorithm 2; formats: Ramesh et al. 2021 (arXiv:2102.12092).
"""

# pyright: basic, reportArgumentType=false, reportOperatorIssue=false, reportAttributeAccessIssue=false
# In Triton's language a variable is a block of numbers, and a parameter may be a constant: no annotation says so.
# pyright: reportReturnType=false, reportCallIssue=false, reportIndexIssue=false, reportGeneralTypeIssues=false
# pyright: reportInvalidTypeForm=false, reportPrivateImportUsage=false

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from distopt.errors import DistoptError
from distopt.kernels.formats import cut, decode, draws_of, encode_stochastic, shrunk

BLOCK = 4096
"""Numbers that a program works on, and that share a scale."""

_WARPS = 16
_TYPES = {
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
    torch.int16: tl.int16,
}


class Member(NamedTuple):
    """What one parameter brings to a step; all tensors flat, contiguous, in one order of elements."""

    parameter: Tensor  # float32, bfloat16 or float16
    gradient: Tensor  # likewise
    mean: Tensor  # codes: int16, bfloat16 or float32
    variance: Tensor
    mean_scales: Tensor  # float32, one a block of 4096; anything for formats without
    variance_scales: Tensor
    number: int  # which with the seed decides the rounding


class Factors(NamedTuple):
    """The numbers of a step that all its parameters have in common."""

    count: int  # of steps, this one included: with seed and number it decides the rounding
    decay: float  # 1 - lr * weight_decay
    eps: float  # times the root of the variance's bias correction
    factor: float  # -lr, times that root, over the mean's bias correction
    beta1: float
    rest1: float  # 1 - beta1, which float32 would not give exactly enough
    beta2: float
    rest2: float
    max_variance: float  # infinity for none


class Counted(NamedTuple):
    """What takes the place of the first four of `Factors` where the steps are counted on the device."""

    numbers: Tensor  # float32, (members, 4): the same four
    held: Tensor | None  # one float32; nothing happens unless it is 0


class Table:
    """Where the members of a launch are, on the device.

    What is written for a launch stays as it is as long as no tensor moves: then nothing is copied. A copy goes by way
    of pinned memory, for which the host does not wait.
    """

    def __init__(self) -> None:
        self._lengths: list[int] = []
        self._owners = (torch.empty(0), torch.empty(0))
        self._rows: list[list[int]] = []
        self._table = torch.empty(0)
        self._captured: list[tuple[Tensor, Tensor]] = []
        self.copies = 0
        """How often something was copied to the device."""

    def refreshed(self, members: Sequence[Member]) -> tuple[Tensor, Tensor, Tensor]:
        """Give the table, int64 with a row a member, and whose every full block is, and every last one, int32."""
        device = members[0].parameter.device
        lengths = [each.parameter.numel() for each in members]
        captures = _captures()
        if captures and lengths != self._lengths:
            raise DistoptError(
                "AdamW cannot begin within a CUDA graph: take a step with the same parameters before it is captured"
            )
        if lengths != self._lengths or self._owners[0].device != device:
            numbers = torch.arange(len(members), dtype=torch.int32)
            counts = torch.tensor(lengths)
            owners = numbers.repeat_interleave(counts // BLOCK), numbers[counts % BLOCK > 0]
            self._owners = (self._sent(owners[0], device), self._sent(owners[1], device))
            self._lengths, self._rows = lengths, []
        rows: list[list[int]] = []
        first = 0
        for each, length in zip(members, lengths, strict=True):
            rows.append([*(tensor.data_ptr() for tensor in each[:6]), length, first, each.number])
            first += length // BLOCK
        if captures:
            # What an address is, is written by the graph itself: no step beside it changes what it will find.
            self._captured.append(self._owners)
            table = torch.zeros((len(rows), len(rows[0])), dtype=torch.int64, device=device)
            torch._foreach_add_(list(table.view(-1).unbind()), [number for row in rows for number in row])
            return table, *self._owners
        if rows != self._rows:
            self._rows, self._table = rows, self._sent(torch.tensor(rows, dtype=torch.int64), device)
        return self._table, *self._owners

    def _sent(self, values: Tensor, device: torch.device) -> Tensor:
        self.copies += 1
        # The pinned memory is not used again before the copy is over: its allocator sees to that.
        waiting = device.type != "cuda" or values.numel() == 0
        return values.to(device) if waiting else values.pin_memory().to(device, non_blocking=True)


def step(
    table: Table,
    members: Sequence[Member],
    forms: tuple[str, str],
    factors: Factors,
    seed: int,
    counted: Counted | None = None,
) -> None:
    """Update parameters and moments in place. The update uses the moments before they are rounded.

    Args:
        table: of these members, kept from step to step.
        members: of one device, one dtype of parameters, of gradients and of moments; none of them empty.
        forms: of mean and variance: ("1-6-9", "0-6-10"), ("bfloat16", "bfloat16") or ("float32", "float32").
        factors: of the step.
        seed: of the rounding; 63 bits.
        counted: where the host does not know how many steps have been taken.

    Raises:
        DistoptError: a CUDA graph is captured, and there was no step before with as many parameters as large.
    """
    rows, *owners = table.refreshed(members)
    align = 16 if all(tensor.data_ptr() % 16 == 0 for each in members for tensor in each[:4]) else 1
    dtypes = [_TYPES[each.dtype] for each in members[0][:3]]
    clipped = factors.max_variance < float("inf")
    # Only without a mask are eight numbers loaded at once, and the registers few: so the last blocks, which are not
    # full, have a launch of their own.
    numbers, held = (rows, None) if counted is None else counted
    for part, masked in zip(owners, (False, True), strict=True):
        if part.numel():
            known = (counted is not None, held is not None)
            constants = (*dtypes, *forms, align, clipped, masked, *known, BLOCK)
            given = (rows, part, numbers, rows if held is None else held)
            _step[(part.numel(),)](*given, seed, *factors, *constants, num_warps=_WARPS)


def _captures() -> bool:
    """Whether what is launched goes into a CUDA graph."""
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


@triton.jit(do_not_specialize=["seed", *Factors._fields])
def _step(
    table,
    owners,
    numbers,
    held,
    seed: tl.int64,
    count: tl.int32,
    decay: tl.float32,
    eps: tl.float32,
    factor: tl.float32,
    beta1: tl.float32,
    rest1: tl.float32,
    beta2: tl.float32,
    rest2: tl.float32,
    max_variance: tl.float32,
    PARAMETER: tl.constexpr,
    GRADIENT: tl.constexpr,
    CODES: tl.constexpr,
    MEAN: tl.constexpr,
    VARIANCE: tl.constexpr,
    ALIGN: tl.constexpr,
    CLIPPED: tl.constexpr,
    MASKED: tl.constexpr,
    COUNTED: tl.constexpr,
    HELD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Update one block."""
    if HELD:
        if tl.load(held) != 0.0:
            return
    member = tl.load(owners + tl.program_id(0)).to(tl.int64)
    row = table + member * 9  # columns
    if COUNTED:
        count = tl.load(numbers + member * 4).to(tl.int32)
        decay = tl.load(numbers + member * 4 + 1)
        eps = tl.load(numbers + member * 4 + 2)
        factor = tl.load(numbers + member * 4 + 3)
    length = tl.load(row + 6)
    block = length // BLOCK if MASKED else tl.program_id(0) - tl.load(row + 7)
    number = tl.load(row + 8).to(tl.int32)
    parameters = _places(row, 0, block, PARAMETER, ALIGN, BLOCK)
    gradients = _places(row, 1, block, GRADIENT, ALIGN, BLOCK)
    means = _places(row, 2, block, CODES, ALIGN, BLOCK)
    variances = _places(row, 3, block, CODES, ALIGN, BLOCK)
    mean_scale = tl.load(row + 4).to(tl.pointer_type(tl.float32)) + block
    variance_scale = tl.load(row + 5).to(tl.pointer_type(tl.float32)) + block
    inside = tl.arange(0, BLOCK) < length - block * BLOCK
    parameter = _read(parameters, inside, MASKED).to(tl.float32)
    gradient = _read(gradients, inside, MASKED).to(tl.float32)
    mean = _moment(_read(means, inside, MASKED), mean_scale, beta1, MEAN)
    variance = _moment(_read(variances, inside, MASKED), variance_scale, beta2, VARIANCE)

    mean += gradient * rest1
    variance += gradient * gradient * rest2
    if CLIPPED:
        variance = tl.minimum(variance, max_variance, propagate_nan=tl.PropagateNan.ALL)
    # The fast root takes subnormal numbers for zero: with what is added there are none. It vanishes beside others.
    parameter = parameter * decay + factor * (mean / (tl.sqrt(variance + 2.0**-126) + eps))
    _write(parameters, parameter.to(PARAMETER), inside, MASKED)

    low = (block * (BLOCK // 8)).to(tl.int32) + tl.arange(0, BLOCK // 8)
    codes = _rounded(mean, mean_scale, seed, low, 2 * number, count, MEAN)
    _write(means, codes, inside, MASKED)
    codes = _rounded(variance, variance_scale, seed, low, 2 * number + 1, count, VARIANCE)
    _write(variances, codes, inside, MASKED)


@triton.jit
def _places(row, COLUMN: tl.constexpr, block, DTYPE: tl.constexpr, ALIGN: tl.constexpr, BLOCK: tl.constexpr):
    first = tl.multiple_of(tl.load(row + COLUMN).to(tl.pointer_type(DTYPE)), ALIGN)
    return first + block * BLOCK + tl.arange(0, BLOCK)


@triton.jit
def _read(places, inside, MASKED: tl.constexpr):
    if MASKED:
        values = tl.load(places, mask=inside, other=0)
    else:
        values = tl.load(places)
    return values


@triton.jit
def _write(places, values, inside, MASKED: tl.constexpr):
    if MASKED:
        tl.store(places, values, mask=inside)
    else:
        tl.store(places, values)


@triton.jit
def _moment(codes, scale, beta, FORM: tl.constexpr):
    """A moment times its decay."""
    if FORM == "1-6-9" or FORM == "0-6-10":
        values = shrunk(codes, FORM) * (tl.load(scale) * beta)
    else:
        values = decode(codes, 1.0, FORM) * beta
    return values


@triton.jit
def _rounded(values, scale, seed, low, high, count, FORM: tl.constexpr):
    """The codes of a moment; writes the scale."""
    if FORM == "float32":
        codes = values
    elif FORM == "bfloat16":
        codes = encode_stochastic(values, 1.0, draws_of(seed, low * 0 + high, low, count), FORM)
    else:
        # As integers, the bits of magnitudes are in the values' order, with NaN above all.
        largest = tl.max(values.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 0)
        # Exponent fields are 127 more than the exponent. That of the largest number is taken one unit below it, so that
        # a power of two belongs to what is below. It is mapped from (4, 8] to where a float32's field fits in six bits.
        field = tl.minimum(tl.maximum((largest - 1) >> 23, 0), 188)
        kept = tl.where(largest >= 189 << 23, 0x7FC00000, (field + 65) << 23)  # NaN for NaN and what is too large
        tl.store(scale, kept.to(tl.float32, bitcast=True))
        values = values * ((189 - field) << 23).to(tl.float32, bitcast=True)
        draws = draws_of(seed, low * 0 + high, low, count)
        if FORM == "1-6-9":
            codes = cut(values, draws, 9, 6, 1)
        else:
            # The divisor of the update must not become zero where the numerator has not.
            codes = cut(tl.maximum(values, 2.0**-126), draws, 10, 6, 0)
    return codes
