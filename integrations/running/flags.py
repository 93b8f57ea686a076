"""A flag of the command line for every field of the settings, by the name that it has in a TOML file."""

import argparse
from collections.abc import Collection, Mapping
from typing import Any

from .fields import check_value, leaves, nested, value_of


def add_fields(
    parser: argparse.ArgumentParser,
    kind: type,
    also: Mapping[str, str] | None = None,
    hidden: Collection[str] = (),
    unset: Mapping[str, str] | None = None,
    otherwise: Mapping[str, Any] | None = None,
) -> None:
    """A flag for every field, by the name that it has in a TOML file; `chosen` reads what it is given.

    Dashes in place of the underscores of a name are taken too.

    Args:
        parser: gets the flags.
        kind: the settings.
        also: flags that fields have besides their own, by the field's name.
        hidden: fields that have no flag of their own name.
        unset: what it means that a field without a default is not given, by the field's name or its table's.
        otherwise: the defaults of this command, by the field's name, where they are not those of the settings.
    """
    for name, field, _ in leaves(kind):
        flags = [flag for flag in ((also or {}).get(name), None if name in hidden else f"--{name}") if flag]
        if flags:
            default = (otherwise or {}).get(name, field.default)
            if isinstance(default, bool):
                default = str(default).lower()
            if default is None:
                table = name.split(".")[0]
                default = (unset or {}).get(name, (unset or {}).get(table, "it depends on other settings"))
            told = f" (default: {default})"
            meaning = field.metadata.get("meaning", "") + told
            parser.add_argument(*flags, dest=name, metavar="X", help=meaning.strip().replace("%", "%%"))
            if dashed := [flag.replace("_", "-") for flag in flags if "_" in flag]:
                # What other commands call it: taken, and not shown a second time.
                parser.add_argument(*dashed, dest=name, default=argparse.SUPPRESS, help=argparse.SUPPRESS)


def chosen(parsed: argparse.Namespace, kind: type, also: Mapping[str, str] | None = None) -> dict[str, Any]:
    """What was set by flags, in tables; each value is judged by itself, by the name of its flag.

    Args:
        parsed: of a parser with the flags of `add_fields`.
        kind: the settings.
        also: as it was given to `add_fields`.

    Raises:
        SettingError: a value is of the wrong type or out of range.
    """
    values = {}
    for name, field, of in leaves(kind):
        if (text := getattr(parsed, name, None)) is not None:
            values[name] = check_value((also or {}).get(name, f"--{name}"), value_of(text, of), field, (of,))
    return nested(values)
