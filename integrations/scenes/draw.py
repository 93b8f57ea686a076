"""The drawn task: two coloured shapes and a relation, as captions and as 24 x 24 pictures, with fixed splits.

Nothing is downloaded: a scene is drawn from a generator, so a batch is a pure function of the generator's seed.

====================  =================================================================================
picture               24 x 24 RGB on plain grey, hard edges; a 6 x 6 grid of tokens sees patches of 4 x 4
things                8 colours (the corners of the RGB cube) x 6 shapes, two in a picture, never touching
sizes                 8 or 10 pixels across (radius 4 or 5), drawn independently for both things
places                any pixel; under each relation a centre ranges over a quarter of the side in x and in y
splits                by content: "A above B" and "B below A" show the same and stay on the same side
S0 (``seen``)         half of the triples of the 40 captioned things; the only captions that stage 2 trains on
S1                    the other half: both things are captioned, this combination never is
S2                    triples with one or two of the 8 colour-shape pairs that no training caption names
====================  =================================================================================
"""

import functools
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from distopt.errors import SettingError

SIZE = 24
GRID = 6
DIAMETERS = (8, 10)
GAP = 2
"""Empty pixels, at least, between the bounding boxes along the relation's axis."""
DRIFT = 3
"""Pixels, at most, that a centre lies off the middle across the relation's axis."""

COLOURS = {
    "red": (235, 20, 20),
    "green": (20, 235, 20),
    "blue": (20, 20, 235),
    "yellow": (235, 235, 20),
    "cyan": (20, 235, 235),
    "magenta": (235, 20, 235),
    "black": (20, 20, 20),
    "white": (235, 235, 235),
}
BACKGROUND = (128, 128, 128)
SHAPES = ("circle", "square", "triangle", "diamond", "cross", "ring")
RELATIONS = ("above", "below", "left of", "right of")
INVERSE = {"above": "below", "below": "above", "left of": "right of", "right of": "left of"}
HELD_OUT = 8

SHAPE_WORDS = {
    "circle": ("circle", "disc"),
    "square": ("square", "box"),
    "triangle": ("triangle",),
    "diamond": ("diamond", "rhombus"),
    "cross": ("cross", "plus"),
    "ring": ("ring", "hoop"),
}
RELATION_WORDS = {
    "above": ("above", "over"),
    "below": ("below", "under"),
    "left of": ("left of", "to the left of"),
    "right of": ("right of", "to the right of"),
}
TEMPLATES = ("{first} {relation} {second}", "there is {first} {relation} {second}")

PALETTE = np.array([BACKGROUND, *COLOURS.values()], dtype=np.uint8)
_COLOUR_INDEX = {name: i + 1 for i, name in enumerate(COLOURS)}
_SHAPE_INDEX = {name: i for i, name in enumerate(SHAPES)}


@dataclass(frozen=True, order=True)
class Thing:
    """One object: a colour and a shape by name."""

    colour: str
    shape: str


@dataclass(frozen=True, order=True)
class Triple:
    """What a caption says: ``first`` is ``relation`` ``second``."""

    first: Thing
    relation: str
    second: Thing

    def inverse(self) -> "Triple":
        """The same content seen from the other thing.

        Example:
            >>> red, blue = Thing("red", "circle"), Thing("blue", "ring")
            >>> Triple(red, "above", blue).inverse() == Triple(blue, "below", red)
            True
        """
        return Triple(self.second, INVERSE[self.relation], self.first)

    def content(self) -> "Triple":
        """The one of the two equivalent triples that says "above" or "left of": equal for equal pictures."""
        return self if self.relation in ("above", "left of") else self.inverse()


def mask(shape: str, diameter: int) -> np.ndarray:
    """Draw one shape without placing it.

    Args:
        shape: one of ``SHAPES``.
        diameter: side of its bounding box in pixels.

    Returns:
        Bool ``(diameter, diameter)``, true where the shape is.

    Example:
        >>> int(mask("square", 8).sum()), int(mask("cross", 8).sum())
        (64, 28)
    """
    y, x = np.mgrid[:diameter, :diameter] - (diameter - 1) / 2
    rows = np.mgrid[:diameter, :diameter][0]
    circle = x**2 + y**2 <= (diameter / 2) ** 2
    return {
        "circle": circle,
        "square": np.ones_like(circle),
        "triangle": np.abs(x) <= rows // 2 + 0.5,
        "diamond": np.abs(x) + np.abs(y) <= diameter / 2,
        "cross": (np.abs(x) < 1) | (np.abs(y) < 1),
        # Two pixels of line; the tolerance keeps the four diagonal pixels of the hole at diameter 8.
        "ring": circle & (x**2 + y**2 > (diameter / 2 - 2) ** 2 + 0.5),
    }[shape]


