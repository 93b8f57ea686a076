"""fairscale's wrappers, the real ones: what works beside our hooks is exact, and what does not is refused by name."""

import io
import itertools
import re
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP

import distopt
from distopt.scaling import to_16bit
from tests.attach.models import batch, mlp, parameters, same, wrap
from tests.processes import run_ranks
from tests.scaling.networks import WIDTH, Branch, Residual, loss_of
from tests.scaling.networks import batch as small_batch
from tests.sharding.models import mesh_of, whole

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from fairscale.nn import FullyShardedDataParallel, Pipe, checkpoint_wrapper
    from fairscale.nn.data_parallel import ShardedDataParallel
    from fairscale.nn.pipe import AsyncPipe
    from fairscale.optim import OSS, AdaScale

pytestmark = pytest.mark.filterwarnings("ignore:fairscale.nn.Pipe has been upstreamed:DeprecationWarning")

SETTINGS = {"lr": 0.1, "momentum": 0.9}
REDUCER = distopt.PowerSGD(rank=2)


def oss(model):
    return OSS(model.parameters(), optim=torch.optim.SGD, **SETTINGS)


def sgd(model):
    return torch.optim.SGD(model.parameters(), **SETTINGS)


def sharded(model=None, **options):
    """The wrapped model, and its optimizer."""
    model = model or mlp()
    optimizer = oss(model)
    return ShardedDataParallel(model, optimizer, **options), optimizer


def train(model, optimizer, rank, steps=range(5), after=lambda: None, **zero):
    """A plain loop; how it ends."""
    for step in steps:
        optimizer.zero_grad(**zero)
        model(batch(rank, step)).square().mean().backward()
        after()
        optimizer.step()
    named = getattr(model, "module", model).named_parameters()
    return {name: parameter.detach().clone() for name, parameter in named}


def worst(left, right):
    return max(float((a - b).abs().max()) for a, b in zip(left.values(), right.values(), strict=True))


def in_one_process(ranks, steps=5):
    """One process with the batches of all ranks."""
    model = mlp()
    optimizer = sgd(model)
    for step in range(steps):
        optimizer.zero_grad()
        sum(model(batch(rank, step)).square().mean() / ranks for rank in range(ranks)).backward()
        optimizer.step()
    return dict(model.named_parameters())


def registered(reducer, model=None, **options):
    model, optimizer = sharded(model, **options)
    return model, optimizer, distopt.register(model, reducer, check_replicas_every=1)


def test_nothing_of_distopt_imports_it():
    """It is an extra, and its import warns."""
    files = list(Path(distopt.__file__).parent.rglob("*.py"))
    assert len(files) > 15
    assert not [file for file in files if re.search(r"^\s*(import|from) fairscale\b", file.read_text(), re.MULTILINE)]


def exactness_job(rank):
    """Whether fairscale's default is wrong, and ours right, against one process and against DDP with our hook."""
    reference = in_one_process(2)
    # If this begins to fail, fairscale has been mended, and its buckets may stay.
    assert worst(train(*sharded(), rank), reference) > 1e-4
    for options, zero in (({}, {}), ({}, {"set_to_none": False}), ({"reduce_buffer_size": 0}, {})):
        model, optimizer, registration = registered(distopt.AllReduce(), **options)
        ended = train(model, optimizer, rank, **zero)
        registration.check_replicas()
        assert worst(ended, reference) == 0.0
        assert registration.stats().steps == 5
        assert not model._buckets
    for reducer in (REDUCER, distopt.TopK(0.1)):
        model, optimizer, registration = registered(reducer)
        plain = wrap(mlp(), 10000)
        beside = distopt.register(plain, reducer)
        assert same(train(model, optimizer, rank), train(plain, sgd(plain), rank))
        assert registration.stats().residual_norm == beside.stats().residual_norm
        assert registration.stats().saving > 0.5

    late, plain = mlp(), wrap(mlp(), 10000)
    optimizer = OSS(late.parameters(), optim=torch.optim.SGD, lr=0.1)
    late = ShardedDataParallel(late, optimizer)
    train(late, optimizer, rank, range(2))  # wrongly
    late.module.load_state_dict(plain.module.state_dict())
    distopt.register(late, distopt.AllReduce())
    assert same(train(late, optimizer, rank), train(plain, torch.optim.SGD(plain.parameters(), lr=0.1), rank))
    assert not late._bucket_list
    return True


