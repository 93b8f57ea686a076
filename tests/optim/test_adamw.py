"""AdamW: equal to torch's in float32, close to it in 16 bits, in any unit; what is exempt; what is left alone."""

import copy
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from distopt.errors import DistoptError, SettingError
from distopt.optim import AdamW
from distopt.optim.pieces import _pool

SIXTEEN = ["bfloat16", "packed16"]
KINDS = ["float32", *SIXTEEN]
all_kinds = pytest.mark.parametrize("moments", KINDS)
sixteen_bits = pytest.mark.parametrize("moments", SIXTEEN)


def network(seed=0, dtype=torch.float32):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(20, 30), nn.Tanh(), nn.LayerNorm(30), nn.Linear(30, 5)).to(dtype)


def batch(dtype=torch.float32):
    g = torch.Generator().manual_seed(1)
    return torch.randn(64, 20, generator=g).to(dtype), torch.randn(64, 5, generator=g).to(dtype)


def train(model, optimizer, steps, dtype=torch.float32):
    inputs, targets = batch(dtype)
    for _ in range(steps):
        optimizer.zero_grad()
        loss = (model(inputs) - targets).square().mean()
        loss.backward()
        optimizer.step()
    return float(loss.detach())


def same(first, second):
    return all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


def fed(gradients, **settings):
    """A parameter of any shape after steps with these gradients, and its optimizer."""
    parameter = nn.Parameter(torch.zeros_like(gradients[0]))
    optimizer = AdamW([parameter], **{"lr": 1.0, "weight_decay": 0.0, **settings})
    for gradient in gradients:
        parameter.grad = gradient.clone()
        optimizer.step()
    return parameter, optimizer


def moments_of(optimizer):
    return optimizer.state_dict()["state"][0]


