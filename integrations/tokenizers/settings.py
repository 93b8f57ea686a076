"""What a run is told, checked. Knows nothing of torch, on purpose: a typo must not wait for it."""

import dataclasses
import tomllib
from typing import Any

from distopt.errors import SettingError

from ..running.fields import MAX_SEED, check, choice, number, text

NAMES = ("gaussian", "relaxed", "relaxed_st", "vq", "ema", "simvq", "fsq", "lfq")
"""Kinds of bottleneck."""
DATA = ("scenes", "photos")
"""What there is to train on, all of it without a download."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """How one autoencoder is trained; each field's metadata says what it means, and what it may be.

    Raises:
        SettingError: a value of the wrong type or out of its range.

    Example:
        >>> TrainSettings(bottleneck="vq", options="rotation = true").given
        {'rotation': True}
    """

    bottleneck: str = choice("simvq", NAMES, "what lies between encoder and decoder: " + ", ".join(NAMES))
    codes: int = number(512, 2, 65_536, "codes K")
    width: int = number(8, 1, 1024, "channels of a code")
    hidden: int = number(64, 2, 4096, "channels of the networks")
    options: str | None = text("of the bottleneck, as in TOML: 'rotation = true, commitment_weight = 0.5'")
    data: str = choice("scenes", DATA, "drawn scenes, or crops of scikit-learn's two photographs")
    start: bool = dataclasses.field(
        default=True, metadata={"meaning": "whether codes start from data (k-means), where the kind can"}
    )
    steps: int = number(1500, 1, 10_000_000, "optimizer steps")
    batch: int = number(16, 1, 65_536, "pictures a step, over all ranks")
    learning_rate: float = number(1e-2, 1e-7, 1, "the highest; it warms up and falls as a half cosine")
    edges: float = number(4.0, 0, 1000, "how much more errors beside an edge weigh")
    rank: int = number(4, 0, 1024, "of PowerSGD; 0 averages gradients exactly")
    judged: int = number(1024, 4, 1_000_000, "pictures that it is judged by")
    save_every: int = number(500, 0, 10_000_000, "steps from one checkpoint to the next; 0 for none")
    seed: int = number(0, 0, MAX_SEED, "decides weights, pictures and noise")

    def __post_init__(self) -> None:
        check(self)
        _ = self.given

    @property
    def given(self) -> dict[str, Any]:
        """The bottleneck's options by name.

        Raises:
            SettingError: they cannot be read.
        """
        try:
            return dict(tomllib.loads(f"given = {{{self.options or ''}}}")["given"])
        except tomllib.TOMLDecodeError:
            raise SettingError("options", self.options, "names and values: 'rotation = true, decay = 0.9'") from None
