"""The passes of a compression, over all matrices of a bucket: against float64, and against each other."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from distopt.kernels.compression import TOPS, Compression, Residual
from distopt.kernels.lowrank_jobs import Piece
from distopt.numerics.storage import Packed, pack, unpack
from tests.kernels import philox
from tests.kernels.compiling import compiled

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
MIXED = [(5, 7), (70, 40), (3, 300), (16, 8), (8, 24), (40, 72)]
"""Tall and wide, aligned and not, of one tile and of several, cut into strips and not."""

CODES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "1-6-9": torch.int16}
SPACING = {"float32": 0.0, "bfloat16": 2.0**-7, "float16": 2.0**-10, "1-6-9": 2.0**-9}


def pieces_of(shapes, rank, gap=0):
    """One matrix after another, with room between them."""
    pieces, place, left, right = [], gap, 0, 0
    for number, (rows, columns) in enumerate(shapes):
        own = min(rank, rows, columns)
        pieces.append(Piece(place, place, rows, columns, own, left, right, number, number))
        place, left, right = (
            place + rows * columns + gap,
            left + own * min(rows, columns),
            right + own * max(rows, columns),
        )
    return pieces


class Bucket:
    """Random gradients, residuals and factors, and what float64 makes of them."""

    def __init__(self, shapes, rank, dtype=torch.float32, form="float32", gap=0, seed=0):
        generator = torch.Generator().manual_seed(seed)
        self.pieces = pieces_of(shapes, rank, gap)
        last = self.pieces[-1]
        numel = last.gradient + last.rows * last.columns + gap
        self.sizes = {"left": last.left + last.rank * min(last.rows, last.columns)}
        self.sizes["right"] = last.right + last.rank * max(last.rows, last.columns)
        self.gradient = torch.randn(numel, generator=generator).to(DEVICE, dtype)
        self.form = form
        scales = torch.zeros(len(shapes), 2, dtype=torch.int32, device=DEVICE)
        self.residual = Residual(torch.zeros(numel, dtype=CODES[form], device=DEVICE), scales)
        self.keep(torch.randn(numel, generator=generator).to(DEVICE))
        self.kernels = Compression(self.pieces, form, [piece.seed for piece in self.pieces], DEVICE)
        draw = lambda side: torch.randn(self.sizes[side], generator=generator).to(DEVICE)  # noqa: E731
        self.left, self.right = draw("left"), draw("right")

    def keep(self, values):
        """Store residuals, to the nearest."""
        if self.form not in TOPS:
            self.residual.codes.copy_(values)
            return
        for piece, here in self.parts():
            packed = pack(values[here], "1-6-9" if self.form == "1-6-9" else torch.float16)
            self.residual.codes[here] = packed.codes
            self.residual.scales[piece.scale, 1] = packed.exponent

    def kept(self):
        """What is stored, float32."""
        codes, scales = self.residual
        if self.form not in TOPS:
            return codes.float()
        values = torch.zeros(codes.shape, device=DEVICE)
        for piece, here in self.parts():
            values[here] = unpack(Packed(codes[here], scales[piece.scale, 1], 0))
        return values

    def parts(self):
        """Pieces and where they lie."""
        return [(p, slice(p.gradient, p.gradient + p.rows * p.columns)) for p in self.pieces]

    def settle(self, factors, step=3):
        """As a step does, after a first product. Gives M in float64."""
        exact = self.gradient.dtype == torch.float32
        m, flags = self.gradient.double() + self.kept().double(), self.kernels.flags()
        out = torch.empty_like(self.left)
        self.kernels.multiply("left", self.gradient, self.residual, self.right, out, writes=exact, flags=flags)
        self.kernels.settle(self.gradient, self.residual, factors, flags, step, adds=not exact)
        return m

    def matrix(self, flat, piece):
        """A matrix with the smaller side first, in float64."""
        start = piece.gradient
        rows = flat[start : start + piece.rows * piece.columns].view(piece.rows, piece.columns).double()
        return rows.T if piece.tall else rows

    def factor(self, payload, piece, side):
        """A factor as it is written in the papers, in float64."""
        length = (min if side == "left" else max)(piece.rows, piece.columns)
        start = piece.left if side == "left" else piece.right
        return payload[start : start + piece.rank * length].view(piece.rank, length).double().T

    def between(self, flat):
        """What lies between the matrices, and belongs to others."""
        mask = torch.ones_like(flat, dtype=torch.bool)
        for piece in self.pieces:
            mask[piece.gradient : piece.gradient + piece.rows * piece.columns] = False
        return flat[mask]


def close(one, other, size):
    return bool((one - other).abs().max() <= 2e-6 * size)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("form", CODES)
def test_products_are_those_of_float64(side, dtype, form):
    bucket = Bucket(MIXED, 4, dtype, form, gap=3)
    given, out = (bucket.right, torch.full_like(bucket.left, math.nan)), bucket.left
    given, out = (bucket.right, bucket.left) if side == "left" else (bucket.left, bucket.right)
    out = torch.full_like(out, math.nan)
    before = bucket.gradient.clone()
    sums = bucket.gradient.double() + bucket.kept().double()
    flags = bucket.kernels.flags()
    writes = dtype == torch.float32
    bucket.kernels.multiply(side, bucket.gradient, bucket.residual, given, out, writes=writes, flags=flags)
    for piece in bucket.pieces:
        m = bucket.matrix(sums, piece)
        p = bucket.factor(given, piece, "right" if side == "left" else "left")
        expected = m @ p if side == "left" else m.T @ p
        assert close(bucket.factor(out, piece, side), expected, m.norm() * p.norm())
    assert torch.equal(bucket.between(bucket.gradient), bucket.between(before))
    if form in TOPS:
        largest = torch.stack([bucket.matrix(sums, piece).abs().max() for piece in bucket.pieces])
        assert torch.allclose(flags[3:].view(torch.float32).double(), largest, rtol=1e-6, atol=0)
    if dtype == torch.float32:
        for piece in bucket.pieces:
            assert close(bucket.matrix(bucket.gradient, piece), bucket.matrix(sums, piece), 1)
    else:
        assert torch.equal(bucket.gradient, before)


@given(
    st.lists(st.tuples(st.integers(1, 80), st.integers(1, 80)), min_size=1, max_size=3),
    st.integers(1, 20),
    st.integers(0, 2**31),
)
@settings(max_examples=8)
def test_any_shapes(shapes, rank, seed):
    bucket = Bucket(shapes, rank, seed=seed)
    out = torch.empty_like(bucket.left)
    sums = bucket.gradient.double() + bucket.kept().double()
    bucket.kernels.multiply("left", bucket.gradient, bucket.residual, bucket.right, out, writes=True)
    for piece in bucket.pieces:
        m, q = bucket.matrix(sums, piece), bucket.factor(bucket.right, piece, "right")
        assert close(bucket.factor(out, piece, "left"), m @ q, m.norm() * q.norm())


@pytest.mark.parametrize(("rank", "form"), [(33, "float32"), (130, "float32"), (130, "1-6-9")])
def test_many_columns(rank, form):
    """More than a program takes: the sums are written before they are multiplied."""
    bucket = Bucket([(136, 140)], rank, form=form)
    out = torch.empty_like(bucket.left)
    m = bucket.matrix(bucket.gradient.double() + bucket.kept().double(), bucket.pieces[0])
    bucket.kernels.multiply("left", bucket.gradient, bucket.residual, bucket.right, out, writes=True)
    assert close(bucket.matrix(bucket.gradient, bucket.pieces[0]), m, 1)
    q = bucket.factor(bucket.right, bucket.pieces[0], "right")
    assert close(bucket.factor(out, bucket.pieces[0], "left"), m @ q, m.norm() * q.norm())


@pytest.mark.parametrize("shared", ["left", "right"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("form", CODES)
def test_nothing_is_lost(shared, dtype, form):
    """The average is the product of factors, and M is this rank's product and what is left, up to rounding."""
    bucket = Bucket(MIXED, 4, dtype, form, gap=3)
    other = Bucket(MIXED, 4, dtype, form, gap=3, seed=1)
    own_left = bucket.left if shared == "left" else other.left
    own_right = bucket.right if shared == "right" else other.right
    residual = bucket.residual.codes.clone()
    m = bucket.settle((bucket.left, bucket.right, own_left, own_right))
    eps = torch.finfo(dtype).eps
    for piece in bucket.pieces:
        p, q = bucket.factor(bucket.left, piece, "left"), bucket.factor(bucket.right, piece, "right")
        own = bucket.factor(own_left, piece, "left") @ bucket.factor(own_right, piece, "right").T
        size = p.norm() * q.norm()
        delivered = bucket.matrix(bucket.gradient, piece)
        assert torch.allclose(delivered, p @ q.T, rtol=eps, atol=2e-6 * float(size))
        left_over = bucket.matrix(m, piece) - own + (p @ q.T - delivered)
        kept = bucket.matrix(bucket.kept(), piece)
        assert torch.allclose(kept, left_over, rtol=SPACING[form], atol=1e-5 * float(size))
    assert torch.equal(bucket.between(bucket.residual.codes), bucket.between(residual))