@given(
    seed=st.integers(0, 99),
    lr=st.sampled_from([1e-4, 1e-2, 0.3]),
    betas=st.sampled_from([(0.9, 0.999), (0.9, 0.96), (0.0, 0.5)]),
    weight_decay=st.sampled_from([0.0, 0.045]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_float32_is_torch_bit_for_bit(seed, lr, betas, weight_decay, dtype):
    ours, theirs = network(seed, dtype), network(seed, dtype)
    settings = {"lr": lr, "betas": betas, "weight_decay": weight_decay}
    train(ours, AdamW(ours.parameters(), **settings), 5, dtype)
    train(theirs, torch.optim.AdamW(theirs.parameters(), foreach=True, **settings), 5, dtype)
    assert same(ours, theirs)


@sixteen_bits
@pytest.mark.parametrize("beta2", [0.96, 0.999])
@pytest.mark.parametrize("seed", [0, 1])
def test_sixteen_bits_follow_float32(moments, beta2, seed):
    """Over 100 steps the loss falls by a factor of 100 or more, and ends within 5 % of float32's."""
    losses = []
    for kind in (moments, "float32"):
        model = network(seed)
        losses.append(train(model, AdamW(model.parameters(), lr=1e-2, betas=(0.9, beta2), moments=kind), 100))
    assert losses[1] < 0.05
    assert losses[0] == pytest.approx(losses[1], rel=0.05)


@sixteen_bits
@given(
    seed=st.integers(0, 99),
    betas=st.sampled_from([(0.9, 0.999), (0.5, 0.96)]),
    eps=st.sampled_from([1e-8, 0.3]),
    weight_decay=st.sampled_from([0.0, 0.3]),
)
def test_the_first_update_is_that_of_float32(moments, seed, betas, eps, weight_decay):
    """It is made before anything is rounded; and one from moments that 16 bits hold exactly is as well."""
    g = torch.Generator().manual_seed(seed)
    values, gradient = torch.randn(5, 7, generator=g), torch.randn(5, 7, generator=g)
    state = {"step": torch.tensor(3.0), "exp_avg": torch.full((5, 7), 0.5), "exp_avg_sq": torch.full((5, 7), 0.75)}
    for states in ({}, {0: state}):
        found = []
        for kind in (moments, "float32"):
            parameter = nn.Parameter(values.clone())
            settings = {"lr": 0.1, "betas": betas, "eps": eps, "weight_decay": weight_decay}
            optimizer = AdamW([parameter], moments=kind, **settings)
            optimizer.load_state_dict({**optimizer.state_dict(), "state": states})
            parameter.grad = gradient.clone()
            optimizer.step()
            found.append(parameter.detach())
        assert torch.allclose(*found, rtol=1e-5, atol=1e-6)


@sixteen_bits
@pytest.mark.parametrize("beta2", [0.96, 0.99, 0.999])
def test_the_variance_is_not_biased(moments, beta2):
    """The mean of gradients squared, for gradients of sizes over 22 binades that then fall 64-fold, beside float64."""
    g = torch.Generator().manual_seed(0)
    sizes = 2.0 ** (-22 * torch.rand(32, 128, generator=g))
    steps = int(1.5 / (1 - beta2))
    parameter = nn.Parameter(torch.zeros(32, 128))
    optimizer = AdamW([parameter], betas=(0.9, beta2), moments=moments, lr=0.0)
    exact = torch.zeros(32, 128, dtype=torch.float64)
    for step in range(2 * steps):
        parameter.grad = torch.randn(32, 128, generator=g) * sizes * (1 if step < steps else 2.0**-6)
        optimizer.step()
        exact = beta2 * exact + (1 - beta2) * parameter.grad.double().square()
        if step in (steps - 1, 2 * steps - 1):
            ratio = moments_of(optimizer)["exp_avg_sq"].double() / exact
            assert float(ratio.median()) == pytest.approx(1, abs=0.02)
            assert float(ratio.mean()) == pytest.approx(1, abs=0.01)


def test_nearest_rounding_would_be_stuck():
    """Why the rounding is stochastic: bfloat16 at 0.999 to nearest leaves the variance where it is."""
    variance = torch.ones(1000, dtype=torch.bfloat16)
    for _ in range(100):
        variance = (variance.float() * 0.999).to(torch.bfloat16)
    assert bool((variance == 1).all())
    start = {"step": torch.tensor(5.0), "exp_avg": torch.zeros(40, 25), "exp_avg_sq": torch.ones(40, 25)}
    parameter = nn.Parameter(torch.zeros(40, 25))
    optimizer = AdamW([parameter], moments="bfloat16")
    optimizer.load_state_dict({**optimizer.state_dict(), "state": {0: start}})
    parameter.grad = torch.zeros(40, 25)
    for _ in range(100):
        optimizer.step()
    assert float(moments_of(optimizer)["exp_avg_sq"].mean()) == pytest.approx(0.999**100, rel=0.01)


@all_kinds
@given(size=st.integers(-40, 20), seed=st.integers(0, 99))
def test_the_unit_of_the_gradient_does_not_matter(moments, size, seed):
    """From 1e-12 to 1e6, without eps; powers of two change no bit in 16 bits, as long as float32 holds the squares."""
    g = torch.Generator().manual_seed(seed)
    gradients = [torch.randn(6, 7, generator=g) for _ in range(5)]
    plain, _ = fed(gradients, moments=moments, eps=0.0)
    scaled, _ = fed([gradient * 2.0**size for gradient in gradients], moments=moments, eps=0.0)
    assert torch.equal(plain, scaled)


@sixteen_bits
@pytest.mark.parametrize("unit", [1e-12, 1e-6, 1.0, 1e6])
def test_gradients_of_any_size_move_parameters_alike(moments, unit):
    g = torch.Generator().manual_seed(3)
    gradients = [torch.randn(6, 7, generator=g) * unit for _ in range(20)]
    ours, _ = fed(gradients, moments=moments, eps=1e-30)
    exact, _ = fed(gradients, eps=1e-30)
    tolerance = {"bfloat16": 0.1, "packed16": 0.02}[moments]  # of 20 moves, each about 1 at most
    assert torch.allclose(ours, exact, rtol=0, atol=tolerance)


def test_small_gradients_beside_large_ones_move_no_more_than_they_should():
    """Sizes over 60 binades in one tensor: where the variance cannot be held, updates become smaller, not larger."""
    sizes = 2.0 ** -torch.arange(60.0).view(6, 10)
    g = torch.Generator().manual_seed(3)
    parameters = [nn.Parameter(torch.zeros(6, 10)) for _ in range(2)]
    ours, exact = (
        AdamW([p], lr=1.0, eps=0.0, weight_decay=0.0, moments=kind)
        for p, kind in zip(parameters, ("packed16", "float32"), strict=True)
    )
    for step in range(30):
        gradient = torch.randn(6, 10, generator=g) * sizes * (1e6 if step < 20 else 0.0)
        before = [parameter.detach().clone() for parameter in parameters]
        for parameter, optimizer in zip(parameters, (ours, exact), strict=True):
            parameter.grad = gradient.clone()
            optimizer.step()
        moved, right = (parameter.detach() - old for parameter, old in zip(parameters, before, strict=True))
        assert torch.allclose(moved.flatten()[:27], right.flatten()[:27], rtol=0.02, atol=0.01)
        assert bool((moved.abs() <= right.abs() * 1.02 + 0.01).all())


@all_kinds
def test_the_variance_is_clipped_before_it_is_used(moments):
    """DALL-E, B.2: in the update and in what is kept."""
    gradient = torch.full((4, 4), 100.0)
    parameter, optimizer = fed([gradient], moments=moments, max_variance=5, betas=(0.9, 0.96), eps=0.0)
    assert torch.allclose(moments_of(optimizer)["exp_avg_sq"], torch.full((4, 4), 5.0), rtol=2.0**-7)
    expected = -100.0 / (5 / (1 - 0.96)) ** 0.5
    assert torch.allclose(parameter, torch.full((4, 4), expected), rtol=1e-5)
    free, _ = fed([gradient], moments=moments, betas=(0.9, 0.96), eps=0.0)
    assert torch.allclose(free, torch.full((4, 4), -1.0), rtol=1e-5)


def test_a_clipped_spike_does_not_coarsen_the_others():
    """Variances far below the clip are kept as they are, however large the spike was."""
    quiet = torch.full((4, 4), 1e-8)
    spike = quiet.clone()
    spike[0, 0] = 1e9
    _, optimizer = fed([quiet] * 10 + [spike], moments="packed16", max_variance=5, betas=(0.9, 0.96))
    assert float(moments_of(optimizer)["exp_avg_sq"][1, 1]) == pytest.approx(1e-16 * (1 - 0.96**11), rel=0.01)


@sixteen_bits
def test_exempt_parameters_stay_in_float32(moments):
    model = nn.ModuleDict(
        {
            "embedding": nn.Embedding(9, 8),
            "body": nn.Linear(8, 8),
            "norm": nn.LayerNorm([2, 8]),
            "lm_head": nn.Linear(8, 9),
            "other": nn.Linear(8, 8, bias=False),
        }
    )
    names = [name for name, _ in model.named_parameters()]
    named = [(name, p) for name, p in model.named_parameters() if not name.startswith("other")]
    last = {"params": [("other.weight", model["other"].weight)], "moments": "float32"}
    optimizer = AdamW([{"params": named}, last], moments=moments)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    reduced = {n for n, p in model.named_parameters() if optimizer.state[p]["exp_avg"].dtype != torch.float32}
    assert reduced == {"body.weight"}
    assert len(names) == len(optimizer.state)


@all_kinds
def test_bytes_of_moments(moments):
    parameter, bias = nn.Parameter(torch.zeros(512, 512)), nn.Parameter(torch.zeros(512))
    optimizer = AdamW([parameter, bias], moments=moments)
    assert optimizer.moment_bytes() == 0
    for each in (parameter, bias):
        each.grad = torch.ones_like(each)
    optimizer.step()
    tensors = [t for state in optimizer.state.values() for name, t in state.items() if name != "step"]
    allocated = sum(tensor.untyped_storage().nbytes() for tensor in tensors)
    assert optimizer.moment_bytes() * (512 * 512 + 512) == allocated
    assert optimizer.moment_bytes(exempt=False) == pytest.approx({"float32": 0}.get(moments, 4), rel=1e-3)


@all_kinds
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_parameters_of_other_dtypes(moments, dtype):
    """16-bit parameters are updated in float32 with moments of full precision; float64 keeps its own where it can."""
    wide = torch.promote_types(dtype, torch.float32)
    model, twin = network(dtype=dtype), network(dtype=dtype).to(wide)
    optimizer = AdamW(model.parameters(), lr=1e-2, moments=moments)
    other = AdamW(twin.parameters(), lr=1e-2, moments=moments)
    for step in range(10):
        for p, q in zip(model.parameters(), twin.parameters(), strict=True):
            q.data.copy_(p.data)
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(step)).to(dtype)
            q.grad = p.grad.to(wide)
        optimizer.step()
        other.step()
        assert all(torch.equal(p, q.to(dtype)) for p, q in zip(model.parameters(), twin.parameters(), strict=True))
    dtypes = {state["exp_avg"].dtype for state in optimizer.state.values()}
    assert dtypes <= {wide, torch.int16, torch.bfloat16}
    assert wide in dtypes


@all_kinds
def test_float32_gradients_of_16_bit_parameters(moments):
    """`Tensor.grad_dtype`: gradients below float16's range are used as they are."""
    parameter = nn.Parameter(torch.ones(3, 4, dtype=torch.float16))
    parameter.grad_dtype = torch.float32
    parameter.grad = torch.full((3, 4), 1e-12)
    AdamW([parameter], lr=0.25, weight_decay=0.0, eps=0.0, moments=moments).step()
    assert torch.equal(parameter, torch.full((3, 4), 0.75, dtype=torch.float16))


@all_kinds
def test_a_found_infinity_changes_nothing(moments):
    model = network()
    optimizer = AdamW(model.parameters(), moments=moments)
    train(model, optimizer, 2)
    before, state = copy.deepcopy(model), copy.deepcopy(optimizer.state_dict()["state"])
    for parameter in model.parameters():
        parameter.grad.fill_(float("inf"))
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(8.0), torch.tensor(1.0)
    optimizer.step()
    assert same(model, before)
    for index, kept in optimizer.state_dict()["state"].items():
        assert all(torch.equal(value, state[index][name]) for name, value in kept.items())
    del optimizer.grad_scale, optimizer.found_inf
    assert train(model, optimizer, 1) == train(before, _with_state(before, state, moments), 1)
    assert same(model, before)


def _with_state(model, state, moments):
    optimizer = AdamW(model.parameters(), moments=moments)
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
    return optimizer


@all_kinds
@pytest.mark.parametrize("unscale", [False, True], ids=["in the step", "before"])
def test_under_a_gradient_scaler(moments, unscale):
    """Scaled gradients give the same bits as plain ones, an overflow skips the step, and the scale falls."""
    model, plain = network(), network()
    optimizer, other = (AdamW(each.parameters(), moments=moments) for each in (model, plain))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    inputs, targets = batch()
    for step in range(4):
        for each in (optimizer, other):
            each.zero_grad()
        scaler.scale((model(inputs) - targets).square().mean()).backward()
        (plain(inputs) - targets).square().mean().backward()
        if step == 1:
            model[0].weight.grad[0, 0] = float("inf")
        else:
            other.step()
        if unscale:
            scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        assert same(model, plain)
    assert scaler.get_scale() == 2.0**9


def test_a_gradient_scaler_and_16_bit_gradients():
    """What is unscaled in the step may be smaller than float16 can hold."""
    parameter = nn.Parameter(torch.ones(3, 4, dtype=torch.float16))
    optimizer = AdamW([parameter], lr=0.25, weight_decay=0.0, eps=0.0, moments="packed16")
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**24)
    parameter.grad = torch.full((3, 4), 2.0**-10, dtype=torch.float16)
    scaler.scale(torch.ones(()))
    scaler.step(optimizer)
    assert torch.equal(parameter, torch.full((3, 4), 0.75, dtype=torch.float16))
    assert float(moments_of(optimizer)["exp_avg"][0, 0]) == pytest.approx(0.1 * 2.0**-34, rel=1e-2)


