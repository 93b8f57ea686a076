"""``train --data``: what is recognised, refused in one line, planned, indexed once and opened again; and a whole run."""

import json
import os

import numpy as np
import pytest
from distopt.integrations.dalle import train
from distopt.integrations.dalle.cli import main
from distopt.integrations.dalle.context import Context
from distopt.integrations.dalle.data import opening, shards
from distopt.integrations.dalle.data.index import FOLDER, Index
from distopt.integrations.dalle.data.split import place_of
from distopt.integrations.dalle.data.stream import StreamSource
from distopt.integrations.dalle.folder import FolderSource
from distopt.integrations.dalle.pictures import Pictures
from distopt.integrations.dalle.settings import DataOptions, InputError, TrainSettings, build, load_toml
from distopt.integrations.running import launch

from .conftest import write_folder, write_shards, write_tsv

TINY = """
size = 8
[stage1]
steps = 3
batch = 6
codes = 8
[stage2]
steps = 3
batch = 6
width = 16
layers = 1
heads = 2
vocabulary = 60
text_length = 8
"""


@pytest.fixture
def no_process(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(launch, "start", lambda *_, **__: pytest.fail("a process was started"))


def _settings(**options):
    return TrainSettings(size=8, data=DataOptions(**options))


@pytest.mark.parametrize(
    ("content", "name", "config", "words"),
    [
        (None, "gone", "", ["gone", "there is no such folder"]),
        (None, "gone.json", "", ["gone.json", "there is no such file"]),
        (None, "gone.tsv", "", ["gone.tsv", "there is no such file"]),
        (None, "{000..004}.tar", "", ["{000..004}.tar", "there is no such shard"]),
        (b"x", "notes.md", "", ["notes.md", "is not a folder, a .json, a .tsv or a .tar"]),
        (b"{", "a.json", "", ["a.json", "is not valid JSON"]),
        (b'{"images": [], "annotations": []}', "a.json", "", ["data.images"]),
        (b"no tab\n", "a.tsv", "", ["a.tsv", "a tab"]),
        (b"", "a.tsv", "", ["0 usable pictures", "nothing else was found"]),
        (b"a dog\tgone.png\n", "a.tsv", "", ["0 usable pictures", "1 whose file is missing"]),
        (b"not a tar", "a.tar", "", ["0 usable pictures", "1 shards that are no tar files"]),
        (b"a\tb\n", "a.tsv", "[data]\nimages = '/nowhere'", ["data.images /nowhere", "no such folder"]),
        (b"a\tb\n", "a.tsv", "[data]\nkind = 'folder'", ["a.tsv", "is not a folder"]),
        (b"a\tb\n", "a.tsv", "[data]\nreading = 'memory'", ["data.reading", "'memory'", "stream"]),
        (b"a\tb\n", "a.tsv", "[data]\nkind = 'zip'", ["data.kind", "'zip'", "webdataset"]),
        (b"a\tb\n", "a.tsv", "[data]\nworkers = 0", ["data.workers", "0", "from 1"]),
        (b"a\tb\n", "a.tsv", "[data]\nboilerplate = '['", ["data.boilerplate", "regular expression"]),
    ],
)
def test_what_cannot_be_used_is_refused_in_one_line(no_process, capsys, tmp_path, content, name, config, words):
    data, out, settings = tmp_path / name, tmp_path / "run", tmp_path / "settings.toml"
    if content is not None:
        data.write_bytes(content)
    settings.write_text(config)
    assert main(["train", "--data", str(data), "--out", str(out), "--config", str(settings)]) == 2
    said, error = capsys.readouterr()
    assert said == ""
    assert error.count("\n") == 1
    assert all(word in error for word in words), error
    assert not out.exists()


def test_check_says_what_there_is_and_how_long_an_epoch_takes(no_process, capsys, tmp_path, each_kind):
    kind, data = each_kind
    config = tmp_path / "settings.toml"
    config.write_text(f"held_out = 0.0\n{TINY}[data]\nshortest = 3\n")
    assert main(["train", "--data", str(data), "--out", str(tmp_path / "run"), "--config", str(config), "--check"]) == 0
    said = capsys.readouterr().out
    captions = ", 48 captions" if kind == "coco" else ""
    assert f"24 pictures with captions{captions}\n" in said
    assert "steps an epoch: 4 and 4, of 24 pictures" in said
    assert not (tmp_path / "run").exists()


def test_the_kind_is_recognised(tmp_path):
    write_folder(tmp_path / "folder", 2)
    table = write_tsv(tmp_path / "table", 2)
    pattern = write_shards(tmp_path / "shards", [2])
    (tmp_path / "a.json").write_text("{}")
    for data, kind in [(tmp_path / "folder", "folder"), (table, "tsv"), (tmp_path / "a.json", "coco")]:
        assert opening.kind_of(data, DataOptions()) == kind
    for data in (pattern, tmp_path / "shards/000.tar", tmp_path / "shards/*.tar"):
        assert opening.kind_of(data, DataOptions()) == "webdataset"
    assert opening.kind_of(tmp_path / "shards", DataOptions(kind="webdataset")) == "webdataset"


def test_a_small_folder_is_read_into_memory_and_a_large_one_is_not(tmp_path, monkeypatch):
    data = write_folder(tmp_path, 3)
    assert isinstance(opening.read(data, _settings()), Pictures)
    for options in ({"reading": "stream"}, {"augmentation": "paper"}, {"filters": "paper"}):
        assert isinstance(opening.read(data, _settings(**options)), Index)
    monkeypatch.setattr(opening, "IN_MEMORY", 3 * 3 * 64 - 1)
    assert isinstance(opening.read(data, _settings()), Index)
    monkeypatch.setattr(opening, "IN_MEMORY", 3 * 3 * 64)
    assert isinstance(opening.read(data, _settings()), Pictures)


def test_a_run_keeps_only_what_was_read_last(tmp_path):
    data, run = write_folder(tmp_path / "data", 3), tmp_path / "run"
    run.mkdir()
    for reading, kind in [("stream", StreamSource), ("memory", FolderSource), ("stream", StreamSource)]:
        opening.keep(opening.read(data, _settings(reading=reading), run), run)
        assert isinstance(opening.load(run, size=8, held_out=0.1), kind)


def test_a_run_goes_on_with_data_that_were_moved_but_not_with_others(tmp_path):
    data = write_folder(tmp_path / "data", 5)
    first = opening.read(data, _settings(reading="stream")).fingerprint
    moved = data.rename(tmp_path / "elsewhere")
    assert opening.read(moved, _settings(reading="stream")).fingerprint == first
    (moved / "003.txt").write_text("another")
    assert opening.read(moved, _settings(reading="stream")).fingerprint != first


def test_the_index_is_what_was_saved_and_damage_is_found(tmp_path):
    data, run = write_folder(tmp_path / "data", 5), tmp_path / "run"
    run.mkdir()
    (data / "größer.png").write_bytes((data / "000.png").read_bytes())
    (data / "größer.txt").write_text("größer", encoding="utf-8")
    (data / "alone.txt").write_text("a")
    index = opening.read(data, _settings(reading="stream"))
    index.save(run)
    loaded = Index.load(run)
    assert list(loaded.names) == list(index.names) == [*(f"{i:03}.png" for i in range(5)), "größer.png"]
    assert list(loaded.captions) == list(index.captions)
    assert loaded.captions_of(5) == ["größer"]
    assert (loaded.fingerprint, loaded.summary()) == (index.fingerprint, index.summary())
    assert (loaded.held_out(0.4) == index.held_out(0.4)).all()
    for name in ("places", "captions_data", "last"):
        path = run / FOLDER / f"{name}.npy"
        whole = path.read_bytes()
        for damaged in (whole[:-1] + bytes([whole[-1] ^ 1]), whole[:-3], b"", b"\x93NUMPY"):
            path.write_bytes(damaged)
            with pytest.raises(InputError, match="missing or damaged"):
                Index.load(run)
        path.write_bytes(whole)
    Index.load(run)
    (run / FOLDER / "index.json").write_text("{}")
    with pytest.raises(InputError, match="missing or damaged"):
        Index.load(run)


def test_the_split_is_that_of_pictures_in_memory(tmp_path):
    data = write_folder(tmp_path / "data", 40)
    index, pictures = (opening.read(data, _settings(reading=how)) for how in ("stream", "memory"))
    for fraction in (0.0, 0.1, 0.5):
        assert np.array_equal(index.held_out(fraction), pictures.held_out(fraction))


def test_shards_are_indexed_once_and_anew_when_they_change(tmp_path, monkeypatch):
    pattern, run = write_shards(tmp_path / "data", [2, 3]), tmp_path / "run"
    run.mkdir()
    opening.keep(opening.read(pattern, _settings(), run), run)
    examples = shards.examples
    monkeypatch.setattr(shards, "examples", lambda *_: pytest.fail("shards were indexed again"))
    assert len(opening.read(pattern, _settings(), run)) == 5
    monkeypatch.setattr(shards, "examples", examples)
    assert "left out" in str(opening.read(pattern, _settings(caption_field="x"), run).summary())
    write_shards(tmp_path / "data", [2, 4])
    with pytest.raises(InputError, match=r"\.tar: is not what it was"):
        opening.load(run, size=8, held_out=0.1)
    assert len(opening.read(pattern, _settings(), run)) == 6
    os.utime(tmp_path / "data" / "000.tar", ns=(1, 1))
    monkeypatch.setattr(shards, "examples", lambda *_: iter(()))
    with pytest.raises(InputError, match="0 usable"):
        opening.read(pattern, _settings(), run)


def test_two_pictures_of_one_name_are_one(tmp_path):
    pattern = write_shards(tmp_path, [1])
    (tmp_path / "again").mkdir()
    (tmp_path / "again" / "000.tar").write_bytes((tmp_path / "000.tar").read_bytes())
    index = opening.read(tmp_path / "{,again/}000.tar", _settings())
    assert sorted(index.names) == ["000.tar/000", "again/000.tar/000"]
    assert pattern.parent == tmp_path
    assert "of the same name" not in str(index.summary())


def test_two_ranks_train_on_uneven_shards_with_broken_pictures(tmp_path, monkeypatch, capfd):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    spoiled = sorted(range(1, 10), key=lambda i: place_of(f"001.tar/{i:03}"))[-2:]  # the last to be held out
    data, out = write_shards(tmp_path / "data", [1, 9, 0, 3], spoiled=spoiled), tmp_path / "run"
    config = tmp_path / "settings.toml"
    config.write_text(TINY)
    assert main(["train", "--data", str(data), "--out", str(out), "--config", str(config)]) == 0
    report = json.loads((out / "report.json").read_text())["data"]
    assert report["pictures"] == 13
    assert report["left_out"] == {"broken": 2}
    assert report["left_out_names"] == {"broken": [f"001.tar/{i:03}" for i in sorted(spoiled)]}
    capfd.readouterr()
    assert main(["evaluate", "--run", str(out)]) == 0
    assert json.loads(capfd.readouterr().out.splitlines()[-1])["held_out"]["n"] == report["held_out"]


def test_every_kind_trains(tmp_path, each_kind):
    kind, data = each_kind
    augmentation = "paper" if kind in ("tsv", "folder") else "none"
    config = tmp_path / "settings.toml"
    config.write_text(f"{TINY}[data]\nreading = 'stream'\naugmentation = '{augmentation}'\n")
    out = tmp_path / "run"
    out.mkdir()
    train.run(build(TrainSettings, load_toml(config)), data, out, Context(), read=True)
    report = json.loads((out / "report.json").read_text())
    assert report["data"]["pictures"] == 24
    assert report["data"]["left_out"] == {}
    assert np.isfinite(report["held_out"]["image_loss"])
