"""The demo: trains both stages on the drawn task, scores what the model draws, and writes everything to one folder."""

import dataclasses
import time
from pathlib import Path

from ..scenes.draw import Scenes
from . import pages, recipe, report, resume, runs
from .architectures import AnyDVAESettings, quantized
from .checkpoints import RunCheckpoints
from .context import Context
from .dvae import DVAESettings
from .evaluate import score_best_of, score_scenes
from .precision import reducer
from .recipe import Recipe
from .sampling import SamplingSettings
from .settings import RELAXED, DemoSettings, TokenizerOptions
from .stage1_settings import AnyStage1Settings, Stage1Settings, quantized_settings
from .stage2 import Stage2Settings
from .stage3 import Stage3Settings


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Size:
    """What the presets differ in; ``ranks`` are PowerSGD's in each stage."""

    dvae: DVAESettings
    stage1: Stage1Settings
    stage2: Stage2Settings
    stage3: Stage3Settings
    ranks: tuple[int, int]


def _size(preset: str) -> _Size:
    # Pairs that no caption names are drawn three times as often as under the paper's decay, 0.045.
    decay = 0.5
    if preset == "small":
        return _Size(
            dvae=DVAESettings(codes=256),
            stage1=Stage1Settings(steps=12_000, averaging=0.999),
            stage2=Stage2Settings(steps=12_000, weight_decay=decay),
            stage3=Stage3Settings(steps=2_000),
            ranks=(16, 8),
        )
    return _Size(
        dvae=DVAESettings(),
        stage1=Stage1Settings(steps=3_700),
        stage2=Stage2Settings(steps=3_800, weight_decay=decay),
        stage3=Stage3Settings(),
        # At rank 4 the tokenizer loses three pictures in a hundred.
        ranks=(8, 6),
    )


_VOCABULARY = 256
_TEXT_LENGTH = 24
_SHOWN = 8
"""Samples of each split on the sheet: one row."""


def run(settings: DemoSettings, out: Path, context: Context) -> None:
    """Train, score and write; every rank calls it.

    Args:
        settings: what the user chose.
        out: the run's folder, which exists.
        context: rank, device and seed.
    """
    began = time.perf_counter()
    task = Scenes()
    chosen = recipe_of(settings)
    with recipe.journal_of(out, context) as journal:
        journal.say(f"{chosen.surroundings(context)}; writing to {out}")
        checkpoints = RunCheckpoints(out / resume.CHECKPOINTS, chosen.checkpoint, context)
        trained = recipe.train(task, chosen, context, journal, checkpoints)
        journal.say(f"sampling and scoring {settings.n} captions of each split")
        figures, samples = score_scenes(trained.model, task, n=settings.n, show=_SHOWN, context=context)
        best, chosen_of = score_best_of(trained.model, task, n=settings.n, context=context)
    if context.rank != 0:
        return
    full = {
        **figures,
        **best,
        **trained.figures(),
        "world_size": context.world_size,
        "seed": settings.seed,
        "wall_seconds": recipe.seconds_since(began),
        "task": {**task.describe(), "sampling": dataclasses.asdict(chosen.sampling)},
        "training": chosen.describe(),
        "peak_memory_bytes": report.peak_memory(),
        **report.device_memory(),
        "versions": report.versions(),
    }
    pages.draw_samples(out / "samples.png", figures, samples)
    (out / runs.CHOICES).unlink(missing_ok=True)
    if chosen_of:
        pages.draw_choices(out / runs.CHOICES, best["best_of"], chosen_of)
    trained.draw_reconstructions(out / "reconstructions.png", task, context)
    trained.draw_curves(out)
    runs.write_json(out / runs.REPORT, report.finite(full))
    kept = {"seed": settings.seed, "n": settings.n, "task_seed": task.seed, "training": chosen.describe()}
    trained.model.save(out, "demo", kept)
    resume.finish(out)
    lines = [
        *report.score_lines(full),
        *report.best_of_lines(full),
        *report.stage_lines(full),
        *report.precision_lines(full),
        *report.file_lines(out),
    ]
    print(report.framed(f"distopt-dalle demo: {full['wall_seconds']:.0f} s on {context.world_size} ranks", lines))


def _tokenizer(size: _Size, options: TokenizerOptions) -> tuple[AnyDVAESettings, AnyStage1Settings]:
    """The tokenizer and how it is trained: as long as the preset's own, whatever its bottleneck."""
    dvae, own = size.dvae, size.stage1
    if options.codes is not None:
        dvae = dataclasses.replace(dvae, codes=options.codes)
    if options.bottleneck in RELAXED:
        return dvae, dataclasses.replace(own, hard=True) if options.bottleneck == "relaxed_st" else own
    stage1 = quantized_settings(options.bottleneck, steps=own.steps, averaging=own.averaging, start=own.start)
    return quantized(dvae, options), stage1


def recipe_of(settings: DemoSettings) -> Recipe:
    """Say how all stages are trained, from what a user chose."""
    size = _size(settings.preset)
    dvae, stage1 = _tokenizer(size, settings.stage1)
    stage2 = size.stage2
    if settings.steps_1 is not None:
        stage1 = dataclasses.replace(stage1, steps=settings.steps_1)
    if settings.steps_2 is not None:
        stage2 = dataclasses.replace(stage2, steps=settings.steps_2)
    stage3 = size.stage3 if settings.steps_3 != 0 else None
    if stage3 is not None and settings.steps_3 is not None:
        stage3 = dataclasses.replace(stage3, steps=settings.steps_3)
    first, second = (reducer(settings.reducer, settings.rank or default, settings.precision) for default in size.ranks)
    return Recipe(
        dvae=dvae,
        stage1=stage1,
        vocabulary=_VOCABULARY,
        text_length=_TEXT_LENGTH,
        transformer={"fixed_codes": True},
        stage2=stage2,
        stage3=stage3,
        sampling=SamplingSettings(),
        reducers=(first, second),
        precision=settings.precision,
        shards=settings.shard,
        pictures_every=settings.pictures_every,
        checkpoint=settings.checkpoint,
    )
