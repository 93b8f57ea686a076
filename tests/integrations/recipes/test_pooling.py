"""Poolings of bags: the laws that each keeps, closed forms, and what becomes of numbers that no float holds."""

import math

import numpy as np
import pytest
import torch
from distopt.integrations.recipes import pooling
from distopt.integrations.recipes.attention import AttentionPooling
from distopt.integrations.recipes.logspace import log1mexp, log_expm1, log_softplus
from distopt.integrations.recipes.masks import pad_bags
from distopt.integrations.recipes.pooling import KINDS, LogSumExp, NoisyAnd, NoisyOr
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional

from distopt.errors import SettingError

GROWING = ("isr", "noisy-or")
"""What a bag laid beside itself makes surer."""
PLAIN = {
    "max": lambda p: p.max(),
    "mean": lambda p: p.mean(),
    "noisy-or": lambda p: 1 - (1 - p).prod(),
    "isr": lambda p: (p / (1 - p)).sum() / (1 + (p / (1 - p)).sum()),
    "lse": lambda p: (5 * p).exp().mean().log() / 5,
}
log_odds = st.lists(st.floats(-6, 6), min_size=1, max_size=7)


def pooled(kind, z, mask=None):
    """One bag of one class, in float64."""
    made = pooling.pooling(kind, 1).double()
    return made(torch.as_tensor(z, dtype=torch.float64).reshape(1, -1, 1), mask).squeeze()


def probability(z):
    return torch.tensor(z, dtype=torch.float64).sigmoid()


@pytest.mark.parametrize("kind", sorted(PLAIN))
@given(z=log_odds)
def test_is_its_formula(kind, z):
    assert pooled(kind, z).sigmoid().item() == pytest.approx(PLAIN[kind](probability(z)).item(), rel=1e-9)


@given(z=log_odds, slope=st.floats(0.5, 40), b=st.floats(0, 1))
def test_noisy_and_is_its_formula(z, slope, b):
    made = NoisyAnd(1, slope=slope, start=b).double()
    mean = probability(z).mean().reshape(1, 1)
    given_back = made(torch.tensor(z, dtype=torch.float64).reshape(1, -1, 1)).sigmoid()
    assert given_back.item() == pytest.approx(made.curve(mean).item(), rel=1e-7, abs=1e-12)


@pytest.mark.parametrize(("slope", "b", "row"), [
    (10, 0.5, [0, 0.0114, 0.0701, 0.5, 0.9299, 1]),
    (10, 0.2, [0, 0.1701, 0.5716, 0.9465, 0.9958, 1]),
    (5, 0.5, [0, None, 0.1731, 0.5, 0.8269, 1]),
    (20, 0.5, [0, None, 0.0066, 0.5, 0.9934, 1]),
])  # fmt: skip
def test_noisy_and_table(slope, b, row):
    curve = NoisyAnd(1, slope=slope, start=b).curve(torch.tensor([[0], [0.1], [0.25], [0.5], [0.75], [1]]))
    for found, wanted in zip(curve.flatten().tolist(), row, strict=True):
        assert wanted is None or found == pytest.approx(wanted, abs=5e-5)


@given(slope=st.floats(0.1, 60), b=st.floats(0, 1))
def test_noisy_and_is_exactly_0_at_0_and_1_at_1(slope, b):
    made = NoisyAnd(1, slope=slope, start=b)
    assert made.curve(torch.tensor([[0.0], [1.0]])).flatten().tolist() == [0.0, 1.0]
    infinite = torch.full((1, 3, 1), math.inf)
    assert made(infinite).sigmoid().item() == 1.0
    assert made(-infinite).sigmoid().item() == 0.0


@pytest.mark.parametrize("kind", KINDS)
@given(z=log_odds, data=st.data())
def test_is_monotone_in_every_instance(kind, z, data):
    at = data.draw(st.integers(0, len(z) - 1))
    more = [value + data.draw(st.floats(0, 3)) * (place == at) for place, value in enumerate(z)]
    assert pooled(kind, more) >= pooled(kind, z) - 1e-12


@pytest.mark.parametrize("kind", KINDS)
@given(z=log_odds)
def test_every_instance_pulls_upwards(kind, z):
    inputs = torch.tensor(z, dtype=torch.float64, requires_grad=True)
    pooled(kind, inputs).backward()
    assert (inputs.grad >= 0).all()
    assert inputs.grad.max() > 0


@pytest.mark.parametrize("kind", KINDS)
@given(z=log_odds, seed=st.integers(0, 99))
def test_order_does_not_matter(kind, z, seed):
    order = np.random.default_rng(seed).permutation(len(z))
    assert pooled(kind, np.array(z)[order]).item() == pytest.approx(pooled(kind, z).item(), rel=1e-12, abs=1e-12)


