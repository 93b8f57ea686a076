"""What ``distopt-dalle sample`` is asked for: its flags, and their checks. Knows nothing of torch."""

import argparse
import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .runs import Run
from .settings import InputError

if TYPE_CHECKING:  # a bad flag is told faster without
    import numpy as np

_MOST_GUIDANCE = 100.0
_MOST_TEMPERATURE = 10.0


@dataclass(frozen=True)
class Top:
    """The top of a picture that samples continue.

    Args:
        picture: uint8 ``(size, size, 3)``, as large as the run's pictures.
        rows: rows of tokens that are kept.
    """

    picture: "np.ndarray"
    rows: int


@dataclass(frozen=True, kw_only=True)
class Request:
    """What to draw, and how.

    Args:
        caption: what to draw.
        n: how many samples.
        seed: decides them.
        sampling: fields of ``SamplingSettings`` that differ from the run's own.
        top: what is given of the picture.
        best_of: samples that are drawn for each that is kept.
    """

    caption: str
    n: int = 1
    seed: int = 0
    sampling: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    top: Top | None = None
    best_of: int = 1


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags that say how tokens are drawn, and what is given of the picture."""
    own = "(default: the run's own)"
    parser.add_argument(
        "--temperature", type=_number(0, _MOST_TEMPERATURE), metavar="T", help=f"0 draws the likeliest tokens {own}"
    )
    parser.add_argument("--top-k", type=_number(1, 65_536, whole=True), metavar="K", help=f"of the K likeliest {own}")
    parser.add_argument(
        "--top-p", type=_number(1e-6, 1), metavar="P", help=f"of the likeliest with probability P together {own}"
    )
    meaning = f"how much more the caption counts; 1 is plain sampling {own}"
    parser.add_argument("--guidance", type=_number(0, _MOST_GUIDANCE), metavar="S", help=meaning)
    meaning = "draw N for each picture and keep those that fit best by the run's contrastive model (default: 1)"
    parser.add_argument("--best-of", type=_number(1, 256, whole=True), default=1, metavar="N", help=meaning)
    parser.add_argument("--image", type=Path, metavar="F", help="a picture whose top is continued (default: none)")
    parser.add_argument(
        "--rows",
        type=_number(1, 512, whole=True),
        metavar="N",
        help="rows of its tokens that are kept (default: no picture)",
    )


def request_of(parsed: argparse.Namespace, run: Run) -> Request:
    """Check what the user asked for.

    Args:
        parsed: the command's arguments, those of `add_flags` among them.
        run: with which run.

    Raises:
        InputError: it cannot be done; the message says why.
    """
    names = ("temperature", "top_k", "top_p", "guidance")
    sampling = {name: getattr(parsed, name) for name in names if getattr(parsed, name) is not None}
    if (parsed.image is None) != (parsed.rows is None):
        given, missing = ("--rows", "--image") if parsed.image is None else ("--image", "--rows")
        raise InputError(f"{given} needs {missing}: the picture, and how many rows of its tokens are kept")
    if parsed.best_of > 1 and "contrast" not in run.settings:
        raise InputError(f"--best-of {parsed.best_of}: {run.folder} has no contrastive model, which would choose")
    top = None if parsed.image is None else _top(parsed.image, parsed.rows, run)
    caption = " ".join(parsed.caption.split())
    return Request(caption=caption, n=parsed.n, seed=parsed.seed, sampling=sampling, top=top, best_of=parsed.best_of)


def _top(path: Path, rows: int, run: Run) -> Top:
    try:
        size, grid = int(run.settings["dvae"]["size"]), int(run.settings["transformer"]["grid"])
    except (KeyError, TypeError, ValueError):
        raise InputError(f"--run {run.folder}: its settings do not say how large its pictures are") from None
    if rows >= grid:
        raise InputError(f"--rows {rows}: must be from 1 to {grid - 1}, for pictures of this run have {grid} rows")
    if not path.is_file():
        raise InputError(f"--image {path}: there is no such file")
    from .pictures import read_picture

    try:
        return Top(read_picture(path, size), rows)
    except Exception as error:  # Pillow raises many kinds for a broken file
        reason = str(error).split("\n")[0] or type(error).__name__
        raise InputError(f"--image {path}: cannot be read as a picture: {reason}") from None


def _number(low: float, high: float, *, whole: bool = False) -> Callable[[str], Any]:
    words = f"{'a whole number' if whole else 'a number'} from {low:g} to {high:g}"

    def parse(text: str) -> Any:
        try:
            value = int(text) if whole else float(text)
        except ValueError:
            value = math.nan
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"is {text!r}, but must be {words}")
        return value

    return parse
