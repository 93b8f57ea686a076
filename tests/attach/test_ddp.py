"""The DDP hook on real gloo processes: what torch's own hook gets wrong, it must get right."""

import contextlib
import math

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP

import distopt
from tests.attach.models import batch, gradients, mlp, parameters, same, wrap
from tests.processes import run_ranks

REDUCERS = [distopt.AllReduce(), distopt.PowerSGD(rank=2)]
each_reducer = pytest.mark.parametrize("reducer", REDUCERS, ids=["AllReduce", "PowerSGD"])


def train(model, reducer, steps, rank, *, accumulate=1, lr=0.05, width=48, dtype=torch.float32):
    """A plain loop; gradients of every step, and the registration."""
    registration = distopt.register(model, reducer) if reducer else None
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)
    seen = []
    for step in range(steps):
        for micro in range(accumulate):
            last = micro == accumulate - 1
            with contextlib.nullcontext() if last else model.no_sync():
                model(batch(rank, step * accumulate + micro, width, dtype)).square().mean().backward()
        seen.append(gradients(model))
        optimizer.step()
        optimizer.zero_grad()
    return seen, registration


def everywhere_equal(rank, tree):
    """Whether every rank holds the same bits."""
    mine = torch.cat([t.double().flatten() for t in tree.values() if t is not None])
    copies = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(copies, mine)
    return all(torch.equal(mine, copy) for copy in copies)


def buckets_job(rank, reducer, bucket_kib, options):
    model = wrap(mlp(), bucket_kib, **options)
    seen, registration = train(model, reducer, 6, rank)
    stats = registration.stats()
    agreed = all(everywhere_equal(rank, step) for step in seen) and everywhere_equal(rank, parameters(model))
    return agreed, len(registration._attachment.layout()), stats


OPTIONS = [{}, {"find_unused_parameters": True}, {"static_graph": True}, {"gradient_as_bucket_view": True}]


@each_reducer
@pytest.mark.parametrize(
    ("world", "bucket_kib", "options"),
    [
        *((world, 1, OPTIONS[0]) for world in (1, 2, 3, 4)),
        *((2, kib, options) for kib in (25, 10000) for options in OPTIONS),
        *((world, 25, options) for world in (1, 4) for options in OPTIONS[1:]),
    ],
    ids=str,
)
def test_any_number_of_buckets(reducer, world, bucket_kib, options):
    """No hang and no crash from the first step on, through the rebuilding of buckets; the same bits on all ranks."""
    for agreed, buckets, stats in run_ranks(world, buckets_job, reducer, bucket_kib, options):
        assert agreed
        assert (buckets == 1) if bucket_kib == 10000 else buckets > 1
        assert (stats.steps, stats.skipped_steps) == (6, 0)
        assert stats.bytes_uncompressed == 6 * 4 * 5 * (48 * 48 + 48)
        if isinstance(reducer, distopt.PowerSGD):
            assert stats.matrix_saving == pytest.approx(1 - 2 * 2 * 48 / 48**2)
            assert stats.bytes_sent == 6 * 4 * 5 * (2 * 2 * 48 + 48) + (
                4 * 6 * 5 if options and "bucket" not in str(options) else 0
            )
            assert set(stats.residual_norm) == {f"{i}.weight" for i in range(5)}
            assert all(math.isfinite(norm) for norm in stats.residual_norm.values())
        else:
            assert (stats.bytes_sent, stats.saving) == (stats.bytes_uncompressed, 0)


def plain_job(rank, reducer, options, dtype):
    ours, _ = train(wrap(mlp(dtype=dtype), **options), reducer, 5, rank, dtype=dtype)
    plain, _ = train(wrap(mlp(dtype=dtype), **options), None, 5, rank, dtype=dtype)
    return all(same(a, b) for a, b in zip(ours, plain, strict=True))


@pytest.mark.parametrize(
    ("world", "dtype", "options"),
    [
        *((world, torch.float32, {}) for world in (1, 2, 3, 4)),
        (2, torch.bfloat16, {}),
        (3, torch.float32, {"find_unused_parameters": True}),
        (3, torch.float32, {"gradient_as_bucket_view": True}),
    ],
    ids=str,
)
def test_exact_reduction_equals_plain_ddp_bit_for_bit(world, dtype, options):
    assert all(run_ranks(world, plain_job, distopt.AllReduce(), options, dtype))


