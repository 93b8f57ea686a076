"""The fused AdamW: the plain edition's update, its scales, codes beside its own, one table while nothing moves."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from distopt.errors import DistoptError
from distopt.kernels import adamw
from distopt.optim import AdamW, fused
from distopt.optim.fused import Launches, Work
from distopt.optim.pieces import BLOCK
from distopt.optim.state import MOMENTS, is_reduced, new_state, stored
from distopt.optim.update import Hyper, update_blocks, update_lists
from tests.kernels.compiling import compiled

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
HYPER = Hyper(lr=0.1, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.1, max_variance=None)
SHAPES = [(3, 5), (64, 64), (2, BLOCK + 7)]
all_moments = pytest.mark.parametrize("moments", ["packed16", "bfloat16", "float32"])
SPACING = {torch.int16: 2.0**-9, torch.bfloat16: 2.0**-7, torch.float32: 2.0**-21}


@pytest.fixture
def _kernels(monkeypatch):
    monkeypatch.setattr(fused, "chosen", lambda device: True)


def drawn(shape, generator, dtype=torch.float32, binades=20):
    values = torch.randn(shape, generator=generator) * 2.0 ** (-binades * torch.rand(shape, generator=generator))
    return values.to(DEVICE, dtype)


def works_of(moments, shapes=SHAPES, dtype=torch.float32, gradients=torch.float32, seed=0, step=3.0):
    """Parameters in the middle of training."""
    generator = torch.Generator().manual_seed(seed)
    works = []
    for number, shape in enumerate(shapes):
        parameter = drawn(shape, generator, dtype)
        state = new_state(parameter, moments)
        state["step"] += step
        values = drawn(shape, generator), drawn(shape, generator).square()
        if is_reduced(state):
            for moment, each in zip(stored(state), values, strict=True):
                moment.encode(each)
        else:
            for name, each in zip(MOMENTS, values, strict=True):
                state[name].copy_(each)
        works.append(Work(parameter, drawn(shape, generator, gradients), state, number))
    return works


def plain(hyper, work):
    """A step in torch's operations."""
    step = work.state["step"].item()
    if is_reduced(work.state):
        update_blocks(hyper, work.parameter, work.gradient, stored(work.state), step, (0, work.number))
    else:
        moments = ([work.state[name]] for name in MOMENTS)
        update_lists(hyper, [work.parameter], [work.gradient], *moments, [step])


def values_of(state):
    return [each.decoded() for each in stored(state)] if is_reduced(state) else [state[name] for name in MOMENTS]


def assert_alike(ours, theirs):
    dtype = ours.state["exp_avg"].dtype
    tolerance = {torch.float32: 3e-6, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}[ours.parameter.dtype]
    assert torch.allclose(ours.parameter.float(), theirs.parameter.float(), rtol=tolerance, atol=3e-7)
    for mine, other in zip(values_of(ours.state), values_of(theirs.state), strict=True):
        # A unit in the last place; what nearly cancelled differs by rounding of its terms.
        assert bool(((mine - other).abs() <= SPACING[dtype] * other.abs() + 2.0**-22 * other.abs().max()).all())
    for name in ("exp_avg_scales", "exp_avg_sq_scales"):
        if name in ours.state:
            assert torch.equal(ours.state[name], theirs.state[name])


@all_moments
@settings(max_examples=3)
@given(seed=st.integers(0, 99), weight_decay=st.sampled_from([0.0, 0.1]), clip=st.sampled_from([None, 0.001]))
def test_a_step_is_that_of_the_plain_edition(moments, seed, weight_decay, clip):
    hyper = HYPER._replace(weight_decay=weight_decay, max_variance=clip)
    ours = works_of(moments, seed=seed)
    theirs = copy.deepcopy(ours)
    Launches().step(0, hyper, ours, 0)
    for mine, other in zip(ours, theirs, strict=True):
        plain(hyper, other)
        assert_alike(mine, other)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("gradients", [torch.float32, torch.bfloat16])
def test_parameters_and_gradients_of_16_bits(dtype, gradients):
    ours = works_of("packed16", SHAPES[:1], dtype, gradients)
    theirs = copy.deepcopy(ours)
    Launches().step(0, HYPER, ours, 0)
    plain(HYPER, theirs[0])
    assert_alike(ours[0], theirs[0])