def test_sharded_ddp_is_made_right():
    """Its default trains wrongly on torch 2, without a word; registered, it gives DDP's bits."""
    assert run_ranks(2, exactness_job) == [True] * 2


def ownership_job(rank, world):
    """Three ranks, which do not own the same number of parameters; odd turns of a loop."""
    model, optimizer, registration = registered(REDUCER)
    bare = mlp()
    listed = distopt.register(bare.named_parameters(), REDUCER)
    owned = [name for name, p in bare.named_parameters() if optimizer._param_to_rank[_twin(model, name)] == rank]

    def kept():
        assert [name for name, p in model.module.named_parameters() if p.grad is not None] == owned

    ended = train(model, optimizer, rank, after=kept)
    assert same(ended, train(bare, sgd(bare), rank, after=listed.reduce))
    assert same(registration.state_dict()["residuals"], listed.state_dict()["residuals"])

    exact, _, registration = registered(distopt.AllReduce(), mlp(dtype=torch.float64))
    every = mlp(dtype=torch.float64)
    exact(_wide(rank, 0)).square().mean().backward()
    with exact.no_sync():
        exact(_wide(rank, 1)).square().mean().backward()
    exact(_wide(rank, 2)).square().mean().backward()
    exact.eval()
    exact(_wide(rank, 3)).square().mean().backward()  # fairscale's own averages in training mode only
    assert registration.stats().steps == 3
    for r, step in itertools.product(range(world), range(4)):
        (every(_wide(r, step)).square().mean() / world).backward()
    _pair_job(rank)
    pairs = zip(exact.module.parameters(), every.parameters(), strict=True)
    return [float((a.grad - b.grad).abs().max()) for a, b in pairs if a.grad is not None]


def _pair_job(rank):
    """Ranks 1 and 2 of the three, in windows."""
    pair = dist.new_group([1, 2])
    if rank == 0:
        return
    model = mlp()
    optimizer = OSS(model.parameters(), optim=torch.optim.SGD, group=pair, lr=0.1)
    model = ShardedDataParallel(model, optimizer, process_group=pair)
    registration = distopt.register(model, distopt.AllReduce(), check_replicas_every=1)
    for window in distopt.accumulate([batch(rank, step) for step in range(4)], model, steps=2):
        assert window.weight == 2 * 2 * 8
        for x in window:
            window.backward(model(x).square().mean(1).sum())
        optimizer.step()
        optimizer.zero_grad()
    registration.check_replicas()
    assert registration.stats().steps == 2


def _twin(model, name):
    return dict(model.module.named_parameters())[name]


def _wide(rank, step):
    return batch(rank, step, dtype=torch.float64)


def test_each_rank_keeps_what_it_steps_on():
    """And gradients of several passes add up, whether they communicate or not."""
    errors = run_ranks(3, ownership_job, 3)
    assert sum(map(len, errors)) == 10
    assert max(map(max, errors)) < 1e-15


def scaler_job(rank, kind):
    """A loss scale, and a step that overflows on rank 1; against DDP, which has no such step."""
    ends = []
    for ours in (True, False):
        if kind == "sharded" and ours:
            model, optimizer, registration = registered(REDUCER)
        else:
            model = wrap(mlp(), 10000)
            registration = distopt.register(model, REDUCER, check_replicas_every=1)
            optimizer = oss(model) if ours else sgd(model)
        scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
        for step in (0, 1, 99, 2, 3) if ours else range(4):
            optimizer.zero_grad()
            loss = model(batch(rank, step)).square().mean()
            scaler.scale(loss * float("inf") if (rank, step) == (1, 99) else loss).backward()
            scaler.unscale_(optimizer)
            norm = optimizer.clip_grad_norm(0.5) if ours and kind == "sharded" else None
            if norm is None:
                norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            assert bool(norm.isfinite()) == (step != 99)
            scaler.step(optimizer)
            scaler.update(8.0)
        registration.check_replicas()
        assert registration.stats().skipped_steps == ours
        ends.append(parameters(model))
    return worst(*ends)