@pytest.mark.parametrize("form", TOPS)
@given(
    st.lists(st.tuples(st.integers(1, 40), st.integers(1, 40)), min_size=1, max_size=3),
    st.integers(1, 20),
    st.integers(-140, 126),
    st.integers(-40, 40),
    st.booleans(),
    st.integers(0, 2**31),
)
@settings(max_examples=10)
def test_nothing_saturates(form, shapes, rank, size, growth, same, seed):
    """However large M is, and however large the product beside it; to the spacing of each element, or of the bound's."""
    bucket, other = Bucket(shapes, rank, form=form, seed=seed), Bucket(shapes, rank, seed=seed + 1)
    bucket.gradient.clamp_(-1.9, 1.9).mul_(2.0**size)
    bucket.keep(bucket.kept().clamp(-1.9, 1.9).mul_(2.0 ** min(size, 125)))
    lengths = 2.0 ** max(min(size, 110) + growth, -140)
    for each in (bucket, other):
        each.right.div_(each.right.abs().max()).mul_(min(lengths, 2.0**110))
        each.left.div_(each.left.abs().max() * rank)
    own = (bucket.left, bucket.right) if same else (bucket.left, other.right)
    m = bucket.settle((bucket.left, bucket.right, *own))
    for piece in bucket.pieces:
        product = bucket.factor(own[0], piece, "left") @ bucket.factor(own[1], piece, "right").T
        average = bucket.factor(bucket.left, piece, "left") @ bucket.factor(bucket.right, piece, "right").T
        left_over = bucket.matrix(m, piece) - product
        kept = bucket.matrix(bucket.kept(), piece)
        assert bool(kept.isfinite().all())
        arithmetic = 4e-6 * float(bucket.matrix(m, piece).abs().max() + product.abs().max() + average.abs().max())
        limit = left_over.clamp(-(2.0**128) * (1 - 2.0**-9), 2.0**128 * (1 - 2.0**-9))
        assert bool(((kept - limit).abs() <= SPACING[form] * limit.abs() + arithmetic + 2.0**-133).all())


