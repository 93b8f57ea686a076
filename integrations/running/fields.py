"""Fields of settings: what they may hold, and how they are read from TOML files and command lines by the same names.

Knows nothing of torch, on purpose: a typo must not wait for it.
"""

import dataclasses
import tomllib
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from distopt.errors import DistoptError, SettingError

MAX_SEED = 2**63 - 1
_T = TypeVar("_T")
LENGTH = "a whole number of steps, or a fraction of the run from 0.0 to 1.0"
_WORDS = {int: "a whole number", float: "a number", bool: "true or false", str: "a text", dict: "a table"}


class InputError(DistoptError):
    """A folder, a file or a run that the user named cannot be worked with; the message says why in one line."""


def number(default: Any, low: float, high: float, meaning: str) -> Any:
    """A field of numbers, or of lists of numbers, from ``low`` to ``high``."""
    return dataclasses.field(default=default, metadata={"low": low, "high": high, "meaning": meaning})


def choice(default: Any, options: tuple[str, ...], meaning: str) -> Any:
    """A field of one of some texts."""
    return dataclasses.field(default=default, metadata={"options": options, "meaning": meaning})


def text(meaning: str) -> Any:
    """A field of any text, or of none."""
    return dataclasses.field(default=None, metadata={"meaning": meaning})


def plain(default: Any, meaning: str) -> Any:
    """A field of any value of its type."""
    return dataclasses.field(default=default, metadata={"meaning": meaning})


def length(meaning: str) -> Any:
    """A field of a length of a run, or of none: a whole number is steps, any other number a fraction of the run."""
    return dataclasses.field(default=None, metadata={"length": True, "meaning": meaning})


def is_length(value: object) -> bool:
    """Whether ``value`` is a length of a run: steps, or a fraction of them.

    Example:
        >>> [is_length(value) for value in (5000, 0, 0.05, 1.0, -1, 1.5, True)]
        [True, True, True, True, False, False, False]
    """
    if isinstance(value, bool):
        return False
    return value >= 0 if isinstance(value, int) else isinstance(value, float) and 0 <= value <= 1


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
            check_value(name, value, field, allowed)


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
        >>> @dataclasses.dataclass(frozen=True)
        ... class Stage:
        ...     steps: int = number(100, 1, 1000, "optimizer steps")
        >>> build(Stage, {"steps": 10})
        Stage(steps=10)
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
            value = check_value(prefix + name, value, field, allowed)
        values[name] = value
    return kind(**values)


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


def check_value(name: str, value: Any, field: dataclasses.Field[Any], allowed: tuple[type, ...]) -> Any:
    """Check one value, and give it as the field holds it: numbers as floats, lists as tuples.

    Raises:
        SettingError: by the name ``name``, if it is of the wrong type or out of range.
    """
    if "length" in field.metadata:
        if not is_length(value):
            raise SettingError(name, value, LENGTH)
        return value
    kind = next(option for option in allowed if option is not type(None))
    if typing.get_origin(kind) is tuple:
        return _check_numbers(name, value, field, typing.get_args(kind))
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


def _check_numbers(name: str, value: Any, field: dataclasses.Field[Any], kinds: tuple[type, ...]) -> tuple[Any, ...]:
    """Check a list of numbers, each as `check_value` does it."""
    words = f"a list of {len(kinds)} numbers from {field.metadata['low']:g} to {field.metadata['high']:g}"
    if not isinstance(value, list | tuple) or len(value) != len(kinds):
        raise SettingError(name, value, words)
    try:
        return tuple(check_value(name, each, field, (kind,)) for each, kind in zip(value, kinds, strict=True))
    except SettingError:
        raise SettingError(name, value, words) from None


def leaves(kind: type, prefix: str = "") -> list[tuple[str, dataclasses.Field[Any], type]]:
    """Every field of settings that is no table: its dotted name, the field, and its type.

    Example:
        >>> @dataclasses.dataclass(frozen=True)
        ... class Stage:
        ...     steps: int = 100
        ...     rate: float | None = None
        >>> @dataclasses.dataclass(frozen=True)
        ... class Settings:
        ...     seed: int = 0
        ...     stage1: Stage = Stage()
        >>> [(name, kind.__name__) for name, _, kind in leaves(Settings)]
        [('seed', 'int'), ('stage1.steps', 'int'), ('stage1.rate', 'float')]
    """
    found = []
    for field, allowed in _fields(kind):
        inner = next(option for option in allowed if option is not type(None))
        if dataclasses.is_dataclass(inner):
            found += leaves(inner, f"{prefix}{field.name}.")
        else:
            found.append((prefix + field.name, field, inner))
    return found


def value_of(text: str, kind: type) -> Any:
    """Read a value as TOML would, from a command line; a text as it is, a list with its brackets or without.

    Args:
        text: what the user wrote.
        kind: what the field holds.

    Returns:
        The value, or ``text`` itself where TOML has no such value: `build` then says what is allowed.

    Example:
        >>> value_of("1e-3", float), value_of("0.9, 0.96", tuple[float, float]), value_of("12", str)
        (0.001, [0.9, 0.96], '12')
    """
    if kind is str:
        return text
    listed = typing.get_origin(kind) is tuple and not text.lstrip().startswith("[")
    try:
        value = tomllib.loads(f"value = [{text}]" if listed else f"value = {text}")
    except tomllib.TOMLDecodeError:
        return text
    return value["value"] if list(value) == ["value"] else text


def nested(values: Mapping[str, Any]) -> dict[str, Any]:
    """Make tables of dotted names.

    Example:
        >>> nested({"seed": 1, "stage1.steps": 2})
        {'seed': 1, 'stage1': {'steps': 2}}
    """
    table: dict[str, Any] = {}
    for name, value in values.items():
        *tables, last = name.split(".")
        inner = table
        for each in tables:
            inner = inner.setdefault(each, {})
        inner[last] = value
    return table
