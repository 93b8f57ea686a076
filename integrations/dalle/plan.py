"""What a training run will take, told before any process is started and without allocating the model.

Beside each figure stands what the same model takes in the paper's formats: everything that lasts in 16 bits, and
gradients that are added straight to the error buffers (Ramesh et al. 2021, arXiv:2102.12092, appendix D and E.2).
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

import distopt
from distopt.sharding.budget import Budget, budget, pieces

from . import architectures
from .context import Context, placement
from .recipe import Recipe
from .report import bytes_in_words as words
from .schedules import in_steps
from .settings import TrainSettings, build, preset
from .stage1_settings import Stage1Settings
from .stage2 import optimizer_of, second_matrices
from .train import recipe_of
from .transformer import Transformer, TransformerSettings

_HALF = 2
"""Bytes of a number in the paper's formats."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """One rank's share of stage 2, in bytes.

    Args:
        parameters: numbers in the whole transformer.
        in_blocks: those in its blocks.
        budget: what sharding and the reducer take.
        moments: of the optimizer.
        inputs: of the blocks, kept for backward, for one pair of caption and picture.
        share: numbers in this rank's piece of the transformer.
    """

    parameters: int
    in_blocks: int
    budget: Budget
    moments: int
    inputs: int
    share: int

    @property
    def matrices(self) -> int:
        """Numbers in this rank's pieces of what is compressed."""
        return self.budget.matrix_bytes_uncompressed // 4


def transformer_of(recipe: Recipe) -> Transformer:
    """The model of stage 2 on the meta device, with as much text as its settings allow."""
    settings = TransformerSettings(
        text_vocabulary=recipe.vocabulary,
        text_length=recipe.text_length,
        codes=recipe.dvae.codes,
        grid=recipe.dvae.grid,
        **recipe.transformer,
    )
    with torch.device("meta"):
        return Transformer(settings)


def model_of(name: str, shards: int) -> tuple[Transformer, Callable[[nn.Parameter], Any]]:
    """Give the transformer of a preset on the meta device, and how it is cut.

    Args:
        name: of the preset, out of ``settings.PRESETS``.
        shards: ranks of a node.
    """
    transformer = transformer_of(recipe_of(build(TrainSettings, {**preset(name), "shard": shards})))
    return transformer, placement(second_matrices(transformer), shards)


def plan_of(recipe: Recipe, ranks: int) -> Plan:
    """Count what stage 2 takes of a rank.

    Args:
        recipe: all settings; the text is taken to be as long, and its vocabulary as large, as they allow.
        ranks: how many train together; a multiple of ``recipe.shards``.
    """
    transformer = transformer_of(recipe)
    settings = transformer.settings
    how = {"shards": recipe.shards, "shard_placement_fn": placement(second_matrices(transformer), recipe.shards)}
    mine = pieces(transformer, **how)
    copies = ranks // recipe.shards
    counted = budget(transformer, list(transformer.blocks), replicas=copies, reducer=recipe.reducers[1], **how)
    share = sum(piece.numel() for piece in mine.values())
    optimizer = optimizer_of(transformer, mine, recipe.stage2, Context(precision=recipe.precision))
    ours = isinstance(optimizer, distopt.optim.AdamW)  # torch's has two moments in the type of the parameters
    positions = 1 + settings.text_length + settings.image_length
    return Plan(
        parameters=sum(p.numel() for p in transformer.parameters()),
        in_blocks=sum(p.numel() for p in transformer.blocks.parameters()),
        budget=counted,
        moments=optimizer.expected_moment_bytes() if ours else 2 * counted.parameters,
        inputs=settings.layers * positions * settings.width * 4,
        share=share,
    )


def plan_lines(recipe: Recipe, ranks: int, pictures: int) -> list[str]:
    """Lines for the user.

    Args:
        recipe: all settings.
        ranks: how many train together.
        pictures: that are trained on.
    """
    plan = plan_of(recipe, ranks)
    with torch.device("meta"):
        dvae = sum(p.numel() for p in architectures.build(recipe.dvae).parameters())
    epochs = (max(1, round(pictures / stage.batch)) for stage in (recipe.stage1, recipe.stage2))
    copies = f"{ranks // recipe.shards} x {recipe.shards}" if recipe.shards > 1 else f"{ranks}"
    return [
        f"discrete VAE: {_count(dvae)} parameters, {recipe.dvae.tokens} tokens a picture, {recipe.dvae.codes} codes",
        _schedules(recipe),
        f"transformer: {_count(plan.parameters)} parameters, {_count(plan.in_blocks)} of them in its blocks",
        f"steps an epoch: {' and '.join(str(steps) for steps in epochs)}, of {pictures} pictures",
        *_table(f"stage 2, each of {copies} ranks", _memory(plan, recipe.shards)),
        *_table("between the copies, a step", _traffic(plan, recipe)),
        f"  a checkpoint: about {words(_checkpoint(plan, dvae, recipe, ranks))}",
        f"  saved of the matrices' numbers: {1 - _factor_numbers(plan, recipe) / max(1, plan.matrices):.1%}",
    ]


