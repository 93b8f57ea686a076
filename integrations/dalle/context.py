"""What a training stage is given and gives back: the seams between the data, the two stages and the commands."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import Shard
from torch.nn.parallel import DistributedDataParallel

import distopt

from .data.order import Part

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Source(Protocol):
    """Pictures and captions to learn from. A batch is a pure function of the generator that it is drawn with."""

    @property
    def size(self) -> int:
        """Side of the square pictures, in pixels."""
        ...

    @property
    def fingerprint(self) -> str:
        """What every batch follows from, besides its generator: a run that goes on must find it again."""
        ...

    def pictures(self, n: int, rng: np.random.Generator) -> Tensor:
        """Draw pictures without captions, ``(n, 3, size, size)`` float32 in [0, 1]: what stage 1 sees."""
        ...

    def pairs(self, n: int, rng: np.random.Generator) -> tuple[list[str], Tensor]:
        """Draw captions and their pictures ``(n, 3, size, size)``: what stage 2 sees, never a held-out caption."""
        ...

    def captions(self) -> Iterable[str]:
        """Give the training captions that the text tokenizer learns its merges from."""
        ...


class Sample(Protocol):
    """One caption with its picture, as a stream gives it."""

    @property
    def caption(self) -> str:
        """One of the picture's captions."""
        ...

    @property
    def pixels(self) -> np.ndarray:
        """The picture, uint8 ``(size, size, 3)``."""
        ...

    @property
    def rng(self) -> np.random.Generator:
        """For all else that is random about this sample, wherever it is trained on."""
        ...


@dataclasses.dataclass(frozen=True)
class Judged:
    """Pictures that a finished model is judged by.

    Args:
        captions: n texts.
        pictures: ``(n, 3, size, size)`` float32 in [0, 1].
        unseen: whether they were held out; otherwise the model was trained on them, for want of others.
    """

    captions: Sequence[str]
    pictures: Tensor
    unseen: bool


@runtime_checkable
class Stream(Source, Protocol):
    """A source that gives a step's global batch in parts: for any number of ranks the same pictures in the same order.

    ``pictures`` and ``pairs`` draw at random as every source does; training goes through the data by ``samples_at``.
    """

    @property
    def broken(self) -> Sequence[str]:
        """Names of the pictures that this process could not decode; others took their places."""
        ...

    def samples_at(self, part: Part) -> Sequence[Sample]:
        """Give one rank's part of a step's global batch: a function of its positions alone."""
        ...


class Journal(Protocol):
    """Where a stage reports its progress."""

    def log(self, step: int, total: int, values: Mapping[str, float]) -> None:
        """Take the values of one step out of ``total``; every rank calls it, rank 0's is shown.

        Names with a slash are for curves alone.
        """
        ...

    def show(self, step: int, values: Mapping[str, float], pictures: Mapping[str, Tensor]) -> None:
        """Take what is looked at now and then: figures, and pictures ``(n, 3, H, W)`` in [0, 1]; rank 0's alone."""
        ...


