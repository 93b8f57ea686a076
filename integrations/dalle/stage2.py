"""Stage 2: trains the transformer on captions and argmax tokens of their pictures.

Every picture is tokenised on the fly by the frozen dVAE. The loop is ``trainer.train``; the loss of text is divided by
the text tokens of all ranks. A batch is a pure function of seed and step, see ``batches``.

Source: Ramesh et al., "Zero-Shot Text-to-Image Generation", 2021, section 2.2 and appendix B.2 (AdamW with betas 0.9
and 0.96, weight decay 0.045, clipping by global norm, averaged iterates, 10 % BPE dropout).
"""

import dataclasses
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer

import distopt

from .batches import chunks
from .captioned import CaptionedStage
from .codes import Codec, code_vectors
from .context import Context, Source, StageResult, Stream
from .data.batches import text_and_pictures_at
from .precision import LossScaler, Scaler, adamw
from .sampling import sample
from .schedules import StageSettings, is_share
from .text import PAD, Tokenizer
from .trainer import Batch, Loss, check_divisible, train
from .transformer import Transformer, TransformerSettings

STAGE = 2
"""The number of this stage in the seeds of its batches."""

_LOOK = 1_000_000_012
"""A stage number that no training batch has: the captions that are sampled now and then, always the same."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stage2Settings(StageSettings):
    """How the transformer is trained.

    Args:
        steps: optimizer steps.
        batch: captions with pictures a step, over all ranks.
        learning_rate: the highest one.
        warmup: fraction of the steps in which the learning rate rises linearly; it then falls as a half cosine.
        final_learning_rate: where it ends, as a fraction of ``learning_rate``.
        betas: AdamW's decay rates.
        weight_decay: AdamW's, times the learning rate; matrices alone decay, no embedding, gain or bias.
        clip: largest global norm of the gradient.
        averaging: fraction of the steps so far over which the averaged weights reach back; 0 keeps the last weights.
        bpe_dropout: probability with which a merge of the text tokenizer is passed over in training.
        uncaptioned: fraction of a batch that are the source's pictures without captions, under an empty caption. They
            teach what pictures look like apart from what captions name, and guidance needs them.
        accumulate: micro-batches that each rank cuts its share of a batch into; they are exactly the batch.

    Raises:
        SettingError: where a value is out of its range.
    """

    steps: int = 4000
    batch: int = 32
    learning_rate: float = 4e-3
    warmup: float = 0.05
    final_learning_rate: float = 0.02
    betas: tuple[float, float] = (0.9, 0.96)
    weight_decay: float = 0.045
    clip: float = 1.0
    averaging: float = 0.05
    bpe_dropout: float = 0.1
    uncaptioned: float = 0.15

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check(("bpe_dropout", "uncaptioned"), is_share, "at least 0 and below 1")


def train_transformer(
    source: Source,
    dvae: Codec,
    tokenizer: Tokenizer,
    model: TransformerSettings,
    settings: Stage2Settings,
    context: Context,
) -> StageResult:
    """Train a transformer on captions and the argmax tokens of their pictures.

    Args:
        source: captions with pictures.
        dvae: tokenises pictures; it is not changed.
        tokenizer: tokenises captions.
        model: the transformer's size.
        settings: how it is trained.
        context: rank, device, seed, reducer, precision and journal.

    Returns:
        The transformer with averaged weights in eval mode. ``final_loss`` is this rank's mean loss over the last
        twentieth of the steps, before averaging.

    Raises:
        SettingError: if the global batch cannot be divided over the ranks.
    """
    check_divisible(settings, context.world_size)
    return train(_Stage(source, dvae, tokenizer, model, settings, context), context)


class _Stage(CaptionedStage):
    """What the trainer is told of stage 2."""

    settings: Stage2Settings

    def __init__(
        self,
        source: Source,
        dvae: Codec,
        tokenizer: Tokenizer,
        model: TransformerSettings,
        settings: Stage2Settings,
        context: Context,
    ) -> None:
        super().__init__(source, dvae, tokenizer, settings, context)
        with torch.random.fork_rng():
            torch.manual_seed(context.seed)
            vectors = code_vectors(source, dvae, model, context)
            self.model = Transformer(model, vectors).to(context.device)

    def units(self) -> list[nn.Module]:
        return list(self.model.blocks)

    def by_columns(self) -> list[nn.Parameter]:
        return second_matrices(self.model)

    def optimizer(self) -> Optimizer:
        return optimizer_of(self.model, dict(self.model.named_parameters()), self.settings, self._context)

    def scaler(self) -> Scaler:
        return scaler_of(self.model, self._context)

    def batch(self, step: int) -> Batch:
        return _batch(
            self._source, self._dvae, self._tokenizer, self.model.settings, self.settings, self._context, step
        )

    def weight(self, batch: Batch) -> dict[str, float]:
        text, image = batch
        return {"text": int((text != PAD).sum()), "image": image.numel()}

    def loss(self, trained: nn.Module, batch: Batch, step: int) -> Loss:
        text, image = batch
        count = self.weight(batch)
        losses = trained(text.to(self._context.device), image)
        sums = {"text": losses.text * count["text"] / 8, "image": losses.image * count["image"] * (7 / 8)}
        return Loss(sums, {"text": losses.text, "image": losses.image})

    def look(self, number: int) -> tuple[dict[str, float], dict[str, Tensor]]:
        """Free samples of some captions, beside their pictures."""
        device, length = self._context.device, self.model.settings.text_length
        captions, pictures = self._source.pairs(number, self._context.rng(_LOOK, 0))
        text = self._tokenizer.encode(captions, length).to(device)
        drawn = sample(self.model, text, generator=torch.Generator(device).manual_seed(self._context.seed))
        return {}, {"samples": torch.stack([pictures.to(device), self._dvae.decode(drawn)], dim=1).flatten(0, 1)}


def optimizer_of(
    transformer: Transformer,
    parameters: Mapping[str, nn.Parameter],
    settings: Stage2Settings,
    context: Context,
) -> Optimizer:
    """The stage's optimizer: matrices of linear layers decay, nothing else does.

    Args:
        transformer: tells what is a matrix of a linear layer.
        parameters: its own by name, or a rank's pieces of them.
        settings: how it is trained.
        context: in which precision.
    """
    linear = {f"{name}.weight" for name, module in transformer.named_modules() if isinstance(module, nn.Linear)}
    decay = [(name, p) for name, p in parameters.items() if name in linear]
    rest = [(name, p) for name, p in parameters.items() if name not in linear]
    groups = [{"params": decay, "weight_decay": settings.weight_decay}, {"params": rest, "weight_decay": 0.0}]
    return adamw(groups, context, lr=settings.learning_rate, betas=settings.betas)


def second_matrices(transformer: Transformer) -> list[nn.Parameter]:
    """Those matrices whose shards are cut along the other dimension, as in the paper: factors are smaller then."""
    return [block.mlp_out.weight for block in transformer.blocks]


def scaler_of(transformer: Transformer, context: Context) -> Scaler:
    """The stage's scaler: in 16 bits one for the attention and one for the MLP of every layer, the rest in float32.

    Args:
        transformer: whose branches are scaled.
        context: in which precision, and where.
    """
    if context.precision == "fp32":
        return LossScaler(context.device.type, enabled=False)
    branches: dict[str, tuple[nn.Module, ...]] = {}
    for layer, block in enumerate(transformer.blocks):
        branches[f"{layer}.attention"] = (block.attention_norm, block.attention_in, block.attention_out)
        branches[f"{layer}.mlp"] = (block.mlp_norm, block.mlp_in, block.mlp_out)
    return distopt.ResblockScaler(branches, dtype=context.dtype)


def _batch(
    source: Source,
    dvae: Codec,
    tokenizer: Tokenizer,
    model: TransformerSettings,
    settings: Stage2Settings,
    context: Context,
    step: int,
) -> tuple[Tensor, Tensor]:
    """This rank's text and image tokens of ``step``."""
    texts, pictures = [], []
    if isinstance(source, Stream):

        def encode(captions: list[str], rng: np.random.Generator) -> Tensor:
            return tokenizer.encode(captions, model.text_length, rng=rng, dropout=settings.bpe_dropout)

        part = context.part(STAGE, step, settings.batch)
        text, drawn = text_and_pictures_at(source, part, encode, settings.uncaptioned)
        return text, dvae.tokenize(drawn.to(context.device))
    for chunk in chunks(context, STAGE, step, settings.batch):
        # A fraction of a picture is left to chance.
        silent = int(settings.uncaptioned * chunk.rows + chunk.rng.random())
        captions, drawn = source.pairs(chunk.rows - silent, chunk.rng)
        text = tokenizer.encode(captions, model.text_length, rng=chunk.rng, dropout=settings.bpe_dropout)
        if silent:
            text = F.pad(text, (0, 0, 0, silent), value=PAD)
            drawn = torch.cat([drawn, source.pictures(silent, chunk.rng)])
        texts.append(text[chunk.kept])
        pictures.append(drawn[chunk.kept])
    with torch.no_grad():
        image = dvae.tokenize(torch.cat(pictures).to(context.device))
    # Text stays where its tokens can be counted without waiting for a device.
    return torch.cat(texts), image
