"""Scores are counted as they are defined."""

import math
from collections.abc import Sequence

import numpy as np
import pytest
from distopt.integrations.dalle import grading
from distopt.integrations.dalle.grading import evaluate_generation, wilson
from distopt.integrations.dalle.model import Model
from distopt.integrations.dalle.sampling import SamplingSettings
from distopt.integrations.dalle.scenes import Scenes, to_tensor
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
        score, verdicts, pictures = evaluate_generation(task, *networks, split=split, n=60, sampling=SamplingSettings())
        assert score == wilson(60, 60)
        assert len(verdicts) == len(pictures) == 60
    control, _, _ = evaluate_generation(task, *networks, split="s0", n=60, sampling=SamplingSettings(), shuffled=True)
    assert control.exact < 0.05


@pytest.mark.parametrize(
    ("field", "value"),
    [("temperature", -1.0), ("top_k", 0), ("top_p", 0.0), ("guidance", -0.5), ("guidance", math.inf)],
)
def test_sampling_settings_out_of_range_are_named(field: str, value: object) -> None:
    with pytest.raises(SettingError, match=field):
        SamplingSettings(**{field: value})
