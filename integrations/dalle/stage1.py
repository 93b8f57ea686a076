"""Stage 1: trains the dVAE on pictures alone, and judges it as a tokenizer on the drawn task.

Schedules are half cosines over fractions of the run (DALL-E, appendix A.2: temperature 1 to 1/16, KL weight from 0).
A short run needs other constants than the paper's three million updates; measured on the drawn task:

* codes start as k-means centres with logits far apart, so the run starts with nearly all codes in use and a low
  temperature suffices; from random logits at temperature 1 most of them are lost in the first hundred steps;
* the codebook starts from the same centres: 0.79 instead of 0.56 exact round trips after 600 steps;
* errors at edges weigh more, since flat colour is most of a picture and is learned at once;
* a falling push towards equal use of the codes replaces what the KL term does at scale.

The loop is ``trainer.train``; a batch is a pure function of seed and step, see ``batches``. A tokenizer is judged by
what its argmax tokens bring back (``evaluate_tokenizer``), never by its loss.
"""

import dataclasses
import math
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from distopt.errors import SettingError

from ..scenes.draw import Scenes, to_tensor, to_uint8
from ..scenes.read import matches_all
from .architectures import AnyDVAESettings, build
from .batches import chunks
from .context import Context, Source, StageResult, Stream
from .data.batches import pictures_at
from .dvae import DVAE
from .precision import LossScaler, Scaler, adamw
from .relaxed import RelaxedVAE, gumbel
from .schedules import (
    LENGTH,
    StageSettings,
    half_cosine,
    is_finite_and_not_negative,
    is_length,
    is_positive_integer,
    share_of,
)
from .settings import Stage1Options
from .trainer import Batch, Loss, check_divisible, train

STAGE = 1
"""The number of this stage in the seeds of its batches."""

_LOOK = 1_000_000_011
_LOOKED_AT = 64
"""Pictures that are looked at now and then, always the same, from a stage number that no training batch has."""

_START = 1_000_000_001
"""A stage number that no training batch has: the pictures that the codes start from, equal on all ranks."""


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
        edges: how much more errors at edges weigh, see ``dvae.edge_weights``.
        start: pictures whose patches the codes of the small architecture start from.

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
        return {
            "tau": half_cosine(*self.tau, share_of(step, self.tau_steps, self.steps)),
            "beta": half_cosine(0.0, self.beta, share_of(step, self.beta_steps, self.steps)),
            "usage": half_cosine(self.usage, 0.0, step / self.steps),
            "edges": self.edges,
        }


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


def settings_of(options: Stage1Options) -> Stage1Settings:
    """How stage 1 is trained, from what a user chose; the architecture decides what is left out.

    Example:
        >>> settings_of(Stage1Options(architecture="paper", steps=3_000_000)).weights_at(150_000)["tau"]
        0.0625
    """
    chosen = {field.name: getattr(options, field.name, None) for field in dataclasses.fields(Stage1Settings)}
    given = {name: value for name, value in chosen.items() if value is not None}
    return Stage1Settings(**(PAPER if options.architecture == "paper" else {}) | given)


def train_dvae(source: Source, model: AnyDVAESettings, settings: Stage1Settings, context: Context) -> StageResult:
    """Train a dVAE on pictures.

    Args:
        source: the pictures.
        model: the dVAE's shape.
        settings: how it is trained.
        context: rank, device, seed, reducer, precision and journal.

    Returns:
        The dVAE with averaged weights in eval mode. ``final_loss`` is this rank's mean loss over the last twentieth
        of the steps, before averaging.

    Raises:
        SettingError: the pictures are not of the model's size, or the batch cannot be divided over the ranks.
    """
    if source.size != model.size:
        raise SettingError(
            f"{type(model).__name__}.size", model.size, f"the size of the source's pictures, {source.size}"
        )
    check_divisible(settings, context.world_size)
    return train(_Stage(source, model, settings, context), context)


