"""Scales do not change gradients; overflows stay where they are, skip a step, and lower one scale."""

import copy
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import distopt
from distopt.scaling import HeadroomPolicy, PaperPolicy, in_float32, to_16bit
from tests.scaling.networks import WIDTH, Branch, Residual, batch, loss_of, relative_error

SIXTEEN = 2e-3
"""Relative error of a gradient that went through float16."""


def backward(model, scaler, x, parts=1):
    for part in x.chunk(parts):
        scaler.scale(loss_of(model, part) / parts).backward()


def reference_of(model, x):
    reference = copy.deepcopy(model)
    loss_of(reference, x).backward()
    return reference


def fixed(log2):
    """A policy whose scales stay."""
    return PaperPolicy(initial=log2, growth=0.0, low=-60.0, high=60.0)


def set_scales(scaler, log2):
    state = scaler.state_dict()
    for block, value in zip(state["blocks"].values(), log2, strict=True):
        block["log2"] = value
    scaler.load_state_dict(state)


# --- what gradients are


@given(st.lists(st.floats(-20, 29), min_size=4, max_size=4), st.sampled_from([torch.float32, torch.float64]))
def test_scales_leave_every_bit_of_a_gradient(log2, dtype):
    model = Residual().to(dtype)
    x = batch().to(dtype)
    reference = reference_of(model, x)
    scaler = distopt.ResblockScaler(model.branches, dtype=torch.float32, preset=fixed(0.0))
    set_scales(scaler, log2)
    backward(model, scaler, x)
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(model.parameters(), reference.parameters(), strict=True))


@given(st.integers(0, 15), st.booleans())
def test_float16_branches_differ_by_rounding(log2, own_autocast):
    model, x = Residual(), batch()
    reference = reference_of(model, x)
    scaler = distopt.ResblockScaler(model.branches, preset=fixed(float(log2)))
    with torch.autocast("cpu", torch.float16, enabled=own_autocast):
        loss = (model(x).float() - 1).square().mean()
    scaler.scale(loss).backward()
    assert relative_error(model, reference) < (SIXTEEN if not own_autocast else 5e-3)


def test_where_float16_underflows_the_scale_does_not():
    """A loss of 2**-24: the branches' gradients are out of float16's range without a scale."""
    errors = {}
    for log2 in (0.0, 24.0):
        model, x = Residual(), batch()
        reference = reference_of(model, x)
        scaler = distopt.ResblockScaler(model.branches, preset=fixed(log2))
        (scaler.scale(loss_of(model, x)) * 2.0**-24).backward()
        for parameter in model.parameters():
            parameter.grad *= 2.0**24
        errors[log2] = relative_error(model, reference)
    assert errors[24.0] < SIXTEEN
    assert errors[0.0] > 0.3


def test_bfloat16_branches():
    model, x = Residual(), batch()
    reference = reference_of(model, x)
    scaler = distopt.ResblockScaler(model.branches, dtype=torch.bfloat16)
    backward(model, scaler, x)
    assert relative_error(model, reference) < 2e-2


def test_branches_run_in_16_bits_and_the_stream_does_not():
    seen = {}
    model = Residual(depth=1)
    branch = model.branches[0]
    branch.up.register_forward_hook(lambda module, inputs, output: seen.update(inside=output.dtype))
    branch.register_forward_hook(lambda module, inputs, output: seen.update(stream=(inputs[0].dtype, output.dtype)))
    distopt.ResblockScaler(model.branches)
    model(batch())
    assert seen == {"inside": torch.float16, "stream": (torch.float32, torch.float32)}


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(reentrant):
    model, x = Residual(), batch()
    reference = reference_of(model, x)
    scaler = distopt.ResblockScaler(model.branches)
    hidden = model.inlet(x)
    for branch in model.branches:
        hidden = hidden + checkpoint(branch, hidden, use_reentrant=reentrant)
    scaler.scale((model.head(hidden) - 1).square().mean()).backward()
    assert relative_error(model, reference) < SIXTEEN