@pytest.mark.parametrize("kind", KINDS)
@given(z=log_odds)
def test_a_bag_beside_itself_says_the_same_unless_evidence_adds_up(kind, z):
    once, twice = pooled(kind, z).item(), pooled(kind, z + z).item()
    if kind in GROWING:
        assert twice > once
    else:
        assert twice == pytest.approx(once, rel=1e-10, abs=1e-10)


@pytest.mark.parametrize("kind", KINDS)
@given(z=log_odds, filling=st.sampled_from([0.0, 1e30, math.nan, math.inf]), more=st.integers(1, 4))
def test_what_the_mask_leaves_out_does_not_matter(kind, z, filling, more):
    mask = torch.tensor([[True] * len(z) + [False] * more])
    inputs = torch.tensor(z + [filling] * more, dtype=torch.float64, requires_grad=True)
    result = pooled(kind, inputs, mask)
    assert result.item() == pytest.approx(pooled(kind, z).item(), rel=1e-12, abs=1e-12)
    result.backward()
    assert inputs.grad[len(z) :].tolist() == [0.0] * more
    assert inputs.grad.isfinite().all()


@pytest.mark.parametrize("kind", KINDS)
@given(z=log_odds)
def test_gradients_are_those_of_finite_differences(kind, z):
    made = pooling.pooling(kind, 1).double()
    inputs = (torch.tensor(z, dtype=torch.float64) + torch.arange(len(z)) * 1e-3).reshape(1, -1, 1).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: made(x), (inputs,), atol=1e-5)


@given(b=st.floats(0.05, 0.95), z=log_odds)
def test_the_gradient_of_the_threshold_is_that_of_the_formula(b, z):
    made = NoisyAnd(1, start=b).double()
    made.threshold.data.fill_(b)
    made(torch.tensor(z, dtype=torch.float64).reshape(1, -1, 1)).sigmoid().sum().backward()
    threshold = torch.tensor(b, dtype=torch.float64, requires_grad=True)
    low = torch.sigmoid(-10 * threshold)
    mean = probability(z).mean()
    ((torch.sigmoid(10 * (mean - threshold)) - low) / (torch.sigmoid(10 * (1 - threshold)) - low)).backward()
    assert made.threshold.grad.item() == pytest.approx(threshold.grad.item(), rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("start", [0, 1])
def test_a_start_may_be_a_whole_number(start):
    made = NoisyAnd(2, start=start)
    assert made.threshold.dtype == torch.float32
    assert made.threshold.tolist() == [start, start]


@pytest.mark.parametrize(
    ("at", "gradient", "kept"), [(1.2, -1.0, 0.0), (1.2, 1.0, 1.0), (-0.1, 1.0, 0.0), (-0.1, -1.0, -1.0)]
)
def test_a_threshold_outside_counts_as_the_end_and_can_come_back(at, gradient, kept):
    made = NoisyAnd(1)
    made.threshold.data.fill_(at)
    clamped = made._clamped(made.threshold)
    assert clamped.item() == min(1.0, max(0.0, at))
    clamped.backward(torch.tensor([gradient]))
    assert made.threshold.grad.item() == kept


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [-1e4, -200.0, -40.0, 40.0, 200.0, 1e4])
def test_sure_instances_have_finite_losses_and_gradients(kind, size):
    made = pooling.pooling(kind, 1)
    z = torch.full((1, 1000, 1), size, requires_grad=True)
    loss = functional.binary_cross_entropy_with_logits(made(z), torch.full((1, 1), float(size < 0)))
    loss.backward()
    assert math.isfinite(loss.item())
    assert loss.item() > 1  # it is sure of the wrong label
    assert z.grad.isfinite().all()
    assert z.grad.abs().sum() > 0.1


@pytest.mark.parametrize("kind", KINDS)
@given(z=st.lists(st.floats(-60, 60), min_size=1, max_size=5))
def test_float32_follows_float64(kind, z):
    made = pooling.pooling(kind, 1)
    single = made(torch.tensor(z, dtype=torch.float32).reshape(1, -1, 1)).item()
    assert single == pytest.approx(
        pooled(kind, torch.tensor(z, dtype=torch.float32).double()).item(), rel=1e-4, abs=1e-4
    )


@pytest.mark.parametrize("kind", KINDS)
def test_is_float32_under_autocast(kind):
    z = torch.randn(3, 4, 2, generator=torch.Generator().manual_seed(0)).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = pooling.pooling(kind, 2)(z)
    assert result.dtype == torch.float32
    assert torch.equal(result, pooling.pooling(kind, 2)(z.float()))


def test_one_outlier_in_a_hundred_moves_noisy_or_alone_among_the_two():
    z = torch.full((1, 100, 1), -8.0)
    z[0, 17] = 8.0
    assert NoisyOr()(z).sigmoid() > 0.99
    assert NoisyAnd(1)(z).sigmoid() < 0.002


@given(x=st.floats(-700, -1e-12))
def test_log1mexp(x):
    assert log1mexp(torch.tensor(x, dtype=torch.float64)).item() == pytest.approx(
        math.log(-math.expm1(x)) if x > -1 else math.log1p(-math.exp(x)), rel=1e-12, abs=1e-300
    )


