"""What becomes of a registered DDP model besides training: it is copied, saved whole, and let go of."""

import copy
import gc
import io
import threading
import weakref

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP

import distopt


def trained(model):
    """The model after a backward pass."""
    model(torch.ones(2, 8)).square().sum().backward()
    return model


def deep_copy(model):
    return copy.deepcopy(model)


def save_and_load(model):
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("copied", [deep_copy, save_and_load])
def test_a_copy_is_a_plain_ddp_model_of_its_own(copied):
    model = DDP(nn.Linear(8, 8))
    model.register_forward_hook(user_hook)
    registration = distopt.register(model, distopt.PowerSGD(rank=1))
    twin = trained(copied(trained(model)))
    assert registration.stats().steps == 1
    assert list(twin._forward_hooks.values()) == [user_hook]
    assert torch.equal(twin.module.weight, model.module.weight)
    second = distopt.register(twin, distopt.AllReduce())
    trained(twin)
    trained(model)
    assert (registration.stats().steps, second.stats().steps) == (2, 1)


def user_hook(model, inputs, output):
    """A hook of the user's."""


@pytest.mark.usefixtures("alone")
def test_a_model_that_nobody_needs_is_freed_with_its_thread():
    earlier = threading.enumerate()
    model = DDP(nn.Linear(8, 8))
    registration = distopt.register(model, distopt.PowerSGD(rank=1))
    trained(model)
    alive = weakref.ref(model.module)
    (worker,) = set(threading.enumerate()) - set(earlier)
    del model, registration
    gc.collect()
    assert alive() is None
    worker.join(5.0)
    assert not worker.is_alive()