def test_accumulation_with_scales_that_change_in_between():
    model, x = Residual(), batch()
    reference = reference_of(model, x)
    scaler = distopt.ResblockScaler(model.branches)
    for part, log2 in zip(x.chunk(2), (3.0, 14.0), strict=True):
        set_scales(scaler, [log2] * 4)
        scaler.scale(loss_of(model, part) / 2).backward()
    assert relative_error(model, reference) < SIXTEEN


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_models(backend):
    model, x = Residual(depth=2), batch()
    reference = reference_of(model, x)
    scaler = distopt.ResblockScaler(model.branches, preset=PaperPolicy(initial=10.0, growth=1.0))
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    for stance in ("default", "fail_on_recompile", "fail_on_recompile"):
        optimizer.zero_grad()
        with torch.compiler.set_stance(stance):  # scales that change are read anew by what is compiled
            scaler.scale(loss_of(compiled, x)).backward()
        assert relative_error(model, reference) < SIXTEEN
        scaler.step(optimizer)
        scaler.update()
    assert set(scaler.scales().values()) == {2.0**13}
    set_scales(scaler, [10.0, 24.0])
    scaler.scale(loss_of(compiled, x)).backward()
    scaler.step(optimizer)
    scaler.update()
    assert [block.skips for block in scaler.stats().blocks.values()] == [0, 1]


def test_chains_tuples_and_keywords():
    """A branch of several modules that are called with anything, and return anything."""

    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.mix = nn.Linear(WIDTH, WIDTH)

        def forward(self, x, *, context, mask=None):
            return {"out": (self.mix(x) + self.mix(context),), "mask": mask, "weights": None}

    norm, attention, out = nn.LayerNorm(WIDTH), Attention(), nn.Linear(WIDTH, WIDTH)

    def run(x, context):
        mixed = attention(norm(x), context=context, mask=torch.ones(3, dtype=torch.int64))["out"][0]
        return (x + out(mixed)).square().mean()

    wanted, found = [], []
    for results in (wanted, found):
        x, context = batch(1).requires_grad_(), batch(2).requires_grad_()
        if results is found:
            distopt.ResblockScaler({"attention": (norm, attention, out)}, preset=fixed(10.0))
        run(x, context).backward()
        results += [x.grad, *(p.grad.clone() for m in (norm, attention, out) for p in m.parameters())]
        if results is wanted:
            results.append(context.grad)
            for module in (norm, attention, out):
                module.zero_grad()
    # What comes into the middle of a chain beside its first module carries the scale: a branch has one entrance.
    torch.testing.assert_close(found, wanted[:-1], rtol=1e-2, atol=1e-4)


def test_several_inputs_of_one_branch_are_all_unscaled():
    bilinear = nn.Bilinear(WIDTH, WIDTH, WIDTH)
    x, y = batch(1).requires_grad_(), batch(2).requires_grad_()
    wanted = torch.autograd.grad((x + bilinear(x, y)).square().mean(), (x, y))
    distopt.ResblockScaler([bilinear], preset=fixed(10.0))
    found = torch.autograd.grad((x + bilinear(x, y)).square().mean(), (x, y))
    torch.testing.assert_close(found, wanted, rtol=1e-2, atol=1e-4)


# --- what overflows


def overflow(which, log2=10.0, policy=None):
    """One step of a model whose branch number ``which`` overflows."""
    model, x = Residual(), batch()
    scaler = distopt.ResblockScaler(model.branches, preset=policy or fixed(log2))
    model.branches[which].amplify = 2.0**20
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = copy.deepcopy(model.state_dict())
    backward(model, scaler, x)
    inlet = model.inlet.weight.grad.clone()
    scaler.step(optimizer)
    changed = any(not torch.equal(a, b) for a, b in zip(before.values(), model.state_dict().values(), strict=True))
    scaler.update()
    return scaler, changed, inlet


