"""Scores are counted as they are defined."""

import math
from collections.abc import Sequence

import numpy as np
import pytest
from distopt.integrations.dalle import grading
from distopt.integrations.dalle.grading import attributes, evaluate_generation, wilson
from distopt.integrations.dalle.model import Model
from distopt.integrations.dalle.sampling import SamplingSettings
from distopt.integrations.scenes.draw import INVERSE, Scenes, Thing, Triple, to_tensor
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from distopt.errors import SettingError


@given(st.integers(0, 500), st.integers(1, 500))
@settings(max_examples=100, deadline=None)
def test_the_wilson_interval_solves_its_equation(hits: int, n: int) -> None:
    hits = min(hits, n)
    score = wilson(hits, n)
    assert 0 <= score.low <= score.exact <= score.high <= 1
    for bound in (score.low, score.high):
        if 0 < bound < 1:
            assert abs(score.exact - bound) == pytest.approx(
                1.959963984540054 * math.sqrt(bound * (1 - bound) / n), rel=1e-6, abs=1e-9
            )


def test_scores_count_what_the_scorer_reads(monkeypatch: pytest.MonkeyPatch, tiny_model: Model) -> None:
    task, spoken = Scenes(), {}

    def draw(_transformer: object, _dvae: object, _tokenizer: object, captions: Sequence[str], *_: object) -> Tensor:
        return to_tensor(task.render([spoken[caption] for caption in captions], np.random.default_rng(0)))

    def remember(split: str, n: int, rng: np.random.Generator) -> list:
        drawn = Scenes.test_captions(task, split, n, rng)
        spoken.update({caption: triple for triple, caption in drawn})
        return drawn

    monkeypatch.setattr(grading, "generate", draw)
    monkeypatch.setattr(task, "test_captions", remember)
    networks = (tiny_model.transformer, tiny_model.dvae, tiny_model.tokenizer)
    for split in ("s0", "s2"):
        score, verdicts, pictures, triples = evaluate_generation(
            task, *networks, split=split, n=60, sampling=SamplingSettings()
        )
        assert score == wilson(60, 60)
        assert len(verdicts) == len(pictures) == len(triples) == 60
    control, *_ = evaluate_generation(task, *networks, split="s0", n=60, sampling=SamplingSettings(), shuffled=True)
    assert control.exact < 0.05


RED_RING, BLUE_CROSS = Thing("red", "ring"), Thing("blue", "cross")
SAID = Triple(RED_RING, "above", BLUE_CROSS)


@pytest.mark.parametrize(
    ("shown", "wrong"),
    [
        (SAID.inverse(), None),
        (Triple(RED_RING, INVERSE["above"], BLUE_CROSS), "relation"),
        (Triple(RED_RING, "left of", BLUE_CROSS), "relation"),
        (Triple(Thing("blue", "ring"), "above", Thing("red", "cross")), "pairs"),
        (Triple(Thing("green", "ring"), "above", BLUE_CROSS), "colours"),
        (Triple(RED_RING, "above", Thing("blue", "circle")), "shapes"),
    ],
)
def test_an_attribute_is_wrong_where_it_is(shown: Triple, wrong: str | None) -> None:
    found = attributes(Scenes().render([shown] * 3, np.random.default_rng(0)), [SAID] * 3)
    names = list(found)
    for name in names:
        if name == wrong:
            assert found[name] == wilson(0, 3)
        elif wrong in ("pairs", "colours", "shapes") and names.index(name) > max(names.index(wrong), 3):
            assert found[name] is None
        else:
            assert found[name] == wilson(3, 3)


def test_pictures_that_show_no_scene_are_asked_for_nothing_else() -> None:
    task, rng = Scenes(), np.random.default_rng(0)
    pictures = task.render([SAID] * 4, rng)
    pictures[0] = 128
    pictures[1, :12] = 128  # one thing is left
    pictures[2, 12:, :12] = (20, 20, 235)  # two things, and one is no shape, or there are three
    found = attributes(pictures, [SAID] * 4)
    assert found["count"] in (wilson(2, 4), wilson(1, 4))
    assert found["readable"] is not None
    assert found["relation"] == wilson(1, 1)
    nothing = attributes(pictures[:1], [SAID])
    assert nothing["count"] == wilson(0, 1)
    assert {of for name, of in nothing.items() if name != "count"} == {None}


@given(st.integers(0, 1000))
@settings(max_examples=8, deadline=None)
def test_attributes_lead_to_the_exact_score(seed: int) -> None:
    task, rng = Scenes(), np.random.default_rng(seed)
    said = [triple for triple, _ in task.test_captions("s1", 12, rng)]
    shown = [t if i % 2 else said[i - 1] for i, t in enumerate(said)]
    pictures = task.render(shown, rng)
    found = attributes(pictures, said)
    hits = sum(grading.matches_all(pictures, said))
    relation = found["relation"]
    assert relation is not None
    assert round(relation.exact * relation.n) == hits


@pytest.mark.parametrize(
    ("field", "value"),
    [("temperature", -1.0), ("top_k", 0), ("top_p", 0.0), ("guidance", -0.5), ("guidance", math.inf)],
)
def test_sampling_settings_out_of_range_are_named(field: str, value: object) -> None:
    with pytest.raises(SettingError, match=field):
        SamplingSettings(**{field: value})
