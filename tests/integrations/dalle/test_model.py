"""A trained model: saved and loaded it draws the same pictures; damage is found."""

import numpy as np
import pytest
import torch
from distopt.integrations.dalle import runs
from distopt.integrations.dalle.cli import main
from distopt.integrations.dalle.drawing import Top
from distopt.integrations.dalle.generate import top_codes
from distopt.integrations.dalle.model import Model
from distopt.integrations.dalle.sampling import SamplingSettings
from distopt.integrations.dalle.settings import InputError
from distopt.integrations.scenes.draw import to_uint8
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


def _sampled(run, out, *flags):
    arguments = ["sample", "--run", run.folder, "--caption", "a red circle", "--out", out, *flags]
    assert main([str(argument) for argument in arguments]) == 0
    with Image.open(out) as picture:
        return np.asarray(picture)


def test_flags_override_how_the_run_samples(run, tmp_path):
    own = _sampled(run, tmp_path / "own.png")
    assert (own == _sampled(run, tmp_path / "same.png", "--temperature", "0.9")).all()
    greedy = _sampled(run, tmp_path / "greedy.png", "--temperature", "0")
    for flags in (["--top-k", "1"], ["--top-p", "0.000001"]):
        assert (greedy == _sampled(run, tmp_path / "a.png", *flags)).all()
    assert (greedy == _sampled(run, tmp_path / "a.png", "--temperature", "0", "--seed", "5")).all()
    assert (own != greedy).any()


def test_every_flag_of_sampling_reaches_the_model(run, tmp_path, monkeypatch):
    asked = []
    draw = Model.draw
    monkeypatch.setattr(Model, "draw", lambda self, *given: asked.append(self.sampling) or draw(self, *given))
    flags = ["--temperature", "0.5", "--top-k", "7", "--top-p", "0.75", "--guidance", "3"]
    _sampled(run, tmp_path / "a.png", *flags)
    assert asked == [SamplingSettings(temperature=0.5, top_k=7, top_p=0.75, guidance=3.0)]


def test_a_sample_continues_the_top_of_a_picture(tiny_model, run, tmp_path):
    given = tmp_path / "given.png"
    noise = np.random.default_rng(0).integers(256, size=(24, 24, 3), dtype=np.uint8)
    Image.fromarray(noise).save(given)
    model = Model.load(run, torch.device("cpu"))
    codes = top_codes(model, Top(noise, 4))
    pixels = torch.from_numpy(noise).permute(2, 0, 1).float()[None] / 255
    assert torch.equal(codes, tiny_model.dvae.tokenize(pixels)[0, : 4 * 6])
    drawn = _sampled(run, tmp_path / "drawn.png", "--image", given, "--rows", "4")
    expected = model.draw(["a red circle"], 0, codes)[0]
    assert (drawn == np.repeat(np.repeat(expected, 11, axis=0), 11, axis=1)).all()
    # A decoded token depends on its own patch and the one beside it: three rows of tokens are the given ones for sure.
    whole = to_uint8(tiny_model.dvae.decode(tiny_model.dvae.tokenize(pixels)))[0]
    assert (expected[:12] == whole[:12]).all()
    assert (model.draw(["a red circle"] * 2, 1, codes)[:, :12] == whole[:12]).all()
    _sampled(run, tmp_path / "sheet.png", "--image", given, "--rows", "5", "--n", "3")


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--rows", "2"], ["--rows needs --image"]),
        (["--image", "given.png"], ["--image needs --rows"]),
        (["--image", "none.png", "--rows", "2"], ["--image none.png", "no such file"]),
        (["--image", __file__, "--rows", "2"], ["--image", "cannot be read as a picture"]),
        (["--image", "given.png", "--rows", "6"], ["--rows 6", "from 1 to 5"]),
        (["--image", "given.png", "--rows", "0"], ["--rows", "'0'", "from 1"]),
        (["--temperature", "-1"], ["--temperature", "'-1'", "from 0 to 10"]),
        (["--temperature", "nan"], ["--temperature", "'nan'"]),
        (["--top-k", "0"], ["--top-k", "'0'", "a whole number from 1"]),
        (["--top-k", "1.5"], ["--top-k", "'1.5'"]),
        (["--top-p", "0"], ["--top-p", "'0'", "to 1"]),
        (["--guidance", "inf"], ["--guidance", "'inf'", "from 0 to 100"]),
    ],
)
def test_a_wish_that_cannot_be_met_is_refused_before_anything_is_loaded(run, capsys, monkeypatch, flags, words):
    monkeypatch.setattr(Model, "load", lambda *_: pytest.fail("the model was loaded"))
    out = run.folder / "new" / "out.png"
    assert main(["sample", "--run", str(run.folder), "--caption", "a", "--out", str(out), *flags]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.count("\n") == 1
    for word in words:
        assert word in said.err
    assert not out.parent.exists()
