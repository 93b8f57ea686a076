"""The harness itself: it returns by rank, names who failed, and shows the stacks of all ranks when time is up."""

import time

import pytest

from tests.processes import RanksFailedError, run_ranks


def rank_of(rank):
    return rank * 10


def fail_on_one(rank):
    if rank == 1:
        raise ValueError("rank one has had enough")
    time.sleep(60)


def sleep_long(rank):
    time.sleep(60)


def test_results_by_rank():
    assert run_ranks(3, rank_of) == [0, 10, 20]


def test_a_failure_ends_the_others_and_is_told():
    begun = time.monotonic()
    with pytest.raises(RanksFailedError, match=r"fail_on_one(?s:.)*rank 1(?s:.)*rank one has had enough"):
        run_ranks(2, fail_on_one)
    assert time.monotonic() - begun < 30


def test_time_up_shows_all_stacks():
    with pytest.raises(
        RanksFailedError,
        match=r"ranks \[0, 1\] did not finish(?s:.)*rank 0(?s:.)*sleep_long(?s:.)*rank 1(?s:.)*sleep_long",
    ):
        run_ranks(2, sleep_long, timeout=3)
