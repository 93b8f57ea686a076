"""The table that ``distopt-dalle evaluate`` prints: what was measured in rows, splits in columns."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

_LABEL, _COLUMN = 44, 11
_ATTRIBUTES = {
    "count": "exactly two things",
    "readable": "  of these: two shapes in a clear order",
    "colours": "    of these: the right colours",
    "shapes": "    of these: the right shapes",
    "pairs": "      of both: each colour on its shape",
    "relation": "        of these: as they should lie",
}


def attribute_rows(attributes: Sequence[Mapping[str, Any]]) -> list[str]:
    """Rows of what about the samples is right, one column for each split's ``grading.attributes``."""
    rows = []
    for name, meaning in _ATTRIBUTES.items():
        rows.append(_row(meaning, [None if of[name] is None else of[name]["exact"] for of in attributes], _percent))
        limits = [
            "" if of[name] is None else f"{100 * of[name]['low']:.0f}-{100 * of[name]['high']:.0f}" for of in attributes
        ]
        rows.append(_row("", limits, str))
    return rows


def measure_rows(measures: Sequence[Mapping[str, Any]]) -> list[str]:
    """Rows of what ``measures.measure`` gives, one column each."""
    bounds = [of["bound"] for of in measures if of["bound"] is not None]
    return [
        _row("pictures measured", [of["n"] for of in measures], str),
        _row("reconstruction: mean squared error", [of["mse"] for of in measures], _small),
        _row("  PSNR, decibels", [of["psnr"] for of in measures], "{:.2f}".format),
        _row("  SSIM", [of["ssim"] for of in measures], "{:.4f}".format),
        _row(f"codes in use, of {measures[0]['codes']}", [of["codes_used"] for of in measures], str),
        _row("  perplexity", [of["perplexity"] for of in measures], "{:.1f}".format),
        *(_bound_rows(bounds) if bounds else ["-ELBO: none, for a quantizer gives no distribution over codes"]),
        _row("image loss, nats a token", [of["image_loss"] for of in measures], "{:.4f}".format),
    ]


def _bound_rows(bounds: Sequence[Mapping[str, Any]]) -> list[str]:
    return [
        _row("-ELBO, nats a picture", [of["nats"] for of in bounds], "{:.1f}".format),
        _row("  reconstruction", [of["reconstruction"] for of in bounds], "{:.1f}".format),
        _row("  KL to uniform codes", [of["kl"] for of in bounds], "{:.1f}".format),
        _row("  bits per dimension", [of["bits_per_dimension"] for of in bounds], "{:.4f}".format),
        _row("  KL to the transformer, given the caption", [of["kl_prior"] for of in bounds], "{:.1f}".format),
        _row("  bits per dimension with it", [of["bits_per_dimension_prior"] for of in bounds], "{:.4f}".format),
    ]


def frechet_rows(label: str, distances: Sequence[float], floors: Sequence[float]) -> list[str]:
    """Rows of Frechet distances: samples to pictures, and pictures to other pictures."""
    return [_row(label, distances, _small), _row("  of pictures to as many others", floors, _small)]


def heading(names: Sequence[str]) -> str:
    """The row above the columns."""
    return _row("", names, str)


def _row(label: str, values: Sequence[Any], form: Callable[[Any], str]) -> str:
    shown = ["-" if value is None else form(value) for value in values]
    return label.ljust(_LABEL) + "".join(text.rjust(_COLUMN) for text in shown)


def _percent(share: float) -> str:
    return f"{share:.1%}"


def _small(value: float) -> str:
    return f"{value:.3g}" if abs(value) < 1e-3 else f"{value:.4f}"
