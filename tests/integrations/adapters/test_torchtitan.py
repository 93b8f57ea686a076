"""A section of a config, in torchtitan's way, against the reducer that it describes."""

import dataclasses
import tomllib

import pytest
import torch
import torch.distributed as dist
from distopt.integrations.torchtitan import ReducerConfig
from torch.nn.parallel import DistributedDataParallel as DDP

import distopt
from distopt.errors import SettingError
from tests.integrations.adapters.plain import Net, batches, loss_of, optimizer_of, same, values
from tests.processes import run_ranks

TEXT = """
[training]
steps = 4

[reducer]
name = "PowerSGD"
rank = 2
"""


@dataclasses.dataclass(kw_only=True, slots=True)
class TrainingConfig:
    steps: int = 10000


@dataclasses.dataclass(kw_only=True, slots=True)
class JobConfig:
    """A trainer's tree, with our section in it."""

    training: TrainingConfig = dataclasses.field(default_factory=TrainingConfig)
    reducer: ReducerConfig = dataclasses.field(default_factory=ReducerConfig)


def trained(rank, begin, steps):
    net = Net()
    model, hook = begin(net)
    optimizer = optimizer_of(model)
    for batch in batches(rank, steps):
        loss_of(model, batch).backward()
        optimizer.step()
        optimizer.zero_grad()
    whole = [p.full_tensor() if hasattr(p, "full_tensor") else p for p in values(model)]
    return whole, hook.stats()


def job(rank):
    table = tomllib.loads(TEXT)
    config = JobConfig(training=TrainingConfig(**table["training"]), reducer=ReducerConfig.from_table(table["reducer"]))
    steps, reducer = config.training.steps, distopt.PowerSGD(rank=2)
    mesh = dist.init_device_mesh("cpu", (2, 1), mesh_dim_names=("dp_replicate", "fsdp"))  # torchtitan's names

    def ours(net):
        model = DDP(net)
        return model, config.reducer.register(model)

    def theirs(net):
        model = DDP(net)
        return model, distopt.register(model, reducer)

    found = {}
    ended, stats = trained(rank, ours, steps)
    expected, told = trained(rank, theirs, steps)
    found["register"] = same(ended, expected) and stats == told
    ended, stats = trained(rank, lambda net: (net, config.reducer.shard(net, list(net.net), mesh=mesh)), steps)
    expected, told = trained(
        rank, lambda net: (net, distopt.shard(net, list(net.net), mesh=mesh, reducer=reducer)), steps
    )
    found["shard"] = same(ended, expected) and stats == told
    return found, told.steps, told.saving


def test_equals_the_reducer_itself():
    for found, steps, saving in run_ranks(2, job):
        assert found == {"register": True, "shard": True}
        assert steps == 4
        assert saving > 0.7


@pytest.mark.parametrize(
    ("table", "reducer"),
    [
        ({}, distopt.PowerSGD()),
        ({"name": "AllReduce"}, distopt.AllReduce()),
        ({"name": "Cast", "dtype": "bfloat16"}, distopt.Cast(torch.bfloat16)),
        (
            {"rank": 8, "min_saving": 0.2, "start_step": 10, "uncompressed": ["*.head"], "residual_dtype": "bfloat16", "seed": 3},
            distopt.PowerSGD(8, min_saving=0.2, start_step=10, uncompressed=["*.head"], residual_dtype=torch.bfloat16, seed=3),
        ),
        ({"name": "TopK", "fraction": 0.1}, distopt.TopK(0.1)),
        ({"name": "RandomK", "fraction": 0.1, "seed": 2}, distopt.RandomK(0.1, seed=2)),
        ({"name": "Quantize", "bits": 4}, distopt.Quantize(bits=4)),
        ({"name": "Sign"}, distopt.Sign()),
    ],
    ids=repr,
)  # fmt: skip
def test_builds(table, reducer):
    assert ReducerConfig.from_table(table).build() == reducer


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"name": "PowerSDG"}, "reducer.name is 'PowerSDG', but must be one of AllReduce, Cast, PowerSGD"),
        ({"ranks": 8}, "reducer.ranks is 8, but must be left out: the names are name, rank"),
        ({"name": "Sign", "rank": 8}, "reducer.rank is 8, but must be left out: Sign has no such setting"),
        ({"name": "TopK"}, "reducer.fraction is None, but must be given"),
        ({"name": "Cast", "dtype": "int8"}, "reducer.dtype is 'int8', but must be one of float32, bfloat16, float16"),
        ({"rank": 0}, "PowerSGD.rank is 0"),
    ],
)
def test_refuses(table, message):
    with pytest.raises(SettingError) as caught:
        ReducerConfig.from_table(table).build()
    assert str(caught.value).startswith(message)
