"""No hang and no crash, however ranks dawdle, and the same gradients on all of them as if they had not."""

import pytest

from tests.faults.delays import dawdle, world_of
from tests.faults.draw import chunks, count
from tests.processes import run_ranks

WORLDS = [2, 3, 4, 2]
SIZE = count(4, 10)


def delays_job(rank, world, seeds):
    return [dawdle(rank, world, seed) for seed in seeds]


@pytest.mark.parametrize("seeds", chunks(count(12, 200), SIZE), ids=str)
def test_delays_change_nothing(seeds, record_property):
    """Models of 1 to 8 layers and as many buckets, in every mode of DDP; delays of up to 20 ms."""
    world = WORLDS[seeds.start // SIZE % len(WORLDS)]
    by_rank = run_ranks(world, delays_job, world, seeds, timeout=100)
    failures = {}
    for seed, told in zip(seeds, zip(*by_rank, strict=True), strict=True):
        digests = {tuple(run) for swift, slow, _ in told for run in (swift, slow)}
        if len(digests) > 1:
            failures[seed] = (told, world_of(seed, world))
    record_property("promise", "Delays change nothing: no hang, no crash, the same bits on all ranks")
    record_property("trials", len(seeds))
    record_property("passed", len(seeds) - len(failures))
    record_property("buckets", sorted({buckets for rank in by_rank for _, _, buckets in rank}))
    assert not failures, "\n".join(map(str, failures.items()))


def test_trials_have_all_kinds_of_worlds():
    worlds = [world_of(seed, WORLDS[seed // 10 % len(WORLDS)]) for seed in range(200)]
    assert {plan.layers for plan in worlds} == set(range(1, 9))
    assert {plan.gloo_threads for plan in worlds} == {1, 2, 8}
    assert {mode for plan in worlds for mode in plan.options} == {
        "find_unused_parameters",
        "static_graph",
        "gradient_as_bucket_view",
    }
    kinds = {type(plan.reducer).__name__ for plan in worlds}
    assert len(kinds) == 9, kinds
