"""The bench that shows what overlaps in a step: who is drawn where."""

from collections.abc import Generator

import pytest
import torch
from torch import Tensor

from bench import overlap
from distopt.attach.transaction import Transaction
from distopt.reducers.reducer import Proposal


class Asked:
    """A communicator whose averages are there at once."""

    def start(self, request: Tensor) -> "Asked":
        self.request = request
        return self

    def wait(self) -> Tensor:
        return self.request


def two_rounds(bucket: int, seen: list[tuple[int, str]]) -> Generator[Tensor, Tensor, Proposal]:
    for factor in "PQ":
        seen.append((bucket, factor))
        yield torch.zeros(1)
    seen.append((bucket, ""))
    return Proposal(lambda: None)


@pytest.mark.parametrize("buckets", [1, 2, 3, 6])
def test_turns_are_those_of_a_step(buckets):
    seen: list[tuple[int, str]] = []
    transaction = Transaction(Asked())  # pyright: ignore[reportArgumentType]
    for bucket in range(buckets):
        transaction.propose(two_rounds(bucket, seen))
    assert transaction.complete()
    assert overlap.turns(buckets) == seen


EVENTS = [
    ("gloo:all_gather", 0.0, 50.0),
    (overlap._BACKWARD + "AddmmBackward0", 1000.0, 9000.0),
    ("aten::mm", 1000.0, 9000.0),
    ("distopt::compress", 2000.0, 3000.0),
    ("gloo:all_reduce", 3000.0, 6000.0),
    ("distopt::compress", 6000.0, 7000.0),
    ("gloo:all_reduce", 7000.0, 12000.0),
    ("distopt::compress", 12000.0, 12500.0),
    ("distopt::decompress", 12500.0, 15000.0),
]


def test_spans_and_what_is_told_of_them(tmp_path):
    spans = overlap.spans(reversed(EVENTS), 1)
    assert [(s["row"], s["factor"]) for s in spans] == [
        ("backward", ""),
        ("compress", "P"),
        ("P travels", "P"),
        ("compress", "Q"),
        ("Q travels", "Q"),
        ("compress", ""),
        ("decompress", ""),
    ]
    assert [spans[0][name] for name in ("begin", "end", "bucket")] == [0.0, 8.0, -1]
    records = [{"megabits": 100, "rank": 4, **span} for span in spans]
    table = overlap.tables(records)["overlap"]
    assert "| factors travel | 8 ms |" in table
    assert "| of these, while this rank computes | 5 ms |" in table
    assert "end of the step | 14 ms |" in table
    overlap.pictures(records, tmp_path)
    assert (tmp_path / "overlap.png").read_bytes()[1:4] == b"PNG"
