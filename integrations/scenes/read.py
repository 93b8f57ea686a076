"""Reads a picture of the drawn task back: which two things it shows and how they lie. No network, nothing learned.

Every pixel takes the nearest of the nine palette colours; pixels of one colour that touch by a side form a component.
A component of at least ``MIN_PIXELS`` is a thing. The picture is readable only if

* there are exactly two things;
* all other pixels that are not background number fewer than ``MIN_PIXELS`` *in all*: a few stray pixels are forgiven,
  as much stray colour as the smallest thing that would count is not;
* each thing overlaps the best of all shapes at all sizes and places with an intersection over union of at least
  ``MIN_IOU``, and no other shape overlaps as well;
* the centres of the two best templates differ more along one axis than along the other.

The scorer was fixed before any model was trained on the task, and is strict: a picture matches a caption only if both
colours, both shapes and the relation are right and nothing else is there.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .draw import COLOURS, DIAMETERS, PALETTE, SHAPES, SIZE, Thing, Triple, placed_masks

MIN_PIXELS = 10
MIN_IOU = 0.7

_COLOUR_NAMES = tuple(COLOURS)


@dataclass(frozen=True)
class Reading:
    """What a picture shows.

    Args:
        content: the two things and their relation, said with "above" or "left of".
        ious: overlap with the best template, of the first and of the second thing.
    """

    content: Triple
    ious: tuple[float, float]


def read_all(pictures: np.ndarray) -> list[Reading | None]:
    """Read a batch of pictures.

    Args:
        pictures: uint8 ``(n, 24, 24, 3)``.

    Returns:
        For each picture what it shows, or ``None`` where it is not a readable scene.

    Raises:
        ValueError: another shape or dtype.
    """
    labels, components, owners, roots = _things(pictures)
    readings: list[Reading | None] = [None] * len(pictures)
    if not owners:
        return readings
    masks = components[owners][:, None] == np.array(roots)[:, :, None, None]
    colours = np.take_along_axis(labels[owners].reshape(len(owners), -1), np.array(roots), axis=1)
    shapes, ious, centres = _best_templates(masks.reshape(-1, SIZE, SIZE))
    for k, i in enumerate(owners):
        readings[i] = _relate(
            colours[k], shapes[2 * k : 2 * k + 2], ious[2 * k : 2 * k + 2], centres[2 * k : 2 * k + 2]
        )
    return readings


def two_things(pictures: np.ndarray) -> list[bool]:
    """Whether each of the uint8 ``(n, 24, 24, 3)`` pictures has exactly two things and little else, of any form."""
    _, _, owners, _ = _things(pictures)
    return np.isin(np.arange(len(pictures)), owners).tolist()


def read(picture: np.ndarray) -> Reading | None:
    """Read one uint8 ``(24, 24, 3)`` picture; ``None`` if it is not a readable scene.

    Example:
        >>> from distopt.integrations.scenes.draw import Scenes
        >>> triple = Triple(Thing("red", "circle"), "above", Thing("blue", "square"))
        >>> read(Scenes().draw(triple, np.random.default_rng(0))).content == triple
        True
    """
    return read_all(picture[None])[0]


def matches(picture: np.ndarray, triple: Triple) -> bool:
    """Whether a uint8 ``(24, 24, 3)`` picture shows exactly what ``triple`` says."""
    return matches_all(picture[None], [triple])[0]


def matches_all(pictures: np.ndarray, triples: Sequence[Triple]) -> list[bool]:
    """Whether each of the uint8 ``(n, 24, 24, 3)`` pictures shows exactly what its triple says."""
    readings = read_all(pictures)
    return [r is not None and r.content == t.content() for r, t in zip(readings, triples, strict=True)]


def nearest_colours(pictures: np.ndarray) -> np.ndarray:
    """Index of the nearest palette colour of each pixel, ``(n, H, W)``; 0 is the background, ties go to it."""
    distances = np.square(pictures[..., None, :].astype(np.int32) - PALETTE.astype(np.int32)).sum(-1)
    return distances.argmin(-1)


def connected_components(labels: np.ndarray) -> np.ndarray:
    """Give every pixel the smallest flat index in its component of equal labels (4-neighbours), ``(n, H, W)``."""
    n, height, width = labels.shape
    roots = np.broadcast_to(np.arange(height * width).reshape(1, height, width), labels.shape).copy()
    along_y, along_x = labels[:, 1:] == labels[:, :-1], labels[:, :, 1:] == labels[:, :, :-1]
    unsettled = np.arange(n)
    while unsettled.size:
        now = roots[unsettled]
        # In-place sweeps: each takes the smaller root across one kind of edge, forwards and backwards.
        before = now.copy()
        for a, b, same in (
            (now[:, 1:], now[:, :-1], along_y[unsettled]),
            (now[:, :, 1:], now[:, :, :-1], along_x[unsettled]),
        ):
            smaller = np.where(same, np.minimum(a, b), height * width)
            np.minimum(a, smaller, out=a)
            np.minimum(b, smaller, out=b)
        # Jump to the root of the root: logarithmic instead of one pixel at a time.
        flat = now.reshape(len(now), -1)
        flat[:] = np.take_along_axis(flat, flat, axis=1)
        roots[unsettled] = now
        unsettled = unsettled[(now != before).reshape(len(now), -1).any(1)]
    return roots


@functools.cache
def _template_bank() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Templates ``(m, pixels)`` grouped by shape, their areas ``(m,)`` and centres ``(m, 2)`` as y, x."""
    bank = placed_masks()
    templates, centres = [], []
    for shape in bank:
        for diameter, sized in zip(DIAMETERS, shape, strict=True):
            span = SIZE - diameter + 1
            templates.append(sized[:span, :span].reshape(-1, SIZE * SIZE))
            corners = np.stack(np.mgrid[:span, :span], axis=-1).reshape(-1, 2)
            centres.append(corners + (diameter - 1) / 2)
    stacked = np.concatenate(templates).astype(np.float32)
    return stacked, stacked.sum(1), np.concatenate(centres)