@all_kinds
def test_empty_scalar_and_unused_parameters(moments):
    shapes = [(), (0,), (3, 0, 4), (1, 5), (4, 5)]
    parameters = [nn.Parameter(torch.ones(shape)) for shape in shapes]
    idle = nn.Parameter(torch.ones(4, 5))
    optimizer = AdamW([*parameters, idle], lr=0.5, weight_decay=0.0, moments=moments)
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    for parameter in parameters:
        assert torch.allclose(parameter, torch.full_like(parameter, 0.5))
    assert torch.equal(idle, torch.ones(4, 5))
    assert idle not in optimizer.state
    optimizer.load_state_dict(optimizer.state_dict())
    optimizer.step()


@sixteen_bits
def test_what_has_no_gradient_in_a_row_stays_exactly_where_it_is(moments):
    gradient = torch.randn(8, 8, generator=torch.Generator().manual_seed(0))
    gradient[3] = 0
    parameter, _ = fed([gradient] * 10, moments=moments)
    assert torch.equal(parameter[3], torch.zeros(8))
    assert bool((parameter[4] != 0).all())


@sixteen_bits
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_is_not_hidden(moments, bad):
    gradient = torch.ones(4, 4)
    gradient[1, 1] = bad
    parameter, _ = fed([gradient, torch.ones(4, 4)], moments=moments)
    assert bool(parameter[1, 1].isnan())


