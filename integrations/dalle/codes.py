"""What stage 2 asks of a picture tokenizer, and what its codes look like: the vectors of the codes."""

from typing import Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from .context import Context, Source
from .transformer import TransformerSettings

_STAGE = 1_000_000_006
"""A stage number that no training batch has."""


class Codec(Protocol):
    """What stage 2 needs of a picture tokenizer: a trained ``DVAE`` is one."""

    def tokenize(self, pictures: Tensor) -> Tensor:
        """``(B, 3, H, W)`` float in [0, 1] to ``(B, G)`` int64."""
        ...

    def decode(self, tokens: Tensor) -> Tensor:
        """``(B, G)`` int64 to ``(B, 3, H, W)`` float in [0, 1]."""
        ...


@torch.no_grad()
def code_vectors(source: Source, dvae: Codec, model: TransformerSettings, context: Context) -> Tensor | None:
    """Describe every code by what it looks like, with form and colour apart.

    The mean patch of picture that a code stands for, with its surroundings, less the mean colour of all, is a form
    times a colour, up to little: the first term of its singular value decomposition. Some of a vector's components are
    the colour; the others are the principal components of the form and of what the product does not say, each scaled by
    the square root of its spread. Then codes of one form in two colours differ in the colour alone, and a network whose
    outputs meet these vectors can draw a form in a colour that it never met it in: a sum of two things that it has
    learned. Pictures come without captions, as in stage 1.

    Args:
        source: gives the pictures, the same on every rank.
        dvae: tokenises them.
        model: the number of codes, the grid and the width of the vectors.
        context: device and seed.

    Returns:
        ``(K, C)`` float32 with mean zero over the codes in use; zero for a code that is not. ``None`` where codes have
        no vectors of their own width: as in the paper, nothing of their looks is used then.
    """
    if not model.code_width:
        return None
    patches, counts = _mean_patches(source, dvae, model, context)
    used = counts > 0
    shown = _describe(patches[used], counts[used], model.code_width)
    vectors = torch.zeros(model.codes, model.code_width)
    vectors[used, : shown.shape[1]] = shown
    return vectors


def _mean_patches(source: Source, dvae: Codec, model: TransformerSettings, context: Context) -> tuple[Tensor, Tensor]:
    """The mean patch that each code stands for, ``(K, 3, 64)``, and how often it occurs, ``(K,)``."""
    rng = np.random.default_rng([context.seed, _STAGE])
    fine = 4 * model.grid  # 4 x 4 pixels a token are enough to tell codes apart
    # Adding the same patch ten thousand times in float32 would be off by a part in two thousand.
    total, count = torch.zeros(model.codes, 3 * 8 * 8, dtype=torch.float64), torch.zeros(model.codes)
    for _ in range(8):
        pictures = source.pictures(256, rng)
        codes = dvae.tokenize(pictures.to(context.device)).flatten().cpu()
        padded = F.pad(F.adaptive_avg_pool2d(pictures, fine), (2, 2, 2, 2), mode="replicate")
        patches = F.unfold(padded, 8, stride=4).transpose(1, 2).flatten(0, 1)
        total.index_add_(0, codes, patches.double())
        count += torch.bincount(codes, minlength=model.codes)
    means = total / count.clamp(min=1).unsqueeze(1)
    return means.float().unflatten(1, (3, 64)), count


def _describe(patches: Tensor, counts: Tensor, width: int) -> Tensor:
    """Give ``(n, width or less)`` of ``patches`` ``(n, 3, 64)``: form and rest, then colour, of equal spread."""
    weights = (counts / counts.sum())[:, None]
    patches = patches - (weights * patches.mean(2)).sum(0)[:, None]
    colours, amounts, forms = (part[..., 0] for part in _singular(patches))
    # Neither sign is the right one by itself: a form is where its middle, which the code stands for, is positive.
    middle = F.pad(torch.ones(4, 4), (2, 2, 2, 2)).flatten() + 0.2
    sign = torch.where((forms * middle).sum(1, keepdim=True) < 0, -1.0, 1.0)
    colours, forms, amounts = colours * sign, forms * sign, amounts[:, None]
    rest = patches - amounts[..., None] * colours[:, :, None] * forms[:, None, :]
    colours = colours * amounts / (amounts + 0.05 * amounts.max().clamp(min=1e-12))
    colours = _centred(colours)
    forms = _centred(torch.cat([amounts * forms, rest.flatten(1)], dim=1))
    left, spread, _ = torch.linalg.svd(forms, full_matrices=False)
    kept = min(max(1, width - 3), len(spread))
    forms = (left * torch.where(spread > 1e-4 * spread[:1], spread, 0.0).sqrt())[:, :kept]
    return torch.cat([_scaled(forms), _scaled(colours)], dim=1)[:, :width]


def _singular(patches: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    left, values, right = torch.linalg.svd(patches, full_matrices=False)
    return left, values, right.mT


def _centred(features: Tensor) -> Tensor:
    return features - features.mean(0)


def _scaled(features: Tensor) -> Tensor:
    """Rows of mean square length 1."""
    return features / features.square().sum(1).mean().sqrt().clamp(min=1e-12)
