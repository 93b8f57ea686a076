"""Draws a picture for each caption of a split and counts exactly how many match it."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..scenes.draw import Scenes, Triple, to_uint8
from ..scenes.read import matches_all, read_all, two_things
from .codes import Codec
from .sampling import SamplingSettings, sample
from .text import Tokenizer
from .transformer import Transformer

_EVALUATION = 1_000_000_007
"""A stage number, in the seeds of what is drawn, that no training batch has."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Score:
    """An exact score: the share of pictures that match their caption, with its 95 % Wilson interval."""

    exact: float
    low: float
    high: float
    n: int


@torch.no_grad()
def generate(
    transformer: Transformer,
    dvae: Codec,
    tokenizer: Tokenizer,
    captions: Sequence[str],
    settings: SamplingSettings,
    generator: torch.Generator,
    batch: int = 256,
    prompt: Tensor | None = None,
) -> Tensor:
    """Draw one picture for each caption.

    Args:
        transformer: draws the codes.
        dvae: decodes them.
        tokenizer: encodes the captions.
        captions: any texts.
        settings: how codes are drawn.
        generator: decides the samples; on the device of both networks.
        batch: captions at a time.
        prompt: ``(n,)`` int64, the first codes of every picture, if they are given.

    Returns:
        ``(len(captions), 3, H, W)`` float32 in [0, 1] on the CPU.
    """
    text = tokenizer.encode(captions, transformer.settings.text_length)
    options = dataclasses.asdict(settings)
    pictures = []
    for part in text.split(batch):
        given = None if prompt is None else prompt.expand(len(part), -1)
        codes = sample(transformer, part.to(generator.device), prompt=given, generator=generator, **options)
        pictures.append(dvae.decode(codes).cpu())
    return torch.cat(pictures)


def evaluate_generation(
    task: Scenes,
    transformer: Transformer,
    dvae: Codec,
    tokenizer: Tokenizer,
    *,
    split: str,
    n: int = 400,
    sampling: SamplingSettings,
    seed: int = 0,
    shuffled: bool = False,
) -> tuple[Score, list[tuple[str, bool]], Tensor, list[Triple]]:
    """Sample one picture for each of ``n`` captions of a split and read them back.

    Args:
        task: gives the captions.
        transformer: in eval mode.
        dvae: decodes.
        tokenizer: of the captions.
        split: "s0", "s1" or "s2".
        n: captions.
        sampling: temperature and the like, the same for all captions.
        seed: decides captions and samples.
        shuffled: draw each picture for the caption of another: the control, which must score near 0.

    Returns:
        The score, each caption with whether its picture matches it, the pictures, and what they should show.
    """
    rng = np.random.default_rng([seed, _EVALUATION, ("s0", "s1", "s2").index(split)])
    drawn = task.test_captions(split, n, rng)
    triples: list[Triple] = [triple for triple, _ in drawn]
    captions = [caption for _, caption in drawn]
    device = transformer.start.device
    generator = torch.Generator(device).manual_seed(int(rng.integers(2**31)))
    said = captions[1:] + captions[:1] if shuffled else captions
    pictures = generate(transformer, dvae, tokenizer, said, sampling, generator)
    right = matches_all(to_uint8(pictures), triples)
    return wilson(sum(right), n), list(zip(captions, right, strict=True)), pictures, triples


def attributes(pictures: np.ndarray, triples: Sequence[Triple]) -> dict[str, Score | None]:
    """Tell what about pictures is right, each attribute among the pictures of which it can be asked.

    Args:
        pictures: uint8 ``(n, 24, 24, 3)``.
        triples: what each should show.

    Returns:
        Shares with their intervals, ``None`` where no picture can be asked. ``count``: exactly two things, of all
        pictures. ``readable``: both of them are shapes, and their order is clear, of those. ``colours`` and
        ``shapes``: the right two, whichever thing has which, of the readable ones. ``pairs``: each colour is on its
        shape, of those with the right colours and shapes. ``relation``: they lie as they should, of those with the
        right pairs. The product of the shares, ``colours`` and ``shapes`` taken together, is the exact score.
    """
    readings = read_all(pictures)
    readable = [(r.content, t.content()) for r, t in zip(readings, triples, strict=True) if r is not None]
    right = {
        name: [_both(shown, name) == _both(said, name) for shown, said in readable] for name in ("colour", "shape")
    }
    asked = [pair for pair, *both in zip(readable, *right.values(), strict=True) if all(both)]
    paired = [(shown, said) for shown, said in asked if _both(shown) == _both(said)]
    count = sum(two_things(pictures))
    shares = {
        "count": (count, len(pictures)),
        "readable": (len(readable), count),
        "colours": (sum(right["colour"]), len(readable)),
        "shapes": (sum(right["shape"]), len(readable)),
        "pairs": (len(paired), len(asked)),
        "relation": (sum(shown == said for shown, said in paired), len(paired)),
    }
    return {name: wilson(hits, n) if n else None for name, (hits, n) in shares.items()}


def _both(triple: Triple, attribute: str | None = None) -> list[Any]:
    """Both things of a triple, or an attribute of both, in an order that does not depend on the relation."""
    things = (triple.first, triple.second)
    return sorted(things if attribute is None else (getattr(thing, attribute) for thing in things))


def wilson(hits: int, n: int) -> Score:
    """Give a share with its 95 % Wilson score interval.

    Example:
        >>> score = wilson(90, 100)
        >>> round(score.low, 3), round(score.high, 3)
        (0.826, 0.945)
    """
    z = 1.959963984540054
    share = hits / n
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return Score(exact=share, low=max(0.0, min(share, centre - half)), high=min(1.0, max(share, centre + half)), n=n)
