"""Orthonormal columns by kernels: the laws of the plain edition, through trees and panels of all depths."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from distopt.kernels import householder
from distopt.kernels.householder import orthonormal_rows
from distopt.kernels.householder_blocks import panels
from distopt.kernels.householder_tree import Place, plant
from distopt.numerics import orthogonal
from distopt.numerics.orthogonal import IDENTITY, orthogonalize
from tests.kernels.compiling import compiled

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCE = 1e-6
ROUNDING = {torch.float32: 0.0, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
KINDS = ["gaussian", "condition 1e6", "near rank 2", "rank 1", "zero", "one huge entry", "zero columns"]


def make(kind, count, rank, rows, seed=0):
    """A stack ``(count, rank, rows)`` of transposed matrices."""
    g = torch.Generator().manual_seed(seed)
    full = torch.randn(count, rank, rows, generator=g)
    thin = torch.randn(count, rank, 2, generator=g) @ torch.randn(count, 2, rows, generator=g)
    turn = torch.linalg.qr(torch.randn(rank, rank, generator=g))[0]
    spike = 1e-3 * full
    spike[:, rank // 2, rows // 3] = 1e30
    stack = {
        "gaussian": full,
        "condition 1e6": (turn * torch.logspace(0, -6, rank)) @ full,
        "near rank 2": thin + 1e-6 * full,
        "rank 1": full[:, :1] * torch.arange(1.0, rank + 1)[:, None],
        "zero": full * 0,
        "one huge entry": spike,
        "zero columns": full * (torch.arange(rank) % 2)[:, None],
    }[kind]
    return stack.to(DEVICE)


def plain(stacks, identity):
    """What the kernels are another edition of."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(orthogonal, "chosen", lambda device: False)
        return [orthogonalize(stack.mT, identity).mT for stack in stacks]


EDITIONS = pytest.mark.parametrize("edition", [orthonormal_rows, plain], ids=["kernel", "plain"])


def assert_orthonormal(rows, dtype=torch.float32):
    product = rows.double() @ rows.double().mT
    assert rows.isfinite().all()
    assert (product - torch.eye(rows.shape[1], device=rows.device)).abs().max() <= TOLERANCE + 3 * ROUNDING[dtype]


def assert_same_span(rows, others, tolerance=1e-5):
    first, second = (each.double().mT @ each.double() for each in (rows, others))
    assert (first - second).abs().max() <= tolerance


def through(make_launches, stack, identity=IDENTITY, **settings):
    """By a tree or by panels with settings that users cannot reach."""
    count, rank, rows = stack.shape
    places = [Place(i * rank * rows, rows, rows) for i in range(count)]
    result = torch.empty_like(stack)
    launches = make_launches(rank, places, places, stack.device, **settings)
    launches.run(stack, result, identity, householder.PRECISION)
    return result


@EDITIONS
@settings(max_examples=7)
@given(
    kind=st.sampled_from(KINDS),
    rank=st.sampled_from([1, 2, 3, 4]),
    more=st.sampled_from([0, 1, 13]),
    exponent=st.integers(-30, 30),
    seed=st.integers(0, 2**31),
)
def test_rows_are_orthonormal_whatever_the_unit(edition, kind, rank, more, exponent, seed):
    exponent = min(exponent, 0) if kind == "one huge entry" else exponent
    stack = make(kind, 1, rank, rank + more, seed) * 10.0**exponent
    before = stack.clone()
    assert_orthonormal(edition([stack], IDENTITY)[0])
    assert torch.equal(stack, before)


@EDITIONS
@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
def test_stacks_of_several_ranks_and_heights_span_what_the_plain_edition_spans(edition, dtype):
    stacks = [make("gaussian", 2, 1, 9), make("gaussian", 1, 3, 7), make("gaussian", 2, 3, 20), make("zero", 0, 3, 5)]
    stacks = [stack.to(dtype) for stack in stacks]
    results = edition(stacks, IDENTITY)
    for rows, stack, expected in zip(
        results, stacks, plain([stack.double() for stack in stacks], IDENTITY), strict=True
    ):
        assert (rows.dtype, rows.shape) == (dtype, stack.shape)
        if len(stack):
            assert_orthonormal(rows, dtype)
            assert_same_span(rows, expected, 1e-5 + 4 * ROUNDING[dtype])


def test_a_stack_is_its_matrices_wherever_they_lie():
    stack = make("gaussian", 2, 3, 21)
    apart = [orthonormal_rows([each], IDENTITY)[0] for each in stack.split(1)]
    assert torch.equal(orthonormal_rows([stack], IDENTITY)[0], torch.cat(apart))
    message = torch.cat([torch.zeros(5, device=DEVICE), stack.flatten()])
    inside = message[5:].view(stack.shape)
    assert torch.equal(orthonormal_rows([inside[:1], inside[1:]], IDENTITY)[1], apart[1])
    strided = stack.mT.contiguous().mT
    assert torch.equal(orthonormal_rows([strided], IDENTITY)[0], torch.cat(apart))