@pytest.mark.parametrize("layout", ["transposed", "gaps", "transposed with gaps", "gradient in another order"])
def test_any_order_of_memory(layout):
    base, other = (torch.randn(4, 6, 8, generator=torch.Generator().manual_seed(seed)).to(DEVICE) for seed in (0, 1))
    change = {
        "transposed": lambda each: each.transpose(0, 1),
        "gaps": lambda each: each[:, ::2],
        "transposed with gaps": lambda each: each.transpose(0, 2)[::2],
        "gradient in another order": lambda each: each,
    }[layout]
    parameter, gradient = change(base), change(other)
    if layout == "gradient in another order":
        gradient = gradient.transpose(0, 1).contiguous().transpose(0, 1)
    results = []
    for launches in (True, False):
        for contiguous in (True, False):
            own = parameter.clone(memory_format=torch.contiguous_format) if contiguous else change(base.clone())
            state = new_state(own, "packed16")
            state["step"] += 1
            work = Work(own, gradient, state, 0)
            _ = Launches().step(0, HYPER, [work], 0) if launches else plain(HYPER, work)
            results.append(own)
    for each in results[1:]:
        assert torch.allclose(results[0], each, rtol=3e-6, atol=3e-7)


@pytest.mark.parametrize("moments", ["packed16", "bfloat16"])
def test_what_is_kept_is_right_on_average(moments):
    """Many equal numbers, each with a draw of its own, beside the moments before rounding."""
    work = works_of(moments, [(64, 128)])[0]
    for values, other in zip(stored(work.state), (0.3, 0.7), strict=True):
        values.encode(torch.full((64, 128), other))
    before = [each[0, 0].item() for each in values_of(work.state)]
    work.gradient.fill_(0.11)
    Launches().step(0, HYPER, [work], 0)
    exact = before[0] * 0.9 + 0.011, before[1] * 0.999 + 0.001 * 0.0121
    for values, right in zip(values_of(work.state), exact, strict=True):
        low, high = values.min().item(), values.max().item()
        assert low <= right <= high
        assert high - low <= 2.0**-6 * right
        assert abs(values.double().mean().item() - right) <= 4 * (high - low) / 2 / 8192**0.5 + 1e-7
    # The draws of one moment tell nothing of the other's.
    up = torch.stack([(values == values.max()).double().flatten() for values in values_of(work.state)])
    assert abs(float(up.corrcoef()[0, 1])) < 0.06


def test_a_power_of_two_has_the_scale_of_what_is_below():
    hyper = HYPER._replace(beta1=0.0, beta2=0.0)
    ours = works_of("packed16", [(3, 5)])[0]
    ours.gradient.clamp_(-1, 1)[0, 0] = 2.0
    theirs = copy.deepcopy(ours)
    Launches().step(0, hyper, [ours], 0)
    plain(hyper, theirs)
    assert_alike(ours, theirs)


def test_seed_step_and_number_decide_the_rounding():
    def codes(seed=0, step=3.0, number=0, place=0):
        works = works_of("packed16", [(64, 64)] * 2, step=step)
        work = works[place]._replace(**works_of("packed16", [(64, 64)], step=step)[0]._asdict())._replace(number=number)
        members = [work] if place == 0 else [works[0], work]
        Launches().step(0, HYPER, members, seed)
        return work.state["exp_avg"]

    first = codes()
    assert torch.equal(first, codes())
    assert torch.equal(first, codes(place=1))  # not where it stands in a launch
    for other in (codes(seed=1), codes(step=4.0), codes(number=1)):
        assert 0.1 < float((first != other).double().mean()) < 0.9


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, 2.0**70])
def test_what_is_not_finite_makes_its_block_not_a_number(bad):
    work = works_of("packed16", [(2, BLOCK)])[0]
    work.gradient[0, 5] = bad
    Launches().step(0, HYPER, [work], 0)
    for values in values_of(work.state):
        assert bool(values[0].isnan().all())
        assert bool(values[1].isfinite().all())


def test_zeros_stay_zeros():
    work = works_of("packed16", [(3, 5)])[0]
    for moment in stored(work.state):
        moment.encode(torch.zeros(3, 5))
    work.gradient.zero_()
    before = work.parameter.clone()
    Launches().step(0, HYPER._replace(weight_decay=0.0), [work], 0)
    assert torch.equal(work.parameter, before)
    assert all(bool((values == 0).all()) for values in values_of(work.state))


