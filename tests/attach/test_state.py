"""What is resumed is what was stopped: to the bit at the same world size, up to rounding at another."""

import copy
import io

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP

import distopt
from distopt.errors import StateError
from tests.attach.models import batch, gradients, mlp, parameters, same, wrap
from tests.processes import run_ranks

REDUCER = distopt.PowerSGD(rank=2)
TOTAL = 8


def step_on(model, optimizer, rank, step, dtype, world_of_data=None):
    """One step; with ``world_of_data`` the global batch is the same however many ranks share it."""
    if world_of_data is None:
        loss = model(batch(rank, step, dtype=dtype)).square().mean()
    else:
        share = world_of_data // dist.get_world_size()
        rows = torch.cat([batch(rank * share + i, step, dtype=dtype) for i in range(share)])
        loss = model(rows).square().mean()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def begin(bucket_kib, dtype, options, reducer=REDUCER):
    model = wrap(mlp(dtype=dtype), bucket_kib, **options)
    return model, distopt.register(model, reducer), torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)


def save_job(rank, save_at, bucket_kib, dtype, options, world_of_data=None, reducer=REDUCER):
    """Train to the end, saving on the way; what was saved, as bytes, and how it ended."""
    model, registration, optimizer = begin(bucket_kib, dtype, options, reducer)
    saved = None
    for step in range(TOTAL):
        if step == save_at:
            state = {
                "model": model.module.state_dict(),
                "optimizer": optimizer.state_dict(),
                "hook": registration.state_dict(),
            }
            buffer = io.BytesIO()
            torch.save(state, buffer)
            saved = buffer.getvalue()
        step_on(model, optimizer, rank, step, dtype, world_of_data)
    return saved, parameters(model), registration.state_dict()["residuals"], registration.stats()


def resume_job(rank, saved, save_at, bucket_kib, dtype, options, world_of_data=None, reducer=REDUCER):
    state = torch.load(io.BytesIO(saved), weights_only=True)
    model, registration, optimizer = begin(bucket_kib, dtype, options, reducer)
    model.module.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    registration.load_state_dict(state["hook"])
    for step in range(save_at, TOTAL):
        step_on(model, optimizer, rank, step, dtype, world_of_data)
    return parameters(model), registration.state_dict()["residuals"], registration.stats()


@pytest.mark.parametrize(
    ("world", "save_at", "options"),
    [
        *((world, save_at, {}) for world in (1, 2, 3, 4) for save_at in (0, 1, 4)),
        *((3, save_at, {"static_graph": True}) for save_at in (1, 2, 3)),
        (3, 1, {"find_unused_parameters": True}),
    ],
    ids=str,
)
def test_a_new_process_goes_on_bit_for_bit(world, save_at, options):
    ended = run_ranks(world, save_job, save_at, 12, torch.float32, options)
    resumed = run_ranks(world, resume_job, ended[0][0], save_at, 12, torch.float32, options)
    for (_, expected, residuals, _), (found, found_residuals, stats) in zip(ended, resumed, strict=True):
        assert same(expected, found)
        assert same(residuals, found_residuals)
        assert stats.steps == TOTAL


OTHERS = [
    distopt.AllReduce(),
    distopt.PowerSGD(rank=2, basis="fixed"),
    distopt.PowerSGD(rank=2, passes="alternate"),
    distopt.PowerSGD(rank=2, residual_dtype="1-6-9", factor_dtype="1-6-9"),
    distopt.PowerSGD(rank=2, residual_dtype=torch.bfloat16, wire_dtype=torch.bfloat16),
    distopt.PowerSGD(rank={0: 3, 5: 2}, start_step=2),
    distopt.PowerSGD(rank=distopt.EnergyRank(0.9, most=8)),
    distopt.TopK(0.1),
    distopt.RandomK(0.1),
    distopt.Quantize(8),
    distopt.Sign(),
    distopt.ByName({"0.*": distopt.Cast(torch.bfloat16)}, default=distopt.PowerSGD(rank=2)),
]
OVER_NODES = [
    distopt.Hierarchical(distopt.AllReduce(), outer, ranks_per_node=2)
    for outer in (distopt.PowerSGD(rank=2), distopt.TopK(0.1))
]


@pytest.mark.parametrize(
    ("world", "reducer"), [*((2, r) for r in OTHERS), *((4, r) for r in OVER_NODES)], ids=lambda value: repr(value)[:60]
)
def test_every_reducer_goes_on_bit_for_bit(world, reducer):
    """Figures go on too; where ranks send different parts, from the mean of all."""
    job = (4, 12, torch.float32, {}, None, reducer)
    ended = run_ranks(world, save_job, *job)
    resumed = run_ranks(world, resume_job, ended[0][0], *job)
    for (_, expected, residuals, before), (found, found_residuals, after) in zip(ended, resumed, strict=True):
        assert same(expected, found)
        assert same(residuals, found_residuals)
        assert (after.steps, after.bytes_uncompressed) == (before.steps, before.bytes_uncompressed)
        if world == 2:
            assert (after.bytes_sent, after.matrix_bytes_sent) == (before.bytes_sent, before.matrix_bytes_sent)
        assert after.residual_norm == before.residual_norm