@pytest.mark.parametrize("which", range(4))
def test_only_the_guilty_branch_backs_off_and_the_step_is_skipped(which):
    scaler, changed, inlet = overflow(which, policy=PaperPolicy(initial=10.0))
    assert not changed
    assert scaler.skipped
    assert torch.isfinite(inlet).all()  # filtered: nothing of it reached the layers before
    octaves = [math.log2(scale) for scale in scaler.scales().values()]
    assert octaves == pytest.approx([9.5 if i == which else 10.001 for i in range(4)])
    assert [block.skips for block in scaler.stats().blocks.values()] == [int(i == which) for i in range(4)]
    assert scaler.stats().skipped_steps == 1


def test_the_default_recovers_at_once():
    scaler, _, _ = overflow(1, policy=HeadroomPolicy(initial=10.0))
    assert math.log2(scaler.scales()["1"]) == 9.0


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_blames_nobody(bad):
    model = Residual()
    scaler = distopt.ResblockScaler(model.branches)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = scaler.scales()
    scaler.scale(loss_of(model, batch()) * bad).backward()
    scaler.step(optimizer)
    scaler.update()
    assert scaler.scales() == before
    assert scaler.stats().skipped_steps == 1
    assert all(torch.isfinite(p).all() for p in model.parameters())
    assert all(block.skips == 0 for block in scaler.stats().blocks.values())


@pytest.mark.parametrize("preset", ["paper", "default"])
def test_activations_that_overflow_blame_nobody(preset):
    """Weights so large that branch 1 overflows in forward: all gradients behind are bad, and no scale can help."""
    model = Residual()
    scaler = distopt.ResblockScaler(model.branches, preset=preset)
    with torch.no_grad():
        model.branches[1].down.weight.fill_(60000.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = scaler.scales()
    backward(model, scaler, batch())
    scaler.step(optimizer)
    scaler.update()
    assert scaler.skipped
    assert scaler.scales() == before
    assert all(block.skips == 0 for block in scaler.stats().blocks.values())


def test_a_bad_number_in_the_stream_s_gradient_stays_out_of_the_branches():
    model = Residual()
    scaler = distopt.ResblockScaler(model.branches)

    def spoil(gradient):
        gradient = gradient.clone()
        gradient[0, 0] = math.nan
        return gradient

    model.branches[3].register_forward_hook(lambda module, inputs, output: output.register_hook(spoil) and None)
    backward(model, scaler, batch())
    assert all(torch.isfinite(p.grad).all() for p in model.branches.parameters())


def test_a_gradient_outside_of_all_branches_that_is_not_finite():
    model = Residual()
    scaler = distopt.ResblockScaler(model.branches)
    model.head.weight.register_hook(lambda gradient: gradient * math.nan)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    backward(model, scaler, batch())
    scaler.step(optimizer)
    scaler.update()
    assert scaler.skipped
    assert all(block.skips == 0 for block in scaler.stats().blocks.values())


def test_a_branch_that_always_overflows_is_an_error_that_names_it():
    model, x = Residual(depth=2), batch()
    scaler = distopt.ResblockScaler(model.branches, preset=PaperPolicy(initial=7.0, window=1), measure_every=50)
    model.branches[1].amplify = math.inf
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def train():
        for _ in range(1000):
            backward(model, scaler, x)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()

    with pytest.raises(distopt.ScaleError, match=r"gradients of '1' were not finite in each of the last 200 .* 2\^7:"):
        train()


# --- the loop


def test_an_unmodified_grad_scaler_loop():
    """The same lines for both; with float32 branches the same numbers, overflow included."""
    weights = {}
    for kind in ("torch", "ours"):
        model = Residual()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        if kind == "torch":
            scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
        else:
            scaler = distopt.ResblockScaler(model.branches, dtype=torch.float32)
        for step in range(6):
            optimizer.zero_grad()
            model.branches[2].amplify = math.inf if step == 2 else 1.0
            scaler.scale(loss_of(model, batch(step))).backward()
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            scaler.step(optimizer)
            scaler.update()
            scaler.get_scale()
        weights[kind] = copy.deepcopy(model.state_dict())
    torch.testing.assert_close(weights["ours"], weights["torch"])


@pytest.mark.parametrize("fused", [False, True])
def test_optimizers_that_know_found_inf_skip_by_themselves(fused):
    model, x = Residual(), batch()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=fused)
    scaler = distopt.ResblockScaler(model.branches, preset=fixed(10.0))
    for bad in (False, True, False):
        before = copy.deepcopy(model.state_dict())
        model.branches[0].amplify = 2.0**30 if bad else 1.0
        optimizer.zero_grad()
        backward(model, scaler, x)
        scaler.step(optimizer)
        scaler.update()
        same = all(map(torch.equal, before.values(), model.state_dict().values()))
        assert same == bad == scaler.skipped
    assert {float(state["step"]) for state in optimizer.state.values()} == {2.0}
    assert not hasattr(optimizer, "found_inf")


