"""What a user may choose of each recipe's run. Knows nothing of torch: a typo must not wait for it."""

import dataclasses

from ..running.fields import MAX_SEED, check, choice, number


@dataclasses.dataclass(frozen=True, kw_only=True)
class Study:
    """What all runs have in common: several seeds of several ways, each a short training."""

    seeds: int = number(5, 1, 1000, "how often each way is trained, with another seed each time")
    seed: int = number(0, 0, MAX_SEED - 1000, "the first seed")
    steps: int = number(400, 1, 1_000_000, "optimizer steps of each training")
    batch: int = number(32, 1, 65_536, "samples of a rank in each micro-batch")
    accumulate: int = number(1, 1, 1024, "micro-batches of a rank in each step")
    rank: int = number(4, 0, 4096, "of PowerSGD, which averages the gradients; 0 averages them exactly")
    learning_rate: float = number(2e-3, 1e-6, 10.0, "AdamW's, at the start; it falls to 0 as a half cosine")
    weight_decay: float = number(1e-2, 0.0, 10.0, "of AdamW, times the learning rate")

    def __post_init__(self) -> None:
        check(self)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TasksSettings(Study):
    """Of the run that weights two tasks."""

    steps: int = number(1000, 1, 1_000_000, "optimizer steps of each training")
    learning_rate: float = number(1e-2, 1e-6, 10.0, "AdamW's, at the start; it falls to 0 as a half cosine")
    accumulate: int = number(2, 1, 1024, "micro-batches of a rank in each step")
    batch: int = number(16, 1, 65_536, "pictures of a rank in each micro-batch")
    units: float = number(100.0, 1e-6, 1e6, "units of the position's loss that make one pixel")
    own_rate: float = number(5e-2, 1e-6, 10.0, "learning rate of the log-variances")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DistillationSettings(Study):
    """Of the run that distils from itself."""

    seeds: int = number(10, 1, 1000, "how often each way is trained, with another seed each time")
    labels: int = number(100, 10, 1200, "labelled digits that there are")
    agreement: float = number(1.0, 0.0, 1e6, "weight of the two divergences")
    discrepancy: float = number(5e-4, 0.0, 1e6, "weight of the distance between mean features")
    mean: str = choice("global", ("rank", "global"), "over whose samples features are averaged: rank or global")


@dataclasses.dataclass(frozen=True, kw_only=True)
class BagsSettings(Study):
    """Of the run that learns from bags."""

    data: str = choice("digits", ("digits", "unit-tests"), "digits, or the algorithmic unit-tests of arXiv:2310.17867")
    steps: int = number(600, 1, 1_000_000, "optimizer steps of each training")
    learning_rate: float = number(5e-3, 1e-6, 10.0, "AdamW's, at the start; it falls to 0 as a half cosine")
    batch: int = number(8, 1, 65_536, "bags of a rank in each micro-batch")
    accumulate: int = number(2, 1, 1024, "micro-batches of a rank in each step")
    bags: int = number(800, 10, 100_000, "bags to train on")
    fractions: tuple[float, float, float, float] = number(
        (0.1, 0.2, 0.3, 0.4), 0.01, 1.0, "share of a bag from which on it is positive, for the digits 0 to 3"
    )
    sizes: tuple[int, int] = number((10, 30), 1, 1000, "instances of the smallest and of the largest bag")
    slope: float = number(10.0, 0.1, 1000.0, "a of Noisy-AND, which is also trained with twice that")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainerSettings:
    """Of the plain trainer."""

    epochs: int = number(20, 1, 1_000_000, "times through the data")
    batch: int = number(32, 1, 1200, "pictures of a rank in each step")
    rank: int = number(4, 0, 4096, "of PowerSGD; 0 leaves the averaging to DDP")
    learning_rate: float = number(0.05, 1e-6, 10.0, "SGD's, at the start")
    save_every: int = number(50, 1, 1_000_000, "steps from one snapshot to the next")
    seed: int = number(0, 0, MAX_SEED - 1000, "decides weights, order and noise")

    def __post_init__(self) -> None:
        check(self)
