"""Folders of pictures: what is read, how, and what is left out."""

import numpy as np
import pytest
from distopt.integrations.dalle.pictures import Pictures, read_folder, read_picture
from distopt.integrations.dalle.settings import InputError
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

RED, WHITE = [255, 0, 0], [255, 255, 255]


def _write(folder, name, picture=None, caption="a thing"):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    (picture or Image.new("RGB", (9, 9), "red")).save(path)
    if caption is not None:
        path.with_suffix(".txt").write_text(caption, encoding="utf-8")
    return path


@pytest.mark.parametrize("ending", ["png", "jpg", "JPEG", "webp", "bmp", "gif", "tif", "ppm", "tga", "ico", "jp2"])
def test_every_common_format_is_read(tmp_path, ending):
    _write(tmp_path, f"red.{ending}", Image.new("RGB", (16, 16), "red"))
    pictures = read_folder(tmp_path, 8)
    assert pictures.left_out == {}
    assert np.abs(pictures.pixels[0].astype(int) - RED).max() <= 3


@pytest.mark.parametrize(
    ("picture", "colour"),
    [
        (Image.new("L", (8, 8), 77), [77, 77, 77]),
        (Image.new("1", (8, 8), 1), WHITE),
        (Image.new("RGB", (8, 8), "red").convert("P"), RED),
        (Image.new("RGBA", (8, 8), (255, 0, 0, 0)), WHITE),
        (Image.new("RGBA", (8, 8), (255, 0, 0, 255)), RED),
        (Image.new("LA", (8, 8), (0, 0)), WHITE),
        (Image.fromarray(np.full((8, 8), 65535, np.uint16)), WHITE),
        (Image.fromarray(np.full((8, 8), 32896, np.uint16)), [128, 128, 128]),
    ],
    ids=["grey", "bilevel", "palette", "transparent", "opaque", "grey-alpha", "16-bit-white", "16-bit-grey"],
)
def test_every_mode_becomes_rgb_over_white(tmp_path, picture, colour):
    path = tmp_path / "p.png"
    picture.save(path)
    assert (read_picture(path, 8) == colour).all()


def test_a_transparent_palette_entry_is_white(tmp_path):
    picture = Image.new("P", (8, 8), 0)
    picture.putpalette([255, 0, 0] * 256)
    picture.save(tmp_path / "p.gif", transparency=0)
    assert (read_picture(tmp_path / "p.gif", 8) == WHITE).all()


@pytest.mark.parametrize(("top", "shown"), [(1.0, 128), (255.0, 128)])
def test_floating_point_goes_up_to_one_or_to_255(tmp_path, top, shown):
    values = np.linspace(0, top, 64, dtype=np.float32).reshape(8, 8)
    Image.fromarray(values).save(tmp_path / "p.tif")
    assert abs(int(read_picture(tmp_path / "p.tif", 8).mean()) - shown) <= 2


def test_cmyk_is_read(tmp_path):
    Image.new("CMYK", (8, 8), (0, 255, 255, 0)).save(tmp_path / "p.jpg")
    assert np.abs(read_picture(tmp_path / "p.jpg", 8).astype(int) - RED).max() <= 8


def test_pictures_are_made_upright(tmp_path):
    picture = Image.new("RGB", (16, 16), "white")
    picture.paste((255, 0, 0), (0, 0, 16, 8))
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    picture.save(tmp_path / "p.png", exif=exif)
    read = read_picture(tmp_path / "p.png", 8)
    assert (read[:4] == WHITE).all()
    assert (read[4:] == RED).all()


def test_an_animation_gives_its_first_frame(tmp_path):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / "p.gif", save_all=True, append_images=frames[1:])
    assert (read_picture(tmp_path / "p.gif", 8) == RED).all()


@pytest.mark.parametrize(("width", "height"), [(24, 8), (8, 24), (40, 8)])
def test_the_central_square_is_kept(tmp_path, width, height):
    picture = Image.new("RGB", (width, height), "white")
    left, top = (width - 8) // 2, (height - 8) // 2
    picture.paste((255, 0, 0), (left, top, left + 8, top + 8))
    picture.save(tmp_path / "p.png")
    assert (read_picture(tmp_path / "p.png", 8) == RED).all()


def test_resizing_is_by_area(tmp_path):
    values = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    Image.fromarray(values).save(tmp_path / "p.png")
    mean = values.reshape(8, 4, 8, 4, 3).mean((1, 3))
    assert np.abs(read_picture(tmp_path / "p.png", 8) - mean).max() <= 1


