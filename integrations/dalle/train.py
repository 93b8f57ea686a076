"""Trains both stages on a folder of captioned pictures, and measures what was learned on pictures held out."""

import contextlib
import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist

from . import architectures, pages, recipe, report, resume, runs, stage1_settings
from .checkpoints import RunCheckpoints
from .context import Context
from .data import batches, opening
from .data.stream import StreamSource
from .evaluate import score_folder
from .folder import FolderSource
from .pictures import NAMES_SHOWN
from .precision import reducer
from .recipe import Recipe
from .sampling import SamplingSettings
from .settings import TrainSettings
from .stage2 import Stage2Settings
from .stage3 import Stage3Settings


def run(settings: TrainSettings, data: Path, out: Path, context: Context, *, read: bool) -> None:
    """Train, measure and write; every rank calls it.

    Args:
        settings: what the user chose.
        data: the pictures, as ``--data`` names them.
        out: the run's folder, which exists.
        context: rank, device and seed.
        read: whether ``data`` must still be read; otherwise ``out`` has the pictures already.

    Raises:
        InputError: too few pictures are usable.
        SettingError: a setting does not fit the number of ranks.
    """
    began = time.perf_counter()
    with contextlib.closing(_source(settings, data, out, context, read)) as source:
        chosen = recipe_of(settings)
        with recipe.journal_of(out, context) as journal:
            for line in source.summary():
                journal.say(line)
            journal.say(f"{chosen.surroundings(context)}; writing to {out}")
            checkpoints = RunCheckpoints(out / resume.CHECKPOINTS, chosen.checkpoint, context)
            trained = recipe.train(source, chosen, context, journal, checkpoints)
        broken = batches.broken_of(source, context)
        if context.rank != 0:
            return
        full = {
            **score_folder(trained.model, source, context.device),
            **trained.figures(),
            "data": _described(source, data, broken),
            "world_size": context.world_size,
            "seed": settings.seed,
            "wall_seconds": recipe.seconds_since(began),
            "sampling": dataclasses.asdict(chosen.sampling),
            "training": chosen.describe(),
            "peak_memory_bytes": report.peak_memory(),
            **report.device_memory(),
            "versions": report.versions(),
        }
        pages.draw_held_out(out / "samples.png", trained.model, source.held_out(1024), settings.seed)
        trained.draw_reconstructions(out / "reconstructions.png", source, context)
    trained.draw_curves(out)
    runs.write_json(out / runs.REPORT, report.finite(full))
    kept = {"seed": settings.seed, "data": {"held_out": settings.held_out}, "training": chosen.describe()}
    trained.model.save(out, "folder", kept)
    resume.finish(out)
    lines = [
        *report.held_out_lines(full),
        *report.stage_lines(full),
        *report.precision_lines(full),
        *report.file_lines(out),
    ]
    found = full["data"]
    counts = f"{found['training']} pictures trained on, {found['held_out']} held out"
    print(report.framed(f"{data}: {counts}, {full['wall_seconds']:.0f} s", lines))


def _described(source: FolderSource | StreamSource, data: Path, broken: Sequence[str]) -> dict[str, Any]:
    """How much there was to train on, and what was left out."""
    training, held_out = source.counts
    left_out, names = source.left_out()
    if broken:
        left_out["broken"], names["broken"] = left_out.get("broken", 0) + len(broken), list(broken[:NAMES_SHOWN])
    return {
        "folder": str(data),
        "pictures": training + held_out,
        "training": training,
        "held_out": held_out,
        "left_out": left_out,
        "left_out_names": names,
    }


def _source(
    settings: TrainSettings, data: Path, out: Path, context: Context, read: bool
) -> FolderSource | StreamSource:
    """The pictures as they were read or indexed; where nobody has done so yet, rank 0 does it for all."""
    if read:
        refused: list[Exception | None] = [None]
        if context.rank == 0:
            try:
                opening.keep(opening.read(data, settings, out), out)
            except Exception as error:
                refused = [error]
        if context.world_size > 1:
            dist.broadcast_object_list(refused)
        if refused[0] is not None:
            raise refused[0]
    return opening.load(
        out,
        size=settings.size,
        held_out=settings.held_out,
        seed=settings.seed,
        shift=settings.shift,
        options=settings.data,
    )


def recipe_of(settings: TrainSettings) -> Recipe:
    """Say how both stages are trained, from what a user chose."""
    two = _given(settings.stage2)
    names = ("width", "layers", "heads", "attention", "kernel", "activation", "code_width", "neighbours", "fixed_codes")
    shape = {name: two.pop(name) for name in names if name in two}
    three = _given(settings.stage3)
    vocabulary, text_length = two.pop("vocabulary"), two.pop("text_length")
    how = settings.communication
    averaged = reducer(how.reducer, how.rank, settings.precision, wire=how.wire, separate=how.separate)
    return Recipe(
        dvae=architectures.settings_of(settings.stage1, settings.size),
        stage1=stage1_settings.settings_of(settings.stage1),
        weights=settings.stage1.weights,
        vocabulary=vocabulary,
        text_length=text_length,
        transformer=shape,
        stage2=Stage2Settings(**two),
        stage3=Stage3Settings(**three) if three["steps"] else None,
        sampling=SamplingSettings(**_given(settings.sampling)),
        reducers=(averaged, averaged),
        precision=settings.precision,
        shards=settings.shard,
        pictures_every=settings.pictures_every,
        checkpoint=settings.checkpoint,
    )


def _given(options: Any) -> dict[str, Any]:
    """The options that were set, by name."""
    return {name: value for name, value in dataclasses.asdict(options).items() if value is not None}
