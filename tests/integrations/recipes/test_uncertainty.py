"""Tasks weighted by uncertainty: closed forms, what rescaling does, and what all ranks agree on."""

import math

import pytest
import torch
import torch.distributed as dist
from distopt.integrations.recipes.uncertainty import FORMS, KINDS, UncertaintyWeights, parameter_groups
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

import distopt
from distopt.errors import SettingError
from tests.processes import run_ranks

losses = st.floats(1e-4, 1e4)
kinds = st.sampled_from(KINDS)
forms = st.sampled_from(FORMS)
BOTH = {"depth": "regression", "class": "classification"}


def weights_at(s, tasks, form="likelihood"):
    made = UncertaintyWeights(tasks, form=form).double()
    made.log_variances.data = torch.tensor(s, dtype=torch.float64)
    return made


def numbers(values):
    return {name: torch.tensor(value, dtype=torch.float64) for name, value in values.items()}


@given(depth=losses, label=losses, s=st.tuples(st.floats(-5, 5), st.floats(-5, 5)))
def test_is_kendalls_formula(depth, label, s):
    found = weights_at(s, BOTH)(numbers({"depth": depth, "class": label})).item()
    sigma, other = (math.exp(each / 2) for each in s)
    wanted = depth / (2 * sigma**2) + math.log(sigma) + label / other**2 + math.log(other)
    assert found == pytest.approx(wanted, rel=1e-9, abs=1e-9)


@given(depth=losses, label=losses, s=st.tuples(st.floats(-5, 5), st.floats(-5, 5)))
def test_the_revised_form_is_another_one_and_never_negative(depth, label, s):
    found = weights_at(s, BOTH, "revised")(numbers({"depth": depth, "class": label})).item()
    wanted = sum(
        loss / (2 * math.exp(each)) + math.log(1 + math.exp(each)) for loss, each in zip((depth, label), s, strict=True)
    )
    assert found == pytest.approx(wanted, rel=1e-9)
    assert found > 0


@given(loss=losses, s=st.floats(-8, 8), kind=kinds)
def test_the_gradient_is_its_closed_form(loss, s, kind):
    made = weights_at([s], {"a": kind})
    made(numbers({"a": loss})).backward()
    factor = {"regression": 0.5, "classification": 1.0}[kind]
    assert made.log_variances.grad.item() == pytest.approx(0.5 - factor * math.exp(-s) * loss, rel=1e-9, abs=1e-12)


@given(loss=losses, kind=kinds, form=forms)
def test_the_optimum_is_one(loss, kind, form):
    best = UncertaintyWeights({"a": kind}, form=form).optimum({"a": loss})["a"]
    made = weights_at([best], {"a": kind}, form)
    value = made(numbers({"a": loss}))
    value.backward()
    assert made.log_variances.grad.abs().item() < 1e-9
    for beside in (best - 0.01, best + 0.01):
        assert weights_at([beside], {"a": kind}, form)(numbers({"a": loss})) > value
    if form == "likelihood":
        wanted = math.log(loss if kind == "regression" else 2 * loss)
        assert best == pytest.approx(wanted, abs=1e-12)
        assert value.item() == pytest.approx(0.5 + 0.5 * wanted, abs=1e-9)


@pytest.mark.parametrize(("kind", "loss", "value"), [("regression", 0.25, -0.1931), ("classification", 2.0, 1.1931)])
def test_the_value_at_the_optimum(kind, loss, value):
    made = UncertaintyWeights({"a": kind})
    at = weights_at([made.optimum({"a": loss})["a"]], {"a": kind})(numbers({"a": loss})).item()
    assert at == pytest.approx(value, abs=1e-4)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("loss", [0.25, 2.0, 40.0])
def test_training_finds_the_optimum(kind, loss, form):
    made = UncertaintyWeights({"a": kind}, form=form)
    optimizer = torch.optim.AdamW(parameter_groups(made, weight_decay=0.5, betas=(0.9, 0.9)), lr=0.2)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5 ** (max(0, step - 60) / 20))
    for _ in range(300):
        optimizer.zero_grad()
        made({"a": torch.tensor(loss)}).backward()
        optimizer.step()
        schedule.step()
        assert made.weights()["a"] > 0
    assert made.log_variances.item() == pytest.approx(made.optimum({"a": loss})["a"], abs=1e-3)


