"""Ranks that meet, disagree, or cannot come."""

import pytest

from distopt.comm.meeting import Meeting
from distopt.errors import AgreementError, SettingError
from tests.meetings import on_ranks


def test_counts_and_correctly_rounded_sums():
    def job(seat):
        return Meeting(seat, {}, "loop").gather("here", seat.rank, {"b": [1e16, 1.0, -1e16][seat.rank], "a": 2.0})

    results, table = on_ranks(3, job)
    assert results == [([0, 1, 2], {"a": 6.0, "b": 1.0})] * 3
    assert table.gathers == 1


@pytest.mark.parametrize("odd", range(3))
def test_another_setting_or_place_names_the_rank(odd):
    def setting(seat):
        Meeting(seat, {"steps": str(4 + (seat.rank == odd))}, "loop").gather("here", 1, {"": 1.0})

    def place(seat):
        Meeting(seat, {"steps": "4"}, "loop").gather("there" if seat.rank == odd else "here", 1, {})

    others = ", ".join(str(rank) for rank in range(3) if rank != odd)
    for job, name, theirs, ours in ((setting, "steps", "5", "4"), (place, "place", "there", "here")):
        for error in on_ranks(3, job)[0]:
            assert isinstance(error, AgreementError)
            assert str(error) == f"loop's {name!r} differs: rank {odd} has {theirs} where ranks {others} have {ours}"
            assert error.ranks == (odd,)


def test_who_fails_on_the_way_says_so():
    def job(seat):
        failure = SettingError("weight", -1, "positive") if seat.rank == 1 else None
        Meeting(seat, {"steps": str(seat.rank)}, "loop").gather("here", 0, {}, failure)

    first, second, third = on_ranks(3, job)[0]
    assert isinstance(second, SettingError)
    for error in (first, third):
        assert str(error) == "rank 1 cannot go on: SettingError: weight is -1, but must be positive"
        assert error.ranks == (1,)


def test_alone_a_failure_is_simply_raised():
    with pytest.raises(OSError, match="no such file"):
        Meeting(None, {}, "loop").gather("here", 0, {}, OSError("no such file"))
