"""What every discrete VAE here has in common: the relaxation, the loss, and the way from pictures to tokens and back.

Every cell of a grid has a categorical distribution over ``K`` codes. In training it is relaxed: Gumbel noise is added
to the logits and the softmax at temperature tau is handed to the decoder, soft in both directions; straight-through
(``hard``) only where it is asked for. Tokens are the argmax of the logits without noise.

The loss is the negative evidence bound divided by the sub-pixels of a picture, ``P = 3 S S``. The KL divergence is that
of the plain categorical q against the uniform one, whatever tau is; its mean over the ``g g`` cells has the weight
``beta g g / P``: beta / 192 for the paper's 32 x 32 cells of 256 x 256 pixels. All terms are means, so the size of the
batch does not matter to any of them.

=========  =========================================================
symbol     meaning
=========  =========================================================
B          pictures in a batch
S, g       side of a picture, side of the token grid
K          codes
q          softmax of the logits, (B, K, g, g)
tau, beta  temperature of the relaxation, weight of the KL divergence
=========  =========================================================

Source: Ramesh et al. 2021 (arXiv:2102.12092), sections 2.1, A.2 and A.3.
"""

import abc
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .likelihood import Shape, edge_weights, negative_log_likelihood, view


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

    def terms(self) -> dict[str, Tensor]:
        """The terms by name."""
        return {"reconstruction": self.reconstruction, "kl": self.kl, "idle": self.idle}


class RelaxedVAE(nn.Module, abc.ABC):
    """A relaxed categorical VAE. What derives from it gives the two networks."""

    settings: Shape

    @abc.abstractmethod
    def encode(self, pictures: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Logits ``(B, K, g, g)`` of the codes; ``pictures``: ``(B, 3, S, S)`` in [0, 1]; ``dtype`` as for ``loss``."""

    @abc.abstractmethod
    def render(self, z: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """The likelihood's parameters, from weights of the codes ``(B, K, g, g)``; ``dtype`` as for ``loss``.

        ``(B, 3, S, S)`` for "mse"; ``(B, 6, S, S)`` for "logit_laplace": means, then logarithms of the widths.
        """

    @abc.abstractmethod
    def units(self) -> Sequence[nn.Module]:
        """Its residual blocks, in the order in which they run: what is sharded, and computed again, as one."""

    @torch.no_grad()
    def tokenize(self, pictures: Tensor) -> Tensor:
        """Turn ``(B, 3, S, S)`` in [0, 1] into tokens ``(B, g * g)`` int64, row by row: the argmax, no noise."""
        return self.encode(pictures).argmax(1).flatten(1)

    @torch.no_grad()
    def decode(self, tokens: Tensor) -> Tensor:
        """Turn tokens ``(B, g * g)`` into pictures ``(B, 3, S, S)`` in [0, 1]."""
        grid = tokens.reshape(-1, self.settings.grid, self.settings.grid)
        z = F.one_hot(grid, self.settings.codes).permute(0, 3, 1, 2).to(next(self.parameters()).dtype)
        return view(self.settings, self.render(z))

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
        hard: bool = False,
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
            hard: hand the decoder the likeliest code under the noise alone, with the gradient of the relaxation.
            generator: draws the Gumbel noise; ``None`` takes torch's own.
            noise: the Gumbel noise itself, ``(B, K, g, g)``, if it has been drawn already.
            dtype: what the convolutions run in, but for those that give logits and take codes (as in DALL-E).

        Returns:
            The total and its terms.
        """
        logits = self.encode(pictures, dtype)
        noise = gumbel(logits, generator) if noise is None else noise
        z = ((logits + noise) / tau).softmax(1)
        if hard:
            z = torch.zeros_like(z).scatter_(1, z.argmax(1, keepdim=True), 1.0) - z.detach() + z
        errors = negative_log_likelihood(self.settings, self.render(z, dtype), pictures)
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


def gumbel(like: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Standard Gumbel noise of the shape, dtype and device of ``like``."""
    uniform = torch.rand(like.shape, dtype=like.dtype, device=like.device, generator=generator)
    # torch.rand can give exactly 0, and never 1: without the clamp -log(-log(0)) is minus infinity.
    return uniform.clamp_min_(torch.finfo(like.dtype).tiny).log_().neg_().log_().neg_()


def run_in(part: nn.Module, x: Tensor, dtype: torch.dtype) -> Tensor:
    """Run a part of the network with convolutions in ``dtype``; what it gives has the type of ``x``."""
    if dtype == torch.float32:
        return part(x)
    with torch.autocast(x.device.type, dtype):
        return part(x).to(x.dtype)