@pytest.mark.parametrize("kind", ["beside DDP", "sharded"])
def test_a_gradient_that_is_not_finite(kind):
    """All ranks skip that step, and nothing of it lasts."""
    errors = run_ranks(2, scaler_job, kind)
    assert max(errors) < (1e-7 if kind == "sharded" else 1e-30)


def branches_job(rank):
    """A scale for every branch, with an overflow in one, and the pieces of an optimizer."""
    ends = []
    for ours in (True, False):
        model = Residual()
        optimizer = oss(model) if ours else sgd(model)
        wrapped = ShardedDataParallel(model, optimizer) if ours else DDP(model)
        registration = distopt.register(wrapped, distopt.PowerSGD(rank=1), check_replicas_every=1)
        scaler = distopt.ResblockScaler("branches.*", model=wrapped)
        skipped = []
        for step in range(4):
            optimizer.zero_grad()
            model.branches[2].amplify = float("inf") if (rank, step) == (1, 1) else 1.0
            scaler.scale(loss_of(wrapped, small_batch(10 * step + rank))).backward()
            scaler.step(optimizer)
            scaler.update()
            skipped.append(scaler.skipped)
        registration.check_replicas()
        assert skipped == [False, True, False, False]
        ends.append((parameters(wrapped), list(scaler.state_dict()["blocks"])))
    (left, names), (right, again) = ends
    assert worst(left, right) < 1e-6
    assert names == again
    return names[0]


def test_scales_of_branches():
    assert run_ranks(2, branches_job) == ["branches.0"] * 2


def oss_job(rank):
    """OSS beside DDP with our hook: against a plain optimizer, and stopped in the middle. AdaScale, which has its own."""
    for reducer in (distopt.AllReduce(), REDUCER):
        model, plain = wrap(mlp()), wrap(mlp())
        distopt.register(model, reducer, check_replicas_every=1)
        distopt.register(plain, reducer)
        assert same(train(model, oss(model), rank), train(plain, sgd(plain), rank))
    gains = []
    for reducer in (None, distopt.AllReduce()):
        model = wrap(mlp())
        optimizer = AdaScale(sgd(model))
        if reducer is not None:
            distopt.register(model, reducer)
        gains.append((worst(train(model, optimizer, rank), parameters(plain)), optimizer.gain()))
    assert gains[0] == gains[1]
    for make in (lambda: (wrap(mlp()), None), sharded):
        ended = []
        for stop in (False, True):
            model, optimizer = make()
            optimizer = optimizer or oss(model)
            registration = distopt.register(model, REDUCER)
            train(model, optimizer, rank, range(2))
            hook = registration.state_dict()
            if stop:
                optimizer.consolidate_state_dict(recipient_rank=-1)
                buffer = io.BytesIO()
                state = {"model": model.module.state_dict(), "optimizer": optimizer.state_dict(), "hook": hook}
                torch.save(state, buffer)
                state = torch.load(io.BytesIO(buffer.getvalue()), weights_only=True)
                model, optimizer = make()
                optimizer = optimizer or oss(model)
                registration = distopt.register(model, REDUCER)
                model.module.load_state_dict(state["model"])
                optimizer.load_state_dict(state["optimizer"])
                registration.load_state_dict(state["hook"])
            ended.append(train(model, optimizer, rank, range(2, 5)))
        assert same(*ended)
    return True


def test_oss_beside_ddp_and_saving():
    assert all(run_ranks(3, oss_job))


