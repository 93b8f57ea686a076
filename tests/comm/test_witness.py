"""A rank that dies, stops or leaves is named on every survivor, soon; whoever survives ends by itself."""

import contextlib
import os
import random
import signal
import socket
import threading
import time
from dataclasses import replace
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

from distopt.comm.witness import Report, Witness, abort, judge
from distopt.errors import PeerLostError
from tests.processes import _CONTEXT, run_ranks

WHAT = "the all-reduce of bucket 3"


# --- judging, in one process


@st.composite
def deaths(draw):
    """A world in which some ranks died, and what the survivors say: each lost some, perhaps none, of the dead."""
    world = draw(st.integers(2, 6))
    dead = draw(st.sets(st.integers(0, world - 1), min_size=1, max_size=world - 1))
    alive = sorted(set(range(world)) - dead)
    seen = {rank: draw(st.sets(st.integers(0, world - 1).filter(lambda r, own=rank: r != own))) for rank in alive}
    return world, dead, alive, seen


@given(deaths())
def test_every_survivor_blames_the_dead_and_nobody_else(case):
    """Whatever they lost besides: survivors close their connections too, but they report."""
    world, dead, alive, seen = case
    seen[alive[0]] |= dead
    reports = {rank: Report(rank, 5, 9, WHAT, "", tuple(seen[rank])) for rank in alive}
    verdicts = {judge(reports[rank], reports, range(world)) for rank in alive}
    assert [set(ranks) for _, ranks in verdicts] == [dead]


@given(deaths())
def test_where_time_ran_out_all_who_are_silent_are_blamed(case):
    world, dead, alive, seen = case
    reports = {rank: Report(rank, 5, 9, WHAT, "", tuple(seen[rank]), expired=(world,)) for rank in alive}
    message, ranks = judge(reports[alive[0]], reports, range(world))
    assert set(ranks) == dead
    assert "stopped answering in the all-reduce of bucket 3 at step 5" in message


@pytest.mark.parametrize(
    ("places", "message", "blamed"),
    [
        ([17, 16, 17], f"rank 1 is at step 16 in {WHAT} where ranks 0, 2 are at step 17 in {WHAT}", (1,)),
        ([17, 16], f"rank 0 is at step 17 in {WHAT} where rank 1 is at step 16 in {WHAT}", (0, 1)),
    ],
)
def test_a_rank_that_is_elsewhere(places, message, blamed):
    reports = {rank: Report(rank, step, step, WHAT, "", lost=(int(rank == 0),)) for rank, step in enumerate(places)}
    assert judge(reports[0], reports, range(len(places))) == (message, blamed)


def test_a_rank_that_failed_by_itself():
    reports = {
        0: Report(0, 3, 3, WHAT, "closed by peer", lost=(1,)),
        1: Report(1, 3, 3, WHAT, "no memory"),
    }
    assert judge(reports[0], reports, range(2)) == (
        f"rank 1 failed in {WHAT} at step 3; rank 1 reports: no memory",
        (1,),
    )


UNKNOWN = "the store does not answer, and who is to blame cannot be told"


@pytest.mark.parametrize(
    ("lost", "host", "reported", "message", "blamed"),
    [
        ((0, 2), 0, (), f"rank 0 stopped answering in {WHAT} at step 3, and with it the store that it hosts", (0,)),
        ((2,), 0, (), f"rank 0 stopped answering in {WHAT} at step 3, and with it the store that it hosts", (0,)),
        ((0, 2), 0, (0,), f"{UNKNOWN}: no answer from rank 2 in {WHAT} at step 3", (2,)),
        ((), None, (), f"{UNKNOWN}: oh in {WHAT} at step 3", ()),
    ],
)
def test_without_the_store(lost, host, reported, message, blamed):
    mine = Report(1, 3, 3, WHAT, "oh", lost=lost)
    reports = {1: mine, **{rank: replace(mine, rank=rank) for rank in reported}}
    assert judge(mine, reports, range(3), host, reachable=False) == (message, blamed)


# --- real worlds


def rank_main(rank, world, place, fault, victim, at, deadline, grace, pipe):
    """Train until the victim has its fault; tell what was raised and when, and live on until told to end."""
    torch.set_num_threads(1)
    method = {"init_method": place} if "://" in place else {}
    dist.init_process_group("gloo", **method, rank=rank, world_size=world, timeout=timedelta(seconds=100))
    group = dist.new_group(range(world), timeout=timedelta(seconds=deadline), use_local_synchronization=True)
    witness = Witness(group, grace=grace)
    try:
        for step in range(10**6):
            if rank == victim and step == at:
                pipe.send(("fault", time.monotonic()))
                strike(fault, group)
            witness.begin(step)
            dist.all_reduce(torch.ones(1000), group=group)
    except RuntimeError as error:
        lost = witness.blame(error, WHAT)
        if witness.blame(error, "what comes after") is lost and isinstance(lost, PeerLostError):
            pipe.send(("raised", time.monotonic(), str(lost), lost.ranks))
            pipe.recv()


def strike(fault, group):
    if fault == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif fault == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    elif fault == "exit":
        os._exit(0)
    elif fault == "error":
        raise RuntimeError("no memory")