def test_two_optimizers_in_one_step():
    model = Residual()
    scaler = distopt.ResblockScaler(model.branches, preset=fixed(10.0))
    first = torch.optim.SGD(model.branches[:2].parameters(), lr=0.1)
    second = torch.optim.SGD([*model.branches[2:].parameters(), *model.head.parameters()], lr=0.1)
    model.branches[3].amplify = 2.0**30
    before = copy.deepcopy(model.state_dict())
    backward(model, scaler, batch())
    scaler.step(first)
    scaler.step(second)
    scaler.update()
    assert all(map(torch.equal, before.values(), model.state_dict().values()))
    assert [block.skips for block in scaler.stats().blocks.values()] == [0, 0, 0, 1]
    assert scaler.stats().skipped_steps == 1


def test_the_loop_cannot_be_got_wrong_silently():
    model = Residual()
    scaler = distopt.ResblockScaler(model.branches)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(distopt.RegistrationError, match=r"update\(\) needs a step"):
        scaler.update()
    backward(model, scaler, batch())
    scaler.unscale_(optimizer)
    with pytest.raises(distopt.RegistrationError, match="unscale_ was called for this optimizer"):
        scaler.unscale_(optimizer)


def test_a_gradient_that_nobody_scaled_is_refused():
    model = Residual()
    model.branches[1].up.weight.requires_grad_(False)
    scaler = distopt.ResblockScaler(model.branches)
    model.branches[1].up.weight.requires_grad_(True)
    backward(model, scaler, batch())
    with pytest.raises(distopt.RegistrationError, match=r"'1\.up\.weight' has a gradient that never passed its hook"):
        scaler.step(torch.optim.SGD(model.parameters(), lr=0.1))


def test_sparse_gradients_in_a_branch_are_refused():
    table = nn.Embedding(5, WIDTH, sparse=True)
    distopt.ResblockScaler({"table": table})
    with pytest.raises(distopt.RegistrationError, match=r"the gradient of 'table\.weight' is sparse"):
        table(torch.tensor([1, 2])).sum().backward()


