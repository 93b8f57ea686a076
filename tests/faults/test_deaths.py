"""A rank that dies, stops or fails ends the others soon, and each of them says which rank it was."""

import os
import subprocess
import sys

import pytest

from tests.faults.deaths import death, meet
from tests.faults.draw import count

WITHIN = 45.0
"""Seconds in which a trial has to be over, start of the processes included; collectives may take longer."""


def judged(fault, seed, record_property, timeout):
    plan = death(fault, seed, timeout)
    fates = meet(plan, WITHIN)
    survivors = [fate for rank, fate in enumerate(fates) if rank != plan.victim]
    named = [named_or_excused(plan, fate.error) for fate in survivors]
    struck = fates[plan.victim].said[0]
    record_property("promise", PROMISES[fault])
    record_property("trials", 1)
    record_property("passed", int(all(named)))
    record_property("slowest", round(max(fate.ended for fate in survivors) - struck, 2))
    story = "\n".join(map(str, [plan, *fates]))
    assert all(named), story
    assert all(fate.code == 0 for fate in survivors), story
    return plan, fates, story


def named_or_excused(plan, error):
    """Whether a survivor named the victim; in one case it may not.

    Where the store stops with the rank that hosts it, the others cannot tell one another what they saw.
    """
    if "the store does not answer" in error and plan.fault == "stop" and plan.port and plan.victim == 0:
        return True
    return f"rank {plan.victim} " in error


PROMISES = {
    "kill": "A killed rank ends the others, who name it",
    "stop": "A rank that stops is named after the deadline",
    "raise": "An error in one rank's own code ends the others",
}


@pytest.mark.parametrize("seed", range(count(3, 60)))
def test_a_killed_rank(seed, record_property):
    """At a random moment; long before the deadline, or `meet` would not return."""
    plan, fates, story = judged("kill", seed, record_property, timeout=600)
    assert fates[plan.victim].code == -9
    assert "deadline" not in story


@pytest.mark.parametrize("seed", range(1, 1 + count(1, 10)))
def test_a_stopped_rank(seed, record_property):
    plan, fates, story = judged("stop", seed, record_property, timeout=2)
    assert fates[plan.victim].code is None
    assert story.count("(deadline 2 s)") == plan.world - 1, story


@pytest.mark.parametrize("seed", range(2, 2 + count(1, 20)))
def test_an_error_in_user_code(seed, record_property):
    plan, fates, _ = judged("raise", seed, record_property, timeout=600)
    assert fates[plan.victim].error == "ValueError: the user's own mistake"


SCRIPT = """
import os, signal
from tests.faults.deaths import *

plan = dataclasses.replace(death("kill", 0, timeout=600), world=2, victim=1, step=20, reducer=distopt.PowerSGD(rank=2))
train(int(os.environ["RANK"]), lambda value: None, os.environ["FOLDER"], plan)
"""


@pytest.mark.skipif(count(0, 1) == 0, reason="importing torch twice takes long")
def test_a_script_ends_with_the_message(tmp_path):
    """The whole of an interpreter's end: nothing in it, or in torch, waits for the dead."""
    environment = {**os.environ, "FOLDER": str(tmp_path), "OMP_NUM_THREADS": "1"}
    scripts = [
        subprocess.Popen(
            [sys.executable, "-c", SCRIPT], env={**environment, "RANK": str(rank)}, stderr=subprocess.PIPE, text=True
        )
        for rank in range(2)
    ]
    try:
        told = scripts[0].communicate(timeout=60)[1]
        assert scripts[1].wait(timeout=10) == -9
    finally:
        for script in scripts:
            script.kill()
            script.wait()
    assert scripts[0].returncode == 1
    assert "rank 1 is gone" in told.splitlines()[-1]
