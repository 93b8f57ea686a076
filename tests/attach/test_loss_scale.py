"""A loss scale that changes on the way: residuals keep their meaning."""

import math

import pytest
import torch
from torch.nn.parallel import DistributedDataParallel as DDP

import distopt
from tests.attach.models import batch, mlp, parameters, same, wrap
from tests.processes import run_ranks

SCALES = [1.0, 1024.0, 1024.0, 0.5, 2.0**20, 4.0]


def train(rank, reducer, scales, bad_steps=()):
    """Train with these loss scales; parameters in the end, and the residuals in unscaled units."""
    model = wrap(mlp(3))
    registration = distopt.register(model, reducer)
    for step, scale in enumerate(scales):
        registration.set_loss_scale(scale)
        x = batch(rank, step)
        if step in bad_steps and rank == 1:
            x[0, 0] = math.nan
        (model(x).square().mean() * scale).backward()
        with torch.no_grad():
            for p in model.parameters():
                if step not in bad_steps:
                    p.sub_(p.grad / scale, alpha=0.05)
                p.grad = None
    stats = registration.stats()
    return parameters(model), registration.state_dict(), stats.residual_norm, stats.skipped_steps


def equal_job(rank, reducer):
    scaled, plain = (train(rank, reducer, scales) for scales in (SCALES, [1.0] * len(SCALES)))
    return same(scaled[0], plain[0]), same(scaled[1]["residuals"], plain[1]["residuals"]), scaled[2] == plain[2]


@pytest.mark.parametrize(
    "reducer",
    [
        distopt.PowerSGD(rank=2),
        distopt.PowerSGD(rank=2, residual_dtype="1-6-9", factor_dtype="1-6-9"),
        distopt.PowerSGD(rank=2, residual_dtype=torch.bfloat16, wire_dtype=torch.bfloat16),
        distopt.PowerSGD(rank=2, passes="alternate"),
        distopt.TopK(0.1),
        distopt.Quantize(8),
        distopt.Sign(),
    ],
    ids=str,
)
def test_a_scale_that_changes_by_powers_of_two_changes_no_bit(reducer):
    assert run_ranks(2, equal_job, reducer) == [(True, True, True)] * 2


def skipped_job(rank):
    """The scale changes with a step that is dropped."""
    reducer = distopt.PowerSGD(rank=2)
    scaled, plain = (train(rank, reducer, scales, [2]) for scales in ([8.0, 8.0, 8.0, 2.0, 2.0], [1.0] * 5))
    return same(scaled[0], plain[0]), scaled[3], plain[3]


def test_a_scale_that_changes_with_a_dropped_step():
    assert run_ranks(2, skipped_job) == [(True, 1, 1)] * 2


def drop_job(rank):
    """From 1024 to 1, as when a trainer turns scaling off: the first unscaled update against a bound of its size."""
    model = DDP(mlp(1, 64))
    registration = distopt.register(model, distopt.PowerSGD(rank=1))
    norms = []
    for step in range(20):
        scale = 1024.0 if step < 19 else 1.0
        registration.set_loss_scale(scale)
        (model(batch(rank, step, 64)).square().mean() * scale).backward()
        norms.append(float(model.module[0].weight.grad.norm()) / scale)
        residual = registration.stats().residual_norm["0.weight"]
        model.zero_grad()
    return norms[-1], max(norms[:-1]), residual


def test_turning_scaling_off_does_not_blow_an_update_up():
    """Torch's hook keeps residuals in scaled units: here one update would be some hundred times too large."""
    for last, before, residual in run_ranks(2, drop_job):
        assert last < 2 * before
        assert residual < 20 * before


def scaler_job(rank, told):
    """A GradScaler whose scale doubles every second step, and halves when rank 1 overflows."""
    model = wrap(mlp(3))
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0, growth_interval=2)
    registration = distopt.register(model, distopt.PowerSGD(rank=2), grad_scaler=scaler if told else None)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    scales, taken = [], []
    for step in range(8):
        x = batch(rank, step)
        if step == 4 and rank == 1:
            x[0, 0] = math.inf
        scales.append(scaler.get_scale())
        before = model.module[0].weight.detach().clone()
        scaler.scale(model(x).square().mean()).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        taken.append(not torch.equal(before, model.module[0].weight))
    return scales, taken, registration.stats().skipped_steps, parameters(model)


def unscaled_job(rank):
    model = wrap(mlp(3))
    distopt.register(model, distopt.PowerSGD(rank=2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for step in range(8):
        x = batch(rank, step)
        if step == 4 and rank == 1:
            x[0, 0] = math.inf
        model(x).square().mean().backward()
        if step != 4:
            optimizer.step()
        optimizer.zero_grad()
    return parameters(model)


def test_with_a_grad_scaler_a_run_is_the_unscaled_one_to_the_bit():
    expected = run_ranks(2, unscaled_job)
    for (scales, taken, skipped, found), plain in zip(run_ranks(2, scaler_job, True), expected, strict=True):
        assert scales == [256.0, 256.0, 512.0, 512.0, 1024.0, 512.0, 512.0, 1024.0]
        assert taken == [True] * 4 + [False] + [True] * 3
        assert skipped == 1
        assert same(found, plain)
    assert not same(run_ranks(2, scaler_job, False)[0][3], expected[0])


def resumed_job(rank):
    """What was saved at one scale is taken up at another."""
    reducer = distopt.PowerSGD(rank=2)
    ends = []
    for scales in ([1.0, 1.0, 1.0], [64.0, 64.0, 8.0]):
        end, state, _, _ = train(rank, reducer, scales[:2])
        model = wrap(mlp(3))
        model.module.load_state_dict(end)
        registration = distopt.register(model, reducer)
        registration.load_state_dict(state)
        registration.set_loss_scale(scales[2])
        (model(batch(rank, 2)).square().mean() * scales[2]).backward()
        ends.append({n: p.grad / scales[2] for n, p in model.module.named_parameters()})
    return same(*ends)


def test_resuming_at_another_scale():
    assert all(run_ranks(2, resumed_job))


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("wrong", [0, -1.0, math.inf, math.nan, "1", True])
def test_a_scale_that_is_none(wrong):
    registration = distopt.register(DDP(mlp(1)), distopt.AllReduce())
    with pytest.raises(distopt.SettingError, match=r"loss_scale is .*, but must be a finite number above 0"):
        registration.set_loss_scale(wrong)


@pytest.mark.usefixtures("alone")
def test_a_scale_that_the_scaler_knows_already():
    scaler = torch.amp.GradScaler("cpu")
    registration = distopt.register(DDP(mlp(1)), distopt.AllReduce(), grad_scaler=scaler)
    with pytest.raises(distopt.SettingError, match="must be left to the grad_scaler"):
        registration.set_loss_scale(2.0)