@given(log_x=st.floats(-300, 6))
def test_log_expm1(log_x):
    x = math.exp(log_x)
    found = log_expm1(torch.tensor(x, dtype=torch.float64), torch.tensor(log_x, dtype=torch.float64)).item()
    assert found == pytest.approx(math.log(math.expm1(x)), rel=1e-10, abs=1e-12)


@given(x=st.floats(-300, 300))
def test_log_softplus(x):
    wanted = math.log(math.log1p(math.exp(x))) if x < 30 else math.log(x + math.exp(-x))
    assert log_softplus(torch.tensor(x, dtype=torch.float64)).item() == pytest.approx(wanted, rel=1e-10, abs=1e-12)


@given(z=log_odds, sharpness=st.floats(1e-3, 1e4))
def test_log_sum_exp_lies_between_mean_and_maximum(z, sharpness):
    found = LogSumExp(sharpness=sharpness)(torch.tensor(z, dtype=torch.float64).reshape(1, -1, 1)).item()
    assert pooled("mean", z).item() - 1e-6 <= found <= pooled("max", z).item() + 1e-6


@pytest.mark.parametrize("gated", [False, True])
def test_attention_is_a_weighted_mean_of_the_instances_in_the_mask(gated):
    torch.manual_seed(0)
    made = AttentionPooling(6, 3, gated=gated)
    features, mask = pad_bags([torch.randn(4, 6), torch.randn(2, 6)])
    alone = made(features[1:, :2])
    features[1, 2:] = math.nan
    assert torch.allclose(made(features, mask)[1:], alone, atol=1e-6)
    same = torch.randn(1, 1, 6).expand(1, 5, 6)
    assert torch.allclose(made(same), made.head(same[:, 0]), atol=1e-6)
    assert torch.allclose(made(features[:1, [2, 0, 3, 1]]), made(features[:1]), atol=1e-6)


def test_attention_is_not_monotone():
    """Adding an instance, however sure, may lower the bag: what `test_unit_tests` punishes."""
    torch.manual_seed(1)
    made = AttentionPooling(2, 1)
    bag = torch.randn(1, 3, 2)
    changes = [
        (made(torch.cat([bag, made.head.weight.reshape(1, 1, 2) * size], 1)) - made(bag)).item() for size in (-3, 3)
    ]
    assert min(changes) < 0 < max(changes)


@pytest.mark.parametrize(("planted"), [0.2, 0.3, 0.6])
def test_the_learned_threshold_recovers_a_planted_fraction(planted):
    generator = torch.Generator().manual_seed(0)
    fractions = torch.rand(2000, 1, generator=generator)
    labels = (fractions >= planted).float()
    made = NoisyAnd(1, slope=20.0)
    optimizer = torch.optim.Adam(made.parameters(), lr=0.02)
    for _ in range(150):
        optimizer.zero_grad()
        functional.binary_cross_entropy(made.curve(fractions), labels).backward()
        optimizer.step()
    assert made.threshold.item() == pytest.approx(planted, abs=0.03)


@pytest.mark.parametrize(("call", "told"), [
    (lambda: pooling.pooling("median", 1), "kind is 'median', but must be one of noisy-and"),
    (lambda: NoisyAnd(0), "NoisyAnd.classes is 0"),
    (lambda: NoisyAnd(1, slope=0.0), "NoisyAnd.slope is 0.0"),
    (lambda: NoisyAnd(1, start=1.5), "NoisyAnd.start is 1.5"),
    (lambda: NoisyAnd(3)(torch.zeros(2, 4, 1)), r"the shape of instances is \(2, 4, 1\), but must be \(bags, instances, 3\)"),
    (lambda: LogSumExp(sharpness=math.nan), "LogSumExp.sharpness is nan"),
    (lambda: AttentionPooling(0, 1), "AttentionPooling.features is 0"),
    (lambda: pad_bags([torch.ones(2, 1), torch.ones(0, 1)]), r"bags is \[2, 0\]"),
    (lambda: NoisyOr()(torch.zeros(2, 3)), r"the shape of instances is \(2, 3\)"),
    (lambda: NoisyOr()(torch.zeros(2, 3, 1), torch.ones(2, 3)), "mask is .*of bools"),
    (lambda: NoisyOr()(torch.zeros(2, 3, 1), torch.tensor([[True] * 3, [False] * 3])), r"without an instance in bags \[1\]"),
])  # fmt: skip
def test_refuses(call, told):
    with pytest.raises(SettingError, match=told):
        call()


def test_modules_are_found_by_an_optimizer_where_they_learn():
    assert {kind: len(list(pooling.pooling(kind, 3).parameters())) for kind in KINDS} == {
        kind: int(kind == "noisy-and") for kind in KINDS
    }
    assert isinstance(pooling.pooling("noisy-and", 3).threshold, nn.Parameter)
