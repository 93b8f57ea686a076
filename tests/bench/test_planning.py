"""The validation on made-up steps: what is predicted exactly passes, what is off by half does not."""

import sys
import types

import pytest
from torch import nn

from bench.planning.__main__ import tables
from bench.planning.validation import validated

PROBES = [
    {"kind": "link", "layout": "replicated", "megabits": 100, "bandwidth": 1.25e7, "latency": 0.0},
    {"kind": "processor", "layout": "replicated", "megabits": None}
    | {"memory_rate": 1e10, "flops_rate": 1e11, "bucket_seconds": 0.0},
]


def steps(way, *seconds):
    facts = {"workload": "tiny", "layout": "replicated", "megabits": 100, "alone": False}
    return {**facts, "way": way, "seconds": list(seconds)}


@pytest.fixture(autouse=True)
def _tiny_workload(monkeypatch):
    lab = types.ModuleType("bench.lab.workloads")
    lab.WORKLOADS = {"tiny": types.SimpleNamespace(build=lambda: nn.Linear(1000, 1250, bias=False))}
    monkeypatch.setitem(sys.modules, "bench.lab.workloads", lab)


def test_plain_ddp_by_hand():
    """5 MB over 12.5 MB/s: 0.4 s after 0.1 s of forward and backward."""
    lab = [steps("no-op hook", 0.1), steps("DDP", 0.52, 0.52), steps("distopt PowerSGD rank 4, both", 5.0)]
    plain, ranked = validated(lab, PROBES)
    assert plain["predicted"] == pytest.approx(0.5)
    assert (plain["passes"], ranked["passes"]) == (True, False)
    assert tables([plain, ranked])["planning-validation"].endswith("1 of 2 pass.")


def test_within_the_range_of_the_steps():
    (found,) = validated([steps("no-op hook", 0.1), steps("DDP", 0.4, 0.9, 1.0)], PROBES)
    assert found["error"] < -0.15
    assert found["passes"]


def test_what_has_no_probe_is_left_out():
    assert validated([steps("no-op hook", 0.1), steps("DDP", 0.5)], PROBES[:1]) == []
