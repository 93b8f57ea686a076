"""What a user can set, checked by field, value and range. Knows nothing of torch: a typo must not wait for it."""

import dataclasses

from distopt.errors import SettingError

from ..running.fields import MAX_SEED, check, choice, number
from .sizes import Sizes

CLASSES = ("circle", "square", "triangle", "diamond", "cross", "ring")
"""Of the drawn pictures."""
SIZE = 16
"""Side of the drawn pictures."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """How a generator and a discriminator are trained."""

    steps: int = number(4000, 1, 10_000_000, "steps of the generator")
    batch: int = number(64, 1, 65_536, "pictures a step, over all ranks and micro-batches")
    accumulate: int = number(1, 1, 65_536, "micro-batches of a rank's share of the batch")
    discriminator_steps: int = number(2, 1, 64, "steps of the discriminator for one of the generator")
    generator_rate: float = number(4e-4, 1e-8, 1.0, "learning rate of the generator")
    discriminator_rate: float = number(8e-4, 1e-8, 1.0, "learning rate of the discriminator")
    decay: float = number(0.5, 0.0, 1.0, "part of the steps, at the end, over which both rates fall to 0 in a line")
    orthogonal: float = number(1e-4, 0.0, 1e4, "weight of the generator's orthogonal regularisation")
    gamma: float = number(0.1, 0.0, 1e6, "weight of R1, the penalty on the discriminator's slope at real pictures")
    group: int = number(
        0, 0, 65_536, "pictures among which the discriminator sees how much those of a class differ; 0 for none"
    )
    averaging: float = number(0.995, 0.0, 1 - 1e-9, "decay a step of the averaged generator, which is the one kept")
    kind: str = choice("hierarchical", ("hierarchical", "deep"), "BigGAN, or BigGAN-deep")
    width: int = number(24, 8, 4096, "channels at full resolution, a multiple of 8")
    noise: int = number(48, 1, 4096, "numbers of noise")
    shared: int = number(32, 1, 4096, "width of the classes' embedding")
    attention: int = number(8, 0, 4096, "side of what attention looks at; 0 for none")
    reducer: str = choice("powersgd", ("powersgd", "allreduce"), "what averages gradients")
    rank: int = number(8, 1, 1024, "rank of PowerSGD")
    readings_every: int = number(50, 1, 10_000_000, "steps from one reading of the spectra to the next")
    checkpoint_every: int = number(300, 0, 10_000_000, "steps from one checkpoint to the next; 0 for none")
    standing: int = number(100, 1, 100_000, "passes that standing statistics are the mean of")
    judged: int = number(1800, 12, 1_000_000, "pictures that are judged at each threshold")
    seed: int = number(0, 0, MAX_SEED, "decides weights, noise and batches")

    def __post_init__(self) -> None:
        check(self)
        if self.judged % len(CLASSES):
            raise SettingError("judged", self.judged, f"a multiple of the {len(CLASSES)} classes")
        if self.group == 1:
            raise SettingError("group", self.group, "0 for none, or at least 2: one picture does not differ")

    def check_ranks(self, ranks: int) -> None:
        """Refuse a batch that cannot be divided over the ranks and their micro-batches, or these not into groups.

        Raises:
            SettingError: names the batch, or the group.

        Example:
            >>> TrainSettings(batch=30, accumulate=4).check_ranks(2)
            Traceback (most recent call last):
            distopt.errors.SettingError: batch is 30, but must be a multiple of 8: 2 ranks with 4 micro-batches each
        """
        parts = ranks * self.accumulate
        if self.batch % parts:
            raise SettingError(
                "batch", self.batch, f"a multiple of {parts}: {ranks} ranks with {self.accumulate} micro-batches each"
            )
        if self.group and (self.batch // parts) % self.group:
            raise SettingError("group", self.group, f"a divisor of the {self.batch // parts} pictures of a micro-batch")

    def sizes(self, classes: int = len(CLASSES), size: int = SIZE) -> Sizes:
        """The sizes of the networks, for so many classes and pictures of that side.

        Example:
            >>> TrainSettings(width=24).sizes().channels(4)
            96
        """
        return Sizes(
            classes=classes,
            size=size,
            width=self.width,
            noise=self.noise,
            shared=self.shared,
            attention=self.attention,
            kind=self.kind,
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class RingOptions:
    """How the small GAN of the ring is trained."""

    steps: int = number(5000, 1, 10_000_000, "steps of both networks")
    batch: int = number(128, 1, 65_536, "points a step")
    gamma: float = number(1.0, 0.0, 1e6, "weight of R1; 0 for none")
    generator_rate: float = number(1e-3, 1e-8, 1.0, "learning rate of the generator")
    discriminator_rate: float = number(1e-3, 1e-8, 1.0, "learning rate of the discriminator")
    every: int = number(100, 1, 10_000_000, "steps from one reading to the next")
    seed: int = number(0, 0, MAX_SEED, "of everything")

    def __post_init__(self) -> None:
        check(self)
