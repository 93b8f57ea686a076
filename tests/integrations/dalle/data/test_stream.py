"""Laws of the stream: every usable picture once an epoch, for any number of ranks and threads; nothing broken stops it."""

import numpy as np
import pytest
import torch
from distopt.integrations.dalle.data import opening
from distopt.integrations.dalle.data.order import Part
from distopt.integrations.dalle.settings import DataOptions, InputError, TrainSettings
from hypothesis import given, settings
from hypothesis import strategies as st

from .conftest import draw, spoil, which, write_coco, write_folder, write_shards


def _opened(data, tmp_path, *, held_out=0.0, seed=0, shift=0, **options):
    options = DataOptions(reading="stream", **options)
    chosen = TrainSettings(size=8, held_out=held_out, seed=seed, shift=shift, data=options)
    run = tmp_path / "run"
    run.mkdir(exist_ok=True)
    opening.keep(opening.read(data, chosen, run), run)
    return opening.load(run, size=8, held_out=held_out, seed=seed, shift=shift, options=options)


def _row(source, stage, steps, batch, ranks=1):
    """What all ranks see together, step by step."""
    parts = [Part(stage, step, batch, rank, ranks) for step in steps for rank in range(ranks)]
    return [(s.caption, s.pixels.tobytes(), int(s.rng.integers(2**32))) for p in parts for s in source.samples_at(p)]


def _numbers(source, stage, steps, batch, ranks=1):
    parts = [Part(stage, step, batch, rank, ranks) for step in steps for rank in range(ranks)]
    return [which(sample.pixels) for part in parts for sample in source.samples_at(part)]


def test_every_picture_of_every_kind_comes_once_an_epoch_with_its_caption(each_kind, tmp_path):
    _, data = each_kind
    source = _opened(data, tmp_path)
    for stage in (1, 2):
        for epoch in range(2):
            steps = range(6 * epoch, 6 * (epoch + 1))
            samples = [s for step in steps for s in source.samples_at(Part(stage, step, 4))]
            assert sorted(which(s.pixels) for s in samples) == list(range(24))
            assert all(s.caption.startswith(f"picture number {which(s.pixels)}") for s in samples)


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_any_number_of_ranks_sees_the_same_global_batches(tmp_path, ranks):
    source = _opened(write_coco(tmp_path / "data", 23), tmp_path, shift=2)
    assert _row(source, 2, range(5), 12, ranks) == _row(source, 2, range(5), 12)


