"""The package of PowerSGD's author as a way: what it does not send stays in the gradients, and backward adds to it."""

import sys
import types
from typing import NamedTuple

import pytest
import torch

from bench import epfml
from bench.lab.tables import step_tables
from bench.lab.ways import EPFML, EpfmlPowerSGD
from bench.lab.workloads import Matrices, Workload

TINY = Workload(
    "tiny",
    lambda: Matrices(8, 2),
    lambda rows, generator: (torch.randn(rows, 8, generator=generator),),
    "layers.*",
    rows=2,
)


class Config(NamedTuple):
    rank: int
    min_compression_rate: float
    num_iters_per_step: int
    start_compressing_after_num_steps: int


class Half:
    """Sends half of each gradient, and leaves the other half where it was."""

    def __init__(self, params, config):
        assert (config.rank, config.start_compressing_after_num_steps) == (4, 0)
        self.seen = []

    def aggregate(self, gradients):
        self.seen.append([gradient.clone() for gradient in gradients])
        return [gradient.mul_(0.5).clone() for gradient in gradients]


@pytest.fixture
def package(monkeypatch):
    module = types.ModuleType("powersgd")
    module.Config, module.PowerSGD = Config, Half
    monkeypatch.setitem(sys.modules, "powersgd", module)


def test_what_is_not_sent_is_added_to_the_next_gradient(package):
    way, twin = EpfmlPowerSGD(TINY, model := TINY.build(), 4), TINY.build()
    twin.load_state_dict(model.state_dict())
    batch = TINY.draw(2, torch.Generator().manual_seed(0))
    TINY.loss(twin(*batch)).backward()
    exact = [parameter.grad for parameter in twin.parameters()]
    for _ in range(2):
        way.step(batch)
        way.rest()
        assert all(parameter.grad is None for parameter in model.parameters())
    first, second = way._aggregator.seen
    for gradient, one, two in zip(exact, first, second, strict=True):
        assert torch.allclose(one, gradient)
        assert torch.allclose(two, 1.5 * gradient)


def test_a_package_without_code_is_none(monkeypatch):
    monkeypatch.setitem(sys.modules, "powersgd", types.ModuleType("powersgd"))
    assert not epfml.is_installed()


def test_the_table_says_what_is_not_measured():
    record = {
        "layout": "replicated",
        "workload": "matrices",
        "alone": False,
        "megabits": None,
        "ring": 2,
        "rings": 1,
        "rows": 1,
        "model_bytes": 100,
        "seconds": [1.0, 1.0],
        "sent": [0.0, 0.0],
        "payload": [0.0, 0.0],
    }
    told = "\n".join(step_tables([{**record, "way": "DDP"}]).values())
    assert f"| {EPFML} | not measured: not installed" in told
    assert "not measured" not in "\n".join(step_tables([{**record, "way": EPFML}]).values())
