"""Which autoencoders the commands ``compare`` and ``curve`` train: alike but for the bottleneck. Knows no torch."""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

from distopt.errors import SettingError

from .settings import TrainSettings

CURVED: Mapping[str, Mapping[str, Any]] = {
    "vq": {"bottleneck": "vq"},
    "ema": {"bottleneck": "ema"},
    "ema-unreplaced": {"bottleneck": "ema", "options": "dead = 0.0"},
    "simvq": {"bottleneck": "simvq"},
}
"""The lines of ``curve``, and what each sets."""
_RELAXED = "beta = 0.0001, usage = 0.01"


@dataclasses.dataclass(frozen=True)
class Entry:
    """One autoencoder of a sweep.

    Args:
        name: of its folder, and in tables.
        settings: what it is trained by.
    """

    name: str
    settings: TrainSettings


COMPARED: Mapping[str, Mapping[str, Any]] = {
    "gaussian": {"bottleneck": "gaussian", "options": "beta = 0.00001"},
    "relaxed": {"bottleneck": "relaxed", "options": _RELAXED, "learning_rate": 2e-3},
    "relaxed-st": {"bottleneck": "relaxed_st", "options": _RELAXED, "learning_rate": 2e-3},
    "vq": {"bottleneck": "vq", "start": False},
    "vq-started": {"bottleneck": "vq"},
    "vq-rotation": {"bottleneck": "vq", "options": "rotation = true"},
    "ema": {"bottleneck": "ema"},
    "ema-rotation": {"bottleneck": "ema", "options": "rotation = true, decay = 0.8, dead = 0.0"},
    "simvq": {"bottleneck": "simvq"},
    "simvq-rotation": {"bottleneck": "simvq", "options": "rotation = true"},
    "simvq-diagonal": {"bottleneck": "simvq", "options": "diagonal = true"},
    "fsq": {"bottleneck": "fsq"},
    "lfq": {"bottleneck": "lfq"},
}
"""The rows of ``compare``, and what each sets. Codes start from data where the kind can, but for "vq".

A relaxed categorical loses its codes at the others' learning rate: its logits follow every step of the encoder at once.
The rotation trick of "ema-rotation" has the decay of its authors, and no codes replaced, as there.
"""


def compared(base: TrainSettings) -> list[Entry]:
    """Every kind of bottleneck at the budget of ``base``.

    Example:
        >>> [entry.settings.bottleneck for entry in compared(TrainSettings(codes=64))][:3]
        ['gaussian', 'relaxed', 'relaxed_st']
    """
    return [Entry(name, dataclasses.replace(base, **given)) for name, given in COMPARED.items()]


def curve(base: TrainSettings, sizes: Iterable[int]) -> list[Entry]:
    """Codebooks of several sizes, none of which starts from data, so that only what is learned differs.

    Example:
        >>> [entry.name for entry in curve(TrainSettings(), [64, 4096])][:4]
        ['vq-64', 'vq-4096', 'ema-64', 'ema-4096']
    """
    return [
        Entry(f"{line}-{size}", dataclasses.replace(base, **given, codes=size, start=False))
        for line, given in CURVED.items()
        for size in sizes
    ]


def sizes_of(text: str) -> list[int]:
    """Read sizes of codebooks: ``64,256,1024``.

    Raises:
        SettingError: it is no list of whole numbers from 2 to 65536, in rising order.
    """
    try:
        sizes = [int(part) for part in text.split(",")]
    except ValueError:
        sizes = []
    if not sizes or sizes != sorted(set(sizes)) or not 2 <= sizes[0] <= sizes[-1] <= 65_536:
        raise SettingError("--codes", text, "rising whole numbers from 2 to 65536: 64,256,1024")
    return sizes
