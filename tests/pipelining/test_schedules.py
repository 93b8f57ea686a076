"""Actions of torch's schedules, played with fixed times, wait as long as the formulas say."""

import pytest

from distopt.errors import SettingError
from distopt.pipelining.schedules import Action, bubble_share, check_schedule, idle_shares


def gpipe(stages, microbatches):
    """All forward, then all backward."""
    return [
        [Action(kind, rank, i) for kind in ("forward", "backward") for i in range(microbatches)]
        for rank in range(stages)
    ]


@pytest.mark.parametrize(("stages", "microbatches"), [(1, 3), (2, 4), (4, 4), (4, 8), (3, 7)])
def test_gpipe_waits_as_the_formula_says(stages, microbatches):
    wanted = bubble_share("gpipe", stages, stages, microbatches)
    assert idle_shares(gpipe(stages, microbatches)) == pytest.approx([wanted] * stages)


def test_ranks_that_wait_for_each_other():
    one, two = gpipe(2, 1)
    with pytest.raises(ValueError, match="wait"):
        idle_shares([one[::-1], two])


@pytest.mark.parametrize(
    ("settings", "field"),
    [
        (("gpipe", 2, 4, 8), "stages"),
        (("1f1b", 4, 2, 8), "stages"),
        (("1f1b", 4, 4, 3), "microbatches"),
        (("interleaved", 2, 2, 4), "stages"),
        (("interleaved", 2, 5, 4), "stages"),
        (("interleaved", 2, 4, 5), "microbatches"),
        (("interleaved", 1, 2, 4), "schedule"),
    ],
)
def test_what_a_schedule_cannot_do(settings, field):
    with pytest.raises(SettingError) as raised:
        check_schedule(*settings)
    assert raised.value.field == field
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("settings", [("gpipe", 4, 4, 1), ("1f1b", 4, 4, 4), ("interleaved", 2, 4, 3)])
def test_what_it_can(settings):
    check_schedule(*settings)
