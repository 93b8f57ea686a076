"""The rules of a scale against fifteen lines each, and what they promise."""

import dataclasses
import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from distopt.errors import SettingError
from distopt.scaling import HeadroomPolicy, PaperPolicy
from distopt.scaling.policy import policy_of

TOP = 16.0
PEAKS = st.one_of(st.just(math.inf), st.just(math.nan), st.just(0.0), st.floats(2.0**-24, 65504.0, width=32))
TRACES = st.lists(st.tuples(PEAKS, PEAKS, PEAKS), max_size=60)


def run(policy, trace, replicas=1):
    """The logarithms of the scales after every step."""
    scales = policy.start(3, replicas)
    history = [scales.log2.tolist()]
    for peaks in trace:
        scales = policy.update(scales, torch.tensor(peaks), TOP, replicas)
        history.append(scales.log2.tolist())
    return history


def paper(policy, finite, replicas):
    """One scale by the words of the paper."""
    scale, last = replicas * 2**policy.initial, -math.inf
    yield math.log2(scale)
    for t, ok in enumerate(finite):
        if ok:
            scale *= 2**policy.growth
        elif t - last >= policy.window:
            scale /= 2**policy.backoff
            last = t
        scale = min(max(scale, replicas * 2**policy.low), replicas * 2**policy.high)
        yield math.log2(scale)


def headroom(policy, peaks):
    """One scale by the words of the docstring."""
    scale, largest, margin, fallen, bad = policy.initial, -math.inf, 0.0, 0, 0
    yield scale
    for peak in peaks:
        if math.isfinite(peak):
            seen = math.log2(peak) - math.floor(scale) if peak else -math.inf
            grown = max(seen - largest, 0) if largest > -math.inf else math.inf
            margin = max(margin - policy.growth, 0) + max(fallen - grown, 0)
            largest, fallen, bad = max(seen, largest - 1 / policy.memory), 0, 0
        else:
            scale, fallen, bad = scale - 2 ** min(bad, 3), fallen + 2 ** min(bad, 3), bad + 1
        if largest > -math.inf:
            scale = TOP - policy.headroom - margin - fallen - largest
        scale = min(max(scale, policy.low), policy.high)
        yield scale


SMALL = PaperPolicy(initial=9.0, growth=0.125, backoff=0.5, window=4, low=7.0, high=10.0)


@given(TRACES, st.sampled_from([PaperPolicy(), SMALL]), st.sampled_from([1, 8, 1024]))
def test_the_paper_s_rule_is_fifteen_lines(trace, policy, replicas):
    history = run(policy, trace, replicas)
    for i in range(3):
        expected = list(paper(policy, [math.isfinite(peaks[i]) for peaks in trace], replicas))
        assert [row[i] for row in history] == pytest.approx(expected, abs=1e-9)


@given(TRACES, st.sampled_from([HeadroomPolicy(), HeadroomPolicy(initial=9.0, low=7.0, high=10.0, growth=0.125)]))
def test_the_default_rule_is_fifteen_lines(trace, policy):
    history = run(policy, trace)
    for i in range(3):
        expected = list(headroom(policy, [peaks[i] for peaks in trace]))
        assert [row[i] for row in history] == pytest.approx(expected, abs=1e-5)  # float32 logarithms of peaks


@given(TRACES, st.sampled_from([1, 8, 1024]))
def test_no_second_division_within_the_window_and_never_out_of_bounds(trace, replicas):
    offset = math.log2(replicas)
    history = run(SMALL, trace, replicas)
    for i in range(3):
        rows = [row[i] for row in history]
        divisions = [t for t, (a, b) in enumerate(itertools.pairwise(rows)) if b < a - 1e-9]
        assert all(b - a >= SMALL.window for a, b in itertools.pairwise(divisions))
        assert all(SMALL.low + offset - 1e-9 <= x <= SMALL.high + offset + 1e-9 for x in rows)


@given(TRACES)
def test_scales_know_nothing_of_each_other(trace):
    for policy in (PaperPolicy(), HeadroomPolicy()):
        swapped = run(policy, [(c, b, a) for a, b, c in trace])
        assert [row[::-1] for row in swapped] == run(policy, trace)


