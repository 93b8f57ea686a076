"""What one rank can tell of a pipeline: every bad setting is refused in one line before any work."""

import collections

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel as DDP

import distopt
from tests.pipelining.models import batch, blocks, gradients, loss_fn, piped, sequential_step, worst


@pytest.fixture(autouse=True)
def alone():
    """A world of one rank in this process."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("named", ["Sequential", "ModuleList", "list", "names"])
def test_names_are_those_of_the_blocks(named):
    model = blocks()
    keys = [str(i) for i in range(len(model))]
    if named == "names":
        keys = ["embed", "a", "b", "c", "d", "head"]
        model = nn.Sequential(collections.OrderedDict(zip(keys, model, strict=True)))
    given = {"ModuleList": nn.ModuleList, "list": list}.get(named, lambda same: same)(model)
    names = [f"{key}.{name}" for key, block in zip(keys, model, strict=True) for name, _ in block.named_parameters()]
    pipe = piped(given, stages=1)
    assert pipe.split == (tuple(keys),)
    assert [name for name, _ in pipe.named_parameters()] == names
    assert list(pipe.module.state_dict()) == names


def test_a_compressing_reducer_with_one_replica_is_exact():
    model, pipe = blocks(), piped(stages=1, reducer=distopt.PowerSGD(rank=1, min_saving=0.0))
    x, target = batch(0)
    loss = pipe.step(x, target=target)
    assert loss.item() == sequential_step(model, [(x, target)], 4)
    assert loss.dtype == torch.float64
    assert worst(gradients(pipe), {name: p.grad for name, p in model.named_parameters()}) == 0.0
    with pytest.raises(distopt.RegistrationError, match=r"Pipeline\.step"):
        pipe.registration.reduce()
    pipe.registration.pause()
    pipe.registration.resume()
    assert pipe.registration.stats().steps == 1
    assert "1f1b" in repr(pipe)


def tied():
    model = blocks()
    model[2].up.weight = model[1].up.weight
    return model


def sharded():
    model = blocks()
    distopt.shard(model, list(model))
    return model


@pytest.mark.parametrize(
    ("make", "options", "told"),
    [
        (blocks, {"stages": 7}, "stages is 7, but must be at most the number of blocks, which is 6"),
        (blocks, {"stages": 0}, "stages is 0"),
        (blocks, {"stages": True}, "stages is True"),
        (blocks, {"stages": 2}, "stages is 2, but must be the number of ranks of the pipeline, which is 1"),
        (blocks, {"microbatches": 0}, "microbatches is 0"),
        (blocks, {"microbatches": 2.0}, "microbatches is 2.0"),
        (blocks, {"schedule": "zigzag"}, "schedule is 'zigzag', but must be one of 'gpipe', '1f1b', 'interleaved'"),
        (blocks, {"schedule": "interleaved", "stages": 2}, "schedule is 'interleaved'"),
        (blocks, {"loss_fn": "mse"}, "loss_fn is 'mse'"),
        (blocks, {"reducer": "powersgd"}, "reducer is 'powersgd'"),
        (blocks, {"mean": 1}, "mean is 1"),
        (blocks, {"recompute": "yes"}, "recompute is 'yes'"),
        (blocks, {"costs": [1, 2]}, "costs is [1, 2], but must be 6 finite numbers"),
        (blocks, {"costs": [1, 1, 1, 1, 1, -1]}, "costs"),
        (blocks, {"costs": [0] * 6}, "costs"),
        (blocks, {"costs": [1, 1, 1, 1, 1, float("nan")]}, "costs"),
        (blocks, {"costs": [1] * 6, "sample": torch.zeros(1, 5)}, "sample"),
        (blocks, {"sample": [1, 2]}, "sample is 'list'"),
        (blocks, {"grad_scaler": 1024.0}, "grad_scaler is 'float'"),
        (blocks, {"measure_every": -1}, "measure_every is -1"),
        (blocks, {"mesh": "2x2"}, "mesh is 'str'"),
        (lambda: nn.Linear(2, 2), {}, "blocks is 'Linear'"),
        (lambda: [nn.Linear(2, 2), "relu"], {}, "blocks[1] is 'str'"),
        (tied, {}, "blocks is '2.up.weight', but must be of one block only: block 1 has it too"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_bad_settings(make, options, told):
    with pytest.raises(distopt.SettingError) as raised:
        distopt.pipeline(make(), **{"stages": 1, "microbatches": 4, **options})
    assert str(raised.value).startswith(told)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (sharded, "is a FSDPEmbedding: pipeline calls fully_shard itself"),
        (lambda: [DDP(nn.Linear(2, 2))], "is a DistributedDataParallel"),
        (lambda: [nn.Linear(2, 2, device="meta")], "'0.weight' is on the meta device"),
        (lambda: [nn.ReLU()], "no block has a parameter"),
        (lambda: [nn.Embedding(2, 2, sparse=True)], "sparse"),
    ],
)
def test_bad_blocks(make, told):
    with pytest.raises(distopt.RegistrationError) as raised:
        distopt.pipeline(make(), stages=1, microbatches=1)
    assert told in str(raised.value)
    assert "\n" not in str(raised.value)


def test_without_a_world():
    dist.destroy_process_group()
    try:
        with pytest.raises(distopt.RegistrationError, match="init_process_group"):
            piped(stages=1)
    finally:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)


def test_meshes_of_one_rank():
    for ndim in (1, 2, 3):
        pipe = piped(stages=1, mesh=init_device_mesh("cpu", (1,) * ndim))  # without names
        x, target = batch(0)
        pipe.step(x, target=target)
    with pytest.raises(distopt.SettingError, match="mesh"):
        piped(stages=1, mesh=init_device_mesh("cpu", (1,) * 4))


@pytest.mark.parametrize(
    ("x", "target", "told"),
    [
        (batch(0, rows=6)[0], batch(0)[1], "len(x) is 6, but must be a multiple of the 4 micro-batches"),
        (batch(0)[0], batch(0, rows=7)[1], "len(target) is 7"),
        (batch(0)[0], None, "target is 'NoneType'"),
        (None, batch(0)[1], "x is 'NoneType'"),
        (torch.zeros(()), batch(0)[1], "x is 'Tensor'"),
        (torch.zeros(0, 5), batch(0)[1], "len(x) is 0"),
    ],
)
def test_bad_batches(x, target, told):
    pipe = piped(stages=1)
    for call in (pipe.step, pipe.evaluate):
        with pytest.raises(distopt.SettingError) as raised:
            call(x, target=target)
        assert str(raised.value).startswith(told)
    x, target = batch(0)
    pipe.step(x, target=target)


def test_a_block_that_gives_no_tensor():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(5, 5)

        def forward(self, x):
            return self.inner(x), x

    pipe = distopt.pipeline([Two()], stages=1, microbatches=2, loss_fn=loss_fn)
    with pytest.raises(distopt.RegistrationError, match="block '0' ends a stage with a tuple"):
        pipe.step(torch.zeros(4, 5), target=torch.zeros(4))


def test_other_ranks_blocks_are_emptied():
    """Nothing is left of them, though whoever has noted the objects still finds them."""
    from distopt.pipelining.pipeline import _empty

    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    _empty([model[1]], nn.ModuleDict({"0": model[0]}))
    assert model[0].weight.numel() == 4
    assert all(tensor.numel() == 0 for tensor in [*model[1].parameters(), *model[1].buffers()])
