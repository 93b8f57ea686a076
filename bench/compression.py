"""What compressing gradients costs a processor, beside torch's hook and the package of PowerSGD's author.

    python -m bench.compression
    python -m bench.compression --models gpt2 --ranks 4 --rounds 20

One process, one thread, a group of one rank whose collectives cost nothing: what is left is the work. All gradients of
a model lie in one bucket, and every way of compressing them takes one step in turn, for many rounds. Given are medians
with quartiles of the processor time, of its ratio to torch's hook in the same round, and how fast the gradient's memory
is gone through: five times its bytes (the least that PowerSGD with error feedback can read and write; four times where
one factor travels a step), as a fraction of what copying an array takes on the same machine in the same run.

- ``both`` and ``alternate``: `distopt.PowerSGD`, driven as a trainer's step drives it, its checks included;
- ``torch`` and ``torch batched``: ``powerSGD_hook``, its futures complete at once; the latter with
  ``batch_tensors_with_same_shape``;
- ``epfml``: the package ``powersgd``, where it is installed (``pip install powersgd``); float32 only.

All are given the same matrices, embeddings included, and leave vectors whole. Matrices are as wide as each sees fit:
a convolution's is the one nearest to square for us, and one row an output channel for the others.
"""

import argparse
import importlib.util
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from distopt.integrations.dalle.transformer import Transformer, TransformerSettings
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks import powerSGD_hook as torch_hook

from bench.dalle_speed import SIZES
from bench.memory import Done
from bench.stamp import markdown, write_lines
from distopt.attach.transaction import Transaction
from distopt.reducers.powersgd import PowerSGD
from distopt.reducers.reducer import Bucket, Place, Slot, State

BASELINE = "torch"
SKIPPED = 3
"""Rounds that are not counted: the first make what is kept from step to step."""
PASSES = {"alternate": 4}
"""Times that the gradient's bytes must be read or written at least; 5 where nothing else is said."""

Shapes = Sequence[tuple[int, ...]]


def main() -> None:
    """Read the command line, measure, and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--ranks", nargs="+", type=int, default=[1, 4, 32])
    parser.add_argument("--dtypes", nargs="+", choices=["float32", "bfloat16"], default=["float32", "bfloat16"])
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--out", type=Path, default=Path("runs/bench"))
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    copied = copy_rate()
    records: list[dict[str, Any]] = []
    for model in chosen.models:
        for dtype in chosen.dtypes:
            for rank in chosen.ranks:
                new = measured(model, getattr(torch, dtype), rank, chosen.ways, chosen.rounds, copied)
                records += new
                print(tables(new)["compression"], flush=True)
    write_lines(chosen.out / "compression.jsonl", "compression", records)
    text = tables(records)["compression"]
    (chosen.out / "compression.md").write_text(text + "\n", encoding="utf-8")
    print("\n" + text)


def measured(
    model: str, dtype: torch.dtype, rank: int, ways: Sequence[str], rounds: int, copied: float
) -> list[dict[str, Any]]:
    """Time a step of every way of compressing one model's gradients, in turn."""
    shapes = MODELS[model]()
    generator = torch.Generator().manual_seed(0)
    fed = torch.randn(sum(map(math.prod, shapes)), generator=generator).to(dtype)
    bucket = torch.empty_like(fed)
    steps = {
        way: WAYS[way](shapes, bucket, rank)
        for way in ways
        if way != "epfml" or (importlib.util.find_spec("powersgd") is not None and dtype == torch.float32)
    }
    seconds: dict[str, list[float]] = {way: [] for way in steps}
    with mock.patch.object(dist, "all_reduce", Done), torch.no_grad():
        for turn in range(rounds + SKIPPED):
            for way, step in steps.items():
                bucket.copy_(fed)
                began = time.process_time()
                step()
                if turn >= SKIPPED:
                    seconds[way].append(time.process_time() - began)
    nbytes = fed.numel() * fed.element_size()
    settings = {"model": model, "dtype": str(dtype).removeprefix("torch."), "rank": rank, "rounds": rounds}
    return [
        {**settings, "way": way, **summary(way, times, seconds.get(BASELINE, times), nbytes, copied)}
        for way, times in seconds.items()
    ]