def test_a_large_jpeg_keeps_all_the_detail_that_fits(tmp_path):
    stripes = np.zeros((256, 256), np.uint8)
    stripes[np.arange(256) % 8 < 4] = 255
    Image.fromarray(stripes).save(tmp_path / "p.jpg", quality=95)
    read = read_picture(tmp_path / "p.jpg", 64)[:, :, 0]
    assert (read[0::2] > 240).all()
    assert (read[1::2] < 15).all()


def test_what_cannot_be_used_is_counted_and_named(tmp_path):
    _write(tmp_path, "good.png")
    _write(tmp_path, "deep/er/good.png", caption="\ufeff  two\n lines ")
    _write(tmp_path, "silent.png", caption=None)
    _write(tmp_path, "empty.png", caption=" \n")
    _write(tmp_path, "latin.png").with_suffix(".txt").write_bytes(b"caf\xe9")
    _write(tmp_path, "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n nothing")
    whole = _write(tmp_path, "cut.jpg", Image.effect_noise((64, 64), 90)).read_bytes()
    (tmp_path / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "alone.txt").write_text("no picture")
    (tmp_path / ".hidden.png").write_bytes(b"")
    (tmp_path / "notes.pdf").write_bytes(b"%PDF")
    pictures = read_folder(tmp_path, 8)
    assert list(pictures.names) == ["deep/er/good.png", "good.png"]
    assert list(pictures.captions) == ["two lines", "a thing"]
    assert pictures.left_out == {
        "captions without a picture": ["alone.txt"],
        "broken": ["broken.png", "cut.jpg"],
        "with an empty caption": ["empty.png"],
        "with an unreadable caption": ["latin.png"],
        "without a caption": ["silent.png"],
    }
    assert any("2 broken: broken.png, cut.jpg" in line for line in pictures.summary())


def test_long_lists_of_names_are_cut_short():
    pictures = Pictures([], [], np.zeros((0, 8, 8, 3), np.uint8), {"broken": [f"{i}.png" for i in range(99)]})
    line = pictures.summary()[1]
    assert line.startswith("left out: 99 broken: 0.png")
    assert line.endswith(", ...")
    assert "50.png" not in line


def test_a_folder_that_contains_itself_is_read_once(tmp_path):
    _write(tmp_path, "a.png")
    (tmp_path / "again").symlink_to(tmp_path)
    assert len(read_folder(tmp_path, 8).names) == 1


@pytest.mark.parametrize("held_out", [0.0, 0.1])
def test_a_folder_without_a_usable_picture_is_refused_with_reasons(tmp_path, held_out):
    with pytest.raises(InputError, match=r"0 usable.*no picture"):
        read_folder(tmp_path, 8).require(held_out)
    _write(tmp_path, "silent.png", caption=None)
    with pytest.raises(InputError, match="1 without a caption"):
        read_folder(tmp_path, 8).require(held_out)


def _named(names):
    names = sorted(names)
    return Pictures(names, names, np.zeros((len(names), 8, 8, 3), np.uint8))


_NAMES = st.sets(st.text(min_size=1, max_size=5), min_size=2, max_size=40)


@given(_NAMES, st.floats(0.01, 0.9))
def test_something_is_held_out_and_something_is_trained_on(names, fraction):
    chosen = _named(names).held_out(fraction)
    assert 0 < chosen.sum() < len(chosen)
    assert not _named(names).held_out(0.0).any()


@given(st.integers(0, 1000))
def test_a_growing_folder_keeps_its_split(start):
    names = [f"{start}-{i}.jpg" for i in range(300)]
    small, large = _named(names[:200]), _named(names)
    before = dict(zip(small.names, small.held_out(0.3), strict=True))
    after = dict(zip(large.names, large.held_out(0.3), strict=True))
    assert all(after[name] == held for name, held in before.items())
    assert 0.15 < sum(after.values()) / 300 < 0.45


def test_pictures_are_saved_and_loaded(tmp_path):
    _write(tmp_path, "a.png", caption="größer")
    _write(tmp_path, "b.png", caption=None)
    pictures = read_folder(tmp_path, 8)
    pictures.save(tmp_path)
    loaded = Pictures.load(tmp_path)
    assert (loaded.pixels == pictures.pixels).all()
    assert (loaded.names, loaded.captions, loaded.left_out) == (["a.png"], ["größer"], pictures.left_out)


def test_a_damaged_store_is_refused(tmp_path):
    _write(tmp_path, "a.png")
    read_folder(tmp_path, 8).save(tmp_path)
    (tmp_path / "pictures.npy").write_bytes(b"\x93NUMPY")
    with pytest.raises(InputError, match="damaged"):
        Pictures.load(tmp_path)
