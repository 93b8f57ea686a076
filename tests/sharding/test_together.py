"""Sharding with all plugins in one loop: scales, windows, compressed gradients, small residuals and moments, clipping."""

import copy
import math

import pytest
import torch
from torch.nn.parallel import DistributedDataParallel as DDP

import distopt
from tests.processes import run_ranks
from tests.scaling.networks import Residual, batch
from tests.sharding.models import gradients, local, mesh_of, whole, worst

POWER = distopt.PowerSGD(rank=2, min_saving=0.0)


class Training:
    """A model with its plugins; sharded, or without a shape under DDP."""

    def __init__(self, shape, reducer=POWER, scaler_first=False, clip=5.0, adam=False):
        self.module = self.model = Residual(depth=3)
        if scaler_first:
            self.scale()
        if shape is None:
            self.model = DDP(self.module)
            self.registration = distopt.register(self.model, reducer)
        else:
            self.registration = distopt.shard(self.module, "branches.*", mesh=mesh_of(shape), reducer=reducer)
        if not scaler_first:
            self.scale()
        named = self.module.named_parameters()
        if adam:
            self.optimizer = distopt.optim.AdamW(named, lr=0.02, moments="packed16", max_variance=5.0)
        else:
            self.optimizer = torch.optim.SGD([p for _, p in named], lr=0.02)
        self.clip, self.norms = clip, []

    def scale(self):
        self.scaler = distopt.ResblockScaler("branches.*", model=self.module, dtype=torch.float16)

    def run(self, rank, steps, bad=None):
        losses = []
        for step in steps:
            loader = [batch(100 * step + 10 * micro + rank, n=4) for micro in range(2)]
            for window in distopt.accumulate(loader, self.model, steps=2):
                for x in window:
                    self.module.branches[1].amplify = math.inf if bad == (rank, step) and window.is_last else 1.0
                    target = x.sum(1, keepdim=True)
                    window.backward(self.scaler.scale((self.model(x) - target).square().sum()))
                self.module.branches[1].amplify = 1.0
                self.scaler.unscale_(self.optimizer)
                self.norms.append(float(self.registration.clip_grad_norm_(self.clip)))
                self.scaler.step(self.optimizer)
                self.scaler.update()
                self.optimizer.zero_grad()
                losses.append(window.loss())
        return losses


def scaled_job(rank):
    """Both orders of scaler and shard, against DDP; an overflow on one rank lowers one branch's scale."""
    exact, bad = distopt.AllReduce(), (3, 2)
    reference = Training(None, exact)
    reference.run(rank, range(4), bad)
    for scaler_first in (False, True):
        training = Training((2, 2), exact, scaler_first)
        training.run(rank, range(4), bad)
        assert training.scaler.scales() == reference.scaler.scales()
        assert training.scaler.stats().skipped_steps == training.registration.stats().skipped_steps == 1
        skips = {name: figures.skips for name, figures in training.scaler.stats().blocks.items()}
        assert skips == {"branches.0": 0, "branches.1": 1, "branches.2": 0}
        torch.testing.assert_close(training.norms, reference.norms, rtol=1e-4, atol=0, equal_nan=True)
        assert worst(whole(training.module), whole(reference.module)) < 1e-5


def everything_job(rank):
    training = Training((2, 2), distopt.PowerSGD(rank=2, min_saving=0.0, residual_dtype="1-6-9"), clip=5.0, adam=True)
    losses = training.run(rank, range(12), (1, 3))
    training.registration.check_replicas()
    check_optimizer(training)
    saved = [copy.deepcopy(part.state_dict()) for part in (training.scaler, training.registration)]
    return losses, saved[1]["step"], training.scaler.stats().skipped_steps


def check_optimizer(training):
    """Moments are saved as sharded tensors, of every parameter's whole shape, and come back to the bit."""
    state = copy.deepcopy(training.optimizer.state_dict())
    parameters = [p for p in training.module.parameters()]
    for key, moments in state["state"].items():
        assert moments["exp_avg"].full_tensor().shape == parameters[key].shape
    codes = [entry["exp_avg"].clone() for entry in training.optimizer.state.values()]
    training.optimizer.load_state_dict(state)
    again = [entry["exp_avg"] for entry in training.optimizer.state.values()]
    assert all(torch.equal(local(a), local(b)) for a, b in zip(codes, again, strict=True))
    assert 4 <= training.optimizer.moment_bytes(exempt=False) < 4.5


def clip_job(rank):
    """The norm is that of all shards together, whatever it is known from."""
    training = Training((2, 2))
    found = []
    for step in range(2):
        x = batch(10 * step + rank)
        training.model(x).square().mean().backward()
        training.scaler.unscale_(training.optimizer)
        wanted = math.sqrt(sum(float(p.grad.full_tensor().square().sum()) for p in training.module.parameters()))
        before = gradients(training.module)
        found.append((float(training.registration.clip_grad_norm_(0.01)), wanted))
        assert all(
            torch.allclose(g, before[name] * 0.01 / wanted, rtol=1e-3) for name, g in gradients(training.module).items()
        )
        training.scaler.update()
        training.optimizer.zero_grad()
    return found


def all_job(rank):
    scaled_job(rank)
    return everything_job(rank), clip_job(rank)


@pytest.fixture(scope="module")
def found():
    """What four ranks found, after they compared scales with DDP's."""
    return run_ranks(4, all_job, timeout=120.0)


def test_everything_trains(found):
    for (losses, step, skipped), _ in found:
        assert losses == found[0][0][0]
        assert losses[-1] < 0.7 * losses[0]
        assert step == 11
        assert skipped == 1


def test_the_norm_of_all_shards(found):
    for _, norms in found:
        assert norms == found[0][1]
        assert all(ours == pytest.approx(wanted, rel=1e-5) for ours, wanted in norms)
