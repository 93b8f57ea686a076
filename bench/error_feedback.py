"""How does error feedback get on with the optimizer behind it? Loss after some steps, relative to exact averaging.

    python -m bench.error_feedback                   # some minutes on one core
    python -m bench.error_feedback --seeds 1 --steps 40     # seconds

Two ranks, simulated in one process, teach a small MLP what a teacher of the same kind knows, from fresh noisy samples.
Prints three tables: the loss on unseen samples for each optimizer and reducer; what becomes of the residual when the
learning rate drops at once; and how the norms that clipping and Adam look at differ from exact averaging. Medians over
seeds, with the smallest and the largest.
"""

import argparse
import dataclasses
import itertools
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bench.stamp import markdown, write_lines
from distopt import AllReduce, PowerSGD
from distopt.reducers.reducer import Reducer
from tests.simulation import Ranks

WIDTHS = (32, 64, 64, 8)
ROWS = 16
WORLD = 2
NOISE = 0.3

Make = Callable[[Sequence[nn.Parameter]], torch.optim.Optimizer]


@dataclasses.dataclass(frozen=True)
class Trainer:
    """An optimizer, and the norm to which the averaged gradient is clipped, if it is."""

    make: Make
    clip: float | None = None


@dataclasses.dataclass(frozen=True)
class Feed:
    """A reducer, and what is done with its residuals.

    Args:
        reducer: the settings.
        keep: whether residuals are kept at all; without them there is no error feedback.
        at_drop: what residuals are multiplied by when the learning rate drops.
    """

    reducer: Reducer
    keep: bool = True
    at_drop: float = 1.0


TRAINERS = {
    "SGD": Trainer(lambda p: torch.optim.SGD(p, lr=0.1)),
    "SGD, momentum 0.9": Trainer(lambda p: torch.optim.SGD(p, lr=0.02, momentum=0.9)),
    "Adam": Trainer(lambda p: torch.optim.Adam(p, lr=3e-3)),
    "Adam, beta2 0.95": Trainer(lambda p: torch.optim.Adam(p, lr=3e-3, betas=(0.9, 0.95))),
    "AdamW, clip 0.3": Trainer(lambda p: torch.optim.AdamW(p, lr=3e-3, weight_decay=0.1), clip=0.3),
}


