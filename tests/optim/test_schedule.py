"""Warm-up and halving, against a model of a few lines; resuming; what is ignored."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from distopt.errors import SettingError
from distopt.optim import AdamW, WarmupThenHalve


def optimizer_with(*rates):
    return AdamW([{"params": [nn.Parameter(torch.ones(1))], "lr": rate} for rate in rates])


def rates_of(optimizer):
    return [group["lr"] for group in optimizer.param_groups]


def reference(losses, warmup, halvings, window, patience, threshold):
    """Factors of the learning rate at each step, and the number of halvings at the end."""
    factors, factor, best, bad, done, means = [], 1.0, math.inf, 0, 0, []
    for step, loss in enumerate(losses, start=1):
        factors.append(min(1.0, step / max(warmup, 1)) * factor)
        if step < warmup or done == halvings:
            continue
        means.append(loss)
        if len(means) == window:
            mean = sum(means) / window
            means = []
            if mean < best * (1 - threshold):
                best, bad = mean, 0
            else:
                bad += 1
            if bad > patience:
                factor, bad, done = factor / 2, 0, done + 1
    return factors, done


@given(
    losses=st.lists(st.floats(0.1, 10), min_size=5, max_size=60),
    warmup=st.sampled_from([0, 1, 2, 7]),
    halvings=st.integers(0, 3),
    window=st.sampled_from([1, 3]),
    patience=st.integers(0, 2),
    tensors=st.booleans(),
    cut=st.integers(0, 60),
)
def test_it_does_what_it_says(losses, warmup, halvings, window, patience, tensors, cut):
    """Also when it is saved and loaded on the way."""
    settings = {"warmup": warmup, "halvings": halvings, "window": window, "patience": patience, "threshold": 0.01}
    losses = [float(torch.tensor(loss)) for loss in losses]
    optimizer = optimizer_with(1.0, 0.5)
    schedule = WarmupThenHalve(optimizer, **settings)
    rates = []
    for step, loss in enumerate(losses):
        if step == cut:
            state, saved = schedule.state_dict(), optimizer.state_dict()
            optimizer = optimizer_with(1.0, 0.5)
            schedule = WarmupThenHalve(optimizer, **settings)
            schedule.load_state_dict(state)
            optimizer.load_state_dict(saved)
        rates.append(rates_of(optimizer))
        optimizer.step()
        schedule.step(torch.tensor(loss) if tensors else loss)
    factors, done = reference(losses, **settings)
    for found, factor in zip(rates, factors, strict=True):
        assert found == pytest.approx([factor, factor / 2])
    assert schedule.halvings == done


def test_the_state_may_be_loaded_after_the_optimizers_or_before():
    for first in ("optimizer", "schedule"):
        optimizer = optimizer_with(0.3)
        schedule = WarmupThenHalve(optimizer, warmup=10)
        for _ in range(4):
            optimizer.step()
            schedule.step()
        states = schedule.state_dict(), optimizer.state_dict()
        again = optimizer_with(0.3)
        if first == "optimizer":
            again.load_state_dict(states[1])
        resumed = WarmupThenHalve(again, warmup=10)
        resumed.load_state_dict(states[0])
        if first == "schedule":
            again.load_state_dict(states[1])
        assert rates_of(again) == rates_of(optimizer) == pytest.approx([0.15])
        for each, its in ((optimizer, schedule), (again, resumed)):
            for _ in range(10):
                each.step()
                its.step()
        assert rates_of(again) == rates_of(optimizer) == pytest.approx([0.3])


def test_without_a_loss_or_with_one_that_is_not_finite_nothing_is_halved():
    optimizer = optimizer_with(1.0)
    schedule = WarmupThenHalve(optimizer, warmup=0, window=2, patience=0)
    for loss in (None, math.nan, 1.0, None, math.inf, 1.0, 1.0, 1.0):
        optimizer.step()
        schedule.step(loss)
    assert (rates_of(optimizer), schedule.halvings) == ([1.0], 0)
    for _ in range(2):
        schedule.step(1.0)
    assert (rates_of(optimizer), schedule.halvings) == ([0.5], 1)


def test_it_serves_any_optimizer():
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=1.0)
    schedule = WarmupThenHalve(optimizer, warmup=4)
    assert rates_of(optimizer) == [0.25]
    for _ in range(3):
        optimizer.step()
        schedule.step()
    assert rates_of(optimizer) == pytest.approx([1.0])


@pytest.mark.parametrize(
    ("name", "value"),
    [("warmup", -1), ("halvings", 1.5), ("window", 0), ("patience", True), ("threshold", math.nan)],
)
def test_settings_are_checked(name, value):
    with pytest.raises(SettingError, match=f"WarmupThenHalve.{name} is"):
        WarmupThenHalve(optimizer_with(1.0), **{name: value})