def test_other_buckets_after_resuming_change_nothing_on_two_ranks():
    ended = run_ranks(2, save_job, 4, 12, torch.float32, {})
    resumed = run_ranks(2, resume_job, ended[0][0], 4, 40, torch.float32, {})
    assert same(ended[0][1], resumed[0][0])


@pytest.mark.parametrize(("before", "after"), [(4, 1), (1, 4), (4, 2), (2, 4)])
def test_another_world_size_goes_on_up_to_rounding(before, after):
    """PowerSGD amplifies rounding, so few steps, and in float64."""
    ended = run_ranks(before, save_job, 4, 12, torch.float64, {}, 4)
    resumed = run_ranks(after, resume_job, ended[0][0], 4, 12, torch.float64, {}, 4)
    for name, expected in ended[0][1].items():
        assert torch.allclose(resumed[0][0][name], expected, rtol=0, atol=1e-12), name


def same_job(rank):
    model, registration, optimizer = begin(12, torch.float32, {})
    for step in range(3):
        step_on(model, optimizer, rank, step, torch.float32)
    own = copy.deepcopy(registration._engine.state.residuals)
    state = registration.state_dict()
    live = registration._engine.state.residuals
    return (
        own,
        state,
        same(live, state["residuals"]),
        any(live[n].data_ptr() == t.data_ptr() for n, t in state["residuals"].items()),
    )


def test_state_dict_is_the_same_on_all_ranks_and_holds_the_mean():
    (own0, state0, live0, shared0), (own1, state1, live1, _) = run_ranks(2, same_job)
    assert live0
    assert live1
    assert not shared0
    assert same(state0["residuals"], state1["residuals"])
    assert same(state0["factors"], state1["factors"])
    assert not same(own0, own1)
    assert all(torch.equal(state0["residuals"][n], own0[n] * 0.5 + own1[n] * 0.5) for n in own0)


@pytest.mark.usefixtures("alone")
def test_another_kind_of_reducer_is_refused_unless_a_fresh_start_is_allowed():
    model = DDP(mlp(2))
    registration = distopt.register(model, REDUCER)
    model(batch(0, 0)).square().mean().backward()
    state = registration.state_dict()
    other = distopt.register(DDP(mlp(2)), distopt.TopK(0.1))
    message = r"the state is of the reducer PowerSGD\(rank=2\), but TopK\(fraction=0.1\) is registered"
    with pytest.raises(distopt.StateError, match=message):
        other.load_state_dict(state)
    with pytest.warns(UserWarning, match="residuals and factors begin anew: " + message):
        other.load_state_dict(state, allow_fresh=True)
    assert (other.stats().steps, other.stats().residual_norm) == (0, {})


@pytest.mark.usefixtures("alone")
def test_a_foreign_state_is_refused_and_nothing_changes():
    model = DDP(mlp(2))
    registration = distopt.register(model, REDUCER)
    model(batch(0, 0)).square().mean().backward()
    good = registration.state_dict()
    other = DDP(nn.Linear(48, 20))
    theirs = distopt.register(other, REDUCER)
    with pytest.raises(distopt.StateError, match=r"it has '.*', which this one has not"):
        theirs.load_state_dict(good)
    with pytest.raises(distopt.StateError, match="format is 7, but must be 2"):
        registration.load_state_dict({**good, "format": 7})
    with pytest.raises(distopt.StateError, match="not the state of a registration: factors, format"):
        registration.load_state_dict({"step": 0, "layout": [], "tally": {}, "residuals": {}})
    wrong = {**good, "residuals": {"0.weight": torch.zeros(3)}}
    with pytest.raises(distopt.StateError, match=r"'0.weight' has shape \(3,\) there, \(48, 48\) here"):
        registration.load_state_dict(wrong)
    assert same(registration.state_dict()["residuals"], good["residuals"])


NAN = torch.full((48, 48), float("nan"))


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("reducer", 3, "the state's reducer is 3, but must be a text"),
        ("step", -1, "the state's step is -1, but must be an integer of at least 0"),
        ("step", True, "the state's step is True"),
        ("layout", None, "the state's layout is None, but must be lists of parameter names"),
        ("layout", [1], r"the state's layout is \[1\]"),
        ("tally", {}, r"the state's tally is {}, but must be integers for steps, skipped_steps, bytes_"),
        ("residuals", None, "the state's residuals is None, but must be tensors by parameter name"),
        ("residuals", {"0.weight": 3}, "the state's residuals is {'0.weight': 3}"),
        ("residuals", {"0.weight": NAN}, "the residual of '0.weight' holds NaN or infinity: the state is damaged"),
        ("residuals", {"0.weight": NAN.bool()}, r"the residual of '0.weight' is of dtype torch.bool, but must be floa"),
        ("factors", [1], r"the state's factors is \[1\], but must be tensors by parameter name"),
        ("factors", {"0.weight": NAN[:, :2]}, "the factor of '0.weight' holds NaN or infinity"),
    ],
)
def test_a_damaged_state_is_refused_and_nothing_changes(lone_registration, field, value, message):
    good = lone_registration.state_dict()
    with pytest.raises(distopt.StateError, match=message):
        lone_registration.load_state_dict({**good, field: value})
    assert same(lone_registration.state_dict()["residuals"], good["residuals"])


