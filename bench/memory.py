"""What error feedback costs in memory: exact bytes per parameter, beside plain DDP and torch's own hook.

    python -m bench.memory
    python -m bench.memory --widths 1024 --layers 96

24 linear layers of 256 x 256 (6.3 MB) and of 1024 x 1024 (100.7 MB), about 8 buckets, 2 micro-batches a step, plain
SGD, one rank, whose collectives need no buffers. Counted are all bytes that torch's CPU allocator hands out, from the
profiler's memory events, beyond the parameters themselves:

- live: after the optimizer's step, with the gradients still there;
- peak: the most at any moment of that step, activations included.

The profiler sees one thread, and would miss what gloo's threads give back. So nothing is left to other threads: the
collectives of the one rank complete at once, as NCCL's seem to, and distopt's worker does its jobs where they are
submitted.
"""

import argparse
import contextlib
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.debugging_hooks import noop_hook
from torch.futures import Future
from torch.nn.parallel import DistributedDataParallel as DDP
from torch.profiler import ProfilerActivity, profile

import distopt
from bench.competitors import Competitor, Distopt, Torch
from bench.stamp import markdown, write_lines
from distopt.comm.worker import Worker
from tests.processes import run_ranks

BATCH = 4
BUCKETS = 8
"""About so many, where there is not one for all."""
STEPS = 8
MARK = 12_347
"""Bytes of a tensor that is made only to find a moment among the profiler's events; nothing else is of that size."""

DEFAULT, VIEW = "DDP", "DDP, bucket view"
_VIEW = {"gradient_as_bucket_view": True}


@dataclasses.dataclass(frozen=True)
class Variant:
    """A set-up to measure.

    Args:
        label: its name.
        who: the competitor, or None for plain DDP.
        options: of DDP.
        one_bucket: whether all gradients lie in one.
        settings: of ``distopt.register`` on a plain list of parameters, in the place of DDP.
    """

    label: str
    who: Competitor | None
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict[str, Any])
    one_bucket: bool = False
    settings: Mapping[str, Any] | None = None


VARIANTS = [
    Variant(DEFAULT, None),
    Variant(VIEW, None, _VIEW),
    Variant("torch's hook", Torch()),
    Variant("torch's hook, bucket view", Torch(), _VIEW),
    Variant("torch's hook, bucket view, one bucket", Torch(), _VIEW, one_bucket=True),
    Variant("distopt", Distopt()),
    Variant("distopt, bucket view", Distopt(), _VIEW),
    Variant("distopt, bucket view, one bucket", Distopt(), _VIEW, one_bucket=True),
    Variant("distopt, 1-6-9 residual", Distopt(options={"residual_dtype": "1-6-9"})),
    Variant("distopt, bucket view, 1-6-9 residual", Distopt(options={"residual_dtype": "1-6-9"}), _VIEW),
    Variant("distopt, plain list", None, settings={}),
    Variant("distopt, plain list, accumulate=True", None, settings={"accumulate": True}),
]
"""One line each; further settings of a reducer go into ``Distopt("its label", {"setting": value})``."""


