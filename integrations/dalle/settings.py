"""What a user can set: checked by field, value and range before anything is imported that costs seconds.

This module knows nothing of torch, on purpose: a typo in a configuration file must not wait for it.
"""

import dataclasses
import re
import tomllib
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from distopt.errors import DistoptError, SettingError

MAX_SEED = 2**63 - 1
PRECISIONS = ("fp32", "bf16", "fp16")
WIRES = ("float32", "bfloat16", "float16")
KINDS = ("auto", "folder", "coco", "tsv", "webdataset")
READING = ("auto", "memory", "stream")
DEMOS = ("demo", "small")
ATTENTIONS = ("full", "paper")
ACTIVATIONS = ("relu", "gelu")
PRESETS = tuple(sorted(path.stem for path in (Path(__file__).parent / "presets").glob("*.toml")))
"""Files of settings that are installed with the package, by name."""
_T = TypeVar("_T")
_WORDS = {int: "a whole number", float: "a number", bool: "true or false", str: "a text", dict: "a table"}


class InputError(DistoptError):
    """A folder, a file or a run that the user named cannot be worked with; the message says why in one line."""


def _number(default: Any, low: float, high: float, meaning: str) -> Any:
    return dataclasses.field(default=default, metadata={"low": low, "high": high, "meaning": meaning})


def _choice(default: Any, options: tuple[str, ...], meaning: str) -> Any:
    return dataclasses.field(default=default, metadata={"options": options, "meaning": meaning})


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stage1Options:
    """The table ``[stage1]``: the discrete VAE. What is left out keeps the stage's own default."""

    steps: int | None = _number(None, 1, 10_000_000, "optimizer steps")
    batch: int | None = _number(None, 1, 65_536, "pictures a step, over all ranks")
    learning_rate: float | None = _number(None, 1e-8, 1.0, "its largest value")
    codes: int | None = _number(None, 2, 65_536, "size of the codebook")
    patch: int = _number(4, 1, 64, "side of the pixels under one token; divides the size of the pictures")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stage2Options:
    """The table ``[stage2]``: the transformer. What is left out keeps the stage's own default."""

    steps: int | None = _number(None, 1, 10_000_000, "optimizer steps")
    batch: int | None = _number(None, 1, 65_536, "pairs a step, over all ranks")
    learning_rate: float | None = _number(None, 1e-8, 1.0, "its largest value")
    width: int = _number(128, 8, 8192, "features of a position")
    layers: int | None = _number(None, 1, 256, "pairs of attention and MLP")
    heads: int = _number(4, 1, 256, "attention heads; they divide the width")
    vocabulary: int = _number(1024, 2, 65_536, "text tokens, at most")
    text_length: int = _number(32, 1, 1024, "text tokens of a caption, at most; what is longer is cut")
    attention: str = _choice("full", ATTENTIONS, "to all that came before, or by rows, columns and a last convolution")
    kernel: int = _number(11, 1, 63, "side of the square that the convolution sees, an odd number")
    activation: str = _choice("relu", ACTIVATIONS, "of the MLP")
    code_width: int = _number(64, 0, 8192, "features of a code's vector; 0 embeds codes at the full width")
    fixed_codes: bool = True
    """Leave the codes' vectors as they start, from what each code looks like."""
    neighbours: int = _number(3, 0, 3, "codes above a slot that are fed to it besides the previous one")


