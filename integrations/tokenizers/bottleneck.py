"""What every bottleneck is: between the encoder's ``(B, inputs, h, w)`` and the decoder's ``(B, outputs, h, w)``.

A discrete bottleneck gives every cell of the grid one of ``codes`` indices; `encode` and `lookup` are the two halves
that a model of the indices needs. Distances, the argmin and the arithmetic of indices are float32 or integers under
every autocast: in bfloat16 half of FSQ's codes are never met (lucidrains/vector-quantize-pytorch#114).
"""

import abc
import contextlib
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from distopt.errors import SettingError


@dataclass(frozen=True)
class Quantized:
    """What a bottleneck makes of the encoder's output.

    Args:
        vectors: ``(B, D, h, w)`` float32, what the decoder is given; its gradient is the bottleneck's own.
        indices: ``(B, h, w)`` int64; ``None`` if the bottleneck is continuous.
        losses: weighted terms by name, scalars, to be added to the reconstruction's; may be empty.
    """

    vectors: Tensor
    indices: Tensor | None
    losses: Mapping[str, Tensor]


class Bottleneck(nn.Module, abc.ABC):
    """What lies between an encoder and a decoder. Kinds are made by ``bottlenecks.build``.

    Args:
        inputs: channels of what the encoder gives.
        outputs: channels of what the decoder is given.
        codes: K, how many codes there are; ``None`` if it is continuous.
    """

    inputs: int
    outputs: int
    codes: int | None

    def __init__(self, inputs: int, outputs: int, codes: int | None) -> None:
        super().__init__()
        self.inputs, self.outputs, self.codes = inputs, outputs, codes

    @abc.abstractmethod
    def forward(
        self, z: Tensor, *, generator: torch.Generator | None = None, temperature: float | None = None
    ) -> Quantized:
        """Pass ``z`` through.

        In training, bottlenecks with statistics of their own (EMA codebooks) communicate here: under
        ``torch.distributed`` all ranks call it equally often.

        Args:
            z: ``(B, inputs, h, w)``.
            generator: draws noise, for the kinds that have any, in training alone; ``None`` takes torch's own.
            temperature: of the relaxation, for the kind that has one; ``None`` leaves the kind's own. The others take
                it and do not look at it, so that one trainer serves all.
        """

    @abc.abstractmethod
    def encode(self, z: Tensor) -> Tensor:
        """Indices ``(B, h, w)`` int64 of ``(B, inputs, h, w)``: deterministic, without gradient.

        Raises:
            SettingError: the bottleneck is continuous.
        """

    @abc.abstractmethod
    def lookup(self, indices: Tensor) -> Tensor:
        """Vectors ``(B, outputs, h, w)`` float32 of indices ``(B, h, w)``: what forward gives in eval mode, to the bit.

        Raises:
            SettingError: the bottleneck is continuous, or there is no such index.
        """

    def start(self, z: Tensor, generator: torch.Generator) -> None:
        """Begin from data, for the kinds that can; the others do nothing. Collective; all ranks end with the same.

        Args:
            z: ``(B, inputs, h, w)``, this rank's part of what the untrained encoder makes of some pictures; the parts
                of all ranks are gathered.
            generator: draws what is drawn, on the CPU; the first rank's counts.
        """


def rows_of(z: Tensor) -> Tensor:
    """Cells as rows: ``(B, C, h, w)`` to ``(B * h * w, C)`` float32."""
    return z.movedim(1, -1).flatten(0, 2).float()


def grid_of(rows: Tensor, like: Tensor) -> Tensor:
    """Rows as cells: ``(B * h * w, C)`` or ``(B * h * w,)`` to ``(B, C, h, w)``, with B, h and w those of ``like``.

    B may be 0: a rank that has run out of pictures still takes part in what is collective.
    """
    batch, _, height, width = like.shape
    return rows.reshape(batch, height, width, rows.shape[1] if rows.dim() > 1 else 1).movedim(-1, 1).contiguous()


def in_float32(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """The context in which autocast is off on ``device``."""
    return torch.autocast(device.type, enabled=False)


def passed_through(z: Tensor, chosen: Tensor) -> Tensor:
    """``chosen``, to the bit, with the gradient handed to ``z`` as it is: straight-through.

    Source: Bengio et al. 2013 (arXiv:1308.3432); van den Oord et al. 2017 (arXiv:1711.00937), section 3.2. Written as a
    difference that is 0, for ``z + (chosen - z)`` is not ``chosen`` in its last bits.

    Example:
        >>> z = torch.tensor([0.1], requires_grad=True)
        >>> passed_through(z, torch.tensor([0.3])).backward(torch.tensor([5.0]))
        >>> z.grad
        tensor([5.])
    """
    return chosen.detach() + (z - z.detach())


def check(name: str, value: object, low: float, high: float, *, whole: bool = False) -> None:
    """Refuse a number out of its range.

    Raises:
        SettingError: names it.

    Example:
        >>> check("VQ.codes", 1, 2, 65536, whole=True)
        Traceback (most recent call last):
            ...
        distopt.errors.SettingError: VQ.codes is 1, but must be a whole number from 2 to 65536
    """
    number = value if isinstance(value, int if whole else int | float) and not isinstance(value, bool) else None
    if number is None or not low <= number <= high:
        words = f"a {'whole ' if whole else ''}number from {low:g} to {high:g}" if high < MOST_CODES else ""
        words = words or f"a {'whole ' if whole else ''}number from {low:g} to {high}"
        raise SettingError(name, value, words)


def check_flag(name: str, value: object) -> None:
    """Refuse what is neither true nor false: the text "no" would count as true.

    Raises:
        SettingError: names it.

    Example:
        >>> check_flag("VQ.rotation", "no")
        Traceback (most recent call last):
            ...
        distopt.errors.SettingError: VQ.rotation is 'no', but must be true or false
    """
    if not isinstance(value, bool):
        raise SettingError(name, value, "true or false")


def check_indices(indices: Tensor, codes: int) -> None:
    """Refuse indices that are none: digits and bits of one that is too large would be those of another code.

    Raises:
        SettingError: names the smallest or the largest.

    Example:
        >>> check_indices(torch.tensor([[3, 8]]), 8)
        Traceback (most recent call last):
            ...
        distopt.errors.SettingError: indices is 8, but must be whole numbers from 0 to 7
    """
    if not indices.numel():
        return
    least, most = (int(each) for each in indices.aminmax())
    if least < 0 or most >= codes:
        raise SettingError("indices", least if least < 0 else most, f"whole numbers from 0 to {codes - 1}")


MOST_CODES = 2**20
"""Codes that a codebook may have, and the largest number that a setting may be."""
