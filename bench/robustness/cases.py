"""Sixteen things that a trainer may legally do, each with what passing means, whoever is put to the test.

A case starts real gloo processes for a competitor and says whether it passed and what was measured. Where buckets are
not the question, the model fits into one, so that each case tests one thing.
"""

import dataclasses
import io
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch

from bench.competitors import Competitor
from bench.robustness import jobs
from bench.robustness.jobs import SMALL
from tests.processes import run_ranks

LAW = 1e-4
"""Largest part of the gradient that rounding may lose in a few float32 steps."""

ONE = {"a": (64, 48)}
"""A single parameter, which has but one place in a bucket."""

DEFAULT_BUCKETS = {f"layer{i}{kind}": shape for i in range(4) for kind, shape in (("", (512, 512)), ("b", (512,)))}
"""4.2 MB: more than one bucket under DDP's own settings."""

SIXTEEN = {f"layer{i}{kind}": shape for i in range(16) for kind, shape in (("", (128, 128)), ("b", (128,)))}
SIXTEEN_BUCKETS = {"bucket_cap_mb": 0.06}


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How a case ended.

    Args:
        passed: whether its criterion was met.
        measured: a short phrase with the figure.
    """

    passed: bool
    measured: str


Run = Callable[[Competitor, float], Outcome]


@dataclasses.dataclass(frozen=True)
class Case:
    """One row of the matrix.

    Args:
        name: for the command line.
        title: what the trainer does.
        criterion: what passing means.
        run: tests a competitor; the second argument is the time limit in seconds. A failed rank raises.
        control: the same without what makes the case hard, to show that nothing else fails it.
        race: whether failing depends on timing, so that one run proves little.
        torch_options: what torch's documentation recommends for the case, beyond its defaults.
    """

    name: str
    title: str
    criterion: str
    run: Run
    control: Run | None = None
    race: bool = False
    torch_options: Mapping[str, Any] = dataclasses.field(default_factory=dict[str, Any])


SOUND = "sound gradients"
"""Finite, equal on all ranks, delivered or kept, and no layer starves."""


def sound(accounts: list[dict[str, Any]]) -> Outcome:
    """Judge the ledgers of all ranks by the law of conservation."""
    steps, bad = accounts[0]["steps"], max(account["bad_steps"] for account in accounts)
    losses = [account["lost"] for account in accounts]
    if bad:
        return Outcome(False, f"NaN in {bad} of {steps} steps")
    if not all(account["agreed"] for account in accounts):
        return Outcome(False, "ranks are given different gradients")
    starved = sorted({name for account in accounts for name in account["starved"]})
    if starved:
        return Outcome(False, f"never delivers {', '.join(starved)} again")
    if any(math.isnan(lost) for lost in losses):
        return Outcome(False, "residuals are NaN")
    return Outcome(max(losses) <= LAW, f"{max(losses):.1e} of the gradient lost")


def _training(
    shapes: dict[str, Any], *, world: int = 2, steps: int = 8, start: int = 2, warm: bool = True, **options: Any
) -> Run:
    def run(who: Competitor, timeout: float) -> Outcome:
        accounts = run_ranks(world, jobs.train_job, who, shapes, steps, start, warm, options, timeout=timeout)
        outcome = sound(accounts)
        if outcome.passed and accounts[0]["kept"] == 0:
            return Outcome(False, f"nothing is compressed at step {start}")
        return outcome

    return run


def _infinite(bad: float) -> Run:
    def run(who: Competitor, timeout: float) -> Outcome:
        accounts = run_ranks(2, jobs.infinite_job, who, bad, timeout=timeout)
        if math.isinf(bad) and not all(account["seen"] for account in accounts):
            return Outcome(False, "one rank does not see it and takes the step alone")
        return sound(accounts)

    return run


def _law_of(job: Callable[..., Any], trigger: object) -> Run:
    return lambda who, timeout: sound(run_ranks(2, job, who, trigger, timeout=timeout))


def _error_of(job: Callable[..., float], trigger: object, limit: float, what: str) -> Run:
    def run(who: Competitor, timeout: float) -> Outcome:
        worst = max(run_ranks(2, job, who, trigger, timeout=timeout))
        return Outcome(worst <= limit, f"{what} {worst:.1e}")

    return run


def _resume(before: int, after: int, limit: float, shapes: dict[str, Any] = SMALL) -> Run:
    def run(who: Competitor, timeout: float) -> Outcome:
        ended = run_ranks(before, jobs.save_job, who, shapes, 5, 10, timeout=timeout)
        saved = [rank[0] for rank in ended]
        resumed = run_ranks(after, jobs.resume_job, who, shapes, saved, 5, 10, before, timeout=timeout)
        pairs = [(went[n], g) for went, now in zip(ended[0][1], resumed[0], strict=True) for n, g in now.items()]
        worst = max(float((g - expected).norm() / expected.norm()) for expected, g in pairs)
        return Outcome(worst <= limit, f"gradients differ by {worst:.1e} after resuming" if worst else "bit for bit")

    return run


def _safe_load(who: Competitor, timeout: float) -> Outcome:
    saved = run_ranks(1, jobs.save_job, who, SMALL, 5, 6, timeout=timeout)[0][0]
    try:
        torch.load(io.BytesIO(saved), weights_only=True)
    except Exception as error:
        return Outcome(False, f"{type(error).__name__}: needs weights_only=False")
    return Outcome(True, "loads")


def _accumulation(who: Competitor, timeout: float) -> Outcome:
    results = run_ranks(2, jobs.accumulation_job, who, timeout=timeout)
    counted, worst = results[0][0], max(result[2] for result in results)
    return Outcome(
        counted == results[0][1] == 6 and worst <= 1e-12, f"{counted} steps counted of 6, differs by {worst:.1e}"
    )


_EPSILON = {"orthogonalization_epsilon": 1e-8}
_ALL_IN_ONE = {"bucket_cap_mb": 100}

CASES = (
    Case(
        "buckets",
        "two ranks, DDP's own buckets",
        SOUND,
        _training(DEFAULT_BUCKETS),
        control=_training(DEFAULT_BUCKETS, **_ALL_IN_ONE),
        race=True,
    ),
    Case(
        "world-1",
        "one rank, 16 buckets",
        SOUND,
        _training(SIXTEEN, world=1, **SIXTEEN_BUCKETS),
        control=_training(SIXTEEN, world=1, **_ALL_IN_ONE),
        race=True,
    ),
    Case(
        "inf",
        "one infinity on one rank",
        "all ranks see it in that step; all others are sound",
        _infinite(math.inf),
        control=_infinite(1.0),
    ),
    Case(
        "zero",
        "a gradient that is zero for some steps",
        SOUND,
        _law_of(jobs.zero_job, 6),
        control=_law_of(jobs.zero_job, 0),
        torch_options=_EPSILON,
    ),
    Case(
        "unused",
        "parameters left unused (find_unused_parameters)",
        SOUND,
        _law_of(jobs.unused_job, True),
        control=_law_of(jobs.unused_job, False),
        race=True,
        torch_options=_EPSILON,
    ),
    Case(
        "scalar",
        "a 0-dimensional parameter",
        SOUND,
        _training({**SMALL, "scale": ()}),
        control=_training({**SMALL, "scale": (1,)}),
    ),
    Case(
        "strided",
        "a transposed parameter",
        "a rank-2 gradient arrives, to 1e-3",
        _error_of(jobs.strided_job, True, 1e-3, "relative error"),
        control=_error_of(jobs.strided_job, False, 1e-3, "relative error"),
    ),
    Case(
        "half",
        "float16 gradients of 40000",
        "their mean arrives, to 1 %",
        _error_of(jobs.half_job, 4e4, 1e-2, "relative error"),
        control=_error_of(jobs.half_job, 4.0, 1e-2, "relative error"),
    ),
    Case(
        "loss-scale",
        "the loss scale falls from 1024 to 1",
        "unscaled gradients as under a constant scale, to 1e-3",
        _error_of(jobs.scale_job, 1024.0, 1e-3, "relative difference"),
        control=_error_of(jobs.scale_job, 1.0, 1e-3, "relative difference"),
    ),
    Case(
        "resume",
        "resume at the same world size",
        "the same gradients, bit for bit",
        _resume(2, 2, 0.0),
        control=_resume(2, 2, 0.0, ONE),
    ),
    Case(
        "resume-other",
        "resume 2 ranks on 1, the same data",
        "the same gradients, to 1e-10 in float64",
        _resume(2, 1, 1e-10),
    ),
    Case("safe-load", "torch.load of the saved state", "loads with weights_only=True", _safe_load),
    Case("static-graph", "static_graph=True", SOUND, _training(SMALL, static_graph=True), control=_training(SMALL)),
    Case(
        "start-0",
        "compression from step 0",
        SOUND + ", compressed",
        _training(SMALL, start=0),
        control=_training(SMALL),
    ),
    Case(
        "cold",
        "warm start off, 16 buckets",
        SOUND,
        _training(SIXTEEN, warm=False, **SIXTEEN_BUCKETS),
        control=_training(SIXTEEN, warm=False, **_ALL_IN_ONE),
        race=True,
    ),
    Case("no-sync", "accumulation under no_sync", "counts steps, equals the big batch, to 1e-12", _accumulation),
)
"""The matrix, in the order of its rows."""