class HostReads(TorchDispatchMode):
    """Counts values that the host waits for."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.equal.default)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("depth", [1, 6])
@pytest.mark.parametrize(("fused", "reads"), [(False, 1), (True, 0)])
def test_the_host_looks_once_a_step_or_never(depth, fused, reads):
    model = Residual(depth)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, fused=fused)
    scaler = distopt.ResblockScaler(model.branches, measure_every=0)
    with HostReads() as host:
        backward(model, scaler, batch(), parts=2)
        scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
    assert host.count == reads


# --- 16-bit parameters


def test_parameters_of_16_bits():
    model, x = Residual(), batch()
    reference = reference_of(model, x)
    names = to_16bit(model.branches)
    assert names == [f"{i}.{name}.weight" for i in range(4) for name in ("up", "down")]
    assert {p.dtype for n, p in model.named_parameters() if "up.weight" in n} == {torch.float16}
    scaler = distopt.ResblockScaler(model.branches, preset=fixed(12.0))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad(set_to_none=_ == 0)
        backward(model, scaler, x)
        weight = model.branches[0].up.weight
        if _ == 0:
            assert weight.grad.dtype == torch.float16
        torch.testing.assert_close(
            weight.grad.float() * 2.0**-12, reference.branches[0].up.weight.grad, rtol=1e-2, atol=1e-4
        )
        scaler.unscale_(optimizer)
        assert weight.grad.dtype == torch.float32
        assert relative_error(model, reference) < SIXTEEN
        scaler.update()
    backward(model, scaler, x)
    scaler.step(optimizer)
    assert model.branches[0].up.weight.dtype == torch.float16


def test_logits_in_float32_under_autocast():
    head = nn.Sequential(nn.Linear(WIDTH, 5), nn.LogSoftmax(-1))
    wanted = head(batch())
    undo = in_float32(head)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(head(batch()), wanted)
        assert torch.equal(head(batch().half()), head(batch().half().float()))
        undo()
        assert head(batch()).dtype == torch.bfloat16
    with pytest.raises(distopt.SettingError, match=r"0\.weight is torch\.float16, but must be float32"):
        in_float32(head.half())


# --- state and figures


def test_saving_and_resuming_goes_on_bit_for_bit():
    def train(model, scaler, optimizer, steps):
        for step in steps:
            model.branches[1].amplify = 2.0**18 if step == 3 else 1.0
            optimizer.zero_grad()
            backward(model, scaler, batch(step))
            scaler.step(optimizer)
            scaler.update()

    model = Residual()
    scaler, optimizer = distopt.ResblockScaler(model.branches), torch.optim.SGD(model.parameters(), lr=0.1)
    train(model, scaler, optimizer, range(5))
    other = Residual(seed=1)
    resumed, again = distopt.ResblockScaler(other.branches), torch.optim.SGD(other.parameters(), lr=0.1)
    other.load_state_dict(model.state_dict())
    resumed.load_state_dict(scaler.state_dict())
    train(model, scaler, optimizer, range(5, 9))
    train(other, resumed, again, range(5, 9))
    assert scaler.state_dict() == resumed.state_dict()
    assert all(map(torch.equal, model.state_dict().values(), other.state_dict().values()))


def test_a_state_of_something_else_is_refused():
    scaler = distopt.ResblockScaler(Residual().branches)
    other = distopt.ResblockScaler(Residual(depth=5).branches)
    literal = distopt.ResblockScaler(Residual().branches, preset="paper")
    before = scaler.state_dict()
    with pytest.raises(distopt.StateError, match="of other branches: '4' is only there"):
        scaler.load_state_dict(other.state_dict())
    with pytest.raises(distopt.StateError, match=r"of the policy PaperPolicy\("):
        scaler.load_state_dict(literal.state_dict())
    with pytest.raises(distopt.StateError, match="not the state of a ResblockScaler"):
        scaler.load_state_dict({"scale": 2.0})
    assert scaler.state_dict() == before


def test_a_copy_of_the_model_is_scaled_on_its_own_weights():
    model = Residual()
    scaler = distopt.ResblockScaler(model.branches)
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.branches[0].down.bias.add_(1.0)
    assert not torch.equal(model(batch()), other(batch()))
    scaler.remove()
    assert model.branches[0].forward.__func__ is Branch.forward
    plain = Residual()
    assert torch.equal(model(batch()), plain(batch()))
    loss_of(model, batch()).backward()
    assert all(map(torch.equal, [p.grad for p in model.parameters()], [p.grad for p in _trained(plain)]))


def _trained(model):
    loss_of(model, batch()).backward()
    return model.parameters()


def test_figures():
    model, x = Residual(depth=2), batch()
    scaler = distopt.ResblockScaler(model.branches, preset=fixed(0.0), measure_every=2)
    assert math.isnan(scaler.stats().blocks["0"].zero_fraction)
    (loss_of(model, x) * 2.0**-26).backward()
    zeros = scaler.stats().blocks["1"].zero_fraction
    counted = [p for p in model.branches[1].parameters()]
    assert zeros == sum(int((p.grad == 0).sum()) for p in counted) / sum(p.numel() for p in counted)
    assert zeros > 0.5
    scaler.step(torch.optim.SGD(model.parameters(), lr=0.1))
    scaler.update()
    numbers = scaler.stats().numbers()
    assert numbers["scale_log2/0"] == 0
    assert numbers["skipped_steps"] == 0
    assert numbers["zero_fraction/1"] == zeros  # of the last step that was measured
