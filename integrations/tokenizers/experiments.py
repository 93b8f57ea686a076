"""Trains and judges the autoencoders of a sweep, one after the other; what is finished is not done again."""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist

from ..running.fields import InputError
from ..running.journal import RunJournal
from . import runs
from .data import source_of
from .judging import exact_scenes, judge
from .settings import TrainSettings
from .sweeps import Entry
from .training import CHECKPOINTS, train


def run_one(settings: TrainSettings, out: Path, name: str, *, fresh: bool = False) -> dict[str, Any]:
    """Train, judge and save one autoencoder, on all ranks; of a finished run only its figures are read. Collective.

    Args:
        settings: of the run.
        out: its folder.
        name: in the journal.
        fresh: whether to train anew, whatever the folder holds.

    Returns:
        Its figures on the first rank; on the others what is there to read.

    Raises:
        InputError: the folder holds a run of other settings.
    """
    first = not dist.is_initialized() or dist.get_rank() == 0
    if fresh and first:
        shutil.rmtree(out / CHECKPOINTS, ignore_errors=True)
        (out / runs.REPORT).unlink(missing_ok=True)
    _together()
    done = runs.report_of(out)
    if done is not None:
        if not runs.same(done, settings):
            raise InputError(f"--out {out}: holds a run of other settings; give another, or --fresh to train anew")
        return done["figures"]
    journal = RunJournal(out, shown=first)
    with journal.stage(name) as stage:
        model = train(settings, out, stage)
    figures: dict[str, Any] = {}
    if first:
        figures = judge(model, source_of(settings.data), settings.judged, settings.seed)
        if settings.data == "scenes":
            figures["exact"] = exact_scenes(model, settings.judged // 3, settings.seed)
        runs.save(model, settings, figures, out)
        journal.say(f"{name}  " + "  ".join(f"{key} {value:.4g}" for key, value in figures.items()))
        shutil.rmtree(out / CHECKPOINTS, ignore_errors=True)
    journal.close()
    _together()
    return figures


def run_all(entries: Sequence[Entry], out: Path, *, fresh: bool = False) -> list[dict[str, Any]]:
    """Train and judge each of ``entries`` in a folder of its name. Collective.

    Returns:
        A row each: ``name``, ``bottleneck``, ``codes`` (none if continuous), ``data``, ``steps``, and its figures.
    """
    rows: list[dict[str, Any]] = []
    for entry in entries:
        figures = run_one(entry.settings, out / entry.name, entry.name, fresh=fresh)
        told = {name: getattr(entry.settings, name) for name in ("bottleneck", "data", "steps")}
        rows.append({"name": entry.name, "codes": None, **told, **figures})
    return rows


def _together() -> None:
    """Nobody looks at a folder that another rank is still writing."""
    if dist.is_initialized():
        dist.barrier()
