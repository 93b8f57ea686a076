"""A run's folder: what lies in it, and whether it begins, goes on, or is another. Knows nothing of torch."""

import dataclasses
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from distopt.errors import SettingError

from ..running.fields import InputError, build
from .settings import TrainSettings

FORMAT = 1
SETTINGS = "settings.json"
GENERATOR = "generator.safetensors"
REPORT = "report.json"
CHECKPOINTS = "checkpoints"
MAY_CHANGE = ("steps", "checkpoint_every", "standing", "judged")
"""What a run may go on with another value of; besides it the number of ranks and the device."""

_BEFORE = {"group": 0}
"""What runs were trained with that are older than the setting itself."""


def begin(out: Path, settings: TrainSettings, *, fresh: bool) -> bool:
    """Decide what becomes of a folder, and note there what is trained.

    Args:
        out: the folder, which exists.
        settings: of the run.
        fresh: whether to begin anew, whatever there is.

    Returns:
        Whether there is something to do; ``False`` for a finished run of the same settings.

    Raises:
        InputError: there is a run of other settings; names one that differs.
    """
    if fresh:
        for name in (SETTINGS, GENERATOR, REPORT):
            (out / name).unlink(missing_ok=True)
        shutil.rmtree(out / CHECKPOINTS, ignore_errors=True)
    elif (out / SETTINGS).exists():
        there, here = dataclasses.asdict(read_settings("--out", out)), dataclasses.asdict(settings)
        for name, value in here.items():
            if value != there[name] and name not in MAY_CHANGE:
                raise InputError(
                    f"--out {out}: holds a run with {name} = {there[name]}, not {value}; give another --out, or --fresh"
                )
        if (out / GENERATOR).exists():
            return False
    write_json(out / SETTINGS, {"format": FORMAT, "settings": dataclasses.asdict(settings)})
    return True


def read_settings(flag: str, folder: Path) -> TrainSettings:
    """Read the settings of a run.

    Raises:
        InputError: the folder holds none that this version reads; names the flag.
    """
    if not (folder / SETTINGS).is_file():
        raise InputError(f"{flag} {folder}: is not a run: it has no {SETTINGS}")
    try:
        read = json.loads((folder / SETTINGS).read_text(encoding="utf-8"))
        form, table = read["format"], _BEFORE | dict(read["settings"])
    except (OSError, ValueError, KeyError, TypeError):
        raise InputError(f"{flag} {folder}: its {SETTINGS} is damaged") from None
    if form != FORMAT:
        raise InputError(f"{flag} {folder}: a run of format {form}; this version reads format {FORMAT}")
    try:
        return build(TrainSettings, table)
    except SettingError as error:
        raise InputError(f"{flag} {folder}: its {SETTINGS} is damaged: {error}") from None


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write ``value`` so that a reader sees the old file or the new one, never half of it."""
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(value, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    part.replace(path)
