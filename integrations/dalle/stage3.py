"""Stage 3: trains the contrastive model that re-ranks samples, on captioned training pictures alone.

A batch is made of groups of pairs whose captions share most of their words: among captions drawn at random one tells
the right one by a colour alone, and nothing has to be learned of shapes. Groups are compared within themselves, so the
loss is the same for any number of ranks. Pictures are seen as the dVAE brings them back, for that is what will be
judged.

What a sampler gets wrong is seldom another picture that a caption could name: it is a form that is none. So captions
must also tell some of the pictures from themselves with codes exchanged for those of another picture of the group, at
the same places.

The other words of a group come from other training captions, never from words exchanged in one: captions made up would
name combinations that no training caption names, and always as wrong answers.

Source: Radford et al., "Learning Transferable Visual Models From Natural Language Supervision", 2021, section 2.3.
"""

import dataclasses

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from distopt.errors import SettingError

from .captioned import CaptionedStage
from .codes import Codec
from .context import Context, Source, StageResult
from .contrast import Contrast, ContrastSettings
from .precision import LossScaler, Scaler, adamw
from .schedules import StageSettings, is_positive_integer
from .text import PAD, Tokenizer
from .trainer import Batch, Loss, train

STAGE = 3
"""The number of this stage in the seeds of its batches."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stage3Settings(StageSettings):
    """How the contrastive model is trained.

    Args:
        steps: optimizer steps.
        batch: captions with pictures a step, over all ranks; a multiple of ``group``.
        learning_rate: the highest one.
        warmup: length in which the learning rate rises linearly; it then falls as a half cosine.
        final_learning_rate: where it ends, as a fraction of ``learning_rate``.
        betas: AdamW's decay rates.
        weight_decay: AdamW's, times the learning rate.
        clip: largest global norm of the gradient.
        averaging: fraction of the steps so far over which the averaged weights reach back; 0 keeps the last weights.
        group: pairs that are compared with each other.
        pool: pairs that a group is chosen from, by how many words they share.
        spoilt: fraction of the pictures that captions must tell from themselves with codes exchanged.
        exchanged: largest fraction of a picture's codes that are; each picture draws its own.

    Raises:
        SettingError: where a value is out of its range.
    """

    steps: int = 400
    batch: int = 128
    learning_rate: float = 3e-3
    warmup: int | float = 0.05
    final_learning_rate: float = 0.02
    betas: tuple[float, float] = (0.9, 0.98)
    weight_decay: float = 0.05
    clip: float = 1.0
    averaging: float = 0.05
    group: int = 16
    pool: int = 64
    spoilt: float = 0.5
    exchanged: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check(("group", "pool"), is_positive_integer, "an integer of at least 1")
        self.check(("pool",), lambda value: value >= self.group, f"at least group, which is {self.group}")
        self.check(("batch",), lambda value: value % self.group == 0, f"a multiple of group, which is {self.group}")
        self.check(("spoilt", "exchanged"), lambda value: 0 <= value <= 1, "from 0 to 1")

    @property
    def together(self) -> int:
        """Rows of a batch that are not divided over ranks."""
        return self.group


def train_contrast(
    source: Source,
    dvae: Codec,
    tokenizer: Tokenizer,
    model: ContrastSettings,
    settings: Stage3Settings,
    context: Context,
) -> StageResult:
    """Train a contrastive model on captions and pictures.

    Args:
        source: captions with pictures.
        dvae: brings pictures back; it is not changed.
        tokenizer: tokenises captions.
        model: the model's size.
        settings: how it is trained.
        context: rank, device, seed, reducer and journal. Products are computed in float32 whatever the precision.

    Returns:
        The model with averaged weights in eval mode. ``final_loss`` is this rank's mean loss over the last twentieth
        of the steps, before averaging.

    Raises:
        SettingError: if the groups of a batch cannot be divided over the ranks.
    """
    if settings.batch // settings.group % (context.world_size * settings.accumulate):
        allowed = f"{settings.group} pairs for each of the {context.world_size} ranks, or a multiple"
        raise SettingError("Stage3Settings.batch", settings.batch, allowed)
    context = dataclasses.replace(context, precision="fp32")
    return train(_Stage(source, dvae, tokenizer, model, settings, context), context)


class _Stage(CaptionedStage):
    """What the trainer is told of stage 3."""

    settings: Stage3Settings

    def __init__(
        self,
        source: Source,
        dvae: Codec,
        tokenizer: Tokenizer,
        model: ContrastSettings,
        settings: Stage3Settings,
        context: Context,
    ) -> None:
        super().__init__(source, dvae, tokenizer, settings, context)
        with torch.random.fork_rng():
            torch.manual_seed(context.seed)
            self.model = Contrast(model).to(context.device)

    def units(self) -> list[nn.Module]:
        return [*self.model.around, self.model.between]

    def optimizer(self) -> Optimizer:
        settings = self.settings
        rules = {"lr": settings.learning_rate, "betas": settings.betas, "weight_decay": settings.weight_decay}
        return adamw(self.model.named_parameters(), self._context, **rules)

    def scaler(self) -> Scaler:
        return LossScaler(self._context.device.type, enabled=False)

    def batch(self, step: int) -> Batch:
        return batch_of(
            self._source, self._dvae, self._tokenizer, self.model.settings, self.settings, self._context, step
        )

    def weight(self, batch: Batch) -> dict[str, float]:
        return {"groups": len(batch[0])}

    def loss(self, trained: nn.Module, batch: Batch, step: int) -> Loss:
        loss = trained(*batch)
        return Loss({"groups": loss.total * len(batch[0])}, {"right": loss.right})


@torch.no_grad()
def batch_of(
    source: Source,
    dvae: Codec,
    tokenizer: Tokenizer,
    model: ContrastSettings,
    settings: Stage3Settings,
    context: Context,
    step: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """This rank's groups of ``step``: a pure function of seed, step and the groups' numbers.

    Returns:
        Pictures ``(N, G, 3, size, size)``, text ``(N, G, T)``, and the first M pictures of each group with codes
        exchanged ``(N, M, 3, size, size)``.
    """
    share, spoilt = settings.batch // settings.group // context.world_size, round(settings.spoilt * settings.group)
    pictures, texts = [], []
    rngs = [context.rng(STAGE, step, number) for number in range(context.rank * share, (context.rank + 1) * share)]
    for rng in rngs:
        captions, drawn = source.pairs(settings.pool, rng)
        text = tokenizer.encode(captions, model.text_length)
        # From alike to less alike before; any of them may be spoilt.
        chosen = alike(text, settings.group, rng)[torch.from_numpy(rng.permutation(settings.group))]
        pictures.append(drawn[chosen])
        texts.append(text[chosen])
    codes = dvae.tokenize(torch.cat(pictures).to(context.device)).unflatten(0, (share, settings.group))
    exchanged = [rng.random((spoilt, codes.shape[2])) < settings.exchanged * rng.random((spoilt, 1)) for rng in rngs]
    masks = torch.from_numpy(np.stack(exchanged)).to(context.device)
    codes = torch.cat([codes, torch.where(masks, codes.roll(1, 1)[:, :spoilt], codes[:, :spoilt])], dim=1)
    seen = dvae.decode(codes.flatten(0, 1)).clamp(0, 1).unflatten(0, codes.shape[:2])
    return seen[:, : settings.group], torch.stack(texts).to(context.device), seen[:, settings.group :]


def alike(text: Tensor, count: int, rng: np.random.Generator) -> Tensor:
    """Choose captions that share many tokens with one of them, which is drawn at random.

    Args:
        text: ``(M, T)`` int64 with ``PAD``.
        count: how many to choose, at most M.
        rng: draws the first, and decides between captions that share equally many.

    Returns:
        Indices ``(count,)``, the first one first, then the others as they are less alike.

    Example:
        >>> text = torch.tensor([[1, 2], [3, 4], [1, 2], [3, 4]])
        >>> sorted(alike(text, 2, np.random.default_rng(2)).tolist())
        [1, 3]
    """
    bags = torch.zeros(len(text), int(text.max()) + 2)
    bags.scatter_add_(1, text + 1, (text != PAD).float())
    first = int(rng.integers(len(text)))
    shared = torch.minimum(bags, bags[first]).sum(1) * 2 / (bags.sum(1) + bags[first].sum()).clamp(min=1)
    shared[first] = 2.0
    # Half of the smallest difference between two captions of 32 tokens.
    order = shared + torch.from_numpy(rng.random(len(text)) / 64).float()
    return order.argsort(descending=True)[:count]
