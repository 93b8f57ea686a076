"""The state: torch's layout, both ways; resuming to the bit; refusals; torch.distributed.checkpoint's view of it."""

import copy

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

from distopt.errors import StateError
from distopt.optim import AdamW
from tests.optim.test_adamw import all_kinds, network, same, sixteen_bits, train


def at(model, steps, **settings):
    """An optimizer after some steps."""
    optimizer = AdamW(model.named_parameters(), **{"lr": 1e-2, **settings})
    train(model, optimizer, steps)
    return optimizer


def noisy(model, optimizer, steps, first):
    """Steps with gradients that are drawn, so that any dtype will do."""
    for step in range(first, first + steps):
        for parameter in model.parameters():
            g = torch.Generator().manual_seed(step)
            parameter.grad = torch.randn(parameter.shape, generator=g).to(parameter.dtype)
        optimizer.step()


@all_kinds
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("by_file", [True, False], ids=["file", "dict"])
def test_resuming_is_exact(moments, dtype, by_file, tmp_path):
    """Saved in the middle, loaded by a new optimizer, and 20 more steps: the same bits."""
    model = network(dtype=dtype)
    optimizer = AdamW(model.parameters(), moments=moments, betas=(0.9, 0.96), max_variance=5, seed=3)
    noisy(model, optimizer, 7, 0)
    resumed, state = copy.deepcopy(model), optimizer.state_dict()
    if by_file:
        torch.save(state, tmp_path / "state.pt")
        state = torch.load(tmp_path / "state.pt", weights_only=True)
    else:
        state = copy.deepcopy(state)
    again = AdamW(resumed.parameters(), moments=moments, betas=(0.9, 0.96), max_variance=5, seed=3)
    again.load_state_dict(state)
    for each, its in ((model, optimizer), (resumed, again)):
        noisy(each, its, 20, 7)
    assert same(model, resumed)


@all_kinds
def test_the_layout_is_torchs(moments):
    model = network()
    ours, theirs = at(model, 2, moments=moments), torch.optim.AdamW(model.named_parameters(), lr=1e-2)
    train(model, theirs, 2)
    here, there = ours.state_dict(), theirs.state_dict()
    assert here["param_groups"] == there["param_groups"]
    assert here["state"].keys() == there["state"].keys()
    for index, state in there["state"].items():
        for name, value in state.items():
            mine = here["state"][index][name]
            assert (mine.dtype, mine.shape, mine.device) == (value.dtype, value.shape, value.device)
            assert mine.stride() == value.stride()


@all_kinds
def test_torch_goes_on_from_ours_and_we_from_torchs(moments):
    model = network()
    ours = at(model, 10, moments=moments)
    twin = copy.deepcopy(model)
    theirs = torch.optim.AdamW(twin.parameters(), lr=5.0, foreach=True)
    theirs.load_state_dict(copy.deepcopy(ours.state_dict()))  # torch keeps what it is given
    if moments == "float32":
        train(model, ours, 5)
        train(twin, theirs, 5)
        assert same(model, twin)
    back = AdamW(twin.parameters(), lr=7.0, moments=moments, max_variance=5)
    back.load_state_dict(theirs.state_dict())
    assert back.param_groups[0]["lr"] == 1e-2
    assert (back.param_groups[0]["moments"], back.param_groups[0]["max_variance"]) == (moments, 5)
    for index, state in theirs.state_dict()["state"].items():
        for name, value in back.state_dict()["state"][index].items():
            assert torch.equal(value, state[name])
    train(twin, back, 5)


@pytest.mark.parametrize("flavour", ["fused", "capturable"])
@sixteen_bits
def test_other_flavours_of_torchs_state(flavour, moments):
    """Their steps may be on a device, and their groups say so."""
    model = network()
    theirs = torch.optim.AdamW(model.parameters(), **({"fused": True} if flavour == "fused" else {}))
    train(model, theirs, 2)
    state = theirs.state_dict()
    state["param_groups"][0][flavour] = True
    ours = AdamW(model.parameters(), moments=moments)
    ours.load_state_dict(state)
    assert not ours.param_groups[0][flavour]
    train(model, ours, 1)
    assert float(ours.state_dict()["state"][0]["step"]) == 3


def test_what_a_state_holds_besides_survives():
    model = network()
    optimizer = at(model, 1, moments="packed16")
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer)
    again = AdamW(model.named_parameters(), moments="packed16")
    again.load_state_dict(optimizer.state_dict())
    assert again.param_groups[0]["initial_lr"] == scheduler.base_lrs[0]
    assert again.param_groups[0]["param_names"] == [name for name, _ in model.named_parameters()]