@dataclasses.dataclass(frozen=True, kw_only=True)
class CommunicationOptions:
    """The table ``[communication]``: how the ranks average their gradients."""

    reducer: str = _choice("powersgd", ("powersgd", "allreduce"), "compressed, or exact")
    rank: int = _number(4, 1, 1024, "rank of the compressed gradient, of each shard's: higher costs more, loses less")
    wire: str = _choice("float32", WIRES, "type that the compressed gradient travels in")
    separate: bool = False
    """Compress queries, keys and values apart; the shards must divide the width."""


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
    images: str | None = None
    """Folder that the pictures of a .json or .tsv lie in; without it, it is looked for beside that file."""
    caption_column: int = _number(1, 1, 1000, "column of a .tsv that has the captions")
    picture_column: int = _number(2, 1, 1000, "column of a .tsv that has the paths of the pictures")
    caption_field: str = "caption"
    """Name of the caption in the .json of a sample of a tar shard that has no .txt."""
    reading: str = _choice("auto", READING, "decode all pictures once, into memory, or as they are needed")
    workers: int = _number(2, 1, 256, "threads of each rank that decode pictures")
    prefetch: int = _number(2, 0, 64, "batches that are decoded ahead")
    augmentation: str = _choice("none", ("none", "paper"), "none: the central square; paper: random crops")
    filters: str = _choice("none", ("none", "paper"), "what is left out, where nothing else is said of it")
    shortest: int | None = _number(None, 0, 1000, "words of a caption, at least")
    boilerplate: str | None = None
    """Regular expression; a caption in which it is found is left out."""
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
        communication: how gradients are averaged.
        sampling: how image tokens are drawn.
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
    communication: CommunicationOptions = CommunicationOptions()
    sampling: SamplingOptions = SamplingOptions()
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
        steps_1: optimizer steps of stage 1, for a quick look; ``None`` is the preset.
        steps_2: the same for stage 2.
        reducer: "powersgd" or "allreduce".
        rank: of PowerSGD; ``None`` is the preset's own.
        precision: "fp32", "bf16" or "fp16", as for ``TrainSettings``.
        shard: as for ``TrainSettings``.
        n: captions scored in each split.

    Raises:
        SettingError: a value is of the wrong type or out of range.
    """

    preset: str = _choice("demo", DEMOS, "how long to train")
    seed: int = _number(0, 0, MAX_SEED, "decides initial weights, batches and samples")
    steps_1: int | None = _number(None, 1, 10_000_000, "optimizer steps of stage 1")
    steps_2: int | None = _number(None, 1, 10_000_000, "optimizer steps of stage 2")
    reducer: str = _choice("powersgd", ("powersgd", "allreduce"), "compressed, or exact")
    rank: int | None = _number(None, 1, 1024, "rank of the compressed gradient")
    precision: str = _choice("fp32", PRECISIONS, "what products are computed in")
    shard: int = _number(1, 1, 1024, "ranks that hold one copy of the model together")
    n: int = _number(400, 1, 100_000, "captions scored in each split")

    def __post_init__(self) -> None:
        check(self)


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
        batch = getattr(settings, name).batch
        if batch is not None and batch % ranks:
            raise SettingError(f"{name}.batch", batch, f"a multiple of the number of ranks, which is {ranks}")


def check(settings: Any, prefix: str = "") -> None:
    """Check the type and the range of every field, tables included.

    Raises:
        SettingError: names the first field that is wrong, as ``table.field``.
    """
    for field, allowed in _fields(type(settings)):
        value, name = getattr(settings, field.name), prefix + field.name
        if dataclasses.is_dataclass(value):
            check(value, name + ".")
        elif not (value is None and type(None) in allowed):
            _check_value(name, value, field, allowed)


def build(kind: type[_T], table: Mapping[str, Any], prefix: str = "") -> _T:
    """Make settings from a table as TOML gives it; unknown names and wrong types are refused.

    Args:
        kind: a dataclass of settings.
        table: values by field name, nested tables as mappings.
        prefix: what to put before a name in an error.

    Returns:
        An instance of ``kind``.

    Raises:
        SettingError: a name is unknown, or a value is of the wrong type or out of range.

    Example:
        >>> build(TrainSettings, {"stage1": {"steps": 10}}).stage1.steps
        10
    """
    fields = {field.name: (field, allowed) for field, allowed in _fields(kind)}
    values: dict[str, Any] = {}
    for name, value in table.items():
        if name not in fields:
            where = f"[{prefix.rstrip('.')}]" if prefix else "the file"
            raise SettingError(prefix + name, value, f"left out: the names in {where} are {', '.join(fields)}")
        field, allowed = fields[name]
        inner = next((option for option in allowed if dataclasses.is_dataclass(option)), None)
        if inner is not None:
            if not isinstance(value, Mapping):
                raise SettingError(prefix + name, value, f"a table: [{prefix}{name}]")
            value = build(inner, value, f"{prefix}{name}.")
        else:
            value = _check_value(prefix + name, value, field, allowed)
        values[name] = value
    return kind(**values)


def preset(name: str) -> dict[str, Any]:
    """Read one of `PRESETS`.

    Example:
        >>> preset("paper-12b")["stage2"]["layers"]
        64
    """
    return load_toml(Path(__file__).with_name("presets") / f"{name}.toml")


def merged(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Lay one table over another, tables inside them likewise.

    Example:
        >>> merged({"a": {"x": 1, "y": 2}, "b": 3}, {"a": {"y": 4}})
        {'a': {'x': 1, 'y': 4}, 'b': 3}
    """
    table = dict(below)
    for name, value in above.items():
        both = isinstance(value, Mapping) and isinstance(table.get(name), Mapping)
        table[name] = merged(table[name], value) if both else value
    return table


def load_toml(path: Path) -> dict[str, Any]:
    """Read a TOML file.

    Raises:
        InputError: it is missing, not readable, or not TOML; the message is one line.
    """
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"--config {path}: there is no such file") from None
    except OSError as error:
        raise InputError(f"--config {path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise InputError(f"--config {path}: is not a text file in UTF-8") from None
    except tomllib.TOMLDecodeError as error:
        raise InputError(f"--config {path}: is not valid TOML: {error}") from None


def _fields(kind: type) -> list[tuple[dataclasses.Field[Any], tuple[type, ...]]]:
    """Fields of a dataclass, each with the types that it may have."""
    hints = typing.get_type_hints(kind)
    listed = []
    for field in dataclasses.fields(kind):
        hint = hints[field.name]
        listed.append((field, typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)))
    return listed


def _check_value(name: str, value: Any, field: dataclasses.Field[Any], allowed: tuple[type, ...]) -> Any:
    kind = next(option for option in allowed if option is not type(None))
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    limits = field.metadata
    words = _WORDS[kind]
    if "options" in limits:
        words = "one of " + ", ".join(limits["options"])
    elif "low" in limits:
        words = f"{words} from {limits['low']:g} to {limits['high']:g}"
        if limits["high"] == MAX_SEED:
            words = f"{_WORDS[kind]} from 0 to 2**63 - 1"
    if type(value) is not kind:
        raise SettingError(name, value, words)
    if "options" in limits and value not in limits["options"]:
        raise SettingError(name, value, words)
    if "low" in limits and not (limits["low"] <= value <= limits["high"]):
        raise SettingError(name, value, words)
    return value
