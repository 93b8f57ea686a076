"""Drawn pictures of one thing each, whose shape is the class, and their exact reader.

========  ====================================================================================
picture   16 x 16 RGB on plain grey, hard edges
class     one of 6 shapes, 12 pixels across
the rest  one of 4 colours, any of 9 places: 36 pictures a class, 216 in all
========  ====================================================================================

The reader is that of the drawn scenes, for one thing: every pixel takes the nearest palette colour; a picture is
readable if exactly one component of one colour has `MIN_PIXELS` pixels or more, all other pixels that are not
background number fewer in all, and the component overlaps one shape at one place best, by `MIN_IOU` or more. Nothing of
it is learned.
"""

import dataclasses
import functools
import itertools
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ..scenes.draw import PALETTE, mask, to_uint8
from ..scenes.read import MIN_IOU, MIN_PIXELS, connected_components
from .settings import CLASSES, SIZE

DIAMETER = 12
STRIDE = 2
"""Pixels from one place to the next."""
PLACES = ((SIZE - DIAMETER) // STRIDE + 1) ** 2
COLOURS = 4
"""Red, green, blue and yellow: the first of the scenes' palette behind its grey."""
CONTENTS = COLOURS * PLACES
"""Different pictures a class."""


@dataclasses.dataclass(frozen=True)
class Reading:
    """What a picture shows.

    Args:
        shape: the class's index.
        colour: its index among the colours.
        place: flat index of its upper left corner.
    """

    shape: int
    colour: int
    place: int


def everything() -> tuple[Tensor, Tensor]:
    """Draw every picture that there is.

    Returns:
        Pictures ``(216, 3, 16, 16)`` float32 in [-1, 1], and their classes, int64 ``(216,)``.

    Example:
        >>> pictures, classes = everything()
        >>> pictures.shape, classes.bincount().tolist()
        (torch.Size([216, 3, 16, 16]), [36, 36, 36, 36, 36, 36])
    """
    masks, shapes = _templates()
    colours = np.arange(1, COLOURS + 1).reshape(-1, 1, 1, 1)
    painted = PALETTE[(masks[None] * colours).reshape(-1, SIZE, SIZE)]
    pictures = torch.from_numpy(painted).permute(0, 3, 1, 2).float().div_(127.5).sub_(1).contiguous()
    return pictures, torch.from_numpy(np.tile(shapes, COLOURS))


def read(pictures: Tensor) -> list[Reading | None]:
    """Read pictures back.

    Args:
        pictures: ``(n, 3, 16, 16)`` in [-1, 1]; rounded to 256 levels first, as a file would hold them.

    Returns:
        For each what it shows, or ``None`` where that is not one thing.

    Example:
        >>> pictures, classes = everything()
        >>> read(pictures[100:101])
        [Reading(shape=5, colour=1, place=1)]
    """
    labels = _nearest_colours(to_uint8((pictures + 1) / 2))
    components = connected_components(labels)
    readings: list[Reading | None] = []
    for label, component in zip(labels, components, strict=True):
        found, counts = np.unique(component[label > 0], return_counts=True)
        things = found[counts >= MIN_PIXELS]
        clean = len(things) == 1 and counts[counts < MIN_PIXELS].sum() < MIN_PIXELS
        readings.append(_match(component == things[0], int(label.flat[things[0]]) - 1) if clean else None)
    return readings


@dataclasses.dataclass(frozen=True)
class Judgement:
    """How good and how different the pictures are.

    Args:
        accuracy: part of them that show the class that was asked for, and nothing else.
        by_class: the same for each class.
        contents: mean over classes of the number of different contents (colour and place) among the right ones.
        distance: mean distance of two pictures of a class, root mean square over pixels in [-1, 1].
    """

    accuracy: float
    by_class: tuple[float, ...]
    contents: float
    distance: float


def judge(pictures: Tensor, classes: Tensor) -> Judgement:
    """Judge pictures by the exact reader.

    Args:
        pictures: ``(n, 3, 16, 16)`` in [-1, 1].
        classes: int64 ``(n,)``, what was asked for; every class at least twice.

    Example:
        >>> pictures, classes = everything()
        >>> judgement = judge(pictures[::9], classes[::9])
        >>> judgement.accuracy, judgement.contents
        (1.0, 4.0)
    """
    readings, asked = read(pictures), classes.tolist()
    right = [reading is not None and reading.shape == wanted for reading, wanted in zip(readings, asked, strict=True)]
    by_class, contents, distances = [], [], []
    for one in range(len(CLASSES)):
        mine = [place for place, wanted in enumerate(asked) if wanted == one]
        by_class.append(sum(right[place] for place in mine) / len(mine))
        contents.append(_different([readings[place] for place in mine if right[place]]))
        apart = torch.pdist(pictures[mine].flatten(1).double()) / pictures[0].numel() ** 0.5
        distances.append(float(apart.mean()))
    parts = len(CLASSES)
    return Judgement(sum(right) / len(right), tuple(by_class), sum(contents) / parts, sum(distances) / parts)


def _nearest_colours(pictures: np.ndarray) -> np.ndarray:
    """Index of the nearest of the task's colours of each pixel of uint8 ``(n, H, W, 3)``; 0 is the background."""
    palette = PALETTE[: COLOURS + 1].astype(np.int32)
    return np.square(pictures[..., None, :].astype(np.int32) - palette).sum(-1).argmin(-1)


def _different(readings: Sequence[Reading | None]) -> int:
    return len({(reading.colour, reading.place) for reading in readings if reading is not None})


@functools.cache
def _templates() -> tuple[np.ndarray, np.ndarray]:
    """Every shape at every place, bool ``(54, 16, 16)``, and the index of its shape."""
    starts = range(0, SIZE - DIAMETER + 1, STRIDE)
    bank = np.zeros((len(CLASSES), PLACES, SIZE, SIZE), dtype=bool)
    for index, shape in enumerate(CLASSES):
        for place, (top, left) in enumerate(itertools.product(starts, starts)):
            bank[index, place, top : top + DIAMETER, left : left + DIAMETER] = mask(shape, DIAMETER)
    return bank.reshape(-1, SIZE, SIZE), np.repeat(np.arange(len(CLASSES)), PLACES)


def _match(thing: np.ndarray, colour: int) -> Reading | None:
    """The shape and the place that a bool ``(16, 16)`` mask overlaps best, if one does."""
    templates = _templates()[0]
    common = (templates & thing).sum((1, 2))
    overlap = (common / (templates | thing).sum((1, 2))).reshape(len(CLASSES), PLACES)
    by_shape = overlap.max(1)
    shape = int(by_shape.argmax())
    if by_shape[shape] < MIN_IOU or (by_shape == by_shape[shape]).sum() > 1:
        return None
    return Reading(shape, colour, int(overlap[shape].argmax()))
