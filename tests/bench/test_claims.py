"""What docs/benchmarks.md says of distopt: a sample in ``make test``, the stated counts in ``make test-full``."""

import torch

from bench import low_rank_error, memory, stability
from bench.competitors import Distopt
from tests.faults.draw import count
from tests.processes import run_ranks

OURS = [variant for variant in stability.VARIANTS if isinstance(variant.who, Distopt)]


def stability_job(rank):
    last = count(100, 10_000)
    return [stability.run(rank, variant, 4, [30, last]) for variant in OURS]


def test_residuals_stay_bounded_under_noise():
    found = run_ranks(2, stability_job, timeout=count(110, 1200))[0]
    for variant, (early, late) in zip(OURS, found, strict=True):
        assert late["weight_residual"] < min(4.0, 1.2 * early["weight_residual"]), variant
        assert late["bias_residual"] == 0.0
        assert late["bias_error"] < (3e-3 if variant.dtype == torch.bfloat16 else 1e-7), variant


def test_a_low_rank_bfloat16_gradient_arrives():
    shape = (4096, 1024) if count(0, 1) else (512, 128)
    for columns in (4, 32):
        errors = run_ranks(1, low_rank_error.run, Distopt(), columns, torch.bfloat16, 4, shape, timeout=110)[0]
        first = low_rank_error.gradient(low_rank_error.START, torch.bfloat16, shape)
        best = low_rank_error.floor(first, [columns])[columns]
        assert best < 0.011
        assert max(errors) < 2.5 * best


def test_error_feedback_takes_the_memory_of_default_ddp():
    """Beyond it: Q, room for P and twice for Q, and a table of half a megabyte, whatever the size.

    A residual in 16 bits takes half of what one in float32 does; coding it, some pieces of a megabyte.
    """
    layers, width = 12, 1024
    labels = (memory.DEFAULT, memory.VIEW, "distopt, bucket view", "distopt, bucket view, 1-6-9 residual")
    by_label = {variant.label: variant for variant in memory.VARIANTS}
    plain, view, ours, packed = (run_ranks(1, memory.measure, by_label[label], 4, layers, width)[0] for label in labels)
    table = 2**19 / (layers * width**2)
    factors = 4 * 4 * 4 / width
    assert ours["live"] - plain["live"] < table + 1.1 * factors
    assert ours["peak"] - plain["peak"] < table + 0.2
    assert packed["live"] - view["live"] < 2 + table + 1.1 * factors
    assert packed["peak"] - view["peak"] < 2 + table + 8 * 2**20 / (layers * width**2)
