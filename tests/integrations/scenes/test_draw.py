"""Laws of the drawn task: what the issue of the task fixes, and that a batch is a function of its generator."""

import numpy as np
import pytest
import torch
from distopt.integrations.scenes import draw as scenes
from distopt.integrations.scenes.draw import (
    BACKGROUND,
    COLOURS,
    DIAMETERS,
    GAP,
    GRID,
    RELATIONS,
    SHAPES,
    SIZE,
    Scenes,
    Thing,
    Triple,
    mask,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from distopt.errors import SettingError

TASK = Scenes()
THINGS = st.builds(Thing, st.sampled_from(list(COLOURS)), st.sampled_from(SHAPES))
TRIPLES = st.builds(Triple, THINGS, st.sampled_from(RELATIONS), THINGS)
SEEDS = st.integers(0, 2**32)


def things_of(triples: tuple[Triple, ...]) -> set[Thing]:
    return {thing for t in triples for thing in (t.first, t.second)}


def boxes(picture: np.ndarray, vertical: bool) -> tuple[np.ndarray, np.ndarray]:
    """First and last pixel of both things, along and across the axis on which they lie apart."""
    drawn = (picture != BACKGROUND).any(-1)
    drawn = drawn if vertical else drawn.T
    along = np.flatnonzero(drawn.any(1))
    cut = int(np.flatnonzero(np.diff(along) > 1)[0]) + 1
    parts = along[:cut], along[cut:]
    across = [np.flatnonzero(drawn[part].any(0)) for part in parts]
    return np.array([[p[0], p[-1]] for p in parts]), np.array([[p[0], p[-1]] for p in across])


def test_the_task_is_the_fixed_one():
    assert (len(COLOURS), len(SHAPES), len(RELATIONS), SIZE, GRID) == (8, 6, 4, 24, 6)
    assert max(DIAMETERS) >= 1.2 * min(DIAMETERS)


@given(st.integers(0, 1000))
@settings(max_examples=4, deadline=None)
def test_eight_pairs_are_held_out_and_every_colour_and_shape_is_captioned(seed: int):
    task = Scenes(seed)
    assert len(task.held_out) == 8
    captioned = things_of(task.seen)
    assert not captioned & task.held_out
    assert {t.colour for t in captioned} == set(COLOURS)
    assert {t.shape for t in captioned} == set(SHAPES)
    assert captioned == {Thing(c, s) for c in COLOURS for s in SHAPES} - task.held_out


def test_splits_cover_all_triples_once_and_at_most_half_are_captioned():
    everything = [*TASK.seen, *TASK.s1, *TASK.s2]
    assert len(everything) == len(set(everything)) == 48 * 48 * 4
    assert 2 * len(TASK.seen) <= len(TASK.seen) + len(TASK.s1)
    assert all({t.first, t.second} & TASK.held_out for t in TASK.s2)


def test_equal_pictures_are_in_one_split():
    for split in (TASK.seen, TASK.s1, TASK.s2):
        assert {t.inverse() for t in split} == set(split)


def test_the_published_split_is_pinned():
    names = ["black ring", "blue circle", "cyan diamond", "green square"]
    names += ["magenta square", "red cross", "white triangle", "yellow diamond"]
    assert TASK.describe()["held_out_pairs"] == names
    assert Scenes().seen == TASK.seen


def test_training_says_seen_triples_only():
    rng = np.random.default_rng(0)
    forbidden = {f"{t.colour} {word}" for t in TASK.held_out for word in scenes.SHAPE_WORDS[t.shape]}
    captions = [*TASK.pairs(500, rng)[0], *TASK.captions()]
    assert not any(pair in caption for caption in captions for pair in forbidden)


@given(TRIPLES, SEEDS)
@settings(max_examples=100, deadline=None)
def test_things_lie_as_the_caption_says_with_a_gap(triple: Triple, seed: int):
    along, across = boxes(TASK.draw(triple, np.random.default_rng(seed)), triple.relation in ("above", "below"))
    assert along[1, 0] - along[0, 1] > GAP
    # The relation is the only one that a reader could see: the other offset is smaller.
    assert along[1].mean() - along[0].mean() > abs(across[1].mean() - across[0].mean())


def test_centres_range_over_a_quarter_of_the_side_off_the_grid_under_every_relation():
    rng = np.random.default_rng(0)
    square = Thing("red", "square")
    for relation in RELATIONS:
        found = [
            boxes(p, relation in ("above", "below")) for p in TASK.render([Triple(square, relation, square)] * 900, rng)
        ]
        for place in np.stack([np.stack(f) for f in found]).transpose(1, 2, 0, 3).reshape(4, -1, 2):
            centres = place.mean(1)
            assert centres.max() - centres.min() >= SIZE / 4
            assert set(place[:, 0] % (SIZE // GRID)) == set(range(SIZE // GRID))
            assert set(place[:, 1] - place[:, 0] + 1) == set(DIAMETERS)


def test_shapes_differ_by_many_pixels_and_fill_their_box():
    for d in DIAMETERS:
        drawn = [mask(s, d) for s in SHAPES]
        for i, a in enumerate(drawn):
            assert a.any(0).all()
            assert a.any(1).all()
            assert all((a != b).sum() >= 12 for b in drawn[:i])


@given(SEEDS)
@settings(max_examples=10, deadline=None)
def test_a_batch_is_a_function_of_its_generator(seed: int):
    captions, pictures = TASK.pairs(5, np.random.default_rng(seed))
    again, same = TASK.pairs(5, np.random.default_rng(seed))
    assert captions == again
    assert torch.equal(pictures, same)
    assert pictures.dtype == torch.float32
    assert 0 <= pictures.min() <= pictures.max() <= 1


def test_pixels_survive_the_way_to_tensors_and_back():
    drawn = TASK.render(TASK.s2[:50], np.random.default_rng(0))
    assert (scenes.to_uint8(scenes.to_tensor(drawn)) == drawn).all()
    off = torch.tensor([-0.1, 20.4 / 255, 20.6 / 255, 1.1]).reshape(1, 1, 1, 4)
    assert scenes.to_uint8(off).ravel().tolist() == [0, 20, 21, 255]


def test_captions_name_both_things_in_order():
    rng = np.random.default_rng(0)
    for triple, caption in TASK.test_captions("s1", 100, rng):
        first, second = caption.index(triple.first.colour), caption.rindex(triple.second.colour)
        assert first < second
        assert any(word in caption for word in scenes.RELATION_WORDS[triple.relation])


def test_unknown_splits_and_seeds_are_refused_by_name():
    with pytest.raises(SettingError, match="split is 's9'"):
        TASK.test_captions("s9", 1, np.random.default_rng(0))
    with pytest.raises(SettingError, match=r"Scenes\.seed is -1"):
        Scenes(-1)