def summary(way: str, times: list[float], baseline: list[float], nbytes: int, copied: float) -> dict[str, float]:
    """Medians and quartiles of one way of compressing."""
    low, middle, high = statistics.quantiles(times, n=4)
    ratios = statistics.quantiles((mine / theirs for mine, theirs in zip(times, baseline, strict=True)), n=4)
    rate = PASSES.get(way, 5) * nbytes / middle / 1e9
    return {
        "bytes": nbytes,
        "ms": middle * 1e3,
        "ms_low": low * 1e3,
        "ms_high": high * 1e3,
        "ratio": ratios[1],
        "ratio_low": ratios[0],
        "ratio_high": ratios[2],
        "gigabytes_per_second": rate,
        "of_copy": rate / copied,
        "copy_gigabytes_per_second": copied,
    }


def copy_rate() -> float:
    """Gigabytes that copying an array reads and writes in a second: the best of some, as STREAM takes it."""
    source = torch.ones(2**25)
    target = torch.empty_like(source)
    seconds: list[float] = []
    for _ in range(12):
        began = time.process_time()
        target.copy_(source)
        seconds.append(time.process_time() - began)
    return 2 * source.numel() * source.element_size() / min(seconds) / 1e9


class _Alone:
    """The communicator of a rank that is alone: an average is the tensor itself."""

    def __init__(self) -> None:
        self._request = torch.empty(0)

    def start(self, request: Tensor) -> "_Alone":
        """Begin what is asked for, which is done at once."""
        self._request = request
        return self

    def wait(self) -> Tensor:
        """What was asked for."""
        return self._request


def ours(shapes: Shapes, bucket: Tensor, rank: int, passes: str = "both") -> Callable[[], None]:
    """A step of `distopt.PowerSGD`."""
    slots = [
        Slot(str(i), nn.Parameter(torch.empty(shape, dtype=bucket.dtype)), exempt=len(shape) < 2)
        for i, shape in enumerate(shapes)
    ]
    plan, state = PowerSGD(rank, passes=passes).plan(slots, Place()), State()
    segments = bucket.split([math.prod(shape) for shape in shapes])
    gradients = [segment.view(shape) for segment, shape in zip(segments, shapes, strict=True)]

    def step() -> None:
        transaction = Transaction(_Alone())  # pyright: ignore[reportArgumentType]
        transaction.propose(plan.reduce(Bucket(gradients, segments, bucket), state))
        assert transaction.complete()
        transaction.commit()
        state.step += 1

    return step


class _GradBucket:
    """What ``powerSGD_hook`` asks of DDP's bucket."""

    def __init__(self, shapes: Shapes, bucket: Tensor) -> None:
        self._flat = bucket
        segments = bucket.split([math.prod(shape) for shape in shapes])
        self._views = [segment.view(shape) for segment, shape in zip(segments, shapes, strict=True)]

    def buffer(self) -> Tensor:
        """All gradients, flat."""
        return self._flat

    def gradients(self) -> list[Tensor]:
        """Each in its shape."""
        return list(self._views)

    def index(self) -> int:
        """Its number."""
        return 0

    def is_last(self) -> bool:
        """Whether it is the only one."""
        return True


class _GroupOfOne:
    """What ``powerSGD_hook`` asks of a process group."""

    def size(self) -> int:
        """How many ranks there are."""
        return 1


def torchs(shapes: Shapes, bucket: Tensor, rank: int, batched: bool = False) -> Callable[[], None]:
    """A step of torch's hook, from the first on compressed."""
    state = torch_hook.PowerSGDState(
        process_group=_GroupOfOne(),  # pyright: ignore[reportArgumentType]
        matrix_approximation_rank=rank,
        start_powerSGD_iter=2,
        batch_tensors_with_same_shape=batched,
    )
    state.iter = 2
    grad_bucket = _GradBucket(shapes, bucket)
    return lambda: torch_hook.powerSGD_hook(state, grad_bucket).wait()  # pyright: ignore[reportArgumentType]