def test_the_moments_of_16_bit_parameters_are_saved_in_full():
    model = network(dtype=torch.float16)
    optimizer = AdamW(model.parameters())
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 2.0**-14)
    optimizer.step()
    again = AdamW(model.parameters())
    again.load_state_dict(optimizer.state_dict())
    variance = again.state_dict()["state"][0]["exp_avg_sq"]
    assert variance.dtype == torch.float32
    assert float(variance[0, 0]) == pytest.approx(0.001 * 2.0**-28)


def test_a_change_of_kind_keeps_the_moments():
    model = network()
    optimizer = at(model, 5, moments="packed16")
    wide = AdamW(model.parameters())
    wide.load_state_dict(optimizer.state_dict())
    state = wide.state_dict()["state"][0]
    assert torch.equal(state["exp_avg"], optimizer.state_dict()["state"][0]["exp_avg"])
    narrow = AdamW(model.parameters(), moments="bfloat16")
    narrow.load_state_dict(wide.state_dict())
    assert torch.allclose(narrow.state_dict()["state"][0]["exp_avg"], state["exp_avg"], rtol=2.0**-8)


def test_hooks_see_the_decoded_state():
    model = network()
    optimizer = at(model, 2, moments="packed16")
    seen = []
    optimizer.register_state_dict_post_hook(lambda _, state: seen.append(state["state"][0]["exp_avg"].dtype))
    optimizer.register_load_state_dict_pre_hook(lambda _, state: seen.append(state["state"][0]["exp_avg"].dtype))
    optimizer.load_state_dict(optimizer.state_dict())
    assert seen == [torch.float32, torch.float32]


@all_kinds
def test_the_distributed_checkpoint_of_torch(moments):
    model = network()
    optimizer = at(model, 3, moments=moments)
    state = get_optimizer_state_dict(model, optimizer)
    assert sorted(state["state"]["0.weight"]) == ["exp_avg", "exp_avg_sq", "step"]
    twin = copy.deepcopy(model)
    again = AdamW(twin.named_parameters(), moments=moments)
    set_optimizer_state_dict(twin, again, copy.deepcopy(state))
    train(model, optimizer, 5)
    train(twin, again, 5)
    assert same(model, twin)


@all_kinds
def test_what_was_loaded_is_not_changed_by_further_steps(moments):
    model = network()
    state = copy.deepcopy(at(model, 2, moments=moments).state_dict())
    before = copy.deepcopy(state)
    again = AdamW(model.parameters(), moments=moments)
    again.load_state_dict(state)
    train(model, again, 2)
    for index, values in before["state"].items():
        assert all(torch.equal(value, state["state"][index][name]) for name, value in values.items())


def test_refusals_leave_the_optimizer_as_it_was():
    model = network()
    optimizer = at(model, 2, moments="packed16")
    before = copy.deepcopy(optimizer.state_dict())

    def changed(change):
        state = copy.deepcopy(before)
        change(state)
        return state

    sgd = torch.optim.SGD(model.parameters(), momentum=0.9)
    train(model, sgd, 1)
    cases = {
        "amsgrad=True": changed(lambda s: s["param_groups"][0].update(amsgrad=True)),
        "maximize=True": changed(lambda s: s["param_groups"][0].update(maximize=True)),
        "not of AdamW: it holds momentum_buffer": sgd.state_dict(),
        r"exp_avg of parameter 0 has the shape \(2, 2\)": changed(
            lambda s: s["state"][0].update(exp_avg=torch.zeros(2, 2))
        ),
    }
    for message, state in cases.items():
        with pytest.raises(StateError, match=message):
            optimizer.load_state_dict(state)
        kept = optimizer.state_dict()
        assert kept["param_groups"] == before["param_groups"]
        for index, values in before["state"].items():
            assert all(torch.equal(value, kept["state"][index][name]) for name, value in values.items())
    with pytest.raises(ValueError, match="different number of parameter groups"):
        optimizer.load_state_dict({**before, "param_groups": before["param_groups"] * 2})


def test_an_optimizer_without_steps():
    parameter = nn.Parameter(torch.ones(3, 3))
    optimizer = AdamW([parameter], moments="packed16")
    state = optimizer.state_dict()
    assert state["state"] == {}
    optimizer.load_state_dict(state)