def test_a_task_without_any_loss_left_does_no_harm():
    """A cross-entropy in float32 is exactly 0 where it is sure: s falls at each step, and 0 times infinity is NaN."""
    made = UncertaintyWeights(BOTH)
    optimizer = torch.optim.Adam(parameter_groups(made, weight_decay=0.0, learning_rate=2.0), lr=2.0)
    model = torch.zeros(1, requires_grad=True)
    for _ in range(60):
        optimizer.zero_grad()
        total = made({"depth": torch.tensor(2.0), "class": (0 * model).sum()})
        total.backward()
        optimizer.step()
    assert total.isfinite()
    assert made.log_variances.isfinite().all()
    assert model.grad.isfinite().all()
    assert -90 < made.log_variances[1] < -29
    assert made.weights()["class"] < 2e13
    for _ in range(60):  # and it comes back as soon as there is a loss
        optimizer.zero_grad()
        made({"depth": torch.tensor(2.0), "class": torch.tensor(0.5)}).backward()
        optimizer.step()
    assert made.log_variances[1] > -20


@pytest.mark.parametrize("s", [-1e4, -100.0, 100.0, 1e4])
@pytest.mark.parametrize("form", FORMS)
def test_a_log_variance_far_off_is_led_back(form, s):
    made = UncertaintyWeights({"a": "regression"}, form=form)
    made.log_variances.data.fill_(s)
    total = made({"a": torch.tensor(4.0)})
    total.backward()
    assert total.isfinite()
    assert made.log_variances.grad.isfinite().all()
    assert made.log_variances.grad.item() * s > 0
    assert math.isfinite(made.weights()["a"])


@given(depth=losses, label=losses, scale=st.floats(1e-3, 1e3))
def test_rescaling_a_loss_shifts_the_best_total_by_a_constant(depth, label, scale):
    """So the unit of a task does not matter once s has followed it: its gradients are those of ln(L) / 2."""

    def best(values):
        made = UncertaintyWeights(BOTH)
        return weights_at(list(made.optimum(values).values()), BOTH)(numbers(values)).item()

    before, after = best({"depth": depth, "class": label}), best({"depth": scale * depth, "class": label})
    assert after - before == pytest.approx(0.5 * math.log(scale), abs=1e-9)


def test_16_bit_losses_are_weighted_in_float32():
    made = UncertaintyWeights(BOTH)
    low = {name: torch.tensor(300.7, dtype=torch.bfloat16) for name in BOTH}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        total = made(low)
    assert total.dtype == torch.float32
    assert torch.equal(total, made({name: loss.float() for name, loss in low.items()}))