@given(TRACES)
def test_an_update_changes_nothing_that_it_was_given(trace):
    for policy in (PaperPolicy(), HeadroomPolicy()):
        scales = policy.start(3)
        for peaks in trace:
            before = [tensor.clone() for tensor in scales]
            following = policy.update(scales, torch.tensor(peaks), TOP)
            assert all(map(torch.equal, scales, before))
            scales = following


def skipped(policy, limit, steps=400):
    """Steps lost when gradients of size 1 overflow inside a branch above a scale of 2**limit."""
    scales, lost = policy.start(1), 0
    for _ in range(steps):
        applied = math.floor(float(scales.log2))
        lost += applied > limit
        peak = math.inf if applied > limit else 2.0 ** (applied - 20)
        scales = policy.update(scales, torch.tensor([peak]), TOP)
    return lost, float(scales.log2)


@pytest.mark.parametrize("limit", range(-38, 59))
def test_the_default_finds_any_scale_within_a_hundred_octaves_in_a_few_steps(limit):
    lost, log2 = skipped(HeadroomPolicy(), limit)
    assert lost <= 22  # down until it fits, up to where the gradients would fit, down again
    assert log2 <= limit + 1
    assert log2 >= min(limit, 32) - 8  # 32: where the gradient itself would be near the top


def test_gradients_that_shrink_after_an_overflow_are_followed_up():
    """As at the start of a training: large gradients that overflow, and a thousandth of them some steps later."""
    scales = HeadroomPolicy().start(1)
    for t in range(400):
        peak = 2.0 ** (float(scales.log2.floor()) + (8.0 if t < 5 else -8.0))
        scales = HeadroomPolicy().update(scales, torch.tensor([peak if peak < 65504 else math.inf]), TOP)
    assert float(scales.log2) == pytest.approx(16 - 4 + 8, abs=0.01)
    for burst in (True, False):
        peak = math.inf if burst else 2.0 ** (float(scales.log2.floor()) + 2.0)
        scales = HeadroomPolicy().update(scales, torch.tensor([peak]), TOP)
    # The gradients had grown: no room is left beyond what their size calls for.
    assert float(scales.margin) == 0.0
    assert float(scales.log2) == pytest.approx(16 - 4 - 2)


def test_where_the_paper_s_rule_would_skip_thousands():
    """Of facts known: starting 16 octaves too high costs 31 divisions, 125 steps apart."""
    lost, _ = skipped(dataclasses.replace(PaperPolicy(), initial=37.0, high=60.0), 21, steps=4500)
    assert lost > 3700
    lost, _ = skipped(HeadroomPolicy(initial=37.0), 21, steps=4500)
    assert lost < 20


def test_a_rare_overflow_costs_one_step():
    scales = HeadroomPolicy().start(1)
    lost = 0
    for t in range(1000):
        spike = 2.0**6 if t % 250 == 249 else 1.0
        peak = spike * 2.0 ** float(scales.log2.floor())
        lost += peak > 65504
        scales = HeadroomPolicy().update(scales, torch.tensor([peak if peak <= 65504 else math.inf]), TOP)
    assert lost <= 4


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: PaperPolicy(low=14.0), "PaperPolicy.initial is 13.0, but must be between low"),
        (lambda: PaperPolicy(window=0), "PaperPolicy.window is 0, but must be a number of at least 1"),
        (lambda: PaperPolicy(growth=-1.0), "PaperPolicy.growth is -1.0, but must be a number of at least 0"),
        (lambda: HeadroomPolicy(initial=math.nan), "HeadroomPolicy.initial is nan"),
        (lambda: HeadroomPolicy(memory=0), "HeadroomPolicy.memory is 0, but must be a number of at least 1"),
        (lambda: policy_of("papers"), 'preset is \'papers\', but must be "default", "paper" or a policy'),
    ],
)
def test_bad_settings_are_refused(build, message):
    with pytest.raises(SettingError) as caught:
        build()
    assert message in str(caught.value)


def test_presets():
    assert policy_of("paper") == PaperPolicy()
    assert policy_of("default") == HeadroomPolicy()
    assert policy_of(SMALL) is SMALL
    assert PaperPolicy().start(1, 1024).log2.tolist() == [23.0]
    assert PaperPolicy().lowest(1024) == 17.0
