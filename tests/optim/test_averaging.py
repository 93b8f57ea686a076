"""The average of the iterates: what torch's AveragedModel gives, on the way through a thread too; wrappers; resuming."""

import copy
import gc
import threading

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from distopt.errors import SettingError, StateError
from distopt.optim import IterateAverage, averaging


def network(dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, 2)).to(dtype)


def moved(model, step):
    """Change parameters and buffers, as a step of training does."""
    g = torch.Generator().manual_seed(step)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=g).to(parameter.dtype))
        model[1].running_mean.add_(1)
        model[1].num_batches_tracked.add_(1)


def same(first, second):
    pairs = zip(first.state_dict().values(), second.state_dict().values(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


class Delayed:
    """A carrier on the CPU whose copies arrive when the test says so."""

    def __init__(self, tensors):
        self.copies, self.guards, self.prepared = [], 0, None
        self.ready = threading.Event()

    def always_ready(self):
        self.prepared = threading.Event()
        self.prepared.set()

    def start(self, tensors):
        self.ready = self.prepared or threading.Event()
        self.copies = [tensor.detach().clone() for tensor in tensors]

    def guard(self):
        self.guards += 1

    def arrived(self):
        assert self.ready.wait(60)
        return self.copies


@pytest.fixture
def carrier(monkeypatch):
    """The way from CUDA to the CPU, without CUDA."""
    made = []

    def between(tensors, device):
        made.append(Delayed(tensors))
        return made[0]

    monkeypatch.setattr(averaging, "carrier_between", between)
    return lambda: made[0]


@given(decay=st.sampled_from([0.0, 0.5, 0.99]), every=st.integers(1, 4), steps=st.integers(0, 20))
def test_it_is_the_average_of_torch(decay, every, steps):
    model = network()
    average = IterateAverage(model, decay=decay, every=every)
    theirs = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay))
    for step in range(1, steps + 1):
        moved(model, step)
        average.update()
        if step % every == 0:
            theirs.update_parameters(model)
    assert same(average.module, theirs.module)


def test_the_warm_up_forgets_early():
    model = nn.Linear(1, 1, bias=False)
    average = IterateAverage(model, every=1, warmup=True)
    expected = None
    for n, value in enumerate((1.0, 5.0, 9.0, 2.0)):
        nn.init.constant_(model.weight, value)
        average.update()
        decay = min(0.99, (1 + n) / (10 + n))
        expected = value if expected is None else decay * expected + (1 - decay) * value
    assert average.module.weight.item() == pytest.approx(expected)


def test_the_thread_gives_the_same(carrier):
    """The parameters may change as soon as `update` is back; the module waits for what is on its way."""
    model, plain = network(), network()
    average = IterateAverage(model, every=2, decay=0.5)
    exact = AveragedModel(plain, multi_avg_fn=get_ema_multi_avg_fn(0.5))
    for step in range(1, 7):
        for each in (model, plain):
            moved(each, step)
        average.update()
        if step % 2 == 0:
            exact.update_parameters(plain)
        moved(model, step + 100)  # while the copy is on its way
        for parameter, other in zip(model.parameters(), plain.parameters(), strict=True):
            parameter.data.copy_(other.data)
        model[1].load_state_dict(plain[1].state_dict())
        carrier().ready.set()
    assert same(average.module, exact.module)


def test_an_optimizer_step_is_guarded_as_long_as_the_average_lives(carrier):
    model = network()
    average = IterateAverage(model, every=1)
    carrier().always_ready()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    average.update()
    optimizer.step()
    assert carrier().guards == 1
    average.module  # noqa: B018
    del average
    gc.collect()
    optimizer.step()
    assert carrier().guards == 1


def test_what_goes_wrong_in_the_thread_is_raised_here(carrier):
    average = IterateAverage(network(), every=1)
    carrier().arrived = lambda: 1 / 0
    average.update()
    with pytest.raises(ZeroDivisionError):
        average.update()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bit_models_are_averaged_in_float32(dtype):
    """With a decay of 0.99, to nearest, the average would not move at all."""
    model = nn.Linear(2, 2, bias=False).to(dtype)
    average = IterateAverage(model, every=1)
    nn.init.constant_(model.weight, 1.0)
    average.update()
    nn.init.constant_(model.weight, 1 + 2.0**-5)
    for _ in range(200):
        average.update()
    assert average.module.weight.dtype == dtype
    assert average.module.weight[0, 0].item() == pytest.approx(1 + 2.0**-5, abs=2.0**-7)
    assert average.state_dict()["average"]["weight"].dtype == torch.float32


def test_mixed_dtypes_and_shared_parameters():
    model = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2).double(), nn.Linear(2, 2).half()])
    model.append(nn.Linear(2, 2))
    model[3].weight = model[0].weight
    average = IterateAverage(model, every=1, decay=0.5)
    for value in (1.0, 3.0):
        for parameter in model.parameters():
            nn.init.constant_(parameter, value)
        average.update()
    for parameter in average.module.parameters():
        assert torch.equal(parameter, torch.full_like(parameter, 2))
    assert average.module[3].weight is average.module[0].weight


@pytest.mark.parametrize("compiled", [False, True], ids=["DDP", "compiled DDP"])
def test_wrappers_are_seen_through(compiled):
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    model = network()
    wrapped = DDP(model)
    average = IterateAverage(torch.compile(wrapped) if compiled else wrapped, every=1)
    average.update()
    assert same(average.module, model)
    assert list(average.state_dict()["average"]) == [
        name for name, _ in [*model.named_parameters(), *model.named_buffers()]
    ]
    dist.destroy_process_group()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_resuming(dtype):
    model = network(dtype)
    average = IterateAverage(model, every=2, warmup=True)
    for step in range(5):
        moved(model, step)
        average.update()
    state = copy.deepcopy(average.state_dict())
    again = IterateAverage(model, every=2, warmup=True)
    again.load_state_dict(state)
    for step in range(5):
        moved(model, step)
        average.update()
        again.update()
    assert same(average.module, again.module)


def test_a_state_of_another_model_is_refused():
    average = IterateAverage(network())
    with pytest.raises(StateError, match=r"'0\.bias' is not the same in both"):
        average.load_state_dict(IterateAverage(nn.Sequential(nn.Linear(4, 5, bias=False))).state_dict())
    with pytest.raises(StateError, match="'weight' is not the same"):
        IterateAverage(nn.Linear(2, 3, bias=False)).load_state_dict(
            IterateAverage(nn.Linear(3, 2, bias=False)).state_dict()
        )


@pytest.mark.parametrize(("name", "value"), [("decay", 1.0), ("decay", "0.9"), ("every", 0)])
def test_settings_are_checked(name, value):
    with pytest.raises(SettingError, match=f"IterateAverage.{name} is"):
        IterateAverage(network(), **{name: value})


def test_a_model_without_parameters_is_refused():
    with pytest.raises(SettingError, match="a module that has parameters"):
        IterateAverage(nn.ReLU())
