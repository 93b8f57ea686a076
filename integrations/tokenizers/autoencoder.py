"""A small autoencoder for small pictures, with any bottleneck: all work is done at the resolution of the grid.

A patch of pixels is folded into channels on the way in and unfolded on the way out. With 1 x 1 kernels in the encoder a
token is a function of its own patch alone; the decoder's 3 x 3 kernels let it look at the neighbours.
"""

import dataclasses
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distopt.errors import SettingError

from .bottleneck import Bottleneck, Quantized


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shape:
    """The shape of an autoencoder.

    Args:
        size: side S of the square RGB pictures, in pixels.
        grid: side g of the grid of cells; divides ``size``.
        hidden: channels of the residual stream.
        encoder_kernels: kernel size of each residual block of the encoder, odd.
        decoder_kernels: the same for the decoder.

    Raises:
        SettingError: ``grid`` does not divide ``size``.
    """

    size: int = 24
    grid: int = 6
    hidden: int = 128
    encoder_kernels: tuple[int, ...] = (1,)
    decoder_kernels: tuple[int, ...] = (3, 1)

    def __post_init__(self) -> None:
        if self.grid < 1 or self.size % self.grid:
            raise SettingError("Shape.grid", self.grid, f"a divisor of size, {self.size}")

    @property
    def patch(self) -> int:
        """Side of the patch of pixels under one cell."""
        return self.size // self.grid

    @property
    def subpixels(self) -> int:
        """Numbers in a picture."""
        return 3 * self.size**2


class Autoencoder(nn.Module):
    """An encoder, a bottleneck and a decoder.

    Args:
        shape: of both networks; their ends have as many channels as the bottleneck wants.
        bottleneck: of any kind.

    Example:
        >>> from distopt.integrations.tokenizers import bottlenecks
        >>> model = Autoencoder(Shape(), bottlenecks.build("fsq", 512, 32)).eval()
        >>> indices = model.tokenize(torch.rand(2, 3, 24, 24))
        >>> indices.shape, model.decode(indices).shape
        (torch.Size([2, 6, 6]), torch.Size([2, 3, 24, 24]))
    """

    def __init__(self, shape: Shape, bottleneck: Bottleneck) -> None:
        super().__init__()
        self.shape, folded = shape, 3 * shape.patch**2
        self.encoder = nn.Sequential(
            nn.PixelUnshuffle(shape.patch),
            convolution(folded, shape.hidden),
            *(Block(shape.hidden, kernel) for kernel in shape.encoder_kernels),
            nn.ReLU(),
            convolution(shape.hidden, bottleneck.inputs),
        )
        self.bottleneck = bottleneck
        self.decoder = nn.Sequential(
            convolution(bottleneck.outputs, shape.hidden),
            *(Block(shape.hidden, kernel) for kernel in shape.decoder_kernels),
            nn.ReLU(),
            convolution(shape.hidden, folded),
            nn.PixelShuffle(shape.patch),
        )

    def encode(self, pictures: Tensor) -> Tensor:
        """What the bottleneck is given, ``(B, inputs, g, g)``, of pictures ``(B, 3, S, S)`` in [0, 1]."""
        return self.encoder(pictures * 2 - 1)

    def forward(
        self, pictures: Tensor, generator: torch.Generator | None = None, temperature: float | None = None
    ) -> tuple[Tensor, Quantized]:
        """The reconstruction ``(B, 3, S, S)``, not clamped, and what the bottleneck made; arguments as its own."""
        quantized = self.bottleneck(self.encode(pictures), generator=generator, temperature=temperature)
        return self.picture_of(quantized.vectors), quantized

    def picture_of(self, vectors: Tensor) -> Tensor:
        """Pictures ``(B, 3, S, S)``, not clamped, of vectors ``(B, outputs, g, g)``."""
        return (self.decoder(vectors) + 1) / 2

    @torch.no_grad()
    def tokenize(self, pictures: Tensor) -> Tensor:
        """Indices ``(B, g, g)`` int64 of pictures ``(B, 3, S, S)`` in [0, 1].

        Raises:
            SettingError: the bottleneck is continuous.
        """
        return self.bottleneck.encode(self.encode(pictures))

    @torch.no_grad()
    def decode(self, indices: Tensor) -> Tensor:
        """Pictures ``(B, 3, S, S)`` in [0, 1] of indices ``(B, g, g)``.

        Raises:
            SettingError: the bottleneck is continuous.
        """
        return self.picture_of(self.bottleneck.lookup(indices)).clamp(0, 1)


class Block(nn.Module):
    """``x + f(x)`` with f: ReLU, k x k convolution to half the channels, ReLU, 1 x 1 convolution back."""

    def __init__(self, hidden: int, kernel: int) -> None:
        super().__init__()
        self.narrow = convolution(hidden, max(1, hidden // 2), kernel, gain=2.0)
        self.widen = convolution(max(1, hidden // 2), hidden)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(B, hidden, g, g)`` to the same shape."""
        return x + self.widen(F.relu(self.narrow(F.relu(x))))


def convolution(inputs: int, outputs: int, kernel: int = 1, gain: float = 1.0) -> nn.Conv2d:
    """A convolution that keeps size, and variance but for the factor ``gain``."""
    layer = nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2)
    nn.init.normal_(layer.weight, std=math.sqrt(gain / (inputs * kernel**2)))
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer


def edge_weights(pictures: Tensor, more: float) -> Tensor:
    """Weights ``(B, 1, S, S)`` of pixels, of mean 1 in each picture: ``1 + more`` times as much beside an edge.

    An edge is between neighbours that differ by more than 0.1 in some channel.

    Args:
        pictures: ``(B, 3, S, S)`` in [0, 1].
        more: how much more.
    """
    down = (pictures.diff(dim=2).abs().amax(1, keepdim=True) > 0.1).float()
    along = (pictures.diff(dim=3).abs().amax(1, keepdim=True) > 0.1).float()
    edge = F.pad(down, (0, 0, 0, 1)) + F.pad(down, (0, 0, 1, 0)) + F.pad(along, (0, 1)) + F.pad(along, (1, 0))
    weights = 1 + more * (edge > 0).float()
    return weights / weights.mean((1, 2, 3), keepdim=True)
