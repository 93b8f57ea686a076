"""A small discrete VAE for small pictures: all work is done at the resolution of the grid.

A patch of pixels is folded into channels on the way in and unfolded on the way out. The kernels of the residual blocks
decide how far a token sees (``encoder_kernels``) and how far it acts (``decoder_kernels``); with 1 x 1 kernels in the
encoder a token is a function of its own patch alone. The first convolution of the decoder is 1 x 1: its weights are the
codebook. The loss, and all else that does not depend on the networks, is in ``relaxed``.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distopt.errors import SettingError

from ..tokenizers.kmeans import kmeans
from .relaxed import RelaxedVAE, run_in


@dataclass(frozen=True, kw_only=True)
class DVAESettings:
    """The shape of a dVAE.

    Args:
        size: side S of the square RGB pictures, in pixels.
        grid: side g of the token grid; divides ``size``.
        codes: K.
        width: channels of the residual stream, and of a codebook vector.
        neck: channels inside a residual block.
        encoder_kernels: kernel size of each residual block of the encoder, odd.
        decoder_kernels: the same for the decoder.
        likelihood: "mse" (a Gaussian of fixed width) or "logit_laplace" (A.3).
        log_scale_floor: smallest log-width of the logit-Laplace; without one, flat background outweighs the rest.
        logit_gain: mean distance between the two best logits of a cell at the start; small gains lose codes early.

    Raises:
        SettingError: a value out of its range.
    """

    size: int = 24
    grid: int = 6
    codes: int = 192
    width: int = 128
    neck: int = 64
    encoder_kernels: Sequence[int] = (1,)
    decoder_kernels: Sequence[int] = (3, 1)
    likelihood: Literal["mse", "logit_laplace"] = "mse"
    log_scale_floor: float = -3.0
    logit_gain: float = 20.0

    def __post_init__(self) -> None:
        for name in ("size", "grid", "width", "neck"):
            if not isinstance(getattr(self, name), int) or getattr(self, name) < 1:
                raise SettingError(f"DVAESettings.{name}", getattr(self, name), "an integer of at least 1")
        if self.size % self.grid:
            raise SettingError("DVAESettings.grid", self.grid, f"a divisor of size, {self.size}")
        if not isinstance(self.codes, int) or self.codes < 2:
            raise SettingError("DVAESettings.codes", self.codes, "an integer of at least 2")
        for name in ("encoder_kernels", "decoder_kernels"):
            kernels = tuple(getattr(self, name))
            if any(not isinstance(k, int) or k < 1 or k % 2 == 0 for k in kernels):
                raise SettingError(f"DVAESettings.{name}", getattr(self, name), "a sequence of odd positive integers")
            # A list from JSON becomes what the default is: settings compare and hash by value.
            object.__setattr__(self, name, kernels)
        if self.likelihood not in ("mse", "logit_laplace"):
            raise SettingError("DVAESettings.likelihood", self.likelihood, "'mse' or 'logit_laplace'")
        if not math.isfinite(self.log_scale_floor):
            raise SettingError("DVAESettings.log_scale_floor", self.log_scale_floor, "a finite number")
        if not (math.isfinite(self.logit_gain) and self.logit_gain > 0):
            raise SettingError("DVAESettings.logit_gain", self.logit_gain, "a finite number above 0")

    @property
    def patch(self) -> int:
        """Side p of the patch of pixels under one token."""
        return self.size // self.grid

    @property
    def tokens(self) -> int:
        """Tokens in a picture, g squared."""
        return self.grid**2


class ResidualBlock(nn.Module):
    """``x + f(x)`` with f: ReLU, k x k convolution to ``neck`` channels, ReLU, 1 x 1 convolution back."""

    def __init__(self, width: int, neck: int, kernel: int) -> None:
        super().__init__()
        self.narrow = _convolution(width, neck, kernel, gain=2.0)
        self.widen = _convolution(neck, width)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(B, width, g, g)`` to the same shape."""
        return x + self.widen(F.relu(self.narrow(F.relu(x))))


