"""A step's batch is the same for any number of ranks, text and dropout included."""

import numpy as np
import pytest
import torch
from distopt.integrations.dalle.context import Context, Stream
from distopt.integrations.dalle.data import batches, opening
from distopt.integrations.dalle.folder import FolderSource
from distopt.integrations.dalle.pictures import Pictures
from distopt.integrations.dalle.settings import DataOptions, TrainSettings
from distopt.integrations.dalle.text import PAD, Tokenizer

from .conftest import spoil, write_coco


@pytest.fixture
def stream(tmp_path):
    path = write_coco(tmp_path / "data", 19)
    spoil(tmp_path / "data" / "train" / "007.png")
    settings = TrainSettings(size=8, data=DataOptions(workers=3))
    run = tmp_path / "run"
    run.mkdir()
    opening.keep(opening.read(path, settings), run)
    return opening.load(run, size=8, held_out=0.1, shift=1)


def _together(stream, ranks, uncaptioned=0.3):
    tokenizer = Tokenizer.train(stream.captions(), 60)

    def encode(captions, rng):
        return tokenizer.encode(captions, 12, rng=rng, dropout=0.5)

    texts, pictures = [], []
    for step in range(4):
        for rank in range(ranks):
            part = Context(rank=rank, world_size=ranks).part(2, step, 12)
            text, drawn = batches.text_and_pictures_at(stream, part, encode, uncaptioned)
            assert len(text) == len(drawn) == 12 // ranks
            texts.append(text)
            pictures.append(drawn)
    return torch.cat(texts), torch.cat(pictures)


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_the_global_batch_of_stage_two_is_the_same_for_any_number_of_ranks(stream, ranks):
    for ours, alone in zip(_together(stream, ranks), _together(stream, 1), strict=True):
        assert torch.equal(ours, alone)


def test_some_captions_are_dropped_and_no_picture(stream):
    text, pictures = _together(stream, 1)
    silent = (text == PAD).all(1)
    assert 3 <= silent.sum() <= 28  # 48 pictures, 14.4 expected
    assert not (_together(stream, 1, uncaptioned=0.0)[0] == PAD).all(1).any()
    assert torch.equal(pictures, _together(stream, 1, uncaptioned=0.0)[1])


@pytest.mark.parametrize("ranks", [2, 3])
def test_the_global_batch_of_stage_one_is_the_same_for_any_number_of_ranks(stream, ranks):
    for step in range(3):
        parts = [Context(rank=rank, world_size=ranks).part(1, step, 12) for rank in range(ranks)]
        together = torch.cat([batches.pictures_at(stream, part) for part in parts])
        assert torch.equal(together, batches.pictures_at(stream, Context().part(1, step, 12)))


def test_broken_pictures_are_gathered(stream):
    for step in range(4):
        batches.pictures_at(stream, Context().part(1, step, 12))
    assert batches.broken_of(stream, Context()) == ["007.png"]


def test_a_source_that_draws_is_no_stream(stream):
    source = FolderSource(Pictures(["a", "b"], ["a", "b"], np.zeros((2, 8, 8, 3), np.uint8)))
    assert isinstance(stream, Stream)
    assert not isinstance(source, Stream)
    assert batches.broken_of(source, Context()) == []
