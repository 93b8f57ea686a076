"""Ranks as threads of one process, which meet at a barrier instead of a process group."""

import threading
from concurrent.futures import ThreadPoolExecutor

from distopt.accumulation import Accumulation, _batch_size
from distopt.comm.meeting import Meeting


class Table:
    """Where the threads lay down what they bring, and read what all have brought.

    Args:
        world_size: number of threads.
    """

    def __init__(self, world_size):
        self.barrier = threading.Barrier(world_size)
        self.brought = [None] * world_size
        self.gathers = 0


class Seat:
    """The communicator of one thread, as far as `Meeting` needs it."""

    def __init__(self, table, rank):
        self.table, self.rank = table, rank
        self.world_size = len(table.brought)
        self.ranks = list(range(self.world_size))
        self.step = 0

    def gather_objects(self, value):
        self.table.brought[self.rank] = value
        self.table.barrier.wait()
        everyone = list(self.table.brought)
        if self.table.barrier.wait() == 0:
            self.table.gathers += 1
        return everyone

    def gather_numbers(self, numbers):
        rows = self.gather_objects([float(number) for number in numbers])
        assert len({len(row) for row in rows}) == 1, "all ranks send as many"
        return rows


def on_ranks(world_size, job):
    """Call ``job(seat)`` on each of so many ranks; what each returned, or the error that it raised, and the table."""
    table = Table(world_size)

    def run(rank):
        try:
            return job(Seat(table, rank))
        except Exception as error:
            if isinstance(error, (AssertionError, threading.BrokenBarrierError)):
                table.barrier.abort()
            return error

    with ThreadPoolExecutor(world_size) as pool:
        return list(pool.map(run, range(world_size))), table


def windows_of(seat, loader, model, *, steps, weight=None, last="step"):
    """What `accumulate` returns, over a seat."""
    meeting = Meeting(seat, {"steps": str(steps), "last": last}, "accumulate")
    return Accumulation(loader, model, steps, weight or _batch_size, last, meeting)
