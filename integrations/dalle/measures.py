"""What a model makes of given pictures: how well they come back, which codes they use, and what bound they have."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .bounds import bits_per_dimension, bound, fitted_width
from .metrics import psnr, ssim
from .model import Model
from .relaxed import RelaxedVAE
from .stage1 import usage

_BATCH = 256
"""Pictures that are worked on at once."""


@torch.no_grad()
def measure(model: Model, captions: Sequence[str], pictures: Tensor, seed: int) -> dict[str, Any]:
    """Measure a model on pictures with captions.

    Args:
        model: what to measure.
        captions: B texts.
        pictures: ``(B, 3, S, S)`` in [0, 1].
        seed: draws the codes of the bound.

    Returns:
        ``n``; ``mse``, ``psnr`` (of the mean error) and ``ssim`` of what the argmax tokens bring back; ``codes_used``,
        ``perplexity`` and ``codes``; ``bound``, means over pictures in nats and bits, see ``bounds``: ``nats`` (its two
        terms are ``reconstruction`` and ``kl``) and ``bits_per_dimension`` under the uniform prior, the same with
        ``_prior`` under the transformer's, and ``width`` of the Gaussian if that is the density; ``None`` for a
        tokenizer with a quantizer, which gives no distribution over codes; ``image_loss``, nats a token of the argmax
        tokens under the transformer.
    """
    device = model.transformer.start.device
    generator = torch.Generator(device).manual_seed(seed)
    codes = torch.cat([model.dvae.tokenize(part.to(device)) for part in pictures.split(_BATCH)])
    decoded = torch.cat([model.dvae.decode(part).cpu() for part in codes.split(_BATCH)])
    total = model.transformer.settings.codes
    error = float((decoded - pictures).double().square().mean())
    used, perplexity = usage(codes, total)
    return {
        "n": len(pictures),
        "mse": error,
        "psnr": psnr(error),
        "ssim": float(ssim(pictures, decoded).mean()),
        "codes_used": used,
        "perplexity": perplexity,
        "codes": total,
        "image_loss": _cross_entropy(model, captions, codes) / codes.shape[1],
        "bound": _bound_figures(model, model.dvae, captions, pictures, generator)
        if isinstance(model.dvae, RelaxedVAE)
        else None,
    }


def _bound_figures(
    model: Model, dvae: RelaxedVAE, captions: Sequence[str], pictures: Tensor, generator: torch.Generator
) -> dict[str, float | None]:
    device, size = generator.device, pictures.shape[-1]
    width = None
    if dvae.settings.likelihood == "mse":
        errors = [fitted_width(dvae, part.to(device)) ** 2 * len(part) for part in pictures.split(_BATCH)]
        width = (sum(errors) / len(pictures)) ** 0.5
    density = {} if width is None else {"width": width}
    parts = [bound(dvae, part.to(device), generator, **density) for part in pictures.split(_BATCH)]
    reconstruction, kl, entropy = (
        float(torch.cat([getattr(part, name).double() for part in parts]).mean())
        for name in ("reconstruction", "kl", "entropy")
    )
    kl_prior = _cross_entropy(model, captions, torch.cat([part.codes for part in parts])) - entropy
    return {
        "nats": reconstruction + kl,
        "reconstruction": reconstruction,
        "kl": kl,
        "bits_per_dimension": bits_per_dimension(reconstruction + kl, size),
        "nats_prior": reconstruction + kl_prior,
        "kl_prior": kl_prior,
        "bits_per_dimension_prior": bits_per_dimension(reconstruction + kl_prior, size),
        "width": width,
    }


@torch.no_grad()
def _cross_entropy(model: Model, captions: Sequence[str], codes: Tensor) -> float:
    """Mean nats a picture of ``codes`` ``(B, G)`` under the transformer, given the captions."""
    text = model.tokenizer.encode(captions, model.transformer.settings.text_length).to(codes.device)
    parts = zip(text.split(_BATCH), codes.split(_BATCH), strict=True)
    losses = [model.transformer(words, image).image.item() * len(image) for words, image in parts]
    return sum(losses) / len(codes) * codes.shape[1]
