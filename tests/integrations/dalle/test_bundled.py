"""The model that is installed with the package draws what captions say, and sample takes it where no run is named."""

import numpy as np
import pytest
import torch
from distopt.integrations.dalle import runs
from distopt.integrations.dalle.cli import main
from distopt.integrations.dalle.model import Model
from distopt.integrations.dalle.rerank import choose
from distopt.integrations.scenes.draw import Scenes
from distopt.integrations.scenes.read import matches_all
from PIL import Image


@pytest.fixture(scope="module")
def model():
    return Model.load(runs.open_run(runs.BUNDLED), torch.device("cpu"))


@pytest.mark.parametrize(("split", "least"), [("s0", 0.85), ("s1", 0.85), ("s2", 0.5)])
def test_it_draws_what_captions_say(model, split, least):
    drawn = Scenes().test_captions(split, 60, np.random.default_rng(77))
    pictures = model.draw([caption for _, caption in drawn], seed=5)
    assert np.mean(matches_all(pictures, [triple for triple, _ in drawn])) >= least


def test_its_contrastive_model_chooses_well(model):
    chosen = choose(Scenes(), model, split="s2", n=40, part=3, seed=6)
    assert chosen.right[np.arange(40), chosen.best].mean() > chosen.right.mean() + 0.02


def test_sample_needs_no_run(tmp_path, capsys):
    out = tmp_path / "red.png"
    assert main(["sample", "--caption", "a red circle above a blue square", "--out", str(out)]) == 0
    with Image.open(out) as picture:
        assert picture.width == picture.height
    assert str(out) in capsys.readouterr().out