def test_a_run_goes_on_where_it_stopped_with_more_ranks(tmp_path):
    data = write_shards(tmp_path / "data", [1, 7, 0, 9])
    undisturbed = _row(_opened(data, tmp_path), 1, range(10), 12)
    before = _row(_opened(data, tmp_path), 1, range(4), 12, ranks=2)
    after = _row(_opened(data, tmp_path), 1, range(4, 10), 12, ranks=3)
    assert before + after == undisturbed


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_ranks_take_as_many_of_uneven_shards(tmp_path, ranks):
    data = write_shards(tmp_path / "data", [1, 0, 11, 2])
    sources = [_opened(data, tmp_path) for _ in range(ranks)]
    for step in range(8):  # three epochs of 14 pictures and more
        counts = [len(source.samples_at(Part(1, step, 12, rank, ranks))) for rank, source in enumerate(sources)]
        assert counts == [12 // ranks] * ranks


@pytest.mark.parametrize(("workers", "prefetch"), [(1, 0), (1, 3), (4, 2), (7, 1)])
def test_threads_and_batches_ahead_change_nothing(tmp_path, workers, prefetch):
    data = write_folder(tmp_path / "data", 10)
    spoil(data / "003.png")
    found = _row(_opened(data, tmp_path, shift=1, workers=workers, prefetch=prefetch), 2, range(6), 4)
    assert found == _row(_opened(data, tmp_path, shift=1, workers=2, prefetch=0), 2, range(6), 4)


@settings(max_examples=15, deadline=None)
@given(broken=st.sets(st.integers(0, 11), max_size=11), ranks=st.sampled_from([1, 2, 3]))
def test_broken_pictures_are_replaced_named_and_shift_nobody(tmp_path_factory, broken, ranks):
    tmp_path = tmp_path_factory.mktemp("broken")
    data = write_folder(tmp_path / "data", 12)
    whole = _numbers(_opened(data, tmp_path), 1, range(4), 6)
    for i in broken:
        spoil(data / f"{i:03}.png")
    sources = [_opened(data, tmp_path) for _ in range(ranks)]
    found = []
    for step in range(4):
        for rank, source in enumerate(sources):
            found += [which(s.pixels) for s in source.samples_at(Part(1, step, 6, rank, ranks))]
    assert len(found) == 24
    assert not set(found) & broken
    assert [f for f, w in zip(found, whole, strict=True) if w not in broken] == [w for w in whole if w not in broken]
    assert {name for source in sources for name in source.broken} == {f"{i:03}.png" for i in broken}


def test_a_file_that_goes_away_is_replaced(tmp_path):
    data = write_folder(tmp_path / "data", 6)
    source = _opened(data, tmp_path, prefetch=0)
    (data / "002.png").unlink()
    assert 2 not in _numbers(source, 1, range(2), 6)
    assert source.broken == ["002.png"]


def test_held_out_pictures_that_cannot_be_read_do_not_end_a_run(tmp_path):
    data = write_folder(tmp_path / "data", 8)
    source = _opened(data, tmp_path, held_out=0.01)
    judged = source.held_out(9)
    (caption,) = judged.captions
    assert judged.unseen
    spoil(data / f"{int(caption.split()[2]):03}.png")
    judged = source.held_out(9)
    assert len(judged.captions) == len(judged.pictures) == source.counts[0] == 7
    assert caption not in judged.captions
    assert not judged.unseen


def test_with_nothing_left_to_read_the_run_says_so(tmp_path):
    data = write_folder(tmp_path / "data", 3)
    source = _opened(data, tmp_path)
    for path in data.glob("*.png"):
        path.unlink()
    with pytest.raises(InputError, match=r"100 pictures in a row cannot be read.*\.png"):
        source.samples_at(Part(1, 0, 2))
    with pytest.raises(InputError, match="none of 3 pictures can be read"):
        source.training(5)


def test_every_caption_of_a_picture_is_drawn(tmp_path):
    source = _opened(write_coco(tmp_path / "data", 3, several=3), tmp_path)
    seen = {sample.caption for step in range(40) for sample in source.samples_at(Part(2, step, 3))}
    assert seen == {f"picture number {i} {k}" for i in range(3) for k in range(3)}
    assert set(source.captions()) == seen


def test_nothing_held_out_is_trained_on_and_the_split_is_by_name(each_kind, tmp_path):
    _, data = each_kind
    source = _opened(data, tmp_path, held_out=0.3)
    training, held = source.counts
    assert training + held == 24
    assert held > 0
    judged = source.held_out(100)
    numbers = {which((picture.permute(1, 2, 0) * 255).round()) for picture in judged.pictures}
    assert len(numbers) == held
    assert not numbers & set(_numbers(source, 2, range(12), 4))
    assert not {caption.split()[2] for caption in source.captions()} & {
        caption.split()[2] for caption in judged.captions
    }


def test_the_tokenizer_reads_a_seeded_sample_of_many_captions(tmp_path):
    data = write_folder(tmp_path / "data", 20)
    some = list(_opened(data, tmp_path, captions_read=5).captions())
    assert len(some) == 5
    assert some == list(_opened(data, tmp_path, captions_read=5).captions())
    assert some != list(_opened(data, tmp_path, captions_read=5, seed=1).captions())


def test_it_is_also_a_source_that_draws(tmp_path):
    source = _opened(write_folder(tmp_path / "data", 9), tmp_path, held_out=0.2)
    first, second = (source.pairs(5, np.random.default_rng(3)) for _ in range(2))
    assert first[0] == second[0]
    assert torch.equal(first[1], second[1])
    assert source.pictures(4, np.random.default_rng(0)).shape == (4, 3, 8, 8)
    assert source.pictures(0, np.random.default_rng(0)).shape == (0, 3, 8, 8)


def test_augmentation_is_that_of_the_stage_and_the_same_for_any_number_of_ranks(tmp_path, monkeypatch):
    from distopt.integrations.dalle.data import stream

    called = []
    original = dict(stream._AUGMENT)
    for stage in (1, 2):

        def augment(picture, size, rng, stage=stage):
            called.append((stage, picture.shape, picture.dtype.name))
            return original[stage](picture, size, rng)

        monkeypatch.setitem(stream._AUGMENT, stage, augment)
    data = tmp_path / "data"
    for i in range(6):
        draw(data, i, (20, 14)).with_suffix(".txt").write_text("a b c")
    source = _opened(data, tmp_path, augmentation="paper", prefetch=0)
    for stage in (1, 2):
        called.clear()
        rows = _row(source, stage, range(3), 6)
        assert set(called) == {(stage, (14, 20, 3), "uint8")}
        assert rows == _row(source, stage, range(3), 6, ranks=3)


def test_shifting_repeats_the_edge(tmp_path):
    data = tmp_path / "data"
    draw(data, 0).with_suffix(".txt").write_text("one")
    from PIL import Image

    picture = Image.new("RGB", (8, 8))
    picture.paste((255, 255, 255), (0, 0, 1, 8))
    picture.save(data / "000.png")
    source = _opened(data, tmp_path, shift=2)
    widths = {int((s.pixels[4, :, 0] == 255).sum()) for step in range(40) for s in source.samples_at(Part(1, step, 4))}
    assert widths == {0, 1, 2, 3}
