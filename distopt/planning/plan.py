"""`plan`: would compressing the gradients help here, and how?

Source: the performance model of Agarwal et al. 2021, "On the Utility of Gradient Compression in Distributed Training
Systems" (arXiv:2103.00543), who found compression to help in 6 of more than 200 set-ups: against DDP that overlaps its
all-reduces with backward, and with the time of compressing counted.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch.distributed as dist
from torch import nn

from distopt.attach.selection import Blocks
from distopt.errors import SettingError
from distopt.planning import candidates, quantities
from distopt.planning.costs import Estimate, Estimator, Scheme
from distopt.planning.foreseen import HALF, WHOLE
from distopt.planning.machine import Algorithm, Network, Processor
from distopt.planning.measuring import measure_link, measure_processor
from distopt.planning.outcome import Choice, Plan
from distopt.planning.workload import Gradients, buckets_of, bytes_of, gradients_of, units_of
from distopt.reducers.powersgd import PowerSGD
from distopt.reducers.reducer import Slot
from distopt.reducers.settings import is_integer, is_number

RANKS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
BUCKET_BYTES = 25 * 2**20
"""DDP's default."""
LATENCY_SECONDS = 20e-6
"""Of a message, where nothing is known of it."""
BUCKET_SECONDS = 200e-6
FLOPS_A_BYTE = 10.0
"""Operations that a processor does in the time of a byte of memory, where nothing is known of it: a cautious guess."""


def plan(
    model: Gradients,
    *,
    world_size: int,
    bandwidth: float | str | None,
    latency: float | str | None = None,
    memory_rate: float | str | None = None,
    flops_rate: float | str | None = None,
    bucket_seconds: float | str = BUCKET_SECONDS,
    matrix_seconds: float | str = 0.0,
    cpu_seconds_per_byte: float = 0.0,
    compute_seconds: float | str | None = None,
    ranks: int | Sequence[int] = RANKS,
    passes: Literal["both", "alternate"] | None = "both",
    like: PowerSGD | None = None,
    ranks_a_node: int = 1,
    sharded: bool = False,
    shard_placement_fn: Callable[[nn.Parameter], Any] | None = None,
    units: Blocks | None = None,
    bucket_bytes: int = BUCKET_BYTES,
    algorithm: Algorithm = "tree",
    margin: float = 0.05,
    process_group: dist.ProcessGroup | None = None,
) -> Plan:
    """Predict a step under plain DDP, 16 bits and PowerSGD at several ranks, and choose for every gradient.

    Of all that is within ``margin`` of the fastest, the plan takes what sends most; that is plain DDP, if it is among
    them. Nothing is allocated. Quality is not predicted: give the ranks that your model can do with. docs/planning.md
    has the formulas.

    Args:
        model: a module, on the meta device too; or the name, shape and dtype of each gradient.
        world_size: ranks.
        bandwidth: of a node's link, in bytes a second, or text: ``"10Gbit"``, ``"1.25GB"``. ``None`` measures it, and
            the latency with it, on ``process_group``, whose ranks all call this.
        latency: of a message, in seconds, or text: ``"20us"``, which is the default.
        memory_rate: bytes that a rank's processor reads and writes in a second, both counted. ``None`` times the
            compression on this machine, which takes a second.
        flops_rate: operations a second in thin matrix products; 10 for each byte of ``memory_rate`` if ``None``.
        bucket_seconds: what compressing a bucket takes besides.
        matrix_seconds: what a matrix takes besides. Both are of no matter where ``memory_rate`` is measured.
        cpu_seconds_per_byte: of a rank for what it sends, as over TCP; measured where ``bandwidth`` is.
        compute_seconds: of forward and backward of one rank alone. ``None`` counts as 0: communication is compared
            alone, as if none of it were hidden behind backward.
        ranks: that a matrix may be given, or the one rank to compare.
        passes: as for `PowerSGD`; ``None`` compares both ways, of which alternate passes train worse at the same bytes.
        like: has all other settings of `PowerSGD`; its ``rank`` and ``passes`` are of no matter.
        ranks_a_node: consecutive ranks that share a node's link.
        sharded: whether they hold one model together, as `shard` makes them.
        shard_placement_fn: as for `shard`.
        units: as for `shard`, of a module: each is reduced as one; ``None`` takes DDP's buckets.
        bucket_bytes: of DDP's buckets.
        algorithm: of all-reduces: ``"tree"`` as NCCL has on many nodes, ``"ring"`` as gloo has.
        margin: fraction of a step that is not worth a worse gradient.
        process_group: to measure on.

    Raises:
        SettingError: if a setting is out of its range.

    Example:
        >>> import torch
        >>> big = [(f"layers.{i}.weight", (4096, 4096), torch.float32) for i in range(8)]
        >>> settings = {"world_size": 64, "memory_rate": "2TB", "compute_seconds": 0.05}
        >>> plan(big, bandwidth="10Gbit", **settings).helps, plan(big, bandwidth="400GB", **settings).helps
        (True, False)
    """
    _check(ranks, passes, like, bucket_bytes, margin)
    if bandwidth is None:
        bandwidth, measured, cpu_seconds_per_byte = measure_link(process_group, algorithm)
        latency = measured if latency is None else latency
    rate = quantities.bytes_per_second("bandwidth", bandwidth)
    message = LATENCY_SECONDS if latency is None else quantities.seconds("latency", latency)
    sending = quantities.seconds("cpu_seconds_per_byte", cpu_seconds_per_byte)
    network = Network(rate, message, world_size, ranks_a_node, sharded, algorithm, sending)
    compute = 0.0 if compute_seconds is None else quantities.seconds("compute_seconds", compute_seconds)
    processor = _processor(memory_rate, flops_rate, bucket_seconds, matrix_seconds)
    slots = gradients_of(model, shards=ranks_a_node if sharded else 1, shard_placement_fn=shard_placement_fn)
    estimator = Estimator(_buckets(model, slots, units, bucket_bytes), network, processor, compute)
    schemes = _schemes(slots, _ascending(ranks), passes, estimator, network, like or PowerSGD())
    return _decided(slots, [estimator.estimate(scheme) for scheme in schemes], network, processor, compute, margin)