class _Stage:
    """What the trainer is told of stage 1."""

    def __init__(self, source: Source, model: AnyDVAESettings, settings: Stage1Settings, context: Context) -> None:
        self.settings = settings
        self.model = _start(source, model, settings, context)
        self.grad_scaler = LossScaler(context.device.type, enabled=context.precision == "fp16")
        self._source, self._context = source, context

    def units(self) -> list[nn.Module]:
        return list(self.model.units())

    def by_columns(self) -> list[nn.Parameter]:
        return []

    def optimizer(self) -> Optimizer:
        settings = self.settings
        rules = {"lr": settings.learning_rate, "betas": settings.betas, "weight_decay": settings.weight_decay}
        return adamw(self.model.named_parameters(), self._context, **rules)

    def scaler(self) -> Scaler:
        return self.grad_scaler

    def batch(self, step: int) -> Batch:
        return _batch(self._source, self.model.settings, self.settings, self._context, step)

    def weight(self, batch: Batch) -> dict[str, float]:
        return {"pictures": len(batch[0])}

    def loss(self, trained: nn.Module, batch: Batch, step: int) -> Loss:
        pictures, noise = batch
        loss = trained(pictures, **self.settings.weights_at(step), noise=noise, dtype=self._context.dtype)
        values = {name: value for name, value in vars(loss).items() if name != "total"}
        return Loss({"pictures": loss.total * len(pictures)}, values)

    def weight_of_last(self, taken: int) -> float:
        """More early on: the start is left behind."""
        return 1 - min(self.settings.averaging, (1 + taken) / (10 + taken))

    def values(self, step: int) -> dict[str, float]:
        return {"tau": self.settings.weights_at(step)["tau"]}

    def look(self, number: int) -> tuple[dict[str, float], dict[str, Tensor]]:
        """Codes in use, and pictures beside what their tokens decode to."""
        pictures = self._source.pictures(_LOOKED_AT, self._context.rng(_LOOK, 0)).to(self._context.device)
        tokens = self.model.tokenize(pictures)
        used, perplexity = usage(tokens.cpu(), self.model.settings.codes)
        some = pictures[:number]
        beside = torch.stack([some, self.model.decode(tokens[:number])], dim=1).flatten(0, 1)
        return {"codes/used": used, "codes/perplexity": perplexity}, {"reconstructions": beside}


def evaluate_tokenizer(dvae: RelaxedVAE, scenes: Scenes, n: int = 500, seed: int = 0) -> dict[str, Any]:
    """Judge a tokenizer by its argmax round trip: are tokenised and decoded pictures still read as what they show?

    Args:
        dvae: the tokenizer.
        scenes: the task that draws the pictures.
        n: pictures of each split.
        seed: draws them.

    Returns:
        ``exact``, the share over all splits; ``s0``, ``s1`` and ``s2``, the share in each; ``codes_used``, how many
        codes occur at all; ``perplexity``, the exponential of the entropy of their frequencies; ``n``, all pictures.
    """
    rng = np.random.default_rng([seed, STAGE])
    device = next(dvae.parameters()).device
    shares: dict[str, float] = {}
    counts = torch.zeros(dvae.settings.codes, dtype=torch.int64)
    for split in ("s0", "s1", "s2"):
        right = 0
        triples = [triple for triple, _ in scenes.test_captions(split, n, rng)]
        for first in range(0, n, 256):
            part = triples[first : first + 256]
            tokens = dvae.tokenize(to_tensor(scenes.render(part, rng)).to(device))
            counts += torch.bincount(tokens.flatten().cpu(), minlength=len(counts))
            right += sum(matches_all(to_uint8(dvae.decode(tokens)), part))
        shares[split] = right / n
    frequencies = counts[counts > 0] / counts.sum()
    return {
        "exact": sum(shares.values()) / len(shares),
        **shares,
        "codes_used": int((counts > 0).sum()),
        "perplexity": float(torch.exp(-(frequencies * frequencies.log()).sum())),
        "n": 3 * n,
    }


def usage(tokens: Tensor, codes: int) -> tuple[int, float]:
    """How many codes occur in ``tokens``, and their perplexity: the exponential of the entropy of their frequencies.

    Example:
        >>> usage(torch.tensor([[0, 1], [0, 1]]), codes=4)
        (2, 2.0)
    """
    counts = torch.bincount(tokens.flatten(), minlength=codes).double()
    frequencies = counts[counts > 0] / counts.sum()
    return int((counts > 0).sum()), round(float(torch.exp(-(frequencies * frequencies.log()).sum())), 6)


def _start(source: Source, model: AnyDVAESettings, settings: Stage1Settings, context: Context) -> RelaxedVAE:
    """Build the dVAE, the same on every rank; the small architecture's with its codes in place."""
    rng = np.random.default_rng([context.seed, _START])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(rng.integers(2**63)))
        dvae = build(model)
    if isinstance(dvae, DVAE):
        # On the CPU whatever the device is: k-means must not depend on it.
        dvae.fit_codes(source.pictures(settings.start, rng), torch.Generator().manual_seed(int(rng.integers(2**63))))
    return dvae.to(context.device)


def _batch(
    source: Source, model: AnyDVAESettings, settings: Stage1Settings, context: Context, step: int
) -> tuple[Tensor, Tensor]:
    """This rank's pictures of ``step``, and the Gumbel noise of their logits."""
    pictures, noises = [], []
    if isinstance(source, Stream):
        pictures.append(pictures_at(source, context.part(STAGE, step, settings.batch)))
    for chunk in chunks(context, STAGE, step, settings.batch):
        if not isinstance(source, Stream):
            pictures.append(source.pictures(chunk.rows, chunk.rng)[chunk.kept])
        generator = torch.Generator(context.device).manual_seed(int(chunk.rng.integers(2**63)))
        logits = torch.empty(chunk.rows, model.codes, model.grid, model.grid, device=context.device)
        noises.append(gumbel(logits, generator)[chunk.kept])
    return torch.cat(pictures).to(context.device), torch.cat(noises)
