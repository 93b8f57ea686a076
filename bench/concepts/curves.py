"""What the pictures show: plain numbers, each set with a law that tests/bench/test_concepts.py holds it to."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

import distopt
from bench.concepts.gradients import of_branches, of_digits
from distopt.numerics.minifloat import FLOAT_0_6_10, FLOAT_1_6_9, MiniFloat
from distopt.numerics.reference import power_sgd
from distopt.reducers.reducer import Reducer
from tests.simulation import Ranks

Curves = dict[str, Any]
FORMATS: dict[str, torch.dtype | MiniFloat] = {
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "1-6-9": FLOAT_1_6_9,
    "0-6-10": FLOAT_0_6_10,
}
TOKENS = (5, 60, 17, 128)
"""Of the micro-batches of a window, as in docs/accumulation.md."""


def power_iteration(steps: int = 40, rank: int = 4) -> Curves:
    """How much of a gradient one power iteration misses, as training goes on.

    Args:
        steps: of training.
        rank: of the factors.

    Returns:
        ``values``: singular values of the last gradient over the largest; ``warm``, ``fresh`` and ``best``: the error
        at every step, as a part of the gradient's norm, from the factor of the step before, from a Gaussian, and of
        the best approximation of this rank there is (Eckart and Young).
    """
    draws = torch.Generator().manual_seed(0)
    found: Curves = {"warm": [], "fresh": [], "best": [], "rank": rank}
    factor, values = None, torch.zeros(0)
    for gradient in of_digits(steps):
        gaussian = nn.functional.normalize(torch.randn(len(gradient), rank, dtype=torch.double, generator=draws), dim=0)
        factor = gaussian if factor is None else factor
        for name, start in {"warm": factor, "fresh": gaussian}.items():
            step = power_sgd([gradient], [torch.zeros_like(gradient)], start, 1e-6)
            found[name].append(float((gradient - step.average).norm() / gradient.norm()))
            factor = nn.functional.normalize(step.factor, dim=0) if name == "warm" else factor
        values = torch.linalg.svdvals(gradient)
        found["best"].append(float(values[rank:].norm() / values.norm()))
    return found | {"values": (values / values[0]).tolist()}


def error_feedback(steps: int = 120) -> Curves:
    """What has been fed and what has been delivered, added up over steps; two simulated ranks.

    Args:
        steps: to take, on the same mean gradient with new noise every time.

    Returns:
        ``fed`` and ``delivered``: sums of two numbers of a gradient under ``TopK``, one list a number; ``with`` and
        ``without``: how far the sum delivered by ``PowerSGD`` is from the sum fed, as a part of that, after each
        step; ``kept``: the norm of the mean residual, as the same part.
    """
    draws = torch.Generator().manual_seed(0)
    mean = torch.randn(32, 32, generator=draws)
    fed = [[mean + 0.5 * torch.randn(32, 32, generator=draws) for _ in range(2)] for _ in range(steps)]
    sums = torch.stack([torch.stack(pair).mean(0) for pair in fed]).cumsum(0)
    topk, _ = _delivered(distopt.TopK(0.05), fed, feedback=True)
    with_it, residuals = _delivered(distopt.PowerSGD(rank=2), fed, feedback=True)
    without, _ = _delivered(distopt.PowerSGD(rank=2), fed, feedback=False)
    norms = sums.flatten(1).norm(dim=1)
    places = [tuple(divmod(int(i), 32)) for i in mean.abs().flatten().argsort()[[-100, -500]]]
    return {
        "fed": [sums[:, i, j].tolist() for i, j in places],
        "delivered": [topk[:, i, j].tolist() for i, j in places],
        "with": ((with_it - sums).flatten(1).norm(dim=1) / norms).tolist(),
        "without": ((without - sums).flatten(1).norm(dim=1) / norms).tolist(),
        "kept": (residuals.flatten(1).norm(dim=1) / norms).tolist(),
    }


def _delivered(reducer: Reducer, fed: Sequence[Sequence[Tensor]], *, feedback: bool) -> tuple[Tensor, Tensor]:
    """Sums of what was delivered, and the ranks' mean residual, after each step."""
    ranks, delivered, residuals = Ranks(reducer, {"w": (32, 32)}, 2), [], []
    for gradients in fed:
        outputs = ranks.step([{"w": gradient} for gradient in gradients])
        assert outputs is not None
        delivered.append(outputs[0]["w"])
        residuals.append(torch.stack([ranks.residual(rank, "w") for rank in range(2)]).mean(0))
        if not feedback:
            for state in ranks.states:
                state.residuals.clear()
    return torch.stack(delivered).cumsum(0), torch.stack(residuals)