def epfmls(shapes: Shapes, bucket: Tensor, rank: int) -> Callable[[], None]:
    """A step of the package ``powersgd``, whose gradients are its error buffers as well."""
    from powersgd import Config, PowerSGD  # pyright: ignore[reportMissingImports]

    sizes = [math.prod(shape) for shape in shapes]
    held = torch.zeros_like(bucket)
    gradients = [s.view(shape) for s, shape in zip(held.split(sizes), shapes, strict=True)]
    config = Config(rank=rank, min_compression_rate=2, num_iters_per_step=1, start_compressing_after_num_steps=0)
    aggregator = PowerSGD(gradients, config)

    def step() -> None:
        held.add_(bucket)  # what backward would do in its place
        aggregator.aggregate(gradients)

    return step


WAYS: Mapping[str, Callable[[Shapes, Tensor, int], Callable[[], None]]] = {
    "both": ours,
    "alternate": lambda shapes, bucket, rank: ours(shapes, bucket, rank, "alternate"),
    "torch": torchs,
    "torch batched": lambda shapes, bucket, rank: torchs(shapes, bucket, rank, batched=True),
    "epfml": epfmls,
}


def resnet50() -> Shapes:
    """Parameters of ResNet-50, in their order (He et al. 2015, table 1)."""
    shapes: list[tuple[int, ...]] = [(64, 3, 7, 7), (64,), (64,)]
    inside = 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            for shape in ((width, inside, 1, 1), (width, width, 3, 3), (4 * width, width, 1, 1)):
                shapes += [shape, (shape[0],), (shape[0],)]
            if block == 0:
                shapes += [(4 * width, inside, 1, 1), (4 * width,), (4 * width,)]
            inside = 4 * width
    return [*shapes, (1000, 2048), (1000,)]


def gpt2() -> Shapes:
    """Parameters of GPT-2 with 124 million of them (Radford et al. 2019)."""
    return [(50257, 768), (1024, 768), *_blocks(768, 12), (768,), (768,)]


def dalle_demo() -> Shapes:
    """Parameters of the transformer that this repository's DALL-E trains as a demonstration."""
    settings = TransformerSettings(**SIZES["demo"].settings)
    return [tuple(parameter.shape) for parameter in Transformer(settings).parameters()]


def dalle_12b() -> Shapes:
    """What one of eight GPUs of a node holds of a layer of the 12-billion model: an eighth of the rows, width 3968."""
    width, gpus = 3968, 8
    sides = [(3 * width, width), (width, width), (4 * width, width), (width, 4 * width)]
    return [shape for rows, columns in sides for shape in ((rows // gpus, columns), (rows // gpus,))]


def _blocks(width: int, layers: int) -> Iterator[tuple[int, ...]]:
    for _ in range(layers):
        for rows, columns in ((3 * width, width), (width, width), (4 * width, width), (width, 4 * width)):
            yield (rows, columns)
            yield (rows,)
        yield from [(width,)] * 4


MODELS: Mapping[str, Callable[[], Shapes]] = {
    "resnet50": resnet50,
    "gpt2": gpt2,
    "dalle-demo": dalle_demo,
    "dalle-12b-slice": dalle_12b,
}


def tables(records: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """The figures as a table, by its mark."""
    rows = [
        [
            r["model"],
            r["dtype"],
            r["rank"],
            r["way"],
            f"{r['ms']:.2f} ({r['ms_low']:.2f} to {r['ms_high']:.2f})",
            f"{r['ratio']:.2f} ({r['ratio_low']:.2f} to {r['ratio_high']:.2f})",
            f"{r['gigabytes_per_second']:.1f}",
            f"{r['of_copy']:.2f}",
        ]
        for r in records
    ]
    head = ["model", "dtype", "rank", "way", "ms (quartiles)", "of torch's hook (quartiles)", "GB/s", "of a copy"]
    return {"compression": markdown(head, rows)}


if __name__ == "__main__":
    main()
