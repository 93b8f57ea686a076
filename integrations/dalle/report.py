"""The figures of a run: what goes into ``report.json``, and the table that is printed at the end."""

import importlib.metadata
import math
import platform
import resource
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from . import runs
from .context import StageResult


def stage_figures(result: StageResult) -> dict[str, Any]:
    """Give one stage's part of the report.

    Args:
        result: what the stage ended with.

    Returns:
        ``steps``, ``final_loss``, ``wall_seconds``, and what communication cost this rank: ``saving`` (the fraction of
        the gradients' bytes that was not sent), ``matrix_saving`` (the same over the compressed matrices alone),
        ``bytes_sent`` and ``bytes_uncompressed``. Without a reducer nothing was sent and the savings are 0.
        ``skipped_steps`` are those of the optimizer; ``log2_scales`` the gradient scales at the end, by name.
    """
    stats = result.stats
    figures: dict[str, Any] = {
        "steps": result.steps,
        "final_loss": result.final_loss,
        "wall_seconds": round(result.wall_seconds, 2),
    }
    for name in ("saving", "matrix_saving", "bytes_sent", "bytes_uncompressed", "skipped_steps"):
        figures[name] = 0 if stats is None else getattr(stats, name)
    # A reduction with something not finite in it is dropped, and its step skipped; a finite one's may be skipped too.
    figures["skipped_steps"] = max(figures["skipped_steps"], result.skipped_steps)
    figures["log2_scales"] = (
        {name: round(math.log2(s), 3) for name, s in result.scales[-1][1].items()} if result.scales else {}
    )
    figures["parameters"] = sum(parameter.numel() for parameter in result.model.parameters())
    return figures


def versions() -> dict[str, str]:
    """Versions of all that decides a run's numbers."""
    packages = ("distopt", "torch", "numpy", "tokenizers", "pillow")
    found = {"python": platform.python_version(), "platform": platform.platform()}
    for name in packages:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed as a package"
    return found | {"threads": str(torch.get_num_threads())}


def peak_memory() -> int:
    """The most bytes of memory that this process has held at once."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def device_memory() -> dict[str, int]:
    """Under its name, the most bytes that torch has held at once on this rank's GPU; nothing where there is none."""
    found = torch.cuda.max_memory_allocated() if torch.cuda.is_initialized() else 0
    return {"peak_device_memory_bytes": found} if found else {}


def finite(value: Any) -> Any:
    """Replace what JSON has no word for: a number that is not finite becomes ``None``.

    Example:
        >>> finite({"loss": float("nan"), "steps": [1, 2.5]})
        {'loss': None, 'steps': [1, 2.5]}
    """
    if isinstance(value, Mapping):
        return {str(key): finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [finite(inner) for inner in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def score_lines(report: Mapping[str, Any]) -> list[str]:
    """Lines with the scores of a demo's report."""
    meanings = {
        "s0": "S0  seen captions, drawn anew",
        "s1": "S1  unseen combinations",
        "s2": "S2  colour-shape pairs never captioned",
        "control": "control  captions shuffled",
    }
    tokenizer = report["tokenizer"]
    lines = [f"{'tokenizer round trip':40}{tokenizer['exact']:7.1%}   {tokenizer['codes_used']} codes in use"]
    for name, meaning in meanings.items():
        score = report[name]
        interval = f"95 % interval {score['low']:.1%} to {score['high']:.1%}, n = {score['n']}"
        lines.append(f"{meaning:40}{score['exact']:7.1%}   {interval}")
    return lines


def best_of_lines(report: Mapping[str, Any]) -> list[str]:
    """Lines with what re-ranking gains; none for a run without a contrastive model."""
    lines = []
    for split, found in report.get("best_of", {}).items():
        gain, picked = found["gain"], found["picked"]
        lines.append(
            f"{split.upper()}  best of {found['candidates']} by the contrastive model".ljust(40)
            + f"{picked['exact']:7.1%}   {100 * gain['points']:+.1f} points "
            f"({100 * gain['low']:+.1f} to {100 * gain['high']:+.1f}), "
            f"ceiling {found['ceiling']['exact']:.1%}, n = {picked['n']}"
        )
    return lines


def held_out_lines(report: Mapping[str, Any]) -> list[str]:
    """Lines with the losses of a folder's report."""
    tokenizer, held_out = report["tokenizer"], report["held_out"]
    of = "held-out" if held_out["unseen"] else "training"
    values = {
        f"{of} image loss": held_out["image_loss"],
        "  unigram baseline": held_out["unigram"],
        "  unigram baseline by position": held_out["unigram_by_position"],
        f"{of} text loss": held_out["text_loss"],
    }
    lines = [] if held_out["unseen"] else ["no held-out picture can be read: these are figures of training pictures"]
    lines += [f"{name:40}{_number(value):>9} nats a token" for name, value in values.items()]
    lines.append(
        f"{f'reconstruction of {of} pictures':40}{_number(tokenizer['mse']):>9} mean squared error, "
        f"{tokenizer['codes_used']} of {tokenizer['codes']} codes in use"
    )
    return lines


def stage_lines(report: Mapping[str, Any]) -> list[str]:
    """Lines with what both stages cost."""
    lines = []
    for name in _stages(report):
        stage = report[name]
        if not stage["steps"]:
            lines.append(f"{name.replace('stage', 'stage ')}: not trained, its weights were given")
            continue
        sent, whole = bytes_in_words(stage["bytes_sent"]), bytes_in_words(stage["bytes_uncompressed"])
        lines.append(
            f"{name.replace('stage', 'stage ')}: loss {_number(stage['final_loss'])} after {stage['steps']} steps, "
            f"{stage['wall_seconds']:.0f} s; {sent} sent instead of {whole}: "
            f"{stage['saving']:.1%} saved, {stage['matrix_saving']:.1%} of the compressed matrices"
        )
    return lines


def precision_lines(report: Mapping[str, Any]) -> list[str]:
    """A line on the gradient scales and the steps that were skipped; none for a run in float32."""
    if report["precision"] == "fp32":
        return []
    parts = []
    for name in _stages(report):
        stage = report[name]
        part = f"{name.replace('stage', 'stage ')} skipped {stage['skipped_steps']} of {stage['steps']} steps"
        if scales := sorted(stage["log2_scales"].values()):
            part += f", scale{'s' if len(scales) > 1 else ''} 2^{scales[0]:.1f}"
            part += f" to 2^{scales[-1]:.1f}" if scales[-1] > scales[0] else ""
        parts.append(part)
    return [f"{report['precision']}: {'; '.join(parts)}"]


def _stages(report: Mapping[str, Any]) -> list[str]:
    return [name for name in ("stage1", "stage2", "stage3") if name in report]


def file_lines(out: Path) -> list[str]:
    """Lines that say where the files of a run are."""
    pictures = ["samples.png", runs.CHOICES, "reconstructions.png", "loss.png", runs.SCALES]
    return [
        f"pictures: {out}/{', '.join(name for name in pictures if (out / name).exists())}",
        f"figures:  {out}/report.json; curves: tensorboard --logdir {out}",
    ]


def framed(title: str, lines: Sequence[str]) -> str:
    """Put lines between two rules under a title."""
    rule = "-" * max(len(line) for line in (title, *lines))
    return "\n".join([rule, title, rule, *lines, rule])


def _number(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.4f}"


def bytes_in_words(count: float) -> str:
    """A number of bytes to three digits.

    Example:
        >>> bytes_in_words(3.0236e9)
        '3.02 GB'
    """
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"
