"""How good a tokenizer is: what its codes bring back, and how many of them are in use."""

import dataclasses
from typing import Any

import numpy as np
import torch

from ..scenes.draw import Scenes, to_tensor, to_uint8
from ..scenes.read import matches_all
from .autoencoder import Autoencoder
from .codebook import Codebook
from .data import Source
from .metrics import active_units, code_use, counts_of, psnr, quantisation_error

_JUDGED = 0x1D6E
"""Makes the generator of pictures that are judged another than those of training."""
_AT_ONCE = 256
_COUNTED = 4
"""Pictures whose codes are counted, for each that is reconstructed: a large codebook needs many to show itself."""


@torch.no_grad()
def judge(model: Autoencoder, source: Source, n: int = 1024, seed: int = 0) -> dict[str, Any]:
    """Judge a trained autoencoder in eval mode, which it is left in.

    Args:
        model: which.
        source: gives the pictures; the same for the same seed.
        n: how many.
        seed: draws them.

    Returns:
        ``mse`` and ``psnr`` of the clamped reconstruction of pictures that were not trained on. Of a discrete
        bottleneck ``codes``, ``used`` (share), ``dead`` and ``perplexity``, on 4 n pictures like those of training;
        of one with a table ``quantisation_error``; of a continuous one ``active_units`` of ``units``.
    """
    model.eval()
    device = next(model.parameters()).device
    rng = np.random.default_rng([seed, _JUDGED])
    total, errors, means = 0.0, [], []
    codes = model.bottleneck.codes
    counts = torch.zeros(codes or 1, dtype=torch.int64)
    for first in range(0, n, _AT_ONCE):
        pictures = source.judged(min(_AT_ONCE, n - first), rng).to(device)
        z = model.encode(pictures)
        quantized = model.bottleneck(z)
        total += float(
            (model.picture_of(quantized.vectors).clamp(0, 1) - pictures).double().square().mean((1, 2, 3)).sum()
        )
        if codes is not None:
            for _ in range(_COUNTED):
                like = source.training(len(pictures), rng).to(device)
                counts += counts_of(model.tokenize(like).cpu(), codes)
        else:
            means.append(quantized.vectors.cpu())
        if isinstance(model.bottleneck, Codebook):
            errors.append(quantisation_error(z, quantized.vectors))
    found: dict[str, Any] = {"n": n, "mse": total / n, "psnr": psnr(total / n)}
    if codes is not None:
        found |= {"codes": codes, **dataclasses.asdict(code_use(counts))}
    if means:
        found["active_units"] = active_units(torch.cat(means))
        found["units"] = means[0][0].numel()
    if errors:
        found["quantisation_error"] = sum(errors) / len(errors)
    return found


@torch.no_grad()
def exact_scenes(model: Autoencoder, n: int = 300, seed: int = 0) -> float:
    """Share of drawn scenes that are read as what they show after the way through the bottleneck.

    Args:
        model: of 24 x 24 pictures; left in eval mode.
        n: scenes of each of the three splits.
        seed: draws them.
    """
    model.eval()
    device = next(model.parameters()).device
    rng, scenes, right = np.random.default_rng([seed, _JUDGED + 1]), Scenes(), 0
    for split in ("s0", "s1", "s2"):
        triples = [triple for triple, _ in scenes.test_captions(split, n, rng)]
        pictures = to_tensor(scenes.render(triples, rng)).to(device)
        right += sum(matches_all(to_uint8(model(pictures)[0]), triples))
    return right / (3 * n)
