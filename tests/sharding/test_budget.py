"""What a budget says is what ranks take, and what the paper says."""

import pytest
import torch
from torch import nn
from torch.distributed.tensor import Shard

import distopt
from distopt.errors import SettingError
from distopt.numerics.storage import nbytes
from distopt.sharding.budget import budget
from tests.processes import run_ranks
from tests.sharding.models import Model, by_columns, local, sharded, train

LOW_RANK = distopt.PowerSGD(rank=2, min_saving=0.0, residual_dtype="1-6-9", factor_dtype="1-6-9")


class Layers(nn.Module):
    """The matrices of DALL-E's resblocks: query, key, value and output, and an MLP."""

    def __init__(self, width, depth=2):
        super().__init__()
        sides = [(width, width)] * 4 + [(width, 4 * width), (4 * width, width)]
        self.blocks = nn.ModuleList(
            nn.Sequential(*(nn.Linear(*side, bias=False) for side in sides)) for _ in range(depth)
        )

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x


def second_mlp_by_columns(model):
    """A placement: dim 1 for the last matrix of each block, which has its input there."""
    last = {id(block[-1].weight) for block in model.blocks}
    return lambda parameter: Shard(1) if id(parameter) in last else None


@pytest.mark.parametrize(
    ("width", "rank", "saving", "by_rows"), [(1920, 512, 83.3, 77.5), (2688, 640, 85.1, 79.9), (3968, 896, 85.9, 80.9)]
)
def test_the_papers_savings(width, rank, saving, by_rows):
    """Ramesh et al. 2021, table 2 and table 1; 8 shards, of which each has an eighth of the rank."""
    with torch.device("meta"):
        model = Layers(width)
    settings = {"shards": 8, "replicas": 128, "reducer": distopt.PowerSGD(rank // 8, residual_dtype="1-6-9")}
    paper = budget(model, "blocks.*", **settings, shard_placement_fn=second_mlp_by_columns(model))
    share = 2 * 12 * width**2 // 8  # numbers of two layers
    assert paper.bytes_uncompressed == paper.parameters == 4 * share
    assert paper.residuals == 2 * share
    assert paper.gathered == 8 * paper.parameters
    assert paper.saving == paper.matrix_saving == pytest.approx(1 - 5 * rank / (8 * width), abs=1e-12)
    assert 100 * paper.saving == pytest.approx(saving, abs=0.05)
    assert 100 * budget(model, "blocks.*", **settings).saving == pytest.approx(by_rows, abs=0.05)


def budget_job(rank):
    """Train in float32, and tell what it took."""
    model = Model(dtype=torch.float32)
    model, registration = sharded((2, 2), LOW_RANK, model)
    assert model.blocks[0].down.weight.placements == (Shard(1),)
    train(model, rank, 2)
    engine, stats = registration._engine, registration.stats()
    kept = [sum(map(nbytes, stored.values())) for stored in (engine.state.residuals, engine.state.factors)]
    parameters = sum(nbytes(local(p.detach())) for name, p in model.named_parameters())
    return parameters, *kept, stats.bytes_uncompressed / 2, stats.bytes_sent / 2


def test_real_ranks_take_what_the_budget_says():
    with torch.device("meta"):
        model = Model(dtype=torch.float32)
        model.unused.requires_grad_(False)  # it takes part in no step
    for rank, found in enumerate(run_ranks(4, budget_job)):
        settings = {"shards": 2, "replicas": 2, "reducer": LOW_RANK, "shard_placement_fn": by_columns}
        told = budget(model, "blocks.?", **settings, index=rank % 2)
        assert found == (told.parameters, told.residuals, told.factors, told.bytes_uncompressed, told.bytes_sent)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"shards": 0}, "shards is 0, but must be an integer of at least 1"),
        ({"replicas": -1}, "replicas is -1, but must be an integer of at least 1"),
        ({"index": 2}, "index is 2, but must be from 0 to 1"),
        ({"units": "layers.*"}, "units is 'layers.*'"),
    ],
)
def test_wrong_settings(wrong, words):
    given = {"units": "blocks.?", "shards": 2, "replicas": 2} | wrong
    with pytest.raises(SettingError) as refused:
        budget(Model(), given.pop("units"), **given)
    assert str(refused.value).startswith(words)