@all_kinds
@pytest.mark.parametrize("layout", ["transposed", "channels_last", "gaps"])
def test_the_layout_of_a_parameter_does_not_matter(moments, layout):
    base = torch.randn(4, 6, 5, 8, generator=torch.Generator().manual_seed(0))
    changed = {
        "transposed": lambda: base.clone().transpose(0, 1),
        "channels_last": lambda: base.to(memory_format=torch.channels_last),
        "gaps": lambda: base.clone()[:, ::2],
    }[layout]
    parameter, plain = nn.Parameter(changed()), nn.Parameter(changed().contiguous())
    optimizers = [AdamW([each], moments=moments, lr=0.1) for each in (parameter, plain)]
    for step in range(3):
        plain.grad = torch.randn(plain.shape, generator=torch.Generator().manual_seed(step))
        parameter.grad = plain.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    assert torch.allclose(parameter, plain, rtol=0.01, atol=0.01)
    if layout == "gaps":
        assert torch.equal(parameter, plain)


def test_the_seed_decides_the_rounding_alone():
    gradients = [torch.randn(30, 40, generator=torch.Generator().manual_seed(step)) for step in range(5)]
    torch.manual_seed(0)
    first, _ = fed(gradients, moments="packed16")
    state = torch.random.get_rng_state()
    torch.manual_seed(5)
    second, _ = fed(gradients, moments="packed16")
    other, _ = fed(gradients, moments="packed16", seed=1)
    assert torch.equal(first, second)
    assert not torch.equal(first, other)
    torch.manual_seed(0)
    fed(gradients, moments="packed16")
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize("groups", [False, True], ids=["one group", "two groups"])
def test_parameters_are_rounded_independently(groups):
    """Those of different groups too: the number counts through."""
    parameters = [nn.Parameter(torch.zeros(30, 40)) for _ in range(2)]
    optimizer = AdamW([{"params": [p]} for p in parameters] if groups else parameters, moments="packed16")
    for parameter in parameters:
        parameter.grad = torch.randn(30, 40, generator=torch.Generator().manual_seed(0))
    optimizer.step()
    first, second = (optimizer.state_dict()["state"][index] for index in range(2))
    assert torch.allclose(first["exp_avg"], second["exp_avg"], rtol=2.0**-8)
    assert not torch.equal(first["exp_avg"], second["exp_avg"])
    assert not torch.equal(first["exp_avg_sq"], second["exp_avg_sq"])


