"""The paper's augmentation of pictures, one for each stage (Ramesh et al. 2021, arXiv:2102.12092, listings 1 and 2).

==========================  =============================  ====================================
of a target of size S       stage 1                        stage 2
==========================  =============================  ====================================
square of side s            anywhere on the longer side    in the middle quarter of its places
resized by area to t        9/8 S to 3/2 S, at most s      S to 9/8 S, at most s
S x S pixels cut out of it  anywhere                       anywhere
mirrored                    one time in two                never
==========================  =============================  ====================================

The shorter side of the picture is s; with the paper's S = 256 the bounds of t are 288 and 384. Stage 2 does not
mirror, for a caption would then be wrong of text in the picture, and of left and right; it cuts off less, for a caption
tells of the whole picture. The paper takes pictures with s of at least S; here a smaller one is first enlarged to S, by
area too, and then nothing is left to cut.

Resizing is that of the paper's listings: an output pixel is the mean over a window as wide as the scale, partly covered
pixels counting by the part covered; the windows lie (s - 1) / (t - 1) apart, so that the first begins at the first
pixel and the last at the last. Pillow's box filter takes pixels whole or not at all, which shows at scales below 2.

Knows numpy alone: data loaders call it for each picture.
"""

from collections.abc import Callable

import numpy as np

from distopt.errors import SettingError


def augment_stage1(picture: np.ndarray, size: int, rng: np.random.Generator) -> np.ndarray:
    """Cut a square anywhere, resize it, cut again, and mirror it one time in two (listing 1).

    Args:
        picture: uint8 ``(H, W, 3)``.
        size: side of the result in pixels.
        rng: draws what is random, in a fixed order.

    Returns:
        uint8 ``(size, size, 3)``.

    Raises:
        SettingError: the picture is of another type or shape, or ``size`` is below 1.

    Example:
        >>> picture = np.arange(60 * 40 * 3, dtype=np.uint8).reshape(60, 40, 3)
        >>> augment_stage1(picture, 32, np.random.default_rng(0)).shape
        (32, 32, 3)
    """
    cut = _cut(picture, size, lambda room: int(rng.integers(room + 1)), (9 / 8, 12 / 8), rng)
    return np.ascontiguousarray(cut[:, ::-1]) if rng.integers(2) else cut


def augment_stage2(picture: np.ndarray, size: int, rng: np.random.Generator) -> np.ndarray:
    """Cut a square near the middle, resize it and cut again; it is never mirrored (listing 2).

    Args:
        picture: uint8 ``(H, W, 3)``.
        size: side of the result in pixels.
        rng: draws what is random, in a fixed order.

    Returns:
        uint8 ``(size, size, 3)``.

    Raises:
        SettingError: the picture is of another type or shape, or ``size`` is below 1.

    Example:
        >>> picture = np.arange(60 * 40 * 3, dtype=np.uint8).reshape(60, 40, 3)
        >>> augment_stage2(picture, 32, np.random.default_rng(0)).shape
        (32, 32, 3)
    """
    return _cut(picture, size, lambda room: _central(room, rng), (1, 9 / 8), rng)


def resize_by_area(picture: np.ndarray, size: int) -> np.ndarray:
    """Resize a picture with windows that begin at its corners; see above.

    Args:
        picture: uint8 ``(H, W, 3)``.
        size: side of the result in pixels.

    Returns:
        uint8 ``(size, size, 3)``.

    Example:
        >>> resize_by_area(np.array([[[0] * 3, [10] * 3], [[20] * 3, [30] * 3]], np.uint8), 1)[0, 0].tolist()
        [15, 15, 15]
    """
    _check(picture, size)
    return _resized_part(picture, size, 0, 0, size)


def _central(room: int, rng: np.random.Generator) -> int:
    """An offset from the middle quarter of the ``room``."""
    first = 3 * room // 8
    return int(rng.integers(first, max(first + 1, 5 * room // 8)))


def _cut(
    picture: np.ndarray,
    size: int,
    place: Callable[[int], int],
    targets: tuple[float, float],
    rng: np.random.Generator,
) -> np.ndarray:
    """Cut a square, resize it to between two ``targets``, as multiples of ``size``, and cut again.

    ``place`` draws where the square lies, from the room that there is on each side.
    """
    _check(picture, size)
    side = min(picture.shape[:2])
    top, left = (place(length - side) for length in picture.shape[:2])
    square = picture[top : top + side, left : left + side]
    smallest, largest = (max(size, min(side, round(target * size))) for target in targets)
    target = int(rng.integers(smallest, largest + 1))
    top, left = (int(rng.integers(target - size + 1)) for _ in range(2))
    return _resized_part(square, target, top, left, size)


def _resized_part(picture: np.ndarray, target: int, top: int, left: int, size: int) -> np.ndarray:
    """The part of the resized picture that is kept; the rest is never computed."""
    rows = _means(picture, target, top, size)
    part = _means(rows.swapaxes(0, 1), target, left, size).swapaxes(0, 1)
    return np.ascontiguousarray(np.rint(part.clip(0, 255)).astype(np.uint8))


def _means(picture: np.ndarray, target: int, first: int, count: int) -> np.ndarray:
    """Rows ``first`` to ``first + count`` of the ``target`` rows that the picture's are averaged to, float32."""
    length = len(picture)
    scale = (length - 1) / (target - 1) if target > 1 and length > 1 else length / target
    begins = scale * np.arange(first, first + count)
    ends = begins + scale
    total = np.zeros((count, *picture.shape[1:]), np.float32)
    for tap in range(int(np.ceil(scale)) + 1):
        pixel = np.floor(begins) + tap
        covered = (np.minimum(pixel + 1, ends) - np.maximum(pixel, begins)).clip(0) / scale
        rows = picture[np.minimum(pixel, length - 1).astype(int)]
        total += covered[:, None, None].astype(np.float32) * rows
    return total


def _check(picture: np.ndarray, size: int) -> None:
    if picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[2] != 3 or 0 in picture.shape:
        found = f"{picture.dtype} {picture.shape}"
        raise SettingError("picture", found, "uint8 (H, W, 3), with at least one pixel")
    if size < 1:
        raise SettingError("size", size, "at least 1")
