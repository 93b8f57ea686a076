"""Self-distillation: what identical views cost, what a batch mean does not see, and means over all ranks."""

import math

import pytest
import torch
from distopt.integrations.recipes.distillation import SelfDistillation, both_views
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

import distopt
from distopt.errors import SettingError
from tests.processes import run_ranks

seeds = st.integers(0, 10**6)
ALL = SelfDistillation(agreement=0.7, discrepancy=0.3)


def views(seed, rows=5, classes=4, width=3):
    generator = torch.Generator().manual_seed(seed)
    a, b = (2 * torch.randn(rows, classes, generator=generator, dtype=torch.float64) for _ in range(2))
    f, g = (torch.randn(rows, width, generator=generator, dtype=torch.float64) for _ in range(2))
    return a, b, f, g, torch.randint(0, classes, (rows,), generator=generator)


@given(seed=seeds)
def test_is_its_five_terms(seed):
    a, b, f, g, y = views(seed)
    terms = ALL(a, b, f, g, y)
    p, q = a.softmax(1), b.softmax(1)
    wanted = {
        "first": -p[range(5), y].log().mean(),
        "second": -q[range(5), y].log().mean(),
        "forwards": (p * (p / q).log()).sum(1).mean(),
        "backwards": (q * (q / p).log()).sum(1).mean(),
        "discrepancy": ((f.mean(0) - g.mean(0)) ** 2).sum(),
    }
    for name, value in wanted.items():
        assert getattr(terms, name).item() == pytest.approx(value.item(), rel=1e-9, abs=1e-12), name
    total = wanted["first"] + wanted["second"] + 0.7 * (wanted["forwards"] + wanted["backwards"])
    assert terms.total.item() == pytest.approx((total + 0.3 * wanted["discrepancy"]).item(), rel=1e-9)


@given(seed=seeds)
def test_identical_views_cost_two_cross_entropies(seed):
    a, _, f, _, y = views(seed)
    terms = ALL(a, a, f, f, y)
    assert terms.forwards.item() == terms.backwards.item() == terms.discrepancy.item() == 0
    assert terms.total.item() == pytest.approx(2 * functional.cross_entropy(a, y).item(), rel=1e-12)


@given(seed=seeds)
def test_both_views_count_alike(seed):
    a, b, f, g, y = views(seed)
    assert ALL(a, b, f, g, y).total.item() == pytest.approx(ALL(b, a, g, f, y).total.item(), rel=1e-12)


@given(seed=seeds)
def test_mean_features_do_not_know_which_samples_belong_together(seed):
    """A squared difference sample by sample, which some code has in this place, would change."""
    a, b, f, g, y = views(seed)
    order = torch.randperm(5, generator=torch.Generator().manual_seed(seed))
    assert ALL(a, b, f, g[order], y).discrepancy.item() == pytest.approx(
        ALL(a, b, f, g, y).discrepancy.item(), rel=1e-9
    )


@given(seed=seeds)
def test_divergences_do_not_know_a_shift_of_all_logits_and_are_not_negative(seed):
    a, b, f, g, y = views(seed)
    terms, shifted = ALL(a, b, f, g, y), ALL(a + 5, b - 3, f, g, y)
    assert shifted.forwards.item() == pytest.approx(terms.forwards.item(), rel=1e-9)
    assert min(terms.forwards.item(), terms.backwards.item()) >= 0


@given(seed=seeds, temperature=st.floats(0.5, 8))
def test_a_temperature_divides_the_logits_of_the_divergences_only(seed, temperature):
    a, b, f, g, y = views(seed)
    warm, cold = (
        SelfDistillation(temperature=temperature)(a, b, f, g, y),
        SelfDistillation()(a / temperature, b / temperature, f, g, y),
    )
    assert warm.forwards.item() == pytest.approx(temperature**2 * cold.forwards.item(), rel=1e-9)
    assert warm.first.item() == pytest.approx(functional.cross_entropy(a, y).item(), rel=1e-12)


@given(seed=seeds)
def test_a_detached_teacher_gets_no_gradient(seed):
    a, b, f, g, y = views(seed)
    a.requires_grad_()
    b.requires_grad_()
    loss = SelfDistillation(detach=True)
    forwards = loss(a, b, f, g, y).forwards
    of_a, of_b = torch.autograd.grad(forwards, (a, b), allow_unused=True)
    assert of_a is None
    # KL(p || q) with p fixed is a cross-entropy: q - p.
    assert torch.allclose(of_b, (b.softmax(1) - a.softmax(1)).detach() / 5, atol=1e-12)
    attached = torch.autograd.grad(SelfDistillation()(a, b, f, g, y).forwards, a)[0]
    assert attached.abs().sum() > 0


