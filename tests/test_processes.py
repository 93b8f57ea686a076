"""The harness itself: it forks one thread, returns by rank, names who failed, and shows all stacks when time is up."""

import os
import sys
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


def lacking(rank):
    """What the fork server was to load and has not, and how many threads it has."""
    loaded = sys.modules["tests.preloaded"].SLOW
    return [name for name in loaded if name not in sys.modules], len(os.listdir(f"/proc/{os.getppid()}/task"))


@pytest.mark.skipif(not os.path.exists("/proc/self/task"), reason="counts threads in /proc")
def test_the_fork_server_has_loaded_everything_and_started_no_thread():
    assert run_ranks(1, lacking) == [([], 1)]


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
