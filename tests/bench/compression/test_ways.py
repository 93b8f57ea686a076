"""Compressing for a bench: what is timed compresses, and the tables say it."""

import math
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from bench.compression.__main__ import measured, repeated, tables
from bench.compression.models import MODELS, TINY
from bench.compression.ways import WAYS
from bench.memory import Done

SHAPES = [(24, 16), (24,), (24, 16), (16, 8)]


@pytest.mark.parametrize("way", [way for way in WAYS if way not in ("epfml", "products")])
def test_a_step_delivers_a_gradient_of_low_rank(way):
    """Rank 2 is enough for what is fed, on the average."""
    generator = torch.Generator().manual_seed(0)
    parts = [
        torch.randn(s[0], 1, generator=generator) @ torch.randn(1, math.prod(s[1:]), generator=generator)
        for s in SHAPES
    ]
    fed = torch.cat([part.flatten() for part in parts])
    bucket = torch.empty_like(fed)
    step = WAYS[way](SHAPES, bucket, 2)
    with mock.patch.object(dist, "all_reduce", Done), torch.no_grad():
        delivered = torch.zeros_like(fed)
        for _ in range(40):
            bucket.copy_(fed)
            step()
            delivered += bucket
    assert torch.allclose(delivered / 40, fed, atol=0.05 * float(fed.abs().max()))


def test_the_products_alone_are_those_of_random_factors():
    bucket = torch.ones(sum(map(math.prod, SHAPES)))
    WAYS["products"](SHAPES, bucket, 2)()
    changed = [bool((part != 1).all()) for part in bucket.split([math.prod(shape) for shape in SHAPES])]
    assert changed == [True, False, True, True]


def test_the_models_are_as_large_as_published():
    sizes = {name: sum(map(math.prod, shapes())) for name, shapes in MODELS.items()}
    assert sizes["resnet50"] == 25_557_032
    assert sizes["gpt2"] == 124_439_808


@pytest.mark.parametrize("way", ["both", "torch"])
def test_operations_are_carried_out_once_more(way):
    found = repeated(way, TINY["1"]())
    assert 10 < found["operations"] < 100
    assert found["operations_ms"] > 0


def test_tables():
    ways = ["both", "torch"]
    records = measured("tiny 10", TINY["10"](), torch.float32, 1, ways, 3, 1.0)
    records = [r | {"operations": 45, "operations_ms": 0.0, "python_ms": 0.0} for r in records]
    records += measured("small", SHAPES, torch.bfloat16, 2, ways, 3, 1.0)
    found = tables(records)
    assert found["compression-overhead"].count("| 10 | ") == 2
    assert found["compression"].count("| small | bfloat16 | ") == 2
    assert "| rank 2: ms |" in found["compression"]
    assert "| torch |" in found["compression"]
    assert "1.00 (1.00 to 1.00)" in found["compression"]
