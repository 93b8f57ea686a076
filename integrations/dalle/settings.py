"""What a user can set: checked by field, value and range before anything is imported that costs seconds.

This module knows nothing of torch, on purpose: a typo in a configuration file must not wait for it.
"""

import dataclasses
import re
from pathlib import Path
from typing import Any

from distopt.errors import SettingError

from ..running.fields import MAX_SEED, check, load_toml
from ..running.fields import InputError as InputError
from ..running.fields import build as build
from ..running.fields import choice as _choice
from ..running.fields import length as _length
from ..running.fields import merged as merged
from ..running.fields import number as _number
from ..running.fields import plain as _any
from ..running.fields import text as _text

PRECISIONS = ("fp32", "bf16", "fp16")
WIRES = ("float32", "bfloat16", "float16")
KINDS = ("auto", "folder", "coco", "tsv", "webdataset")
READING = ("auto", "memory", "stream")
DEMOS = ("demo", "small")
ATTENTIONS = ("full", "paper")
ACTIVATIONS = ("relu", "gelu")
RELAXED = ("relaxed", "relaxed_st")
"""Bottlenecks of stage 1 that are relaxed categorical variables: they have a temperature and an evidence bound."""
TABLES = ("vq", "ema", "simvq")
"""Bottlenecks that have a table of vectors, of which a cell takes the nearest."""
BOTTLENECKS = (*RELAXED, *TABLES, "fsq", "lfq")
PRESETS = tuple(sorted(path.stem for path in (Path(__file__).parent / "presets").glob("*.toml")))
"""Files of settings that are installed with the package, by name."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenizerOptions:
    """Of the table ``[stage1]``, what makes codes of pictures: all that the demo can be told of it."""

    codes: int | None = _number(None, 2, 65_536, "size of the codebook")
    bottleneck: str = _choice("relaxed", BOTTLENECKS, "what makes codes of the encoder's output")
    dimension: int | None = _number(None, 1, 4096, "vq, ema, simvq: features of a code's vector")
    commitment: float | None = _number(None, 0.0, 1000.0, "vq, ema, simvq: weight of the term that moves the encoder")
    rotation: bool | None = dataclasses.field(
        default=None, metadata={"meaning": "vq, ema, simvq: hand gradients to the encoder by the rotation trick"}
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stage1Options(TokenizerOptions):
    """The table ``[stage1]``: the discrete VAE. What is left out keeps the default of the architecture.

    Lengths of schedules are a whole number of steps (``5000``) or a fraction of the run (``0.05``; ``1.0``: all of it).
    """

    architecture: str = _choice("small", ("small", "paper"), "small, or the paper's encoder and decoder")
    weights: str | None = _text("folder with a published encoder and decoder, which are then not trained")
    steps: int | None = _number(None, 1, 10_000_000, "optimizer steps")
    batch: int | None = _number(None, 1, 65_536, "pictures a step, over all ranks")
    learning_rate: float | None = _number(None, 1e-8, 1.0, "its largest value")
    final_learning_rate: float | None = _number(None, 0.0, 1.0, "where it ends, as a fraction of learning_rate")
    betas: tuple[float, float] | None = _number(None, 0.0, 1 - 1e-9, "decay rates of AdamW")
    weight_decay: float | None = _number(None, 0.0, 10.0, "of AdamW, times the learning rate")
    clip: float | None = _number(None, 0.0, 1e8, "largest global norm of the gradient; 0 for none")
    averaging: float | None = _number(None, 0.0, 1 - 1e-9, "decay a step of the averaged weights; 0: the last weights")
    accumulate: int | None = _number(None, 1, 65_536, "micro-batches of a rank's share of the batch")
    patch: int = _number(4, 1, 64, "side of the pixels under one token; divides the size of the pictures")
    width: int | None = _number(None, 1, 8192, "small: channels of the residual stream")
    neck: int | None = _number(None, 1, 8192, "small: channels inside a residual block")
    n_hid: int | None = _number(None, 4, 8192, "paper: channels of the narrowest group, a multiple of 4")
    n_init: int | None = _number(None, 1, 8192, "paper: channels of a codebook vector")
    blocks: int | None = _number(None, 1, 64, "paper: residual blocks in a group")
    likelihood: str | None = _choice(None, ("mse", "logit_laplace"), "what a reconstruction is measured by")
    log_scale_floor: float | None = _number(None, -100.0, 100.0, "smallest log-width of the logit-Laplace")
    warmup: int | float | None = _length("length in which the learning rate rises")
    decay_steps: int | float | None = _length("length after which the learning rate has fallen to its end")
    tau: tuple[float, float] | None = _number(None, 1e-3, 100.0, "temperature of the relaxation at start and end")
    tau_steps: int | float | None = _length("length after which the temperature is at its end")
    beta: float | None = _number(None, 0.0, 1e4, "weight of the KL divergence at its end; it starts at 0")
    beta_steps: int | float | None = _length("length after which beta is reached")
    usage: float | None = _number(None, 0.0, 1e4, "push towards equal use of the codes at the start; it falls to 0")
    edges: float | None = _number(None, 0.0, 1e4, "how much more errors at edges weigh")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stage2Options:
    """The table ``[stage2]``: the transformer. What is left out keeps the stage's own default."""

    steps: int | None = _number(None, 1, 10_000_000, "optimizer steps")
    batch: int | None = _number(None, 1, 65_536, "pairs a step, over all ranks")
    learning_rate: float | None = _number(None, 1e-8, 1.0, "its largest value")
    warmup: int | float | None = _length("length in which the learning rate rises")
    decay_steps: int | float | None = _length("length after which the learning rate has fallen to its end")
    final_learning_rate: float | None = _number(None, 0.0, 1.0, "where it ends, as a fraction of learning_rate")
    betas: tuple[float, float] | None = _number(None, 0.0, 1 - 1e-9, "decay rates of AdamW")
    weight_decay: float | None = _number(None, 0.0, 10.0, "of AdamW, times the learning rate")
    clip: float | None = _number(None, 0.0, 1e8, "largest global norm of the gradient; 0 for none")
    averaging: float | None = _number(None, 0.0, 1 - 1e-9, "part of the steps that weights are averaged over; 0: none")
    accumulate: int | None = _number(None, 1, 65_536, "micro-batches of a rank's share of the batch")
    bpe_dropout: float | None = _number(None, 0.0, 1 - 1e-9, "share of merges of text tokens passed over in training")
    uncaptioned: float | None = _number(None, 0.0, 1 - 1e-9, "share of the batch without captions")
    width: int = _number(128, 8, 8192, "features of a position")
    layers: int | None = _number(None, 1, 256, "pairs of attention and MLP")
    heads: int = _number(4, 1, 256, "attention heads; they divide the width")
    vocabulary: int = _number(1024, 2, 65_536, "text tokens, at most")
    text_length: int = _number(32, 1, 1024, "text tokens of a caption, at most; what is longer is cut")
    attention: str = _choice("full", ATTENTIONS, "to all that came before, or by rows, columns and a last convolution")
    kernel: int = _number(11, 1, 63, "side of the square that the convolution sees, an odd number")
    activation: str = _choice("relu", ACTIVATIONS, "of the MLP")
    code_width: int = _number(64, 0, 8192, "features of a code's vector; 0 embeds codes at the full width")
    fixed_codes: bool = _any(False, "leave the codes' vectors as they start: good for plain forms in plain colours")
    neighbours: int = _number(3, 0, 3, "codes above a slot that are fed to it besides the previous one")


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckpointOptions:
    """The table ``[checkpoint]``: when a run saves itself, besides at the end of each stage."""

    every_steps: int = _number(0, 0, 10_000_000, "steps between two saves; 0: not by steps")
    every_seconds: float = _number(120.0, 0.0, 1e7, "seconds between two saves; 0: not by time")
    keep: int = _number(2, 1, 1000, "how many of the newest are kept")
    exact: bool = dataclasses.field(
        default=True, metadata={"meaning": "save each rank's residuals, not only their mean"}
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stage3Options:
    """The table ``[stage3]``: the contrastive model that re-ranks samples. What is left out keeps its own default."""

    steps: int = _number(0, 0, 10_000_000, "optimizer steps; 0 trains no such model")
    batch: int | None = _number(None, 2, 65_536, "pairs a step, over all ranks; a multiple of group")
    learning_rate: float | None = _number(None, 1e-8, 1.0, "its largest value")
    accumulate: int | None = _number(None, 1, 65_536, "micro-batches of a rank's share of the batch")
    group: int | None = _number(None, 2, 4096, "pairs that are compared with each other")
    pool: int | None = _number(None, 2, 65_536, "pairs that a group is chosen from, by how many words they share")


@dataclasses.dataclass(frozen=True, kw_only=True)
class CommunicationOptions:
    """The table ``[communication]``: how the ranks average their gradients."""

    reducer: str = _choice("powersgd", ("powersgd", "allreduce"), "compressed, or exact")
    rank: int = _number(4, 1, 1024, "rank of the compressed gradient, of each shard's: higher costs more, loses less")
    wire: str = _choice("float32", WIRES, "type that the compressed gradient travels in")
    separate: bool = _any(False, "compress queries, keys and values apart; the shards must divide the width")


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingOptions:
    """The table ``[sampling]``: how image tokens are drawn."""

    temperature: float = _number(1.0, 0.01, 10.0, "below 1 prefers likely tokens")
    top_k: int | None = _number(None, 1, 65_536, "draw from the k likeliest tokens only")
    top_p: float | None = _number(None, 1e-6, 1.0, "draw from the likeliest tokens that have this probability together")
    guidance: float | None = _number(None, 0.0, 100.0, "how much more the caption counts; 1 is plain sampling")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataOptions:
    """The table ``[data]``: what ``--data`` names, how it is read, and which of it is left out."""

    kind: str = _choice("auto", KINDS, "what --data names; auto goes by its ending")
    images: str | None = _text("folder that the pictures of a .json or .tsv lie in")
    caption_column: int = _number(1, 1, 1000, "column of a .tsv that has the captions")
    picture_column: int = _number(2, 1, 1000, "column of a .tsv that has the paths of the pictures")
    caption_field: str = _any("caption", "name of the caption in the .json of a sample of a tar shard that has no .txt")
    reading: str = _choice("auto", READING, "decode all pictures once, into memory, or as they are needed")
    workers: int = _number(2, 1, 256, "threads of each rank that decode pictures")
    prefetch: int = _number(2, 0, 64, "batches that are decoded ahead")
    augmentation: str = _choice("none", ("none", "paper"), "none: the central square; paper: random crops")
    filters: str = _choice("none", ("none", "paper"), "what is left out, where nothing else is said of it")
    shortest: int | None = _number(None, 0, 1000, "words of a caption, at least")
    boilerplate: str | None = _text("regular expression; a caption in which it is found is left out")
    latin: float | None = _number(None, 0.0, 1.0, "share of a caption's letters that are a to z, at least")
    aspect: float | None = _number(None, 1.0, 1000.0, "longer side of a picture over the shorter one, at most")
    captions_read: int = _number(200_000, 1, 100_000_000, "captions that the text tokenizer learns from, at most")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """Everything that ``distopt-dalle train`` can be told by its TOML file, which has these names and tables.

    Args:
        size: side of the squares that pictures are cut and resized to, in pixels; a multiple of ``stage1.patch``.
        seed: decides initial weights, batches and samples.
        held_out: fraction of the pictures that is never trained on, chosen by a hash of their names.
        shift: augmentation: move pictures by up to so many pixels (0: as they are; never mirrored, for text's sake).
        precision: "fp32", "bf16" or "fp16": what products are computed in; 16 bits bring scaled gradients along, and
            16-bit moments and residuals.
        shard: ranks that hold one copy of the model together; they divide the number of ranks. With 1 every rank has
            its own.
        stage1: the discrete VAE.
        stage2: the transformer.
        stage3: the contrastive model.
        communication: how gradients are averaged.
        pictures_every: steps between pictures in TensorBoard; 0 draws none.
        sampling: how image tokens are drawn.
        checkpoint: when the run saves itself.
        data: what the pictures are read from, and which are left out.

    Raises:
        SettingError: a value is of the wrong type or out of range.

    Example:
        >>> TrainSettings(size=30)
        Traceback (most recent call last):
        distopt.errors.SettingError: size is 30, but must be a multiple of stage1.patch, which is 4
    """

    size: int = _number(32, 8, 512, "side of the pictures in pixels, a multiple of stage1.patch")
    seed: int = _number(0, 0, MAX_SEED, "decides initial weights, batches and samples")
    held_out: float = _number(0.1, 0.0, 0.9, "fraction of the pictures that is never trained on")
    shift: int = _number(0, 0, 64, "move training pictures by up to so many pixels")
    precision: str = _choice("fp32", PRECISIONS, "what products are computed in")
    shard: int = _number(1, 1, 1024, "ranks that hold one copy of the model together")
    stage1: Stage1Options = Stage1Options()
    stage2: Stage2Options = Stage2Options()
    stage3: Stage3Options = Stage3Options()
    communication: CommunicationOptions = CommunicationOptions()
    pictures_every: int = _number(500, 0, 10_000_000, "steps between pictures in TensorBoard; 0: none")
    sampling: SamplingOptions = SamplingOptions()
    checkpoint: CheckpointOptions = CheckpointOptions()
    data: DataOptions = DataOptions()

    def __post_init__(self) -> None:
        check(self)
        if self.size % self.stage1.patch:
            raise SettingError("size", self.size, f"a multiple of stage1.patch, which is {self.stage1.patch}")
        if self.data.boilerplate is not None:
            try:
                re.compile(self.data.boilerplate)
            except re.error as error:
                allowed = f"a regular expression: {error}"
                raise SettingError("data.boilerplate", self.data.boilerplate, allowed) from None
        _check_architecture(self.stage1)
        _check_bottleneck(self.stage1)
        width, heads = self.stage2.width, self.stage2.heads
        if width % heads:
            raise SettingError("stage2.width", width, f"a multiple of stage2.heads, which is {heads}")
        if self.stage2.kernel % 2 == 0:
            raise SettingError("stage2.kernel", self.stage2.kernel, "an odd number")
        if self.stage2.neighbours and not self.stage2.code_width:
            raise SettingError("stage2.neighbours", self.stage2.neighbours, "0 where stage2.code_width is 0")
        if self.communication.separate and width % self.shard:
            raise SettingError(
                "stage2.width", width, f"a multiple of shard, which is {self.shard}, for separate = true"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class DemoSettings:
    """What ``distopt-dalle demo`` can be told; all else is fixed, so that its scores mean something.

    Args:
        preset: "demo", ten minutes on two cores, or "small", an hour at most.
        seed: decides initial weights, batches and samples; the task itself is always the same.
        stage1: which tokenizer is trained.
        steps_1: optimizer steps of stage 1, for a quick look; ``None`` is the preset.
        steps_2: the same for stage 2.
        steps_3: the same for stage 3, the contrastive model; 0 trains none.
        reducer: "powersgd" or "allreduce".
        rank: of PowerSGD; ``None`` is the preset's own.
        precision: "fp32", "bf16" or "fp16", as for ``TrainSettings``.
        shard: as for ``TrainSettings``.
        n: captions scored in each split.
        pictures_every: steps between pictures in TensorBoard; 0 draws none.
        checkpoint: when the run saves itself.

    Raises:
        SettingError: a value is of the wrong type or out of range.
    """

    preset: str = _choice("demo", DEMOS, "how long to train")
    seed: int = _number(0, 0, MAX_SEED, "decides initial weights, batches and samples")
    stage1: TokenizerOptions = TokenizerOptions()
    steps_1: int | None = _number(None, 1, 10_000_000, "optimizer steps of stage 1")
    steps_2: int | None = _number(None, 1, 10_000_000, "optimizer steps of stage 2")
    steps_3: int | None = _number(None, 0, 10_000_000, "optimizer steps of stage 3; 0 trains none")
    reducer: str = _choice("powersgd", ("powersgd", "allreduce"), "compressed, or exact")
    rank: int | None = _number(None, 1, 1024, "rank of the compressed gradient")
    precision: str = _choice("fp32", PRECISIONS, "what products are computed in")
    shard: int = _number(1, 1, 1024, "ranks that hold one copy of the model together")
    n: int = _number(400, 1, 100_000, "captions scored in each split")
    pictures_every: int = _number(500, 0, 10_000_000, "steps between pictures in TensorBoard; 0: none")
    checkpoint: CheckpointOptions = CheckpointOptions()

    def __post_init__(self) -> None:
        check(self)
        _check_bottleneck(self.stage1)


_OF_ONE = {"width": "small", "neck": "small", "n_hid": "paper", "n_init": "paper", "blocks": "paper"}
"""Fields of stage 1 that only one architecture has."""


def _check_architecture(stage1: Stage1Options) -> None:
    chosen = stage1.architecture
    for name, architecture in _OF_ONE.items():
        if getattr(stage1, name) is not None and chosen != architecture:
            raise SettingError(f"stage1.{name}", getattr(stage1, name), f"left out: it is of the {architecture} dVAE")
    if chosen == "paper" and stage1.patch.bit_count() != 1:
        raise SettingError("stage1.patch", stage1.patch, "a power of two for the paper's dVAE")
    if chosen == "paper" and stage1.n_hid is not None and stage1.n_hid % 4:
        raise SettingError("stage1.n_hid", stage1.n_hid, "a multiple of 4")
    if chosen != "paper" and stage1.weights is not None:
        raise SettingError("stage1.architecture", chosen, "paper, which the published weights are of")


_OF_RELAXED = ("tau", "tau_steps", "beta", "beta_steps", "usage")
_OF_TABLES = ("dimension", "commitment", "rotation")


def _check_bottleneck(stage1: TokenizerOptions) -> None:
    """Refuse what only other bottlenecks have."""
    chosen = stage1.bottleneck
    for names, kinds in ((_OF_RELAXED, RELAXED), (_OF_TABLES, TABLES)):
        for name in names:
            value = getattr(stage1, name, None)
            if value is not None and chosen not in kinds:
                allowed = f"left out: bottleneck is {chosen}, it is of {', '.join(kinds)}"
                raise SettingError(f"stage1.{name}", value, allowed)
    if chosen != "relaxed" and getattr(stage1, "weights", None) is not None:
        raise SettingError("stage1.bottleneck", chosen, "relaxed, which the published weights are of")


def check_shard(settings: TrainSettings | DemoSettings, ranks: int) -> None:
    """Refuse copies of the model that cannot be divided over the ranks.

    Raises:
        SettingError: names both numbers.

    Example:
        >>> check_shard(DemoSettings(shard=2), 3)
        Traceback (most recent call last):
        distopt.errors.SettingError: shard is 2, but must be a divisor of the number of ranks, which is 3
    """
    if ranks % settings.shard:
        raise SettingError("shard", settings.shard, f"a divisor of the number of ranks, which is {ranks}")


def check_batch(settings: TrainSettings, ranks: int) -> None:
    """Refuse a batch that cannot be divided over the ranks; one that the user left out is made to fit.

    Raises:
        SettingError: names the stage.
    """
    for name in ("stage1", "stage2"):
        options = getattr(settings, name)
        parts = options.accumulate or 1
        if options.batch is not None and options.batch % (ranks * parts):
            allowed = f"a multiple of the number of ranks, which is {ranks}"
            allowed += f", times {name}.accumulate, which is {parts}" if parts > 1 else ""
            raise SettingError(f"{name}.batch", options.batch, allowed)


def preset(name: str) -> dict[str, Any]:
    """Read one of `PRESETS`.

    Example:
        >>> preset("paper-12b")["stage2"]["layers"]
        64
    """
    return load_toml(Path(__file__).with_name("presets") / f"{name}.toml")
