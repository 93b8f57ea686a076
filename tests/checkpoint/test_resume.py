"""What is loaded is what was saved: of everything that trains, on one process and on several."""

import copy
import random
from collections import Counter, OrderedDict

import numpy
import pytest
import torch
import torch.distributed as dist
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP

import distopt
from distopt import checkpoint
from distopt.errors import AgreementError, CheckpointError, SettingError
from tests.checkpoint.models import Training, same
from tests.processes import run_ranks

atoms = (
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5) | st.binary(max_size=5)
)
plain = st.recursive(
    atoms,
    lambda inner: st.lists(inner, max_size=3) | st.tuples(inner) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=6,
)


def test_a_resumed_run_equals_an_undisturbed_one(tmp_path):
    undisturbed = Training()
    for _ in range(6):
        undisturbed.step()
    training = Training()
    for _ in range(3):
        training.step()
    checkpoint.save(tmp_path, 3, **training.stateful())
    resumed = Training(seed=1)
    assert checkpoint.load(tmp_path, **resumed.stateful()) == 3
    for _ in range(3):
        resumed.step()
    for name, thing in resumed.stateful().items():
        other = getattr(undisturbed, name)
        states = [t.state_dict() if hasattr(t, "state_dict") else t for t in (thing, other)]
        if not isinstance(thing, torch.Generator):
            assert same(*states), name


def test_saving_is_only_looking(tmp_path):
    ends = []
    for saves in (False, True):
        training = Training()
        for step in range(4):
            training.step()
            if saves:
                checkpoint.save(tmp_path, step, **training.stateful())
        ends.append([training.model.state_dict(), training.progress, torch.rand(3), random.random()])
    assert same(*ends)


@given(value=plain)
@example(value=b"")
@example(
    value=[
        {1, 2},
        set(),
        1j,
        Counter("ab"),
        OrderedDict(a=1),
        torch.Size([1]),
        torch.float32,
        torch.device("cpu"),
        10**40,
    ]
)
@settings(max_examples=40, deadline=None)
def test_plain_values_come_back_as_they_were(tmp_path_factory, value):
    folder = tmp_path_factory.mktemp("values")
    checkpoint.save(folder, 0, it=checkpoint.Value(value))
    back = checkpoint.Value()
    checkpoint.load(folder, it=back)
    assert back.value == value
    assert type(back.value) is type(value)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.int8, torch.bool, torch.complex64])
def test_tensors_come_back_without_the_memory_that_they_are_a_part_of(tmp_path, dtype):
    large = torch.randn(1000, 1000).to(dtype)
    checkpoint.save(tmp_path, 0, it=checkpoint.Value([large[3, ::2], large[0, 0], large[:0]]))
    back = checkpoint.Value()
    checkpoint.load(tmp_path, it=back)
    assert torch.equal(back.value[0], large[3, ::2])
    assert back.value[2].shape == (0, 1000)
    assert (tmp_path / "00001-step-0/it.pt").stat().st_size < 20_000


def test_the_generators_may_stay_as_they_are(tmp_path):
    checkpoint.save(tmp_path, 0)
    first = torch.rand(()), random.random(), numpy.random.random()
    state = torch.get_rng_state()
    checkpoint.load(tmp_path, rng=False)
    assert torch.equal(torch.get_rng_state(), state)
    checkpoint.load(tmp_path)
    assert (torch.rand(()), random.random(), numpy.random.random()) == first


def test_wrappers_are_seen_through(tmp_path):
    model = nn.Linear(2, 2)
    checkpoint.save(tmp_path, 0, model=torch.compile(model))
    other = nn.Linear(2, 2)
    checkpoint.load(tmp_path, model=other)
    assert torch.equal(model.weight, other.weight)


class Strange:
    """A class of the user's."""


@pytest.mark.parametrize(
    ("thing", "where"),
    [
        ({"a": [1, Strange()]}, "thing['a'][1] is a tests.checkpoint.test_resume.Strange"),
        ({"f": print}, "thing['f'] is a builtins.builtin_function_or_method"),
        ({"x": numpy.float64(1)}, "thing['x'] is a numpy.float64"),
        ({Strange(): 1}, "a key of thing is a"),
        ({"m": torch.empty(2, device="meta")}, "thing['m'] is a tensor without values"),
        ({"s": torch.eye(2).to_sparse()}, "sparse"),
    ],
)
def test_what_could_not_be_loaded_is_refused_before_anything_is_written(tmp_path, thing, where):
    with pytest.raises(CheckpointError) as caught:
        checkpoint.save(tmp_path / "run", 0, thing=thing)
    assert where in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_a_value_that_holds_itself_is_refused(tmp_path):
    loop = {}
    loop["again"] = loop
    with pytest.raises(CheckpointError, match="nested too deeply"):
        checkpoint.save(tmp_path, 0, loop=loop)


@pytest.mark.parametrize(
    ("step", "keep", "stateful", "field"),
    [
        (-1, None, {}, "step"),
        (1.0, None, {}, "step"),
        (True, None, {}, "step"),
        (1, 0, {}, "keep"),
        (1, None, {"number": 3}, "number"),
        (1, None, {"../model": {}}, "name"),
    ],
)
def test_bad_arguments(tmp_path, step, keep, stateful, field):
    with pytest.raises(SettingError, match=field):
        checkpoint.save(tmp_path / "run", step, keep=keep, **stateful)
    assert not (tmp_path / "run").exists()


