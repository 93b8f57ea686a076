"""The scorer reads every clean drawing right and is strict about everything else."""

import dataclasses

import numpy as np
import pytest
from distopt.integrations.scenes.draw import BACKGROUND, COLOURS, RELATIONS, SHAPES, Scenes, Thing, Triple, mask
from distopt.integrations.scenes.read import (
    MIN_PIXELS,
    connected_components,
    matches,
    matches_all,
    nearest_colours,
    read,
    read_all,
)
from hypothesis import given, settings
from hypothesis import strategies as st

TASK = Scenes()
THINGS = st.builds(Thing, st.sampled_from(list(COLOURS)), st.sampled_from(SHAPES))
TRIPLES = st.builds(Triple, THINGS, st.sampled_from(RELATIONS), THINGS)
SEEDS = st.integers(0, 2**32)
RED_ABOVE_BLUE = Triple(Thing("red", "circle"), "above", Thing("blue", "square"))


def blank() -> np.ndarray:
    return np.full((24, 24, 3), BACKGROUND, dtype=np.uint8)


def place(picture: np.ndarray, colour: str, drawn: np.ndarray, top: int, left: int) -> None:
    picture[top : top + drawn.shape[0], left : left + drawn.shape[1]][drawn] = COLOURS[colour]


@pytest.mark.parametrize("split", ["s0", "s1", "s2"])
def test_every_clean_drawing_is_read_right(split: str):
    rng = np.random.default_rng(1)
    triples = [t for t, _ in TASK.test_captions(split, 700, rng)]
    assert all(matches_all(TASK.render(triples, rng), triples))


@given(TRIPLES, SEEDS)
@settings(max_examples=30, deadline=None)
def test_a_drawing_matches_its_content_and_nothing_else(triple: Triple, seed: int):
    others = [dataclasses.replace(triple, relation=r) for r in RELATIONS]
    others += [dataclasses.replace(triple, first=Thing(c, triple.first.shape)) for c in COLOURS]
    others += [dataclasses.replace(triple, second=Thing(triple.second.colour, s)) for s in SHAPES]
    picture = TASK.draw(triple, np.random.default_rng(seed))
    found = matches_all(np.stack([picture] * len(others)), others)
    assert found == [other.content() == triple.content() for other in others]
    assert matches(picture, triple)
    assert matches(picture, triple.inverse())


@given(TRIPLES, SEEDS, st.floats(0, 40))
@settings(max_examples=30, deadline=None)
def test_slight_noise_changes_nothing(triple: Triple, seed: int, strength: float):
    rng = np.random.default_rng(seed)
    picture = TASK.draw(triple, rng) + rng.uniform(-strength, strength, (24, 24, 3))
    assert matches(picture.clip(0, 255).round().astype(np.uint8), triple)


def test_fewer_or_more_than_two_things_are_not_read():
    picture = blank()
    assert read(picture) is None
    place(picture, "red", mask("circle", 8), 0, 8)
    assert read(picture) is None
    place(picture, "blue", mask("square", 8), 14, 8)
    assert read(picture) is not None
    place(picture, "green", mask("cross", 8), 10, 0)
    assert read(picture) is None


def test_stray_pixels_are_forgiven_up_to_the_documented_number():
    for stray in range(MIN_PIXELS + 1):
        picture = TASK.draw(RED_ABOVE_BLUE, np.random.default_rng(0))
        # A speck in the corner and single pixels along the edge, none of which is a component of MIN_PIXELS.
        for i in range(stray):
            picture[(0, 2 * i) if i < 2 else (2 * i, 0)] = COLOURS["green"]
        assert matches(picture, RED_ABOVE_BLUE) == (stray < MIN_PIXELS)


def test_a_blob_that_is_no_shape_is_not_read():
    picture = blank()
    place(picture, "blue", mask("square", 8), 14, 8)
    place(picture, "red", np.ones((3, 14), dtype=bool), 2, 5)
    assert read(picture) is None


def test_a_diagonal_has_no_relation():
    picture = blank()
    place(picture, "red", mask("circle", 8), 0, 0)
    place(picture, "blue", mask("square", 8), 12, 12)
    assert read(picture) is None


def test_things_of_one_colour_that_touch_are_one():
    picture = blank()
    place(picture, "red", mask("square", 8), 2, 8)
    place(picture, "red", mask("square", 8), 10, 8)
    assert read(picture) is None


def test_a_batch_reads_as_its_pictures_do():
    rng = np.random.default_rng(0)
    pictures = TASK.render(TASK.s1[:20], rng)
    pictures[3] = rng.integers(0, 256, pictures[3].shape)
    assert read_all(pictures) == [read(p) for p in pictures]
    assert read_all(pictures[:0]) == []


@given(st.integers(0, 2**32), st.integers(2, 4))
@settings(max_examples=20, deadline=None)
def test_components_are_those_of_a_flood_fill(seed: int, kinds: int):
    labels = np.random.default_rng(seed).integers(kinds, size=(2, 9, 11))
    for grid, roots in zip(labels, connected_components(labels), strict=True):
        expected = np.full(grid.shape, -1)
        for start in np.ndindex(*grid.shape):
            if expected[start] >= 0:
                continue
            stack = [start]
            while stack:
                y, x = stack.pop()
                if expected[y, x] < 0 and grid[y, x] == grid[start]:
                    expected[y, x] = start[0] * grid.shape[1] + start[1]
                    near = ((y + 1, x), (y - 1, x), (y, x + 1), (y, x - 1))
                    stack += [(a, b) for a, b in near if 0 <= a < grid.shape[0] and 0 <= b < grid.shape[1]]
        assert (roots == expected).all()


def test_nearest_colour_of_the_palette_is_itself():
    pixels = np.array([BACKGROUND, *COLOURS.values()], dtype=np.uint8).reshape(1, 1, -1, 3)
    assert nearest_colours(pixels).ravel().tolist() == list(range(9))


def test_pictures_of_another_kind_are_refused():
    with pytest.raises(ValueError, match="uint8"):
        read(np.zeros((24, 24, 3)))
    with pytest.raises(ValueError, match="24, 24, 3"):
        read(np.zeros((32, 32, 3), dtype=np.uint8))
