"""Emulated 16-bit products against the native kernels: values, gradients, types, and what is left alone."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from distopt.numerics.emulation import emulated_16bit

HALVES = [torch.float16, torch.bfloat16]
halves = pytest.mark.parametrize("half", HALVES, ids=str)


def attention(q, k, v):
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def masked_attention(q, k, v):
    return F.scaled_dot_product_attention(q, k, v, attn_mask=torch.ones(5, 5, dtype=torch.bool).tril())


def into(a, b):
    return torch.mm(a.detach(), b.detach(), out=torch.empty(0, dtype=a.dtype)) + 0 * a.sum() * b.sum()


def in_place(c, a, b):
    return (c * 1).addmm_(a, b, beta=0.5, alpha=2)


PRODUCTS = {
    "linear": (F.linear, [(3, 4, 6), (5, 6), (5,)]),
    "matmul": (torch.matmul, [(4, 6), (6, 3)]),
    "batched matmul": (torch.matmul, [(2, 1, 4, 6), (3, 6, 5)]),
    "vector": (torch.matmul, [(4, 6), (6,)]),
    "dot": (torch.dot, [(6,), (6,)]),
    "bmm": (torch.bmm, [(2, 4, 6), (2, 6, 3)]),
    "baddbmm": (torch.baddbmm, [(2, 4, 3), (2, 4, 6), (2, 6, 3)]),
    "addmm in place": (in_place, [(4, 3), (4, 6), (6, 3)]),
    "mm into": (into, [(4, 6), (6, 3)]),
    "einsum": (lambda a, b: torch.einsum("bij,kj->bki", a, b), [(2, 4, 6), (5, 6)]),
    "conv2d": (lambda x, w, b: F.conv2d(x, w, b, padding=1), [(2, 3, 5, 5), (4, 3, 3, 3), (4,)]),
    "grouped conv1d": (lambda x, w: F.conv1d(x, w, groups=2), [(2, 4, 7), (6, 2, 3)]),
    "conv_transpose2d": (lambda x, w: F.conv_transpose2d(x, w, stride=2), [(1, 3, 4, 4), (3, 2, 3, 3)]),
    "attention": (attention, [(2, 2, 5, 4)] * 3),
    "masked attention": (masked_attention, [(2, 2, 5, 4)] * 3),
}
ROUNDED_WITHIN = [name for name in PRODUCTS if "conv" in name or "attention" in name]
"""Their native kernels also round intermediate values."""
products = pytest.mark.parametrize("name", PRODUCTS)


class NativeProducts(TorchDispatchMode):
    """Notes the types of what the kernels of products are given."""

    def __init__(self):
        super().__init__()
        self.types = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket.__name__.strip("_") in {"mm", "addmm", "bmm", "baddbmm", "convolution", "linear"}:
            self.types |= {a.dtype for a in args if isinstance(a, torch.Tensor)}
        return func(*args, **(kwargs or {}))


def operands(shapes, seed, dtype, binades=4):
    g = torch.Generator().manual_seed(seed)
    made = []
    for shape in shapes:
        sizes = torch.rand(shape, generator=g) * -binades
        made.append((torch.randn(shape, generator=g) * 2**sizes).to(dtype).requires_grad_())
    return made


def run(product, given_, autocast=None):
    """The result and the gradients of all operands."""
    with torch.autocast("cpu", autocast or torch.bfloat16, enabled=autocast is not None):
        result = product(*given_)
    seed = torch.randn(result.shape, generator=torch.Generator().manual_seed(1)).to(result.dtype)
    return [result.detach(), *torch.autograd.grad(result, given_, seed)]


def assert_near(emulated, native, half, name=""):
    """Equal types; equal values but for a unit in the last place, or for three of the largest element's."""
    for mine, theirs in zip(emulated, native, strict=True):
        assert mine.dtype == theirs.dtype
        size = theirs.float().abs()
        unit = 3 * size.max() if name in ROUNDED_WITHIN else size
        apart = (mine.float() - theirs.float()).abs()
        assert bool((apart <= torch.finfo(half).eps * unit + torch.finfo(half).smallest_normal).all())


@products
@halves
@settings(max_examples=8)
@given(seed=st.integers(0, 2**31))
def test_products_of_16_bit_operands_are_those_of_the_native_kernels(half, name, seed):
    product, shapes = PRODUCTS[name]
    given_ = operands(shapes, seed, half)
    native = run(product, given_)
    with emulated_16bit():
        emulated = run(product, given_)
    assert_near(emulated, native, half, name)


@products
@halves
@settings(max_examples=4)
@given(seed=st.integers(0, 2**31))
def test_products_under_autocast_are_those_of_the_native_kernels(half, name, seed):
    if name in ("dot", "mm into", "addmm in place"):  # autocast leaves these alone
        return
    product, shapes = PRODUCTS[name]
    given_ = operands(shapes, seed, torch.float32)
    native = run(product, given_, half)
    with emulated_16bit():
        emulated = run(product, given_, half)
    assert [part.dtype for part in native] == [half] + [torch.float32] * len(shapes)
    assert_near(emulated, native, half, name)


