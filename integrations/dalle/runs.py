"""A run's folder: which files it has, and whether a folder is one. Knows nothing of torch, so that checks are quick."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .settings import InputError

FORMAT = 1
SETTINGS = "settings.json"
REPORT = "report.json"
DVAE = "dvae.safetensors"
TRANSFORMER = "transformer.safetensors"
TOKENIZER = "tokenizer.json"
CONTRAST = "contrast.safetensors"
"""Of runs that have a contrastive model."""
SCALES = "scales.png"
CHOICES = "best_of.png"
EVALUATION = "evaluation"
_KINDS = ("demo", "folder")
BUNDLED = Path(__file__).parent / "models" / "demo"
"""A run of the demo that is installed with the package."""


@dataclass(frozen=True)
class Run:
    """A finished run.

    Args:
        folder: where it lies.
        kind: "demo" (the drawn task) or "folder" (pictures of the user).
        settings: all settings of the model, as JSON gives them.
    """

    folder: Path
    kind: str
    settings: Mapping[str, Any]


def open_run(folder: Path) -> Run:
    """Check that ``folder`` holds a finished run and read its settings.

    Raises:
        InputError: it does not; the message says what is missing.
    """
    if not folder.is_dir():
        raise InputError(f"--run {folder}: there is no such folder")
    if not (folder / SETTINGS).is_file():
        raise InputError(f"--run {folder}: is not a finished run: it has no {SETTINGS}")
    try:
        settings = json.loads((folder / SETTINGS).read_text(encoding="utf-8"))
        form, kind = settings["format"], settings["kind"]
    except (OSError, ValueError, KeyError, TypeError):
        raise InputError(f"--run {folder}: its {SETTINGS} is damaged") from None
    if form != FORMAT or kind not in _KINDS:
        raise InputError(f"--run {folder}: format {form} of a {kind} run; this version reads format {FORMAT}")
    for name in (DVAE, TRANSFORMER, TOKENIZER):
        if not (folder / name).is_file():
            raise InputError(f"--run {folder}: is not a finished run: it has no {name}")
    return Run(folder, kind, settings)


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write ``value`` so that a reader sees the old file or the new one, never half of it."""
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")
    part.replace(path)
