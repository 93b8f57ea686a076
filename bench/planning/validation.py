"""Predicts the steps that `bench.lab` measured, and compares."""

import json
import re
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from bench.stamp import markdown
from distopt.planning.candidates import low_rank, plain
from distopt.planning.costs import Estimator
from distopt.planning.machine import Network, Processor
from distopt.planning.measuring import measure_link, measure_processor
from distopt.planning.plan import BUCKET_BYTES
from distopt.planning.workload import buckets_of, gradients_of
from distopt.reducers.powersgd import PowerSGD

WITHIN = 0.15
NOOP, NODE = "no-op hook", "no averaging between nodes"
"""What `bench.lab` calls a step without communication, of whole models and of sharded ones."""
PLAIN = ("DDP", "native HSDP")
_RANKED = re.compile(r"distopt PowerSGD rank (\d+), (both|alternate)")
RANKS_A_HOST = {"replicated": 1, "sharded": 2}


def validated(lab: Sequence[Mapping[str, Any]], probes: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Predict every step of the lab that a plan speaks of.

    Args:
        lab: records of `bench.lab`: workload, layout, way, megabits (None: no limit), seconds of each round.
        probes: records of `probed`, of the same layouts and limits; what has none is left out.
    """
    found: list[dict[str, Any]] = []
    for record in lab:
        ranked = _RANKED.fullmatch(record["way"])
        link = _probe(probes, "link", record["layout"], record["megabits"])
        processor = _probe(probes, "processor", record["layout"], None)
        computing = _computing(lab, record)
        if record.get("alone") or not (ranked or record["way"] in PLAIN) or None in (link, processor, computing):
            continue
        assert link is not None
        assert processor is not None
        assert computing is not None
        predicted = _predicted(record, ranked, link, processor, computing)
        measured = statistics.median(record["seconds"])
        low, high = min(record["seconds"]), max(record["seconds"])
        facts = {field: record[field] for field in ("workload", "layout", "way", "megabits")}
        error = predicted / measured - 1
        passes = abs(error) <= WITHIN or low <= predicted <= high
        found.append(
            {"kind": "validated", **facts, "predicted": predicted, "measured": measured, "range": [low, high]}
            | {"error": error, "passes": passes}
        )
    return found


def validation_table(records: Sequence[Mapping[str, Any]]) -> str:
    """Predicted beside measured, and how many pass."""
    rows = [
        [
            r["workload"],
            r["layout"],
            "no limit" if r["megabits"] is None else f"{r['megabits']} Mbit/s",
            r["way"],
            f"{r['measured']:.3f}",
            f"{r['range'][0]:.3f} to {r['range'][1]:.3f}",
            f"{r['predicted']:.3f}",
            f"{r['error']:+.0%}",
            "yes" if r["passes"] else "no",
        ]
        for r in records
    ]
    passed = sum(r["passes"] for r in records)
    head = ["model", "layout", "network", "way", "measured, s", "range", "predicted, s", "error", "passes"]
    return markdown(head, rows) + f"\n\n{passed} of {len(records)} pass."


def probed(limits: Sequence[int]) -> list[dict[str, Any]]:
    """Time links and processors in the lab, with as many ranks a host as its layouts have; megabits, 0 for no limit."""
    from bench.lab.hosts import run_on_hosts

    found: list[dict[str, Any]] = []
    for layout, ranks in RANKS_A_HOST.items():
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "records"
            run_on_hosts(["bench.planning.validation", layout, str(path), *map(str, limits)], ranks=ranks)
            found += json.loads(path.read_text(encoding="utf-8"))
    return found


def _probe(
    probes: Sequence[Mapping[str, Any]], kind: str, layout: str, megabits: int | None
) -> Mapping[str, Any] | None:
    wanted = (kind, layout, megabits)
    return next((p for p in probes if (p["kind"], p["layout"], p["megabits"]) == wanted), None)


def _computing(lab: Sequence[Mapping[str, Any]], record: Mapping[str, Any]) -> float | None:
    """Of forward and backward: the same step without communication between nodes."""
    for other in lab:
        same = all(other.get(field) == record.get(field) for field in ("workload", "layout", "megabits", "alone"))
        if same and other["way"] in (NOOP, NODE):
            return statistics.median(other["seconds"])
    return None


def _predicted(
    record: Mapping[str, Any],
    ranked: re.Match[str] | None,
    link: Mapping[str, Any],
    processor: Mapping[str, Any],
    computing: float,
) -> float:
    from bench.lab.workloads import WORKLOADS

    with torch.device("meta"):
        model: nn.Module = WORKLOADS[record["workload"]].build()
    shards = RANKS_A_HOST[record["layout"]]
    network = Network(link["bandwidth"], link["latency"], 2 * shards, shards, shards > 1, "ring")
    rates = Processor(processor["memory_rate"], processor["flops_rate"], processor["bucket_seconds"])
    slots = gradients_of(model, shards=shards)
    estimator = Estimator(buckets_of(slots, BUCKET_BYTES), network, rates, computing)
    scheme = plain(slots)
    if ranked:
        passes = "alternate" if ranked[2] == "alternate" else "both"
        scheme = low_rank(slots, [int(ranked[1])], passes, estimator, like=PowerSGD(), always=True) or scheme
    return estimator.estimate(scheme).step_seconds


def _rank() -> None:
    """What each process of `probed` does; the first one leaves the records."""
    from bench.lab.hosts import Link

    layout, path, *limits, device = sys.argv[1:]
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(minutes=5))
    ranks = RANKS_A_HOST[layout]
    # As sharded ranks do, each averages with its counterpart on the other host, all of them at the same time.
    pairs = [dist.new_group([i, i + ranks]) for i in range(ranks)]
    network = Link(device, chief=dist.get_rank() % ranks == 0)
    records: list[dict[str, Any]] = []
    for limit in map(int, limits):
        dist.barrier()
        network.limit(limit or None)
        dist.barrier()
        link = measure_link(pairs[dist.get_rank() % ranks], "ring")
        # A plan wants the rate of the host, which its ranks share.
        facts = {"bandwidth": link.bandwidth * ranks, "latency": link.latency}
        records.append({"kind": "link", "layout": layout, "megabits": limit or None, **facts})
    network.limit(None)
    dist.barrier()
    processor = measure_processor()
    rates = {field: getattr(processor, field) for field in ("memory_rate", "flops_rate", "bucket_seconds")}
    records.append({"kind": "processor", "layout": layout, "megabits": None, **rates})
    if dist.get_rank() == 0:
        Path(path).write_text(json.dumps(records), encoding="utf-8")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    _rank()
