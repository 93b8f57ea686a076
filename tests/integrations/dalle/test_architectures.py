"""What a user says of stage 1 becomes a dVAE; a published one takes the place of training, and is saved with the run."""

from pathlib import Path

import numpy as np
import pytest
import torch
from distopt.integrations.dalle import runs
from distopt.integrations.dalle.architectures import build, settings_of
from distopt.integrations.dalle.context import Context
from distopt.integrations.dalle.dvae import DVAE, DVAESettings
from distopt.integrations.dalle.model import Model
from distopt.integrations.dalle.paper_dvae import PaperDVAE, PaperDVAESettings
from distopt.integrations.dalle.plan import plan_lines
from distopt.integrations.dalle.published import save_published
from distopt.integrations.dalle.recipe import train
from distopt.integrations.dalle.report import stage_lines
from distopt.integrations.dalle.settings import InputError, Stage1Options, TrainSettings
from distopt.integrations.dalle.settings import build as checked
from distopt.integrations.dalle.train import recipe_of
from distopt.integrations.running.journal import RunJournal
from distopt.integrations.scenes.draw import Scenes

from distopt.errors import SettingError

SHAPE = PaperDVAESettings(size=24, codes=16, n_hid=8, n_init=6, groups=3, blocks=1)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    save_published(PaperDVAE(SHAPE), tmp_path)
    return tmp_path


def test_options_become_settings_of_the_architecture():
    assert settings_of(Stage1Options(), 32) == DVAESettings(size=32, grid=8)
    small = Stage1Options(codes=9, width=8, neck=4, likelihood="logit_laplace", log_scale_floor=-1.0)
    shape = {"codes": 9, "width": 8, "neck": 4, "likelihood": "logit_laplace", "log_scale_floor": -1.0}
    assert settings_of(small, 32) == DVAESettings(size=32, grid=8, **shape)
    for patch, groups in ((1, 1), (4, 3), (8, 4)):
        paper = settings_of(Stage1Options(architecture="paper", patch=patch), 256)
        assert paper == PaperDVAESettings(groups=groups)
        assert paper.grid == 256 // patch
    assert type(build(settings_of(Stage1Options(), 32))) is DVAE


def test_a_published_dvae_takes_the_place_of_stage_1(folder: Path, tmp_path: Path):
    stage2 = {"steps": 2, "batch": 4, "width": 16, "layers": 1, "heads": 1, "vocabulary": 40}
    table = {"size": 24, "stage1": {"architecture": "paper", "weights": str(folder)}, "stage2": stage2}
    recipe = recipe_of(checked(TrainSettings, table))
    assert recipe.dvae == SHAPE
    assert plan_lines(recipe, 1, 10)[1] == f"stage 1: not trained, weights of {folder}"
    trained = train(Scenes(), recipe, Context(), RunJournal(None, shown=False))
    expected = PaperDVAE(SHAPE)
    torch.manual_seed(0)
    expected = PaperDVAE(SHAPE)
    for a, b in zip(trained.model.dvae.parameters(), expected.parameters(), strict=True):
        assert torch.equal(a, b)
    assert recipe.describe()["stage1"] == {"weights": str(folder)}
    assert stage_lines(trained.figures())[0] == "stage 1: not trained, its weights were given"
    trained.draw_curves(tmp_path)
    trained.model.save(tmp_path, "folder", {})
    loaded = Model.load(runs.open_run(tmp_path), torch.device("cpu"))
    assert loaded.dvae.settings == SHAPE
    drawn = loaded.draw(["a red circle"], 0)
    assert np.array_equal(drawn, trained.model.draw(["a red circle"], 0))


def test_weights_that_do_not_suit_are_refused_before_any_work(folder: Path):
    with pytest.raises(SettingError, match=r"stage1.codes is 17, but must be 16, as the weights have"):
        settings_of(Stage1Options(architecture="paper", weights=str(folder), codes=17), 24)
    with pytest.raises(InputError, match=r"stage1.weights: .*has no encoder"):
        settings_of(Stage1Options(architecture="paper", weights=str(folder / "none")), 24)
    with pytest.raises(SettingError, match="size is 26"):
        settings_of(Stage1Options(architecture="paper", weights=str(folder)), 26)
