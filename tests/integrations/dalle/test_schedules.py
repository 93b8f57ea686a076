"""Schedules: where they begin, where they end, and that nothing leaves the range between."""

import pytest
from distopt.integrations.dalle.schedules import StageSettings, half_cosine
from hypothesis import given
from hypothesis import strategies as st

from distopt.errors import SettingError

REST = {"batch": 1, "betas": (0.9, 0.99), "weight_decay": 0.0, "clip": 1.0, "averaging": 0.0}


@given(st.floats(-5, 5), st.floats(-5, 5), st.floats(0, 3))
def test_a_half_cosine_stays_between_its_ends(start, end, fraction):
    value = half_cosine(start, end, fraction)
    assert min(start, end) - 1e-9 <= value <= max(start, end) + 1e-9
    assert half_cosine(start, end, 0.0) == pytest.approx(start)
    assert half_cosine(start, end, 1.0 + fraction) == pytest.approx(end)


@given(steps=st.integers(1, 500), warmup=st.floats(0, 1), final=st.floats(0, 1))
def test_the_learning_rate_rises_to_its_highest_and_falls_from_there(steps, warmup, final):
    settings = StageSettings(steps=steps, learning_rate=0.5, warmup=warmup, final_learning_rate=final, **REST)
    rates = [settings.learning_rate_at(step) for step in range(steps)]
    top = rates.index(max(rates))
    assert rates[top] == pytest.approx(0.5)
    assert rates[:top] == sorted(rates[:top])
    assert rates[top:] == sorted(rates[top:], reverse=True)
    assert min(rates) > 0 or final == 0
    assert rates[-1] >= 0.5 * final - 1e-12 or steps * warmup > steps - 1


def test_a_wrong_value_is_named_after_the_settings_it_is_in():
    with pytest.raises(SettingError, match=r"StageSettings.steps is 0, but must be an integer of at least 1"):
        StageSettings(steps=0, learning_rate=0.5, warmup=0, final_learning_rate=0, **REST)
