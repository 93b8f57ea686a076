"""What `Periodic` refuses, and with which words; mostly in a world of one rank."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP

import distopt
from distopt.attach.periodic import Periodic
from distopt.errors import RegistrationError, SettingError, StateError
from tests.attach.test_periodic import WIDTH, backward, equal, small
from tests.processes import run_ranks


@pytest.mark.parametrize("every", [0, -1, 1.5, True, "2", None])
def test_every_is_checked(every):
    model = small(0)
    with pytest.raises(SettingError, match=r"Periodic\.every"):
        Periodic(model, torch.optim.SGD(model.parameters()), every=every)


def test_outer_is_checked():
    model = small(0)
    optimizer = torch.optim.SGD(model.parameters())
    with pytest.raises(SettingError, match=r"Periodic\.outer is SGD"):
        Periodic(model, optimizer, every=1, outer=optimizer)


@pytest.mark.usefixtures("alone")
def test_an_interval_that_is_none_is_refused_by_name():
    model = small(0)
    with pytest.raises(SettingError, match=r"Periodic\.every\(0\) is 0"):
        Periodic(model, torch.optim.SGD(model.parameters()), every=lambda step: step)


def lazy():
    return nn.LazyLinear(3)


def frozen():
    return small(0).requires_grad_(False)


def infinite():
    model = small(0)
    nn.init.constant_(model[0].bias, float("inf"))
    return model


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DDP(small(0)), "DistributedDataParallel averages gradients"),
        (lambda: nn.Sequential(DDP(small(0))), "DistributedDataParallel averages gradients"),
        (lambda: nn.Linear(2, 2, device="meta"), "'weight' has no values yet"),
        (lazy, "'weight' has no values yet"),
        (frozen, "no trainable parameter"),
        (infinite, r"'0\.bias' is not finite"),
        (lambda: [1], "Module, but was given list"),
    ],
)
def test_models_that_do_not_fit_are_refused(make, message):
    model = make()
    optimizer = torch.optim.SGD(model.parameters() if isinstance(model, nn.Module) else small(0).parameters())
    with pytest.raises(RegistrationError, match=message):
        Periodic(model, optimizer, every=1)


@pytest.mark.usefixtures("alone")
def test_optimizers_that_do_not_fit_are_refused():
    with pytest.raises(RegistrationError, match=r"Optimizer, but was given NoneType"):
        Periodic(small(0), None, every=1)
    with pytest.raises(RegistrationError, match="no trainable parameter of the model"):
        Periodic(small(0), torch.optim.SGD(small(0).parameters()), every=1)


def test_without_a_world_it_is_refused():
    model = small(0)
    with pytest.raises(RegistrationError, match="not initialised"):
        Periodic(model, torch.optim.SGD(model.parameters()), every=1)


@pytest.mark.usefixtures("alone")
def test_one_at_a_time_and_none_after_removal():
    model = small(0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    periodic = Periodic(model, optimizer, every=1)
    with pytest.raises(RegistrationError, match="already"):
        Periodic(model, optimizer, every=1)
    periodic.remove()
    backward(model, 0, 0)
    optimizer.step()
    assert periodic.stats().steps == 0
    Periodic(model, optimizer, every=1)
    assert copy.deepcopy(model) is not model


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda model: model[2].requires_grad_(True), r"'2\.weight' was frozen or absent"),
        (lambda model: model.float(), r"'0\.weight' was torch\.float64 of \(6, 6\) .* and is torch\.float32"),
        (lambda model: model.__setitem__(0, nn.Identity()), r"'0\.weight' was .* and is gone"),
    ],
)
def test_a_model_that_changed_is_refused_by_name(change, message):
    model = small(0)
    model[2].requires_grad_(False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    periodic = Periodic(model, optimizer, every=2)
    change(model)
    periodic.step()
    with pytest.raises(RegistrationError, match=message):
        periodic.step()


@pytest.mark.usefixtures("alone")
def test_states_of_others_are_refused():
    model = small(0)
    periodic = Periodic(model, torch.optim.SGD(model.parameters()), every=2)
    state = periodic.state_dict()
    other = nn.Linear(WIDTH, WIDTH)
    stranger = Periodic(other, torch.optim.SGD(other.parameters()), every=2).state_dict()
    for bad, message in [
        ({}, "not the state of a Periodic: format"),
        (state | {"format": 0}, "format is 0, but must be 1"),
        (stranger, r"'0\.bias' is not kept there, torch\.float64 of \(6,\) here"),
    ]:
        with pytest.raises(StateError, match=message):
            periodic.load_state_dict(bad)
    assert equal(periodic.state_dict()["global"], state["global"])


@pytest.mark.usefixtures("alone")
def test_names_are_those_of_the_plain_model():
    model = small(0)
    compiled = torch.compile(model)
    periodic = Periodic(compiled, torch.optim.SGD(model.parameters()), every=2)
    assert periodic.state_dict()["global"].keys() == dict(model.named_parameters()).keys()


def disagree_job(rank):
    model = nn.Linear(4, 4)
    with pytest.raises(distopt.AgreementError) as caught:
        Periodic(model, torch.optim.SGD(model.parameters(), lr=0.1), every=5 if rank == 1 else 4)
    return str(caught.value)


def test_ranks_that_were_given_different_settings_are_told():
    for message in run_ranks(3, disagree_job):
        assert "rank 1 has 5" in message
        assert "'every'" in message
