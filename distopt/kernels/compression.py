"""The passes of a low-rank compression over all matrices of a bucket, in a few launches each.

Nothing here waits for the device. What is made once, when a bucket is seen first, are the tables; a step takes room for
partial sums from torch's allocator, so it can be captured in a CUDA graph.
"""

# pyright: reportCallIssue=false, reportArgumentType=false
# A launch takes options that are no parameters of the kernel, and plain numbers for its constants.

from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from distopt.kernels import columns as column_kernels
from distopt.kernels import lowrank
from distopt.kernels.lowrank_jobs import (
    FLAGS,
    GATHERED,
    Group,
    Piece,
    Side,
    Table,
    by_column,
    by_pair,
    group_of,
    grouped,
)

Form = Literal["float32", "bfloat16", "float16", "1-6-9"]
"""What residuals are kept in."""

TOPS: Mapping[Form, int] = {"float16": 15, "1-6-9": 3}
"""Forms with a power of two, after which what is stored is at most 2 to this: half of what they hold."""

PRECISION = "tf32x3"


Factors = tuple[Tensor, Tensor, Tensor, Tensor]
"""Payloads of transposed factors, float32, one dimension: left and right ones as averaged, and as this rank put them
in."""


class Residual(NamedTuple):
    """What was not sent.

    Args:
        codes: of all matrices, one dimension: float32, bfloat16 or float16, or int16 for 1-6-9.
        scales: int32, ``(parameters, 2)``: the powers of two of float16 and 1-6-9, as exponents. The second is the
            present one, the first belongs to the step before. Other forms do not look at it.
    """

    codes: Tensor
    scales: Tensor