@given(seed=seeds)
def test_gradients_are_those_of_finite_differences(seed):
    *inputs, y = views(seed)
    inputs = [part.requires_grad_() for part in inputs]
    assert torch.autograd.gradcheck(lambda *parts: ALL(*parts, y).total, inputs)


def test_spatial_features_are_pooled():
    a, b, _, _, y = views(0)
    f, g = torch.randn(5, 3, 2, 2, dtype=torch.float64), torch.randn(5, 3, 2, 2, dtype=torch.float64)
    pooled = ALL(a, b, f.mean((2, 3)), g.mean((2, 3)), y)
    assert ALL(a, b, f, g, y).discrepancy.item() == pytest.approx(pooled.discrepancy.item(), rel=1e-12)


def test_is_float32_in_16_bits():
    a, b, f, g, y = (part.bfloat16() if part.is_floating_point() else part for part in views(1))
    terms = ALL(a, b, f, g, y)
    assert terms.total.dtype == torch.float32
    assert torch.equal(terms.total, ALL(a.float(), b.float(), f.float(), g.float(), y).total)


class Network(nn.Module):
    """A trunk and a head, in float64, the same on all ranks."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(5)
        self.trunk, self.head = nn.Linear(6, 4), nn.Linear(4, 3)
        self.double()

    def forward(self, inputs):
        features = torch.tanh(self.trunk(inputs))
        return self.head(features), features


@given(seed=seeds)
def test_one_pass_over_both_views_equals_two_passes(seed):
    generator = torch.Generator().manual_seed(seed)
    first, second = (torch.randn(4, 6, generator=generator, dtype=torch.float64) for _ in range(2))
    model = Network()
    (a, f), (b, g) = model(first), model(second)
    for found, wanted in zip(both_views(model, first, second), (a, b, f, g), strict=True):
        assert torch.allclose(found, wanted, atol=1e-12)


def samples(rank, number):
    generator = torch.Generator().manual_seed(40 + rank)
    first, second = (torch.randn(number, 6, generator=generator, dtype=torch.float64) for _ in range(2))
    return first, second, torch.randint(0, 3, (number,), generator=generator)


def gradients(model):
    return [parameter.grad.clone() for parameter in model.parameters()]


def on_ranks(rank, kind):
    """Gradients with DDP's own average, with a registered reducer, and in a window of ranks with unequal batches."""
    loss = SelfDistillation(discrepancy=2.0, mean=kind)
    found = []
    for registered in (False, True):
        model = DistributedDataParallel(Network())
        if registered:
            distopt.register(model, distopt.PowerSGD(rank=4))
        first, second, labels = samples(rank, 6)
        loss(*both_views(model, first, second), labels).total.backward()
        found.append(gradients(model))
    model = DistributedDataParallel(Network())
    first, second, labels = samples(rank, 3 + 4 * rank)
    for window in distopt.accumulate([(first, second, labels)], model, steps=1, weight=lambda batch: len(batch[2])):
        for a, b, y in window:
            window.backward(loss(*both_views(model, a, b), y).total * len(y))
    return [*found, gradients(model)]


def alone(sizes):
    """One process with the data of all ranks."""
    model = Network()
    first, second, labels = (torch.cat(parts) for parts in zip(*map(samples, range(2), sizes), strict=True))
    SelfDistillation(discrepancy=2.0)(*both_views(model, first, second), labels).total.backward()
    return gradients(model)


def equal(found, wanted):
    return all(torch.allclose(a, b, rtol=1e-9, atol=1e-12) for a, b in zip(found, wanted, strict=True))


def test_a_global_mean_has_the_gradient_of_one_process_with_the_whole_batch():
    ranks = run_ranks(2, on_ranks, "global")
    for ddp, registered, window in ranks:
        assert equal(ddp, alone((6, 6)))
        assert equal(registered, alone((6, 6)))
        assert equal(window, alone((3, 7)))


def test_a_rank_mean_is_another_loss():
    ddp, _, _ = run_ranks(2, on_ranks, "rank")[0]
    assert not equal(ddp, alone((6, 6)))


@pytest.mark.parametrize(("call", "told"), [
    (lambda: SelfDistillation(agreement=-1.0), "SelfDistillation.agreement is -1.0, but must be a finite number of at"),
    (lambda: SelfDistillation(discrepancy=math.inf), "SelfDistillation.discrepancy is inf"),
    (lambda: SelfDistillation(temperature=0.0), "SelfDistillation.temperature is 0.0"),
    (lambda: SelfDistillation(mean="node"), "SelfDistillation.mean is 'node', but must be one of rank, global"),
    (lambda: ALL(*(part[: 5 - (i == 1)] for i, part in enumerate(views(0)))), "of the same shapes for both views"),
    (lambda: both_views(Network(), torch.zeros(2, 6), torch.zeros(3, 6)), "the views is"),
])  # fmt: skip
def test_refuses(call, told):
    with pytest.raises(SettingError, match=told):
        call()
