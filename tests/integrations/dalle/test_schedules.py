"""Schedules: where they begin, where they end, and that nothing leaves the range between."""

import pytest
from distopt.integrations.dalle.schedules import StageSettings, half_cosine, in_steps, is_length, length_from, share_of
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


@given(steps=st.integers(1, 10_000), length=st.integers(0, 20_000), step=st.integers(0, 20_000))
def test_a_length_in_steps_does_not_depend_on_the_run_and_a_fraction_does(steps, length, step):
    assert in_steps(length, steps) == length
    assert (share_of(step, length, steps) >= 1) == (step >= length)
    fraction = min(1.0, length / steps)
    assert share_of(step, fraction, steps) == pytest.approx(1.0 if not length else step / (fraction * steps))
    assert is_length(length)
    assert is_length(fraction)
    assert length_from(repr(length)) == length
    assert type(length_from(repr(fraction))) is float


def test_one_is_a_step_and_one_point_zero_the_whole_run():
    assert share_of(1, 1, 100) == 1.0
    assert share_of(1, 1.0, 100) == 0.01


@pytest.mark.parametrize("wrong", [-1, 1.01, -0.1, float("nan"), True, None, "0.5"])
def test_what_is_no_length_is_refused(wrong):
    assert not is_length(wrong)
    for name in ("warmup", "decay_steps"):
        with pytest.raises(SettingError, match=f"StageSettings.{name} is "):
            StageSettings(
                **{"steps": 9, "learning_rate": 1.0, "warmup": 0, "final_learning_rate": 0, **REST, name: wrong}
            )


@given(step=st.integers(0, 3_000_000))
def test_the_learning_rate_of_stage_1_in_the_paper(step):
    """Appendix A.2: a half cosine from 1e-4 to 1.25e-6 over the first 1.2 million of 3 million updates."""
    settings = StageSettings(
        steps=3_000_000, learning_rate=1e-4, warmup=0, final_learning_rate=0.0125, decay_steps=1_200_000, **REST
    )
    expected = half_cosine(1e-4, 1.25e-6, step / 1_200_000)
    assert settings.learning_rate_at(step) == pytest.approx(expected, rel=1e-12)
    if step >= 1_200_000:
        assert settings.learning_rate_at(step) == pytest.approx(1.25e-6)