class SmallNetworks(nn.Module):
    """Encoder and decoder of this shape, for whatever stands between them.

    Args:
        settings: the shape.
        outputs: channels that the encoder ends with.
        inputs: channels that the decoder begins with.
        gain: variance of an output, over that of the features that it is made from.
        spread: standard deviation of the weights of the inputs.
    """

    def __init__(self, settings: DVAESettings, outputs: int, inputs: int, *, gain: float, spread: float) -> None:
        super().__init__()
        self.settings = settings
        s, subpixels = settings, 3 * settings.patch**2
        self.encoder = nn.Sequential(
            nn.PixelUnshuffle(s.patch),
            _convolution(subpixels, s.width),
            *(ResidualBlock(s.width, s.neck, k) for k in s.encoder_kernels),
            nn.ReLU(),
        )
        self.to_logits = _convolution(s.width, outputs, gain=gain)
        self.from_codes = nn.Conv2d(inputs, s.width, 1)
        nn.init.normal_(self.from_codes.weight, std=spread)
        nn.init.zeros_(self.from_codes.bias)
        self.decoder = nn.Sequential(
            *(ResidualBlock(s.width, s.neck, k) for k in s.decoder_kernels),
            nn.ReLU(),
            _convolution(s.width, subpixels * (2 if s.likelihood == "logit_laplace" else 1)),
            nn.PixelShuffle(s.patch),
        )

    def encode(self, pictures: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Map ``(B, 3, S, S)`` in [0, 1] to ``(B, outputs, g, g)``; all but the last layer runs in ``dtype``."""
        return self.to_logits(run_in(self.encoder, pictures * 2 - 1, dtype))

    def render(self, z: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Map ``(B, inputs, g, g)`` to the likelihood's parameters; all but the first layer runs in ``dtype``."""
        return run_in(self.decoder, self.from_codes(z), dtype)

    def units(self) -> list[nn.Module]:
        """Their residual blocks, in the order in which they run."""
        return [module for module in self.modules() if isinstance(module, ResidualBlock)]


class DVAE(SmallNetworks, RelaxedVAE):
    """The relaxed categorical VAE of this shape.

    Args:
        settings: its shape.

    Example:
        >>> dvae = DVAE(DVAESettings(size=8, grid=2, codes=16))
        >>> tokens = dvae.tokenize(torch.rand(3, 3, 8, 8))
        >>> tokens.shape, dvae.decode(tokens).shape
        (torch.Size([3, 4]), torch.Size([3, 3, 8, 8]))
    """

    def __init__(self, settings: DVAESettings) -> None:
        super().__init__(settings, settings.codes, settings.codes, gain=settings.logit_gain**2, spread=1.0)

    def codebook(self) -> Tensor:
        """What the decoder makes of each code, ``(K, width)``."""
        return self.from_codes.weight.detach().flatten(1).T + self.from_codes.bias.detach()

    @torch.no_grad()
    def fit_codes(self, pictures: Tensor, generator: torch.Generator) -> None:
        """Place the codes by k-means on what the encoder makes of ``pictures``, ``(B, 3, S, S)`` in [0, 1].

        Sets the last encoder layer so that a logit falls with the squared distance between a cell's features and the
        code's centre, scaled so that the best code leads the second by ``logit_gain`` on average. Training then
        starts with all codes in use, which is easier to keep than to reach. The centres, standardised, become the
        codebook: codes that stand for similar patches start alike, and the decoder learns for all of them at once.
        """
        features = self.encoder(pictures * 2 - 1).movedim(1, -1).flatten(0, 2)
        centres = kmeans(features, self.settings.codes, generator=generator)
        best = torch.cdist(features, centres).square().topk(2, dim=1, largest=False).values
        scale = self.settings.logit_gain / (best[:, 1] - best[:, 0]).mean().clamp_min(1e-6)
        self.to_logits.weight.copy_((2 * scale * centres)[:, :, None, None])
        self.to_logits.bias.copy_(-scale * centres.square().sum(1))  # pyright: ignore[reportOptionalMemberAccess]
        spread = (centres - centres.mean(0)).square().mean().sqrt().clamp_min(1e-6)
        self.from_codes.weight.copy_(((centres - centres.mean(0)) / spread).T[:, :, None, None])


def _convolution(inputs: int, outputs: int, kernel: int = 1, gain: float = 1.0) -> nn.Conv2d:
    layer = nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2)
    nn.init.normal_(layer.weight, std=math.sqrt(gain / (inputs * kernel**2)))
    nn.init.zeros_(layer.bias)  # pyright: ignore[reportArgumentType]
    return layer
