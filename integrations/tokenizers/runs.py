"""A trained tokenizer on the disk: its settings as JSON, its weights as safetensors."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from distopt.errors import DistoptError

from ..running.fields import InputError
from ..running.fields import build as build_settings
from .autoencoder import Autoencoder
from .settings import TrainSettings
from .training import build

WEIGHTS = "tokenizer.safetensors"
REPORT = "report.json"


def save(model: Autoencoder, settings: TrainSettings, figures: dict[str, Any], out: Path) -> None:
    """Write a trained tokenizer and what it was judged as into a folder."""
    out.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, out / WEIGHTS)
    report = {"settings": dataclasses.asdict(settings), "figures": figures}
    (out / REPORT).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


def report_of(out: Path) -> dict[str, Any] | None:
    """What `save` wrote of settings and figures; ``None`` if nothing is there.

    Raises:
        InputError: it cannot be read, or is something else.
    """
    path = out / REPORT
    if not path.exists():
        return None
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read: {error}") from None
    if not (isinstance(report, dict) and all(isinstance(report.get(part), dict) for part in ("settings", "figures"))):
        raise InputError(f"{path}: is no report of a tokenizer: its settings or its figures are missing")
    return report


def same(report: Mapping[str, Any], settings: TrainSettings) -> bool:
    """Whether a report is of these settings; how often checkpoints were saved does not matter."""
    return {**report["settings"], "save_every": settings.save_every} == dataclasses.asdict(settings)


def load(out: Path) -> Autoencoder:
    """The trained tokenizer of a folder, in eval mode.

    Raises:
        InputError: there is none, or it is damaged.
    """
    report = report_of(out)
    if report is None:
        raise InputError(f"{out}: holds no trained tokenizer")
    try:
        model = build(build_settings(TrainSettings, _without_none(report["settings"])))
        model.load_state_dict(load_file(out / WEIGHTS))
    except (KeyError, OSError, RuntimeError, SafetensorError, DistoptError) as error:
        raise InputError(f"{out}: is damaged: {str(error).splitlines()[0]}") from None
    return model.eval()


def _without_none(settings: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in settings.items() if value is not None}
