"""Everything at once in one loop: scales, windows, compressed gradients, 16-bit residuals and moments, clipping."""

import copy

import pytest
import torch
from torch.nn.parallel import DistributedDataParallel as DDP

import distopt
from distopt.scaling import to_16bit
from tests.processes import run_ranks
from tests.scaling.networks import Residual, batch

STEPS = 10


class Training:
    """A model with all its plugins, none of which knows of another."""

    def __init__(self, plain=False, narrow=False):
        self.model = Residual(depth=3)
        if narrow:
            to_16bit(self.model.branches)
        dtype = torch.float32 if plain else torch.float16
        self.scaler = distopt.ResblockScaler("branches.*", model=self.model, dtype=dtype)
        self.wrapped = DDP(self.model)
        reducer = distopt.PowerSGD(rank=2, min_saving=0.0, residual_dtype="1-6-9", factor_dtype="1-6-9")
        self.registration = distopt.register(self.wrapped, distopt.AllReduce() if plain else reducer)
        moments = "float32" if plain else "packed16"
        self.optimizer = distopt.optim.AdamW(
            self.model.named_parameters(), lr=0.02, moments=moments, max_variance=None if plain else 5.0
        )

    def run(self, rank, steps):
        losses = []
        for step in steps:
            loader = [batch(100 * step + 10 * micro + rank, n=4 + micro + rank) for micro in range(2)]
            for window in distopt.accumulate(loader, self.wrapped, steps=2):
                for x in window:
                    bad = (rank, step, window.is_last) == (1, 3, True)
                    self.model.branches[1].amplify = float("inf") if bad else 1.0
                    target = x.sum(1, keepdim=True)
                    window.backward(self.scaler.scale((self.wrapped(x) - target).square().sum()))
                self.model.branches[1].amplify = 1.0
                self.scaler.unscale_(self.optimizer)
                self.registration.clip_grad_norm_(5.0)
                self.scaler.step(self.optimizer)
                self.scaler.update()
                self.optimizer.zero_grad()
                losses.append(window.loss())
        return losses

    def state(self):
        parts = (self.model, self.scaler, self.registration, self.optimizer)
        return copy.deepcopy([part.state_dict() for part in parts])

    def load(self, states):
        parts = (self.model, self.scaler, self.registration, self.optimizer)
        for part, state in zip(parts, states, strict=True):
            part.load_state_dict(state)


def compare_job(rank, narrow):
    exact, small = Training(plain=True), Training(narrow=narrow)
    pairs = [training.run(rank, range(3 * STEPS)) for training in (exact, small)]
    stats = small.scaler.stats()
    return pairs, stats.skipped_steps, [block.skips for block in stats.blocks.values()], small.registration.stats()


@pytest.mark.parametrize("narrow", [False, True], ids=["float32 parameters", "float16 parameters"])
def test_it_trains_as_float32_uncompressed_does(narrow):
    (first, skipped, skips, stats), (second, *_) = run_ranks(2, compare_job, narrow)
    assert first == second
    exact, small = (sum(losses[-5:]) for losses in first)
    assert exact < 0.2 * sum(first[0][:5])
    assert small < 1.5 * exact
    assert (skipped, skips) == (1, [0, 1, 0])
    assert stats.skipped_steps == 1


def resume_job(rank, narrow):
    whole = Training(narrow=narrow)
    whole.run(rank, range(STEPS))
    saved = whole.state()
    whole.run(rank, range(STEPS, 2 * STEPS))
    resumed = Training(narrow=narrow)
    resumed.load(saved)
    resumed.run(rank, range(STEPS, 2 * STEPS))
    weights, again = whole.model.state_dict(), resumed.model.state_dict()
    return [name for name in weights if not torch.equal(weights[name], again[name])], whole.scaler.state_dict() == (
        resumed.scaler.state_dict()
    )


@pytest.mark.parametrize("narrow", [False, True], ids=["float32 parameters", "float16 parameters"])
def test_it_resumes_bit_for_bit(narrow):
    assert run_ranks(2, resume_job, narrow) == [([], True)] * 2