def disaster(tmp_path, world, fault, victim, *, store="file", deadline=60.0, grace=(5.0,), at=20, linger=True):
    """Run a world to its end; what each survivor raised, by rank, and the seconds from the fault to that.

    A survivor that ends closes its connections, which would tell the others: they all ``linger`` until the last raised.
    """
    place = f"file://{tmp_path}/store"
    if store == "tcp":
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            place = f"tcp://127.0.0.1:{probe.getsockname()[1]}"
    pipes, processes = {}, {}
    try:
        for rank in range(world):
            pipes[rank], theirs = _CONTEXT.Pipe()
            processes[rank] = _CONTEXT.Process(
                target=rank_main,
                args=(rank, world, place, fault, victim, at, deadline, grace[rank % len(grace)], theirs),
                daemon=True,
            )
            processes[rank].start()
            theirs.close()
        assert pipes[victim].poll(60)
        _, struck = pipes[victim].recv()
        told = {}
        survivors = sorted(set(pipes) - ({victim} if fault != "error" else set()))
        if not linger:
            for rank in survivors:
                pipes[rank].send("end when you like")
        for rank in survivors:
            assert pipes[rank].poll(30), f"rank {rank} is still waiting"
            _, when, message, blamed = pipes[rank].recv()
            told[rank] = (when - struck, message, blamed)
        for rank in survivors:
            with contextlib.suppress(OSError):
                pipes[rank].send("end")
            processes[rank].join(30)
            assert processes[rank].exitcode == 0  # by itself: nothing in it still waits for the dead
        return told
    finally:
        for process in processes.values():
            process.kill()
            process.join()


@pytest.mark.parametrize("seed", range(4))
def test_a_killed_rank_is_named_on_every_survivor_long_before_the_deadline(seed, tmp_path):
    chance = random.Random(seed)
    world, store = seed % 3 + 2, ["file", "tcp"][seed % 2]
    victim, at = chance.randrange(world), chance.randrange(1, 60)
    told = disaster(tmp_path, world, "kill", victim, store=store, at=at)
    assert len(told) == world - 1
    for seconds, message, blamed in told.values():
        assert blamed == (victim,)
        assert f"rank {victim} " in message
        assert f"{WHAT} at step {at}" in message
        assert seconds < 30  # the deadline is 60


def test_the_death_of_the_rank_that_hosts_the_store(tmp_path):
    for _, message, blamed in disaster(tmp_path, 4, "kill", 0, store="tcp").values():
        assert blamed == (0,)
        assert message == f"rank 0 stopped answering in {WHAT} at step 20, and with it the store that it hosts"


@pytest.mark.parametrize(("victim", "store"), [(2, "file"), (0, "tcp")])
def test_a_stopped_rank_is_named_after_the_deadline(victim, store, tmp_path):
    told = disaster(tmp_path, 4 - victim // 2, "stop", victim, store=store, deadline=3.0, grace=(2.0,))
    for seconds, message, blamed in told.values():
        assert blamed == (victim,)
        assert f"rank {victim} stopped answering in {WHAT} at step 20" in message
        assert seconds > 2
    # Without the store, who was let go by a neighbour cannot know that the neighbour's deadline had passed.
    of_deadline = [message.endswith("(deadline 3 s)") for _, message, _ in told.values()]
    assert all(of_deadline) if store == "file" else any(of_deadline)


def test_the_host_of_the_store_stays_until_the_others_have_read_it(tmp_path):
    """Rank 0 has its verdict a second before the others have theirs, and could end."""
    told = disaster(tmp_path, 3, "kill", 1, store="tcp", grace=(5.0, 10.0, 10.0), linger=False)
    assert all(message.startswith("rank 1 is gone") for _, message, _ in told.values())


def test_a_rank_that_leaves(tmp_path):
    for _, message, blamed in disaster(tmp_path, 3, "exit", 1).values():
        assert (message, blamed) == (f"rank 1 is gone, its connections closed, in {WHAT} at step 20", (1,))


def test_an_error_of_one_rank_alone_is_told_to_all(tmp_path):
    told = disaster(tmp_path, 3, "error", 1)
    assert {blamed for _, _, blamed in told.values()} == {(1,)}
    assert all("rank 1 reports: no memory" in message for _, message, _ in told.values())


def abort_job(rank):
    groups = [dist.new_group([0, 1], timeout=timedelta(seconds=40)) for _ in range(2)]
    if rank == 1:
        with pytest.raises(RuntimeError, match="closed"):
            dist.recv(torch.empty(1), 0, group=groups[0])  # nothing is sent: only the abort of rank 0 ends this
        return
    work = dist.all_reduce(torch.ones(10), group=groups[0], async_op=True)  # rank 1 does not take part
    abort(groups[0])
    abort(groups[0])
    with pytest.raises(RuntimeError):
        work.wait()


def test_aborting_ends_what_is_under_way_here_and_there_and_no_other_group():
    run_ranks(2, abort_job, timeout=30)


def quiet_job(rank):
    store = dist.HashStore()
    group = dist.new_group([0, 1], use_local_synchronization=True)
    witness = Witness(group, store)
    before = store.num_keys(), threading.active_count()
    for step in range(50):
        witness.begin(step)
        dist.all_reduce(torch.ones(3), group=group)
    return before == (store.num_keys(), threading.active_count())


def test_a_healthy_run_leaves_the_store_alone():
    assert all(run_ranks(2, quiet_job))