class Compression:
    """The compression of one bucket.

    Args:
        pieces: its matrices.
        form: what residuals are kept in.
        seeds: of the columns that are drawn anew, one a matrix.
        device: of gradients, residuals and factors.
    """

    def __init__(self, pieces: Sequence[Piece], form: Form, seeds: Sequence[int], device: torch.device) -> None:
        self.form = form
        self._device = device
        self._groups = [group_of(group, device) for group in grouped(pieces)]
        self._columns: dict[Side, Table] = {side: by_column(pieces, side, seeds, device) for side in ("left", "right")}
        self._pairs, self._scales = by_pair(pieces, device) if form in TOPS else (None, None)

    def multiply(
        self,
        side: Side,
        gradient: Tensor,
        residual: Residual | None,
        factor: Tensor,
        out: Tensor,
        *,
        writes: bool = False,
        flags: Tensor | None = None,
    ) -> None:
        """Multiply every M by its factor of the other side.

        Args:
            side: which factors are wanted: ``"left"`` gives P = M Q, ``"right"`` gives Q = Mᵀ P.
            gradient: one dimension, float32, bfloat16 or float16.
            residual: what is added to it; ``None`` for nothing.
            factor: float32, the known factors as a payload.
            out: float32, room for the wanted ones.
            writes: whether the sums take the gradients' place, which is for float32 ones.
            flags: see `FLAGS`; where they are given, the largest elements of M are noted in them. One product of a step
                has to.
        """
        peaks = None if flags is None or self._scales is None else flags[FLAGS:]
        for group in self._groups:
            product, more, keeps = group.products[side], residual, writes
            if writes and residual is not None and product.chunks > 1:  # several programs read what one would write
                self._add(group, gradient, residual)
                more, keeps = None, False
            partial = torch.empty(product.partial, dtype=torch.float32, device=self._device)
            cut = product.cut
            self._launch(
                lowrank.multiply,
                product.work.programs,
                gradient,
                gradient if more is None else more.codes,
                factor,
                out,
                partial,
                product.work.numbers if more is None else more.scales,
                product.work.numbers if peaks is None else peaks,
                product.work.lines,
                product.work.numbers,
                TALL_SUM=group.tall == (side == "left"),
                ADDS=more is not None,
                WRITES=keeps and more is not None,
                PEAKS=peaks is not None,
                FORM=self.form,
                UNIT=group.unit,
                PLACE=group.place,
                RANK=cut.rank,
                KEPT=cut.kept,
                SUMMED=cut.summed,
                PRECISION=PRECISION,
                num_warps=4 if cut.rank <= 32 else 8,
                num_stages=3,
            )
            if product.sums is not None:
                sums = product.sums
                self._launch(lowrank.gather, sums.programs, partial, out, sums.lines, sums.numbers, BLOCK=GATHERED)

    def flags(self) -> Tensor:
        """Flags that are down."""
        parameters = 0 if self._scales is None else self._scales.programs
        return torch.zeros(FLAGS + parameters, dtype=torch.int32, device=self._device)

    def inspect(self, numbers: Tensor, flags: Tensor, which: int) -> None:
        """Raise a flag to the largest magnitude in ``numbers``, float32 of one dimension, as bits."""
        if numbers.numel() > 0:
            self._launch(
                column_kernels.inspect, -(-numbers.numel() // 4096), numbers, numbers.numel(), flags[which:], BLOCK=4096
            )

    def exceed(self, gradient: Tensor, left: Tensor, right: Tensor, flags: Tensor, limit: float) -> None:
        """Raise the last flag if a product of averaged factors is beyond the range of the gradient's dtype.

        Args:
            gradient: the bucket.
            left: Pᵀ of all matrices.
            right: Qᵀ.
            flags: the second one holds the largest magnitude of those that are not orthonormal.
            limit: below which that one means that no product can be.
        """
        for group in self._groups:
            rows, columns, rank = group.tile
            self._launch(
                lowrank.exceed,
                min(group.tiles.programs, 1024),
                gradient,
                left,
                right,
                flags,
                group.tiles.lines,
                group.tiles.numbers,
                group.tiles.programs,
                limit,
                TALL=group.tall,
                UNIT=group.unit,
                PLACE=group.place,
                RANK=rank,
                ROWS=rows,
                COLUMNS=columns,
                PRECISION=PRECISION,
                num_warps=group.warps,
            )

    def settle(
        self, gradient: Tensor, residual: Residual, factors: Factors, flags: Tensor, step: int | Tensor, *, adds: bool
    ) -> None:
        """Give each gradient P Qᵀ, and each residual what this rank has not sent; nothing of the kind if a flag is up.

        Args:
            gradient: holds M, or what M is together with the residual if ``adds``.
            residual: changed in place.
            factors: as averaged and as put in; one side, at least, is the same tensor in both.
            flags: see `FLAGS`. If one is up, the gradient becomes NaN and the residual stays as it is.
            step: for the draws, from 0; in a CUDA graph a tensor of one int32, which is read when it is replayed.
            adds: whether the residual is still to be added.
        """
        left, right, own_left, own_right = factors
        self._rescale(residual.scales, factors, flags)
        for group in self._groups:
            rows, columns, rank = group.tile
            self._launch(
                lowrank.settle,
                group.tiles.programs,
                gradient,
                residual.codes,
                left,
                right,
                own_left,
                own_right,
                flags,
                residual.scales,
                group.tiles.lines,
                group.tiles.numbers,
                step,
                TALL=group.tall,
                ADDS=adds,
                SAME_LEFT=left is own_left,
                SAME_RIGHT=right is own_right,
                COUNTED=isinstance(step, Tensor),
                FORM=self.form,
                UNIT=group.unit,
                PLACE=group.place,
                RANK=rank,
                ROWS=rows,
                COLUMNS=columns,
                EARLY=columns < 128,
                PRECISION=PRECISION,
                num_warps=group.warps,
            )

    def revive(self, side: Side, units: Tensor, alive: Tensor, before: Tensor, step: int | Tensor) -> Tensor:
        """Factors for the next step: columns that live as they are, others drawn; those of a zero matrix as before.

        Args:
            side: which factors.
            units: float32, a payload of transposed factors with columns of length 1.
            alive: bool, one a column, in the payload's order.
            before: what this step started from, laid out likewise.
            step: as in `settle`.

        Returns:
            A payload like ``units``.
        """
        following, table = torch.empty_like(units), self._columns[side]
        self._launch(
            column_kernels.revive,
            table.programs,
            units,
            alive.to(torch.int8),
            before,
            following,
            table.lines,
            step,
            COUNTED=isinstance(step, Tensor),
            BLOCK=1024,
        )
        return following

    def _launch(self, kernel: Any, programs: int, *arguments: object, **options: object) -> None:
        """Launch a kernel on the device where its tables are, whichever is the current one."""
        with torch.cuda.device_of(self._columns["left"].lines):
            kernel[(programs,)](*arguments, **options)

    def _rescale(self, scales: Tensor, factors: Factors, flags: Tensor) -> None:
        """Choose the powers of two that new residuals get, where the form has any; no host looks at them."""
        if self._pairs is None or self._scales is None:
            return
        left, right, own_left, own_right = factors
        bounds = torch.empty(self._pairs.programs, dtype=torch.float32, device=self._device)
        same = {"SAME_LEFT": left is own_left, "SAME_RIGHT": right is own_right}
        self._launch(
            column_kernels.bound,
            self._pairs.programs,
            left,
            right,
            own_left,
            own_right,
            bounds,
            self._pairs.lines,
            **same,
            BLOCK=1024,
        )
        self._launch(
            column_kernels.rescale,
            self._scales.programs,
            bounds,
            flags,
            flags[FLAGS:],
            scales,
            self._scales.lines,
            TOP=TOPS[self.form],
            BLOCK=32,
        )

    def _add(self, group: Group, gradient: Tensor, residual: Residual) -> None:
        rows, columns, _ = group.tile
        tiles = group.tiles
        self._launch(
            lowrank.add,
            tiles.programs,
            gradient,
            residual.codes,
            residual.scales,
            tiles.lines,
            tiles.numbers,
            FORM=self.form,
            UNIT=group.unit,
            ROWS=rows,
            COLUMNS=columns,
        )
