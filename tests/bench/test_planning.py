"""The validation on made-up steps: what is predicted exactly passes, what is off by half does not."""

import sys
import types

import pytest
from torch import nn

from bench.planning.__main__ import tables
from bench.planning.validation import validated

LINK = {"kind": "link", "megabits": 100, "bandwidth": 1.25e7, "latency": 0.0, "cpu_seconds_per_byte": 0.0}
PROBES = [
    {**LINK, "layout": "replicated"},
    {"kind": "processor", "cores": 2, "memory_rate": 1e10, "flops_rate": 1e11}
    | {"bucket_seconds": 0.0, "matrix_seconds": 0.0},
    {**LINK, "layout": "sharded", "cpu_seconds_per_byte": 1e-8},
    {"kind": "hook", "layout": "replicated", "megabits": 100, "hook": "fp16"}
    | {"seconds_per_byte": 4e-8, "cpu_seconds_per_byte": 1e-8},
]


def steps(way, *seconds, layout="replicated"):
    facts = {"workload": "tiny", "layout": layout, "megabits": 100, "alone": False}
    return {**facts, "way": way, "seconds": list(seconds)}


@pytest.fixture(autouse=True)
def _tiny_workload(monkeypatch):
    lab = types.ModuleType("bench.lab.workloads")
    tiny = types.SimpleNamespace(build=lambda: nn.Sequential(nn.Linear(1000, 1250, bias=False)), units="0")
    lab.WORKLOADS = {"tiny": tiny}
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


def test_one_of_torchs_hooks_by_hand():
    """Forward and backward, then 5 MB of 40 ns each."""
    (found,) = validated([steps("no-op hook", 0.1), steps("DDP, torch's fp16 hook", 0.3)], PROBES)
    assert found["predicted"] == pytest.approx(0.3)
    assert validated([steps("no-op hook", 0.1), steps("DDP, torch's bf16 hook", 0.3)], PROBES) == []


@pytest.mark.parametrize(("cores", "busy"), [(2, 0.05), (4, 0.025)])
def test_a_sharded_step_by_hand(cores, busy):
    """2.5 MB on each of two shards; four ranks on two cores send half as fast."""
    probes = [PROBES[1] | {"cores": cores}, PROBES[2] | {"bandwidth": 1e12}]
    lab = [steps(way, 0.1, layout="sharded") for way in ("no averaging between nodes", "native HSDP")]
    assert [record["predicted"] for record in validated(lab, probes)] == [pytest.approx(0.1 + busy)]


def test_native_hsdp_hides_nothing(monkeypatch):
    two = nn.Sequential(*[nn.Linear(625, 1000, bias=False) for _ in range(2)])
    lab = types.SimpleNamespace(build=lambda: two, units="*")
    monkeypatch.setitem(sys.modules["bench.lab.workloads"].WORKLOADS, "tiny", lab)
    ways = ("no averaging between nodes", "native HSDP", "distopt AllReduce")
    native, ours = validated(
        [steps(way, 0.6, layout="sharded") for way in ways],
        [PROBES[1], LINK | PROBES[2] | {"cpu_seconds_per_byte": 0.0}],
    )
    assert native["predicted"] == pytest.approx(0.6 + 0.4)
    assert ours["predicted"] == pytest.approx(0.6 + 0.2)


def test_what_has_no_probe_is_left_out():
    assert validated([steps("no-op hook", 0.1), steps("DDP", 0.5)], PROBES[:1]) == []