def main() -> None:
    """Read the command line, measure every variant in a process of its own, and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rank", type=int, default=4, help="rank of PowerSGD")
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--widths", type=int, nargs="+", default=[256, 1024])
    parser.add_argument("--out", type=Path, default=Path("runs/bench"))
    chosen = parser.parse_args()
    records: list[dict[str, Any]] = []
    for width in chosen.widths:
        for variant in VARIANTS:
            figures = run_ranks(1, measure, variant, chosen.rank, chosen.layers, width)[0]
            size = {"layers": chosen.layers, "width": width}
            records.append({"variant": variant.label, "rank": chosen.rank, **size, **figures})
            print(records[-1], flush=True)
    write_lines(chosen.out / "memory.jsonl", "memory", records)
    table = tables(records)["memory"]
    (chosen.out / "memory.md").write_text(table + "\n", encoding="utf-8")
    print("\n" + table)


def tables(records: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """One row a set-up and size; what it takes beyond plain DDP in bytes a byte of parameters, all in float32."""
    peaks = {(r["layers"], r["width"], r["variant"]): r["peak"] for r in records}
    rows: list[list[str]] = []
    for r in records:
        size = (r["layers"], r["width"])
        beyond = [(r["peak"] - peaks[*size, label]) / 4 for label in (DEFAULT, VIEW)]
        parts = [f"{r['live']:.2f}", f"{r['peak']:.2f}", *(f"{extra:+.2f}" for extra in beyond)]
        rows.append(["{} x {}²".format(*size), r["variant"], str(r["buckets"]), *parts])
    head = ["matrices", "set-up", "buckets", "live between steps", "peak in a step"]
    return {"memory": markdown([*head, f"peak beyond {DEFAULT}", f"beyond {VIEW}"], rows)}


def measure(rank: int, variant: Variant, columns: int, layers: int, width: int = 256) -> dict[str, float]:
    """Bytes per parameter of one set-up."""
    with on_one_thread(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        buckets = train(variant, columns, [width] * layers)
    totals, marks = [], []
    for size, total in sorted_events(profiler):
        if size == MARK:
            marks.append(len(totals))
        totals.append(total)
    before, begun, ended = (totals[marks[0]], *marks[-2:])
    parameters = layers * width**2
    peak = max(totals[begun + 1 : ended])
    return {"buckets": buckets, "live": (totals[ended] - before) / parameters, "peak": (peak - before) / parameters}


def sorted_events(profiler: profile) -> list[tuple[int, int]]:
    """Bytes taken (or given back, if negative) and bytes held afterwards, in the order of time."""
    results = profiler.profiler.kineto_results  # pyright: ignore[reportOptionalMemberAccess]
    events, rest = [], list(results.experimental_event_tree())
    while rest:
        event = rest.pop()
        rest += event.children
        if event.tag == torch._C._profiler._EventType.Allocation:
            events.append((event.start_time_ns, event.extra_fields.alloc_size, event.extra_fields.total_allocated))
    return [(size, total) for _, size, total in sorted(events, key=lambda event: event[0])]


def train(variant: Variant, columns: int, widths: Sequence[int]) -> int:
    """Some steps, with a mark after the model is built and after each step; the number of buckets."""
    model = nn.Sequential(*[nn.Linear(width, width, bias=False) for width in widths])
    mark()
    if variant.settings is not None:
        return train_list(model, variant.settings, columns)
    # Without init_sync: one of gloo's threads may be the last to hold what it broadcasts.
    megabytes = sum(4 * width**2 for width in widths) / 2**20
    ddp = DDP(
        model,
        bucket_cap_mb=2 * megabytes if variant.one_bucket else 0.9 * megabytes / BUCKETS,
        init_sync=False,
        **variant.options,
    )
    if variant.who is None:
        ddp.register_comm_hook(None, noop_hook)  # plain DDP: what it averages over one rank, it leaves as it is
    attached = variant.who and variant.who.attach(ddp, rank=columns)
    optimizer = torch.optim.SGD(ddp.parameters(), lr=1e-3)
    batch = torch.randn(BATCH, model[0].in_features)
    for _ in range(STEPS):
        with ddp.no_sync():
            ddp(batch).square().mean().backward()
        ddp(batch).square().mean().backward()
        optimizer.step()
        mark()
        optimizer.zero_grad(set_to_none=False)
    del attached
    return len(ddp._get_ddp_logging_data()["rebuilt_bucket_sizes"].split(","))


def train_list(model: nn.Module, settings: Mapping[str, Any], columns: int) -> int:
    """The same steps without DDP, the gradients freed after each: a plain list has no buckets to keep."""
    registration = distopt.register(model.named_parameters(), distopt.PowerSGD(columns), **settings)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    batch = torch.randn(BATCH, model[0].in_features)
    for _ in range(STEPS):
        for _ in range(2):
            model(batch).square().mean().backward()
        registration.reduce()
        optimizer.step()
        mark()
        optimizer.zero_grad(set_to_none=True)
    return len(registration.state_dict()["layout"])


def mark() -> None:
    """Leave a trace among the profiler's events."""
    torch.empty(MARK, dtype=torch.uint8)


class Done:
    """An all-reduce over one rank, which is over when it begins and leaves the tensor as it is."""

    def __init__(self, tensor: Tensor, **_: Any) -> None:
        self._future: Future[list[Tensor]] = Future()
        self._future.set_result([tensor])

    def get_future(self) -> Future[list[Tensor]]:
        """The tensor as it is."""
        return self._future

    def wait(self) -> None:
        """There is nothing to wait for."""


@contextlib.contextmanager
def on_one_thread() -> Iterator[None]:
    """Let distopt's worker and the callbacks of torch's hook run at once, where they are asked for."""
    submit, all_reduce = Worker.submit, dist.all_reduce
    Worker.submit = lambda self, job: job()
    dist.all_reduce = Done
    try:
        yield
    finally:
        Worker.submit, dist.all_reduce = submit, all_reduce


if __name__ == "__main__":
    main()
