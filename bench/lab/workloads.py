"""What is trained in the lab: matrices alone, a GPT-like network, and the transformer of the DALL-E demo."""

import dataclasses
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from distopt.integrations.dalle.transformer import Transformer, TransformerSettings
from torch import Generator, Tensor, nn

from bench.scaling.network import CONTEXT, Attention, Feedforward

Batch = tuple[Tensor, ...]
TARGET_SECONDS = 0.1
"""Forward and backward of the matrices, about."""


@dataclasses.dataclass(frozen=True)
class Workload:
    """A model and what it is fed.

    Args:
        title: for tables.
        build: makes the model; the weights are those of the generator's state.
        draw: a batch of so many rows, as the model's arguments.
        units: pattern of the modules that are gathered together when it is sharded.
        rows: of a batch on each rank; found by `rows_for` if None.
        loss: of what the model returns.
    """

    title: str
    build: Callable[[], nn.Module]
    draw: Callable[[int, Generator], Batch]
    units: str
    rows: int | None = None
    loss: Callable[[Any], Tensor] = lambda output: output


class Matrices(nn.Module):
    """Square linear maps one after another, without biases; the loss is the mean square of what comes out.

    Args:
        width: of each.
        layers: how many.
    """

    def __init__(self, width: int, layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(width, width, bias=False) for _ in range(layers)])

    def forward(self, x: Tensor) -> Tensor:
        """The loss for ``(rows, width)``."""
        for layer in self.layers:
            x = layer(x)
        return x.square().mean()


class Gpt(nn.Module):
    """Predicts the next symbol, and gives the loss.

    Args:
        width: of the residual stream.
        branches: attention and feedforward in turn; a pair has ``12 width ** 2`` weights.
    """

    def __init__(self, width: int, branches: int) -> None:
        super().__init__()
        self.symbols = nn.Embedding(256, width)
        self.branches = nn.ModuleList([(Attention, Feedforward)[i % 2](width, branches) for i in range(branches)])
        self.lm_head = nn.Linear(width, 256)

    def forward(self, symbols: Tensor) -> Tensor:
        """The loss for integers ``(rows, length)``."""
        x = self.symbols(symbols[:, :-1])
        for branch in self.branches:
            x = x + branch(x)
        return nn.functional.cross_entropy(self.lm_head(x).flatten(0, 1), symbols[:, 1:].flatten())


def draw_symbols(rows: int, generator: Generator) -> Batch:
    """Integers ``(rows, CONTEXT + 1)`` for `Gpt`."""
    return (torch.randint(256, (rows, CONTEXT + 1), generator=generator),)


_DALLE = TransformerSettings(text_vocabulary=256, text_length=16, codes=192, grid=6)


def _draw_dalle(rows: int, generator: Generator) -> Batch:
    text = torch.randint(_DALLE.text_vocabulary, (rows, _DALLE.text_length), generator=generator)
    return text, torch.randint(_DALLE.codes, (rows, _DALLE.image_length), generator=generator)


WORKLOADS: Mapping[str, Workload] = {
    "matrices": Workload(
        "12 x Linear(1448, 1448)",
        lambda: Matrices(1448, 12),
        lambda rows, generator: (torch.randn(rows, 1448, generator=generator),),
        "layers.*",
    ),
    "gpt": Workload("GPT-like, width 512, 6 layers", lambda: Gpt(512, 12), draw_symbols, "branches.*", rows=2),
    "dalle": Workload(
        "the DALL-E demo's transformer",
        lambda: Transformer(_DALLE),
        _draw_dalle,
        "blocks.*",
        rows=16,
        loss=lambda output: output.total(),
    ),
}


def rows_for(workload: Workload, seconds: float = TARGET_SECONDS) -> int:
    """Rows of a batch for which forward and backward alone take about ``seconds`` on the slowest rank. Collective."""
    model, generator = workload.build(), torch.Generator().manual_seed(0)
    rows = 4
    while True:
        times: list[float] = []
        for _ in range(4):
            batch = workload.draw(rows, generator)
            model.zero_grad()
            dist.barrier()
            began = time.perf_counter()
            workload.loss(model(*batch)).backward()
            times.append(time.perf_counter() - began)
        slowest = torch.tensor(sorted(times)[1])
        dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
        if slowest.item() >= seconds:
            return rows
        rows += max(1, rows // 4)