@pytest.mark.parametrize("form", TOPS)
@pytest.mark.parametrize("value", [0.0, 2.0**-149, 2.0**-126, torch.finfo(torch.float32).max])
def test_the_ends_of_the_range(form, value):
    """Nothing is rounded up to infinity, which no later step would recover from."""
    bucket = Bucket([(64, 64)], 1, form=form)
    bucket.gradient.fill_(value).view(64, 64)[::2].neg_()
    bucket.keep(torch.zeros_like(bucket.gradient))
    for factor in (bucket.left, bucket.right):
        factor.zero_()
    m = bucket.settle((bucket.left, bucket.right, bucket.left, bucket.right))
    kept = bucket.kept().double()
    assert bool(((kept - m).abs() <= SPACING[form] * m.abs() + 2.0**-133).all())
    assert not bool(kept.any()) or value > 0


def test_rounding_of_residuals_has_no_bias():
    """In the mean of many steps; and a step's draws are the same wherever the matrix lies."""
    bucket, kept = Bucket([(64, 64)], 1, form="bfloat16"), []
    left, right = torch.zeros_like(bucket.left), torch.zeros_like(bucket.right)
    zeros = (left, right, left, right)
    wanted = bucket.gradient.clone()
    for step in range(24):
        bucket.gradient.copy_(wanted)
        bucket.kernels.settle(bucket.gradient, bucket.residual, zeros, bucket.kernels.flags(), step, adds=False)
        kept.append(bucket.kept().double())
    error = torch.stack(kept).mean(0) - wanted.double()
    spacing = wanted.double().abs() * 2.0**-8
    assert abs(float((error / spacing).mean())) < 0.01
    assert not torch.equal(kept[0], kept[1])
    moved = Bucket([(64, 64)], 1, form="bfloat16", gap=16)
    moved.gradient[16:-16] = wanted
    moved.kernels.settle(moved.gradient, moved.residual, zeros, moved.kernels.flags(), 23, adds=False)
    assert torch.equal(moved.kept()[16:-16], bucket.kept())


