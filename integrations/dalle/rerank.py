"""Draws several pictures for a caption and keeps the one that fits it best; counts exactly what that gains.

Source: Ramesh et al., "Zero-Shot Text-to-Image Generation", 2021, section 2.6.
"""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..scenes.draw import Scenes, to_tensor, to_uint8
from ..scenes.read import matches_all
from .contrast import Contrast
from .grading import Score, generate, wilson
from .model import Model
from .text import Tokenizer

CANDIDATES = 8
"""Pictures a caption, where nothing else is said."""
_SEED = 1_000_000_008
"""A stage number, in the seeds of what is drawn, that no training batch has."""
_BATCH = 32
"""Captions whose candidates are compared at once."""


@dataclass(frozen=True, kw_only=True)
class BestOf:
    """What choosing gains: exact scores over the same candidates.

    Args:
        candidates: pictures a caption.
        single: of the first candidate of each caption, as if there were no others.
        picked: of the candidate that the contrastive model chooses.
        ceiling: of captions any of whose candidates is right, as if the exact scorer chose.
        gain: ``picked`` less the share of all candidates that are right, with its 95 % interval, captions being what
            was drawn at random.
    """

    candidates: int
    single: Score
    picked: Score
    ceiling: Score
    gain: tuple[float, float, float]

    def figures(self) -> dict[str, Any]:
        """For the report, ready for JSON."""
        figures = dataclasses.asdict(self)
        value, low, high = figures.pop("gain")
        return {**figures, "gain": {"points": value, "low": low, "high": high}}


@dataclass(frozen=True)
class Chosen:
    """Candidates of several captions, and which were chosen.

    Args:
        captions: n texts.
        right: bool ``(n, N)``, which candidates match their caption.
        best: int ``(n,)``, which was chosen.
        pictures: uint8 ``(n, N, H, W, 3)``.
    """

    captions: Sequence[str]
    right: np.ndarray
    best: np.ndarray
    pictures: np.ndarray


@torch.no_grad()
def fits(contrast: Contrast, tokenizer: Tokenizer, captions: Sequence[str], pictures: Tensor) -> Tensor:
    """How well candidates fit their captions.

    Args:
        contrast: in eval mode.
        tokenizer: of the captions.
        captions: B texts.
        pictures: ``(B, N, 3, H, W)`` float in [0, 1].

    Returns:
        ``(B, N)`` on the CPU; higher fits better, under one caption.
    """
    device = contrast.log_scale.device
    text = tokenizer.encode(captions, contrast.settings.text_length)
    parts = zip(pictures.split(_BATCH), text.split(_BATCH), strict=True)
    return torch.cat([contrast.scores(some.to(device), said.to(device)).cpu() for some, said in parts])


def choose(
    task: Scenes, model: Model, *, split: str, n: int, part: int = 0, candidates: int = CANDIDATES, seed: int = 0
) -> Chosen:
    """Sample several pictures for each of ``n`` captions of a split, let the model choose, and read all of them back.

    Args:
        task: gives the captions.
        model: with a contrastive model.
        split: "s0", "s1" or "s2".
        n: captions.
        part: number of the part, where a split is judged in several.
        candidates: pictures a caption.
        seed: decides captions and samples.
    """
    assert model.contrast is not None
    rng = np.random.default_rng([seed, _SEED, ("s0", "s1", "s2").index(split), part])
    drawn = task.test_captions(split, n, rng)
    captions = [caption for _, caption in drawn]
    repeated = [caption for caption in captions for _ in range(candidates)]
    generator = torch.Generator(model.transformer.start.device).manual_seed(int(rng.integers(2**31)))
    networks = (model.transformer, model.dvae, model.tokenizer)
    pictures = to_uint8(generate(*networks, repeated, model.sampling, generator))
    # What is chosen among is what is shown: pictures of whole bytes.
    best = fits(model.contrast, model.tokenizer, captions, to_tensor(pictures).unflatten(0, (n, candidates))).argmax(1)
    right = matches_all(pictures, [triple for triple, _ in drawn for _ in range(candidates)])
    shape = (n, candidates)
    return Chosen(captions, np.array(right).reshape(shape), best.numpy(), pictures.reshape(*shape, *pictures.shape[1:]))


def count(right: np.ndarray, best: np.ndarray) -> BestOf:
    """Count what choosing gained.

    Args:
        right: bool ``(n, N)``, which candidates match their caption.
        best: int ``(n,)``, of each caption the candidate that was chosen.

    Example:
        >>> found = count(np.array([[False, True], [True, True]]), np.array([1, 0]))
        >>> found.single.exact, found.picked.exact, found.ceiling.exact, found.gain[0]
        (0.5, 1.0, 1.0, 0.25)
    """
    n = len(right)
    picked = right[np.arange(n), best]
    more = picked - right.mean(1)
    half = 1.96 * more.std(ddof=1) / math.sqrt(n) if n > 1 else 1.0
    return BestOf(
        candidates=right.shape[1],
        single=wilson(int(right[:, 0].sum()), n),
        picked=wilson(int(picked.sum()), n),
        ceiling=wilson(int(right.any(1).sum()), n),
        gain=(float(more.mean()), float(more.mean() - half), float(more.mean() + half)),
    )
