"""Local SGD and DiLoCo on real gloo processes."""

import copy
import io

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP

from distopt.attach import replicas
from distopt.attach.outer import Nesterov
from distopt.attach.periodic import Periodic
from distopt.errors import RegistrationError, StateError
from tests.attach.models import batch
from tests.processes import run_ranks

WORLDS = (1, 2, 3, 4)
WIDTH = 6


def small(seed, dtype=torch.float64):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, 3)).to(dtype)


def backward(model, rank, step):
    model.zero_grad()
    model(batch(rank, step, WIDTH, next(model.parameters()).dtype)).square().mean().backward()


def tensors(model):
    """Copies of all parameters and buffers by name."""
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def flat(tree):
    return torch.cat(
        [torch.view_as_real(t).flatten().double() if t.is_complex() else t.flatten().double() for t in tree.values()]
    )


def everywhere_equal(tree):
    mine = flat(tree)
    copies = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(copies, mine)
    return all(torch.equal(mine, other) for other in copies)


def equal(left, right):
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


# What it computes


def oracle_job(rank, every, outer, rounds):
    """All ranks are trained once more on each of them, and averaged by torch's own means; the largest difference."""
    world = dist.get_world_size()
    model = small(0)
    ranks = [copy.deepcopy(model) for _ in range(world)]
    inner = [torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9) for m in ranks]
    shared = copy.deepcopy(model)
    lr, momentum = (1.0, 0.0) if outer is None else (outer.lr, outer.momentum)
    sgd = torch.optim.SGD(shared.parameters(), lr=lr, momentum=momentum, nesterov=momentum > 0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    periodic = Periodic(model, optimizer, every=every, outer=outer)
    worst, agreed = 0.0, True
    for step in range(rounds * every):
        backward(model, rank, step)
        optimizer.step()
        for r in range(world):
            backward(ranks[r], r, step)
            inner[r].step()
        if (step + 1) % every == 0:
            for parameter, *locals_ in zip(shared.parameters(), *(m.parameters() for m in ranks), strict=True):
                parameter.grad = parameter.detach() - sum(p.detach() for p in locals_) / world
            sgd.step()
            for m in ranks:
                m.load_state_dict(shared.state_dict())
            agreed = agreed and everywhere_equal(tensors(model))
        expected = flat(tensors(ranks[rank]))
        worst = max(worst, float((flat(tensors(model)) - expected).abs().max()))
    return worst, agreed, periodic.stats()


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize(
    ("every", "outer", "rounds"),
    [(1, None, 6), (3, Nesterov(lr=1.0, momentum=0.0), 4), (3, Nesterov(lr=0.7, momentum=0.9), 20)],
    ids=str,
)
def test_equals_averaging_by_hand_and_torch_sgd_outside(world, every, outer, rounds):
    for worst, agreed, stats in run_ranks(world, oracle_job, every, outer, rounds):
        assert worst < 1e-12
        assert agreed
        assert (stats.steps, stats.rounds, stats.dropped_rounds) == (rounds * every, rounds, 0)
        assert stats.bytes_uncompressed == every * stats.bytes_sent == rounds * every * 8 * (7 * WIDTH + 3 * 7)
        assert stats.saving == pytest.approx(1 - 1 / every)


def gradient_job(rank):
    """Averaging parameters after every step of SGD is averaging gradients before it."""
    world = dist.get_world_size()
    model = small(0)
    alone = copy.deepcopy(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)
    Periodic(model, optimizer, every=1)
    plain = torch.optim.SGD(alone.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)
    for step in range(10):
        backward(model, rank, step)
        optimizer.step()
        backward(alone, 0, step)
        for r in range(1, world):
            alone(batch(r, step, WIDTH, torch.float64)).square().mean().backward()
        for parameter in alone.parameters():
            parameter.grad /= world
        plain.step()
    return float((flat(tensors(model)) - flat(tensors(alone))).abs().max())


@pytest.mark.parametrize("world", WORLDS)
def test_every_step_equals_averaging_gradients(world):
    assert max(run_ranks(world, gradient_job)) < 1e-12


def post_local_job(rank):
    """Lin et al.: every step at first, every fourth later; and the rest at the end."""
    model = small(0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    periodic = Periodic(model, optimizer, every=lambda step: 1 if step < 3 else 4)
    seen = []
    for step in range(9):
        backward(model, rank, step)
        optimizer.step()
        seen.append(everywhere_equal(tensors(model)))
    periodic.average()
    seen.append(everywhere_equal(tensors(model)))
    periodic.average()
    return seen, periodic.stats().rounds


def test_the_interval_may_change_on_the_way():
    yes, no = True, False
    for seen, rounds in run_ranks(2, post_local_job):
        assert seen == [yes, yes, yes, no, no, no, yes, no, no, yes]
        assert rounds == 5


# What it averages


class Odd(nn.Module):
    """Everything a module may hold; different numbers on every rank."""

    def __init__(self, rank):
        super().__init__()
        torch.manual_seed(rank)
        self.f16 = nn.Parameter(torch.randn(5).half())
        self.bf16 = nn.Parameter(torch.randn(5, 2).bfloat16())
        self.f32 = nn.Parameter(torch.randn(4, 3).t())
        self.f64 = nn.Parameter(torch.randn(3, dtype=torch.float64))
        self.c64 = nn.Parameter(torch.randn(2, 2, dtype=torch.complex64))
        self.scalar = nn.Parameter(torch.randn(()))
        self.empty = nn.Parameter(torch.randn(0, 3))
        self.frozen = nn.Parameter(torch.randn(3), requires_grad=False)
        self.tied = self.f32
        self.register_buffer("running", torch.randn(3))
        self.register_buffer("count", torch.tensor(rank + 2**40))
        self.register_buffer("flag", torch.tensor([rank == 0, True]))
        self.register_buffer("mask", torch.full((2, 2), float("-inf")).triu(1))
        self.register_buffer("cache", torch.randn(3), persistent=False)


def odd_job(rank):
    """Odd tensors before, at the start, when this rank had moved, and after the round."""
    world = dist.get_world_size()
    model = Odd(rank)
    drawn = tensors(model)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    periodic = Periodic(model, optimizer, every=1)
    start, cache = tensors(model), model.cache.clone()
    torch.manual_seed(100 + rank)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    model.running = model.running + rank  # a new tensor, as some modules do
    model.count += rank
    expected = {n: (p - 0.5 * p.grad).detach() for n, p in model.named_parameters() if p.requires_grad}
    optimizer.step()
    return drawn, start, expected, tensors(model), torch.equal(cache, model.cache), periodic.stats(), world


@pytest.mark.parametrize("world", WORLDS)
def test_all_kinds_of_tensors(world):
    results = run_ranks(world, odd_job)
    first = results[0][0]
    for rank, (_, start, _, after, cache_kept, stats, _) in enumerate(results):
        assert equal(start, first)
        assert all(start[name].dtype == first[name].dtype for name in first)
        assert equal(
            {n: t for n, t in after.items() if n != "count"}, {n: t for n, t in results[0][3].items() if n != "count"}
        )
        for name in results[0][2]:
            wide = torch.promote_types(after[name].dtype, torch.float64)
            mean = sum(r[2][name].to(wide) for r in results) / world
            eps = max(torch.finfo(after[name].dtype).eps, 4e-7)  # float32's, with room for some sums
            torch.testing.assert_close(after[name].to(wide), mean, rtol=0.51 * eps, atol=1e-6)
        torch.testing.assert_close(after["running"], first["running"] + (world - 1) / 2)
        assert torch.equal(after["frozen"], first["frozen"])
        assert torch.equal(after["mask"], first["mask"])
        assert after["count"] == first["count"] + rank  # no number of fractions: each rank's own
        assert cache_kept
        assert (stats.rounds, stats.dropped_rounds) == (1, 0)
        assert stats.bytes_sent == 4 * (5 + 10 + 12 + 8 + 1 + 3) + 8 * 3


def payload_job(rank, limit):
    replicas.PAYLOAD_BYTES = limit
    model = small(0, torch.float32)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    periodic = Periodic(model, optimizer, every=1)
    sizes, average_ = [], periodic._communicator.average_
    periodic._communicator.average_ = lambda tensor: sizes.append(tensor.numel()) or average_(tensor)
    backward(model, rank, 0)
    optimizer.step()
    return sizes, everywhere_equal(tensors(model))


@pytest.mark.parametrize(("limit", "expected"), [(2**28, [63]), (168, [42, 21]), (1, [36, 6, 18, 3])])
def test_few_big_payloads(limit, expected):
    assert run_ranks(2, payload_job, limit) == [(expected, True)] * 2


def islands_job(rank):
    """Two nodes of two: DDP inside, averages of parameters between."""
    groups = [dist.new_group(ranks) for ranks in ([0, 1], [2, 3], [0, 2], [1, 3])]
    model = DDP(small(rank), process_group=groups[rank // 2])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(RegistrationError, match="DistributedDataParallel"):
        Periodic(model, optimizer, every=2)
    Periodic(model.module, optimizer, every=2, outer=Nesterov(), process_group=groups[2 + rank % 2])
    agreed = []
    for step in range(4):
        model(batch(rank, step, WIDTH, torch.float64)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        agreed.append(everywhere_equal(tensors(model.module)))
    return agreed


def test_between_nodes_with_ddp_inside():
    assert run_ranks(4, islands_job) == [[False, True, False, True]] * 4


# What goes wrong


def poison_job(rank, where, value):
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    periodic = Periodic(model, optimizer, every=2, outer=Nesterov())
    kept, agreed = [], []
    for step in range(8):
        backward(model, rank, step)
        optimizer.step()
        if step == 2:
            before = periodic.state_dict()
        if step == 2 and rank == 1:
            model.state_dict()[where].view(-1)[0] = value
        if step == 3:
            after = periodic.state_dict()
            kept = [equal(before[part], after[part]) for part in ("global", "velocity")]
            kept.append(equal({n: tensors(model)[n] for n in after["global"]}, after["global"]))
        agreed.append(everywhere_equal({n: tensors(model)[n] for n in before["global"]}) if step > 2 else None)
    finite = all(torch.isfinite(t).all() for t in tensors(model).values())
    return kept, agreed[3::2], finite, periodic.stats()


@pytest.mark.parametrize(
    ("world", "where", "value"),
    [(2, "0.weight", float("nan")), (3, "0.bias", float("inf")), (3, "1.running_var", float("-inf"))],
    ids=str,
)
def test_a_non_finite_number_on_one_rank_drops_the_round_on_all(world, where, value):
    for kept, agreed, finite, stats in run_ranks(world, poison_job, where, value):
        assert kept == [True, True, True]
        assert all(agreed)
        assert finite
        assert (stats.steps, stats.rounds, stats.dropped_rounds) == (8, 4, 1)


def scaler_job(rank, overflows, every):
    """A fixed number of iterations, with a collective of the user's in each, as a loop that logs its loss has."""
    model = small(0, torch.float32)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    periodic = Periodic(model, optimizer, every=every)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    agreed, taken = [], []
    optimizer.register_step_pre_hook(lambda *_: taken.append(1))
    for step in range(9):
        optimizer.zero_grad()
        loss = model(batch(rank, step, WIDTH)).square().mean()
        scaler.scale(loss * (float("inf") if (rank, step) in overflows else 1.0)).backward()
        scaler.step(optimizer)
        periodic.step()
        scaler.update()
        dist.all_reduce(loss.detach())
        agreed.append(everywhere_equal(tensors(model)))
    return len(taken), agreed, periodic.stats()


@pytest.mark.parametrize("overflows", [[(1, 0)], [(1, 2)], [(0, 2), (1, 3), (1, 5)]], ids=str)
def test_steps_that_a_grad_scaler_leaves_out_on_one_rank_hang_nobody(overflows):
    results = run_ranks(2, scaler_job, overflows, 3)
    for rank, (taken, agreed, stats) in enumerate(results):
        assert taken == 9 - sum(r == rank for r, _ in overflows)
        assert agreed == [False, False, True] * 3
        assert (stats.steps, stats.rounds, stats.dropped_rounds) == (9, 3, 0)


# Resuming


TOTAL = 11


def begin(seed):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH), nn.Linear(WIDTH, 3))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    return model, optimizer, Periodic(model, optimizer, every=4, outer=Nesterov())


def save_job(rank, save_at):
    model, optimizer, periodic = begin(rank)
    buffer = io.BytesIO()
    for step in range(TOTAL):
        if step == save_at:
            parts = {"model": model, "optimizer": optimizer, "periodic": periodic}
            torch.save({name: part.state_dict() for name, part in parts.items()}, buffer)
        backward(model, rank, step)
        optimizer.step()
    return buffer.getvalue(), tensors(model), periodic.state_dict()


def resume_job(rank, saved, save_at):
    model, optimizer, periodic = begin(50 + rank)
    state = torch.load(io.BytesIO(saved[rank]), weights_only=True)
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    periodic.load_state_dict(state["periodic"])
    for step in range(save_at, TOTAL):
        backward(model, rank, step)
        optimizer.step()
    return tensors(model), periodic.state_dict()


@pytest.mark.parametrize(("world", "save_at"), [(1, 6), (2, 0), (3, 6), (3, 8)])
def test_a_new_process_goes_on_bit_for_bit(world, save_at):
    saved, ended, states = zip(*run_ranks(world, save_job, save_at), strict=True)
    for rank, (model, state) in enumerate(run_ranks(world, resume_job, saved, save_at)):
        assert equal(model, ended[rank])
        assert equal(state.pop("global"), states[rank].pop("global"))
        assert equal(state.pop("velocity"), states[rank].pop("velocity"))
        assert state == states[rank]


def other_world_job(rank, saved):
    model, optimizer, periodic = begin(rank)
    fresh = tensors(model)
    state = torch.load(io.BytesIO(saved), weights_only=True)["periodic"]
    try:
        periodic.load_state_dict(state)
    except StateError as error:
        return str(error), equal(fresh, tensors(model)), periodic.stats().steps
    agreed = [equal({n: tensors(model)[n] for n in state["global"]}, state["global"])]
    for step in range(4):
        backward(model, rank, step)
        optimizer.step()
    agreed.append(everywhere_equal(tensors(model)))
    return "", agreed == [True, True], periodic.stats().steps


def test_another_number_of_ranks_goes_on_after_a_round_only():
    middle, boundary = (run_ranks(2, save_job, save_at)[1][0] for save_at in (6, 8))
    assert run_ranks(3, other_world_job, boundary) == [("", True, 12)] * 3
    for message, untouched, steps in run_ranks(3, other_world_job, middle):
        assert "2 steps into a round of 2 ranks, and here are 3" in message
        assert untouched
        assert steps == 0