@pytest.mark.parametrize("form", ["bfloat16", "float16", "1-6-9"])
def test_residuals_are_rounded_by_the_draws_of_their_places(form):
    """Bit for bit: step, row and place in the row count, and nothing is added to what is drawn: of so many, 2**-14 would change some."""
    bucket = Bucket([(1024, 128)], 1, form=form)
    bucket.gradient.mul_(2.0**5)
    for factor in (bucket.left, bucket.right):
        factor.zero_()
    bucket.keep(torch.zeros_like(bucket.gradient))
    m = bucket.settle((bucket.left, bucket.right, bucket.left, bucket.right), step=5).cpu().float().view(1024, 128)
    low = np.arange(1024)[:, None] * 16 + np.arange(16)
    draws = philox.draws(bucket.pieces[0].seed, 5, low).to(torch.int64)
    exponent = int(bucket.residual.scales[0, 1])
    lost = {"bfloat16": 16, "float16": 13, "1-6-9": 14}[form]
    whole = m.view(torch.int32).to(torch.int64) & 0x7FFFFFFF
    rounded = ((whole + (draws & (1 << lost) - 1)) >> lost << lost).to(torch.int32).view(torch.float32)
    kept = bucket.kept().cpu().view(1024, 128)
    normal = m.abs() >= 2.0 ** (exponent + {"bfloat16": -100, "float16": -14, "1-6-9": -59}[form])
    assert int(normal.sum()) > 130_000
    assert torch.equal(kept.abs()[normal], rounded[normal])
    assert torch.equal(kept.sign()[normal], m.sign()[normal])


@pytest.mark.parametrize(("which", "form"), [(0, "float32"), (1, "1-6-9"), (2, "float16")])
def test_an_unsound_step_leaves_residuals_alone(which, form):
    bucket = Bucket(MIXED, 4, gap=1, form=form)
    flags, residual, powers = (
        bucket.kernels.flags(),
        bucket.residual.codes.clone(),
        bucket.residual.scales[:, 1].clone(),
    )
    bad = torch.ones(5000, device=DEVICE)
    bad[4500] = math.nan if which else -math.inf
    bucket.kernels.inspect(bad, flags, which)
    factors = (bucket.left, bucket.right, bucket.left, bucket.right)
    bucket.kernels.settle(bucket.gradient, bucket.residual, factors, flags, 0, adds=False)
    assert torch.equal(bucket.residual.codes, residual)
    assert torch.equal(bucket.residual.scales[:, 1], powers)
    assert all(bool(bucket.matrix(bucket.gradient, piece).isnan().all()) for piece in bucket.pieces)


