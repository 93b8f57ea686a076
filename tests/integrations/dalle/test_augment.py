"""Augmented pictures are parts of the picture, where and as large as the paper says."""

import numpy as np
import pytest
from distopt.integrations.dalle.augment import augment_stage1, augment_stage2, resize_by_area
from hypothesis import given, settings
from hypothesis import strategies as st

from distopt.errors import SettingError

BOTH = (augment_stage1, augment_stage2)
SIDES = st.integers(1, 90)
SEEDS = st.integers(0, 2**32)


def picture(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3)).astype(np.uint8)


def places(height: int, width: int) -> np.ndarray:
    """A picture whose pixels tell their row and column."""
    rows, columns = np.mgrid[:height, :width]
    return np.stack([rows, columns, np.zeros_like(rows)], 2).astype(np.uint8)


@pytest.mark.parametrize("augment", BOTH)
@given(height=SIDES, width=SIDES, size=st.integers(1, 40), seed=SEEDS)
@settings(max_examples=60, deadline=None)
def test_any_picture_becomes_a_square_of_its_own_colours(augment, height, width, size, seed):
    drawn = picture(height, width, seed)
    before = drawn.copy()
    result = augment(drawn, size, np.random.default_rng(seed))
    assert result.shape == (size, size, 3)
    assert result.dtype == np.uint8
    assert result.flags.c_contiguous
    assert np.array_equal(drawn, before)
    assert np.array_equal(result, augment(drawn, size, np.random.default_rng(seed)))
    low, high = drawn.min((0, 1)), drawn.max((0, 1))
    assert (result >= low).all()
    assert (result <= high).all()


@given(side=st.integers(1, 40), size=st.integers(1, 40))
@settings(max_examples=60, deadline=None)
def test_resizing_takes_means_over_windows_of_the_corners_scale(side, size):
    drawn = picture(side, side, 100 * side + size)
    scale = (side - 1) / (size - 1) if min(side, size) > 1 else side / size
    # Each window is cut into 400 strips, each strip has the colour of the pixel that it lies in.
    strips = scale * (np.arange(size)[:, None] + (np.arange(400) + 0.5) / 400)
    pixels = np.minimum(strips.astype(int), side - 1)
    rows = drawn.astype(float)[pixels].mean(1)
    expected = rows[:, pixels].mean(2)
    assert np.abs(resize_by_area(drawn, size) - expected).max() <= 0.5 + 255 * 4 * max(1, 1 / scale) / 400


@given(side=st.integers(1, 40))
def test_resizing_to_the_same_size_changes_nothing(side):
    drawn = picture(side, side)
    assert np.array_equal(resize_by_area(drawn, side), drawn)


def test_means_are_rounded():
    drawn = np.repeat(np.array([[0, 1], [1, 1]], np.uint8)[:, :, None], 3, 2)
    assert resize_by_area(drawn, 1).tolist() == [[[1, 1, 1]]]


def ranges(augment, size: int, height: int, width: int, n: int = 300) -> tuple[np.ndarray, ...]:
    """First and last row and column that the results show, left and right as in the picture, and who is mirrored."""
    rng = np.random.default_rng(0)
    shown = np.stack([augment(places(height, width), size, rng) for _ in range(n)]).astype(int)
    left, right = shown[:, 0, 0, 1], shown[:, 0, -1, 1]
    mirrored = left > right
    left, right = np.where(mirrored, right, left), np.where(mirrored, left, right)
    return shown[:, 0, 0, 0], shown[:, -1, 0, 0], left, right, mirrored


def test_stage_1_sees_all_of_a_long_picture_and_half_of_it_mirrored():
    top, bottom, left, right, mirrored = ranges(augment_stage1, 40, 48, 200)
    assert 0.4 < mirrored.mean() < 0.6
    assert top.min() == 0
    assert bottom.max() == 47
    # The square's places are uniform over the 152 that there are.
    shares = np.histogram(left, bins=4, range=(0, 160))[0] / len(left)
    assert (np.abs(shares - 0.25) < 0.08).all()
    assert right.max() >= 195


def test_stage_2_stays_near_the_middle_and_never_mirrors():
    top, bottom, left, right, mirrored = ranges(augment_stage2, 40, 48, 200)
    assert not mirrored.any()
    assert top.min() == 0
    assert bottom.max() == 47
    assert left.min() >= 3 * 152 // 8
    assert right.max() < 5 * 152 // 8 + 48
    tall = ranges(augment_stage2, 40, 200, 48)
    assert tall[0].min() >= 3 * 152 // 8
    assert tall[1].max() < 5 * 152 // 8 + 48


@pytest.mark.parametrize("room", [0, 1, 2, 7, 8, 9])
def test_the_band_of_stage_2_is_half_open_and_never_empty(room):
    rng = np.random.default_rng(0)
    left = {int(augment_stage2(places(10, 10 + room), 10, rng)[0, 0, 1]) for _ in range(100)}
    assert left == set(range(3 * room // 8, max(3 * room // 8 + 1, 5 * room // 8)))


@pytest.mark.parametrize(("augment", "smallest", "largest"), [(augment_stage1, 288, 384), (augment_stage2, 256, 288)])
def test_scales_are_the_papers_at_its_size(augment, smallest, largest):
    """How much of a picture of 500 x 500 is seen tells t."""
    rng = np.random.default_rng(0)
    wide = np.repeat(np.arange(500)[None, :, None] // 2, 500, 0).repeat(3, 2).astype(np.uint8)
    steps = []
    for _ in range(60):
        row = augment(wide, 256, rng)[0, :, 0].astype(float)
        steps.append(2 * abs(row[-1] - row[0]) / 255)
    assert min(steps) >= 499 / (largest - 1) - 0.02
    assert max(steps) <= 499 / (smallest - 1) + 0.02
    assert min(steps) < 499 / (largest - 1) * 1.03
    assert max(steps) > 499 / (smallest - 1) * 0.97


@pytest.mark.parametrize("augment", BOTH)
def test_a_picture_no_larger_than_the_target_is_enlarged_whole(augment):
    small = picture(5, 5)
    result = augment(small, 13, np.random.default_rng(1))
    whole = resize_by_area(small, 13)
    assert np.array_equal(result, whole) or np.array_equal(result, whole[:, ::-1])


@pytest.mark.parametrize("augment", BOTH)
@pytest.mark.parametrize(
    "wrong", [np.zeros((4, 4), np.uint8), np.zeros((4, 4, 4), np.uint8), np.zeros((4, 4, 3)), np.zeros((0, 4, 3), "u1")]
)
def test_other_arrays_are_refused(augment, wrong):
    with pytest.raises(SettingError, match="uint8"):
        augment(wrong, 4, np.random.default_rng(0))
    with pytest.raises(SettingError, match="size is 0"):
        augment(picture(4, 4), 0, np.random.default_rng(0))
