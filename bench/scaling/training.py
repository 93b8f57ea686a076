"""One training run, and all that is kept of it."""

import contextlib
import dataclasses
from collections.abc import Sequence
from typing import Any

import torch

from bench.scaling.network import Network, Text, losses
from bench.scaling.ways import Float32, Way
from distopt.numerics.emulation import emulated_16bit


@dataclasses.dataclass(frozen=True)
class Size:
    """How large a run is.

    Args:
        width: of the residual stream.
        branches: residual branches.
        rows: windows in a batch.
        steps: how many.
        rows_judged: windows for the validation loss.
    """

    width: int = 32
    branches: int = 24
    rows: int = 8
    steps: int = 300
    rows_judged: int = 128


def train(way: Way, text: Text, size: Size, seed: int, exit_octaves: int | None = None) -> dict[str, Any]:
    """Train with Adam, and count zeros in the gradients of weight matrices on the way.

    Args:
        way: to scale gradients.
        text: to learn from.
        size: of the network and the run.
        seed: of the weights and the batches, the same for every way.
        exit_octaves: log2 of the weight that the early exit's loss has; without, there is no early exit.

    Returns:
        Plain numbers: ``train`` loss of the last head by step; ``validation``, pairs of step and loss; ``skipped``
        steps; ``zeros``, the mean share of zeros by branch in the last two thirds of all steps, unless they were
        skipped; ``octaves``, pairs of step and scales.
    """
    torch.manual_seed(seed)
    network = Network(size.width, size.branches)
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-3, foreach=True)
    scaler = way.attach(network)
    record: dict[str, Any] = {"train": [], "validation": [], "skipped": [], "octaves": []}
    zeros: list[list[float]] = []
    for step in range(size.steps):
        with emulated_16bit() if not isinstance(way, Float32) else contextlib.nullcontext():
            early, last = losses(network, text.batch(size.rows, seed * 10**6 + step))
            loss = last if exit_octaves is None else last + 2.0**exit_octaves * early
            scaler.scale(loss).backward()
        record["octaves"].append([step, scaler.octaves()])
        skipped = scaler.step(optimizer)
        if skipped:
            record["skipped"].append(step)
        elif step >= size.steps // 3 and step % 5 == 0:
            zeros.append(share_of_zeros(network))
        optimizer.zero_grad()
        record["train"].append(last.item())
        if (step + 1) % max(1, size.steps // 12) == 0:
            record["validation"].append([step + 1, judge(network, text, size)])
    record["zeros"] = torch.tensor(zeros).mean(0).tolist() if zeros else []
    return record


def share_of_zeros(network: Network) -> list[float]:
    """By branch, of the gradients of its weight matrices."""
    counts = [[(int((p.grad == 0).sum()), p.numel()) for p in matrices] for matrices in network.matrices()]  # type: ignore[union-attr]
    return [sum(zero for zero, _ in branch) / sum(number for _, number in branch) for branch in counts]


def judge(network: Network, text: Text, size: Size) -> float:
    """The loss of the last head on windows that are not learnt from, always the same ones."""
    batches: Sequence[torch.Tensor] = text.batch(size.rows_judged, 0, judge=True).split(64)
    with torch.no_grad(), emulated_16bit():
        return sum(losses(network, batch)[1].item() for batch in batches) / len(batches)