@pytest.mark.parametrize("world", [2, 3])
def test_not_yet_started_equals_plain_ddp_bit_for_bit(world):
    assert all(run_ranks(world, plain_job, distopt.PowerSGD(start_step=5), {}, torch.float32))


def no_sync_job(rank, reducer):
    model = wrap(mlp(dtype=torch.float64))
    seen, registration = train(model, reducer, 4, rank, accumulate=3, dtype=torch.float64)
    alone = wrap(mlp(dtype=torch.float64))
    optimizer = torch.optim.SGD(alone.parameters(), lr=0.05, momentum=0.9)
    distopt.register(alone, reducer)
    big = []
    for step in range(4):
        sum(
            alone.module(batch(rank, 3 * step + micro, dtype=torch.float64)).square().mean() for micro in range(2)
        ).backward()
        local = gradients(alone)
        optimizer.zero_grad()
        alone(batch(rank, 3 * step + 2, dtype=torch.float64)).square().mean().backward()
        big.append(gradients(alone))
        optimizer.step()
        optimizer.zero_grad()
        assert all(g is not None for g in local.values())
    return registration.stats().steps, everywhere_equal(rank, seen[-1])


@each_reducer
def test_no_sync_counts_no_micro_batches(reducer):
    """Three micro-batches, two of them under ``no_sync``, are one step."""
    for steps, agreed in run_ranks(2, no_sync_job, reducer):
        assert steps == 4
        assert agreed


def accumulation_job(rank):
    model = wrap(mlp(dtype=torch.float64))
    seen, _ = train(model, distopt.AllReduce(), 1, rank, accumulate=3, dtype=torch.float64)
    one = mlp(dtype=torch.float64)
    world = dist.get_world_size()
    sum(one(batch(r, m, dtype=torch.float64)).square().mean() for r in range(world) for m in range(3)).backward()
    return max(float((p.grad / world - seen[0][n]).abs().max()) for n, p in one.named_parameters())


def test_accumulation_equals_the_big_batch():
    assert max(run_ranks(2, accumulation_job)) <= 1e-14


class Odd(nn.Module):
    """Everything that a model may legally hold."""

    def __init__(self, dtype):
        super().__init__()
        torch.manual_seed(0)
        self.scalar = nn.Parameter(torch.tensor(1.5))
        self.transposed = nn.Parameter(torch.randn(40, 24).t())
        self.empty = nn.Parameter(torch.zeros(0, 5))
        self.frozen = nn.Parameter(torch.randn(24, 24), requires_grad=False)
        self.conv = nn.Conv2d(8, 16, 3, padding=1).to(memory_format=torch.channels_last)
        self.zero = nn.Linear(24, 24)
        self.unused = nn.Linear(24, 24)
        self.sometimes = nn.Linear(24, 24)
        self.to(dtype)

    def forward(self, x, use):
        y = x @ self.transposed @ self.transposed.t() @ self.frozen * self.scalar
        y = y + self.zero(x) * 0 + self.empty.sum()
        if use:
            y = y + self.sometimes(x)
        return y.square().mean() + self.conv(x[:, :8, None, None]).square().mean()


def odd_job(rank, reducer, dtype, options):
    model = DDP(Odd(dtype), find_unused_parameters=True, bucket_cap_mb=0.004, **options)
    registration = distopt.register(model, reducer)
    agreed, finite = True, True
    for step in range(6):
        model(0.1 * batch(rank, step, 24, dtype), use=rank == 0 or step % 2 == 0).backward()
        now = gradients(model)
        agreed &= everywhere_equal(rank, now)
        finite &= all(bool(g.isfinite().all()) for g in now.values() if g is not None)
        none = now["unused.weight"] is None and now["frozen"] is None
        zero = not now["zero.weight"].any()
        model.zero_grad()
    return agreed, finite, none, zero, registration.stats().skipped_steps


