"""Two tasks whose losses lie four orders of magnitude apart: which digit it is, and where, in hundredths of a pixel."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from . import pictures
from .digits import Digits, digits
from .results import Results, write_json
from .settings import TasksSettings
from .training import Place, fit
from .uncertainty import UncertaintyWeights, parameter_groups

SIDE = 12
"""Of the empty field on which a digit lies somewhere."""
FREE = SIDE - 8
TASKS = {"position": "regression", "class": "classification"}
FROM_0, STARTED = "uncertainty, s from 0", "uncertainty, s from the first losses"
WAYS = ("equal weights", "weights by hand", FROM_0, STARTED, "class alone", "position alone")
COLUMNS = {
    "class_error": ("class error, %", 2),
    "position_error": ("position error, pixels", 3),
    "position_weight": ("last weight of the position", 6),
}


@dataclasses.dataclass(frozen=True)
class Batch:
    """Fields ``(n, 1, 12, 12)``, labels ``(n,)`` and positions ``(n, 2)`` in pixels from the middle."""

    fields: Tensor
    labels: Tensor
    positions: Tensor


def place_digits(of: Digits, number: int, rng: np.random.Generator) -> Batch:
    """Draw digits and lay each somewhere on an empty field."""
    chosen = of[torch.tensor(rng.integers(0, len(of), number))]
    corners = rng.integers(0, FREE + 1, (number, 2))
    fields = torch.zeros(number, 1, SIDE, SIDE)
    for field, picture, (row, column) in zip(fields, chosen.pictures, corners, strict=True):
        field[:, row : row + 8, column : column + 8] = picture
    return Batch(fields, chosen.labels, torch.tensor(corners - FREE / 2, dtype=torch.float32))


class Network(nn.Module):
    """Two tasks on one trunk, and their weights in the same module: DDP averages the gradients of all of it."""

    def __init__(self, weights: UncertaintyWeights | None) -> None:
        super().__init__()
        self.trunk = nn.Sequential(
            nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(8, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(),
            nn.Linear(16 * 9, 64), nn.ReLU(),
        )  # fmt: skip
        self.label, self.position = nn.Linear(64, 10), nn.Linear(64, 2)
        self.weights = weights

    def answers(self, fields: Tensor) -> tuple[Tensor, Tensor]:
        """Logits ``(n, 10)`` and positions ``(n, 2)`` in pixels."""
        shared = self.trunk(fields)
        return self.label(shared), self.position(shared)

    def sums(self, batch: Batch, units: float) -> dict[str, Tensor]:
        """Both losses, added up over the samples."""
        logits, found = self.answers(batch.fields)
        return {
            "position": functional.mse_loss(found * units, batch.positions * units, reduction="sum") / 2,
            "class": functional.cross_entropy(logits, batch.labels, reduction="sum"),
        }

    def forward(self, batch: Batch, units: float, fixed: Mapping[str, float]) -> Tensor:
        """The weighted sum of both, by the learned weights if there are any."""
        sums = self.sums(batch, units)
        if self.weights is None:
            return torch.stack([sums[task] * weight for task, weight in fixed.items()]).sum()
        counts = dict.fromkeys(sums, float(len(batch.labels)))
        return torch.stack(list(self.weights.terms(sums, counts).values())).sum()


def run(settings: TasksSettings, out: Path, place: Place) -> None:
    """Train every way on every seed, and show what they do to both tasks; every rank calls it.

    Args:
        settings: what the user chose.
        out: where ``results.json`` and ``weights.png`` are written.
        place: this rank.
    """
    results, curves = Results(), dict[str, list[dict[str, float]]]()
    for seed in range(settings.seed, settings.seed + settings.seeds):
        for way in WAYS:
            figures, curve = train(way, settings, place, seed)
            results.add(way, figures)
            if curve and seed == settings.seed:
                curves[way] = curve
            if place.rank == 0:
                told = "  ".join(f"{name} {value:.4g}" for name, value in figures.items())
                print(f"seed {seed}  {way}: {told}", flush=True)
    if place.rank == 0:
        print(results.table(COLUMNS))
        content = {"settings": dataclasses.asdict(settings), "ranks": place.ranks, "ways": results.as_json()}
        write_json(out / "results.json", {**content, "log_variances": curves})
        pictures.draw_log_variances(out / "weights.png", curves)


def train(
    way: str, settings: TasksSettings, place: Place, seed: int
) -> tuple[dict[str, float], list[dict[str, float]]]:
    """Train one way; gives its figures on the test part, and the log-variances after each step."""
    torch.manual_seed(seed)
    weights = UncertaintyWeights(TASKS) if way in (FROM_0, STARTED) else None
    model = Network(weights)
    fixed = {
        "equal weights": {"position": 1.0, "class": 1.0},
        "weights by hand": {"position": settings.units**-2, "class": 1.0},
        # Losses of a single task are in its own unit: AdamW does not care.
        "class alone": {"position": 0.0, "class": 1.0},
        "position alone": {"position": 1.0, "class": 0.0},
    }.get(way, {})
    training, test = digits(seed)
    curve: list[dict[str, float]] = []

    def loss(wrapped: nn.Module, batch: Batch) -> Tensor:
        parts = (part.to(place.device) for part in (batch.fields, batch.labels, batch.positions))
        return wrapped(Batch(*parts), settings.units, fixed)

    def note(step: int) -> None:
        if weights is not None:
            curve.append(dict(zip(TASKS, weights.log_variances.tolist(), strict=True)))

    groups = None
    if weights is not None:
        if way == STARTED:
            weights.start(_first_losses(model, place_digits(training, 64, np.random.default_rng([seed, 3])), settings))
        groups = parameter_groups(model, weight_decay=settings.weight_decay, learning_rate=settings.own_rate)
    fit(
        model, lambda rng: place_digits(training, settings.batch, rng), loss, settings, place,
        seed=seed, groups=groups, weight=lambda batch: len(batch.labels), after=note,
    )  # fmt: skip
    seen = place_digits(test, 2000, np.random.default_rng([seed, 2]))
    with torch.no_grad():
        logits, found = (part.cpu() for part in model.answers(seen.fields.to(place.device)))
    distances = (found - seen.positions).square().sum(1)
    figures = {
        "class_error": 100 * float((logits.argmax(1) != seen.labels).float().mean()),
        "position_error": float(distances.mean().sqrt()),
    }
    if weights is not None:
        figures["position_weight"] = weights.weights()["position"]
    if way.endswith("alone"):
        figures.pop("position_error" if way.startswith("class") else "class_error")
    return figures, curve


def _first_losses(model: Network, batch: Batch, settings: TasksSettings) -> dict[str, float]:
    """Mean losses before training; the same on all ranks, as model and batch are."""
    with torch.no_grad():
        sums = model.sums(batch, settings.units)
    return {task: float(loss) / len(batch.labels) for task, loss in sums.items()}
