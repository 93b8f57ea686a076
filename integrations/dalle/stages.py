"""The stages of a run, one after the other: each is trained, or taken from the newest checkpoint as it was finished."""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from torch import nn

import distopt

from ..running.journal import RunJournal
from .checkpoints import RunCheckpoints, StageSaver, packed, unpacked
from .context import Context, StageResult
from .schedules import StageSettings

_Settings = TypeVar("_Settings", bound=StageSettings)
Reducer = distopt.AllReduce | distopt.PowerSGD
STAGES = ("stage 1", "stage 2", "stage 3")


class Stages:
    """Goes through the stages: those that are finished come from the newest checkpoint.

    Args:
        reducers: of stages 1 and 2; stage 3 has that of stage 1.
        context: rank, device and seed.
        journal: shows the progress.
        checkpoints: of the run.
        saved: what the newest checkpoint tells; ``None`` if there is none.
        facts: what every checkpoint is to tell; finished stages are added.
    """

    def __init__(
        self,
        reducers: Sequence[Reducer],
        context: Context,
        journal: RunJournal,
        checkpoints: RunCheckpoints | None,
        saved: Mapping[str, Any] | None,
        facts: Mapping[str, Any],
    ) -> None:
        self._reducers, self._context, self._journal, self._checkpoints = reducers, context, journal, checkpoints
        self._saved, self._steps = saved or {"stage": 0}, 0
        self.facts = dict(facts)

    def through(
        self,
        number: int,
        settings: _Settings,
        train: Callable[[_Settings, Context], StageResult],
        make: Callable[[], nn.Module],
    ) -> StageResult:
        """Train a stage, or take it as it was finished.

        Args:
            number: of the stage.
            settings: how it is trained.
            train: trains it.
            make: makes a model to put finished weights into.
        """
        if number < self._saved["stage"]:
            result = unpacked(self._saved[f"stage{number}"], make().to(self._context.device))
        else:
            result = self._train(number, settings, train)
        self._steps += settings.steps
        self.facts[f"stage{number}"] = packed(result)
        return result

    def _train(
        self, number: int, settings: _Settings, train: Callable[[_Settings, Context], StageResult]
    ) -> StageResult:
        resumed = number == self._saved["stage"]
        reducer = self._reducers[(number - 1) % len(self._reducers)]
        with self._journal.stage(STAGES[number - 1]) as stage:
            context = dataclasses.replace(self._context, reducer=reducer, journal=stage)
            if self._checkpoints is not None:
                facts = self.facts
                saver = StageSaver(self._checkpoints, context, number, self._steps, facts, resumed=resumed)
                context = dataclasses.replace(context, checkpoints=saver)
            return train(_divisible(settings, context.world_size), context)


def _divisible(settings: _Settings, ranks: int) -> _Settings:
    """The settings with the batch raised to what the ranks and their micro-batches divide: any number can run them."""
    parts = ranks * settings.accumulate * settings.together
    return dataclasses.replace(settings, batch=math.ceil(settings.batch / parts) * parts)
