"""What the speed of DALL-E is measured by still runs: both models agree, and everything takes its steps."""

import math

from bench import dalle_speed
from tests.processes import run_ranks

TINY = {"text_vocabulary": 16, "text_length": 4, "codes": 16, "grid": 4, "width": 16, "layers": 2}


def measured(rank):
    dalle_speed.SIZES["tiny"] = dalle_speed.Size(TINY, batch=2, samples=2)
    case = dalle_speed.Case("tiny", "paper")
    case.check()
    return case.training(2), case.sampling(2)


def test_a_tiny_transformer_is_timed_in_every_way():
    ((training, sampling),) = run_ranks(1, measured)
    assert len({record["who"] for record in training}) == len(training) == 6
    assert [record["who"] for record in sampling] == ["plain, cache", "distopt, cache", "distopt, no cache"]
    for record in (*training, *sampling):
        assert record["rounds"] == 2
        assert 0 < record["seconds"] < math.inf
        assert record["ratio_low"] <= record["ratio"] <= record["ratio_high"]
    records = [{"what": "training", **r} for r in training] + [{"what": "sampling", **r} for r in sampling]
    found = dalle_speed.tables(records)
    assert found["dalle-training"].count("\n") == 1 + len(training)
    assert found["dalle-sampling"].count("\n") == 1 + len(sampling)
