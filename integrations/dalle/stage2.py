"""Stage 2: trains the transformer on captions and argmax tokens of their pictures.

Every picture is tokenised on the fly by the frozen dVAE. All that makes the training distributed is
``context.distribute`` and ``distopt.accumulate``, which divides the loss of text by the text tokens of all ranks. A
batch is a pure function of seed and step, see ``batches``.

Source: Ramesh et al., "Zero-Shot Text-to-Image Generation", 2021, section 2.2 and appendix B.2 (AdamW with betas 0.9
and 0.96, weight decay 0.045, clipping by global norm, averaged iterates, 10 % BPE dropout).
"""

import copy
import dataclasses
import time
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import distopt
from distopt.errors import SettingError

from .averaging import Averaged
from .batches import chunks
from .codes import Codec, code_vectors
from .context import Context, Source, StageResult, distribute
from .precision import LossScaler, Scaler, Stepper, adamw
from .schedules import StageSettings, is_share
from .text import PAD, Tokenizer
from .transformer import Transformer, TransformerSettings

STAGE = 2
"""The number of this stage in the seeds of its batches."""


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

    Raises:
        SettingError: where a value is out of its range.
    """

    steps: int = 4000
    batch: int = 32
    learning_rate: float = 4e-3
    warmup: float = 0.05
    final_learning_rate: float = 0.02
    betas: tuple[float, float] = (0.9, 0.96)
    weight_decay: float = 0.5
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
    if settings.batch % context.world_size:
        raise SettingError("Stage2Settings.batch", settings.batch, f"a multiple of the {context.world_size} ranks")
    began = time.perf_counter()
    with torch.random.fork_rng():
        torch.manual_seed(context.seed)
        vectors = code_vectors(source, dvae, model, context)
        transformer = Transformer(model, vectors).to(context.device)
    whole = copy.deepcopy(transformer).to("meta")
    units = list(transformer.blocks)
    trained, registration = distribute(transformer, context, units, by_columns=second_matrices(transformer))
    averaged = Averaged(transformer)
    optimizer = optimizer_of(transformer, dict(transformer.named_parameters()), settings, context)
    scaler = _scaler(transformer, context)
    stepper = Stepper(transformer.parameters(), optimizer, scaler, settings.clip, settings.steps, context)
    curve: list[tuple[int, float]] = []
    trained.train()
    loader = (_batch(source, dvae, tokenizer, model, settings, context, step) for step in range(settings.steps))
    for step, window in enumerate(distopt.accumulate(loader, trained, steps=1, weight=_weight)):
        for text, image in window:
            count = _weight((text, image))
            with stepper.products():
                losses = trained(text, image)
                sums = {"text": losses.text * count["text"] / 8, "image": losses.image * count["image"] * (7 / 8)}
                window.backward({kind: scaler.scale(part) for kind, part in sums.items()})
        if stepper.step(settings.learning_rate_at(step)):
            averaged.move(_weight_of_last(stepper.taken - 1, settings))
        curve.append((step, losses.total().item()))
        values = {"loss": curve[-1][1], "text": losses.text.item(), "image": losses.image.item()}
        values["learning_rate"] = settings.learning_rate_at(step)
        context.log(step + 1, settings.steps, {**values, **stepper.values()})
    last = [value for _, value in curve[-max(1, settings.steps // 20) :]]
    return StageResult(
        model=averaged.write(whole),
        steps=settings.steps,
        final_loss=sum(last) / len(last),
        curve=curve,
        wall_seconds=time.perf_counter() - began,
        stats=None if registration is None else registration.stats(),
        skipped_steps=stepper.skipped,
        scales=stepper.scales,
    )


def optimizer_of(
    transformer: Transformer,
    parameters: Mapping[str, nn.Parameter],
    settings: Stage2Settings,
    context: Context,
) -> torch.optim.Optimizer:
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


def _scaler(transformer: Transformer, context: Context) -> Scaler:
    """In 16 bits, a scale for the attention and one for the MLP of every layer; all else stays in float32."""
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
    return torch.cat(texts).to(context.device), image


def _weight(batch: tuple[Tensor, Tensor]) -> dict[str, int]:
    """How many tokens of each kind a batch has."""
    text, image = batch
    return {"text": int((text != PAD).sum()), "image": image.numel()}


def _weight_of_last(step: int, settings: Stage2Settings) -> float:
    """The weight of the last weights in the averaged ones, whose window grows with the steps taken before."""
    return 1.0 if settings.averaging == 0 else min(1.0, 1 / (1 + settings.averaging * step))
