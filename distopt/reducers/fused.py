"""The compression of a bucket on an accelerator: all of its matrices at once, and nothing asked of the device.

The plain way goes through the matrices one by one, which on an accelerator is a launch for each of a dozen operations,
and asks the device several times a bucket. Here a pass over the whole bucket is one launch or two, and what has to be
known of the numbers, whether the step is sound and which columns died, stays on the device.
"""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
from torch import Tensor

from distopt.kernels.choice import chosen
from distopt.kernels.lowrank_jobs import FLAGS
from distopt.numerics.gaussian import seeded_generator
from distopt.numerics.orthogonal import normalize_stacks
from distopt.numerics.storage import Packed, StorageDtype, Stored, pack, unpack
from distopt.reducers.factors import Factors, LowRankSettings
from distopt.reducers.matrix import Layout, Matrix
from distopt.reducers.reducer import Bucket, Slot, State

if TYPE_CHECKING:
    from distopt.kernels.compression import Compression, Form, Residual

_Side = Literal["left", "right"]

_FORMS: "Mapping[StorageDtype | None, tuple[Form, torch.dtype]]" = {
    None: ("float32", torch.float32),
    torch.float32: ("float32", torch.float32),
    torch.bfloat16: ("bfloat16", torch.bfloat16),
    torch.float16: ("float16", torch.float16),
    "1-6-9": ("1-6-9", torch.int16),
}
"""What residuals are kept in, by the setting: the kernels' word for it, and the dtype of the codes."""

_SCALED = ("float16", "1-6-9")
"""Those with a power of two for each parameter."""

_ALIGNED = 8
"""Elements that the room of a residual is filled up to, so that it can be read 16 bytes at a time."""

_LARGEST = 2**31 - 1
"""Elements of a matrix: the kernels count within one in 32 bits."""

_INFINITE = 0x7F800000
"""The bits of infinity: a flag that is smaller is the magnitude of a finite number."""


class Pending(NamedTuple):
    """What a step has found out, on its way."""

    whole: Tensor  # the average of what is sent whole, in one piece
    factors: Factors  # all factors of a side, as `Layout` lays them out, in one dimension
    side: str  # which of them came last
    stacks: Sequence[Tensor]  # these, averaged, as `Layout.stacks` gives them
    following: Sequence[Tensor | None]  # as in `Factorised`

    @property
    def last(self) -> Tensor:
        """Those that came last, averaged."""
        return self.factors.left if self.side == "left" else self.factors.right


def joined(stacks: Sequence[Tensor]) -> Tensor:
    """Stacks of transposed factors as a payload of them."""
    return stacks[0].reshape(-1) if len(stacks) == 1 else torch.cat([stack.reshape(-1) for stack in stacks])


def is_fusible(slots: Sequence[Slot], matrices: Sequence[Matrix], settings: LowRankSettings) -> bool:
    """Whether the kernels know how to compress these: on their device, in their dtype, with these settings."""
    parameters = [slot.parameter for slot in slots]
    alike = {(p.device, p.dtype) for p in parameters}
    return (
        bool(matrices)
        and len(alike) == 1
        and parameters[0].device.type != "meta"
        and chosen(parameters[0].device)
        and parameters[0].dtype in (torch.float32, torch.bfloat16, torch.float16)
        and settings.energy is None
        and settings.memory.dtype in _FORMS
        and not any(slot.optional for slot in slots)
        and all(math.prod(matrix.shape) <= _LARGEST for matrix in matrices)
    )


