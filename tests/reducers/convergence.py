"""Least squares on several ranks: does a reducer get where the exact average gets?"""

import torch

from tests.simulation import Ranks


def final_loss(reducer, *, world=2, steps=250, rate=0.05, forget=False):
    """Loss above the optimum after plain SGD, every rank with data of its own.

    Args:
        reducer: the settings.
        world: number of ranks.
        steps: of SGD.
        rate: the learning rate.
        forget: whether residuals are thrown away after each step: the control.
    """
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(64, 24, generator=generator) * torch.linspace(0.3, 1.5, 24) for _ in range(world)]
    truth = torch.randn(24, 16, generator=generator)
    targets = [x @ truth + torch.randn(64, 16, generator=generator) for x in inputs]
    all_inputs, all_targets = torch.cat(inputs), torch.cat(targets)
    best = (all_inputs @ torch.linalg.lstsq(all_inputs, all_targets).solution - all_targets).square().mean()
    ranks = Ranks(reducer, {"w": (24, 16)}, world)
    weight = torch.zeros(24, 16)
    for _ in range(steps):
        gradients = [{"w": x.T @ (x @ weight - y) / len(x)} for x, y in zip(inputs, targets, strict=True)]
        weight -= rate * ranks.step(gradients)[0]["w"]
        if forget:
            for state in ranks.states:
                state.residuals.clear()
    return float((all_inputs @ weight - all_targets).square().mean() - best)
