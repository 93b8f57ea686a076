"""What docs/migrate says of both sides, where the other side is installed: they agree in what they should."""

import inspect
import math
from pathlib import Path

import pytest
import torch
from fairscale.nn import FullyShardedDataParallel
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook import PowerSGDState, powerSGD_hook
from torch.nn.parallel import DistributedDataParallel as DDP

import distopt
from bench import epfml
from tests.processes import run_ranks

PAGES = Path(__file__).parents[2] / "docs/migrate"
START = 3
"""Steps before either hook compresses: torch's may not begin before DDP has laid out its buckets anew."""


@pytest.mark.parametrize(
    ("page", "callables"),
    [
        ("torch-powersgd-hook.md", [PowerSGDState.__init__]),
        ("grad-scaler.md", [torch.amp.GradScaler.__init__]),
        ("fairscale-fsdp.md", [FullyShardedDataParallel.__init__]),
    ],
)
def test_every_option_of_theirs_is_on_the_page(page, callables):
    text = (PAGES / page).read_text()
    for function in callables:
        names = set(inspect.signature(function).parameters) - {"self", "module", "kwargs"}
        assert len(names) > 4
        assert not [name for name in names if f"`{name}" not in text]


def trained(rank, hook, steps=20):
    """Losses of one rank's batches, the gradients of each step, and the parameters."""
    torch.manual_seed(0)
    model = DDP(nn.Sequential(nn.Linear(32, 48), nn.Tanh(), nn.Linear(48, 32)))  # one bucket
    hook(model)
    optimizer = torch.optim.SGD(model.parameters(), 0.3)
    draws = torch.Generator().manual_seed(rank)
    losses, gradients = [], []
    for _ in range(steps):
        x = torch.randn(32, 32, generator=draws)
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(model(x), x.roll(1, 1))
        loss.backward()
        losses.append(float(loss.detach()))
        gradients.append([p.grad.clone() for p in model.parameters()])
        optimizer.step()
    return losses, gradients


def theirs(rank, rate=2.0):
    state = PowerSGDState(None, rank, START, rate)
    return lambda model: model.register_comm_hook(state, powerSGD_hook)


def ours(rank, min_saving=0.5):
    return lambda model: distopt.register(model, distopt.PowerSGD(rank, start_step=START, min_saving=min_saving))


def off(left, right):
    """Largest relative difference of two lists of tensors."""
    return max(float((a - b).norm() / b.norm()) for a, b in zip(left, right, strict=True))


def hooks_job(rank):
    exact, averages = trained(rank, lambda model: None)
    found = {"exact": exact}
    for name, full, low in (("theirs", theirs(32, 0.1), theirs(4)), ("ours", ours(32, -9.0), ours(4))):
        _, gradients = trained(rank, full, START + 1)
        same = all(torch.equal(a, b) for k in range(START) for a, b in zip(gradients[k], averages[k], strict=True))
        found[name] = {"same": same, "full": off(gradients[START], averages[START])}
        found[name]["losses"], gradients = trained(rank, low)
        found[name]["low"] = off(gradients[START], averages[START])
    return found


def test_torchs_hook_and_ours_agree():
    for found in run_ranks(2, hooks_job):
        end = sum(found["exact"][-5:])
        for name in ("theirs", "ours"):
            assert found[name]["same"], name  # plain DDP before the start, to the bit
            assert found[name]["full"] < 1e-4, name  # full rank is the mean
            assert found[name]["low"] > 0.1, name  # rank 4 is not
            assert found[name]["losses"] != found["exact"]
            assert sum(found[name]["losses"][-5:]) < 1.2 * end, name
        ratio = sum(found["ours"]["losses"][-5:]) / sum(found["theirs"]["losses"][-5:])
        assert abs(math.log(ratio)) < 0.1


def scaled(rank, told):
    """Parameters after training with a GradScaler that overflows at first and grows often; None without one."""
    torch.manual_seed(0)
    model = DDP(nn.Sequential(nn.Linear(24, 24), nn.Tanh(), nn.Linear(24, 24)))
    scaler = torch.amp.GradScaler(
        "cpu", init_scale=2.0**126, backoff_factor=2.0**-6, growth_interval=3, enabled=told is not None
    )
    known = {"grad_scaler": scaler} if told else {}
    registration = distopt.register(model, distopt.PowerSGD(rank=2), **known)
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    draws = torch.Generator().manual_seed(rank)
    for _ in range(20):
        x = torch.randn(16, 24, generator=draws)
        taken = registration.stats().skipped_steps
        while True:
            optimizer.zero_grad()
            scaler.scale(8 * nn.functional.mse_loss(model(x), x.roll(1, 1))).backward()  # overflows at first
            scaler.step(optimizer)
            scaler.update()
            if registration.stats().skipped_steps == taken:
                break
            taken = registration.stats().skipped_steps
    return [p.detach().clone() for p in model.parameters()], registration.stats().skipped_steps


def scaler_job(rank):
    without, none = scaled(rank, None)
    told, skipped = scaled(rank, told=True)
    untold, _ = scaled(rank, told=False)
    return off(told, without), off(untold, without), none, skipped


def test_a_residual_that_is_told_of_the_scale_is_the_one_without_a_scale():
    for told, untold, none, skipped in run_ranks(2, scaler_job):
        assert told == 0.0
        assert untold > 1e-3
        assert (none, skipped > 0) == (0, True)


def epfml_job(rank, size, iterations, passes):
    found = {}
    for way in ("theirs", "ours"):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(48, 40), nn.Tanh(), nn.Linear(40, 48))
        parameters, draws = list(model.parameters()), torch.Generator().manual_seed(rank)
        optimizer = torch.optim.SGD(parameters, 0.3)
        config = epfml.settings(size)._replace(num_iters_per_step=iterations, min_compression_rate=0.1)
        aggregator = epfml.package().PowerSGD(parameters, config=config)
        registration = distopt.register(model.named_parameters(), distopt.PowerSGD(size, min_saving=-9, passes=passes))
        losses = []
        for _ in range(40):
            x = torch.randn(32, 48, generator=draws)
            optimizer.zero_grad() if way == "ours" else None
            loss = nn.functional.mse_loss(model(x), x.roll(1, 1))
            loss.backward()
            losses.append(float(loss.detach()))
            if way == "theirs":
                epfml.package().optimizer_step(optimizer, aggregator)
            else:
                registration.reduce()
                optimizer.step()
        found[way] = losses
    return found


@pytest.mark.skipif(not epfml.is_installed(), reason=epfml.HOW_TO_INSTALL)
@pytest.mark.parametrize(("size", "iterations", "passes"), [(40, 2, "both"), (4, 2, "both"), (4, 1, "alternate")])
def test_epfmls_and_ours_agree(size, iterations, passes):
    for found in run_ranks(2, epfml_job, size, iterations, passes):
        assert found["ours"] == pytest.approx(found["theirs"], rel=1e-5 if size == 40 else 0.02)
        assert found["ours"] != found["theirs"]