class Fused:
    """Compresses the matrices of a bucket wherever its gradients lie in one piece.

    Args:
        slots: that are compressed.
        matrices: all of theirs.
        settings: of the plan.
    """

    def __init__(self, slots: Sequence[Slot], matrices: Sequence[Matrix], settings: LowRankSettings) -> None:
        self._slots = slots
        self._matrices = matrices
        self._settings = settings
        self._device = slots[0].parameter.device
        self._form: Form
        self._form, self._dtype = _FORMS[settings.memory.dtype]
        sizes = [-(-slot.parameter.numel() // _ALIGNED) * _ALIGNED for slot in slots]
        self._starts = {slot.name: sum(sizes[:i]) for i, slot in enumerate(slots)}
        self._numel = sum(sizes)
        self._room: Residual | None = None
        self._views: list[Stored] = []
        self._known: tuple[Layout, tuple[int, ...], Compression] | None = None
        self._limit = torch.finfo(slots[0].parameter.dtype).max / 2 / max(matrix.rank for matrix in matrices)

    def take(self, bucket: Bucket, gradients: Mapping[str, Tensor], layout: Layout, state: State) -> "Work | None":
        """These gradients of a bucket; ``None`` if they do not lie in one piece, row by row."""
        if not all(gradient.is_contiguous() for gradient in gradients.values()):
            return None
        flat = _one_piece(list(gradients.values())) if bucket.flat is None else bucket.flat
        if flat is None:
            return None
        start = flat.storage_offset()
        places = tuple(int(gradient.storage_offset() - start) for gradient in gradients.values())
        known = self._known
        if known is None or known[0] is not layout or known[1] != places:
            known = self._known = (layout, places, self._compression(layout, dict(zip(gradients, places, strict=True))))
        return Work(known[2], layout, flat, self._residual(state), self.named(), state.step, self._limit)

    def named(self) -> dict[str, Stored]:
        """The residuals in the room, by the parameter's name."""
        return {slot.name: view for slot, view in zip(self._slots, self._views, strict=True)}

    def _compression(self, layout: Layout, places: Mapping[str, int]) -> "Compression":
        from distopt.kernels.compression import Compression
        from distopt.kernels.lowrank_jobs import Piece

        shapes: dict[_Side, list[Tensor]] = {}
        for side in ("left", "right"):
            empty = torch.empty(layout.numel(side), device="meta")
            shapes[side] = layout.each(layout.stacks(empty, side), side)
        pieces: list[Piece] = []
        scales = {slot.name: i for i, slot in enumerate(self._slots)}
        for i, matrix in enumerate(self._matrices):
            name, (rows, columns) = matrix.slot.name, matrix.shape
            before = matrix.index * rows * columns
            left, right = shapes["left"][i], shapes["right"][i]
            seed = _seed("pack", self._settings.memory.seed, matrix.key)
            residual = self._starts[name] + before
            factors = (left.shape[0], int(left.storage_offset()), int(right.storage_offset()))
            pieces.append(Piece(places[name] + before, residual, rows, columns, *factors, seed, scales[name]))
        seeds = [_seed(self._settings.seed, matrix.key, "renewed") for matrix in self._matrices]
        return Compression(pieces, self._form, seeds, self._device)

    def _residual(self, state: State) -> "Residual":
        """What is added to the gradients, and where new residuals are written: the same memory."""
        residuals = state.residuals
        mine = zip(self._slots, self._views, strict=bool(self._views))
        if self._room is not None and all(residuals.get(slot.name) is view for slot, view in mine):
            return self._room
        # Of another plan, or out of a checkpoint; and what is somebody else's must not be written to.
        from distopt.kernels.compression import Residual

        codes = torch.zeros(self._numel, dtype=self._dtype, device=self._device)
        scales = torch.zeros((len(self._slots), 2), dtype=torch.int32, device=self._device)
        self._room, self._views = Residual(codes, scales), []
        for slot, exponent in zip(self._slots, scales[:, 1], strict=True):
            start, parameter = self._starts[slot.name], slot.parameter
            view = codes[start : start + parameter.numel()].view(parameter.shape)
            mine = Packed(view, exponent, 0) if self._form in _SCALED else view
            kept = residuals.get(slot.name)
            if kept is not None:
                self._take_over(mine, kept)
            self._views.append(mine)
        return self._room

    def _take_over(self, mine: Stored, kept: Stored) -> None:
        """Fill this room with what another left behind, rounded to the nearest where it has more bits."""
        if isinstance(mine, Tensor):
            mine.copy_(unpack(kept))
            return
        if not isinstance(kept, Packed) or kept.codes.dtype != self._dtype:
            packed = pack(unpack(kept), self._settings.memory.dtype)
            assert isinstance(packed, Packed)
            kept = packed
        mine.codes.copy_(kept.codes)
        assert isinstance(mine.exponent, Tensor)
        mine.exponent.copy_(kept.exponent if isinstance(kept.exponent, Tensor) else torch.tensor(kept.exponent))


class Work:
    """The matrices M of one step.

    Args:
        kernels: that do the work.
        layout: of the factors.
        gradient: the bucket.
        residual: of all its matrices.
        residuals: the same by the parameter's name.
        step: its number.
        limit: the largest factor whose product with an orthonormal one must be within the gradient's range.
    """

    def __init__(
        self,
        kernels: "Compression",
        layout: Layout,
        gradient: Tensor,
        residual: "Residual",
        residuals: Mapping[str, Stored],
        step: int,
        limit: float,
    ) -> None:
        self._kernels = kernels
        self._layout = layout
        self._gradient = gradient
        self._residual = residual
        self._residuals = residuals
        self._step = step
        self._limit = limit
        self._in_place = gradient.dtype == torch.float32
        self._added = False
        self._flags = kernels.flags()
        self._noted = False

    def times(self, side: _Side, factor: Tensor, out: Tensor) -> None:
        """All factors of one side, P = M Q if it is the left one, Q = Mᵀ P if it is the right one.

        Args:
            side: the one that is wanted.
            factor: those of the other side.
            out: room for them.
        """
        residual = None if self._added else self._residual
        flags = None if self._noted else self._flags
        self._kernels.multiply(side, self._gradient, residual, factor, out, writes=self._in_place, flags=flags)
        self._added, self._noted = self._in_place, True

    def following(self, side: _Side, stacks: Sequence[Tensor], before: Tensor) -> list[Tensor]:
        """What the next step starts from: columns of length 1, dead ones drawn anew; of a zero gradient, ``before``.

        Args:
            side: which factors.
            stacks: these, averaged, as `Layout.stacks` gives them.
            before: what this step started from, in one piece.

        Returns:
            As ``stacks``.
        """
        units, alive = zip(*normalize_stacks([stack.mT for stack in stacks]), strict=True)
        living = torch.cat([each.reshape(-1) for each in alive])
        renewed = self._kernels.revive(side, joined([unit.mT for unit in units]), living, before, self._step + 1)
        return self._layout.stacks(renewed, side)

    def inspect(self, pending: Pending) -> Tensor:
        """Flags on the device that say whether the step is sound."""
        kernels, factors, flags = self._kernels, pending.factors, self._flags
        kernels.inspect(pending.whole, flags, 0)
        kernels.inspect(pending.last, flags, 1)
        kernels.exceed(self._gradient, factors.left, factors.right, flags, self._limit)
        return flags

    def settle(self, factors: Factors, flags: Tensor, state: State) -> None:
        """Write the averages into the gradients, and what was not sent into the residuals, if the flags let it."""
        adds = not self._added
        self._kernels.settle(self._gradient, self._residual, factors, flags, self._step, adds=adds)
        state.residuals.update(self._residuals)

    def norms(self, gradients: Mapping[str, Tensor]) -> dict[str, float]:
        """Euclidean norm of gradient plus residual, by the parameter's name. Waits for the device."""
        if self._added:
            return norms_by_name(gradients)
        return norms_by_name({name: gradients[name].float() + unpack(one) for name, one in self._residuals.items()})

    def residual_norms(self) -> dict[str, float]:
        """Euclidean norm of each residual, by the parameter's name. Waits for the device."""
        return norms_by_name({name: unpack(one) for name, one in self._residuals.items()})


def _one_piece(gradients: Sequence[Tensor]) -> Tensor | None:
    """The memory from the first of some gradients to the last; ``None`` if they do not lie in one."""
    if len({gradient.untyped_storage().data_ptr() for gradient in gradients}) > 1:
        return None
    start = min(gradient.storage_offset() for gradient in gradients)
    end = max(gradient.storage_offset() + gradient.numel() for gradient in gradients)
    return gradients[0].as_strided((end - start,), (1,), start)


def norms_by_name(tensors: Mapping[str, Tensor]) -> dict[str, float]:
    """Euclidean norms; the device is asked once."""
    norms = [torch.linalg.vector_norm(tensor, dtype=torch.float64) for tensor in tensors.values()]
    return dict(zip(tensors, torch.stack(norms).tolist(), strict=True))


def is_sound(flags: Tensor) -> Tensor:
    """Whether no flag is up: 0-dimensional, bool, on the device. All ranks have these alike."""
    return (flags[:FLAGS] < _INFINITE).all()


def _seed(*key: int | str) -> int:
    return seeded_generator(*key).initial_seed()