@halves
def test_most_elements_are_identical(half):
    a, b = (torch.randn(64, 64, generator=torch.Generator().manual_seed(i)).to(half) for i in (0, 1))
    with emulated_16bit():
        emulated = a @ b
    assert (emulated == a @ b).float().mean() > 0.99


def test_overflow_is_infinite_and_subnormals_are_kept():
    large, small = torch.full((2, 2), 300.0, dtype=torch.float16), torch.full((1, 1), 2.0**-12, dtype=torch.float16)
    with emulated_16bit():
        assert bool((large @ -large == -torch.inf).all())
        assert (small @ small).item() == 2.0**-24
        assert (small @ (small / 4)).item() == 0
        poisoned = torch.tensor([[torch.inf, 0.0]], dtype=torch.float16) @ torch.zeros(2, 1, dtype=torch.float16)
    assert bool(poisoned.isnan())


def test_gradients_overflow_and_underflow_as_16_bit_numbers_do():
    weight = torch.full((1, 1), 300.0, dtype=torch.float16, requires_grad=True)
    x = torch.full((1, 1), 2.0**-12, dtype=torch.float16, requires_grad=True)
    with emulated_16bit():
        y = F.linear(x, weight)
        y.backward(torch.full_like(y, 300.0))
        assert x.grad.item() == torch.inf
        assert weight.grad.item() == 300 * 2.0**-12
        x.grad = weight.grad = None
        F.linear(x, weight).backward(torch.full_like(y, 2.0**-14))
    assert weight.grad.item() == 0


def build(seed=0):
    torch.manual_seed(seed)
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True, norm_first=True)
    return nn.Sequential(nn.Linear(6, 8), layer, nn.Linear(8, 4))


@halves
@pytest.mark.parametrize("true_halves", [False, True])
def test_a_whole_network_takes_the_same_step_and_no_native_product_is_left(half, true_halves):
    """The mode inside the context sees what the kernels are given: nothing in 16 bits."""
    gradients, seen = [], []
    for emulated in (False, True):
        model = build().to(half if true_halves else torch.float32)
        x = torch.randn(2, 5, 6, generator=torch.Generator().manual_seed(3)).to(next(model.parameters()).dtype)
        with NativeProducts() as kernels:
            if emulated:
                with emulated_16bit(), torch.autocast("cpu", half, enabled=not true_halves):
                    model(x).float().square().mean().backward()
            else:
                with torch.autocast("cpu", half, enabled=not true_halves):
                    model(x).float().square().mean().backward()
        gradients.append([p.grad for p in model.parameters()])
        seen.append(kernels.types)
    assert half in seen[0]
    assert seen[1] == {torch.float32}
    largest = max(float(g.abs().max()) for g in gradients[0])
    for native, emulated in zip(*gradients, strict=True):
        assert native.dtype == emulated.dtype
        torch.testing.assert_close(emulated.float(), native.float(), rtol=0, atol=8 * torch.finfo(half).eps * largest)


@halves
def test_inference_is_emulated_too(half):
    model = build().eval()
    x = torch.randn(2, 5, 6)
    with torch.inference_mode(), NativeProducts() as kernels, emulated_16bit(), torch.autocast("cpu", half):
        result = model[0](x) @ torch.ones(8, 2)
    assert result.dtype == half
    assert kernels.types == {torch.float32}


def test_other_types_are_left_alone():
    for dtype in (torch.float32, torch.float64):
        a, b = operands([(4, 6), (6, 3)], 0, dtype)
        native = run(torch.matmul, [a, b])
        with emulated_16bit():
            assert all(torch.equal(x, y) for x, y in zip(run(torch.matmul, [a, b]), native, strict=True))
    with emulated_16bit():
        assert torch.equal(torch.arange(4).view(2, 2) @ torch.ones(2, 1, dtype=torch.int64), torch.tensor([[1], [5]]))
        with pytest.raises(RuntimeError, match="dtype"):
            torch.ones(2, 2, dtype=torch.float16) @ torch.ones(2, 2)
        with pytest.raises(RuntimeError, match="type"):
            torch.ones(2, 2, dtype=torch.float16) @ torch.ones(2, 2, dtype=torch.bfloat16)
    meta = torch.ones(2, 2, dtype=torch.float16, device="meta")
    with NativeProducts() as kernels, emulated_16bit():
        meta @ meta
    assert kernels.types == {torch.float16}


def test_what_comes_after_the_context_is_native():
    ones = torch.ones(2, 2, dtype=torch.float16)
    with NativeProducts() as kernels:
        with emulated_16bit():
            pass
        ones @ ones
    assert kernels.types == {torch.float16}


def test_compiled_functions_give_the_same():
    a, b = operands([(4, 6), (6, 3)], 0, torch.float16)
    compiled = torch.compile(torch.matmul, backend="eager")
    with emulated_16bit():
        assert_near(run(compiled, [a, b]), run(torch.matmul, [a, b]), torch.float16)
