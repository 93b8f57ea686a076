"""Sheets and curves: the right pixels in the right places, whatever one throws at them."""

import numpy as np
import pytest
from distopt.integrations.dalle.sheets import WIDTH, Cell, Section, draw_losses, draw_picture, draw_scales, draw_sheet
from PIL import Image

RIGHT, WRONG = (26, 152, 80), (215, 48, 39)


def _picture(size=8, colour=(1, 2, 3)):
    return np.full((size, size, 3), colour, np.uint8)


def _read(path):
    return np.asarray(Image.open(path).convert("RGB")).astype(int)


def _has(image, colour):
    return bool((image == colour).all(-1).any())


@pytest.mark.parametrize(("right", "colour"), [(True, RIGHT), (False, WRONG), (None, (208, 215, 222))])
def test_a_cell_has_its_picture_in_a_frame_that_tells_right_from_wrong(tmp_path, right, colour):
    draw_sheet(tmp_path / "s.png", [Section("", "", [Cell([_picture()], "a caption", right)])], columns=8)
    image = _read(tmp_path / "s.png")
    assert image.shape[1] == WIDTH
    assert _has(image, (1, 2, 3))
    assert _has(image, colour)
    assert not any(_has(image, other) for other in (RIGHT, WRONG) if other != colour)


def test_pictures_are_enlarged_without_smoothing(tmp_path):
    picture = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    draw_picture(tmp_path / "p.png", picture, side=60)
    image = _read(tmp_path / "p.png")
    assert image.shape == (64, 64, 3)
    assert (image[::8, ::8] == picture).all()
    assert (image.reshape(8, 8, 8, 8, 3) == picture[:, None, :, None]).all()


def test_all_cells_of_all_sections_are_there(tmp_path):
    colours = [(10 * i, 5, 200) for i in range(20)]
    cells = [Cell([_picture(colour=colour)], f"number {i}", True) for i, colour in enumerate(colours)]
    sections = [Section("First", "note", cells[:7]), Section("Second", "note", cells[7:])]
    draw_sheet(tmp_path / "s.png", sections, columns=4, footer="a footer")
    image = _read(tmp_path / "s.png")
    assert all(_has(image, colour) for colour in colours)


@pytest.mark.parametrize("size", [8, 24, 64, 512])
def test_cells_of_any_size_fit(tmp_path, size):
    pair = Cell([_picture(size, (9, 9, 9)), _picture(size, (7, 7, 7))], "word " * 40)
    draw_sheet(tmp_path / "s.png", [Section("T" * 200, "", [pair] * 3)], columns=2)
    image = _read(tmp_path / "s.png")
    assert _has(image, (9, 9, 9))
    assert _has(image, (7, 7, 7))


@pytest.mark.parametrize("caption", ["", "x" * 500, "ein größerer Käse", "красный круг", "a\u200bb", "red 🔴 circle"])
def test_any_caption_can_be_drawn(tmp_path, caption):
    draw_sheet(tmp_path / "s.png", [Section("", "", [Cell([_picture()], caption)])], columns=8)
    assert _has(_read(tmp_path / "s.png"), (1, 2, 3))


@pytest.mark.parametrize(
    "curve",
    [
        [(0, 1.0)],
        [(i, 10 * 0.9**i) for i in range(100)],
        [(i, -1.0) for i in range(5)],
        [(0, float("nan")), (1, float("inf")), (2, 1.0)],
        [(0, float("nan"))],
    ],
)
def test_any_curve_can_be_drawn(tmp_path, curve):
    draw_losses(tmp_path / "l.png", {"Stage 1": curve, "Stage 2": curve})
    assert _read(tmp_path / "l.png").shape[:2] == (640, 1800)


@pytest.mark.parametrize("names", [["loss"], ["0.attention", "0.mlp"], [str(i) for i in range(40)]])
def test_any_scales_can_be_drawn(tmp_path, names):
    draw_scales(tmp_path / "s.png", [(step, {name: 2.0**step for name in names}) for step in (0, 5)])
    assert _read(tmp_path / "s.png").shape[:2] == (720, 1800)


def test_a_sheet_of_samples_is_small(tmp_path):
    rng = np.random.default_rng(0)
    noise = [rng.integers(0, 256, (24, 24, 3), dtype=np.uint8) for _ in range(24)]
    cells = [Cell([picture], "there is a magenta triangle to the left of a cyan rhombus", True) for picture in noise]
    draw_sheet(tmp_path / "s.png", [Section("S0", "note", cells)], columns=8)
    assert (tmp_path / "s.png").stat().st_size < 300_000
