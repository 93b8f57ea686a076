"""What a trace tells of streams: whether backward kernels are enqueued while the hook works, and who waits for what."""

import collections
import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks import powerSGD_hook as torch_hook
from torch.nn.parallel import DistributedDataParallel
from torch.profiler import ProfilerActivity, profile

import distopt
from tests.processes import run_ranks

Event = Mapping[str, Any]


class Seen(NamedTuple):
    """What a trace of one step shows.

    Args:
        backward: kernels on the stream that has most of them.
        ours: kernels on the stream that has most of the rest: the hook's.
        meanwhile: kernels of the former that were enqueued between the first and the last of the latter.
        at_once: pairs of kernels, one of each, that ran at the same time.
        waits_of_backward: calls that let a thread which enqueues on the former wait for the device, up to the last
            kernel that was enqueued meanwhile.
        waits: such calls of all other threads.
    """

    backward: int
    ours: int
    meanwhile: int
    at_once: int
    waits_of_backward: int
    waits: int


RANK = 4
OURS, TORCH = "distopt", "torch"
CASES = ((OURS, 1, "nccl"), (OURS, 2, "gloo"), (TORCH, 1, "nccl"))
"""Who compresses, over how many ranks on this one GPU, over what; torch's hook does not survive gloo."""


def streams(out: Path) -> Iterator[dict[str, Any]]:
    """What traces of a step show, by who compresses; that of ours over NCCL is kept.

    Args:
        out: a folder for it, ``gpu-trace.json.gz``.
    """
    for who, ranks, backend in CASES:
        kept = str(out / "gpu-trace.json.gz") if (who, backend) == (OURS, "nccl") else None
        record: dict[str, Any] = {"part": "streams", "who": who, "ranks": ranks, "backend": backend}
        try:
            seen = run_ranks(ranks, traced, who, backend, kept, timeout=100)[0]
            yield {**record, **seen._asdict()}
        except (AssertionError, RuntimeError) as error:
            yield {**record, "error": f"{type(error).__name__}: {str(error).strip().splitlines()[-1]}"}


def traced(rank: int, who: str, backend: str, kept: str | None = None) -> Seen:
    """What a trace of one backward pass shows; called on every rank of a gloo world.

    Args:
        rank: of this process.
        who: compresses.
        backend: of DDP's process group.
        kept: a file for the trace.
    """
    torch.manual_seed(0)
    group = dist.new_group(backend=backend)
    layers = nn.Sequential(*[nn.Linear(2048, 2048) for _ in range(16)]).cuda()
    model = DistributedDataParallel(layers, bucket_cap_mb=20, process_group=group)
    if who == OURS:
        quiet = {"agreement": False, "check_replicas_every": 0, "measure_every": 0}
        distopt.register(model, distopt.PowerSGD(RANK), **quiet)
    else:
        state = torch_hook.PowerSGDState(group, matrix_approximation_rank=RANK, start_powerSGD_iter=2)
        model.register_comm_hook(state, torch_hook.powerSGD_hook)
    inputs = torch.randn(4096, 2048, device="cuda")

    def loss() -> Tensor:
        found = model(inputs).square().mean()
        torch.cuda.synchronize()
        return found

    for _ in range(4):
        loss().backward()
        model.zero_grad()
    last = loss()
    everything = torch._C._profiler._ExperimentalConfig(profile_all_threads=True)
    activities = [ProfilerActivity.CPU, ProfilerActivity.CUDA]
    with profile(activities=activities, experimental_config=everything) as profiler:
        last.backward()
    if kept is not None and rank == 0:
        Path(kept).parent.mkdir(parents=True, exist_ok=True)
        profiler.export_chrome_trace(kept)
    return look(events_of(profiler))


def events_of(profiler: profile) -> list[Event]:
    """The events of a trace, as Chrome's format has them."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        return json.loads(path.read_text(encoding="utf-8"))["traceEvents"]


def look(events: Sequence[Event]) -> Seen:
    """Sort out a trace of a step.

    Args:
        events: of Chrome's format, times in microseconds; runtime calls and kernels share a correlation number.
    """
    calls = [e for e in events if e.get("ph") == "X" and e.get("cat") in ("cuda_runtime", "cuda_driver")]
    calling = {e["args"]["correlation"]: e for e in calls if "correlation" in e.get("args", {})}
    kernels = [e for e in events if e.get("ph") == "X" and e.get("cat") == "kernel"]
    launched = [(e, calling[number]) for e in kernels if (number := e["args"].get("correlation")) in calling]
    counts = collections.Counter(kernel["args"]["stream"] for kernel, _ in launched)
    if len(counts) < 2:
        return Seen(len(launched), 0, 0, 0, 0, sum(map(_waits, calls)))
    (main, _), (side, _) = counts.most_common(2)
    first, second = ([pair for pair in launched if pair[0]["args"]["stream"] == stream] for stream in (main, side))
    begin, end = min(call["ts"] for _, call in second), max(call["ts"] for _, call in second)
    meanwhile = [call for _, call in first if begin < call["ts"] < end]
    threads = {call["tid"] for call in meanwhile}
    last = max((call["ts"] for call in meanwhile), default=0)
    held = [call for call in calls if _waits(call) and call["tid"] in threads and call["ts"] < last]
    others = [call for call in calls if _waits(call) and call["tid"] not in threads]
    at_once = sum(_together(a, b) for a, _ in first for b, _ in second)
    return Seen(len(first), len(second), len(meanwhile), at_once, len(held), len(others))


def _waits(call: Event) -> bool:
    return "Synchronize" in call["name"]


def _together(a: Event, b: Event) -> bool:
    return a["ts"] < b["ts"] + b["dur"] and b["ts"] < a["ts"] + a["dur"]
