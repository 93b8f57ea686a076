"""Times links and processors in the lab: the rates that predictions are made from.

    python -m bench.planning --probe

Run as a module of its own by each rank of the lab's hosts.
"""

import dataclasses
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from distopt.planning.measuring import measure_link, measure_processor
from distopt.planning.overheads import measure_overheads

RANKS_A_HOST = {"replicated": 1, "sharded": 2}
HOOKS = {"fp16": torch.float16, "bf16": torch.bfloat16}
"""What torch's hooks of these names send."""
_HOOKED = 2**21
"""Numbers of a bucket that the hooks are timed on."""
_REPETITIONS = 3


def probed(limits: Sequence[int]) -> list[dict[str, Any]]:
    """Time links and processors in the lab, with as many ranks a host as its layouts have. Linux, as root.

    Args:
        limits: megabits a second, 0 for none.

    Returns:
        Of kind ``"link"``, one a layout and limit; of kind ``"hook"``, one a limit and each of `HOOKS`; and one of kind
        ``"processor"``, without other ranks than the two that share the machine in the lab.
    """
    from bench.lab.hosts import run_on_hosts

    found: list[dict[str, Any]] = []
    for layout, ranks in RANKS_A_HOST.items():
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "records"
            run_on_hosts(["bench.planning.probing", layout, str(path), *map(str, limits)], ranks=ranks)
            found += json.loads(path.read_text(encoding="utf-8"))
    return found


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
        rates = {"bandwidth": link.bandwidth * ranks, "latency": link.latency}
        place = {"layout": layout, "megabits": limit or None}
        records.append({"kind": "link", **place, **rates, "cpu_seconds_per_byte": link.cpu_seconds_per_byte})
        if ranks == 1:
            records += [{"kind": "hook", **place, "hook": name, **_hook(dtype)} for name, dtype in HOOKS.items()]
    network.limit(None)
    dist.barrier()
    if ranks == 1:
        rates = dataclasses.replace(measure_processor("cpu"), **measure_overheads(pairs[0])._asdict())
        fields = ("memory_rate", "flops_rate", "bucket_seconds", "matrix_seconds")
        processor = {field: getattr(rates, field) for field in fields}
        records.append({"kind": "processor", "cores": os.cpu_count(), **processor})
    if dist.get_rank() == 0:
        Path(path).write_text(json.dumps(records), encoding="utf-8")
    dist.barrier()
    dist.destroy_process_group()


def _hook(dtype: torch.dtype) -> Mapping[str, float]:
    """What torch's hook does with a bucket, for each of its bytes in float32: on the wall, and of the processor."""
    bucket = torch.zeros(_HOOKED)

    def averaged() -> Tensor:
        narrow = bucket.to(dtype).div_(dist.get_world_size())
        dist.all_reduce(narrow)
        return bucket.copy_(narrow)

    times = [_timed(averaged) for _ in range(1 + _REPETITIONS)][1:]
    wall, computing = (statistics.median(column) / (4 * _HOOKED) for column in zip(*times, strict=True))
    return {"seconds_per_byte": wall, "cpu_seconds_per_byte": min(wall, computing)}


def _timed(act: Callable[[], object]) -> tuple[float, float]:
    began, before = time.perf_counter(), time.process_time()
    act()
    return time.perf_counter() - began, time.process_time() - before


if __name__ == "__main__":
    _rank()