def transaction(steps: int = 40, bad: int = 15) -> Curves:
    """A regression of two simulated ranks, one of which has a NaN in its gradient at one step.

    Args:
        steps: to take.
        bad: the step with the NaN, on rank 1.

    Returns:
        Losses before each step, NaN where the parameters are, and the norm of rank 1's residual after it: ``told``
        leaves the bad step out altogether; ``dropped`` meets it; ``without`` computes the same without a transaction.
    """
    found: Curves = {"bad": bad}
    for way in ("told", "dropped", "without"):
        draws = torch.Generator().manual_seed(0)
        target, weight = torch.randn(12, 24, generator=draws, dtype=torch.double), torch.zeros(12, 24).double()
        ranks, residuals = Ranks(distopt.PowerSGD(rank=2), {"w": (12, 24)}, 2, dtype=torch.double), [weight, weight]
        ranks.plans[0].prepare(ranks.states[0])
        basis, losses, kept = ranks.states[0].factors["w"], [], []
        for step in range(steps):
            losses.append(float((weight - target).square().mean()))
            noise = torch.randn(2, 12, 24, generator=draws, dtype=torch.double)
            gradients = list(weight - target + 0.3 * noise)
            if step == bad and way != "told":
                gradients[1][0, 0] = math.nan
            if way == "without":
                outcome = power_sgd(gradients, residuals, basis, 1e-6)
                residuals, basis = outcome.residuals, nn.functional.normalize(outcome.factor, dim=0)
                average = outcome.average
                kept.append(float(residuals[1].norm()))
            else:
                outputs = None if step == bad and way == "told" else ranks.step([{"w": g} for g in gradients])
                average = torch.zeros_like(weight) if outputs is None else outputs[0]["w"]
                kept.append(float(ranks.residual(1, "w").norm()))
            weight = weight - 0.1 * average
        found[way] = {"losses": losses, "kept": kept}
    return found


def overlap(rates: Sequence[float] = tuple(10 ** (k / 6) for k in range(48, 73))) -> Curves:
    """What a step takes over the bandwidth, as `distopt.plan` predicts it: 100 million parameters on 16 ranks.

    Args:
        rates: bandwidths in bits a second.

    Returns:
        ``rates``; seconds of a step by label, NaN where no matrix would gain by the rank; ``compute``, forward and
        backward alone; ``wire``, the bytes of plain DDP over the bandwidth, which no overlap can hide.
    """
    model = [(f"layers.{number}.weight", (2048, 2048), torch.float32) for number in range(24)]
    seconds: dict[str, list[float]] = {"plain DDP": [], "rank 16": [], "rank 64": []}
    for rate in rates:
        plan = distopt.plan(
            model, world_size=16, bandwidth=rate / 8, memory_rate="1TB", compute_seconds=0.1, ranks=[16, 64]
        )
        for label, values in seconds.items():
            values.append(plan.seconds.get(label, math.nan))
    nbytes = 4 * sum(shape[0] * shape[1] for _, shape, _ in model)
    wire = [2 * 15 / 16 * nbytes / (rate / 8) for rate in rates]
    return {"rates": list(rates), "seconds": seconds, "compute": 0.1, "wire": wire}


def formats(low: int = -70, high: int = 20, draws: int = 256) -> Curves:
    """How far rounding to nearest moves a number, over its size; and gradients of two branches beside float16's range.

    Args:
        low: exponent of the smallest numbers.
        high: exponent of the largest.
        draws: numbers an octave.

    Returns:
        ``octaves``; the largest relative error in each by format, 1 where all of it is lost, infinite above the
        range; ``before`` and ``behind``, the sizes of gradients as logarithms to base 2, see `of_branches`.
    """
    octaves = list(range(low, high))
    numbers = torch.rand(draws, generator=torch.Generator().manual_seed(0)) + 1
    errors = {
        name: [_rounding(kind, torch.ldexp(numbers, torch.tensor(k))) for k in octaves]
        for name, kind in FORMATS.items()
    }
    before, behind = (gradient[gradient != 0].abs().log2().tolist() for gradient in of_branches(exit=37))
    return {"octaves": octaves, "errors": errors, "before": before, "behind": behind}


def _rounding(kind: torch.dtype | MiniFloat, numbers: Tensor) -> float:
    if isinstance(kind, MiniFloat):
        codes, clamped = kind.encode(numbers)
        rounded = torch.full_like(numbers, math.inf) if clamped else kind.decode(codes)
    else:
        rounded = numbers.to(kind).float()
    return float(((rounded - numbers) / numbers).abs().max())


class _Terms(nn.Module):
    """The loss is the sum of the parameters at the tokens of a batch: their gradient is what each token counts."""

    def __init__(self) -> None:
        super().__init__()
        self.terms = nn.Parameter(torch.zeros(sum(TOKENS), dtype=torch.double))

    def forward(self, tokens: Tensor) -> Tensor:
        return self.terms[tokens]


def windows() -> Curves:
    """What each token of a window of unequal micro-batches counts in its gradient.

    Returns:
        ``window``: under `distopt.accumulate`; ``means``: under a mean of the micro-batches' means. Both times the
        number of tokens, so that 1 is a fair share.
    """
    batches, model = list(torch.arange(sum(TOKENS)).split(TOKENS)), _Terms()
    for window in distopt.accumulate(batches, model, steps=len(TOKENS), weight=len):
        for tokens in window:
            window.backward(model(tokens).sum())
    fair, model.terms.grad = model.terms.grad, None
    for tokens in batches:
        (model(tokens).mean() / len(TOKENS)).backward()
    assert fair is not None
    assert model.terms.grad is not None
    count = sum(TOKENS)
    return {"window": (count * fair).tolist(), "means": (count * model.terms.grad).tolist(), "tokens": list(TOKENS)}
