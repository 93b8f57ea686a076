"""Trains one autoencoder on all ranks, from its newest checkpoint if it has one.

Gradients are averaged by PowerSGD in place of DDP's own averaging. The bottleneck's are sent whole: those of a table
are zero in all rows that nothing chose, in other rows at each step, which no low rank can say; those of SimVQ's matrix
decide where every code lies, and cost little. Running means are no parameters, and are summed by the bottleneck itself.

A batch is a function of seed and step, so a run that goes on, or has another number of ranks, sees the same pictures.
"""

import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import distopt
from distopt import checkpoint
from distopt.errors import SettingError, StateError

from . import bottlenecks
from .autoencoder import Autoencoder, Shape, edge_weights
from .data import Source, source_of
from .metrics import code_use, counts_of
from .settings import TrainSettings

CHECKPOINTS = "checkpoints"
_TAU = (0.5, 1 / 16)
_TAU_FALLS = 0.8
"""Part of the run in which the temperature falls."""
_WARMUP = 0.02
_STARTED_FROM = 256
"""Pictures, over all ranks, that codes start from."""
_DRAWN, _NOISE, _START = 1, 2, 3


class Journal(Protocol):
    """Where a run reports its progress."""

    def log(self, step: int, total: int, values: Mapping[str, float]) -> None:
        """Take the values of one step out of ``total``, counted from 1."""
        ...


def build(settings: TrainSettings) -> Autoencoder:
    """Make the untrained autoencoder of these settings: the same weights for the same seed.

    Raises:
        SettingError: the bottleneck has no such options.
    """
    shape, given = Shape(hidden=settings.hidden), dict(settings.given)
    if "subpixels" in bottlenecks.options_of(settings.bottleneck):
        given.setdefault("subpixels", shape.subpixels)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        return Autoencoder(shape, bottlenecks.build(settings.bottleneck, settings.codes, settings.width, **given))


class Trained(nn.Module):
    """The loss as a module: DistributedDataParallel synchronises only what goes through its forward."""

    def __init__(self, model: Autoencoder, edges: float) -> None:
        super().__init__()
        self.model, self.edges = model, edges

    def forward(self, pictures: Tensor, generator: torch.Generator, temperature: float) -> tuple[Tensor, Any, Tensor]:
        """The loss, its terms by name, and the counts of codes."""
        shown, quantized = self.model(pictures, generator, temperature)
        squares = (shown - pictures).square()
        reconstruction = (squares * edge_weights(pictures, self.edges)).mean() if self.edges else squares.mean()
        terms = {"reconstruction": reconstruction, **quantized.losses}
        counts = torch.zeros(0, dtype=torch.int64)
        if quantized.indices is not None and self.model.bottleneck.codes is not None:
            counts = counts_of(quantized.indices, self.model.bottleneck.codes)
        return torch.stack(list(terms.values())).sum(), {name: term.detach() for name, term in terms.items()}, counts


def train(settings: TrainSettings, out: Path | None, journal: Journal | None = None) -> Autoencoder:
    """Train. Collective, where there is a process group; each rank takes its part of every batch.

    Args:
        settings: of the run.
        out: folder of its checkpoints; ``None`` saves nothing.
        journal: told of every step.

    Returns:
        The trained autoencoder, in eval mode, equal on all ranks.

    Raises:
        SettingError: the batch cannot be divided over the ranks.
        StateError: the folder has checkpoints of other settings.
    """
    ranks, rank = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)
    if settings.batch % ranks:
        raise SettingError("batch", settings.batch, f"a multiple of the {ranks} ranks")
    source, model = source_of(settings.data), build(settings)
    trained: nn.Module = Trained(model, settings.edges)
    states: dict[str, Any] = {"model": model}
    if dist.is_initialized():
        trained = DistributedDataParallel(trained)
        states["registration"] = distopt.register(trained, reducer_of(settings))
    optimizer = torch.optim.Adam(
        [parameter for parameter in model.parameters() if parameter.requires_grad], betas=(0.9, 0.99)
    )
    states["optimizer"] = optimizer
    first = _resume(settings, out, states)
    if first == 0 and settings.start:
        _start(model, source, settings, rank, ranks)
    trained.train()
    for step in range(first, settings.steps):
        pictures = source.training(settings.batch, np.random.default_rng([settings.seed, _DRAWN, step]))[rank::ranks]
        noise = np.random.default_rng([settings.seed, _NOISE, step, rank]).integers(2**63)
        for group in optimizer.param_groups:
            group["lr"] = settings.learning_rate * _rate(step, settings.steps)
        optimizer.zero_grad()
        generator = torch.Generator().manual_seed(int(noise))
        loss, terms, counts = trained(pictures, generator, temperature_at(step, settings.steps))
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if journal is not None:
            journal.log(step + 1, settings.steps, _values(loss, terms, counts))
        if out is not None and settings.save_every and (step + 1) % settings.save_every == 0:
            checkpoint.save(out / CHECKPOINTS, step + 1, keep=1, run=_facts(settings), **states)
    return model.eval()


def reducer_of(settings: TrainSettings) -> distopt.PowerSGD | distopt.AllReduce:
    """What averages gradients: PowerSGD but for the bottleneck's."""
    if not settings.rank:
        return distopt.AllReduce()
    return distopt.PowerSGD(rank=settings.rank, uncompressed=["*bottleneck.*"])


def temperature_at(step: int, steps: int) -> float:
    """The relaxation's temperature: from 1/2 to 1/16 as half a cosine over four fifths of the run.

    Example:
        >>> [round(temperature_at(step, 100), 4) for step in (0, 40, 80, 99)]
        [0.5, 0.2812, 0.0625, 0.0625]
    """
    part = min(1.0, step / (_TAU_FALLS * steps))
    return _TAU[1] + (_TAU[0] - _TAU[1]) * (1 + math.cos(math.pi * part)) / 2


def _rate(step: int, steps: int) -> float:
    """Part of the highest learning rate at ``step``."""
    warmup = max(1, round(_WARMUP * steps))
    return (step + 1) / warmup if step < warmup else (1 + math.cos(math.pi * (step - warmup) / steps)) / 2


@torch.no_grad()
def _start(model: Autoencoder, source: Source, settings: TrainSettings, rank: int, ranks: int) -> None:
    rng = np.random.default_rng([settings.seed, _START])
    pictures = source.training(_STARTED_FROM, rng)[rank::ranks]
    model.bottleneck.start(model.encode(pictures), torch.Generator().manual_seed(int(rng.integers(2**63))))


def _values(loss: Tensor, terms: Mapping[str, Tensor], counts: Tensor) -> dict[str, float]:
    values = {"loss": loss.item(), **{name: term.item() for name, term in terms.items()}}
    if len(counts):
        use = code_use(counts)
        values |= {"used": use.used, "perplexity": use.perplexity}
    return values


def _facts(settings: TrainSettings) -> dict[str, Any]:
    kept = dataclasses.asdict(settings)
    del kept["save_every"]
    return {"settings": json.dumps(kept)}


def _resume(settings: TrainSettings, out: Path | None, states: Mapping[str, Any]) -> int:
    """Load the newest checkpoint, if there is one; gives the step to go on from."""
    if out is None or checkpoint.latest(out / CHECKPOINTS) is None:
        return 0
    facts: dict[str, Any] = {}
    checkpoint.load(out / CHECKPOINTS, rng=False, run=facts)
    if facts != _facts(settings):
        raise StateError(f"{out}: holds checkpoints of other settings; --fresh trains anew")
    return checkpoint.load(out / CHECKPOINTS, **states)
