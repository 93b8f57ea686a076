"""The robustness matrix: all sixteen cases, on real processes, for distopt. The bench adds torch's own hook."""

import math

import pytest

from bench.competitors import Distopt
from bench.robustness.cases import CASES, sound


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_distopt_passes(case):
    outcome = case.run(Distopt(), 60.0)
    assert outcome.passed, f"{case.title}: {outcome.measured}"


def test_there_are_sixteen_different_cases():
    assert len({case.name for case in CASES}) == len({case.title for case in CASES}) == 16


GOOD = {"steps": 8, "bad_steps": 0, "agreed": True, "starved": [], "lost": 1e-7}


@pytest.mark.parametrize(
    ("broken", "measured"),
    [
        ({"bad_steps": 3}, "NaN in 3 of 8 steps"),
        ({"agreed": False}, "ranks are given different gradients"),
        ({"starved": ["a"]}, "never delivers a again"),
        ({"lost": math.nan}, "residuals are NaN"),
        ({"lost": 0.2}, "2.0e-01 of the gradient lost"),
    ],
    ids=str,
)
def test_what_is_broken_on_one_rank_is_found(broken, measured):
    assert sound([GOOD, GOOD]).passed
    outcome = sound([GOOD, {**GOOD, **broken}])
    assert (outcome.passed, outcome.measured) == (False, measured)