def _decided(
    slots: Sequence[Slot],
    estimates: Sequence[Estimate],
    network: Network,
    processor: Processor,
    compute: float,
    margin: float,
) -> Plan:
    plain, chosen = estimates[0], _best(estimates, margin)
    choices = [_choice(slot, plain, chosen) for slot in slots]
    reason = _reason(plain, chosen, estimates, network, compute, margin)
    by_label = {estimate.scheme.label: estimate for estimate in estimates}
    return Plan(network, processor, compute, plain, chosen, by_label, choices, reason)


def _buckets(model: Gradients, slots: Sequence[Slot], units: Blocks | None, bucket_bytes: int) -> list[list[Slot]]:
    if units is None:
        return buckets_of(slots, bucket_bytes)
    if not isinstance(model, nn.Module):
        raise SettingError("units", units, "None where the model is a list of gradients")
    return units_of(model, slots, units)


def _ascending(ranks: int | Sequence[int]) -> tuple[int, ...]:
    return (ranks,) if isinstance(ranks, int) else tuple(sorted(set(ranks)))


def _check(
    ranks: int | Sequence[int], passes: object, like: PowerSGD | None, bucket_bytes: object, margin: object
) -> None:
    asked = [ranks] if isinstance(ranks, int) else list(ranks)
    if not asked or not all(is_integer(rank) and rank >= 1 for rank in asked):
        raise SettingError("ranks", ranks, "an integer of at least 1, or several")
    if passes not in (None, "both", "alternate"):
        raise SettingError("passes", passes, "None, 'both' or 'alternate'")
    if like is not None and (not isinstance(like, PowerSGD) or like.stacked):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise SettingError("like", like, "a PowerSGD without stacked parameters")
    if not is_integer(bucket_bytes) or not bucket_bytes >= 1:  # pyright: ignore[reportOperatorIssue]
        raise SettingError("bucket_bytes", bucket_bytes, "an integer of at least 1")
    if not is_number(margin) or not 0 <= margin < 1:  # pyright: ignore[reportOperatorIssue]
        raise SettingError("margin", margin, "a number in [0, 1)")