class Two(nn.Module):
    """Two tasks on one layer, and their weights."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.trunk, self.weights = nn.Linear(4, 5), UncertaintyWeights(BOTH)

    def sums(self, batch):
        inputs, depths, labels = batch
        found = self.trunk(inputs)
        return {
            "depth": (found[:, 0] - depths).square().sum(),
            "class": functional.cross_entropy(found[:, 1:], labels, reduction="sum", ignore_index=-1),
        }

    def forward(self, batch, counts):
        return self.weights.terms(self.sums(batch), counts)


def counts_of(batch):
    """Not every sample has a label."""
    return {"depth": len(batch[1]), "class": int((batch[2] >= 0).sum())}


def batches(rank, number=5):
    """Micro-batches of different sizes, the last window incomplete; some labels are missing."""
    made = []
    for index in range(number):
        generator = torch.Generator().manual_seed(100 * rank + index)
        rows = 1 + (3 * rank + 2 * index) % 5
        inputs = torch.randn(rows, 4, generator=generator, dtype=torch.float64)
        labels = torch.randint(0, 4, (rows,), generator=generator)
        labels[torch.rand(rows, generator=generator) < 0.3] = -1
        made.append((inputs, 100 * inputs.sum(1), labels))
    return made


def train(rank, world_size, reducer, join):
    model = Two().double()
    wrapped = DistributedDataParallel(model) if join else model
    if join:
        distopt.register(wrapped, reducer)
    micros = (
        batches(rank)
        if join
        else [batch for pair in zip(*map(batches, range(world_size)), strict=True) for batch in pair]
    )
    optimizer = torch.optim.AdamW(parameter_groups(wrapped, weight_decay=0.1, learning_rate=0.1), lr=0.05)
    for window in distopt.accumulate(micros, wrapped, steps=2 if join else 2 * world_size, weight=counts_of):
        for batch in window:
            window.backward(wrapped(batch, counts_of(batch)))
        optimizer.step()
        optimizer.zero_grad()
    return [parameter.detach() for parameter in model.parameters()]


def two_ranks(rank):
    return [train(rank, 2, reducer, True) for reducer in (distopt.AllReduce(), distopt.PowerSGD(rank=1))]


def test_ranks_agree_to_the_bit_and_equal_one_process_with_all_data():
    first, second = run_ranks(2, two_ranks)
    for mine, its in zip(first, second, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(mine, its, strict=True))
    alone = train(0, 2, None, False)
    for exact, wanted in zip(first[0], alone, strict=True):
        assert torch.allclose(exact, wanted, rtol=1e-9, atol=1e-9)
    assert (first[0][0] != 0).all()
    log_variances = first[0][0] if first[0][0].numel() == 2 else first[0][-1]
    assert log_variances[0] > 0.2  # of 100 x larger targets: upwards from 0


def test_terms_divided_by_a_windows_counts_are_the_loss_of_its_means():
    made = weights_at([0.7, -0.4], BOTH)
    micros = [numbers({"depth": 3.0, "class": 1.0}), numbers({"depth": 5.0, "class": 2.5})]
    counts = [{"depth": 2, "class": 1}, {"depth": 6, "class": 0}]
    parts = [made.terms(sums, count) for sums, count in zip(micros, counts, strict=True)]
    divided = sum(sum(part[name] for part in parts) / sum(c[name] for c in counts) for name in BOTH)
    means = {name: sum(m[name] for m in micros) / sum(c[name] for c in counts) for name in BOTH}
    assert divided.item() == pytest.approx(made(means).item(), rel=1e-12)


def test_log_variances_do_not_decay_and_may_have_a_rate_of_their_own():
    model = Two()
    others, own = parameter_groups(model, weight_decay=0.1, learning_rate=1e-3)
    assert (others["weight_decay"], own["weight_decay"], own["lr"]) == (0.1, 0.0, 1e-3)
    assert own["params"] == [model.weights.log_variances]
    assert len(others["params"]) == 2
    listed = parameter_groups([model.trunk, model.weights], weight_decay=0.1)
    assert [len(group["params"]) for group in listed] == [2, 1]
    assert "lr" not in listed[1]
    model.weights.log_variances.data.fill_(2.0)
    optimizer = torch.optim.SGD(parameter_groups(model, weight_decay=0.5), lr=0.1)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    before = model.trunk.weight.detach().clone()
    optimizer.step()
    assert model.weights.log_variances.tolist() == [2.0, 2.0]
    assert torch.allclose(model.trunk.weight, before * 0.95)


@pytest.mark.parametrize(("call", "told"), [
    (lambda: UncertaintyWeights({}), r"tasks is \{\}, but must be a dictionary with at least one task"),
    (lambda: UncertaintyWeights({"a": "ranking"}), r"tasks\['a'\] is 'ranking', but must be one of regression, classif"),
    (lambda: UncertaintyWeights(BOTH, form="squared"), "form is 'squared', but must be one of likelihood, revised"),
    (lambda: UncertaintyWeights(BOTH)({"depth": torch.tensor(1.0)}), r"losses is \['depth'\], but must be of these tasks"),
    (lambda: UncertaintyWeights({"a": "regression"})({"a": torch.ones(3)}), r"losses\['a'\] is \(3,\)"),
    (lambda: UncertaintyWeights({"a": "regression"})({"a": 3.0}), r"losses\['a'\] is 3.0, but must be a tensor of one number"),
    (lambda: UncertaintyWeights(["a"]), r"tasks is \['a'\], but must be a dictionary"),
    (lambda: UncertaintyWeights(BOTH).optimum({"depth": 0.0}), r"losses\['depth'\] is 0.0, but must be a finite number"),
    (lambda: UncertaintyWeights(BOTH).optimum({"a": 1.0}), r"losses is \['a'\], but must be of these tasks"),
    (lambda: UncertaintyWeights({"a": "regression"}).terms({"a": torch.tensor(1.0)}, {"b": 1}), "counts is"),
    (lambda: parameter_groups(nn.Linear(2, 2), weight_decay=0.1), "modules is .*but must be modules with Uncertainty"),
])  # fmt: skip
def test_refuses(call, told):
    with pytest.raises(SettingError, match=told):
        call()


def outside(rank):
    """What the docstring warns of: weights that DDP does not know follow each rank's own data."""
    torch.manual_seed(0)
    weights = UncertaintyWeights({"a": "regression"})
    weights({"a": torch.tensor(1.0 + 3 * rank)}).backward()
    inside = DistributedDataParallel(UncertaintyWeights({"a": "regression"}))
    inside({"a": torch.tensor(1.0 + 3 * rank)}).backward()
    assert dist.get_world_size() == 2
    return weights.log_variances.grad.item(), inside.module.log_variances.grad.item()


def test_weights_outside_of_ddp_drift_apart_inside_they_do_not():
    (own_a, shared_a), (own_b, shared_b) = run_ranks(2, outside)
    assert own_a != own_b
    assert shared_a == shared_b == pytest.approx((own_a + own_b) / 2)


@given(depth=losses, label=losses, form=forms)
def test_starts_where_it_would_settle(depth, label, form):
    made = UncertaintyWeights(BOTH, form=form).double()
    made.start({"class": label, "depth": depth})
    made(numbers({"depth": depth, "class": label})).backward()
    assert made.log_variances.grad.abs().max() < 1e-6


def test_starts_on_sound_losses_only():
    with pytest.raises(SettingError, match=r"losses\['class'\] is 0.0, but must be a finite number above 0"):
        UncertaintyWeights(BOTH).start({"class": 0.0, "depth": 1.0})
