"""The stages, one after the other, on any source: what the demo and the training on a folder have in common."""

import contextlib
import dataclasses
import functools
import math
import time
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import distopt

from ..running.journal import RunJournal
from ..scenes.draw import to_uint8
from . import report, runs, sheets
from .architectures import AnyDVAESettings, build
from .checkpoints import RunCheckpoints, packed
from .context import Context, Source, StageResult
from .contrast import Contrast, ContrastSettings
from .model import Model
from .published import find_published, load_published
from .sampling import SamplingSettings
from .settings import CheckpointOptions, InputError
from .stage1 import train_dvae
from .stage1_settings import AnyStage1Settings
from .stage2 import Stage2Settings, train_transformer
from .stage3 import Stage3Settings, train_contrast
from .stages import STAGES, Stages
from .text import Tokenizer
from .transformer import Transformer, TransformerSettings

_TITLES = ("Stage 1: discrete VAE", "Stage 2: transformer", "Stage 3: contrastive model")
_TEXT = ("tokenizer", "text_length", "data")
_ROOM_FOR_TEXT = 4
"""Text positions beyond the longest training caption: what BPE dropout and other wordings take."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """The settings of all stages.

    Args:
        dvae: size of the discrete VAE, and its bottleneck.
        stage1: how it is trained.
        weights: a folder with a published encoder and decoder that take the place of training it.
        vocabulary: text tokens, at most.
        text_length: text tokens of a caption, at most.
        transformer: fields of ``TransformerSettings`` that neither the dVAE nor the text decides.
        stage2: how the transformer is trained.
        stage3: how the contrastive model is trained that re-ranks samples; ``None`` trains none.
        sampling: how image tokens are drawn.
        reducers: how the gradients of stages 1 and 2 are averaged; those of stage 3 as in stage 1.
        precision: "fp32", "bf16" or "fp16".
        shards: ranks that hold one copy of the model together.
        pictures_every: steps between pictures in TensorBoard; 0 shows none.
        checkpoint: when the run saves itself.
    """

    dvae: AnyDVAESettings
    stage1: AnyStage1Settings
    vocabulary: int
    text_length: int
    transformer: dict[str, Any]
    stage2: Stage2Settings
    sampling: SamplingSettings
    reducers: tuple[distopt.AllReduce | distopt.PowerSGD, distopt.AllReduce | distopt.PowerSGD]
    precision: str = "fp32"
    shards: int = 1
    pictures_every: int = 0
    weights: str | None = None
    stage3: Stage3Settings | None = None
    checkpoint: CheckpointOptions = dataclasses.field(default_factory=CheckpointOptions)

    def surroundings(self, context: Context) -> str:
        """Say who trains, and how gradients are averaged."""
        ranks = f"{context.world_size} rank{'s' if context.world_size > 1 else ''} on {context.device.type}"
        if self.shards > 1:
            copies = context.world_size // self.shards
            ranks += f", {copies} cop{'ies' if copies > 1 else 'y'} of the model on {self.shards} shards each"
        if self.precision != "fp32":
            ranks += f" in {self.precision}"
        averaged = [
            f"PowerSGD of rank {reducer.rank}" if isinstance(reducer, distopt.PowerSGD) else "exact averaging"
            for reducer in self.reducers
        ]
        return f"{ranks}, gradients by {averaged[0]} in stage 1 and {averaged[1]} in stage 2"

    def describe(self) -> dict[str, Any]:
        """Give how the run was trained, ready for JSON; the model's own settings are saved with the model."""
        return {
            "stage1": dataclasses.asdict(self.stage1) if self.weights is None else {"weights": self.weights},
            "stage2": dataclasses.asdict(self.stage2),
            "stage3": None if self.stage3 is None else dataclasses.asdict(self.stage3),
            "communication": [repr(reducer) for reducer in self.reducers],
            "precision": self.precision,
            "shards": self.shards,
        }


@dataclass(frozen=True, kw_only=True)
class Trained:
    """A trained model with how its stages went, and in which precision."""

    model: Model
    stages: Sequence[StageResult]
    precision: str

    def figures(self) -> dict[str, Any]:
        """``precision``, ``stage1``, ``stage2`` and, where there was one, ``stage3`` for the report."""
        stages = {f"stage{i}": report.stage_figures(result) for i, result in enumerate(self.stages, start=1)}
        return {"precision": self.precision, **stages}

    def draw_curves(self, out: Path) -> None:
        """Write the loss curves of all stages and, where stage 2 had them, its gradient scales."""
        curves = [result.curve for result in self.stages]
        sheets.draw_losses(out / "loss.png", dict(zip(_TITLES, curves, strict=False)))
        (out / runs.SCALES).unlink(missing_ok=True)
        if scales := self.stages[1].scales:
            sheets.draw_scales(out / runs.SCALES, scales)

    def draw_reconstructions(self, path: Path, source: Source, context: Context) -> None:
        """Write a sheet of pictures beside what their argmax tokens decode to."""
        pictures = source.pictures(30, context.rng(0, 0)).to(context.device)
        decoded = to_uint8(self.model.dvae.decode(self.model.dvae.tokenize(pictures)))
        cells = [sheets.Cell(pair) for pair in zip(to_uint8(pictures), decoded, strict=True)]
        tokens = self.model.transformer.settings.image_length
        section = sheets.Section("Reconstructions", f"left a picture, right what its {tokens} tokens decode to", cells)
        sheets.draw_sheet(path, [section], columns=6)