def test_a_variance_is_held_above_zero_and_a_mean_is_not():
    work = works_of("packed16", [(3, 5)])[0]
    for moment in stored(work.state):
        moment.encode(torch.zeros(3, 5))
    work.gradient.fill_(1e-18)
    work.gradient[0] = torch.tensor([4.0, 0.0, 1e-30, -1.0, 2.0])
    Launches().step(0, HYPER, [work], 0)
    mean, variance = values_of(work.state)
    assert bool((variance > 0).all())
    assert float(variance.min()) == 2.0**-67  # of the scale's unit, the largest being 0.016
    assert float(mean[0, 1]) == 0.0


def test_memory_that_is_not_aligned_gives_the_same():
    ours = works_of("packed16", [(64, 66)])[0]
    theirs = copy.deepcopy(ours)
    shifted = torch.zeros(64 * 66 + 1, device=DEVICE)[1:].view(64, 66).copy_(ours.gradient)
    launches = Launches()
    launches.step(0, HYPER, [theirs, ours._replace(gradient=shifted)], 0)
    assert len(launches._tables) == 2
    assert torch.equal(ours.parameter, theirs.parameter)
    assert torch.equal(ours.state["exp_avg"], theirs.state["exp_avg"])


def test_the_table_is_written_when_something_has_moved():
    works = works_of("packed16", [(3, 5), (4, 4)])
    launches = Launches()
    copies = []
    for gradient in (works[0].gradient, works[0].gradient, works[0].gradient.clone()):
        works[0] = works[0]._replace(gradient=gradient)
        launches.step(0, HYPER, works, 0)
        (table,) = launches._tables.values()
        copies.append(table.copies)
    assert copies == [3, 3, 4]


def counting(count, moments="packed16", shift=0, **settings):
    """Parameters after some steps, their gradients of every step known beforehand; and the optimizer."""
    generator = torch.Generator().manual_seed(0)
    model = nn.ParameterDict({str(i): nn.Parameter(drawn(shape, generator)) for i, shape in enumerate(SHAPES[:2])})
    optimizer = AdamW(model.named_parameters(), lr=settings.pop("lr", 0.01), moments=moments, **settings)
    for step in range(count):
        for i, parameter in enumerate(model.values()):
            parameter.grad = drawn(parameter.shape, torch.Generator().manual_seed(10 * step + i))
        if step < shift:
            model["1"].grad = None  # so that not all have the same count
        optimizer.step()
    return [parameter.detach() for parameter in model.values()], optimizer


@pytest.mark.usefixtures("_kernels")
@pytest.mark.parametrize("moments", ["packed16", "bfloat16"])
def test_what_counts_on_the_device_computes_the_same(moments):
    """Bit for bit; and a learning rate that is a tensor there is the number that it holds."""
    settings = {"shift": 1, "weight_decay": 0.1, "max_variance": 5.0}
    wanted, known = counting(3, moments, **settings)
    lr = torch.tensor(0.01, dtype=torch.float64, device=DEVICE)
    for rate in (0.01, lr):
        found, optimizer = counting(3, moments, lr=rate, capturable=True, **settings)
        assert all(torch.equal(mine, other) for mine, other in zip(found, wanted, strict=True))
        for mine, other in zip(optimizer.state.values(), known.state.values(), strict=True):
            assert all(torch.equal(mine[name].cpu(), other[name].cpu()) for name in other)
            assert mine["step"].device == DEVICE or DEVICE.type == "cuda"


@pytest.mark.usefixtures("_kernels")
def test_a_step_that_is_held_changes_nothing():
    found, optimizer = counting(2, capturable=True, lr=0.3)
    kept = [*found, *(tensor for state in optimizer.state.values() for tensor in state.values())]
    before = [each.clone() for each in kept]
    optimizer.found_inf, optimizer.grad_scale = torch.ones((), device=DEVICE), None
    optimizer.step()
    assert all(torch.equal(mine, other) for mine, other in zip(kept, before, strict=True))
    optimizer.found_inf.zero_()
    optimizer.step()
    assert [float(state["step"]) for state in optimizer.state.values()] == [3.0, 3.0]
    assert not torch.equal(found[0], before[0])


