"""Stage 1: trains the dVAE on pictures alone, and judges it as a tokenizer on the drawn task.

How a relaxed one is trained, and one with a quantizer, is in ``stage1_settings``. A short run of the relaxed one needs
other constants than the paper's three million updates; measured on the drawn task:

* codes start as k-means centres with logits far apart, so the run starts with nearly all codes in use and a low
  temperature suffices; from random logits at temperature 1 most of them are lost in the first hundred steps;
* the codebook starts from the same centres: 0.79 instead of 0.56 exact round trips after 600 steps;
* errors at edges weigh more, since flat colour is most of a picture and is learned at once;
* a falling push towards equal use of the codes replaces what the KL term does at scale.

The loop is ``trainer.train``; a batch is a pure function of seed and step, see ``batches``. A tokenizer is judged by
what its argmax tokens bring back (``evaluate_tokenizer``), never by its loss.
"""

from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from distopt.errors import SettingError

from ..scenes.draw import Scenes, to_tensor, to_uint8
from ..scenes.read import matches_all
from .architectures import AnyDVAE, AnyDVAESettings, build
from .batches import chunks
from .context import Context, Source, StageResult, Stream
from .data.batches import pictures_at
from .dvae import DVAE
from .precision import LossScaler, Scaler, adamw
from .quantized import QuantizedSettings, QuantizedVAE
from .relaxed import gumbel
from .stage1_settings import AnyStage1Settings
from .trainer import Batch, Loss, check_divisible, train

STAGE = 1
"""The number of this stage in the seeds of its batches."""

_LOOK = 1_000_000_011
_LOOKED_AT = 64
"""Pictures that are looked at now and then, always the same, from a stage number that no training batch has."""

_START = 1_000_000_001
"""A stage number that no training batch has: the pictures that the codes start from, equal on all ranks."""


def train_dvae(source: Source, model: AnyDVAESettings, settings: AnyStage1Settings, context: Context) -> StageResult:
    """Train a discrete VAE on pictures.

    Args:
        source: the pictures.
        model: its shape.
        settings: how it is trained; of the kind that suits the model, relaxed or with a quantizer.
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

    def __init__(self, source: Source, model: AnyDVAESettings, settings: AnyStage1Settings, context: Context) -> None:
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
        pictures, *noise = batch
        drawn = {"noise": noise[0]} if noise else {}
        loss = trained(pictures, **self.settings.weights_at(step), **drawn, dtype=self._context.dtype)
        return Loss({"pictures": loss.total * len(pictures)}, loss.terms())

    def weight_of_last(self, taken: int) -> float:
        """More early on: the start is left behind."""
        return 1 - min(self.settings.averaging, (1 + taken) / (10 + taken))

    def values(self, step: int) -> dict[str, float]:
        return self.settings.shown_at(step)

    def look(self, number: int) -> tuple[dict[str, float], dict[str, Tensor]]:
        """Codes in use, and pictures beside what their tokens decode to."""
        pictures = self._source.pictures(_LOOKED_AT, self._context.rng(_LOOK, 0)).to(self._context.device)
        tokens = self.model.tokenize(pictures)
        used, perplexity = usage(tokens.cpu(), self.model.settings.codes)
        some = pictures[:number]
        beside = torch.stack([some, self.model.decode(tokens[:number])], dim=1).flatten(0, 1)
        return {"codes/used": used, "codes/perplexity": perplexity}, {"reconstructions": beside}


def evaluate_tokenizer(dvae: AnyDVAE, scenes: Scenes, n: int = 500, seed: int = 0) -> dict[str, Any]:
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


def _start(source: Source, model: AnyDVAESettings, settings: AnyStage1Settings, context: Context) -> AnyDVAE:
    """Build the model, the same on every rank; a quantizer, or the small relaxed one, with its codes in place."""
    rng = np.random.default_rng([context.seed, _START])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(rng.integers(2**63)))
        dvae = build(model)
    if isinstance(dvae, DVAE | QuantizedVAE):
        pictures, generator = source.pictures(settings.start, rng), torch.Generator()
        generator.manual_seed(int(rng.integers(2**63)))
        if isinstance(dvae, QuantizedVAE):
            _place(dvae.to(context.device), pictures, generator, context)
        else:
            # On the CPU whatever the device is: k-means must not depend on it.
            dvae.fit_codes(pictures, generator)
    return dvae.to(context.device)


def _place(vae: QuantizedVAE, pictures: Tensor, generator: torch.Generator, context: Context) -> None:
    """Start the codes from all ranks' parts of the pictures: in their order, so from the same points as one rank."""
    if dist.is_initialized():
        share = -(-len(pictures) // context.world_size)
        pictures = pictures[context.rank * share : (context.rank + 1) * share]
    vae.start(pictures.to(context.device), generator)


def _batch(
    source: Source, model: AnyDVAESettings, settings: AnyStage1Settings, context: Context, step: int
) -> tuple[Tensor, ...]:
    """This rank's pictures of ``step`` and, for a relaxed model, the Gumbel noise of their logits."""
    pictures, noises = [], []
    if isinstance(source, Stream):
        pictures.append(pictures_at(source, context.part(STAGE, step, settings.batch)))
    for chunk in chunks(context, STAGE, step, settings.batch):
        if not isinstance(source, Stream):
            pictures.append(source.pictures(chunk.rows, chunk.rng)[chunk.kept])
        if isinstance(model, QuantizedSettings):
            continue
        generator = torch.Generator(context.device).manual_seed(int(chunk.rng.integers(2**63)))
        logits = torch.empty(chunk.rows, model.codes, model.grid, model.grid, device=context.device)
        noises.append(gumbel(logits, generator)[chunk.kept])
    drawn = torch.cat(pictures).to(context.device)
    return (drawn, torch.cat(noises)) if noises else (drawn,)