@contextlib.contextmanager
def journal_of(out: Path, context: Context) -> Generator[RunJournal]:
    """Begin a run in ``out``, or go on with it: it does not count as finished now."""
    if context.rank == 0:
        for name in (runs.SETTINGS, runs.REPORT):
            (out / name).unlink(missing_ok=True)
    journal = RunJournal(out if context.rank == 0 else None, shown=context.rank == 0)
    try:
        yield journal
    finally:
        journal.close()


def train(
    source: Source, recipe: Recipe, context: Context, journal: RunJournal, checkpoints: RunCheckpoints | None = None
) -> Trained:
    """Train the text tokenizer, the discrete VAE, the transformer and the contrastive model, or what is left of that.

    Args:
        source: pictures and captions.
        recipe: all settings.
        context: rank, device and seed; its reducer, precision, journal and checkpoints are set here.
        journal: shows the progress.
        checkpoints: where the run is saved and goes on from; ``None`` saves nothing.

    Returns:
        The model, equal on all ranks, and how the stages went on this one.

    Raises:
        InputError: the newest checkpoint is of other data.
    """
    going = _begun(source, recipe, context, journal, checkpoints)
    tokenizer = Tokenizer(going.facts["tokenizer"])
    stage1 = _first(going, source, recipe, context)
    dvae: Any = stage1.model.eval()
    text = {"text_vocabulary": tokenizer.vocabulary, "text_length": going.facts["text_length"]}
    settings = TransformerSettings(**text, codes=recipe.dvae.codes, grid=recipe.dvae.grid, **recipe.transformer)
    second = functools.partial(train_transformer, source, dvae, tokenizer, settings)
    stages = [stage1, going.through(2, recipe.stage2, second, functools.partial(Transformer, settings))]
    if recipe.stage3 is not None:
        seeing = ContrastSettings(**text, size=recipe.dvae.size)
        third = functools.partial(train_contrast, source, dvae, tokenizer, seeing)
        stages.append(going.through(3, recipe.stage3, third, functools.partial(Contrast, seeing)))
    transformer, *rest = (cast(Any, result.model).eval() for result in stages[1:])
    model = Model(
        dvae=dvae,
        transformer=transformer,
        tokenizer=tokenizer,
        sampling=recipe.sampling,
        contrast=rest[0] if rest else None,
    )
    return Trained(model=model, stages=stages, precision=recipe.precision)


def train_tokenizer(
    source: Source, recipe: Recipe, context: Context, journal: RunJournal, checkpoints: RunCheckpoints | None = None
) -> StageResult:
    """Train stage 1 alone, or what is left of it; `train` goes on from its checkpoint. Arguments are those of `train`.

    Raises:
        InputError: the newest checkpoint is of other data.
    """
    return _first(_begun(source, recipe, context, journal, checkpoints), source, recipe, context)


def _begun(
    source: Source, recipe: Recipe, context: Context, journal: RunJournal, checkpoints: RunCheckpoints | None
) -> Stages:
    saved = None if checkpoints is None else checkpoints.facts()
    facts = _text(source, recipe) if saved is None else {name: saved[name] for name in _TEXT}
    if saved is not None:
        _go_on(saved, source, journal)
    context = dataclasses.replace(
        context, shards=recipe.shards, precision=recipe.precision, pictures_every=recipe.pictures_every
    )
    return Stages(recipe.reducers, context, journal, checkpoints, saved, facts)


def _first(going: Stages, source: Source, recipe: Recipe, context: Context) -> StageResult:
    """Stage 1, or the weights that take its place."""
    if recipe.weights is None:
        trained = functools.partial(train_dvae, source, recipe.dvae)
        return going.through(1, recipe.stage1, trained, functools.partial(build, recipe.dvae))
    stage1 = published_dvae(Path(recipe.weights), recipe.dvae.size, context)
    going.facts["stage1"] = packed(stage1)
    return stage1


def _text(source: Source, recipe: Recipe) -> dict[str, Any]:
    """The text tokenizer and what belongs to it, which a checkpoint keeps."""
    tokenizer = Tokenizer.train(source.captions(), recipe.vocabulary)
    longest = tokenizer.longest(source.captions()) + _ROOM_FOR_TEXT
    length = min(recipe.text_length, longest)
    return {"tokenizer": tokenizer.to_json(), "text_length": length, "data": source.fingerprint}


def _go_on(saved: Mapping[str, Any], source: Source, journal: RunJournal) -> None:
    """Tell where the run goes on, if it is with the same data."""
    if saved["data"] != source.fingerprint:
        raise InputError("--data: its pictures or captions are not those that the run in --out was begun with")
    stage, step = saved["stage"], saved["step"]
    finished = {STAGES[i]: saved[f"stage{i + 1}"]["steps"] for i in range(stage - 1)}
    journal.begin({**finished, STAGES[stage - 1]: step})
    journal.say(f"goes on after step {step} of {STAGES[stage - 1]}")


def published_dvae(folder: Path, size: int, context: Context) -> StageResult:
    """What stage 1 ends with where its weights are given: no step was taken.

    Args:
        folder: has the encoder and the decoder.
        size: side of the pictures, in pixels.
        context: where the model goes.

    Raises:
        InputError: the files cannot be read.
    """
    began = time.perf_counter()
    model = load_published(*find_published(folder), size).to(context.device)
    return StageResult(model=model, steps=0, final_loss=math.nan, curve=[], wall_seconds=time.perf_counter() - began)


def seconds_since(began: float) -> float:
    """Seconds since ``began`` on the clock of ``time.perf_counter``, as the report shows them."""
    return round(time.perf_counter() - began, 1)
