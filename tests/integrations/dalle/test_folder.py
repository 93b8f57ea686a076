"""The folder as a source of batches."""

import numpy as np
import pytest
import torch
from distopt.integrations.dalle.folder import FolderSource
from distopt.integrations.dalle.pictures import Pictures

from distopt.errors import SettingError


@pytest.fixture
def pictures():
    pixels = np.random.default_rng(0).integers(0, 256, (40, 8, 8, 3), dtype=np.uint8)
    names = [f"{i}.png" for i in range(40)]
    return Pictures(names, [f"picture {name}" for name in names], pixels)


def test_a_batch_is_a_pure_function_of_its_generator(pictures):
    source = FolderSource(pictures, shift=2)
    first, second = (source.pairs(5, np.random.default_rng(3)) for _ in range(2))
    assert first[0] == second[0]
    assert torch.equal(first[1], second[1])
    assert torch.equal(source.pictures(5, np.random.default_rng(4)), source.pictures(5, np.random.default_rng(4)))


def test_captions_belong_to_their_pictures_and_nothing_held_out_is_drawn(pictures):
    source = FolderSource(pictures, held_out=0.3)
    held = source.held_out(100).captions
    captions, batch = source.pairs(500, np.random.default_rng(0))
    assert batch.shape == (500, 3, 8, 8)
    assert batch.dtype == torch.float32
    assert not set(held) & set(captions)
    assert set(source.captions()) == set(captions) == set(pictures.captions) - set(held)
    for caption, picture in zip(captions[:20], batch, strict=False):
        expected = pictures.pixels[pictures.captions.index(caption)]
        assert torch.equal((picture * 255).round().byte().permute(1, 2, 0), torch.from_numpy(expected))


def test_stage_one_sees_no_held_out_picture(pictures):
    source = FolderSource(pictures, held_out=0.3)
    held = source.held_out(100).pictures
    drawn = source.pictures(500, np.random.default_rng(0))
    assert not any(torch.equal(a, b) for a in held for b in drawn)


def test_shifting_moves_and_repeats_the_edge():
    pixels = np.zeros((1, 8, 8, 3), np.uint8)
    pixels[0, :, 0] = 255
    moved = FolderSource(Pictures(["a"], ["a"], pixels), held_out=0, shift=2).pictures(200, np.random.default_rng(0))
    widths = moved[:, 0, 4].sum(1).unique().tolist()
    assert widths == [0.0, 1.0, 2.0, 3.0]


def test_with_nothing_held_out_training_pictures_are_measured(pictures):
    source = FolderSource(pictures, held_out=0)
    assert source.counts == (40, 0)
    judged = source.held_out(7)
    assert len(judged.captions) == len(judged.pictures) == 7
    assert not judged.unseen
    assert FolderSource(pictures, held_out=0.3).held_out(7).unseen


def test_a_fingerprint_is_of_names_captions_pixels_and_split(pictures):
    darker = Pictures(pictures.names, pictures.captions, pictures.pixels // 2)
    renamed = Pictures([f"a/{name}" for name in pictures.names], pictures.captions, pictures.pixels)
    retold = Pictures(pictures.names, [caption.upper() for caption in pictures.captions], pictures.pixels)
    same = Pictures(list(pictures.names), list(pictures.captions), pictures.pixels.copy())
    sources = [FolderSource(each) for each in (pictures, darker, renamed, retold)] + [
        FolderSource(pictures, held_out=0.2)
    ]
    assert len({source.fingerprint for source in sources}) == 5
    assert FolderSource(same).fingerprint == sources[0].fingerprint


@pytest.mark.parametrize(("field", "value"), [("held_out", 1.0), ("held_out", -0.1), ("shift", -1)])
def test_bad_settings_are_refused(pictures, field, value):
    with pytest.raises(SettingError, match=field):
        FolderSource(pictures, **{field: value})
