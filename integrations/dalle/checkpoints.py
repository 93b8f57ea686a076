"""Checkpoints of a run: when both stages save themselves, what they go on from, and how a signal stops them.

A checkpoint holds everything that decides the rest of the run, to the bit on as many ranks: model, optimizer, averaged
weights, gradient scales, residuals, factors, curve, the step (which is the position in the data, for a batch is a
function of it), the text tokenizer and, in stage 2, the finished stage 1. Saving changes nothing in a run, but where
`exact` is false. That it is atomic and checksummed is the work of `distopt.checkpoint`.
"""

import contextlib
import dataclasses
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

import distopt
from distopt import checkpoint
from distopt.errors import StateError

from ..running.launch import Stopped
from ..running.signals import Signals
from .context import Context, StageResult
from .settings import CheckpointOptions

FORMAT = 1
_ASK_SECONDS = 0.5
"""How often, about, the ranks ask each other whether to save or to stop."""


class RunCheckpoints:
    """The checkpoints of one run.

    Args:
        folder: where they lie.
        options: when to save, and how many to keep.
        context: rank and ranks.
    """

    def __init__(self, folder: Path, options: CheckpointOptions, context: Context) -> None:
        self.folder, self.options, self.context = folder, options, context

    def facts(self) -> dict[str, Any] | None:
        """What the newest checkpoint tells of its run; ``None`` if there is none. Collective.

        Returns:
            What a `StageSaver` was given as ``facts``, with ``stage`` and ``step``.

        Raises:
            CheckpointError: there are checkpoints, but all are damaged.
            StateError: another version wrote it.
        """
        there = [self.context.rank == 0 and self.folder.is_dir() and any(self.folder.glob("[0-9]*-step-*"))]
        if dist.is_initialized():
            dist.broadcast_object_list(there)
        if not there[0]:
            return None
        facts: dict[str, Any] = {}
        checkpoint.load(self.folder, rng=False, run=facts)
        if facts.get("format") != FORMAT:
            raise StateError(f"{self.folder}: checkpoints of format {facts.get('format')}; this version reads {FORMAT}")
        return facts


class StageSaver:
    """Saves one stage and goes on from what was saved of it; what ``Context.checkpoints`` is.

    Args:
        run: the run's checkpoints.
        context: of the stage.
        number: of the stage.
        before: steps of all earlier stages.
        facts: plain values to keep beside it.
        resumed: whether the newest checkpoint is of this stage.
    """

    def __init__(
        self,
        run: RunCheckpoints,
        context: Context,
        number: int,
        before: int,
        facts: Mapping[str, Any],
        *,
        resumed: bool,
    ) -> None:
        self._context = context
        self._run, self._number, self._before, self._facts, self._resumed = run, number, before, facts, resumed
        self._states: dict[str, Any] = {}
        self._registration: distopt.Registration | None = None
        self._saved_at = self._asked_at = time.monotonic()
        self._first = self._asked = 0
        self._ask = 1
        self._signals = Signals()

    def resume(self, states: Mapping[str, Any], registration: distopt.Registration | None) -> int:
        """See ``context.StageCheckpoints``."""
        self._states, self._registration = dict(states), registration
        if registration is not None:
            self._states["registration"] = registration
        facts: dict[str, Any] = {}
        if self._resumed:
            checkpoint.load(self._run.folder, run=facts, **self._states)
            if registration is not None and facts["exact"] and facts["ranks"] == self._ranks():
                # Its own residuals, not their mean: reductions depend on the mean alone, but for the last bits.
                own = checkpoint.Value()
                checkpoint.load(self._run.folder, rng=False, own=checkpoint.PerRank(own))
                registration.load_own_residuals(own.value)
            self._first = self._asked = facts["step"]
            self._ask = self._first + 1
        self._saved_at = self._asked_at = time.monotonic()
        return self._first

    def listening(self) -> contextlib.AbstractContextManager[Any]:
        """The context in which SIGTERM and Ctrl-C save and stop."""
        return self._signals.heard()

    def after(self, step: int, total: int) -> None:
        """See ``context.StageCheckpoints``."""
        options = self._run.options
        due = step == total or (options.every_steps > 0 and step % options.every_steps == 0)
        number = 0
        if step >= self._ask:
            number, late = self._agreed(step)
            due |= late
        if due or number:
            self._save(step)
        if number:
            raise Stopped(number, f"step {step} of stage {self._number}")

    def _agreed(self, step: int) -> tuple[int, bool]:
        """Which signal any rank has got, and whether it is time to save; all ranks decide alike."""
        now, every = time.monotonic(), self._run.options.every_seconds
        late = 0 < every <= now - self._saved_at
        pace = (now - self._asked_at) / max(1, step - self._asked)
        told = torch.tensor([self._signals.number, late, pace], dtype=torch.float64)
        if self._registration is not None:
            told = told.to(self._context.device)
            dist.all_reduce(told, op=dist.ReduceOp.MAX)
        number, late, pace = told.tolist()
        self._asked_at, self._asked = now, step
        self._ask = step + max(1, min(1000, int(_ASK_SECONDS / max(pace, 1e-6))))
        return int(number), bool(late)

    def _ranks(self) -> list[int]:
        """How many there are, and how many hold one copy together: residuals belong to these numbers."""
        return [self._context.world_size, self._context.shards]

    def _save(self, step: int) -> None:
        facts = {"format": FORMAT, **self._facts, "stage": self._number, "step": step}
        facts |= {"ranks": self._ranks(), "exact": self._run.options.exact}
        states: dict[str, Any] = {"run": facts, **self._states}
        own = None
        if self._registration is not None and self._run.options.exact:
            own = self._registration.own_residuals()
            states["own"] = checkpoint.PerRank(checkpoint.Value(own))
        checkpoint.save(self._run.folder, self._before + step, keep=self._run.options.keep, **states)
        if self._registration is not None and own is not None:
            self._registration.load_own_residuals(own)
        self._saved_at = time.monotonic()


def packed(result: StageResult) -> dict[str, Any]:
    """A finished stage, in tensors and plain values."""
    fields = {field.name: getattr(result, field.name) for field in dataclasses.fields(result)}
    fields["model"] = dict(result.model.state_dict())
    fields["curve"] = torch.tensor(result.curve, dtype=torch.float64).reshape(-1, 2)
    fields["scales"] = [(step, dict(scales)) for step, scales in result.scales]
    fields["stats"] = None if result.stats is None else dataclasses.asdict(result.stats)
    return fields


def unpacked(state: Mapping[str, Any], model: nn.Module) -> StageResult:
    """The finished stage that `packed` gave.

    Args:
        state: from a checkpoint.
        model: of the same shape; takes the weights.
    """
    model.load_state_dict(state["model"])
    curve = [(int(step), loss) for step, loss in state["curve"].tolist()]
    stats = None if state["stats"] is None else distopt.Stats(**state["stats"])
    return StageResult(
        **{
            **state,
            "model": model.requires_grad_(False).eval(),
            "curve": curve,
            "stats": stats,
            "scales": state["scales"],
        }
    )
