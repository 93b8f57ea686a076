"""A step, played through by hand."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distopt.planning.timeline import Work, step_seconds

WORKS = st.lists(
    st.builds(
        Work,
        nbytes=st.floats(1.0, 10.0),
        stages=st.lists(st.tuples(st.floats(0.0, 1.0), st.floats(0.0, 1.0)), min_size=1, max_size=4),
        after=st.floats(0.0, 1.0),
    ),
    min_size=1,
    max_size=5,
)


@pytest.mark.parametrize(
    ("works", "seconds"),
    [
        # Forward takes 1, each bucket's part of backward 1.
        ([Work(1, [(0, 0.5)]), Work(1, [(0, 0.5)])], 3.5),  # the first is hidden
        ([Work(1, [(0, 3.0)]), Work(1, [(0, 0.5)])], 5.5),  # the second waits for the first
        ([Work(1, [(0.5, 0)]), Work(1, [(0, 0)])], 3.5),  # computing is never hidden: there is one processor
        ([Work(1, [(2, 0)]), Work(1, [(0, 0)])], 5.0),  # backward ends at 4, half as fast
        ([Work(1, [(0, 0)], after=1), Work(1, [(0, 0)], after=1)], 5.0),
    ],
)
def test_by_hand(works, seconds):
    assert step_seconds(3.0, works) == pytest.approx(seconds)


@given(st.floats(0.0, 10.0), WORKS)
def test_nothing_is_lost_and_nothing_twice(compute, works):
    found = step_seconds(compute, works)
    computing = compute + sum(sum(own for own, _ in work.stages) + work.after for work in works)
    assert found >= computing * (1 - 1e-9)
    assert found <= compute + sum(work.seconds for work in works) + 1e-9


@given(st.floats(0.0, 10.0), WORKS, st.integers(0, 4), st.floats(0.0, 1.0))
def test_more_work_never_makes_a_step_shorter(compute, works, place, more):
    place %= len(works)
    computing, wire = works[place].stages[0]
    longer = Work(works[place].nbytes, [(computing, wire + more), *works[place].stages[1:]], works[place].after)
    slower = step_seconds(compute, [*works[:place], longer, *works[place + 1 :]])
    assert slower >= step_seconds(compute, works) - 1e-9
