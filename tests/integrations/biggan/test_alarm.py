"""The alarm: silent at a steady pace of any size, loud where it breaks, and the same after a restart."""

import math

import pytest
from distopt.integrations.biggan.alarm import CollapseAlarm
from hypothesis import given
from hypothesis import strategies as st

from distopt.errors import SettingError


def _read(alarm, values, first=0):
    return [warned for step, value in enumerate(values, first) for warned in alarm.read(step, {"w": (value,)})]


@given(st.floats(1e-3, 1e3), st.lists(st.floats(0.5, 2), min_size=1, max_size=60), st.floats(-0.05, 0.3))
def test_a_pace_that_varies_fourfold_is_not_alarming(start, factors, pace):
    values = [start]
    for factor in factors:
        values.append(values[-1] * math.exp(pace * factor))
    assert _read(CollapseAlarm(), values) == []


@given(st.floats(1e-3, 1e3), st.floats(0, 0.02), st.integers(11, 40))
def test_an_explosion_is_alarming_at_once(start, pace, readings):
    calm = [start * math.exp(pace * i) for i in range(readings)]
    warned = _read(CollapseAlarm(), [*calm, calm[-1] * 1.3])
    assert [(each.step, each.weight) for each in warned] == [(readings, "w")]
    assert warned[0].growth == pytest.approx(0.3)
    assert warned[0].usual == pytest.approx(math.expm1(pace), abs=1e-9)


def test_a_young_run_is_not_judged():
    assert _read(CollapseAlarm(window=10), [1.0, 5.0, 30.0]) == []


def test_a_value_that_is_not_finite_is_alarming_at_any_time():
    assert len(_read(CollapseAlarm(), [1.0, math.nan])) == 1
    assert len(_read(CollapseAlarm(), [1.0, math.inf])) == 1
    (warned,) = _read(CollapseAlarm(), [1.0, math.nan])
    assert str(warned) == "step 1: the largest singular value of w is not finite"


def test_a_weight_that_starts_at_zero_is_no_error():
    assert _read(CollapseAlarm(), [0.0, 0.0, 1.0]) == []


def test_it_goes_on_after_a_restart():
    calm = [1 + i / 100 for i in range(11)]
    whole, first, second = CollapseAlarm(), CollapseAlarm(), CollapseAlarm()
    expected = _read(whole, [*calm, 2.0])
    _read(first, calm)
    second.load_state_dict(first.state_dict())
    assert _read(second, [2.0], first=11) == expected != []


@pytest.mark.parametrize("setting", [{"times": 1}, {"least": 0}, {"window": 0}, {"window": 2.5}])
def test_settings_out_of_range_are_refused(setting):
    with pytest.raises(SettingError, match=f"CollapseAlarm.{next(iter(setting))} is"):
        CollapseAlarm(**setting)