@functools.cache
def placed_masks() -> np.ndarray:
    """Every shape at every size and place, as drawn and as looked for by the scorer.

    Returns:
        Bool ``(shapes, diameters, tops, lefts, SIZE, SIZE)``; places where a shape would leave the picture are empty.
    """
    places = SIZE - min(DIAMETERS) + 1
    bank = np.zeros((len(SHAPES), len(DIAMETERS), places, places, SIZE, SIZE), dtype=bool)
    for s, shape in enumerate(SHAPES):
        for d, diameter in enumerate(DIAMETERS):
            drawn = mask(shape, diameter)
            for top in range(SIZE - diameter + 1):
                for left in range(SIZE - diameter + 1):
                    bank[s, d, top, left, top : top + diameter, left : left + diameter] = drawn
    bank.setflags(write=False)
    return bank


def _held_out(rng: np.random.Generator) -> frozenset[Thing]:
    # One pair of each colour, shapes used at most twice: every colour and every shape stays in the captions.
    shapes = [*SHAPES, *rng.permutation(SHAPES)[: HELD_OUT - len(SHAPES)]]
    return frozenset(Thing(c, str(s)) for c, s in zip(COLOURS, rng.permutation(shapes), strict=True))


def _places(n: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Sizes ``(n, 2)`` as indices, corners along ``(n, 2)`` and across ``(n, 2)`` the axis, the near thing first."""
    sizes = rng.integers(len(DIAMETERS), size=(n, 2))
    across_of = np.array(DIAMETERS)[sizes]
    slack = SIZE - GAP - across_of.sum(1)
    # Uniform over all pairs near <= far of 0..slack: sort two draws from slack + 2, take one from the larger.
    near = rng.integers(0, slack + 2)
    far = rng.integers(0, slack + 1)
    near, far = np.where(near > far, far, near), np.where(near > far, near - 1, far)
    along = np.stack([near, across_of[:, 0] + GAP + far], axis=1)
    across = (SIZE - across_of) // 2 + rng.integers(-DRIFT, DRIFT + 1, size=(n, 2))
    return sizes, along, across


class Scenes:
    """The task: its splits, its captions and its pictures.

    Args:
        seed: decides which pairs and triples are held out; 0 is the published task.

    Raises:
        SettingError: ``seed`` is not an integer of at least 0.

    Example:
        >>> task = Scenes()
        >>> task.pictures(2, np.random.default_rng(0)).shape
        torch.Size([2, 3, 24, 24])
        >>> len(task.seen), len(task.s1), len(task.s2), len(task.held_out)
        (3200, 3200, 2816, 8)
    """

    size = SIZE

    def __init__(self, seed: int = 0) -> None:
        if not isinstance(seed, int) or seed < 0:
            raise SettingError("Scenes.seed", seed, "an integer of at least 0")
        rng = np.random.default_rng([seed, 0x5CE9E5])
        self.seed = seed
        self.held_out = _held_out(rng)
        things = [Thing(c, s) for c in COLOURS for s in SHAPES]
        contents = [Triple(a, r, b) for a in things for r in ("above", "left of") for b in things]
        known = [t for t in contents if not {t.first, t.second} & self.held_out]
        captioned = rng.permutation(len(known)) < len(known) // 2
        self.seen = _both_ways(t for t, said in zip(known, captioned, strict=True) if said)
        self.s1 = _both_ways(t for t, said in zip(known, captioned, strict=True) if not said)
        self.s2 = _both_ways(t for t in contents if {t.first, t.second} & self.held_out)
        self._everything = (*self.seen, *self.s1, *self.s2)

    def caption(self, triple: Triple, rng: np.random.Generator) -> str:
        """Say a triple in words, with synonyms and a template drawn by ``rng``.

        Example:
            >>> triple = Triple(Thing("red", "circle"), "above", Thing("blue", "square"))
            >>> Scenes().caption(triple, np.random.default_rng(36))
            'a red circle above a blue square'
        """

        def pick(words: Sequence[str]) -> str:
            return words[int(rng.integers(len(words)))]

        def noun(thing: Thing) -> str:
            return f"a {thing.colour} {pick(SHAPE_WORDS[thing.shape])}"

        relation = pick(RELATION_WORDS[triple.relation])
        return pick(TEMPLATES).format(first=noun(triple.first), relation=relation, second=noun(triple.second))

    def render(self, triples: Sequence[Triple], rng: np.random.Generator) -> np.ndarray:
        """Draw one picture of each triple.

        Args:
            triples: what to draw, any split.
            rng: draws sizes and places.

        Returns:
            uint8 ``(len(triples), 24, 24, 3)``.
        """
        sizes, along, across = _places(len(triples), rng)
        contents = [t.content() for t in triples]
        vertical = np.array([t.relation == "above" for t in contents], dtype=bool)[:, None]
        tops, lefts = np.where(vertical, along, across), np.where(vertical, across, along)
        labels = np.zeros((len(triples), SIZE, SIZE), dtype=np.intp)
        for i, things in enumerate(([t.first for t in contents], [t.second for t in contents])):
            shapes = np.array([_SHAPE_INDEX[t.shape] for t in things], dtype=np.intp)
            colours = np.array([_COLOUR_INDEX[t.colour] for t in things], dtype=np.intp)
            labels += placed_masks()[shapes, sizes[:, i], tops[:, i], lefts[:, i]] * colours[:, None, None]
        return PALETTE[labels]

    def draw(self, triple: Triple, rng: np.random.Generator) -> np.ndarray:
        """Draw one picture of ``triple``, uint8 ``(24, 24, 3)``."""
        return self.render([triple], rng)[0]

    def pictures(self, n: int, rng: np.random.Generator) -> Tensor:
        """Draw ``n`` pictures of any split without captions, ``(n, 3, 24, 24)`` float32 in [0, 1], for stage 1."""
        return to_tensor(self.render(_choose(self._everything, n, rng), rng))

    def pairs(self, n: int, rng: np.random.Generator) -> tuple[list[str], Tensor]:
        """Draw ``n`` captions of the seen split and their pictures ``(n, 3, 24, 24)``, for stage 2."""
        triples = _choose(self.seen, n, rng)
        return [self.caption(t, rng) for t in triples], to_tensor(self.render(triples, rng))

    def captions(self) -> Iterable[str]:
        """Give one caption of every seen triple, always the same, for the text tokenizer to learn from."""
        rng = np.random.default_rng([self.seed, 0x7E87])
        return [self.caption(t, rng) for t in self.seen]

    def test_captions(self, split: str, n: int, rng: np.random.Generator) -> list[tuple[Triple, str]]:
        """Draw what to sample and score.

        Args:
            split: "s0" (seen captions drawn anew), "s1" (unseen combinations) or "s2" (pairs never captioned).
            n: how many.
            rng: draws triples and wordings.

        Returns:
            ``n`` triples with a caption each.

        Raises:
            SettingError: ``split`` is none of the three.
        """
        splits = {"s0": self.seen, "s1": self.s1, "s2": self.s2}
        if split not in splits:
            raise SettingError("Scenes.test_captions.split", split, "one of 's0', 's1', 's2'")
        return [(t, self.caption(t, rng)) for t in _choose(splits[split], n, rng)]

    @property
    def fingerprint(self) -> str:
        """The task, in words."""
        return json.dumps(self.describe())

    def describe(self) -> dict[str, object]:
        """Give the numbers of the task, ready for JSON."""
        diameters = [d / 2 for d in DIAMETERS]
        return {
            "size": SIZE,
            "grid": GRID,
            "colours": len(COLOURS),
            "shapes": len(SHAPES),
            "relations": len(RELATIONS),
            "radii": diameters,
            "radius_variation": max(diameters) / min(diameters) - 1,
            "centre_range": {"along": SIZE - GAP - 2 * min(DIAMETERS), "across": 2 * DRIFT},
            "gap": GAP,
            "triples": len(self._everything),
            "captioned": len(self.seen),
            "captioned_fraction_of_known": len(self.seen) / (len(self.seen) + len(self.s1)),
            "s1": len(self.s1),
            "s2": len(self.s2),
            "held_out_pairs": [f"{t.colour} {t.shape}" for t in sorted(self.held_out)],
            "seed": self.seed,
        }


def to_tensor(pictures: np.ndarray) -> Tensor:
    """Turn uint8 ``(n, H, W, 3)`` into float32 ``(n, 3, H, W)`` in [0, 1]."""
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).float().div_(255).contiguous()


def to_uint8(pictures: Tensor) -> np.ndarray:
    """Turn ``(n, 3, H, W)`` in [0, 1] into uint8 ``(n, H, W, 3)``: clamped, rounded, nothing else."""
    return pictures.detach().cpu().clamp(0, 1).mul(255).round().byte().permute(0, 2, 3, 1).contiguous().numpy()


def _both_ways(contents: Iterable[Triple]) -> tuple[Triple, ...]:
    return tuple(t for content in contents for t in (content, content.inverse()))


def _choose(triples: Sequence[Triple], n: int, rng: np.random.Generator) -> list[Triple]:
    return [triples[i] for i in rng.integers(len(triples), size=n)]