@pytest.mark.usefixtures("alone")
def test_a_factor_of_another_rank_is_refused():
    model = DDP(mlp(2))
    registration = distopt.register(model, REDUCER)
    model(batch(0, 0)).square().mean().backward()
    good = registration.state_dict()
    wider = DDP(mlp(2))
    with pytest.raises(distopt.StateError, match=r"factor of '0.weight' has shape \(48, 2\) there, \(48, 3\) here"):
        distopt.register(wider, distopt.PowerSGD(rank=3)).load_state_dict(good)


def dcp_save_job(rank, folder, reducer):
    model, registration, optimizer = begin(12, torch.float32, {}, reducer)
    for step in range(4):
        step_on(model, optimizer, rank, step, torch.float32)
    dcp.save({"model": model.module, "hook": registration}, checkpoint_id=folder)
    saved = registration.state_dict()
    model.zero_grad()
    model(batch(rank, 4)).square().mean().backward()
    return saved, gradients(model), registration.stats()


def dcp_load_job(rank, folder, reducer):
    model, registration, _ = begin(12, torch.float32, {}, reducer)
    dcp.load({"model": model.module, "hook": registration}, checkpoint_id=folder)
    loaded = registration.state_dict()
    model(batch(rank, 4)).square().mean().backward()
    return loaded, gradients(model), registration.stats()


@pytest.mark.parametrize(
    ("before", "after", "reducer"),
    [
        (2, 2, REDUCER),
        (2, 2, distopt.AllReduce()),
        (2, 2, distopt.PowerSGD(rank=2, residual_dtype="1-6-9", factor_dtype=torch.bfloat16)),
        (2, 2, distopt.TopK(0.1)),
        (2, 3, REDUCER),
        (3, 1, REDUCER),
        (4, 2, OVER_NODES[0]),
    ],
    ids=lambda value: repr(value)[:60],
)
def test_a_registration_is_stateful_to_distributed_checkpoint(tmp_path, before, after, reducer):
    saved = run_ranks(before, dcp_save_job, str(tmp_path), reducer)
    loaded = run_ranks(after, dcp_load_job, str(tmp_path), reducer)
    for rank, (state, ahead, stats) in enumerate(loaded):
        for kind in ("residuals", "factors"):
            assert same(state[kind], saved[0][0][kind])
        assert {k: v for k, v in state.items() if k not in ("residuals", "factors")} == {
            k: v for k, v in saved[0][0].items() if k not in ("residuals", "factors")
        }
        if before == after:
            assert same(ahead, saved[0][1])
            assert stats == saved[rank][2]


def exact_job(rank, residual_dtype, saved_at):
    """Save at a step in the middle, or not; what was saved, and how it ended."""
    reducer = distopt.PowerSGD(rank=2, residual_dtype=residual_dtype)
    model = wrap(mlp())
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    registration = distopt.register(model, reducer, grad_scaler=scaler)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    saved = None
    for step in range(TOTAL):
        if step == saved_at:
            own = registration.own_residuals()
            saved = copy.deepcopy([model.module.state_dict(), registration.state_dict(), own])
            registration.load_own_residuals(own)
        if saved is not None and step == saved_at + 2:
            # A rank that is started again: everything anew, in other units.
            registration.load_state_dict(saved[1])
            model.module.load_state_dict(saved[0])
            registration.load_own_residuals(saved[2])
            for again in range(saved_at, step):
                scaled_step(model, optimizer, scaler, rank, again)
        scaled_step(model, optimizer, scaler, rank, step)
    return parameters(model)


def scaled_step(model, optimizer, scaler, rank, step):
    scaler.scale(model(batch(rank, step)).square().mean()).backward()
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad()


@pytest.mark.parametrize("residual_dtype", [None, "1-6-9", torch.bfloat16])
def test_with_its_own_residuals_a_save_changes_nothing_and_goes_on_to_the_bit(residual_dtype):
    undisturbed, saved = (run_ranks(2, exact_job, residual_dtype, at) for at in (-1, 3))
    assert same(undisturbed[0], saved[0])
    assert same(undisturbed[1], saved[1])


def test_residuals_of_another_model_or_format_are_refused(lone_registration):
    registration = lone_registration
    own = registration.own_residuals()
    name = next(iter(own))
    for state, words in (
        ({}, "is only here"),
        ({**own, "other": own[name]}, "'other' is only there"),
        ({**own, name: {"unit": 1.0, "values": torch.zeros(1)}}, "in another shape or format"),
    ):
        with pytest.raises(StateError, match=words):
            registration.load_own_residuals(state)
    registration.load_own_residuals(own)


@pytest.fixture
def lone_registration():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    model, registration, optimizer = begin(12, torch.float32, {})
    step_on(model, optimizer, 0, 0, torch.float32)
    yield registration
    dist.destroy_process_group()
