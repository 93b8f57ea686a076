"""Predicts the steps that `bench.lab` measured, and compares."""

import re
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from bench.lab.targets import link_name
from bench.planning.probing import RANKS_A_HOST
from bench.stamp import markdown
from distopt.planning.candidates import low_rank, plain
from distopt.planning.costs import Estimator
from distopt.planning.machine import Network, Processor
from distopt.planning.plan import BUCKET_BYTES
from distopt.planning.timeline import Work, step_seconds
from distopt.planning.workload import buckets_of, bytes_of, gradients_of, units_of
from distopt.reducers.powersgd import PowerSGD
from distopt.reducers.reducer import Slot

WITHIN = 0.15
NOOP, NODE = "no-op hook", "no averaging between nodes"
"""What `bench.lab` calls a step without communication, of whole models and of sharded ones."""
PLAIN, NATIVE, EXACT = "DDP", "native HSDP", "distopt AllReduce"
_RANKED = re.compile(r"distopt PowerSGD rank (\d+), (both|alternate)")
_HOOKED = re.compile(r"DDP, torch's (fp16|bf16) hook")
HOSTS = 2

Record = Mapping[str, Any]


def validated(lab: Sequence[Record], probes: Sequence[Record]) -> list[dict[str, Any]]:
    """Predict every step of the lab that a plan speaks of.

    Args:
        lab: records of `bench.lab`: workload, layout, way, megabits (None: no limit), seconds of each round.
        probes: records of `probed`, of the same layouts and limits; what has none is left out.
    """
    found: list[dict[str, Any]] = []
    for record in lab:
        computing = _computing(lab, record)
        if record.get("alone") or computing is None:
            continue
        predicted = _predicted(record, probes, computing)
        if predicted is None:
            continue
        measured = statistics.median(record["seconds"])
        low, high = min(record["seconds"]), max(record["seconds"])
        facts = {field: record[field] for field in ("workload", "layout", "way", "megabits")}
        error = predicted / measured - 1
        passes = abs(error) <= WITHIN or low <= predicted <= high
        found.append(
            {"kind": "validated", **facts, "predicted": predicted, "measured": measured, "range": [low, high]}
            | {"computing": computing, "error": error, "passes": passes}
        )
    return found


def validation_table(records: Sequence[Record]) -> str:
    """Predicted beside measured, a column a network, and how many pass."""
    limits = sorted({r["megabits"] for r in records}, key=lambda megabits: megabits or 10**9, reverse=True)
    found = {(r["workload"], r["layout"], r["way"], r["megabits"]): r for r in records}
    rows = [
        [*key, *(_compared(found.get((*key, megabits))) for megabits in limits)]
        for key in dict.fromkeys(key[:3] for key in found)
    ]
    passed = sum(r["passes"] for r in records)
    head = ["model", "layout", "way", *(f"{link_name(megabits)}: predicted of measured, ms" for megabits in limits)]
    return markdown(head, rows) + f"\n\n{passed} of {len(records)} pass."


def _compared(record: Record | None) -> str:
    if record is None:
        return ""
    verdict = "" if record["passes"] else ", **fails**"
    return f"{1e3 * record['predicted']:.0f} of {1e3 * record['measured']:.0f} ({record['error']:+.0%}{verdict})"


def _computing(lab: Sequence[Record], record: Record) -> float | None:
    """Of forward and backward: the same step without communication between nodes."""
    for other in lab:
        same = all(other.get(field) == record.get(field) for field in ("workload", "layout", "megabits", "alone"))
        if same and other["way"] in (NOOP, NODE):
            return statistics.median(other["seconds"])
    return None


def _predicted(record: Record, probes: Sequence[Record], computing: float) -> float | None:
    """Seconds of a step; ``None`` for a way that a plan does not know, or a place that was not probed."""
    way, place = record["way"], {"layout": record["layout"], "megabits": record["megabits"]}
    link, processor = _probe(probes, kind="link", **place), _probe(probes, kind="processor")
    hooked, ranked = _HOOKED.fullmatch(way), _RANKED.fullmatch(way)
    if hooked is not None:
        hook = _probe(probes, kind="hook", hook=hooked[1], **place)
        return None if hook is None else _hooked_step(_buckets(record), hook, computing)
    if link is None or processor is None or not (ranked or way in (PLAIN, NATIVE, EXACT)):
        return None
    shards = RANKS_A_HOST[record["layout"]]
    # Ranks that have to share a core are as much slower.
    crowd = max(1.0, HOSTS * shards / processor["cores"])
    network = Network(
        *(link["bandwidth"], link["latency"], HOSTS * shards, shards, shards > 1, "ring"),
        cpu_seconds_per_byte=crowd * link["cpu_seconds_per_byte"],
    )
    rates = Processor(
        *(processor[field] / crowd for field in ("memory_rate", "flops_rate")),
        *(processor[field] * crowd for field in ("bucket_seconds", "matrix_seconds")),
    )
    # On gloo, FSDP waits for each all-reduce before backward goes on.
    hiding = 0.0 if way == NATIVE else computing
    buckets = _buckets(record)
    estimator = Estimator(buckets, network, rates, hiding)
    slots = [slot for bucket in buckets for slot in bucket]
    scheme = plain(slots)
    if ranked:
        passes = "alternate" if ranked[2] == "alternate" else "both"
        scheme = low_rank(slots, [int(ranked[1])], passes, estimator, like=PowerSGD(), always=True) or scheme
    return estimator.estimate(scheme).step_seconds + computing - hiding


def _hooked_step(buckets: Sequence[Sequence[Slot]], hook: Record, computing: float) -> float:
    """A step under one of torch's hooks, which has been timed whole."""
    sizes = [sum(map(bytes_of, bucket)) for bucket in buckets]
    busy, wall = hook["cpu_seconds_per_byte"], hook["seconds_per_byte"]
    return step_seconds(computing, [Work(size, [(size * busy, size * (wall - busy))]) for size in sizes])


def _buckets(record: Record) -> list[list[Slot]]:
    from bench.lab.workloads import WORKLOADS

    workload = WORKLOADS[record["workload"]]
    with torch.device("meta"):
        model: nn.Module = workload.build()
    shards = RANKS_A_HOST[record["layout"]]
    slots = gradients_of(model, shards=shards)
    return units_of(model, slots, workload.units) if shards > 1 else buckets_of(slots, BUCKET_BYTES)


def _probe(probes: Sequence[Record], **wanted: object) -> Record | None:
    return next((p for p in probes if all(p.get(field) == value for field, value in wanted.items())), None)