def _things(pictures: np.ndarray) -> tuple[np.ndarray, np.ndarray, list[int], list[np.ndarray]]:
    """Colours and components of all pixels, the pictures that have two things, and the two components of each."""
    if pictures.dtype != np.uint8 or pictures.ndim != 4 or pictures.shape[1:] != (SIZE, SIZE, 3):
        raise ValueError(f"pictures must be uint8 (n, {SIZE}, {SIZE}, 3), got {pictures.dtype} {pictures.shape}")
    labels = nearest_colours(pictures)
    components = connected_components(labels)
    owners, roots = [], []
    for i, component in enumerate(components):
        found, counts = np.unique(component[labels[i] > 0], return_counts=True)
        things = found[counts >= MIN_PIXELS]
        if len(things) == 2 and counts[counts < MIN_PIXELS].sum() < MIN_PIXELS:
            owners.append(i)
            roots.append(things)
    return labels, components, owners, roots


def _best_templates(masks: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Best shape (-1 on a tie between shapes), its overlap and its centre, for each of ``(m, H, W)`` masks."""
    templates, areas, centres = _template_bank()
    flat = masks.reshape(len(masks), -1).astype(np.float32)
    common = flat @ templates.T
    ious = (common / (flat.sum(1)[:, None] + areas - common)).reshape(len(masks), len(SHAPES), -1)
    by_shape = ious.max(-1)
    best = by_shape.argmax(-1)
    top = by_shape.max(-1)
    tied = (by_shape == top[:, None]).sum(-1) > 1
    return np.where(tied, -1, best), top, centres[ious.reshape(len(masks), -1).argmax(-1)]


def _relate(colours: np.ndarray, shapes: np.ndarray, ious: np.ndarray, centres: np.ndarray) -> Reading | None:
    dy, dx = centres[1] - centres[0]
    if (shapes < 0).any() or (ious < MIN_IOU).any() or abs(dy) == abs(dx):
        return None
    relation, forwards = ("above", dy > 0) if abs(dy) > abs(dx) else ("left of", dx > 0)
    order = (0, 1) if forwards else (1, 0)
    first, second = (Thing(_COLOUR_NAMES[colours[i] - 1], SHAPES[shapes[i]]) for i in order)
    return Reading(Triple(first, relation, second), (float(ious[order[0]]), float(ious[order[1]])))
