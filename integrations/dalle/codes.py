"""What stage 2 asks of a picture tokenizer, and what its codes look like: where the code vectors start."""

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
    """Describe every code by what it looks like: the mean patch of picture that it stands for, with its surroundings.

    Pictures come without captions, as in stage 1. The patches' principal components, each scaled by the square root of
    its spread, are the vectors: colours, which vary most, must not drown the form of an edge.

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
    rng = np.random.default_rng([context.seed, _STAGE])
    fine = 4 * model.grid  # 4 x 4 pixels a token are enough to tell codes apart
    total, count = torch.zeros(model.codes, 3 * 8 * 8), torch.zeros(model.codes)
    for _ in range(8):
        pictures = source.pictures(256, rng)
        codes = dvae.tokenize(pictures.to(context.device)).flatten().cpu()
        padded = F.pad(F.adaptive_avg_pool2d(pictures, fine), (2, 2, 2, 2), mode="replicate")
        patches = F.unfold(padded, 8, stride=4).transpose(1, 2).flatten(0, 1)
        total.index_add_(0, codes, patches)
        count += torch.bincount(codes, minlength=model.codes)
    used = count > 0
    mean = total[used] / count[used].unsqueeze(1)
    left, spread, _ = torch.linalg.svd(mean - mean.mean(0), full_matrices=False)
    components = left * torch.where(spread > 1e-4 * spread[:1], spread, 0.0).sqrt()
    kept = min(model.code_width, components.shape[1])
    vectors = torch.zeros(model.codes, model.code_width)
    vectors[used, :kept] = components[:, :kept]
    return vectors
