"""A discrete VAE with a quantizer in place of the relaxation: the same networks, another bottleneck between them.

The encoder's last layer gives as many channels as the bottleneck takes, the decoder's first one takes as many as it
gives. The loss is what the relaxed model's is without its KL divergence, a mean over sub-pixels, plus what the
bottleneck adds: commitment, codebook, entropy. A token is the index of a code, with no distribution over others, so
there is no evidence bound.

The bottlenecks, and their sources, are those of ``tokenizers.bottlenecks``.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from distopt.errors import SettingError

from ..tokenizers import bottlenecks
from ..tokenizers.simvq import SimVQ
from .dvae import DVAESettings, SmallNetworks
from .likelihood import edge_weights, negative_log_likelihood, view
from .paper_dvae import PaperDVAESettings, PaperNetworks


@dataclass(frozen=True, kw_only=True)
class QuantizedSettings:
    """The shape of a discrete VAE with a quantizer.

    Args:
        networks: shape of encoder and decoder; its ``codes`` are the quantizer's.
        bottleneck: name of the quantizer, see ``tokenizers.bottlenecks``.
        dimension: features of a code's vector, where the quantizer leaves the choice.
        options: further options of the quantizer, by name.

    Raises:
        SettingError: a value out of its range.
    """

    networks: DVAESettings | PaperDVAESettings
    bottleneck: str
    dimension: int = 32
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not isinstance(self.dimension, int) or self.dimension < 1:
            raise SettingError("QuantizedSettings.dimension", self.dimension, "an integer of at least 1")

    @property
    def size(self) -> int:
        """Side S of the square RGB pictures, in pixels."""
        return self.networks.size

    @property
    def grid(self) -> int:
        """Side g of the token grid."""
        return self.networks.grid

    @property
    def codes(self) -> int:
        """K."""
        return self.networks.codes

    @property
    def tokens(self) -> int:
        """Tokens in a picture, g squared."""
        return self.networks.tokens

    @property
    def likelihood(self) -> str:
        """What a reconstruction is measured by."""
        return self.networks.likelihood

    @property
    def log_scale_floor(self) -> float | None:
        """Smallest log-width of the logit-Laplace; ``None`` for none."""
        return self.networks.log_scale_floor


@dataclass(frozen=True)
class QuantizedLoss:
    """The terms of the loss, each a 0-dimensional tensor.

    Args:
        total: what is minimised.
        reconstruction: mean over sub-pixels of the (weighted) negative log-likelihood, or squared error.
        added: what the bottleneck adds, weighted, by name.
        used: how many codes occur in the batch.
    """

    total: Tensor
    reconstruction: Tensor
    added: Mapping[str, Tensor]
    used: Tensor

    def terms(self) -> dict[str, Tensor]:
        """The terms by name."""
        return {"reconstruction": self.reconstruction, **self.added, "used": self.used}


class QuantizedVAE(nn.Module):
    """Encoder, quantizer and decoder.

    Args:
        settings: its shape.

    Example:
        >>> vae = QuantizedVAE(QuantizedSettings(networks=DVAESettings(size=8, grid=2, codes=16), bottleneck="vq"))
        >>> tokens = vae.tokenize(torch.rand(3, 3, 8, 8))
        >>> tokens.shape, vae.decode(tokens).shape
        (torch.Size([3, 4]), torch.Size([3, 3, 8, 8]))
    """

    def __init__(self, settings: QuantizedSettings) -> None:
        super().__init__()
        self.settings = settings
        shape = settings.networks
        self.bottleneck = bottlenecks.build(settings.bottleneck, shape.codes, settings.dimension, **settings.options)
        ends = self.bottleneck.inputs, self.bottleneck.outputs
        if isinstance(shape, DVAESettings):
            self.networks = SmallNetworks(shape, *ends, gain=1.0, spread=ends[1] ** -0.5)
            if settings.options.get("rotation"):
                # Plain grey is zero on the way in, and would be here: a vector without a direction, which the rotation
                # trick scales without bound.
                nn.init.normal_(self.networks.to_logits.bias)  # pyright: ignore[reportArgumentType]
        else:
            self.networks = PaperNetworks(shape, *ends)

    @torch.no_grad()
    def tokenize(self, pictures: Tensor) -> Tensor:
        """Turn ``(B, 3, S, S)`` in [0, 1] into tokens ``(B, g * g)`` int64, row by row; changes nothing."""
        return self.bottleneck.encode(self.networks.encode(pictures)).flatten(1)

    @torch.no_grad()
    def decode(self, tokens: Tensor) -> Tensor:
        """Turn tokens ``(B, g * g)`` into pictures ``(B, 3, S, S)`` in [0, 1]."""
        grid = tokens.reshape(-1, self.settings.grid, self.settings.grid)
        return view(self.settings, self.networks.render(self.bottleneck.lookup(grid)))

    def forward(self, pictures: Tensor, **weights: object) -> QuantizedLoss:
        """The loss: DistributedDataParallel synchronises only what goes through here. See ``loss``."""
        return self.loss(pictures, **weights)  # pyright: ignore[reportArgumentType]

    def loss(self, pictures: Tensor, *, edges: float = 0.0, dtype: torch.dtype = torch.float32) -> QuantizedLoss:
        """What is minimised; in training mode codebooks that follow their vectors move.

        Args:
            pictures: ``(B, 3, S, S)`` in [0, 1].
            edges: as for the relaxed model, see ``relaxed.RelaxedVAE.loss``.
            dtype: what the convolutions run in, but for the two next to the bottleneck, which is in float32.

        Returns:
            The total and its terms.
        """
        found = self.bottleneck(self.networks.encode(pictures, dtype))
        errors = negative_log_likelihood(self.settings, self.networks.render(found.vectors, dtype), pictures)
        if edges:
            errors = errors * edge_weights(pictures, edges)
        reconstruction = errors.mean()
        total = reconstruction + sum(found.losses.values())
        counts = torch.bincount(found.indices.flatten(), minlength=self.settings.codes)
        added = {name: value.detach() for name, value in found.losses.items()}
        return QuantizedLoss(total, reconstruction.detach(), added, (counts > 0).sum())

    @torch.no_grad()
    def start(self, pictures: Tensor, generator: torch.Generator) -> None:
        """Place the codes, where they are free, on what the encoder makes of ``pictures``; see ``Bottleneck.start``.

        SimVQ's map begins as its authors' does: from the data, fewer codes were in use on the drawn task.
        """
        if not isinstance(self.bottleneck, SimVQ):
            self.bottleneck.start(self.networks.encode(pictures), generator)

    def units(self) -> list[nn.Module]:
        """Its residual blocks, in the order in which they run."""
        return self.networks.units()