def test_what_does_not_fit_is_one_line(tmp_path):
    checkpoint.save(tmp_path, 0, model=nn.Linear(2, 2))
    for stateful, text in (
        ({"model": nn.Linear(3, 2)}, "'model' of"),
        ({"other": {}}, "holds no 'other' for all ranks, only: model"),
    ):
        with pytest.raises(CheckpointError, match=text) as caught:
            checkpoint.load(tmp_path, **stateful)
        assert "\n" not in str(caught.value)
    with pytest.raises(CheckpointError, match="no checkpoint of step 7"):
        checkpoint.load(tmp_path, step=7)
    with pytest.raises(CheckpointError, match="there is no checkpoint in"):
        checkpoint.load(tmp_path / "nothing")


def ddp_run(rank, folder, first, last, save_at=None):
    """Steps of a DDP model with PowerSGD; the same data whatever the number of ranks."""
    torch.manual_seed(rank)
    torch.set_default_dtype(torch.float64)
    model = DDP(nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 16)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    registration = distopt.register(model, distopt.PowerSGD(rank=2, min_saving=0.1))
    noise = {"rank": rank, "drawn": 0.0}
    own = checkpoint.PerRank(noise)
    things = {"model": model, "optimizer": optimizer, "registration": registration}
    if first:
        full = {**things, "own": own} if dist.get_world_size() == 2 else things
        assert checkpoint.load(folder, **full) == first
    for step in range(first, last):
        data = torch.randn(8, 16, generator=torch.Generator().manual_seed(step)).chunk(dist.get_world_size())[rank]
        model(data).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        noise["drawn"] = float(torch.rand(()))
        if step + 1 == save_at:
            checkpoint.save(folder, save_at, **things, own=own)
    return [copy.deepcopy(model.module.state_dict()), dict(noise), registration.stats().steps]


def test_ranks_resume_to_the_bit_and_other_numbers_of_ranks_up_to_rounding(tmp_path):
    whole = run_ranks(2, ddp_run, tmp_path, 0, 8, 4)
    resumed = run_ranks(2, ddp_run, tmp_path, 4, 8)
    assert same(whole, resumed)
    assert resumed[0][1]["drawn"] != resumed[1][1]["drawn"]
    for other in (run_ranks(4, ddp_run, tmp_path, 4, 8), run_ranks(1, ddp_run, tmp_path, 4, 8)):
        for name, tensor in whole[0][0].items():
            torch.testing.assert_close(other[0][0][name], tensor, rtol=1e-6, atol=1e-8)


def sharded_run(rank, folder, first, last, save_at=None):
    """Steps of a sharded model, whose rows cannot be divided by the ranks; whole tensors at the end."""
    from tests.sharding.models import Model

    model = Model(seed=first)
    optimizer_of = distopt.optim.AdamW if first == 0 or dist.get_world_size() > 1 else torch.optim.AdamW
    if dist.get_world_size() > 1:
        distopt.shard(model, "blocks.*")
    optimizer = optimizer_of(model.parameters(), lr=1e-2)
    if first:
        assert checkpoint.load(folder, model=model, optimizer=optimizer) == first
    for step in range(first, last):
        tokens = torch.randint(13, (4, 5), generator=torch.Generator().manual_seed(step))
        model(tokens).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        if step + 1 == save_at:
            checkpoint.save(folder, save_at, model=model, optimizer=optimizer)
    return {
        n: (p.full_tensor() if hasattr(p, "full_tensor") else p).detach().clone() for n, p in model.named_parameters()
    }


def test_sharded_models_are_saved_whole(tmp_path):
    whole = run_ranks(2, sharded_run, tmp_path, 0, 4, 2)
    assert same(whole, run_ranks(2, sharded_run, tmp_path, 2, 4))
    for ranks in (1, 3):
        for name, tensor in run_ranks(ranks, sharded_run, tmp_path, 2, 4)[0].items():
            torch.testing.assert_close(tensor, whole[0][name], rtol=1e-9, atol=1e-12)


def disagreeing(rank, folder):
    """Every rank meets what is wrong on one."""
    messages = []
    value = {"of": rank}
    attempts = [
        lambda: checkpoint.save(folder, rank, value=value),
        lambda: checkpoint.save(folder, 1, value=value if rank else {"f": print}),
        lambda: checkpoint.save(folder, 1, value=checkpoint.PerRank({"f": print} if rank else value)),
        lambda: checkpoint.load(folder if rank == 0 else folder / "elsewhere", value=value),
    ]
    checkpoint.save(folder, 5, value={"x": 1})
    for attempt in attempts:
        with pytest.raises((AgreementError, CheckpointError)) as caught:
            attempt()
        messages.append(str(caught.value))
    with pytest.MonkeyPatch.context() as patch:
        if rank == 1:
            patch.setattr("distopt.checkpoint.files.os.fsync", full)
        with pytest.raises(CheckpointError) as caught:
            checkpoint.save(folder, 6, value=value)
        messages.append(str(caught.value))
    assert checkpoint.load(folder, value=value) == 5
    return messages


def full(*_):
    """As of a full disk."""
    raise OSError(28, "No space left on device")


def test_what_fails_on_one_rank_fails_on_all(tmp_path):
    for messages in run_ranks(2, disagreeing, tmp_path):
        assert "step" in messages[0]
        assert "value['f'] is a builtins" in messages[1]
        assert "value['f'] is a builtins" in messages[2]
        assert "No such file" in messages[3]
        assert "rank-1.pt: No space left on device" in messages[4]
        assert not any("\n" in message for message in messages)
    assert [path.name for path in tmp_path.iterdir()] == ["00001-step-5"]
