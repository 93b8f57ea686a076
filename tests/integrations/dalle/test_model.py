"""A trained model: saved and loaded it draws the same pictures; damage is found."""

import numpy as np
import pytest
import torch
from distopt.integrations.dalle import runs
from distopt.integrations.dalle.cli import main
from distopt.integrations.dalle.model import Model
from distopt.integrations.dalle.settings import InputError
from PIL import Image

CAPTIONS = ["a red circle above a blue square", "a zebra", "blue"]


@pytest.fixture
def run(tiny_model, tmp_path):
    tiny_model.save(tmp_path, "demo", {"seed": 0, "n": 2, "task_seed": 0})
    return runs.open_run(tmp_path)


def test_a_loaded_model_draws_what_the_saved_one_draws(tiny_model, run):
    loaded = Model.load(run, torch.device("cpu"))
    assert loaded.sampling == tiny_model.sampling
    assert loaded.dvae.settings == tiny_model.dvae.settings
    assert (loaded.draw(CAPTIONS, 3) == tiny_model.draw(CAPTIONS, 3)).all()


def test_a_seed_decides_the_pictures(tiny_model):
    pictures = tiny_model.draw(CAPTIONS, 3)
    assert pictures.shape == (3, 24, 24, 3)
    assert pictures.dtype == np.uint8
    assert (pictures == tiny_model.draw(CAPTIONS, 3)).all()
    assert (pictures != tiny_model.draw(CAPTIONS, 4)).any()


@pytest.mark.parametrize("name", [runs.DVAE, runs.TRANSFORMER, runs.TOKENIZER])
@pytest.mark.parametrize("content", [b"", b"nonsense", None])
def test_a_damaged_file_is_refused_in_one_line(run, name, content):
    path = run.folder / name
    path.write_bytes(path.read_bytes()[:-40] if content is None else content)
    with pytest.raises(InputError, match="cannot be read") as caught:
        Model.load(run, torch.device("cpu"))
    assert "\n" not in str(caught.value)


def test_a_missing_setting_is_refused_in_one_line(run):
    damaged = runs.Run(run.folder, run.kind, {"format": 1, "kind": "demo"})
    with pytest.raises(InputError, match="cannot be read"):
        Model.load(damaged, torch.device("cpu"))


def test_an_interrupted_save_is_no_run(tiny_model, tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "write_json", lambda *_: pytest.fail("as if it were killed"))
    with pytest.raises(pytest.fail.Exception):
        tiny_model.save(tmp_path, "demo", {})
    with pytest.raises(InputError, match="not a finished run"):
        runs.open_run(tmp_path)


@pytest.mark.parametrize(("n", "shape"), [("1", (264, 264)), ("10", None)])
def test_sample_writes_a_picture_or_a_sheet(run, tmp_path, capsys, n, shape):
    out = tmp_path / "new" / "out.png"
    arguments = ["sample", "--run", str(run.folder), "--caption", "a red  circle", "--out", str(out), "--n", n]
    assert main(arguments) == 0
    assert capsys.readouterr().out.strip() == str(out)
    with Image.open(out) as picture:
        assert picture.format == "PNG"
        assert shape is None or picture.size == shape
