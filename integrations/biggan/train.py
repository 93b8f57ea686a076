"""The command ``train``: trains on the drawn task, judges what is drawn, and writes everything to one folder."""

import dataclasses
import shutil
import time
import warnings
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import torch.distributed as dist

from distopt import checkpoint

from ..running.journal import RunJournal
from ..running.launch import Stopped
from ..running.signals import Signals
from . import drawn, runs
from .sampling import Point, curve, draw_pictures, prepare
from .settings import TrainSettings
from .sheets import draw_sheet, draw_spectra, draw_truncation, rows_by_class
from .trainer import Progress, Trainer

_SHOWN = 16
"""Pictures of a class on the sheet."""


def run(settings: TrainSettings, out: Path, device: torch.device) -> None:
    """Train, judge and write; every rank calls it.

    Args:
        settings: what the user chose.
        out: the run's folder, which exists.
        device: of this rank.

    Raises:
        Stopped: a signal asked to stop; everything has been saved.
    """
    # Of the gradient of a weight with one row, whose strides differ and whose bytes do not.
    warnings.filterwarnings("ignore", "Grad strides do not match bucket view strides")
    first = not dist.is_initialized() or dist.get_rank() == 0
    trainer, history = Trainer(settings, *drawn.everything(), device), checkpoint.Value([])
    if checkpoint.latest(out / runs.CHECKPOINTS) is not None:
        trainer.load(out / runs.CHECKPOINTS, history=history)
    began = time.perf_counter()
    journal = RunJournal(out, shown=first)
    journal.begin({"biggan": trainer.taken})
    if trainer.taken:
        journal.say(f"goes on after step {trainer.taken}")
    signals = Signals()
    with journal.stage("biggan") as stage, signals.heard():
        while trainer.taken < settings.steps:
            progress = trainer.step()
            if progress.spectra:
                stage.log(trainer.taken, settings.steps, {**progress.losses, **_largest(progress)})
                history.value.append(_entry(trainer.taken, progress))
            for warned in progress.warned:
                journal.say(f"collapse may be near: {warned}")
            number = signals.agreed(device)
            if number or (settings.checkpoint_every and trainer.taken % settings.checkpoint_every == 0):
                trainer.save(out / runs.CHECKPOINTS, history=history)
            if number:
                raise Stopped(number, f"step {trainer.taken}")
    if first:
        journal.say(f"judging {settings.judged} pictures at each threshold")
        _finish(settings, out, trainer, history.value, time.perf_counter() - began, journal)
    journal.close()


def _finish(
    settings: TrainSettings,
    out: Path,
    trainer: Trainer,
    history: list[dict[str, Any]],
    seconds: float,
    journal: RunJournal,
) -> None:
    generator = trainer.average.module
    points = curve(generator, settings.judged, passes=settings.standing)
    report = {
        "settings": dataclasses.asdict(settings),
        "ranks": dist.get_world_size() if dist.is_initialized() else 1,
        "seconds": seconds,
        "skipped": trainer.skipped,
        "curve": [{"threshold": point.threshold, **dataclasses.asdict(point.judgement)} for point in points],
        "communication": _communication(trainer),
        "history": history,
    }
    runs.write_json(out / runs.REPORT, report)
    draw_truncation(out / "truncation.png", points, drawn.CONTENTS)
    draw_spectra(out / "spectra.png", history)
    classes = torch.arange(len(drawn.CLASSES)).repeat_interleave(_SHOWN)
    pictures = draw_pictures(prepare(generator, None, passes=settings.standing), classes, None)
    draw_sheet(out / "samples.png", rows_by_class(pictures, classes))
    state = {name: value.cpu().contiguous() for name, value in generator.state_dict().items()}
    safetensors.torch.save_file(state, out / runs.GENERATOR)
    shutil.rmtree(out / runs.CHECKPOINTS, ignore_errors=True)
    for line in lines_of(points):
        journal.say(line)


def lines_of(points: list[Point]) -> list[str]:
    """The curve as a table, a line a threshold."""
    lines = ["threshold  accuracy  contents a class  distance"]
    for point in points:
        threshold = "none" if point.threshold is None else f"{point.threshold:g}"
        judged = point.judgement
        lines.append(f"{threshold:>9}  {judged.accuracy:8.3f}  {judged.contents:16.1f}  {judged.distance:8.3f}")
    return lines


def _largest(progress: Progress) -> dict[str, float]:
    return {f"largest/{name}": values[0] for name, values in progress.spectra.items()}


def _entry(step: int, progress: Progress) -> dict[str, Any]:
    return {
        "step": step,
        "losses": dict(progress.losses),
        "spectra": {name: list(values) for name, values in progress.spectra.items()},
        "warned": [str(warned) for warned in progress.warned],
    }


def _communication(trainer: Trainer) -> dict[str, Any]:
    both = {"generator": trainer.generator_registration, "discriminator": trainer.discriminator_registration}
    stats = {name: registration.stats() for name, registration in both.items() if registration is not None}
    return {
        name: {"steps": each.steps, "saving": each.saving, "matrix_saving": each.matrix_saving}
        for name, each in stats.items()
    }
