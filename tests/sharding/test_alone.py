"""What one rank can tell of a sharded model: it is the plain model, it survives what goes wrong, and bad settings."""

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel as DDP

import distopt
from tests.sharding.models import Model, gradients, loss_of, tokens, train, whole, worst

POWER = distopt.PowerSGD(rank=2, min_saving=0.0)


@pytest.fixture(autouse=True)
def alone():
    """A world of one rank in this process."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("reducer", [None, POWER])
def test_one_rank_is_the_plain_model(reducer):
    model, plain = Model(), Model()
    names = [name for name, _ in model.named_parameters()]
    registration = distopt.shard(model, "blocks.*", reducer=reducer)
    assert [name for name, _ in model.named_parameters()] == names
    train(model, 0, 5)
    train(plain, 0, 5)
    assert worst(whole(model), whole(plain)) == 0.0
    assert registration.stats().steps == 5


def test_a_pass_that_raised_leaves_nothing():
    model, plain = Model(), Model()
    registration = distopt.shard(model, model.blocks, reducer=POWER)
    fails = model.blocks[0].register_full_backward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        loss_of(model, tokens(0, 0)).backward()
    fails.remove()
    for each in (model, plain):
        each.zero_grad()
        loss_of(each, tokens(0, 1)).backward()
    assert worst(gradients(model), gradients(plain)) == 0.0
    assert registration.stats().steps == 1


def test_gradients_of_the_root_alone():
    """Nothing is met before FSDP's own callback at the end of backward."""
    model, plain = Model(), Model()
    for each in (model, plain):
        each.blocks.requires_grad_(False)
        each.embedding.requires_grad_(False)
    distopt.shard(model, model.blocks)
    for each in (model, plain):
        loss_of(each, tokens(0, 1)).backward()
    assert set(gradients(model)) == {"few"}
    assert worst(gradients(model), gradients(plain)) == 0.0


class Either(nn.Module):
    """One layer, or the sum of two."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(2, 2), nn.Linear(2, 2)

    def forward(self, x, both):
        return self.second(x) + self.first(x) if both else self.second(x)


def test_a_parameter_whose_last_gradient_came_early():
    """It waits for the pass that synchronises, though that one has no gradient of it."""
    model = Either()
    registration = distopt.shard(model, [model.second], reducer=POWER)
    with model.no_sync():
        model(torch.ones(1, 2), True).sum().backward()
    model(torch.ones(1, 2), False).sum().backward()
    assert registration._attachment._partial == set()
    found = {name: gradient.sum().item() for name, gradient in gradients(model).items()}
    assert found == {"first.weight": 4.0, "first.bias": 2.0, "second.weight": 8.0, "second.bias": 4.0}
    assert registration._engine.tally.bytes_uncompressed == 12 * 4


def test_recomputing_changes_nothing_but_the_memory():
    kept = []
    for recompute in (False, True):
        model = Model()
        distopt.shard(model, model.blocks, recompute=recompute)
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, s=saved: (s.append(t.numel()), t)[1], lambda t: t):
            loss = loss_of(model, tokens(0, 0))
        loss.backward()
        kept.append((sum(saved), gradients(model)))
    assert kept[1][0] < kept[0][0] / 2
    assert worst(kept[0][1], kept[1][1]) == 0.0


def tied():
    model = Model()
    model.blocks[1].up.weight = model.blocks[0].up.weight
    return model


def with_a_number():
    model = Model()
    model.temperature = nn.Parameter(torch.tensor(1.0))
    return model


def sharded_model():
    model = Model()
    distopt.shard(model, model.blocks)
    return model


@pytest.mark.parametrize(
    ("error", "make", "units", "options", "message"),
    [
        ("SettingError", Model, "blocks.*", {"reducer": 4}, "reducer is 4, but must be None, or a reducer"),
        ("SettingError", Model, "blocks.*", {"mesh": 2}, "mesh is 'int', but must be None or a DeviceMesh"),
        ("SettingError", Model, "blocks.*", {"recompute": 1}, "recompute is 1, but must be True or False"),
        ("SettingError", Model, "layers.*", {}, "units is 'layers.*', but must be a pattern that matches"),
        ("SettingError", Model, [], {}, "units is .*, but must be something that is not empty"),
        ("SettingError", Model, lambda m: [m.blocks[0], m.blocks[0].up], {}, "units is 'blocks.0.up', but must be out"),
        ("SettingError", Model, [nn.Linear(2, 2)], {}, "units is '0', but must be inside of the model"),
        (
            "SettingError",
            Model,
            lambda m: [("all", m.blocks)],
            {},
            "units is 'all', but must be what is called in forw",
        ),
        ("SettingError", tied, "blocks.*", {}, "blocks.1.up.weight', but must be in the same unit as blocks.0.up"),
        ("RegistrationError", with_a_number, "blocks.*", {}, "'temperature' has no dimension to cut it along"),
        ("RegistrationError", sharded_model, "blocks.*", {}, "is sharded already"),
        ("RegistrationError", lambda: DDP(nn.Linear(2, 2)), "*", {}, "without a wrapper, but was given Distributed"),
        ("RegistrationError", lambda: nn.Linear(2, 2, device="meta"), "*", {}, "'weight' is on the meta device"),
        ("RegistrationError", lambda: nn.Sequential(nn.Tanh()), "*", {}, "no parameter"),
    ],
)
def test_what_cannot_work_is_refused_in_one_line(error, make, units, options, message):
    model = make()
    with pytest.raises(getattr(distopt, error), match=message) as caught:
        distopt.shard(model, units, **options)
    assert "\n" not in str(caught.value)


def test_three_dimensions_are_refused():
    with pytest.raises(distopt.SettingError, match="mesh is"):
        distopt.shard(Model(), "blocks.*", mesh=init_device_mesh("cpu", (1, 1, 1)))


def test_a_mesh_needs_no_names():
    model = Model()
    distopt.shard(model, "blocks.*", mesh=init_device_mesh("cpu", (1, 1)), reducer=POWER)
    train(model, 0, 1)
