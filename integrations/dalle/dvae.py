"""A relaxed categorical VAE: pictures become grids of discrete tokens and come back (DALL-E, section 2.1, A.2, A.3).

Every cell of the grid has a categorical distribution over ``K`` codes. In training it is relaxed: Gumbel noise is
added to the logits and the softmax at temperature tau is handed to the decoder, soft in both directions. Tokens are
the argmax of the logits without noise. The first convolution of the decoder is 1 x 1: its weights are the codebook.

All work is done at the resolution of the grid: a patch of pixels is folded into channels on the way in and unfolded
on the way out. The kernels of the residual blocks decide how far a token sees (``encoder_kernels``) and how far it
acts (``decoder_kernels``); with 1 x 1 kernels in the encoder a token is a function of its own patch alone.

=========  =========================================================
symbol     meaning
=========  =========================================================
B          pictures in a batch
S, g, p    side of a picture, side of the token grid, p = S / g
K          codes
q          softmax of the logits, (B, K, g, g)
tau, beta  temperature of the relaxation, weight of the KL divergence
=========  =========================================================
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distopt.errors import SettingError

from .kmeans import kmeans

LAPLACE_MARGIN = 0.1
"""Pixels are squeezed into [0.1, 0.9] before the logit, A.3: the density has no mass at 0 and 1."""


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


@dataclass(frozen=True)
class DVAELoss:
    """The terms of the loss, each a 0-dimensional tensor.

    Args:
        total: what is minimised.
        reconstruction: mean over sub-pixels of the (weighted) negative log-likelihood, or squared error.
        kl: mean over cells of KL(q || uniform), in nats, at most ln K.
        idle: ln K minus the entropy of the batch's mean q, in nats: 0 when all codes are used equally.
    """

    total: Tensor
    reconstruction: Tensor
    kl: Tensor
    idle: Tensor


class DVAE(nn.Module):
    """The relaxed categorical VAE.

    Args:
        settings: its shape.

    Example:
        >>> dvae = DVAE(DVAESettings(size=8, grid=2, codes=16))
        >>> tokens = dvae.tokenize(torch.rand(3, 3, 8, 8))
        >>> tokens.shape, dvae.decode(tokens).shape
        (torch.Size([3, 4]), torch.Size([3, 3, 8, 8]))
    """

    def __init__(self, settings: DVAESettings) -> None:
        super().__init__()
        self.settings = settings
        s, subpixels = settings, 3 * settings.patch**2
        self.encoder = nn.Sequential(
            nn.PixelUnshuffle(s.patch),
            _convolution(subpixels, s.width),
            *(ResidualBlock(s.width, s.neck, k) for k in s.encoder_kernels),
            nn.ReLU(),
        )
        self.to_logits = _convolution(s.width, s.codes, gain=s.logit_gain**2)
        self.from_codes = nn.Conv2d(s.codes, s.width, 1)
        nn.init.normal_(self.from_codes.weight)
        nn.init.zeros_(self.from_codes.bias)
        self.decoder = nn.Sequential(
            *(ResidualBlock(s.width, s.neck, k) for k in s.decoder_kernels),
            nn.ReLU(),
            _convolution(s.width, subpixels * (2 if s.likelihood == "logit_laplace" else 1)),
            nn.PixelShuffle(s.patch),
        )

    def codebook(self) -> Tensor:
        """What the decoder makes of each code, ``(K, width)``."""
        return self.from_codes.weight.detach().flatten(1).T + self.from_codes.bias.detach()

    def encode(self, pictures: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Logits ``(B, K, g, g)`` of the codes; ``pictures``: ``(B, 3, S, S)`` in [0, 1]; ``dtype`` as for ``loss``."""
        return self.to_logits(_run(self.encoder, pictures * 2 - 1, dtype))

    @torch.no_grad()
    def tokenize(self, pictures: Tensor) -> Tensor:
        """Turn ``(B, 3, S, S)`` in [0, 1] into tokens ``(B, g * g)`` int64, row by row: the argmax, no noise."""
        return self.encode(pictures).argmax(1).flatten(1)

    @torch.no_grad()
    def decode(self, tokens: Tensor) -> Tensor:
        """Turn tokens ``(B, g * g)`` into pictures ``(B, 3, S, S)`` in [0, 1]."""
        grid = tokens.reshape(-1, self.settings.grid, self.settings.grid)
        z = F.one_hot(grid, self.settings.codes).permute(0, 3, 1, 2).to(self.from_codes.weight.dtype)
        return self._view(self.decoder(self.from_codes(z)))

    def forward(self, pictures: Tensor, **weights: object) -> DVAELoss:
        """The loss: DistributedDataParallel synchronises only what goes through here. See ``loss``."""
        return self.loss(pictures, **weights)  # pyright: ignore[reportArgumentType]

    def loss(
        self,
        pictures: Tensor,
        *,
        tau: float,
        beta: float = 0.0,
        usage: float = 0.0,
        edges: float = 0.0,
        generator: torch.Generator | None = None,
        noise: Tensor | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> DVAELoss:
        """The negative evidence bound of the relaxed model, per sub-pixel.

        With P = 3 S S sub-pixels a picture, ``total = reconstruction + beta g g / P * kl + usage * idle``: all terms
        are means, so repeating every picture of a batch changes nothing. The KL divergence is that of the plain
        categorical q, whatever tau is.

        Args:
            pictures: ``(B, 3, S, S)`` in [0, 1].
            tau: temperature, above 0.
            beta: weight of the KL divergence; 1 is the bound itself.
            usage: weight of ``idle``, a push towards using all codes; not part of the bound.
            edges: a pixel whose channels differ from a neighbour's by up to 1 weighs up to ``1 + edges``; weights
                have mean 1 in each picture.
            generator: draws the Gumbel noise; ``None`` takes torch's own.
            noise: the Gumbel noise itself, ``(B, K, g, g)``, if it has been drawn already.
            dtype: what the convolutions run in, but for those that give logits and take codes (as in DALL-E).

        Returns:
            The total and its terms.
        """
        logits = self.encode(pictures, dtype)
        noise = gumbel(logits, generator) if noise is None else noise
        z = ((logits + noise) / tau).softmax(1)
        errors = self._negative_log_likelihood(_run(self.decoder, self.from_codes(z), dtype), pictures)
        if edges:
            errors = errors * edge_weights(pictures, edges)
        log_q = logits.log_softmax(1)
        q = log_q.exp()
        mean_q = q.mean((0, 2, 3))
        most = math.log(self.settings.codes)
        kl = most + (q * log_q).sum(1).mean()
        idle = most + torch.xlogy(mean_q, mean_q.clamp_min(torch.finfo(q.dtype).tiny)).sum()
        reconstruction = errors.mean()
        per_subpixel = self.settings.tokens / (3 * self.settings.size**2)
        total = reconstruction + beta * per_subpixel * kl + usage * idle
        return DVAELoss(total, reconstruction.detach(), kl.detach(), idle.detach())

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

    def _negative_log_likelihood(self, outputs: Tensor, pictures: Tensor) -> Tensor:
        if self.settings.likelihood == "mse":
            return (outputs * 0.5 + 0.5 - pictures).square()
        means, log_scales = outputs.chunk(2, dim=1)
        return logit_laplace(pictures, means, log_scales.clamp_min(self.settings.log_scale_floor))

    def _view(self, outputs: Tensor) -> Tensor:
        if self.settings.likelihood == "mse":
            return (outputs * 0.5 + 0.5).clamp(0, 1)
        means = outputs.chunk(2, dim=1)[0]
        return ((means.sigmoid() - LAPLACE_MARGIN) / (1 - 2 * LAPLACE_MARGIN)).clamp(0, 1)


def gumbel(like: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Standard Gumbel noise of the shape, dtype and device of ``like``."""
    uniform = torch.rand(like.shape, dtype=like.dtype, device=like.device, generator=generator)
    # torch.rand can give exactly 0, and never 1: without the clamp -log(-log(0)) is minus infinity.
    return uniform.clamp_min_(torch.finfo(like.dtype).tiny).log_().neg_().log_().neg_()


def logit_laplace(pictures: Tensor, means: Tensor, log_scales: Tensor) -> Tensor:
    """Negative log-density of the sigmoid of a Laplace variable (A.3), at pictures squeezed into [0.1, 0.9].

    Args:
        pictures: in [0, 1].
        means: of the Laplace variable, same shape.
        log_scales: logarithm of its width b, same shape.

    Returns:
        In nats, one value a sub-pixel.
    """
    x = (1 - 2 * LAPLACE_MARGIN) * pictures + LAPLACE_MARGIN
    distance = (x.logit() - means).abs() * (-log_scales).exp()
    return distance + log_scales + math.log(2) + x.log() + (1 - x).log()


def edge_weights(pictures: Tensor, edges: float) -> Tensor:
    """Weights ``(B, 1, S, S)`` with mean 1 in each picture, larger where neighbouring pixels differ.

    Args:
        pictures: ``(B, 3, S, S)`` in [0, 1].
        edges: how much more a step of 1 in some channel weighs than flat colour.
    """
    rows = (pictures[:, :, 1:] - pictures[:, :, :-1]).abs().amax(1, keepdim=True)
    columns = (pictures[..., 1:] - pictures[..., :-1]).abs().amax(1, keepdim=True)
    vertical = F.pad(rows, (0, 0, 0, 1)).maximum(F.pad(rows, (0, 0, 1, 0)))
    horizontal = F.pad(columns, (0, 1)).maximum(F.pad(columns, (1, 0)))
    weights = 1 + edges * vertical.maximum(horizontal)
    return weights / weights.mean((2, 3), keepdim=True)


def _run(part: nn.Module, x: Tensor, dtype: torch.dtype) -> Tensor:
    """Run a part of the network with convolutions in ``dtype``; what it gives has the type of ``x``."""
    if dtype == torch.float32:
        return part(x)
    with torch.autocast(x.device.type, dtype):
        return part(x).to(x.dtype)


def _convolution(inputs: int, outputs: int, kernel: int = 1, gain: float = 1.0) -> nn.Conv2d:
    layer = nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2)
    nn.init.normal_(layer.weight, std=math.sqrt(gain / (inputs * kernel**2)))
    nn.init.zeros_(layer.bias)  # pyright: ignore[reportArgumentType]
    return layer
