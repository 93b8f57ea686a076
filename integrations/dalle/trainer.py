"""The trainer of every stage, built from distopt's plugins: a stage describes itself, and this is the loop.

``distribute`` shards or replicates the model and reduces its gradients, ``distopt.accumulate`` makes one exact step of
micro-batches on all ranks, ``Stepper`` scales, clips and steps, ``Averaged`` keeps the averaged weights, and
``StageCheckpoints`` saves all of it and goes on from there.
"""

import contextlib
import copy
import dataclasses
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

import distopt
from distopt.errors import SettingError

from .averaging import Averaged
from .context import Context, StageResult, distribute
from .precision import LossScaler, Scaler, Stepper
from .schedules import StageSettings

Batch = tuple[Tensor, ...]
"""Tensors whose first dimension are the rows."""
_FIGURES_EVERY = 100
"""Steps from one that a registration measures to the next; the first is measured."""


class _Figures(dict[str, float]):
    """Takes scalars as a writer of TensorBoard does."""

    def add_scalar(self, tag: str, scalar_value: float, global_step: int) -> None:
        self[tag] = scalar_value


@dataclasses.dataclass(frozen=True)
class Loss:
    """What a micro-batch costs.

    Args:
        sums: by kind, the sum over all that a stage's ``weight`` counts of the kind.
        values: what to show besides; means over the micro-batch.
    """

    sums: Mapping[str, Tensor]
    values: Mapping[str, Tensor]


class Stage(Protocol):
    """What a stage tells of itself; all else is the trainer's."""

    model: nn.Module
    settings: StageSettings
    grad_scaler: LossScaler | None
    """What scales the loss, if anything does."""

    def units(self) -> Sequence[nn.Module]:
        """Residual blocks, the units of sharding."""
        ...

    def by_columns(self) -> Sequence[nn.Parameter]:
        """Matrices that are sharded along their second dimension."""
        ...

    def optimizer(self) -> Optimizer:
        """Make the optimizer of the model, which has been distributed."""
        ...

    def scaler(self) -> Scaler:
        """Make what scales gradients; ``grad_scaler`` if there is one."""
        ...

    def batch(self, step: int) -> Batch:
        """Give this rank's rows of the batch of ``step``, counted from 0: a pure function of it."""
        ...

    def weight(self, batch: Batch) -> Mapping[str, float]:
        """Count what each loss is a sum over."""
        ...

    def loss(self, trained: nn.Module, batch: Batch, step: int) -> Loss:
        """Run forward."""
        ...

    def weight_of_last(self, taken: int) -> float:
        """The weight of the last weights in the averaged ones, after so many steps that were taken before."""
        ...

    def values(self, step: int) -> Mapping[str, float]:
        """What to show of the schedules at ``step``."""
        ...

    def look(self, number: int) -> tuple[Mapping[str, float], Mapping[str, Tensor]]:
        """Figures and pictures ``(n, 3, H, W)`` by name of what the model does at present; changes nothing."""
        ...


class History:
    """Steps and losses of a run, and the seconds that it took before it was resumed."""

    def __init__(self) -> None:
        self.curve: list[tuple[int, float]] = []
        self._seconds = 0.0
        self._began = time.perf_counter()

    @property
    def seconds(self) -> float:
        """Seconds of training, those before the last checkpoint included."""
        return self._seconds + time.perf_counter() - self._began

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {"curve": torch.tensor(self.curve, dtype=torch.float64).reshape(-1, 2), "seconds": self.seconds}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """From a checkpoint."""
        self.curve = [(int(step), loss) for step, loss in state["curve"].tolist()]
        self._seconds, self._began = state["seconds"], time.perf_counter()