def checkpoint_job(rank):
    """checkpoint_wrapper: under DDP, ShardedDataParallel and shard; wherever a scaler is."""
    plain, wrapped = wrap(mlp()), wrap(_recomputed(mlp(), offload_to_cpu=True))
    for model in (plain, wrapped):
        distopt.register(model, REDUCER)
    assert same(train(plain, sgd(plain), rank), train(wrapped, sgd(wrapped), rank))

    model, optimizer, _ = registered(REDUCER, _recomputed(mlp()))
    assert same(train(model, optimizer, rank), train(*registered(REDUCER)[:2], rank))

    for shape, recompute in (((2, 1), True), ((1, 2), False)):
        ends = []
        for model in (mlp(), _recomputed(mlp())):
            distopt.shard(model, list(model)[1:], mesh=mesh_of(shape), reducer=REDUCER, recompute=recompute)
            train(model, torch.optim.SGD(model.parameters(), lr=0.1), rank)
            ends.append(whole(model))
        assert same(*ends)

    for narrow, inner in ((False, False), (True, False), (True, True)):
        ends = []
        for wraps in (False, True):
            model = Residual()
            if narrow:
                to_16bit(model.branches)
            for branch in model.branches if wraps else ():
                checkpoint_wrapper(branch.up if inner else branch)
            scaler = distopt.ResblockScaler(model.branches, dtype=torch.bfloat16)
            ddp = DDP(model)
            distopt.register(ddp, distopt.PowerSGD(rank=1))
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            for step in range(3):
                optimizer.zero_grad()
                scaler.scale(loss_of(ddp, small_batch(10 * step + rank))).backward()
                scaler.step(optimizer)
                scaler.update()
            ends.append((parameters(ddp), scaler.state_dict()))
        (left, scales), (right, again) = ends
        assert same(left, right)
        assert scales == again
    return True


def _recomputed(model, **options):
    for layer in model:
        checkpoint_wrapper(layer, **options)
    return model


def test_checkpoint_wrapper():
    assert run_ranks(2, checkpoint_job) == [True] * 2


def test_checkpoint_wrapper_past_the_scaler():
    """It would call the branch past the scaler, and gradients would be unscaled that were never scaled."""
    model = Residual()
    scaler = distopt.ResblockScaler(model.branches)
    checkpoint_wrapper(model.branches[1])
    with pytest.raises(distopt.RegistrationError, match=r"^'1\.\S+' is in a branch .*: put it on first, then make"):
        scaler.scale(loss_of(model, small_batch())).backward()


class Scaled(nn.Module):
    """x + f(x)."""

    def __init__(self):
        super().__init__()
        self.f = Branch()

    def forward(self, x):
        return x + self.f(x)


def layers():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), Scaled(), Scaled(), nn.Linear(WIDTH, 1))


def pipe_job(rank, checkpoint):
    """Sequential against Pipe, with all that goes with it."""
    for accumulate, scaled in ((False, False), (True, False), (False, True)):
        ends, states = [], []
        for piped in (False, True):
            model = layers()
            named = list(model.named_parameters())
            scaler = distopt.ResblockScaler([model[1].f, model[2].f], dtype=torch.float32) if scaled else None
            if piped:
                model = Pipe(model, balance=[2, 2], devices=["cpu", "cpu"], chunks=2, checkpoint=checkpoint)
            registration = distopt.register(named, distopt.PowerSGD(rank=1), accumulate=accumulate)
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            loader = [small_batch(10 * step + rank) for step in range(6)]
            for window in distopt.accumulate(loader, model, steps=2):
                optimizer.zero_grad()
                for x in window:
                    loss = (model(x) - 1).square().sum()
                    window.backward(scaler.scale(loss) if scaler else loss)
                registration.reduce()
                (scaler or _Plain()).step(optimizer)
                (scaler or _Plain()).update()
            ends.append(dict(named))
            states.append(registration.state_dict())
            registration.load_state_dict(states[0])
            registration.check_replicas()
        assert worst(*ends) < 1e-6
    model = DDP(Pipe(layers(), balance=[4], devices=["cpu"], chunks=2, checkpoint=checkpoint), static_graph=True)
    distopt.register(model, REDUCER)
    train_once = [model(small_batch(rank)).square().mean().backward() for _ in range(3)]
    return len(train_once)


class _Plain:
    def step(self, optimizer):
        optimizer.step()

    def update(self):
        pass


@pytest.mark.parametrize("checkpoint", ["never", "except_last"])
def test_pipe(checkpoint):
    """In one process of each replica, over lists of parameters; accumulated into residuals; with scales."""
    assert run_ranks(2, pipe_job, checkpoint) == [3] * 2


