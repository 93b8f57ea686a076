"""Scores: how they are counted, shared among ranks, and reproduced from a run's folder."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from distopt.integrations.dalle import evaluate, features, rerank
from distopt.integrations.dalle.cli import main
from distopt.integrations.dalle.context import Context
from distopt.integrations.dalle.contrast import Contrast, ContrastSettings
from distopt.integrations.dalle.folder import FolderSource
from distopt.integrations.dalle.pictures import Pictures
from distopt.integrations.dalle.report import best_of_lines
from distopt.integrations.scenes.draw import Scenes
from PIL import Image
from torch import nn


@pytest.fixture(autouse=True)
def _few_round_trips(monkeypatch):
    whole = evaluate.evaluate_tokenizer
    monkeypatch.setattr(evaluate, "evaluate_tokenizer", lambda *given, **named: whole(*given, **named, n=10))


def test_scores_do_not_depend_on_the_number_of_ranks(tiny_model, monkeypatch):
    def score(**place):
        return evaluate.score_scenes(tiny_model, Scenes(), n=4, show=2, context=Context(seed=5, **place))

    class Stop(Exception):
        pass

    parts = []

    def exchange(_, mine):
        parts.append(mine)
        raise Stop

    monkeypatch.setattr(evaluate.dist, "all_gather_object", exchange)
    for rank in range(3):
        with pytest.raises(Stop):
            score(rank=rank, world_size=3)
    monkeypatch.setattr(evaluate.dist, "all_gather_object", lambda found, _: found.__setitem__(slice(None), parts))
    assert sorted(i for part in parts for i in part) == [0, 1, 2, 3, 4]
    (alone, alone_samples), (shared, shared_samples) = score(), score(world_size=3)
    assert alone == shared
    for split in evaluate.SPLITS:
        assert (alone_samples[split].pictures == shared_samples[split].pictures).all()


def test_the_report_has_every_score_with_its_interval(tiny_model):
    figures, samples = evaluate.score_scenes(tiny_model, Scenes(), n=4, show=2, context=Context())
    for name in (*evaluate.SPLITS, "control"):
        assert figures[name].keys() == {"exact", "low", "high", "n"}
        assert figures[name]["n"] == 4
    assert {"exact", "codes_used", "codes"} <= figures["tokenizer"].keys()
    assert all(len(graded.captions) == len(graded.pictures) == 2 for graded in samples.values())


def test_evaluate_prints_a_table_and_json_that_repeats(tiny_model, tmp_path, capsys):
    tiny_model.save(tmp_path, "demo", {"seed": 3, "n": 4, "task_seed": 0})
    expected, _ = evaluate.score_scenes(tiny_model, Scenes(), n=4, show=0, context=Context(seed=3))
    assert main(["evaluate", "--run", str(tmp_path)]) == 0
    *table, last = capsys.readouterr().out.strip().splitlines()
    figures = json.loads(last)
    assert {name: figures[name] for name in expected} == json.loads(json.dumps(expected))
    assert any(line.startswith("S2") for line in table)
    assert figures["measures"].keys() == set(evaluate.SPLITS)
    assert "frechet" not in figures
    assert any("bits per dimension" in line for line in table)
    for name in ("samples.png", "reconstructions.png"):
        with Image.open(tmp_path / "evaluation" / name) as picture:
            assert picture.width == 1800


def test_features_are_the_users_or_those_of_the_contrastive_model(tiny_model, tmp_path, capsys):
    contrast = Contrast(ContrastSettings(text_vocabulary=40, text_length=16, size=24, width=4, features=8)).eval()
    run, out = tmp_path / "run", tmp_path / "pictures"
    run.mkdir()
    dataclasses.replace(tiny_model, contrast=contrast).save(run, "demo", {"seed": 3, "n": 3, "task_seed": 0})
    ask = ["evaluate", "--run", str(run), "--out", str(out)]
    assert main(ask) == 0
    *table, last = capsys.readouterr().out.strip().splitlines()
    found = json.loads(last)["frechet"]
    assert found["label"] == "Frechet distance (contrast)"
    best = json.loads(last)
    assert best["best_of"]["s1"]["candidates"] == rerank.CANDIDATES
    assert [line for line in table if "best of 8" in line] == best_of_lines(best)
    assert len(best_of_lines(best)) == 3
    assert best_of_lines({}) == []
    assert found["s2"]["distance"] > found["s2"]["of_pictures"] > 0
    assert sum("Frechet distance (contrast)" in line for line in table) == 1
    assert sorted(path.name for path in out.iterdir()) == ["best_of.png", "reconstructions.png", "samples.png"]
    here = f"{__name__}:TinyInception"
    assert main([*ask, "--features", here]) == 0
    assert json.loads(capsys.readouterr().out.strip().splitlines()[-1])["frechet"]["label"] == "FID"
    for wrong, word in (
        ("nothing", "package.module:factory"),
        ("no.such:thing", "no"),
        (f"{__name__}:Whole", "(2, D)"),
    ):
        assert main([*ask, "--features", wrong]) == 2
        told = capsys.readouterr().err
        assert told.count("\n") == 1
        assert wrong in told
        assert word in told


class Whole(nn.Module):
    """Gives pictures back."""

    def forward(self, pictures):
        return pictures


class TinyInception(nn.Module):
    """Gives mean colours."""

    def forward(self, pictures):
        return pictures.mean((2, 3))


def test_a_network_that_is_not_inception_is_no_fid():
    found = features.named_features(f"{__name__}:Inner", 24, torch.device("cpu"))
    assert found.label == "Frechet distance (Inner)"
    pictures = torch.rand(8, 3, 24, 24)
    assert found.distance(pictures, pictures) == pytest.approx(0, abs=1e-9)
    assert found.distance(pictures, (pictures + 1) / 2) > 0.1


class Inner(TinyInception):
    """Is none, but for what it is made of."""


def test_a_folder_is_evaluated_on_what_was_held_out(tiny_model, tmp_path, capsys):
    pixels = np.random.default_rng(0).integers(0, 256, (30, 24, 24, 3), dtype=np.uint8)
    pictures = Pictures([f"{i}" for i in range(30)], ["red"] * 30, pixels)
    source = FolderSource(pictures, held_out=0.3)
    figures = evaluate.score_folder(tiny_model, source, torch.device("cpu"))
    assert figures["held_out"]["n"] == figures["tokenizer"]["n"] == source.counts[1]
    text = tiny_model.tokenizer.encode(["red"], 16)
    image = tiny_model.dvae.tokenize(source.held_out(100).pictures)
    expected = tiny_model.transformer(text.expand(len(image), -1), image).image.item()
    assert figures["held_out"]["image_loss"] == pytest.approx(expected, rel=1e-5)

    pictures.save(tmp_path)
    tiny_model.save(tmp_path, "folder", {"seed": 0, "data": {"held_out": 0.3}})
    assert main(["evaluate", "--run", str(tmp_path)]) == 0
    again = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    assert {name: again[name] for name in figures} == figures
    measured = again["measures"]["held_out"]
    assert measured["image_loss"] == pytest.approx(expected, rel=1e-5)
    assert measured["mse"] == pytest.approx(figures["tokenizer"]["mse"], rel=1e-5)
    assert (tmp_path / "evaluation" / "samples.png").exists()