class StageCheckpoints(Protocol):
    """Where a stage saves itself and goes on from."""

    def resume(self, states: Mapping[str, Any], registration: distopt.Registration | None) -> int:
        """Load what was saved of this stage, if anything was; gives the step to go on from. Collective."""
        ...

    def listening(self) -> contextlib.AbstractContextManager[Any]:
        """The context in which signals are heard."""
        ...

    def after(self, step: int, total: int) -> None:
        """Save if it is time after ``step`` of ``total``, counted from 1. Collective.

        Raises:
            Stopped: a signal asked to stop; everything has been saved.
        """
        ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class Context:
    """The surroundings of a training stage.

    Args:
        rank: this process among ``world_size``.
        world_size: processes that train together; each sees its own part of the global batch.
        device: where the model lives.
        seed: decides initial weights and every batch.
        reducer: the ``distopt`` reducer that averages gradients; ``None`` trains in this process alone.
        shards: ranks that hold one copy of the model together; with 1, every rank has its own under DDP.
        precision: "fp32", "bf16" or "fp16": what products are computed in.
        journal: receives losses and metrics; ``None`` stays silent.
        pictures_every: steps after which the journal is shown pictures; 0 shows none.
        checkpoints: where the stage is saved; ``None`` saves nothing.
    """

    rank: int = 0
    world_size: int = 1
    device: torch.device = dataclasses.field(default_factory=lambda: torch.device("cpu"))
    seed: int = 0
    reducer: distopt.AllReduce | distopt.PowerSGD | None = None
    shards: int = 1
    precision: str = "fp32"
    journal: Journal | None = None
    pictures_every: int = 0
    checkpoints: StageCheckpoints | None = None

    @property
    def dtype(self) -> torch.dtype:
        """The type that products are computed in."""
        return _DTYPES[self.precision]

    def rng(self, stage: int, step: int, chunk: int = 0) -> np.random.Generator:
        """The generator of a part of the batch at ``step``: a pure function of seed, stage, step and the part."""
        return np.random.default_rng([self.seed, stage, step, chunk])

    def part(self, stage: int, step: int, batch: int) -> Part:
        """This rank's part of the global batch of ``batch`` pictures at ``step``."""
        return Part(stage, step, batch, self.rank, self.world_size)

    def log(self, step: int, total: int, values: Mapping[str, float]) -> None:
        """Pass ``values`` to the journal, if there is one."""
        if self.journal is not None:
            self.journal.log(step, total, values)

    def looks(self, step: int, total: int) -> bool:
        """Whether the journal is shown pictures after ``step`` of ``total``, counted from 1."""
        every = self.pictures_every
        return self.journal is not None and every > 0 and (step % every == 0 or step == total)

    def show(self, step: int, values: Mapping[str, float], pictures: Mapping[str, Tensor]) -> None:
        """Pass figures and pictures to the journal, if there is one."""
        if self.journal is not None:
            self.journal.show(step, values, pictures)


@dataclasses.dataclass(frozen=True, kw_only=True)
class StageResult:
    """What a stage ends with: the trained module without wrappers, its curve, and what communication cost.

    Args:
        model: the trained module.
        steps: steps, skipped ones included.
        final_loss: at the end of training.
        curve: steps and losses.
        wall_seconds: what it took.
        stats: of the reducer.
        skipped_steps: optimizer steps not taken, because a scaled gradient was not finite.
        scales: steps and gradient scales by name, now and then over the run; the last are those at its end.
    """

    model: nn.Module
    steps: int
    final_loss: float
    curve: Sequence[tuple[int, float]]
    wall_seconds: float
    stats: distopt.Stats | None = None
    skipped_steps: int = 0
    scales: Sequence[tuple[int, Mapping[str, float]]] = ()


def distribute(
    module: nn.Module,
    context: Context,
    units: Sequence[nn.Module],
    *,
    by_columns: Sequence[nn.Parameter] = (),
    grad_scaler: torch.amp.GradScaler | None = None,
) -> tuple[nn.Module, distopt.Registration | None]:
    """Shard a stage's module inside each node, or wrap it in DDP, with the context's reducer between the copies.

    This is all that makes a stage distributed. Nothing happens where there are no processes to train with.

    Args:
        module: what is trained; its optimizer is made afterwards.
        context: the surroundings.
        units: its residual blocks, which are gathered one at a time and computed again in backward if it is sharded.
        by_columns: matrices that are cut along their second dimension, where that can be done evenly.
        grad_scaler: what scales the loss, where the whole loss is scaled.

    Returns:
        The module to train with, and the registration; the module itself and ``None`` in a process alone.
    """
    if context.reducer is None or not dist.is_initialized():
        return module, None
    if context.shards > 1:
        return module, distopt.shard(
            module,
            units,
            mesh=distopt.node_mesh(context.device.type, shards=context.shards),
            reducer=context.reducer,
            grad_scaler=grad_scaler,
            shard_placement_fn=placement(by_columns, context.shards),
        )
    ids = [context.device.index] if context.device.type == "cuda" else None
    wrapped = DistributedDataParallel(module, device_ids=ids)
    return wrapped, distopt.register(wrapped, context.reducer, grad_scaler=grad_scaler)


def placement(by_columns: Sequence[nn.Parameter], shards: int) -> Callable[[nn.Parameter], Shard | None]:
    """Tell ``fully_shard`` how to cut each parameter.

    Args:
        by_columns: see `distribute`.
        shards: how many pieces.
    """
    columns = {id(matrix) for matrix in by_columns if matrix.shape[1] % shards == 0}
    return lambda parameter: Shard(1) if id(parameter) in columns else None