@pytest.mark.usefixtures("_kernels")
def test_states_are_exchanged_with_those_that_the_host_counts():
    wanted, _ = counting(3)
    for first, second in ((True, False), (False, True)):
        found, optimizer = counting(2, capturable=first)
        other = AdamW(zip("01", map(nn.Parameter, found), strict=True), lr=0.01, moments="packed16", capturable=second)
        other.load_state_dict(optimizer.state_dict())
        assert other.param_groups[0]["capturable"] == second
        for i, parameter in enumerate(other.param_groups[0]["params"]):
            parameter.grad = drawn(parameter.shape, torch.Generator().manual_seed(20 + i))
            assert parameter.data_ptr() == found[i].data_ptr()
        other.step()
        assert all(torch.equal(mine, theirs) for mine, theirs in zip(found, wanted, strict=True))


def test_a_captured_table_is_apart(monkeypatch):
    """What a graph would write is known from its own operations, and a step beside it neither sees nor changes it."""
    works = works_of("packed16", SHAPES, step=0.0)
    launches = Launches()
    launches.step(0, HYPER, works, 0, counted=True)
    (table,) = launches._tables.values()
    members = [fused._member(work) for work in works]
    plain_table, *owners = table.refreshed(members)
    copies = table.copies
    monkeypatch.setattr(adamw, "_captures", lambda: True)
    own, *same_owners = table.refreshed(members)
    assert own is not plain_table
    assert torch.equal(own, plain_table)
    assert all(one is other for one, other in zip(owners, same_owners, strict=True))
    assert table.copies == copies
    with pytest.raises(DistoptError, match="take a step with the same parameters before it is captured"):
        table.refreshed(members[:1])
    monkeypatch.undo()
    assert table.refreshed(members)[0] is plain_table


@pytest.mark.skipif(DEVICE.type == "cuda", reason="on a CPU the plain edition counts as well")
def test_without_kernels_a_cpu_counts_for_itself():
    wanted, _ = counting(2)
    found, _ = counting(2, capturable=True)
    assert all(torch.equal(mine, other) for mine, other in zip(found, wanted, strict=True))


@pytest.mark.usefixtures("_kernels")
@pytest.mark.parametrize("moments", ["packed16", "bfloat16"])
def test_the_optimizer_trains_alike(moments, monkeypatch):
    """With exempt parameters, a copy on the way, and parameters that join later."""

    def trained():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 40), nn.Tanh(), nn.Linear(40, 3)).to(DEVICE)
        optimizer = AdamW(model.named_parameters(), lr=1e-2, moments=moments, max_variance=5)
        inputs, targets = torch.randn(32, 6).to(DEVICE), torch.randn(32, 3).to(DEVICE)
        losses = []
        for step in range(12):
            optimizer.zero_grad()
            loss = (model(inputs) - targets).square().mean()
            loss.backward()
            if step < 3:
                model[2].bias.grad = None
            optimizer.step()
            losses.append(float(loss.detach()))
        return losses, model, optimizer

    losses, model, optimizer = trained()
    again = trained()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again[1].parameters(), strict=True))
    assert len(optimizer._launches._tables) > 0
    copied = copy.deepcopy(optimizer)
    assert copied._launches is not optimizer._launches
    monkeypatch.setattr(fused, "chosen", lambda device: False)
    assert losses == pytest.approx(trained()[0], rel=0.02)


def launches():
    """The sizes, dtypes and settings that real models have; whole blocks, and the last ones of tensors."""
    wide, narrow = torch.float32, torch.bfloat16
    kinds = [("packed16", wide), ("packed16", narrow), ("bfloat16", wide), ("float32", wide)]
    for moments, dtype in kinds:
        works = []
        for number, shape in enumerate([(1024, 1024), (50257, 65)]):
            parameter = torch.empty(shape, dtype=dtype)
            state = new_state(parameter, moments)
            state["step"] += 1
            works.append(Work(parameter, torch.empty(shape, dtype=dtype), state, number))
        Launches().step(0, HYPER._replace(max_variance=5.0), works, 0)
    Launches().step(0, HYPER._replace(max_variance=5.0), works, 0, counted=True, held=torch.zeros(()))


@pytest.mark.parametrize("capability", [80, 90])
def test_it_compiles_for_gpus(capability):
    kernels = compiled("tests.kernels.test_adamw", capability)
    assert len(kernels) == 10
    assert all(each.spilled == 0 and each.shared <= 64 * 1024 for each in kernels)
    # Of whole blocks, at least two programs have room among 65536 registers: one loads while another computes.
    assert sum(each.registers * each.warps * 32 <= 32_768 for each in kernels) >= 4


def test_blocks_are_those_of_the_scales():
    assert adamw.BLOCK == BLOCK
