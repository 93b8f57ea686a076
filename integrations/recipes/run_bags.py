"""Bags of digits that are positive from a planted fraction on, by every pooling; and the algorithmic unit tests."""

import dataclasses
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from . import pictures
from .attention import AttentionPooling
from .bags import UNIT_TESTS, Bags, digit_bags, unit_test_bags
from .digits import digits
from .pooling import KINDS, NoisyAnd, pooling
from .results import Results, write_json
from .settings import BagsSettings
from .training import Place, fit

STEEPER = "noisy-and, twice as steep"
WAYS = (STEEPER, *KINDS, "attention")
TEST_BAGS = 400
_THRESHOLD_RATE = 5.0
"""How much faster thresholds learn than the network: they have half of their range to go."""


class BagNetwork(nn.Module):
    """A network over instances, and a pooling.

    Args:
        inputs: numbers of an instance.
        classes: how many.
        kind: one of `WAYS`.
        slope: a of Noisy-AND.
    """

    def __init__(self, inputs: int, classes: int, kind: str, slope: float = 10.0) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(inputs, 64), nn.ReLU(), nn.Linear(64, 32), nn.ReLU())
        self.head = None if kind == "attention" else nn.Linear(32, classes)
        made = NoisyAnd(classes, slope=slope) if kind in ("noisy-and", STEEPER) else None
        attention = AttentionPooling(32, classes) if kind == "attention" else None
        self.pooling = made or attention or pooling(kind, classes)

    def forward(self, instances: Tensor, mask: Tensor) -> Tensor:
        """Instances ``(B, N, ...)`` and mask ``(B, N)`` to the log-odds ``(B, C)`` of the bags."""
        features = self.trunk(instances.flatten(2))
        return self.pooling(features if self.head is None else self.head(features), mask)


def run(settings: BagsSettings, out: Path, place: Place) -> None:
    """Train every pooling on every seed; every rank calls it.

    Args:
        settings: what the user chose.
        out: where ``results.json`` and, of digits, ``thresholds.png`` are written.
        place: this rank.
    """
    names = ("digits",) if settings.data == "digits" else UNIT_TESTS
    results = Results()
    thresholds: dict[float, list[list[float]]] = {}
    for seed in range(settings.seed, settings.seed + settings.seeds):
        for way in WAYS:
            for name in names:
                model, figures = train(name, way, settings, place, seed)
                results.add(way, figures)
                if isinstance(model.pooling, NoisyAnd) and name == "digits":
                    thresholds.setdefault(model.pooling.slope, []).append(model.pooling.threshold.tolist())
                if place.rank == 0:
                    told = "  ".join(f"{figure} {value:.3f}" for figure, value in figures.items())
                    print(f"seed {seed}  {way}: {told}", flush=True)
    if place.rank == 0:
        print(results.table(columns(settings)))
        content = {"settings": dataclasses.asdict(settings), "ranks": place.ranks, "ways": results.as_json()}
        write_json(out / "results.json", {**content, "thresholds": thresholds})
        if thresholds:
            pictures.draw_thresholds(out / "thresholds.png", settings.fractions, thresholds)


def columns(settings: BagsSettings) -> dict[str, tuple[str, int]]:
    """The table's columns."""
    if settings.data == "unit-tests":
        return {f"{name} {part}": (f"{name}, {part}", 2) for name in UNIT_TESTS for part in ("train", "test")}
    planted = {f"threshold {digit}": (f"b of {digit}", 2) for digit in range(len(settings.fractions))}
    return {"error": ("error, %", 1), "area": ("area under ROC", 3), **planted}


def train(name: str, way: str, settings: BagsSettings, place: Place, seed: int) -> tuple[BagNetwork, dict[str, float]]:
    """Train one pooling on digits or on a unit test; gives the model and its figures."""
    torch.manual_seed(seed)
    rng = np.random.default_rng([seed, 3])
    if name == "digits":
        parts = digits(seed)
        training, test = (
            digit_bags(part, number, settings.fractions, settings.sizes, rng)
            for part, number in zip(parts, (settings.bags, TEST_BAGS), strict=True)
        )
    else:
        training = unit_test_bags(name, settings.bags, train=True, rng=rng)
        test = unit_test_bags(name, TEST_BAGS, train=False, rng=rng)
    slope = settings.slope * (2 if way == STEEPER else 1)
    model = BagNetwork(training.instances[0, 0].numel(), training.labels.shape[1], way, slope)

    def loss(wrapped: nn.Module, batch: Bags) -> Tensor:
        logits = wrapped(batch.instances.to(place.device), batch.mask.to(place.device))
        return functional.binary_cross_entropy_with_logits(logits, batch.labels.to(place.device), reduction="sum")

    def draw(rng: np.random.Generator) -> Bags:
        return training[torch.tensor(rng.integers(0, len(training), settings.batch))]

    fit(model, draw, loss, settings, place, seed=seed, groups=_groups(model, settings), weight=len)
    figures = {}
    if name == "digits":
        scores, right = answers(model, test, place.device)
        figures = {"error": 100 * float(((scores > 0) != (right > 0.5)).float().mean()), "area": area(scores, right)}
        if isinstance(model.pooling, NoisyAnd):
            figures |= {f"threshold {digit}": b for digit, b in enumerate(model.pooling.threshold.tolist())}
    else:
        figures = {
            f"{name} {part}": area(*answers(model, bags, place.device))
            for part, bags in (("train", training), ("test", test))
        }
    return model, figures


def answers(model: BagNetwork, bags: Bags, device: torch.device) -> tuple[Tensor, Tensor]:
    """Log-odds and labels, each ``(B, C)``."""
    with torch.no_grad():
        return model(bags.instances.to(device), bags.mask.to(device)).cpu(), bags.labels


def area(scores: Tensor, labels: Tensor) -> float:
    """Area under the ROC curve: how often a positive scores above a negative, ties half; mean over classes.

    Args:
        scores: ``(B, C)``.
        labels: ``(B, C)``, 0 or 1, both of them in every class.

    Example:
        >>> area(torch.tensor([[0.1], [0.4], [0.4], [0.9]]), torch.tensor([[0.0], [1.0], [0.0], [1.0]]))
        0.875
    """
    areas = []
    for score, label in zip(scores.T, labels.T, strict=True):
        apart = score[label > 0.5, None] - score[None, label < 0.5]
        areas.append(float(((apart > 0).double() + 0.5 * (apart == 0).double()).mean()))
    return sum(areas) / len(areas)


def _groups(model: BagNetwork, settings: BagsSettings) -> list[dict[str, object]]:
    own = [model.pooling.threshold] if isinstance(model.pooling, NoisyAnd) else []
    others = [p for p in model.parameters() if all(p is not each for each in own)]
    rate = _THRESHOLD_RATE * settings.learning_rate
    return [{"params": others}, *([{"params": own, "lr": rate, "weight_decay": 0.0}] if own else [])]
