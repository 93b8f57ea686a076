"""The stages, one after the other, on any source: what the demo and the training on a folder have in common."""

import contextlib
import dataclasses
import hashlib
import math
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from torch import nn

import distopt

from . import report, runs, sheets
from .architectures import AnyDVAESettings, build
from .checkpoints import RunCheckpoints, StageSaver, packed, unpacked
from .context import Context, Source, StageResult
from .contrast import Contrast, ContrastSettings
from .journal import RunJournal
from .model import Model
from .published import find_published, load_published
from .sampling import SamplingSettings
from .scenes import to_uint8
from .settings import InputError
from .stage1 import Stage1Settings, train_dvae
from .stage2 import Stage2Settings, train_transformer
from .stage3 import Stage3Settings, train_contrast
from .text import Tokenizer
from .transformer import Transformer, TransformerSettings

_Stage = TypeVar("_Stage", Stage1Settings, Stage2Settings, Stage3Settings)
STAGES = ("stage 1", "stage 2", "stage 3")
_TITLES = ("Stage 1: discrete VAE", "Stage 2: transformer", "Stage 3: contrastive model")
_TEXT = ("tokenizer", "text_length", "captions")
_ROOM_FOR_TEXT = 4
"""Text positions beyond the longest training caption: what BPE dropout and other wordings take."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """The settings of all stages.

    Args:
        dvae: size of the discrete VAE.
        stage1: how it is trained.
        weights: a folder with a published encoder and decoder that take the place of training it.
        vocabulary: text tokens, at most.
        text_length: text tokens of a caption, at most.
        transformer: fields of ``TransformerSettings`` that neither the dVAE nor the text decides.
        stage2: how the transformer is trained.
        sampling: how image tokens are drawn.
        reducers: how the gradients of each stage are averaged; the last one also those of all that follow.
        stage3: how the contrastive model is trained; ``None`` trains none.
        precision: "fp32", "bf16" or "fp16".
        shards: ranks that hold one copy of the model together.
        pictures_every: steps between pictures in TensorBoard; 0 shows none.
    """

    dvae: AnyDVAESettings
    stage1: Stage1Settings
    vocabulary: int
    text_length: int
    transformer: dict[str, Any]
    stage2: Stage2Settings
    sampling: SamplingSettings
    reducers: Sequence[distopt.AllReduce | distopt.PowerSGD]
    stage3: Stage3Settings | None = None
    precision: str = "fp32"
    shards: int = 1
    pictures_every: int = 0
    weights: str | None = None

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
    """A trained model with how its stages went, and in which precision; not every model has a third stage."""

    model: Model
    stage1: StageResult
    stage2: StageResult
    precision: str
    stage3: StageResult | None = None

    @property
    def stages(self) -> list[StageResult]:
        """Those that there were, in their order."""
        return [stage for stage in (self.stage1, self.stage2, self.stage3) if stage is not None]

    def figures(self) -> dict[str, Any]:
        """``precision``, ``stage1``, ``stage2`` and, where there was one, ``stage3`` for the report."""
        stages = {f"stage{number}": report.stage_figures(stage) for number, stage in enumerate(self.stages, 1)}
        return {"precision": self.precision, **stages}

    def draw_curves(self, out: Path) -> None:
        """Write the loss curves of all stages and, where stage 2 had them, its gradient scales."""
        curves = [stage.curve for stage in self.stages]
        sheets.draw_losses(out / "loss.png", dict(zip(_TITLES, curves, strict=False)))
        (out / runs.SCALES).unlink(missing_ok=True)
        if self.stage2.scales:
            sheets.draw_scales(out / runs.SCALES, self.stage2.scales)

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
    """Train the text tokenizer and the networks of all stages, or what is left of that.

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
    saved = None if checkpoints is None else checkpoints.facts()
    facts = _text(source, recipe) if saved is None else {name: saved[name] for name in _TEXT}
    if saved is not None:
        _go_on(saved, source, journal)
    tokenizer = Tokenizer(facts["tokenizer"])
    shared = dataclasses.replace(
        context, shards=recipe.shards, precision=recipe.precision, pictures_every=recipe.pictures_every
    )

    def stage(
        number: int, how: _Stage, shape: Callable[[], nn.Module], run: Callable[[_Stage, Context], StageResult]
    ) -> StageResult:
        """Train a stage, unless the checkpoint is of a later one and has it."""
        done = 0 if saved is None else saved["stage"]
        if saved is not None and done > number:
            result = unpacked(saved[f"stage{number}"], shape().to(context.device))
        elif number == 1 and recipe.weights is not None:
            result = published_dvae(Path(recipe.weights), recipe.dvae.size, context)
        else:
            with _stage(number, shared, recipe, journal, checkpoints, facts, resumed=done == number) as surroundings:
                result = run(_divisible(how, context.world_size), surroundings)
        facts[f"stage{number}"] = packed(result)
        return result

    stage1 = stage(
        1, recipe.stage1, lambda: build(recipe.dvae), lambda how, where: train_dvae(source, recipe.dvae, how, where)
    )
    dvae: Any = stage1.model.eval()
    size = TransformerSettings(
        text_vocabulary=tokenizer.vocabulary,
        text_length=facts["text_length"],
        codes=recipe.dvae.codes,
        grid=recipe.dvae.grid,
        **recipe.transformer,
    )
    stage2 = stage(
        2,
        recipe.stage2,
        lambda: Transformer(size),
        lambda how, where: train_transformer(source, dvae, tokenizer, size, how, where),
    )
    model = Model(dvae=dvae, transformer=stage2.model.eval(), tokenizer=tokenizer, sampling=recipe.sampling)
    trained = Trained(model=model, stage1=stage1, stage2=stage2, precision=recipe.precision)
    if recipe.stage3 is None:
        return trained
    shape = ContrastSettings(
        text_vocabulary=tokenizer.vocabulary, text_length=facts["text_length"], size=recipe.dvae.size
    )
    stage3 = stage(
        3,
        recipe.stage3,
        lambda: Contrast(shape),
        lambda how, where: train_contrast(source, dvae, tokenizer, shape, how, where),
    )
    model = dataclasses.replace(model, contrast=stage3.model.eval())
    return dataclasses.replace(trained, model=model, stage3=stage3)