@pytest.mark.parametrize("value", [0.0, 2.0, 300.0])
def test_products_beyond_the_range_are_found(value):
    """Only where a product really is, though the factors' size alone would allow for it."""
    bucket = Bucket([(70, 40), (16, 8)], 4, torch.float16)
    left, right = torch.zeros_like(bucket.left), torch.zeros_like(bucket.right)
    left[bucket.pieces[1].left], right[bucket.pieces[1].right] = value, 300.0
    flags = bucket.kernels.flags()
    bucket.kernels.inspect(right, flags, 1)
    bucket.kernels.exceed(bucket.gradient, left, right, flags, 65504 / 8)
    assert int(flags[2]) == 0
    bucket.kernels.exceed(bucket.gradient, left, right, flags, 0.0)
    assert (int(flags[2]) > 0) == (value == 300.0)


def test_columns_for_the_next_step():
    bucket = Bucket([(5, 7), (9, 4), (6, 6)], 3)
    units, before = bucket.right, torch.randn_like(bucket.right)
    alive = torch.tensor([True, False, True, False, False, False, True, True, True], device=DEVICE)
    first = bucket.kernels.revive("right", units, alive, before, 5)
    again, later = (bucket.kernels.revive("right", units, alive, before, step) for step in (5, 6))
    assert torch.equal(first, again)
    columns = [first[:7], first[7:14], first[14:21]]
    assert torch.equal(columns[0], units[:7])
    assert torch.equal(columns[2], units[14:21])
    assert abs(float(columns[1].norm()) - 1) < 1e-6
    assert not torch.equal(first[7:14], later[7:14])
    assert torch.equal(first[21:48], before[21:48])
    assert torch.equal(first[48:], units[48:])


WIDE, TALL, ODD = (2048, 8192), (8192, 2048), (64, 147)
"""Of GPT-2 1.3B, and like ones of a DALL-E 12B shard; and the first of ResNet-50."""


def launches():
    """Every kernel, over the ranks and dtypes of the benchmarks."""
    launch([WIDE], 4, torch.float32, "float32")
    launch([TALL], 32, torch.bfloat16, "bfloat16")
    launch([ODD], 4, torch.float32, "float32")
    launch([WIDE], 112, torch.float32, "float32")
    launch([TALL], 512, torch.bfloat16, "float32")
    launch([TALL], 32, torch.float32, "1-6-9")
    launch([WIDE], 112, torch.bfloat16, "1-6-9")


def launch(shapes, rank, dtype, form):
    pieces = pieces_of(shapes, rank)
    kernels = Compression(pieces, form, [0] * len(pieces), torch.device("cpu"))
    gradient = torch.empty(16, dtype=dtype)
    residual = Residual(torch.empty(16, dtype=CODES[form]), torch.empty(16, dtype=torch.int32))
    left, right, own, flags = torch.empty(16), torch.empty(16), torch.empty(16), kernels.flags()
    exact = dtype == torch.float32
    kernels.multiply("left", gradient, residual, right, left, writes=exact, flags=flags)
    kernels.multiply("right", gradient, None if exact else residual, left, right)
    kernels.inspect(left, flags, 0)
    kernels.exceed(gradient, left, right, flags, 1e30)
    kernels.settle(gradient, residual, (left, right, left, own), flags, 0, adds=not exact)
    kernels.revive("right", right, torch.ones(1), own, 0)


@pytest.mark.parametrize(("capability", "shared", "spilled"), [(80, 163, 40), (90, 227, 0)])
def test_kernels_compile(capability, shared, spilled):
    kernels = compiled(__name__, capability)
    names = {"multiply", "gather", "inspect", "exceed", "settle", "revive", "bound", "rescale"}
    assert {kernel.name for kernel in kernels} >= names
    for kernel in kernels:
        assert kernel.spilled <= spilled, kernel
        assert kernel.shared <= shared * 1024, kernel