def test_closures():
    model, plain = network(), network()
    optimizer, other = AdamW(model.parameters()), AdamW(plain.parameters())
    inputs, targets = batch()

    def closure():
        optimizer.zero_grad()
        loss = (model(inputs) - targets).square().mean()
        loss.backward()
        return loss.detach()

    assert float(optimizer.step(closure)) == train(plain, other, 1)
    assert same(model, plain)


class Reads(TorchDispatchMode):
    """Counts what the host reads from tensors, but for the steps, which are on the CPU always."""

    def __init__(self, allowed):
        super().__init__()
        self.allowed, self.count = {tensor.data_ptr() for tensor in allowed}, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if "_local_scalar_dense" in str(func) or "nonzero" in str(func):
            self.count += args[0].data_ptr() not in self.allowed
        return func(*args, **(kwargs or {}))


@all_kinds
def test_a_step_reads_nothing_back(moments):
    model = network()
    optimizer = AdamW(model.named_parameters(), moments=moments, max_variance=5)
    train(model, optimizer, 1)
    with Reads(state["step"] for state in optimizer.state.values()) as reads:
        optimizer.step()
    assert reads.count == 0


@all_kinds
def test_defaults_of_torch_do_not_matter(moments):
    """Neither the default device nor the default dtype."""
    model, plain = network(), network()
    optimizer, other = AdamW(model.parameters(), moments=moments), AdamW(plain.parameters(), moments=moments)
    for parameter, twin in zip(model.parameters(), plain.parameters(), strict=True):
        parameter.grad, twin.grad = torch.ones_like(parameter), torch.ones_like(twin)
    other.step()
    _pool.cache_clear()
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            optimizer.step()
            optimizer.load_state_dict(optimizer.state_dict())
    finally:
        torch.set_default_dtype(torch.float32)
    assert same(model, plain)
    dtypes = {value.dtype for state in optimizer.state_dict()["state"].values() for value in state.values()}
    assert dtypes == {torch.float32}