def feeds(steps: int) -> dict[str, Feed]:
    """The reducers compared, by their labels."""
    rank_1 = PowerSGD(rank=1, min_saving=0.0)
    return {
        "exact": Feed(AllReduce()),
        "rank 4": Feed(PowerSGD(rank=4, min_saving=0.0)),
        "rank 1": Feed(rank_1),
        "rank 1, exact for a tenth": Feed(dataclasses.replace(rank_1, start_step=steps // 10)),
        "rank 1, no residual": Feed(rank_1, keep=False),
    }


def main() -> None:
    """Read the command line, run everything, and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("runs/bench"))
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    records = [*optimizers(chosen.steps, chosen.seeds), *drops(chosen.steps, chosen.seeds)]
    write_lines(chosen.out / "error_feedback.jsonl", "error_feedback", records)
    text = "\n\n".join(tables(records))
    (chosen.out / "error_feedback.md").write_text(text + "\n", encoding="utf-8")
    print(text)


def optimizers(steps: int, seeds: int) -> list[dict[str, Any]]:
    """Every optimizer with every reducer; the learning rate falls linearly to zero."""
    records: list[dict[str, Any]] = []
    for name, trainer in TRAINERS.items():
        for label, feed in feeds(steps).items():
            for seed in range(seeds):
                outcome = train(trainer, feed, steps, seed, lambda step: 1 - step / steps)
                records.append({"table": "optimizers", "optimizer": name, "reducer": label, "seed": seed, **outcome})
    return records


def drops(steps: int, seeds: int) -> list[dict[str, Any]]:
    """The learning rate falls to a twentieth at two thirds of the way: what becomes of the residual?"""
    when = 2 * steps // 3
    rank_1 = PowerSGD(rank=1, min_saving=0.0)
    variants = {"exact": Feed(AllReduce())} | {
        label: Feed(rank_1, at_drop=factor)
        for label, factor in {"residual as it is": 1.0, "times 1/20": 0.05, "times 20": 20.0, "dropped": 0.0}.items()
    }
    records: list[dict[str, Any]] = []
    for name in ("SGD", "Adam"):
        for label, feed in variants.items():
            for seed in range(seeds):
                outcome = train(TRAINERS[name], feed, steps, seed, lambda step: 1.0 if step < when else 0.05, when)
                records.append({"table": "drops", "optimizer": name, "reducer": label, "seed": seed, **outcome})
    return records


def train(
    trainer: Trainer, feed: Feed, steps: int, seed: int, schedule: Callable[[int], float], drop: int = -1
) -> dict[str, float]:
    """One run: loss on unseen samples, size of delivered gradients relative to exact ones, share of steps clipped.

    Args:
        trainer: the optimizer.
        feed: how gradients are averaged.
        steps: how many.
        seed: of the weights and the samples, not of the reducer.
        schedule: factor of the learning rate at a step.
        drop: the step before which residuals are multiplied by ``feed.at_drop``.
    """
    generator = torch.Generator().manual_seed(seed)
    teacher, student = mlp(generator), mlp(generator)
    parameters = dict(student.named_parameters())
    ranks = Ranks(feed.reducer, {name: p.shape for name, p in parameters.items()}, WORLD)
    optimizer = trainer.make(list(parameters.values()))
    plan = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule)
    sizes: list[float] = []
    clipped = 0
    for step in range(steps):
        fed = [gradients(student, *samples(teacher, generator, ROWS)) for _ in range(WORLD)]
        for state in ranks.states:
            factor = (feed.at_drop if step == drop else 1.0) if feed.keep else 0.0
            state.residuals = {name: kept * factor for name, kept in state.residuals.items()}  # type: ignore[operator]
        delivered = ranks.step(fed)
        assert delivered is not None
        for name, parameter in parameters.items():
            parameter.grad = delivered[0][name]
        exact = {name: sum(rank[name] for rank in fed) / WORLD for name in fed[0]}
        sizes.append(norm(delivered[0].values()) / norm(exact.values()))  # type: ignore[arg-type]
        if trainer.clip is not None:
            clipped += bool(nn.utils.clip_grad_norm_(parameters.values(), trainer.clip) > trainer.clip)
        optimizer.step()
        plan.step()
    with torch.no_grad():
        inputs = torch.randn(4096, WIDTHS[0], generator=generator.manual_seed(10**6))
        loss = float((student(inputs) - teacher(inputs)).square().mean())
    return {"loss": loss, "size": statistics.median(sizes[steps // 10 :]), "clipped": clipped / steps}


def mlp(generator: torch.Generator) -> nn.Sequential:
    """Weights from a generator, biases of zero."""
    layers: list[nn.Module] = []
    for before, after in itertools.pairwise(WIDTHS):
        linear = nn.Linear(before, after)
        nn.init.zeros_(linear.bias)
        linear.weight.data = torch.randn(after, before, generator=generator) * before**-0.5
        layers += [linear, nn.Tanh()]
    return nn.Sequential(*layers[:-1])


def samples(teacher: nn.Module, generator: torch.Generator, rows: int) -> tuple[Tensor, Tensor]:
    """Fresh inputs, and what the teacher says of them, with noise."""
    inputs = torch.randn(rows, WIDTHS[0], generator=generator)
    with torch.no_grad():
        said: Tensor = teacher(inputs)
    return inputs, said + NOISE * torch.randn(said.shape, generator=generator)


def gradients(student: nn.Module, inputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
    """Of one rank."""
    loss = (student(inputs) - targets).square().mean()
    found = torch.autograd.grad(loss, list(student.parameters()))
    return dict(zip((name for name, _ in student.named_parameters()), found, strict=True))


def norm(tensors: Any) -> float:
    """Euclidean norm of several tensors as one vector."""
    return float(torch.stack([t.square().sum() for t in tensors]).sum().sqrt())


def tables(records: Sequence[dict[str, Any]]) -> list[str]:
    """Losses relative to exact averaging with the same seed, and norms relative to the exact gradient's."""
    return [
        _table(records, "optimizers", "loss", "optimizer"),
        _table(records, "drops", "loss", "optimizer, learning rate dropped at once"),
        _table(records, "optimizers", "size", "norm delivered / norm of the exact mean"),
    ]


def _table(records: Sequence[dict[str, Any]], table: str, figure: str, title: str) -> str:
    mine = [r for r in records if r["table"] == table]
    labels = [label for label in dict.fromkeys(r["reducer"] for r in mine) if label != "exact"]
    rows: list[list[str]] = []
    for name in dict.fromkeys(r["optimizer"] for r in mine):
        of = {(r["reducer"], r["seed"]): r[figure] for r in mine if r["optimizer"] == name}
        exact = {seed: value for (label, seed), value in of.items() if label == "exact"}
        cells = [name, f"{statistics.median(exact.values()):.3g}"]
        for label in labels:
            relative = [of[label, seed] / exact[seed] for seed in exact]
            cells.append(f"{statistics.median(relative):.2f} ({min(relative):.2f} to {max(relative):.2f})")
        rows.append(cells)
    return markdown([title, "exact", *labels], rows)


if __name__ == "__main__":
    main()