def _processor(
    memory_rate: float | str | None,
    flops_rate: float | str | None,
    bucket_seconds: float | str,
    matrix_seconds: float | str,
) -> Processor:
    bucket, matrix = (
        quantities.seconds(field, value)
        for field, value in (("bucket_seconds", bucket_seconds), ("matrix_seconds", matrix_seconds))
    )
    if memory_rate is None:
        measured = measure_processor()
        if flops_rate is None:
            return measured
        return dataclasses.replace(measured, flops_rate=quantities.flops("flops_rate", flops_rate))
    rate = quantities.bytes_per_second("memory_rate", memory_rate)
    thin = FLOPS_A_BYTE * rate if flops_rate is None else quantities.flops("flops_rate", flops_rate)
    return Processor(rate, thin, bucket, matrix)


def _schemes(
    slots: Sequence[Slot],
    ranks: Sequence[int],
    passes: Literal["both", "alternate"] | None,
    estimator: Estimator,
    network: Network,
    like: PowerSGD,
) -> list[Scheme]:
    """Plain DDP first; nothing else where there is nobody to send to."""
    found = [candidates.plain(slots)]
    if network.peers == 1 or not slots:
        return found
    found.append(candidates.half(slots))
    ways: tuple[Literal["both", "alternate"], ...] = ("both", "alternate") if passes is None else (passes,)
    for way in ways if like.basis == "warm" else ("both",):
        for rest in (WHOLE, HALF):
            for most in range(1, len(ranks) + 1):
                scheme = candidates.low_rank(slots, ranks[:most], way, estimator, like=like, rest=rest)
                # A rank that no matrix takes is the one before it again; with nothing else there is nothing in 16 bits.
                new = scheme is not None and scheme.ways != found[-1].ways
                if scheme is not None and new and (rest == WHOLE or HALF in scheme.ways.values()):
                    found.append(scheme)
    return found


def _best(estimates: Sequence[Estimate], margin: float) -> Estimate:
    """Of all that are near the fastest, what sends most; plain DDP before all others."""
    least = min(estimate.step_seconds for estimate in estimates)
    near = [e for e in estimates if e.step_seconds * (1 - margin) <= least]
    return max(near, key=lambda e: (e.scheme.reducer is None, e.nbytes, -e.step_seconds))


def _choice(slot: Slot, plain: Estimate, chosen: Estimate) -> Choice:
    before, after = plain.shares[slot.name], chosen.shares[slot.name]
    shape, dtype = tuple(slot.parameter.shape), slot.parameter.dtype
    way = chosen.scheme.ways[slot.name]
    return Choice(slot.name, shape, dtype, way, bytes_of(slot), after.nbytes, before.seconds, after.seconds)


def _reason(
    plain: Estimate, chosen: Estimate, estimates: Sequence[Estimate], network: Network, compute: float, margin: float
) -> str:
    words = quantities.in_words
    before, after = plain.step_seconds, chosen.step_seconds
    if network.peers == 1:
        return "this would not help here: there is nobody to send gradients to"
    if chosen is not plain:
        return (
            f"{chosen.scheme.label} takes {words(after)} a step instead of {words(before)}, "
            f"{1 - after / before:.0%} less"
        )
    others = [e for e in estimates if e is not plain]
    exposed = before - compute
    if not others or before == 0 or exposed <= margin * before:
        return (
            f"this would not help here: of a step of {words(before)}, plain DDP spends {words(exposed)} "
            "waiting for gradients"
        )
    best = min(others, key=lambda e: e.step_seconds)
    change = best.step_seconds / before - 1
    how = f"{change:.0%} more" if change > 0 else f"{-change:.1%} less, which is within the margin of {margin:.0%}"
    return (
        f"this would not help here: {best.scheme.label}, the fastest of the others, takes {words(best.step_seconds)} "
        f"a step instead of {words(before)}, {how}"
    )
