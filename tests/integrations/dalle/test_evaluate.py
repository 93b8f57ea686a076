"""Scores: how they are counted, shared among ranks, and reproduced from a run's folder."""

import json
import math

import numpy as np
import pytest
import torch
from distopt.integrations.dalle import evaluate
from distopt.integrations.dalle.cli import main
from distopt.integrations.dalle.context import Context
from distopt.integrations.dalle.folder import FolderSource
from distopt.integrations.dalle.pictures import Pictures
from distopt.integrations.dalle.scenes import Scenes
from hypothesis import given
from hypothesis import strategies as st

CODES = 5


@pytest.fixture(autouse=True)
def _few_round_trips(monkeypatch):
    whole = evaluate.evaluate_tokenizer
    monkeypatch.setattr(evaluate, "evaluate_tokenizer", lambda *given, **named: whole(*given, **named, n=10))


@given(st.lists(st.lists(st.integers(0, CODES - 1), min_size=3, max_size=3), min_size=1, max_size=20))
def test_the_baseline_is_never_below_the_entropy_of_what_it_was_fitted_to(rows):
    tokens = torch.tensor(rows)
    for columns in (tokens, tokens.reshape(-1, 1)):
        entropy = 0.0
        for column in columns.T:
            share = torch.bincount(column).double() / len(column)
            share = share[share > 0]
            entropy -= float((share * share.log()).sum()) / columns.shape[1]
        assert evaluate.unigram_loss(columns, columns, CODES) >= entropy - 1e-9


def test_codes_never_seen_cost_no_infinity():
    loss = evaluate.unigram_loss(torch.zeros(10, 1, dtype=torch.int64), torch.full((3, 1), 4), CODES)
    assert loss == pytest.approx(math.log(15))


def test_the_baseline_by_position_knows_the_position():
    tokens = torch.tensor([[0, 1]] * 50)
    assert evaluate.unigram_loss(tokens, tokens, CODES) < 0.2
    assert evaluate.unigram_loss(tokens.reshape(-1, 1), tokens.reshape(-1, 1), CODES) > 0.6


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
    assert json.loads(last) == json.loads(json.dumps(expected))
    assert any(line.startswith("S2") for line in table)


def test_a_folder_is_evaluated_on_what_was_held_out(tiny_model, tmp_path, capsys):
    pixels = np.random.default_rng(0).integers(0, 256, (30, 24, 24, 3), dtype=np.uint8)
    pictures = Pictures([f"{i}" for i in range(30)], ["red"] * 30, pixels)
    source = FolderSource(pictures, held_out=0.3)
    figures = evaluate.score_folder(tiny_model, source, torch.device("cpu"))
    assert figures["held_out"]["n"] == figures["tokenizer"]["n"] == source.counts[1]
    text = tiny_model.tokenizer.encode(["red"], 16)
    image = tiny_model.dvae.tokenize(source.held_out(100)[1])
    expected = tiny_model.transformer(text.expand(len(image), -1), image).image.item()
    assert figures["held_out"]["image_loss"] == pytest.approx(expected, rel=1e-5)

    pictures.save(tmp_path)
    tiny_model.save(tmp_path, "folder", {"seed": 0, "data": {"held_out": 0.3}})
    assert main(["evaluate", "--run", str(tmp_path)]) == 0
    assert json.loads(capsys.readouterr().out.strip().splitlines()[-1]) == figures
