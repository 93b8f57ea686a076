"""Few labelled digits, seen in two distortions: does a network that also has to agree with itself err less?"""

import dataclasses
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from . import pictures
from .digits import Digits, digits
from .distillation import SelfDistillation, both_views
from .results import Results, Spread, markdown, write_json
from .settings import DistillationSettings
from .training import Place, fit

CONTROL = "two views"
COLUMNS = {"error": ("test error, %", 2)}


@dataclasses.dataclass(frozen=True)
class Batch:
    """Two views ``(n, 1, 8, 8)`` of the same digits, and their labels ``(n,)``."""

    first: Tensor
    second: Tensor
    labels: Tensor


def distorted(pictures: Tensor, rng: np.random.Generator) -> Tensor:
    """Each picture moved by up to a pixel, with a hole of 3 x 3 pixels, in noise: ``(n, 1, 8, 8)`` to the same."""
    number = len(pictures)
    padded = functional.pad(pictures, (1, 1, 1, 1))
    moves, holes = rng.integers(0, 3, (number, 2)), rng.integers(0, 6, (number, 2))
    moved = torch.stack([p[:, r : r + 8, c : c + 8] for p, (r, c) in zip(padded, moves, strict=True)])
    for picture, (row, column) in zip(moved, holes, strict=True):
        picture[:, row : row + 3, column : column + 3] = 0
    return moved + torch.tensor(rng.normal(0.0, 0.1, moved.shape), dtype=torch.float32)


def draw(of: Digits, number: int, rng: np.random.Generator) -> Batch:
    """Draw digits, each in two distortions."""
    chosen = of[torch.tensor(rng.integers(0, len(of), number))]
    return Batch(distorted(chosen.pictures, rng), distorted(chosen.pictures, rng), chosen.labels)


class Network(nn.Module):
    """Pictures ``(n, 1, 8, 8)`` to logits ``(n, 10)`` and the features ``(n, 64)`` that the last layer sees."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(32 * 16, 64), nn.ReLU(),
        )  # fmt: skip
        self.head = nn.Linear(64, 10)

    def forward(self, pictures: Tensor) -> tuple[Tensor, Tensor]:
        """Logits and features."""
        features = self.trunk(pictures)
        return self.head(features), features


def run(settings: DistillationSettings, out: Path, place: Place) -> None:
    """Train with and without the terms of distillation on every seed; every rank calls it.

    Args:
        settings: what the user chose.
        out: where ``results.json`` and ``errors.png`` are written.
        place: this rank.
    """
    results = Results()
    ways = ways_of(settings)
    for seed in range(settings.seed, settings.seed + settings.seeds):
        for way, loss in ways.items():
            error = train(loss, settings, place, seed)
            results.add(way, {"error": error})
            if place.rank == 0:
                print(f"seed {seed}  {way}: error {error:.2f} %", flush=True)
    if place.rank == 0:
        differences = {way: results.against(way, CONTROL, "error") for way in ways if way != CONTROL}
        print(results.table(COLUMNS))
        print(_differences(differences))
        content = {"settings": dataclasses.asdict(settings), "ranks": place.ranks, "ways": results.as_json()}
        write_json(out / "results.json", {**content, "differences": {w: d.values for w, d in differences.items()}})
        pictures.draw_values(
            out / "errors.png", {way: results.against(way, CONTROL, "error").values for way in ways},
            f"test error minus that of {CONTROL!r}, same seed, %",
        )  # fmt: skip


def ways_of(settings: DistillationSettings) -> dict[str, SelfDistillation | None]:
    """The loss of each way; ``None`` sees one view only."""

    def loss(agreement: float, discrepancy: float) -> SelfDistillation:
        return SelfDistillation(agreement=agreement, discrepancy=discrepancy, mean=settings.mean)

    return {
        "one view": None,
        CONTROL: loss(0.0, 0.0),
        "two views and divergences": loss(settings.agreement, 0.0),
        "two views and mean features": loss(0.0, settings.discrepancy),
        "all five terms": loss(settings.agreement, settings.discrepancy),
    }


def train(loss: SelfDistillation | None, settings: DistillationSettings, place: Place, seed: int) -> float:
    """Train one way; gives its error on the test part, in percent."""
    torch.manual_seed(seed)
    training, test = digits(seed)
    few = training[torch.arange(settings.labels)]

    def total(wrapped: nn.Module, batch: Batch) -> Tensor:
        first, second, labels = (part.to(place.device) for part in (batch.first, batch.second, batch.labels))
        if loss is None:
            return functional.cross_entropy(wrapped(first)[0], labels, reduction="sum")
        return loss(*both_views(wrapped, first, second), labels).total * len(labels)

    model = Network()
    fit(
        model, lambda rng: draw(few, settings.batch, rng), total, settings, place,
        seed=seed, weight=lambda batch: len(batch.labels),
    )  # fmt: skip
    with torch.no_grad():
        logits, _ = model(test.pictures.to(place.device))
    return 100 * float((logits.argmax(1).cpu() != test.labels).float().mean())


def _differences(differences: dict[str, Spread]) -> str:
    rows = [["", f"error minus that of {CONTROL!r}", "better", "worse"]]
    for way, spread in differences.items():
        better, worse = (sum(sign * value > 0 for value in spread.values) for sign in (-1, 1))
        rows.append([way, spread.text(), f"{better} of {len(spread.values)}", str(worse)])
    return markdown(rows)
