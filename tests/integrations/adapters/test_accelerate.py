"""Accelerate's real Accelerator with two ranks: the bits of DDP with `distopt.register`, and its checkpoints."""

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from distopt.integrations.accelerate import attach
from distopt.integrations.late import LateRegistration
from torch.utils.data import DataLoader

import distopt
from distopt.errors import RegistrationError, StateError
from tests.integrations.adapters.plain import (
    REDUCER,
    Net,
    as_torchrun,
    batches,
    loss_of,
    optimizer_of,
    same,
    train,
    values,
)
from tests.processes import run_ranks

pytestmark = pytest.mark.timeout(300)
"""Two processes load accelerate, on a machine that may have two cores."""


def looped(rank, *, steps, accumulate=1, save_at=None, resume=None, folder=None, fp16=False, reducer=REDUCER):
    """Accelerate's own loop: the parameters in the end, and the hook."""
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=accumulate)
    if fp16:
        accelerator.scaler = torch.amp.GradScaler("cpu")  # which Accelerate makes for GPUs only
    net = Net()
    model, optimizer = accelerator.prepare(net, optimizer_of(net))
    hook = attach(accelerator, model, reducer) if reducer else None
    if resume is not None:
        accelerator.load_state(folder)
    for index, batch in enumerate(batches(rank, steps * accumulate)):
        if resume is not None and index < resume * accumulate:
            continue
        with accelerator.accumulate(model), torch.autocast("cpu", torch.float16, enabled=fp16):
            accelerator.backward(loss_of(model, batch))
            optimizer.step()
            optimizer.zero_grad()
        if save_at is not None and index + 1 == save_at * accumulate:
            accelerator.save_state(folder)
    return values(net), hook


def job(rank, folder):
    as_torchrun(rank)
    found = {}
    expected, stats = train(rank, steps=5, accumulate=2, save_every=3)
    ended, hook = looped(rank, steps=5, accumulate=2, save_at=3, folder=folder)
    found["bits"] = same(ended, expected) and hook.stats() == stats
    found["steps"], found["saving"] = hook.stats().steps, hook.stats().saving
    ended, hook = looped(rank, steps=5, accumulate=2, resume=3, folder=folder)
    found["resumed"] = same(ended, expected) and hook.stats() == stats
    alone, _ = looped(rank, steps=5, accumulate=2, reducer=None)
    found["ddp alone"] = same(alone, train(rank, steps=5, accumulate=2, reducer=None)[0])
    found["compressed"] = not same(alone, expected)

    ended, hook = looped(rank, steps=4, fp16=True)
    expected, stats = train(rank, steps=4, fp16=True)
    found["fp16"] = same(ended, expected) and hook.stats() == stats

    accelerator = Accelerator(cpu=True)
    with pytest.raises(RegistrationError, match=r"not Net: attach to what accelerator.prepare\(model\) returns"):
        attach(accelerator, Net(), REDUCER)
    with pytest.raises(StateError):
        looped(rank, steps=5, accumulate=2, resume=3, folder=folder, reducer=distopt.Sign())
    return found


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    return run_ranks(2, job, str(tmp_path_factory.mktemp("accelerate")), timeout=280)


@pytest.mark.parametrize("law", ["bits", "ddp alone", "compressed", "resumed", "fp16"])
def test_equals_ddp_with_register(found, law):
    assert [rank[law] for rank in found] == [True, True]


def test_was_compressed(found):
    assert [rank["steps"] for rank in found] == [5, 5]
    assert all(rank["saving"] > 0.7 for rank in found)


def test_one_process(tmp_path):
    """Nothing is reduced; a state of several processes waits, and is saved again."""
    first = Accelerator(cpu=True)
    several = LateRegistration(REDUCER, "")
    several.load_state_dict({"step": 3})  # as of two ranks
    first.register_for_checkpointing(several)
    first.save_state(tmp_path / "two")
    second = Accelerator(cpu=True)
    net = Net()
    model, optimizer = second.prepare(net, optimizer_of(net))
    hook = attach(second, model, REDUCER)
    for batch in DataLoader(batches(0, 2), batch_size=None):
        second.backward(loss_of(model, batch))
        optimizer.step()
    assert hook.registration is None
    assert hook.stats().steps == 0
    hook.load_state_dict(torch.load(tmp_path / "two/custom_checkpoint_0.pkl", weights_only=True))
    second.save_state(tmp_path / "one")
    assert torch.load(tmp_path / "one/custom_checkpoint_0.pkl", weights_only=True) == {"step": 3}


@pytest.fixture(autouse=True)
def fresh_state():
    """The Accelerator remembers the first one of a process."""
    yield
    AcceleratorState._reset_state(True)
