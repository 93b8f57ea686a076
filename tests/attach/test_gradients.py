"""A plain list of parameters, reduced when ``backward`` is over: what DDP does, without its wrapper."""

import math

import pytest
import torch
import torch.distributed as dist
from torch import nn

import distopt
from tests.attach.models import batch, gradients, mlp, same, wrap
from tests.attach.test_ddp import Odd
from tests.processes import run_ranks


def named_gradients(model):
    """Copies of all gradients by name, of a bare model."""
    return {n: None if p.grad is None else p.grad.detach().clone() for n, p in model.named_parameters()}


def as_ddp_job(rank, reducer):
    """Differences from DDP with the same reducer, over five steps, and their figures."""
    ddp, bare = wrap(mlp(dtype=torch.float64), 10000), mlp(dtype=torch.float64)
    registrations = distopt.register(ddp, reducer), distopt.register(bare.named_parameters(), reducer)
    error = 0.0
    for step in range(5):
        x = batch(rank, step, dtype=torch.float64)
        ddp(x).square().mean().backward()
        bare(x).square().mean().backward()
        assert registrations[1].reduce()
        left, right = gradients(ddp), named_gradients(bare)
        error = max(error, *(float((left[n] - right[n]).abs().max()) for n in left))
        for model in (ddp, bare):
            with torch.no_grad():
                for p in model.parameters():
                    p.sub_(p.grad, alpha=0.05)
                    p.grad = None
    first, second = (registration.stats() for registration in registrations)
    registrations[1].check_replicas()
    presence = 5 * 4 * len(list(bare.parameters()))
    return error, first.bytes_uncompressed == second.bytes_uncompressed, second.bytes_sent - first.bytes_sent - presence


@pytest.mark.parametrize("reducer", [distopt.AllReduce(), distopt.PowerSGD(rank=2), distopt.TopK(0.1)], ids=str)
def test_it_does_what_ddp_does(reducer):
    """And sends as much, but for one number a parameter that tells whether it has a gradient."""
    for error, same_bytes, more in run_ranks(3, as_ddp_job, reducer):
        assert error < 1e-9
        assert same_bytes
        assert more == 0


def mean_job(rank, world):
    bare = mlp()
    registration = distopt.register(list(bare.parameters()), distopt.AllReduce())
    bare(batch(rank, 0)).square().mean().backward()
    registration.reduce()
    every = []
    for other in range(world):
        model = mlp()
        model(batch(other, 0)).square().mean().backward()
        every.append([p.grad for p in model.parameters()])
    means = [sum(g[i] * (1.0 / world) for g in every) for i in range(len(every[0]))]
    return all(torch.equal(p.grad, mean) for p, mean in zip(bare.parameters(), means, strict=True))


@pytest.mark.parametrize("world", [1, 2])
def test_all_reduce_gives_the_mean_bit_for_bit(world):
    assert all(run_ranks(world, mean_job, world))


def legal_job(rank, reducer, dtype):
    """All that a model may hold; ``sometimes`` has a gradient on rank 0 alone at odd steps, ``unused`` nowhere."""
    model = Odd(dtype)
    registration = distopt.register(model.named_parameters(), reducer)
    finite, waited = True, True
    for step in range(4):
        if step == 3:
            before = dict(registration.stats().residual_norm)
        used = step < 2 and (rank == 0 or step == 0)
        model(0.1 * batch(rank, step, 24, dtype), used).backward()
        registration.reduce()
        now = named_gradients(model)
        assert (now["sometimes.weight"] is not None) == (step < 2)
        assert now["unused.weight"] is None
        assert now["frozen"] is None
        finite &= all(bool(g.isfinite().all()) for g in now.values() if g is not None)
        assert all(p.grad is None or p.grad.stride() == torch.empty_like(p).stride() for p in model.parameters())
        copies = [torch.cat([g.double().flatten() for g in now.values() if g is not None]) for _ in range(2)]
        dist.broadcast(copies[0], 0)
        assert torch.equal(*copies)
        model.zero_grad()
    after = registration.stats().residual_norm
    if "sometimes.weight" in after:
        waited = after["sometimes.weight"] == before["sometimes.weight"]
    return finite, waited, registration.stats().skipped_steps


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("reducer", [distopt.AllReduce(), distopt.PowerSGD(rank=2)], ids=["AllReduce", "PowerSGD"])
def test_all_that_a_model_may_legally_hold(reducer, dtype):
    """0-dimensional, empty, transposed, frozen, channels-last parameters, and such without a gradient on some ranks."""
    assert run_ranks(2, legal_job, reducer, dtype) == [(True, True, 0)] * 2


def complex_job(rank, reducer):
    torch.manual_seed(0)
    layers = [nn.Linear(40, 40).to(torch.complex64), nn.Linear(40, 40)]
    parameters = [(f"{i}.{n}", p) for i, layer in enumerate(layers) for n, p in layer.named_parameters()]
    registration = distopt.register(parameters, reducer)
    for _, p in parameters:
        p.grad = torch.full_like(p, 1 + rank) * (2j if p.is_complex() else 1)
    layers[0].weight.grad = layers[0].weight.grad.t().contiguous().t()
    registration.reduce()
    return [p.grad for _, p in parameters]


