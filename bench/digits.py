"""Writes scikit-learn's handwritten digits as a folder of captioned pictures, for ``distopt-dalle train``.

    python bench/digits.py OUT
    distopt-dalle train --data OUT --out runs/digits

The 1797 pictures of 8 x 8 pixels come with scikit-learn; nothing is downloaded. Each is enlarged and gets a caption
that names its digit in one of a few wordings, chosen by a generator with a fixed seed.
"""

import argparse
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

_NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
_TEMPLATES = ("a handwritten {}", "the digit {}", "the number {} written by hand", "somebody wrote a {}", "{}")


def write_digits(out: Path, size: int, seed: int) -> int:
    """Write every digit as ``NNNN.png`` beside ``NNNN.txt``.

    Args:
        out: the folder, made if it is missing.
        size: side of the pictures in pixels.
        seed: decides the wordings.

    Returns:
        How many pictures were written.
    """
    out.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    pictures, labels = load_digits(return_X_y=True)
    for i, (picture, label) in enumerate(zip(pictures, labels, strict=True)):
        # Values go from 0 (paper) to 16 (ink).
        grey = Image.fromarray((255 - picture.reshape(8, 8) * (255 / 16)).round().astype(np.uint8))
        grey.resize((size, size), Image.Resampling.BICUBIC).save(out / f"{i:04}.png")
        caption = str(rng.choice(_TEMPLATES)).format(_NAMES[label])
        (out / f"{i:04}.txt").write_text(caption + "\n", encoding="utf-8")
    return len(pictures)


def main() -> None:
    """Read the command line and write the folder."""
    parser = argparse.ArgumentParser(description="Write scikit-learn's digits as captioned PNG files.")
    parser.add_argument("out", type=Path, metavar="OUT", help="folder to write to")
    parser.add_argument("--size", type=int, default=32, help="side of the pictures in pixels (default: 32)")
    parser.add_argument("--seed", type=int, default=0, help="decides the wordings (default: 0)")
    arguments = parser.parse_args()
    count = write_digits(arguments.out, arguments.size, arguments.seed)
    print(f"{count} pictures with captions in {arguments.out}")


if __name__ == "__main__":
    main()