@contextlib.contextmanager
def _stage(
    number: int,
    context: Context,
    recipe: Recipe,
    journal: RunJournal,
    checkpoints: RunCheckpoints | None,
    facts: Mapping[str, Any],
    *,
    resumed: bool,
) -> Generator[Context]:
    """The surroundings of one stage."""
    reducer = recipe.reducers[min(number, len(recipe.reducers)) - 1]
    before = sum(stage.steps for stage in (recipe.stage1, recipe.stage2)[: number - 1])
    with journal.stage(STAGES[number - 1]) as stage:
        context = dataclasses.replace(context, reducer=reducer, journal=stage)
        saver = None
        if checkpoints is not None:
            saver = StageSaver(checkpoints, context, number, before, facts, resumed=resumed)
        yield dataclasses.replace(context, checkpoints=saver)


def _text(source: Source, recipe: Recipe) -> dict[str, Any]:
    """The text tokenizer and what belongs to it, which a checkpoint keeps."""
    tokenizer = Tokenizer.train(source.captions(), recipe.vocabulary)
    longest = tokenizer.longest(source.captions()) + _ROOM_FOR_TEXT
    length = min(recipe.text_length, longest)
    return {"tokenizer": tokenizer.to_json(), "text_length": length, "captions": _digest(source)}


def _go_on(saved: Mapping[str, Any], source: Source, journal: RunJournal) -> None:
    """Tell where the run goes on, if it is with the same data."""
    if saved["captions"] != _digest(source):
        raise InputError("--data: its captions are not those that the run in --out was begun with")
    stage, step = saved["stage"], saved["step"]
    done = {STAGES[number - 1]: saved[f"stage{number}"]["steps"] for number in range(1, stage)}
    done[STAGES[stage - 1]] = step
    journal.begin(done)
    journal.say(f"goes on after step {step} of {STAGES[stage - 1]}")


def _digest(source: Source) -> str:
    digest = hashlib.sha256()
    for caption in source.captions():
        digest.update(caption.encode("utf-8", "surrogateescape") + b"\n")
    return digest.hexdigest()


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


def _divisible(settings: _Stage, ranks: int) -> _Stage:
    """The settings with the batch raised to what the ranks and their micro-batches divide: any number can run them."""
    parts = ranks * settings.accumulate * getattr(settings, "group", 1)
    return dataclasses.replace(settings, batch=math.ceil(settings.batch / parts) * parts)


def seconds_since(began: float) -> float:
    """Seconds since ``began`` on the clock of ``time.perf_counter``, as the report shows them."""
    return round(time.perf_counter() - began, 1)