@pytest.mark.parametrize(
    "reducer", [distopt.AllReduce(), distopt.PowerSGD(rank=1), distopt.TopK(0.5), distopt.Sign()], ids=str
)
def test_complex_gradients_are_averaged_whole(reducer):
    for result in run_ranks(2, complex_job, reducer):
        for gradient in result[:2]:
            assert torch.equal(gradient, torch.full_like(gradient, 3j))
        assert not result[2].is_complex()


def non_finite_job(rank, reducer, bad):
    """A run with a bad gradient on one rank against the run that leaves the step out."""
    model, control = mlp(3), mlp(3)
    pairs = [(m, distopt.register(m.named_parameters(), reducer)) for m in (model, control)]
    for step in range(4):
        for which, (bare, registration) in enumerate(pairs):
            if step == 2 and which == 1:
                continue
            bare(batch(rank, step)).square().mean().backward()
            if step == 2 and rank == 1:
                bare[1].weight.grad[0, 0] = bad
            taken = registration.reduce()
            assert taken == (step != 2)
            with torch.no_grad():
                for p in bare.parameters():
                    assert bool(p.grad.isfinite().all()) == taken
                    assert bool(p.grad.isnan().all()) == (not taken)
                    if taken:
                        p.sub_(p.grad, alpha=0.05)
                    p.grad = None
    states = [registration.state_dict() for _, registration in pairs]
    kept = all(same(states[0][kind], states[1][kind]) for kind in ("residuals", "factors"))
    equal = all(torch.equal(p, q) for p, q in zip(model.parameters(), control.parameters(), strict=True))
    return kept, equal, pairs[0][1].stats().skipped_steps


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("reducer", [distopt.AllReduce(), distopt.PowerSGD(rank=2)], ids=["AllReduce", "PowerSGD"])
def test_a_non_finite_gradient_costs_one_step(reducer, bad):
    assert run_ranks(2, non_finite_job, reducer, bad) == [(True, True, 1)] * 2


def resume_job(rank, reducer):
    """Save in the middle, go on in a new registration of a new model."""
    model = mlp(3)
    registration = distopt.register(model.named_parameters(), reducer)

    def steps(bare, registered, which):
        for step in which:
            bare(batch(rank, step)).square().mean().backward()
            registered.reduce()
            with torch.no_grad():
                for p in bare.parameters():
                    p.sub_(p.grad, alpha=0.05)
                    p.grad = None

    steps(model, registration, range(3))
    state = registration.state_dict()
    again = mlp(3)
    again.load_state_dict(model.state_dict())
    resumed = distopt.register(again.named_parameters(), reducer)
    resumed.load_state_dict(state)
    steps(model, registration, range(3, 6))
    steps(again, resumed, range(3, 6))
    equal = all(torch.equal(p, q) for p, q in zip(model.parameters(), again.parameters(), strict=True))
    return equal, registration.stats() == resumed.stats()


@pytest.mark.parametrize("reducer", [distopt.PowerSGD(rank=2), distopt.TopK(0.1)], ids=str)
def test_it_resumes_bit_for_bit(reducer):
    assert run_ranks(3, resume_job, reducer) == [(True, True)] * 3


@pytest.mark.usefixtures("alone")
def test_sparse_gradients_are_refused_by_name():
    words = nn.Embedding(9, 4, sparse=True)
    registration = distopt.register([("words.weight", words.weight)], distopt.AllReduce())
    words(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(distopt.RegistrationError, match=r"the gradient of 'words\.weight' is sparse"):
        registration.reduce()


@pytest.mark.usefixtures("alone")
def test_nothing_to_reduce_is_a_step():
    registration = distopt.register(mlp(2).parameters(), distopt.PowerSGD(rank=2))
    assert registration.reduce()
    assert registration.stats().steps == 1


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ([], "there is no parameter to register"),
        ([3], "item 0 is a int, but must be a parameter or"),
        ([("a", nn.Parameter(torch.ones(2))), ("a", nn.Parameter(torch.ones(2)))], "'a' is there twice"),
        ([("a", p := nn.Parameter(torch.ones(2))), ("b", p)], "'a' is there twice"),
        (nn.Parameter(torch.ones(2)), "needs a list of parameters, but was given one tensor"),
        ([nn.Parameter(torch.ones(2)) * 2], "'0' is computed from others: it has no gradient of its own"),
        (nn.LazyLinear(2).named_parameters(), "'weight' has no shape yet"),
    ],
    ids=["none", "numbers", "name", "parameter", "tensor", "product", "lazy"],
)
def test_what_is_no_list_of_parameters(parameters, message):
    with pytest.raises(distopt.RegistrationError, match=message):
        distopt.register(parameters, distopt.AllReduce())


@pytest.mark.usefixtures("alone")
def test_parameters_without_names_are_called_by_their_place():
    model = mlp(2)
    registration = distopt.register(model.parameters(), distopt.PowerSGD(rank=2))
    model(batch(0, 0)).sum().backward()
    registration.reduce()
    assert list(registration.stats().residual_norm) == ["0", "2"]
