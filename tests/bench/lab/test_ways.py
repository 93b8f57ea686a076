"""Every way on real ranks, without a lab: it averages, and what it says that it hands over is that."""

import os

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

import distopt
from bench.lab import workloads
from bench.lab.job import Job
from bench.lab.ways import EPFML, NATIVE, NODE, NOOP, OURS, PLAIN, REPLICATED, SHARDED, powersgd, replicated, sharded
from tests.processes import run_ranks

WIDTH, LAYERS = 256, 2
BYTES = 4 * LAYERS * WIDTH**2
TINY = workloads.Workload(
    "tiny",
    lambda: workloads.Matrices(WIDTH, LAYERS),
    lambda rows, generator: (torch.randn(rows, WIDTH, generator=generator),),
    "layers.*",
    rows=2,
)


class Still:
    """A network of any speed, on which nothing is counted."""

    def limit(self, megabits):
        pass

    def sent(self):
        return 0


def measured(rank, layout, alone):
    os.environ["DISTOPT_SHARDS"] = "2"
    workloads.WORKLOADS["tiny"] = TINY
    job = Job("tiny", layout, rounds=2, labels=(*REPLICATED, *SHARDED), warmup=3)
    return job.run(Still(), [None, 100]) + (job.run(Still(), [None], alone=True) if alone else [])


def gradients(rank, layout):
    """Whole gradients after four steps, by way, as numbers."""
    os.environ["DISTOPT_SHARDS"] = "2"
    mesh = distopt.node_mesh() if layout == "sharded" else None
    weights = list(TINY.build().parameters())
    found = {}
    for label in SHARDED if mesh else REPLICATED:
        if label == EPFML:  # gradients are its error buffers, which ranks do not share
            continue
        way = sharded(TINY, label, mesh) if mesh else replicated(TINY, label, weights)
        generator = torch.Generator().manual_seed(rank)
        for _ in range(4):
            way.step(TINY.draw(2, generator))
        whole = [p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad for p in way._model.parameters()]
        found[label] = torch.cat([g.flatten() for g in whole]).double().numpy()
    return found


def factors(rank, passes):
    """Bytes of what PowerSGD sends of square matrices."""
    return 4 * LAYERS * rank * WIDTH * (2 if passes == "both" else 1)


def test_replicated_ways_hand_over_what_they_should():
    told = run_ranks(2, measured, "replicated", True)
    assert told[0] == told[1]
    payload = {(r["way"], r["megabits"]): r["payload"] for r in told[0] if not r["alone"]}
    expected = {NOOP: 0, PLAIN: BYTES, REPLICATED[2]: BYTES / 2, REPLICATED[3]: BYTES / 2}
    expected |= {label: factors(int(label.rpartition(" ")[2]), "both") for label in REPLICATED[4:6]}
    for (way, _), found in payload.items():
        if way in expected:
            assert found == pytest.approx([expected[way]] * 2, rel=1e-3), way
    for passes in ("both", "alternate"):  # and a few numbers that tell which parameters were used
        assert payload[powersgd(4, passes), 100] == pytest.approx([factors(4, passes)] * 2, rel=0.01)
    assert {r["way"] for r in told[0] if r["alone"]} == {NOOP, *OURS}
    assert {(r["ring"], r["rings"], r["model_bytes"]) for r in told[0]} == {(2, 1, BYTES)}


@pytest.mark.parametrize(("layout", "world"), [("replicated", 2), ("sharded", 4)])
def test_all_ranks_have_the_same_gradients_unless_nothing_is_averaged(layout, world):
    told = run_ranks(world, gradients, layout)
    nodes = [told[0], told[-1]]
    for label in told[0]:
        same = (nodes[0][label] == nodes[1][label]).all()
        assert same != (label in (NOOP, NODE)), label
    exact = NATIVE if layout == "sharded" else PLAIN
    apart = NODE if layout == "sharded" else NOOP
    mean = sum(rank[apart] for rank in told) / world
    assert abs(told[0][exact] - mean).max() < 1e-6


def test_the_rows_of_a_batch_are_those_that_take_so_long():
    assert run_ranks(1, rows, 0.0)[0] == 4
    assert run_ranks(1, rows, 0.02)[0] > 4


def rows(rank, seconds):
    assert dist.get_world_size() == 1
    return workloads.rows_for(TINY, seconds)