def piped(**options):
    return Pipe(mlp(2), balance=[1, 1], devices=["cpu", "cpu"], chunks=2, **options)


@pytest.mark.usefixtures("alone")
def test_what_ddp_cannot_hold():
    with pytest.raises(distopt.RegistrationError, match=r"module is fairscale's Pipe .* static_graph=True only"):
        distopt.register(DDP(piped()), REDUCER)
    distopt.register(DDP(piped(checkpoint="never")), REDUCER)
    with pytest.raises(distopt.RegistrationError, match=r"was given Pipe: .* named_parameters\(\)"):
        distopt.register(piped(), REDUCER)
    with pytest.raises(distopt.RegistrationError, match=r"0 is fairscale's Pipe: .*distopt\.pipeline"):
        distopt.shard(nn.Sequential(piped()), "0")


@pytest.mark.usefixtures("alone")
def test_fully_sharded(monkeypatch):
    """It cannot run here: what is checked is what a user is told, and what CUDA would let through."""
    model = FullyShardedDataParallel(mlp(2), compute_device=torch.device("cpu"))
    for act in (lambda: distopt.register(model, REDUCER), lambda: distopt.shard(model, "0")):
        with pytest.raises(
            distopt.RegistrationError, match=r"^the model is fairscale's Fully.*CUDA only: distopt\.shard"
        ):
            act()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(distopt.RegistrationError, match=r"needs process_group=, the ranks with the same shard"):
        distopt.register(model, REDUCER)
    assert distopt.register(model, REDUCER, process_group=dist.group.WORLD).stats().steps == 0
    with pytest.raises(distopt.RegistrationError, match=r"FullyShardedDataParallel: give shard the model inside it"):
        distopt.shard(model, "0")


@pytest.mark.usefixtures("alone")
def test_async_pipe():
    pipe = AsyncPipe.__new__(AsyncPipe)  # to build one takes RPC
    nn.Module.__init__(pipe)
    for act in (lambda: distopt.register(pipe, REDUCER), lambda: distopt.shard(nn.Sequential(pipe, nn.ReLU()), "1")):
        with pytest.raises(distopt.RegistrationError, match=r"AsyncPipe, which needs RPC .*: use distopt\.pipeline"):
            act()


@pytest.mark.usefixtures("alone")
def test_what_sharded_ddp_is_told(monkeypatch):
    model, _, registration = registered(REDUCER)
    with pytest.raises(distopt.RegistrationError, match="registered already"):
        distopt.register(model, REDUCER)
    with pytest.raises(distopt.RegistrationError, match=r"accumulate=True is for lists of parameters"):
        distopt.register(sharded()[0], REDUCER, accumulate=True)
    for act in (registration.reduce, model.reduce):
        with pytest.raises(distopt.RegistrationError, match="nothing to call"):
            act()
    with pytest.raises(distopt.RegistrationError, match=r"call the OSS optimizer's clip_grad_norm"):
        registration.clip_grad_norm_(1.0)
    model(batch(0, 0)).sum().backward()
    with pytest.raises(distopt.RegistrationError, match="call the wrapped model"):
        model.module(batch(0, 0)).sum().backward()
    with pytest.raises(distopt.RegistrationError, match=r"ShardedDataParallel: give shard the model inside it"):
        distopt.shard(sharded()[0], "module")
    with pytest.raises(distopt.RegistrationError, match=r"distopt\.Cast\(torch\.float16\)"):
        distopt.register(sharded(reduce_buffer_size=0, reduce_fp16=True)[0], REDUCER)
    both = nn.ModuleList([mlp(2), mlp(2)])
    with pytest.raises(distopt.RegistrationError, match="has a parameter that the model has not"):
        distopt.register(ShardedDataParallel(both[0], oss(both)), REDUCER)
    monkeypatch.setattr("importlib.metadata.version", lambda name: "0.4.6")
    with pytest.raises(distopt.RegistrationError, match=r"fairscale 0\.4\.6 .*: pip install distopt\[fairscale\]"):
        distopt.register(sharded()[0], REDUCER)