@pytest.mark.parametrize("kind", ["gaussian", "near rank 2"])
def test_a_power_of_two_changes_no_bit(kind):
    stack = make(kind, 1, 3, 19)
    result = through(plant, stack, elements=64)
    for exponent in (-90, 80):
        assert torch.equal(through(plant, stack * 2.0**exponent, elements=64), result)


@pytest.mark.parametrize("kind", KINDS)
def test_a_tree_spans_what_one_block_spans(kind):
    stack = make(kind, 1, 2, 45)
    tree = through(plant, stack, elements=32)  # 45 rows in blocks of 16 and a triangle: two levels
    assert_orthonormal(tree)
    if kind == "gaussian":
        assert_same_span(tree, plain([stack.double()], IDENTITY)[0])


def test_a_tall_tree_of_matrices_of_several_heights():
    heights, rank = (131, 3), 2
    stacks = [make("gaussian", 1, rank, n) for n in heights]
    flat = torch.cat([stack.flatten() for stack in stacks])
    places = [Place(0, 131, 131), Place(rank * 131, 3, 3)]
    tree = plant(rank, places, places, flat.device, elements=32)
    assert len(tree.levels) == 3
    result = torch.empty_like(flat)
    tree.run(flat, result, IDENTITY, householder.PRECISION)
    for place, expected in zip(places, plain(stacks, IDENTITY), strict=True):
        rows = result[place.offset :][: rank * place.rows].view(1, rank, place.rows)
        assert_orthonormal(rows)
        assert_same_span(rows, expected)


@pytest.mark.parametrize(("kind", "rank"), [("gaussian", 19), ("near rank 2", 33)])
def test_panels(kind, rank):
    stack = make(kind, 1, rank, 40)
    result = through(panels, stack, width=16)
    assert_orthonormal(result)
    if kind == "gaussian":
        assert_same_span(result, plain([stack.double()], IDENTITY)[0])


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("rank", [1, 2])
def test_what_is_not_finite_stays_so_and_alone(rank, bad):
    stack = make("gaussian", 2, rank, 20)
    stack[1, rank - 1, 17] = bad
    result = orthonormal_rows([stack], IDENTITY)[0] if rank == 1 else through(plant, stack, elements=32)
    assert not result[1].isfinite().any()
    assert_orthonormal(result[:1])


def test_the_identity_keeps_dependent_columns_on_the_leading_axes():
    stack = make("zero", 1, 3, 20)
    assert torch.equal(orthonormal_rows([stack], IDENTITY)[0].abs()[0], torch.eye(3, 20, device=DEVICE))


def test_the_public_functions_take_the_kernel_where_it_is_chosen(monkeypatch):
    monkeypatch.setattr(orthogonal, "chosen", lambda device: True)
    taken = []
    monkeypatch.setattr(
        householder, "orthonormal_rows", lambda stacks, e: taken.append(e) or orthonormal_rows(stacks, e)
    )
    matrix = make("gaussian", 2, 2, 6).mT
    result = orthogonalize(matrix, 1e-3)
    assert result.shape == matrix.shape
    assert_same_span(result.mT, plain([matrix.mT], 1e-3)[0])
    orthogonalize(matrix[0])
    orthogonal.orthonormal_rows([matrix.mT, matrix.mT])
    assert taken == [1e-3, IDENTITY, IDENTITY]
    orthogonalize(matrix.double())
    assert len(taken) == 3


def launches():
    """For what `compiled` compiles: ranks and rows of real models."""
    for rank, rows, dtype in [
        (1, 4096, torch.bfloat16),
        (4, 50257, torch.float32),
        (32, 4096, torch.bfloat16),
        (32, 50257, torch.float32),
        (112, 4096, torch.float32),
        (128, 4096, torch.float16),
        (512, 50257, torch.float32),
    ]:
        orthonormal_rows([torch.empty(1, rank, rows, dtype=dtype)], IDENTITY)


@pytest.mark.timeout(600)
@pytest.mark.parametrize(("capability", "shared"), [(80, 163 << 10), (90, 227 << 10)])
def test_kernels_compile_for_a_gpu(capability, shared):
    kernels = compiled("tests.kernels.test_householder", capability)
    names = {"_unit", "_factorise", "_form", "_measure", "_prepare", "_reconstruct", "_inner", "_combine", "_update"}
    assert {each.name for each in kernels} == names
    assert all(each.shared <= shared for each in kernels), kernels
    # The root of a tree of 32 columns and more than 256 rows lacks 12 registers of a thread; all others spill nothing.
    spilling = [each for each in kernels if each.spilled]
    assert all(each.name == "_factorise" and each.spilled <= 64 for each in spilling), spilling
    assert len(spilling) <= 2, spilling