@each_reducer
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("options", [{}, {"gradient_as_bucket_view": True}], ids=["copy", "view"])
def test_all_that_a_model_may_legally_hold(reducer, dtype, options):
    for agreed, finite, none, zero, skipped in run_ranks(2, odd_job, reducer, dtype, options):
        assert agreed
        assert finite
        assert none
        assert zero
        assert skipped == 0


def transposed_job(rank):
    """A rank-1 gradient of a transposed parameter is delivered exactly; torch's hook scrambles it."""
    torch.manual_seed(0)
    model = nn.Module()
    model.weight = nn.Parameter(torch.randn(40, 24, dtype=torch.float64).t())
    model.forward = lambda u, v: (u @ model.weight @ v).sum()
    ddp = DDP(model)
    distopt.register(ddp, distopt.PowerSGD(rank=2))
    errors = []
    for step in range(3):
        generator = torch.Generator().manual_seed(step)
        u, v = (
            torch.randn(24, generator=generator, dtype=torch.float64),
            torch.randn(40, generator=generator, dtype=torch.float64),
        )
        ddp((rank + 1) * u, v).backward()
        errors.append(float((model.weight.grad - 1.5 * torch.outer(u, v)).abs().max()))
        ddp.zero_grad()
    return max(errors)


def test_a_transposed_parameter_is_not_scrambled():
    assert max(run_ranks(2, transposed_job)) < 1e-4


def unused_job(rank):
    """Use a layer, then leave it unused everywhere: its residual must wait, not vanish."""
    model = DDP(Odd(torch.float64), find_unused_parameters=True)
    registration = distopt.register(model, distopt.PowerSGD(rank=1))
    norms = []
    for step in range(4):
        model(batch(rank, step, 24, torch.float64), use=step == 0).backward()
        model.zero_grad()
        norms.append(registration.stats().residual_norm["sometimes.weight"])
    return norms


def test_a_parameter_that_no_rank_used_keeps_its_residual():
    for norms in run_ranks(2, unused_job):
        assert norms[0] > 0
        assert norms == [norms[0]] * 4


def non_finite_job(rank, reducer, bad, culprit, when, options):
    """Train through a bad input; the control is told to leave that step out."""
    model, control = wrap(mlp(), **options), wrap(mlp(), **options)
    pairs = [(m, distopt.register(m, reducer), torch.optim.SGD(m.parameters(), lr=0.05)) for m in (model, control)]
    reports = []
    for step in range(6):
        for which, (ddp, _, optimizer) in enumerate(pairs):
            x = batch(rank, step)
            if step == when:
                if which == 1:
                    continue
                x[0, 0] = bad if rank == culprit else x[0, 0]
            ddp(x).square().mean().backward()
            found = [
                bool(p.grad.isfinite().any()) if step == when else bool(p.grad.isfinite().all())
                for p in ddp.parameters()
            ]
            if step == when:
                reports.append(not any(found))
            else:
                reports.append(all(found))
                optimizer.step()
            optimizer.zero_grad()
    states = [registration.state_dict() for _, registration, _ in pairs]
    kept = all(same(states[0][kind], states[1][kind]) for kind in ("residuals", "factors"))
    finite = all(bool(t.isfinite().all()) for kind in ("residuals", "factors") for t in states[0][kind].values())
    return all(reports), same(parameters(model), parameters(control)), kept, finite, pairs[0][1].stats().skipped_steps


@each_reducer
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize(("world", "culprit", "when"), [(1, 0, 2), (2, 1, 0), (2, 0, 3), (3, 2, 1), (4, 1, 4)])
def test_a_non_finite_gradient_costs_one_step(reducer, bad, world, culprit, when):
    """All ranks see it in every parameter; afterwards the run is bitwise the one that left the step out."""
    # With three ranks and more, sums depend on the buckets' layout, which a run that leaves out its first steps
    # rebuilds later: one bucket keeps it the same.
    options = {"bucket_kib": 10000} if world > 2 else {}
    for result in run_ranks(world, non_finite_job, reducer, bad, culprit, when, options):
        reported, equal, kept, finite, skipped = result
        assert reported
        assert equal
        assert kept
        assert finite
        assert skipped == 1


