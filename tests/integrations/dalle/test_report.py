"""Figures: what the report holds, and that it is always valid JSON."""

import json
import types

import pytest
from distopt.integrations.dalle import report
from distopt.integrations.dalle.context import StageResult
from distopt.integrations.dalle.runs import write_json
from hypothesis import example, given
from hypothesis import strategies as st
from torch import nn

_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=10,
)


@given(_JSON)
@example(float("nan"))
@example({"a": [float("-inf")]})
def test_whatever_is_not_finite_becomes_null(value):
    assert json.loads(json.dumps(report.finite(value), allow_nan=False)) == report.finite(value)


def _stage(stats, **more):
    return StageResult(
        model=nn.Linear(3, 2), steps=7, final_loss=0.5, curve=[], wall_seconds=1.234, stats=stats, **more
    )


def test_a_stage_reports_what_its_communication_cost():
    stats = types.SimpleNamespace(
        saving=0.75, matrix_saving=0.9, bytes_sent=25, bytes_uncompressed=100, skipped_steps=1
    )
    assert report.stage_figures(_stage(stats)) == {
        "steps": 7,
        "final_loss": 0.5,
        "wall_seconds": 1.23,
        "saving": 0.75,
        "matrix_saving": 0.9,
        "bytes_sent": 25,
        "bytes_uncompressed": 100,
        "skipped_steps": 1,
        "log2_scales": {},
        "parameters": 8,
    }


def test_without_a_reducer_nothing_was_sent():
    figures = report.stage_figures(_stage(None))
    assert figures["saving"] == figures["bytes_sent"] == 0


def test_a_line_tells_of_scales_and_skipped_steps():
    scaled = _stage(None, skipped_steps=2, scales=[(0, {"a": 1.0, "b": 2.0}), (6, {"a": 2.0**10, "b": 2.0**16.5})])
    one = _stage(None, scales=[(6, {"loss": 65536.0})])
    full = {"precision": "fp16", "stage1": report.stage_figures(one), "stage2": report.stage_figures(scaled)}
    (line,) = report.precision_lines(full)
    assert line == (
        "fp16: stage 1 skipped 0 of 7 steps, scale 2^16.0; stage 2 skipped 2 of 7 steps, scales 2^10.0 to 2^16.5"
    )
    assert full["stage2"]["log2_scales"] == {"a": 10.0, "b": 16.5}
    assert report.precision_lines(full | {"precision": "fp32"}) == []


def test_lines_name_every_figure():
    stage = report.stage_figures(_stage(None)) | {"final_loss": None, "bytes_uncompressed": 2_500_000}
    score = {"exact": 0.9, "low": 0.87, "high": 0.93, "n": 400}
    full = {
        "tokenizer": {"exact": 0.97, "codes_used": 200},
        **{name: score for name in ("s0", "s1", "s2", "control")},
        "stage1": stage,
        "stage2": stage,
    }
    text = report.framed("title", [*report.score_lines(full), *report.stage_lines(full)])
    for word in ("97.0%", "200 codes", "90.0%", "87.0% to 93.0%", "n = 400", "not finite", "2.5 MB", "title"):
        assert word in text
    assert len({len(line) for line in text.splitlines() if line.startswith("---")}) == 1


def test_versions_name_what_decides_the_numbers():
    assert {"python", "torch", "distopt", "numpy", "tokenizers", "threads"} <= report.versions().keys()


def test_memory_is_in_bytes():
    assert 10_000_000 < report.peak_memory() < 100_000_000_000


def test_json_is_replaced_whole(tmp_path):
    path = tmp_path / "report.json"
    write_json(path, {"a": 1})
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(path, {"a": float("nan")})
    assert json.loads(path.read_text()) == {"a": 1}


def test_figures_of_training_pictures_are_not_called_held_out():
    losses = {"image_loss": 1.0, "text_loss": 1.0, "unigram": 2.0, "unigram_by_position": 2.0}
    figures = {"tokenizer": {"mse": 0.1, "codes_used": 3, "codes": 4}, "held_out": {**losses, "unseen": True}}
    assert "held-out image loss" in report.held_out_lines(figures)[0]
    figures["held_out"]["unseen"] = False
    first, *rest = report.held_out_lines(figures)
    assert first == "no held-out picture can be read: these are figures of training pictures"
    assert not any("held-out" in line for line in rest)
    assert "training image loss" in rest[0]
