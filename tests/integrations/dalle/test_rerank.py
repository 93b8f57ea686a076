"""Best of several samples: what is counted, what is chosen, and how the commands say it."""

import dataclasses

import numpy as np
import pytest
import torch
from distopt.integrations.dalle import evaluate, rerank, runs
from distopt.integrations.dalle.cli import main
from distopt.integrations.dalle.context import Context
from distopt.integrations.dalle.contrast import Contrast, ContrastSettings
from distopt.integrations.dalle.grading import wilson
from distopt.integrations.dalle.model import Model
from distopt.integrations.scenes.draw import Scenes, to_tensor
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image


@pytest.fixture
def choosing_model(tiny_model):
    torch.manual_seed(1)
    size = ContrastSettings(
        text_vocabulary=tiny_model.tokenizer.vocabulary, text_length=16, size=24, width=4, features=8
    )
    return dataclasses.replace(tiny_model, contrast=Contrast(size).eval())


@st.composite
def verdicts(draw):
    n, candidates = draw(st.integers(1, 20)), draw(st.integers(1, 5))
    flat = draw(st.lists(st.booleans(), min_size=n * candidates, max_size=n * candidates))
    best = draw(st.lists(st.integers(0, candidates - 1), min_size=n, max_size=n))
    return np.array(flat).reshape(n, candidates), np.array(best)


@given(verdicts())
def test_the_ceiling_is_never_below_what_is_picked(given_):
    right, best = given_
    found = rerank.count(right, best)
    assert found.ceiling.exact >= max(found.picked.exact, found.single.exact)
    assert found.picked == wilson(sum(bool(row[i]) for row, i in zip(right, best, strict=True)), len(right))
    assert found.single == wilson(int(right[:, 0].sum()), len(right))
    value, low, high = found.gain
    assert value == pytest.approx(found.picked.exact - right.mean())
    assert low <= value <= high


@given(verdicts())
def test_the_first_candidate_gains_nothing_on_the_average_of_all_orders(given_):
    right, _ = given_
    n, candidates = right.shape
    gains = [rerank.count(right, np.full(n, i)).gain[0] for i in range(candidates)]
    assert sum(gains) == pytest.approx(0, abs=1e-9)


def test_the_candidate_that_fits_best_is_chosen(choosing_model, monkeypatch):
    chosen = rerank.choose(Scenes(), choosing_model, split="s1", n=3, candidates=4, seed=2)
    text = choosing_model.tokenizer.encode(chosen.captions, 16)
    scores = choosing_model.contrast.scores(
        to_tensor(chosen.pictures.reshape(12, 24, 24, 3)).unflatten(0, (3, 4)), text
    )
    assert (scores.argmax(1).numpy() == chosen.best).all()
    assert chosen.right.shape == (3, 4)
    again = rerank.choose(Scenes(), choosing_model, split="s1", n=3, candidates=4, seed=2)
    assert (again.pictures == chosen.pictures).all()
    other = rerank.choose(Scenes(), choosing_model, split="s1", n=3, candidates=4, seed=2, part=1)
    assert other.captions != chosen.captions


def test_the_best_drawn_pictures_are_kept_in_their_order(choosing_model):
    drawn = choosing_model.draw(["a red circle"] * 6, 4)
    kept = choosing_model.draw_best("a red circle", 4, n=2, of=3)
    text = choosing_model.tokenizer.encode(["a red circle"], 16)
    scores = choosing_model.contrast.scores(to_tensor(drawn)[None], text)[0]
    assert (kept == drawn[scores.argsort(descending=True)[:2]]).all()
    assert scores.std() > 0


def test_the_contrastive_model_is_saved_and_loaded(choosing_model, tiny_model, tmp_path):
    choosing_model.save(tmp_path, "demo", {})
    loaded = Model.load(runs.open_run(tmp_path), torch.device("cpu"))
    assert loaded.contrast.settings == choosing_model.contrast.settings
    assert (loaded.draw_best("blue", 0, n=1, of=4) == choosing_model.draw_best("blue", 0, n=1, of=4)).all()
    tiny_model.save(tmp_path, "demo", {})
    assert not (tmp_path / runs.CONTRAST).exists()
    assert Model.load(runs.open_run(tmp_path), torch.device("cpu")).contrast is None


def test_sample_draws_the_best_of_several(choosing_model, tiny_model, tmp_path, capsys):
    run, out = tmp_path / "run", tmp_path / "a.png"
    run.mkdir()
    choosing_model.save(run, "demo", {})
    ask = ["sample", "--run", str(run), "--caption", "a red circle", "--out", str(out)]
    assert main([*ask, "--best-of", "3"]) == 0
    with Image.open(out) as picture:
        assert picture.size == (264, 264)
    assert main([*ask, "--best-of", "3", "--n", "2"]) == 0
    with Image.open(out) as picture:
        assert picture.width == 1800
    tiny_model.save(run, "demo", {})
    capsys.readouterr()
    assert main([*ask, "--best-of", "3"]) == 2
    assert "--best-of 3" in capsys.readouterr().err
    assert main([*ask, "--best-of", "0"]) == 2


def test_scores_do_not_depend_on_the_number_of_ranks(choosing_model, tiny_model, monkeypatch):
    monkeypatch.setattr(evaluate, "_PART", 2)
    alone, shown = evaluate.score_best_of(choosing_model, Scenes(), n=4, context=Context(seed=5))
    assert alone["best_of"].keys() == set(evaluate.SPLITS)
    assert alone["best_of"]["s2"]["picked"]["n"] == 4
    assert len(shown["s0"].captions) == 2

    def exchange(found, mine):
        assert len(mine) == 3
        others = [rerank.choose(Scenes(), choosing_model, split=split, n=2, part=part, seed=5) for part in (0, 1) for split in evaluate.SPLITS]  # fmt: skip
        found[:] = [dict(enumerate(others)), None]

    monkeypatch.setattr(evaluate.dist, "all_gather_object", exchange)
    shared, _ = evaluate.score_best_of(choosing_model, Scenes(), n=4, context=Context(seed=5, world_size=2))
    assert shared == alone
    assert evaluate.score_best_of(tiny_model, Scenes(), n=4, context=Context()) == ({}, {})