def scaler_job(rank):
    """An unmodified GradScaler loop: the backward pass in float16 overflows until the scale has come down."""
    model = wrap(mlp())
    registration = distopt.register(model, distopt.PowerSGD(rank=2))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for step in range(40):
        with torch.autocast("cpu", dtype=torch.float16):
            loss = model(batch(rank, step)).float().square().mean()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    stats = registration.stats()
    return (
        scaler.get_scale(),
        stats.skipped_steps,
        everywhere_equal(rank, parameters(model)),
        all(bool(p.isfinite().all()) for p in model.parameters()),
    )


def test_a_grad_scaler_finds_its_scale():
    """Overflows back the scale off on all ranks alike until steps are taken; parameters stay finite and equal."""
    for scale, skipped, agreed, finite in run_ranks(2, scaler_job):
        assert 0 < skipped < 40
        assert scale == 2.0 ** (40 - skipped)
        assert agreed
        assert finite


def raising_reducer_job(rank):
    model = wrap(mlp())
    distopt.register(model, Broken())
    with pytest.raises(ValueError, match="the plan is broken"):
        model(batch(rank, 0)).square().mean().backward()
    return True


class Broken(distopt.AllReduce):
    def plan(self, slots, place):
        if len(slots) > 1:
            raise ValueError("the plan is broken")
        return super().plan(slots, place)


def test_an_error_on_the_worker_surfaces_from_backward():
    assert all(run_ranks(2, raising_reducer_job))


def late_job(rank):
    model = wrap(mlp())
    for step in range(3):
        model(batch(rank, step)).square().mean().backward()
        model.zero_grad()
    seen, registration = train(model, distopt.PowerSGD(rank=2), 3, rank)
    return everywhere_equal(rank, seen[-1]), registration.stats().steps


def test_registering_after_training_has_begun():
    assert run_ranks(2, late_job) == [(True, 3)] * 2


class TwoKinds(nn.Module):
    """Parameters of two dtypes, which DDP puts into different buckets, however large these may be."""

    def __init__(self):
        super().__init__()
        self.narrow, self.wide = mlp(2), mlp(2, dtype=torch.float64)

    def forward(self, x):
        return self.wide(self.narrow(x).double())


def static_graph_job(rank):
    outcome, registrations = [], []
    for kind, late in ((TwoKinds, False), (mlp, True)):
        seen = []
        for reducer in (distopt.AllReduce(), None):
            model = wrap(kind(), static_graph=not late)
            registrations += [distopt.register(model, reducer)] if reducer else []
            if late:
                model._set_static_graph()
            seen.append([])
            for step in range(4):
                model(batch(rank, step)).square().mean().backward()
                seen[-1].append(gradients(model))
                model.zero_grad()
        outcome.append((all(map(same, *seen)), registrations[-1].stats().steps))
    return outcome


def test_a_static_graph_of_several_buckets_in_its_first_step():
    """DDP hands them over when that is over, all of them as the first, and none as the last."""
    assert run_ranks(2, static_graph_job) == [[(True, 4)] * 2] * 2


def subgroup_job(rank):
    pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    model = DDP(mlp(), process_group=pairs[rank // 2])
    train(model, distopt.PowerSGD(rank=2), 3, rank)
    total = torch.cat([p.flatten() for p in model.parameters()]).detach()
    copies = [torch.empty_like(total) for _ in range(4)]
    dist.all_gather(copies, total)
    return torch.equal(copies[0], copies[1]), torch.equal(copies[2], copies[3]), torch.equal(copies[0], copies[2])


def test_process_groups_of_their_own():
    assert run_ranks(4, subgroup_job) == [(True, True, False)] * 4


def two_models_job(rank):
    models = [wrap(mlp()), wrap(mlp(3))]
    registrations = [distopt.register(m, distopt.PowerSGD(rank=2)) for m in models]
    for step in range(4):
        sum(m(batch(rank, step)).square().mean() for m in models).backward()
    return all(everywhere_equal(rank, gradients(m)) for m in models), [r.stats().steps for r in registrations]


def test_two_models_in_one_process():
    assert run_ranks(2, two_models_job) == [(True, [4, 4])] * 2
