"""Stage 3: trains the contrastive model that re-ranks samples, on captioned training pictures alone.

A batch is made of groups of pairs whose captions share most of their words: among captions drawn at random one tells
the right one by a colour alone, and nothing has to be learned of shapes. Groups are compared within themselves, so the
loss is the same for any number of ranks. Half of the pictures are seen as the dVAE brings them back, for that is what
will be judged.

The other words of a group come from other training captions, never from words exchanged in one: captions made up would
name combinations that no training caption names, and always as wrong answers.

Source: Radford et al., "Learning Transferable Visual Models From Natural Language Supervision", 2021, section 2.3.
"""

import copy
import dataclasses
import time

import numpy as np
import torch
from torch import Tensor

import distopt
from distopt.errors import SettingError

from .averaging import Averaged
from .codes import Codec
from .context import Context, Source, StageResult, distribute
from .contrast import Contrast, ContrastSettings
from .precision import LossScaler, Stepper, adamw
from .schedules import StageSettings, is_positive_integer
from .text import PAD, Tokenizer

STAGE = 3
"""The number of this stage in the seeds of its batches."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stage3Settings(StageSettings):
    """How the contrastive model is trained.

    Args:
        steps: optimizer steps.
        batch: captions with pictures a step, over all ranks; a multiple of ``group``.
        learning_rate: the highest one.
        warmup: fraction of the steps in which the learning rate rises linearly; it then falls as a half cosine.
        final_learning_rate: where it ends, as a fraction of ``learning_rate``.
        betas: AdamW's decay rates.
        weight_decay: AdamW's, times the learning rate.
        clip: largest global norm of the gradient.
        averaging: fraction of the steps so far over which the averaged weights reach back; 0 keeps the last weights.
        group: pairs that are compared with each other.
        pool: pairs that a group is chosen from, by how many words they share.
        decoded: fraction of the pictures that are seen as the dVAE brings them back.

    Raises:
        SettingError: where a value is out of its range.
    """

    steps: int = 400
    batch: int = 192
    learning_rate: float = 3e-3
    warmup: float = 0.05
    final_learning_rate: float = 0.02
    betas: tuple[float, float] = (0.9, 0.98)
    weight_decay: float = 0.05
    clip: float = 1.0
    averaging: float = 0.05
    group: int = 16
    pool: int = 64
    decoded: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check(("group", "pool"), is_positive_integer, "an integer of at least 1")
        self.check(("pool",), lambda value: value >= self.group, f"at least group, which is {self.group}")
        self.check(("batch",), lambda value: value % self.group == 0, f"a multiple of group, which is {self.group}")
        self.check(("decoded",), lambda value: 0 <= value <= 1, "from 0 to 1")


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
    groups, left = divmod(settings.batch // settings.group, context.world_size)
    if left:
        allowed = f"a multiple of the {context.world_size} ranks times the group of {settings.group}"
        raise SettingError("Stage3Settings.batch", settings.batch, allowed)
    began = time.perf_counter()
    context = dataclasses.replace(context, precision="fp32")
    with torch.random.fork_rng():
        torch.manual_seed(context.seed)
        contrast = Contrast(model).to(context.device)
    whole = copy.deepcopy(contrast).to("meta")
    trained, registration = distribute(contrast, context, [*contrast.around, contrast.between])
    averaged = Averaged(contrast)
    rules = {"lr": settings.learning_rate, "betas": settings.betas, "weight_decay": settings.weight_decay}
    optimizer = adamw(contrast.named_parameters(), context, **rules)
    scaler = LossScaler(context.device.type, enabled=False)
    stepper = Stepper(contrast.parameters(), optimizer, scaler, settings.clip, settings.steps, context)
    curve: list[tuple[int, float]] = []
    trained.train()
    loader = (batch_of(source, dvae, tokenizer, model, settings, context, step) for step in range(settings.steps))
    for step, window in enumerate(distopt.accumulate(loader, trained, steps=1, weight=lambda _: groups)):
        for pictures, text in window:
            loss = trained(pictures, text)
            window.backward(loss.total * groups)
        if stepper.step(settings.learning_rate_at(step)):
            averaged.move(1 / (1 + settings.averaging * (stepper.taken - 1)) if settings.averaging else 1.0)
        curve.append((step, loss.total.item()))
        values = {"loss": curve[-1][1], "right": loss.right.item()}
        context.log(step + 1, settings.steps, {**values, "learning_rate": settings.learning_rate_at(step)})
    last = [value for _, value in curve[-max(1, settings.steps // 20) :]]
    return StageResult(
        model=averaged.write(whole),
        steps=settings.steps,
        final_loss=sum(last) / len(last),
        curve=curve,
        wall_seconds=time.perf_counter() - began,
        stats=None if registration is None else registration.stats(),
    )


@torch.no_grad()
def batch_of(
    source: Source,
    dvae: Codec,
    tokenizer: Tokenizer,
    model: ContrastSettings,
    settings: Stage3Settings,
    context: Context,
    step: int,
) -> tuple[Tensor, Tensor]:
    """This rank's groups of ``step``: a pure function of seed, step and the groups' numbers.

    Returns:
        Pictures ``(N, G, 3, size, size)`` and text ``(N, G, T)``.
    """
    share = settings.batch // settings.group // context.world_size
    pictures, texts = [], []
    for number in range(context.rank * share, (context.rank + 1) * share):
        rng = context.rng(STAGE, step, number)
        captions, drawn = source.pairs(settings.pool, rng)
        text = tokenizer.encode(captions, model.text_length)
        chosen = alike(text, settings.group, rng)
        pictures.append(drawn[chosen])
        texts.append(text[chosen])
    seen = torch.cat(pictures).to(context.device)
    # Neighbours in a group are alike, but first to last: every other one is as good as a choice at random.
    brought_back = torch.arange(len(seen), device=seen.device) * settings.decoded % 1 + settings.decoded >= 1
    if brought_back.any():
        seen[brought_back] = dvae.decode(dvae.tokenize(seen[brought_back])).clamp(0, 1)
    return seen.unflatten(0, (share, settings.group)), torch.stack(texts).to(context.device)


def alike(text: Tensor, count: int, rng: np.random.Generator) -> Tensor:
    """Choose captions that share many tokens with one of them, which is drawn at random.

    Args:
        text: ``(M, T)`` int64 with ``PAD``.
        count: how many to choose, at most M.
        rng: draws the first, and decides between captions that share equally many.

    Returns:
        Indices ``(count,)``, the first one first, then the others as they are less alike.

    Example:
        >>> text = torch.tensor([[1, 2], [3, 4], [1, 2], [1, 4]])
        >>> sorted(alike(text, 2, np.random.default_rng(2)).tolist())
        [0, 2]
    """
    bags = torch.zeros(len(text), int(text.max()) + 2)
    bags.scatter_add_(1, text + 1, (text != PAD).float())
    first = int(rng.integers(len(text)))
    shared = torch.minimum(bags, bags[first]).sum(1) * 2 / (bags.sum(1) + bags[first].sum()).clamp(min=1)
    shared[first] = 2.0
    # Half of the smallest difference between two captions of 32 tokens.
    order = shared + torch.from_numpy(rng.random(len(text)) / 64).float()
    return order.argsort(descending=True)[:count]
