"""How stage 1 is trained: with the schedules of the relaxation, or with the constants of a quantizer.

Schedules are half cosines over fractions of the run (DALL-E, appendix A.2: temperature 1 to 1/16, KL weight from 0).
"""

import dataclasses
import math
from typing import Any

from .schedules import (
    LENGTH,
    StageSettings,
    half_cosine,
    is_finite_and_not_negative,
    is_length,
    is_positive_integer,
    share_of,
)
from .settings import RELAXED, Stage1Options


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stage1Settings(StageSettings):
    """How the dVAE is trained.

    Args:
        steps: optimizer steps.
        batch: pictures a step, over all ranks.
        learning_rate: the highest one.
        warmup: length in which the learning rate rises linearly; it then falls as a half cosine.
        final_learning_rate: where it ends, as a fraction of ``learning_rate``.
        decay_steps: length after which it has ended, the warm-up included.
        betas: AdamW's decay rates.
        weight_decay: AdamW's, times the learning rate.
        clip: largest global norm of the gradient; 0 for none.
        averaging: decay a step of the averaged weights that the stage ends with; 0 keeps the last weights.
        accumulate: micro-batches that each rank cuts its share of a batch into. They are exactly the batch, but for the
            push towards equal use, which is that of each micro-batch.
        tau: temperature at the start and at the end.
        tau_steps: length after which the temperature stays at its end.
        beta: weight of the KL divergence at its end; it starts at 0.
        beta_steps: length after which ``beta`` is reached.
        usage: weight of the push towards equal use of the codes at the start; it falls to 0 over the run.
        edges: how much more errors at edges weigh, see ``likelihood.edge_weights``.
        start: pictures whose patches the codes of the small architecture start from.
        hard: whether the decoder is handed single codes, with the gradient of the relaxation (straight-through).

    Lengths are steps (a whole number) or a fraction of the run, see ``schedules``.

    Raises:
        SettingError: where a value is out of its range.
    """

    steps: int = 3000
    batch: int = 32
    learning_rate: float = 4e-3
    warmup: int | float = 0.01
    final_learning_rate: float = 0.01
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = 0.0
    clip: float = 1.0
    averaging: float = 0.995
    tau: tuple[float, float] = (0.5, 1 / 16)
    tau_steps: int | float = 0.8
    beta: float = 1e-4
    beta_steps: int | float = 0.2
    usage: float = 0.01
    edges: float = 12.0
    start: int = 256
    hard: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check(("start",), is_positive_integer, "an integer of at least 1")
        self.check(("beta", "usage", "edges"), is_finite_and_not_negative, "a finite number of at least 0")
        self.check(("tau_steps", "beta_steps"), is_length, LENGTH)
        self.check(
            ("tau",),
            lambda value: len(value) == 2 and all(math.isfinite(tau) and tau > 0 for tau in value),
            "two finite numbers above 0",
        )

    def weights_at(self, step: int) -> dict[str, float]:
        """What ``DVAE.loss`` is given at ``step``, counted from 0.

        Example:
            >>> settings = Stage1Settings(steps=10, tau=(1.0, 0.5), tau_steps=0.5, beta=2.0, beta_steps=0.2)
            >>> [settings.weights_at(step)["tau"] for step in (0, 5, 9)]
            [1.0, 0.5, 0.5]
            >>> [settings.weights_at(step)["beta"] for step in (0, 1, 2, 9)]
            [0.0, 1.0, 2.0, 2.0]
        """
        weights = {
            "tau": half_cosine(*self.tau, share_of(step, self.tau_steps, self.steps)),
            "beta": half_cosine(0.0, self.beta, share_of(step, self.beta_steps, self.steps)),
            "usage": half_cosine(self.usage, 0.0, step / self.steps),
            "edges": self.edges,
        }
        return weights | {"hard": True} if self.hard else weights

    def shown_at(self, step: int) -> dict[str, float]:
        """What the journal is shown of the schedules at ``step``."""
        return {"tau": self.weights_at(step)["tau"]}


@dataclasses.dataclass(frozen=True, kw_only=True)
class QuantizedStage1Settings(StageSettings):
    """How a discrete VAE with a quantizer is trained; what is not described here is as in `Stage1Settings`.

    Args:
        steps: optimizer steps.
        edges: how much more errors at edges weigh.
        start: pictures whose patches the codes start from, where the quantizer has codes to place.

    Raises:
        SettingError: where a value is out of its range.
    """

    steps: int = 3000
    batch: int = 32
    learning_rate: float = 4e-3
    warmup: int | float = 0.01
    final_learning_rate: float = 0.01
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = 0.0
    clip: float = 1.0
    averaging: float = 0.995
    edges: float = 12.0
    start: int = 256

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check(("start",), is_positive_integer, "an integer of at least 1")
        self.check(("edges",), is_finite_and_not_negative, "a finite number of at least 0")

    def weights_at(self, step: int) -> dict[str, float]:
        """What ``QuantizedVAE.loss`` is given at ``step``."""
        return {"edges": self.edges}

    def shown_at(self, step: int) -> dict[str, float]:
        """What the journal is shown of the schedules at ``step``: there are none but the learning rate's."""
        return {}


AnyStage1Settings = Stage1Settings | QuantizedStage1Settings


PAPER: dict[str, Any] = {
    "learning_rate": 1e-4,
    "warmup": 0.0,
    "final_learning_rate": 0.0125,
    "decay_steps": 1_200_000 / 3_000_000,
    "betas": (0.9, 0.999),
    "weight_decay": 1e-4,
    "clip": 0.0,
    "averaging": 0.999,
    "tau": (1.0, 1 / 16),
    "tau_steps": 150_000 / 3_000_000,
    "beta": 6.6,
    "beta_steps": 5_000 / 3_000_000,
    "usage": 0.0,
    "edges": 0.0,
}
"""The paper's constants (A.2), its lengths as fractions of its three million steps; clipping is not told of."""


_CONSTANTS: dict[str, dict[str, Any]] = {}
"""What a bottleneck is best trained with on the drawn task, where it is not what the others are."""


def quantized_settings(bottleneck: str, **given: Any) -> QuantizedStage1Settings:
    """How a bottleneck is trained, but for what is given.

    Example:
        >>> quantized_settings("simvq", steps=100).steps
        100
    """
    return QuantizedStage1Settings(**_CONSTANTS.get(bottleneck, {}) | given)


def settings_of(options: Stage1Options) -> AnyStage1Settings:
    """How stage 1 is trained, from what a user chose; architecture and bottleneck decide what is left out.

    Example:
        >>> settings_of(Stage1Options(architecture="paper", steps=3_000_000)).weights_at(150_000)["tau"]
        0.0625
        >>> settings_of(Stage1Options(bottleneck="simvq")).weights_at(0)
        {'edges': 12.0}
    """
    relaxed = options.bottleneck in RELAXED
    kind = Stage1Settings if relaxed else QuantizedStage1Settings
    names = [field.name for field in dataclasses.fields(kind)]
    chosen = {name: getattr(options, name, None) for name in names}
    given = {name: value for name, value in chosen.items() if value is not None}
    if options.bottleneck == "relaxed_st":
        given["hard"] = True
    paper = {name: value for name, value in PAPER.items() if name in names} if options.architecture == "paper" else {}
    return Stage1Settings(**paper | given) if relaxed else quantized_settings(options.bottleneck, **paper | given)
