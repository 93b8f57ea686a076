"""Ways of compressing one model's gradients, each a step that is taken again and again; no rank but this one.

What one rank has to send, all have: averages are the tensors themselves, and cost nothing. All gradients lie in one
bucket, embeddings included, and every way is given the same matrices.
"""

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor
from torch.futures import Future

from bench import epfml
from bench.compression.models import Shapes, dalle_12b, gpt2_xl, resnet50
from bench.compression.ways import epfmls, ours, torchs
from bench.gpu.dion import dions
from distopt.kernels import choice

Step = Callable[[], None]

OURS, PACKED, HALF, PLAIN, TORCH, BATCHED, EPFML, DION = (
    "distopt",
    "distopt, residual in 1-6-9",
    "distopt, residual in float16",
    "distopt, kernels off",
    "torch",
    "torch batched",
    "epfml",
    "Dion's",
)

MODELS: Mapping[str, Callable[[], Shapes]] = {
    "resnet50": resnet50,
    "gpt2-1.3b": gpt2_xl,
    "dalle-12b-shard": lambda: dalle_12b(layers=64),
    "tiny": lambda: [(24, 16), (24,), (8, 4, 3, 3), (24, 16), (16, 8)],
}
"""Shapes of the parameters; the last for dry runs."""


class Done:
    """An all-reduce over one rank, which is over when it begins and leaves the tensor as it is."""

    def __init__(self, tensor: Tensor, **_: Any) -> None:
        devices = [tensor.device] if tensor.is_cuda else []
        self._future: Future[list[Tensor]] = Future(devices=devices)  # pyright: ignore[reportArgumentType]
        self._future.set_result([tensor])

    def get_future(self) -> Future[list[Tensor]]:
        """The tensor as it is."""
        return self._future

    def wait(self) -> None:
        """There is nothing to wait for."""


@contextlib.contextmanager
def kernels(setting: str | None) -> Iterator[None]:
    """Let `distopt.kernels` be chosen as if the environment said so; ``None`` leaves the choice as it is."""
    if setting is None:
        yield
        return
    with mock.patch.dict(os.environ, {choice.VARIABLE: setting}):
        choice.chosen_setting.cache_clear()
        try:
            yield
        finally:
            choice.chosen_setting.cache_clear()


def missing(way: str, dtype: torch.dtype) -> str | None:
    """Why a way cannot be taken here; ``None`` if it can."""
    if way == EPFML and not epfml.is_installed():
        return f"not installed ({epfml.HOW_TO_INSTALL})"
    if way == EPFML and dtype != torch.float32:
        return "takes float32 only"
    return None


def step_of(way: str, shapes: Shapes, bucket: Tensor, rank: int) -> Step:
    """Prepare a step of one way.

    Args:
        way: one of the names above.
        shapes: of the parameters.
        bucket: their gradients, one after another; a step replaces them by what would be delivered.
        rank: of the factors.
    """
    # A residual of the gradient's own precision: what the five passes of the floor count.
    options: dict[str, Any] = {} if bucket.dtype == torch.float32 else {"residual_dtype": bucket.dtype}
    makers: dict[str, Callable[[], Step]] = {
        OURS: lambda: ours(shapes, bucket, rank, **options),
        PACKED: lambda: ours(shapes, bucket, rank, residual_dtype="1-6-9"),
        HALF: lambda: ours(shapes, bucket, rank, residual_dtype=torch.float16),
        PLAIN: lambda: ours(shapes, bucket, rank, **options),
        TORCH: lambda: torchs(shapes, bucket, rank),
        BATCHED: lambda: torchs(shapes, bucket, rank, batched=True),
        EPFML: lambda: epfmls(shapes, bucket, rank),
        DION: lambda: dions(shapes, bucket, rank),
    }
    setting = "off" if way == PLAIN else None
    with kernels(setting):
        inner = makers[way]()

    def step() -> None:
        with kernels(setting), mock.patch.object(dist, "all_reduce", Done), torch.no_grad():
            inner()

    return step


WAYS = (OURS, PACKED, HALF, PLAIN, DION, EPFML, BATCHED, TORCH)
"""In the order in which they are tried: the slowest last."""
