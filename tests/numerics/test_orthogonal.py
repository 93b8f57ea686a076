"""Orthonormal columns, whatever the input."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from distopt.numerics.orthogonal import normalize_columns, orthogonalize
from distopt.numerics.reference import householder

TOLERANCE = {torch.float32: 2e-6, torch.float64: 1e-13}
KINDS = ["gaussian", "zero", "one column", "equal columns", "rank 2", "near-dependent", "graded", "constant"]


def make(kind, rows, columns, dtype, seed):
    g = torch.Generator().manual_seed(seed)
    full = torch.randn(rows, columns, generator=g, dtype=dtype)
    thin = torch.randn(rows, 2, generator=g, dtype=dtype) @ torch.randn(2, columns, generator=g, dtype=dtype)
    return {
        "gaussian": full,
        "zero": full * 0,
        "one column": torch.where(torch.arange(columns) == columns - 1, full, 0),
        "equal columns": full[:, :1].expand(-1, columns).clone(),
        "rank 2": thin,
        "near-dependent": full[:, :1] + 1e-6 * full,
        "graded": full * 10.0 ** -torch.arange(columns).to(dtype),
        "constant": torch.ones_like(full),
    }[kind]


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@given(
    kind=st.sampled_from(KINDS),
    rows=st.integers(1, 60),
    columns=st.integers(1, 9),
    exponent=st.integers(-37, 37),
    seed=st.integers(0, 2**31),
)
def test_columns_are_orthonormal(dtype, kind, rows, columns, exponent, seed):
    matrix = make(kind, rows, min(rows, columns), dtype, seed) * 10.0**exponent
    result = orthogonalize(matrix)
    assert (result.mT @ result - torch.eye(result.shape[1], dtype=dtype)).abs().max() <= TOLERANCE[dtype]


@given(rows=st.integers(1, 30), columns=st.integers(1, 6), seed=st.integers(0, 2**31))
def test_spans_what_the_reference_spans(rows, columns, seed):
    matrix = make("gaussian", rows, min(rows, columns), torch.float64, seed)
    fast, slow = orthogonalize(matrix, identity=0.0), householder(matrix)
    assert torch.allclose(fast @ fast.mT, slow @ slow.mT, atol=1e-8)


@given(rows=st.integers(2, 30), columns=st.integers(1, 6), exponent=st.integers(-100, 80), seed=st.integers(0, 2**31))
def test_unit_does_not_matter(rows, columns, exponent, seed):
    matrix = make("rank 2", rows, min(rows, columns), torch.float32, seed)
    assert torch.equal(orthogonalize(matrix), orthogonalize(matrix * 2.0**exponent))


def test_a_batch_is_its_matrices():
    batch = torch.randn(3, 9, 4, generator=torch.Generator().manual_seed(0))
    assert torch.equal(orthogonalize(batch), torch.stack([orthogonalize(m) for m in batch]))


def test_the_input_is_not_changed():
    matrix = torch.randn(6, 3)
    before = matrix.clone()
    orthogonalize(matrix)
    normalize_columns(matrix)
    assert torch.equal(matrix, before)


@given(kind=st.sampled_from(KINDS), rows=st.integers(6, 60), columns=st.integers(1, 6), seed=st.integers(0, 2**31))
def test_living_columns_are_units_and_independent(kind, rows, columns, seed):
    unit, alive = normalize_columns(make(kind, rows, columns, torch.float64, seed))
    living = unit[:, alive]
    assert torch.allclose(living.norm(dim=0), torch.ones(living.shape[1], dtype=torch.float64))
    assert not unit[:, ~alive].any()
    assert torch.linalg.matrix_rank(living, rtol=1e-4) == living.shape[1]
    expected = {
        "zero": 0,
        "one column": 1,
        "equal columns": 1,
        "rank 2": min(2, columns),
        "near-dependent": 1,
        "constant": 1,
    }
    assert int(alive.sum()) == expected.get(kind, int(alive.sum()))


@given(
    kind=st.sampled_from([kind for kind in KINDS if kind != "graded"]),
    rows=st.integers(12, 60),
    columns=st.sampled_from([1, 3, 9, 12]),
    exponent=st.integers(-30, 30),
    seed=st.integers(0, 2**31),
)
def test_float32_columns_live_as_those_of_float64_do(kind, rows, columns, exponent, seed):
    matrix = make(kind, rows, columns, torch.float32, seed) * 10.0**exponent
    unit, alive = normalize_columns(matrix)
    expected, expected_alive = normalize_columns(matrix.double())
    assert torch.equal(alive, expected_alive)
    assert torch.allclose(unit.double(), expected, rtol=0, atol=2e-6)