def _schedules(recipe: Recipe) -> str:
    """The lengths of stage 1 in steps, however they were given."""
    how = recipe.stage1
    if recipe.weights is not None:
        return f"stage 1: not trained, weights of {recipe.weights}"
    rate = round(in_steps(how.decay_steps, how.steps))
    if isinstance(how, Stage1Settings):
        tau, beta = (round(in_steps(length, how.steps)) for length in (how.tau_steps, how.beta_steps))
        kind = f"temperature {how.tau[0]:g} to {how.tau[1]:g} in {tau:,}, KL weight 0 to {how.beta:g} in {beta:,}"
    else:
        kind = f"bottleneck {getattr(recipe.dvae, 'bottleneck', '')}"
    return (
        f"stage 1: {how.steps:,} steps of {how.batch} pictures; {kind}, learning rate {how.learning_rate:g} to "
        f"{how.learning_rate * how.final_learning_rate:.3g} in {rate:,}"
    )


def _checkpoint(plan: Plan, dvae: int, recipe: Recipe, ranks: int) -> float:
    """Bytes of a checkpoint of stage 2, with the finished stage 1; numbers are float32 there, residuals as they are."""
    residuals, shards = plan.budget.residuals, recipe.shards
    whole = 4 * plan.matrices * shards if residuals else 0
    own = ranks * residuals if recipe.checkpoint.exact else 0
    # Weights, two moments and the averaged weights; the mean of the residuals, and each rank's own.
    return 4 * (4 * plan.parameters + dvae) + whole + own + plan.budget.factors * shards


_Row = tuple[str, float, float]
"""What, in bytes here, and in the paper's formats."""


def _memory(plan: Plan, shards: int) -> list[_Row]:
    taken, share = plan.budget, _HALF * plan.share
    lasting = [
        ("parameters", taken.parameters, share),
        ("moments of the optimizer", plan.moments, 2 * share),
        ("error buffers", taken.residuals, _HALF * plan.matrices if taken.residuals else 0),
        ("factors of the step before", taken.factors, 0),
    ]
    total = ("all that lasts", sum(here for _, here, _ in lasting), sum(there for *_, there in lasting))
    passing = [("gradients, when backward ends", taken.gradients, 0)]
    if shards > 1:
        passing.append(("two units, gathered", taken.gathered, taken.gathered / 2))
        passing.append(("inputs of the blocks, each pair", plan.inputs, plan.inputs))
    return [*lasting, total, *passing]


def _traffic(plan: Plan, recipe: Recipe) -> list[_Row]:
    taken = plan.budget
    rest = taken.bytes_uncompressed - taken.matrix_bytes_uncompressed
    rows = [("gradients sent whole", rest, rest)]
    if plan.matrices:
        numbers = _factor_numbers(plan, recipe)
        rows.append(("gradients that are compressed", taken.matrix_bytes_uncompressed, _HALF * plan.matrices))
        rows.append(("sent in their place", taken.matrix_bytes_sent, _HALF * numbers))
    return rows


def _factor_numbers(plan: Plan, recipe: Recipe) -> float:
    """How many numbers are sent in place of the matrices."""
    reducer = recipe.reducers[1]
    wide = not isinstance(reducer, distopt.PowerSGD) or reducer.wire_dtype is None
    return plan.budget.matrix_bytes_sent / (4 if wide else _HALF)


def _table(title: str, rows: Sequence[_Row]) -> list[str]:
    lines = [f"  {name:32}{words(here):>12}{words(there) if there else '-':>20}" for name, here, there in rows]
    return [f"{title:34}{'here':>12}{'in the paper':>20}", *lines]


def _count(number: int) -> str:
    """A number in words.

    Example:
        >>> _count(12095479808), _count(53790)
        ('12.1 billion', '53,790')
    """
    for size, word in ((1e9, "billion"), (1e6, "million")):
        if number >= size:
            return f"{number / size:.3g} {word}"
    return f"{number:,}"
