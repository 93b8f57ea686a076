"""The bench of sharded steps, in a tiny setting without namespaces: what it counts, and what it says of it."""

import os

from bench.lab.ways import NATIVE
from bench.sharding import __main__ as bench
from bench.sharding.steps import WAYS, Size, measure
from tests.processes import run_ranks

TINY = Size(width=32, branches=2, rows=1, rounds=2, warmup=0)


class Memory:
    """Remembers what it was told, and has sent a thousand bytes more whenever it is asked."""

    def __init__(self):
        self.limits, self.bytes = [], 0

    def limit(self, megabits):
        self.limits.append(megabits)

    def sent(self):
        self.bytes += 1000
        return self.bytes


def job(rank):
    os.environ["DISTOPT_SHARDS"] = "2"
    network = Memory()
    records = measure(network, [None, 100], [NATIVE, "distopt, PowerSGD rank 4"], TINY)
    return records, network.limits


def test_all_ranks_tell_the_same_of_every_way_over_every_network():
    told = run_ranks(4, job)
    assert all(other == told[0] for other in told)
    records, limits = told[0]
    assert limits == [None, 100, None]
    assert [(r["way"], r["megabits"]) for r in records] == [
        (way, limit) for limit in limits[:2] for way in (NATIVE, "distopt, PowerSGD rank 4")
    ]
    for record in records:
        assert len(record["seconds"]) == TINY.rounds
        assert list(record["sent"]) == [1000, 1000]
        assert all(0 < seconds for seconds in record["computing"])
        assert all((seconds > 0) == (record["way"] != NATIVE) for seconds in record["reducing"])


def record(way, megabits, seconds):
    return {"way": way, "megabits": megabits, "seconds": seconds, "sent": [2e6], "computing": [1.0], "reducing": [0.5]}


def test_a_way_is_compared_with_the_native_one_of_the_same_round_and_network():
    records = [
        record(NATIVE, None, [1.0, 2.0, 9.0]),
        record(NATIVE, 100, [10.0, 20.0, 10.0]),
        record("ours", 100, [1.0, 1.0, 2.0]),
    ]
    *_, last = bench.tables(records)["sharding"].splitlines()
    assert last == "| 100 Mbit/s | ours | 1.000 | 1.000 to 2.000 | 0.10 | 2.00 | 1.00 | 0.50 |"


def test_the_ways_begin_with_the_native_one():
    assert next(iter(WAYS)) == NATIVE
