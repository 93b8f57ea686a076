"""The slowest stage is as fast as can be, whatever the costs."""

import itertools

from hypothesis import given
from hypothesis import strategies as st

from distopt.pipelining.partition import partition


def slowest(costs, parts):
    return max(sum(costs[i] for i in part) for part in parts)


def all_partitions(count, stages):
    """Every way to cut a row into pieces that are not empty."""
    for cuts in itertools.combinations(range(1, count), stages - 1):
        ends = [0, *cuts, count]
        yield [range(a, b) for a, b in itertools.pairwise(ends)]


@given(st.data(), st.lists(st.integers(0, 100), min_size=1, max_size=9))
def test_it_is_the_best_of_all(data, costs):
    stages = data.draw(st.integers(1, len(costs)))
    parts = partition(costs, stages)
    assert [i for part in parts for i in part] == list(range(len(costs)))
    assert len(parts) == stages
    assert all(parts)
    assert slowest(costs, parts) == min(slowest(costs, other) for other in all_partitions(len(costs), stages))


@given(st.lists(st.just(0.0) | st.floats(1e-3, 1e3), min_size=1, max_size=9), st.sampled_from([0.25, 2.0, 1024.0]))
def test_the_unit_does_not_matter(costs, unit):
    for stages in range(1, len(costs) + 1):
        assert partition(costs, stages) == partition([cost * unit for cost in costs], stages)


def test_blocks_that_cost_nothing_fill_stages_too():
    assert [len(part) for part in partition([0.0, 0.0, 5.0], 3)] == [1, 1, 1]
    assert partition([1.0] * 6, 3) == [range(0, 2), range(2, 4), range(4, 6)]