def train(stage: Stage, context: Context) -> StageResult:
    """Train a stage, from its newest checkpoint if the context has one.

    Args:
        stage: what is trained, on what.
        context: rank, device, seed, reducer, precision, journal and checkpoints.

    Returns:
        The model with averaged weights in eval mode. ``final_loss`` is this rank's mean loss over the last twentieth
        of the steps, before averaging.

    Raises:
        SettingError: the batch cannot be divided over the ranks and their micro-batches.
        Stopped: a signal asked to stop; everything has been saved.
    """
    settings, history = stage.settings, History()
    check_divisible(settings, context.world_size)
    whole = copy.deepcopy(stage.model).to("meta")
    columns = stage.by_columns()
    trained, registration = distribute(
        stage.model, context, stage.units(), by_columns=columns, grad_scaler=stage.grad_scaler
    )
    averaged = Averaged(stage.model)
    optimizer, scaler = stage.optimizer(), stage.scaler()
    stepper = Stepper(stage.model.parameters(), optimizer, scaler, settings.clip, settings.steps, context)
    states = {"model": stage.model, "optimizer": optimizer, "averaged": averaged, "scaler": scaler}
    states |= {"stepper": stepper, "history": history}
    first = 0 if context.checkpoints is None else context.checkpoints.resume(states, registration)
    trained.train()
    with contextlib.nullcontext() if context.checkpoints is None else context.checkpoints.listening():
        for step, window in enumerate(_windows(stage, trained, first), first):
            losses = []
            for batch in window:
                with stepper.products():
                    loss = stage.loss(trained, batch, step)
                    window.backward({kind: scaler.scale(part) for kind, part in loss.sums.items()})
                losses.append((loss, stage.weight(batch)))
            if stepper.step(settings.learning_rate_at(step)):
                averaged.move(stage.weight_of_last(stepper.taken - 1))
            history.curve.append((step, _mean_loss(losses)))
            values = {"loss": history.curve[-1][1], **_means(losses), **stage.values(step), **stepper.values()}
            context.log(step + 1, settings.steps, values)
            _tell(step + 1, settings.steps, registration, context)
            _look(stage, step + 1, context)
            if context.checkpoints is not None:
                context.checkpoints.after(step + 1, settings.steps)
    last = [loss for _, loss in history.curve[-max(1, settings.steps // 20) :]]
    return StageResult(
        model=averaged.write(whole),
        steps=settings.steps,
        final_loss=sum(last) / len(last),
        curve=history.curve,
        wall_seconds=history.seconds,
        stats=None if registration is None else registration.stats(),
        skipped_steps=stepper.skipped,
        scales=stepper.scales,
    )


def check_divisible(settings: StageSettings, ranks: int) -> None:
    """Refuse a batch that cannot be divided over the ranks and their micro-batches.

    Raises:
        SettingError: names the batch.
    """
    parts = ranks * settings.accumulate
    if settings.batch % parts:
        each = f" and their {settings.accumulate} micro-batches each" if settings.accumulate > 1 else ""
        raise SettingError(f"{type(settings).__name__}.batch", settings.batch, f"a multiple of the {ranks} ranks{each}")


def _windows(stage: Stage, trained: nn.Module, first: int) -> "Iterator[distopt.accumulation.Window[Batch]]":
    """The steps from ``first`` on, each a window of micro-batches."""
    settings = stage.settings
    if first >= settings.steps:
        return iter(())
    micros = (micro for step in range(first, settings.steps) for micro in _cut(stage.batch(step), settings.accumulate))
    return iter(distopt.accumulate(micros, trained, steps=settings.accumulate, weight=stage.weight))


def _cut(batch: Batch, parts: int) -> Iterator[Batch]:
    return zip(*(tensor.chunk(parts) for tensor in batch), strict=True)


def _mean_loss(losses: Sequence[tuple[Loss, Mapping[str, float]]]) -> float:
    """This rank's own loss: of each kind the mean over what it has of it."""
    total = 0.0
    for kind in losses[0][0].sums:
        weight = sum(weights[kind] for _, weights in losses)
        total += sum(loss.sums[kind].item() for loss, _ in losses) / weight if weight else 0.0
    return total


def _means(losses: Sequence[tuple[Loss, Mapping[str, float]]]) -> dict[str, float]:
    return {name: sum(loss.values[name].item() for loss, _ in losses) / len(losses) for name in losses[0][0].values}


def _look(stage: Stage, step: int, context: Context) -> None:
    """Show what the model does, now and then, on the first rank; of a sharded model no rank has all."""
    if context.rank or context.shards > 1 or not context.looks(step, stage.settings.steps):
        return
    figures, pictures = stage.look(min(8, stage.settings.batch))
    context.show(step, figures, pictures)


def _tell(step: int, total: int, registration: distopt.Registration | None, context: Context) -> None:
    """Write now and then, on the first rank, what compressing does, in all and layer by layer."""
    if context.rank == 0 and registration is not None and (step % _FIGURES_EVERY == 1 or step == total):
        figures = _Figures()
        distopt.log_to_tensorboard(registration, figures, step)
        context.show(step, figures, {})