def test_refusals():
    model = network()
    for field, settings in {
        "lr": {"lr": -1.0},
        "betas": {"betas": 0.9},
        r"betas\[1\]": {"betas": (0.9, 1.0)},
        "eps": {"eps": float("nan")},
        "weight_decay": {"weight_decay": "much"},
        "moments": {"moments": "float16"},
        "max_variance": {"max_variance": 0.0},
    }.items():
        with pytest.raises(SettingError, match=f"AdamW.{field} is"):
            AdamW(model.parameters(), **settings)
        with pytest.raises(SettingError, match=f"AdamW.{field} is"):
            AdamW([{"params": list(model.parameters()), **settings}])
    with pytest.raises(SettingError, match=r"AdamW.params is torch.complex64"):
        AdamW([nn.Parameter(torch.ones(3, 4, dtype=torch.complex64))])


def test_sparse_gradients_are_refused_by_name_before_anything_changes():
    table = nn.Embedding(5, 4, sparse=True)
    other = nn.Parameter(torch.ones(4, 4))
    for named, what in ((True, "'table'"), (False, "number 1")):
        pairs = [("other", other), ("table", table.weight)]
        optimizer = AdamW(pairs if named else [p for _, p in pairs])
        (table(torch.tensor([1])).sum() + other.sum()).backward()
        with pytest.raises(DistoptError, match=f"parameter {what} is sparse"):
            optimizer.step()
        assert not optimizer.state
        assert torch.equal(other, torch.ones(4, 4))


@all_kinds
def test_copies_and_pickles_go_on_alike(moments):
    model = network()
    optimizer = AdamW(model.parameters(), moments=moments, seed=7)
    train(model, optimizer, 2)
    copies = []
    for again, other in (copy.deepcopy((model, optimizer)), pickle.loads(pickle.dumps((model, optimizer)))):
        train(again, other, 3)
        copies.append(again)
    train(model, optimizer, 3)
    assert all(same(again, model) for again in copies)


def test_it_works_under_a_scheduler_of_torch():
    model = network()
    optimizer = AdamW(model.parameters(), lr=1.0)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    train(model, optimizer, 1)
    scheduler.step()
    assert optimizer.param_groups[0]["lr"] == 0.5
