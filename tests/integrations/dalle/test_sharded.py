"""A sharded stage is the stage: the same losses and the same whole model as under DDP."""

import dataclasses

import pytest
import torch
from distopt.integrations.dalle.context import Context
from distopt.integrations.dalle.dvae import DVAE
from distopt.integrations.dalle.precision import reducer
from distopt.integrations.dalle.stage1 import train_dvae
from distopt.integrations.dalle.stage2 import train_transformer

import distopt
from tests.integrations.dalle.test_precision import DVAE_SETTINGS, STAGE1, STAGE2, TASK, TOKENIZER, TRANSFORMER
from tests.processes import run_ranks


def train(stage, rank, shards, how, precision="fp32", steps=6):
    """One stage on four ranks: its loss, and the weights that it ends with."""
    context = Context(rank=rank, world_size=4, reducer=how, shards=shards, precision=precision)
    torch.manual_seed(0)
    dvae = DVAE(DVAE_SETTINGS).eval()
    if stage == 1:
        result = train_dvae(TASK, DVAE_SETTINGS, dataclasses.replace(STAGE1, steps=steps), context)
    else:
        settings = dataclasses.replace(STAGE2, steps=steps)
        result = train_transformer(TASK, dvae, TOKENIZER, TRANSFORMER, settings, context)
    assert not any(p.requires_grad for p in result.model.parameters())
    weights = torch.cat([p.flatten() for p in result.model.parameters()])
    return result.final_loss, weights.numpy(), result.stats.saving, result.skipped_steps


def job(rank):
    told = {}
    for stage in (1, 2):
        for shards in (1, 2, 4):
            told[stage, shards] = train(stage, rank, shards, distopt.AllReduce())
    told["fp16"] = train(2, rank, 2, reducer("powersgd", 4, "fp16"), "fp16")
    return told


@pytest.fixture(scope="module")
def ranks():
    return run_ranks(4, job, timeout=100)


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("shards", [2, 4])
def test_it_ends_where_ddp_does(ranks, stage, shards):
    for rank in ranks:
        loss, weights, _, _ = rank[stage, 1]
        assert rank[stage, shards][0] == pytest.approx(loss, rel=1e-4)
        assert abs(rank[stage, shards][1] - weights).max() < 1e-3


def test_every_rank_has_the_same_whole_model_in_16_bits_too(ranks):
    for rank in ranks:
        for key, (_, weights, _, _) in rank.items():
            assert (weights == ranks[0][key][1]).all()
    assert ranks[0]["fp16"][2] > 0.3
