"""Where the gradients lie in a bucket of `DistributedDataParallel`."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from torch import Tensor, view_as_complex


class Part(NamedTuple):
    """One gradient in a bucket."""

    gradient: Tensor  # in its parameter's shape
    segment: Tensor  # the same memory as one dimension, complex numbers as pairs of real ones


class Bucketful(NamedTuple):
    """The gradients of a bucket, all of them views of its buffer."""

    names: tuple[str, ...]
    gradients: Sequence[Tensor]
    segments: Sequence[Tensor]
    buffer: Tensor

    def parts(self) -> dict[str, Part]:
        """Each gradient by its name."""
        pairs = map(Part, self.gradients, self.segments)
        return dict(zip(self.names, pairs, strict=True))


def cut(buffer: Tensor, parameters: Mapping[str, Tensor]) -> Bucketful:
    """Cut a bucket into gradients.

    `GradBucket.gradients()` cuts as if every parameter were real and row-major. DDP lays a dense gradient out like its
    parameter, so that the numbers of a transposed or channels-last one stand elsewhere.

    Args:
        buffer: one dimension, with a place for each parameter's gradient, one after another.
        parameters: by name, in their order in the bucket.

    Example:
        >>> import torch
        >>> cut(torch.arange(6.0), {"a": torch.empty(2, 2).t(), "b": torch.empty(2)}).gradients[0]
        tensor([[0., 2.],
                [1., 3.]])
    """
    parts: list[Part] = []
    start = int(buffer.storage_offset())
    for parameter in parameters.values():
        numbers = parameter.numel() * (2 if parameter.is_complex() else 1)
        parts.append(_part(buffer.as_strided((numbers,), (1,), start), parameter))
        start += numbers
    return Bucketful(tuple(parameters), [p.gradient for p in parts], [p.segment for p in parts], buffer)


def _part(segment: Tensor, parameter: Tensor) -> Part:
    flat = view_as_complex(segment.view(-1, 2)) if parameter.is_complex() else segment
    if parameter.is_contiguous() or not _is_dense(parameter):
        return Part(flat.view(parameter.shape), segment)
    return Part(flat.as_strided(parameter.shape, parameter.stride(), flat.storage_offset()), segment)


def _is_dense(tensor: Tensor) -> bool:
    """Whether the elements fill their memory without gaps or overlaps, in whatever order of dimensions."""
    expected = 1
    for stride, size in sorted((st, si) for st, si in zip(tensor.stride(), tensor.shape, strict=True) if si > 1):
        if stride != expected:
            return False
        expected *= size
    return True
