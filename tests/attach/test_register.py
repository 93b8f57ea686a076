"""Registering where it cannot work: one clear line each, and nothing done."""

import math
import re
from datetime import timedelta

import pytest
import torch
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel as DDP

import distopt


def test_before_init_process_group():
    with pytest.raises(
        distopt.RegistrationError, match=r"torch\.distributed is not initialised: call init_process_group"
    ):
        distopt.register(nn.Linear(2, 2), distopt.AllReduce())


@pytest.mark.usefixtures("alone")
def test_a_model_that_is_not_ddp():
    with pytest.raises(distopt.RegistrationError, match="needs a DistributedDataParallel model, but was given Linear"):
        distopt.register(nn.Linear(2, 2), distopt.AllReduce())


@pytest.mark.usefixtures("alone")
def test_a_group_of_somebody_else():
    group = torch.distributed.ProcessGroup(0, 1)
    with pytest.raises(
        distopt.RegistrationError, match=r"does not know the ProcessGroup to average over: make it by new"
    ):
        distopt.register(nn.Linear(2, 2).named_parameters(), distopt.AllReduce(), process_group=group)


@pytest.mark.usefixtures("alone")
def test_something_that_is_no_reducer():
    for wrong in (4, "powersgd", distopt.PowerSGD):
        with pytest.raises(distopt.SettingError, match=r"reducer is .*, but must be a reducer such as"):
            distopt.register(DDP(nn.Linear(2, 2)), wrong)


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize(
    ("field", "values", "allowed"),
    [
        ("check_replicas_every", ("x", 1.5, True, None, -1), "an integer of at least 0"),
        ("measure_every", ("x", 0.5, -1), "an integer of at least 0"),
        ("residual_bound", ("x", math.nan, 0), "a number above 0"),
        ("agreement", ("no", None), "True or False"),
        ("grad_scaler", (3, 65536.0), "None or what has get_scale"),
        ("timeout", (5, timedelta(0), timedelta(seconds=-1)), "None or a datetime.timedelta above 0"),
    ],
)
def test_settings_are_refused_by_name_and_nothing_is_done(field, values, allowed):
    model = DDP(nn.Linear(2, 2))
    for value in values:
        with pytest.raises(distopt.SettingError, match=f"^{field} is {re.escape(repr(value))}, but must be {allowed}"):
            distopt.register(model, distopt.AllReduce(), **{field: value})
    distopt.register(model, distopt.AllReduce())


@pytest.mark.usefixtures("alone")
def test_registering_twice():
    model = DDP(nn.Linear(2, 2))
    first = distopt.register(model, distopt.PowerSGD(rank=1))
    with pytest.raises(distopt.RegistrationError, match=r"registered already, with PowerSGD\(rank=1"):
        distopt.register(model, distopt.AllReduce())
    model(torch.ones(1, 2)).sum().backward()
    assert first.stats().steps == 1


@pytest.mark.usefixtures("alone")
def test_after_another_hook():
    model = DDP(nn.Linear(2, 2))
    model.register_comm_hook(None, allreduce_hook)
    with pytest.raises(distopt.RegistrationError, match="has a communication hook already"):
        distopt.register(model, distopt.AllReduce())
    assert len(model._comm_hooks) == 1


@pytest.mark.usefixtures("alone")
def test_sparse_gradients_are_refused_by_name():
    model = DDP(nn.ModuleDict({"words": nn.Embedding(9, 4, sparse=True)}))
    with pytest.raises(distopt.RegistrationError, match=r"words\.weight has sparse gradients"):
        distopt.register(model, distopt.AllReduce())


@pytest.mark.usefixtures("alone")
def test_an_impossible_rank_fails_before_training():
    model = DDP(nn.Linear(40, 40))
    with pytest.raises(distopt.SettingError, match=r"PowerSGD.rank\('weight'\) is -1"):
        distopt.register(model, distopt.PowerSGD(rank=lambda name, parameter: -1))
    distopt.register(model, distopt.AllReduce())


@pytest.mark.usefixtures("alone")
def test_complex_gradients_are_averaged_whole():
    model = nn.Linear(8, 8).to(torch.complex64)
    ddp = DDP(model)
    registration = distopt.register(ddp, distopt.PowerSGD(rank=1))
    x = torch.randn(3, 8, dtype=torch.complex64)
    ddp(x).abs().square().sum().backward()
    expected = torch.autograd.grad(model(x).abs().square().sum(), model.weight)[0]
    assert torch.equal(model.weight.grad, expected)
    assert registration.stats().saving == 0


@pytest.mark.usefixtures("alone")
def test_names_are_the_models_own():
    """Neither DDP's prefix nor torch.compile's shows in what is saved."""
    model = DDP(torch.compile(nn.Sequential(nn.Linear(40, 40)), backend="eager"))
    registration = distopt.register(model, distopt.PowerSGD(rank=2))
    model(torch.randn(2, 40)).sum().backward()
    assert list(registration.stats().residual_norm) == ["0.weight"]


@pytest.mark.usefixtures("alone")
def test_a_registration_describes_itself():
    registration = distopt.register(DDP(nn.Linear(2, 2)), distopt.AllReduce())
    assert repr(registration) == "Registration(AllReduce(), world_size=1, steps=0)"
    assert registration.stats().saving == registration.stats().matrix_saving == 0.0
