"""What the quality of compression is measured by still runs, for a few steps."""

import argparse

import pytest
from distopt.integrations.dalle import runs

from bench.dalle_reducers import compare, tables
from tests.processes import run_ranks

STEPS = 3


def compared(rank):
    return compare(
        argparse.Namespace(demo=runs.BUNDLED, steps=STEPS, powersgd_ranks=[2], precisions=["fp32"], seed=None)
    )


def test_a_few_steps_under_each_reducer():
    records, other = run_ranks(2, compared)
    exact, ranked = records
    assert [record["loss"] for record in records] == pytest.approx([record["loss"] for record in other])
    assert exact["steps"] == ranked["steps"] == STEPS
    assert (exact["reducer"], exact["saving"], exact["loss_against_allreduce"]) == ("AllReduce()", 0.0, 0.0)
    assert (ranked["reducer"], ranked["saving"] > 0.5) == ("PowerSGD(rank=2)", True)
    # As good as untrained: the codes are drawn from 192.
    assert 3 < ranked["loss"] < 8
    assert tables(records)["dalle-reducers"].count("\n") == 3
