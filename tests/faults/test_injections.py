"""A non-finite number on any rank costs one step and nothing else."""

import pytest

from tests.faults.draw import chunks, count
from tests.faults.injections import inject, injection
from tests.processes import run_ranks

WORLDS = [2, 3, 2, 4]


def injections_job(rank, world, seeds):
    return [inject(rank, world, seed) for seed in seeds]


@pytest.mark.parametrize("seeds", chunks(count(50, 500), 25), ids=str)
def test_a_non_finite_value_costs_one_step(seeds, record_property):
    """It reaches no residual, factor, parameter or optimizer, and all ranks skip the step.

    The run is then, to the bit, the one that was told to skip it.
    """
    world = WORLDS[seeds.start // 25 % len(WORLDS)]
    by_rank = run_ranks(world, injections_job, world, seeds, timeout=100)
    failures = {}
    for seed, told in zip(seeds, zip(*by_rank, strict=True), strict=True):
        wrong = [f"rank {rank}: {text}" for rank, (texts, _) in enumerate(told) for text in texts[:3]]
        if len({shared for _, shared in told}) > 1:
            wrong.append("ranks ended with different bits, or skipped different steps")
        if wrong:
            failures[seed] = (wrong, injection(seed, world))
    record_property("promise", "A value that is not finite costs one step")
    record_property("trials", len(seeds))
    record_property("passed", len(seeds) - len(failures))
    assert not failures, "\n".join(map(str, failures.items()))
