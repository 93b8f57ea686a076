"""What becomes of a folder in which a run has begun: it goes on, or is finished, or another. Knows nothing of torch.

==========================  =======================  ==========================================
in the folder               with the same settings   with others
==========================  =======================  ==========================================
nothing, or no run          begins                   begins
a run that was stopped      goes on                  refused, by the name of a field that differs
a finished run              says so, and ends well   refused, likewise
==========================  =======================  ==========================================

``--fresh`` begins anew, whatever there is.
"""

import dataclasses
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from . import runs
from .settings import InputError

BEGUN = "run.json"
CHECKPOINTS = "checkpoints"
MAY_CHANGE = ("shard", "checkpoint", "pictures_every")
"""Fields, or tables, that a run may go on with other values of; besides them the number of ranks and the device."""


def flat(settings: Any, prefix: str = "") -> dict[str, Any]:
    """All fields of settings by their dotted names, as JSON gives them back; without those that may change.

    Example:
        >>> from distopt.integrations.dalle.settings import TrainSettings
        >>> flat(TrainSettings())["stage1.patch"]
        4
    """
    named: dict[str, Any] = {}
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        if dataclasses.is_dataclass(value):
            named |= flat(value, f"{prefix}{field.name}.")
        else:
            named[prefix + field.name] = list(value) if isinstance(value, tuple) else value
    return {name: value for name, value in named.items() if name.partition(".")[0] not in MAY_CHANGE}


def begin(out: Path, command: str, settings: Any, *, fresh: bool, first: bool) -> bool:
    """Decide what becomes of a run's folder, before anything else is done there.

    Args:
        out: the folder, which exists.
        command: "demo" or "train".
        settings: of the run.
        fresh: whether to begin anew, whatever there is.
        first: whether this is the process that may change the folder; the others only look.

    Returns:
        Whether there is something to do; ``False`` for a finished run of the same settings.

    Raises:
        InputError: there is a run of other settings, or one that cannot be told.
    """
    # What torchrun starts again after a failure goes on.
    if fresh and not int(os.environ.get("TORCHELASTIC_RESTART_COUNT") or 0):
        if first:
            _clear(out)
            _write(out, command, settings)
        return True
    finished = (out / runs.SETTINGS).exists()
    if not finished and not (out / CHECKPOINTS).exists():
        if first:
            _write(out, command, settings)
        return True
    _compare(out, command, settings, "a finished run" if finished else "a run that was stopped")
    return not finished


def finish(out: Path) -> None:
    """Remove what only an unfinished run needs."""
    shutil.rmtree(out / CHECKPOINTS, ignore_errors=True)


def _clear(out: Path) -> None:
    for name in (runs.SETTINGS, runs.REPORT, BEGUN):
        (out / name).unlink(missing_ok=True)
    shutil.rmtree(out / CHECKPOINTS, ignore_errors=True)


def _write(out: Path, command: str, settings: Any) -> None:
    runs.write_json(out / BEGUN, {"format": runs.FORMAT, "command": command, "settings": flat(settings)})


def _compare(out: Path, command: str, settings: Any, what: str) -> None:
    way = "give another --out, or --fresh to train anew"
    try:
        begun = json.loads((out / BEGUN).read_text(encoding="utf-8"))
        # A run of a version that had not all fields was one with their defaults.
        there, its_command = {**flat(type(settings)()), **begun["settings"]}, begun["command"]
        here = flat(settings)
        odd = [name for name in here if there[name] != here[name]]
    except (OSError, ValueError, KeyError, TypeError):
        raise InputError(f"--out {out}: holds {what} whose settings are not known ({BEGUN}); {way}") from None
    if its_command != command:
        raise InputError(f"--out {out}: holds {what} of the command {its_command}; {way}")
    for name in odd:
        raise InputError(
            f"--out {out}: holds {what} with {name} = {_told(there, name)}, not {_told(here, name)}; {way}"
        )


def _told(settings: Mapping[str, Any], name: str) -> str:
    return "its default" if settings[name] is None else json.dumps(settings[name], ensure_ascii=False)
