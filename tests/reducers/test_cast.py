"""16 bits on the wire."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from distopt import AllReduce, Cast, SettingError
from tests.reducers.convergence import final_loss
from tests.simulation import Ranks

SHAPES = {"w": (5, 7), "bias": (3,), "scalar": ()}
dtypes = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
seeds = st.integers(0, 2**31)


def draw(world, seed, dtype=torch.float32, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    return [
        {n: (scale * torch.randn(s, generator=generator)).to(dtype) for n, s in SHAPES.items()} for _ in range(world)
    ]


@given(world=st.integers(1, 4), seed=seeds)
def test_the_oracle_rounds_each_input_and_then_the_average(world, seed):
    ranks = Ranks(Cast(torch.bfloat16), SHAPES, world)
    residuals = [{n: torch.zeros(s) for n, s in SHAPES.items()} for _ in range(world)]
    for step in range(3):
        fed = draw(world, seed + step)
        delivered = ranks.step(fed)[0]
        for n in SHAPES:
            inputs = [fed[rank][n] + residuals[rank][n] for rank in range(world)]
            rounded = [value.bfloat16().float() for value in inputs]
            total = rounded[0].clone()
            for value in rounded[1:]:
                total += value
            assert torch.equal(delivered[n], (total / world).bfloat16().float())
            for rank in range(world):
                residuals[rank][n] = ranks.residual(rank, n).clone()


@dtypes
def test_16_bits_of_every_real_gradient(dtype):
    ranks = Ranks(Cast(dtype), SHAPES, 2)
    ranks.step(draw(2, 0))
    assert set(ranks.states[0].residuals) == set(SHAPES)
    message = sum(2 * -(-n // 2) * 2 + (2 * 2 if dtype == torch.float16 else 0) for n in (35, 3, 1))
    assert ranks.payload_sizes == [message]
    short = Ranks(Cast(dtype), SHAPES, 2, dtype=dtype)
    short.step(draw(2, 0, dtype))
    assert short.payload_sizes == [message]
    complex_ranks = Ranks(Cast(dtype), {"w": (3, 3)}, 2, dtype=torch.complex64)
    fed = [{"w": torch.randn(3, 3, dtype=torch.complex64)} for _ in range(2)]
    assert torch.allclose(complex_ranks.step(fed)[0]["w"], (fed[0]["w"] + fed[1]["w"]) / 2)


@pytest.mark.parametrize("world", [1, 8, 64])
def test_division_that_neither_underflows_nor_overflows(world):
    """Float16 gradients near both ends of the range: what DDP divides before the sum is flushed to zero."""
    fed = [{n: g.sign() * (1 + g.abs() / 8) for n, g in step.items()} for step in draw(world, 0)]
    for low, power in ((True, 2.0**-23), (False, 2.0**15)):
        same_sign = [{n: (g.abs() * power).half() for n, g in step.items()} for step in fed]
        delivered = Ranks(Cast(torch.float16), SHAPES, world, dtype=torch.float16).step(same_sign)[0]
        plain = Ranks(AllReduce(), SHAPES, world, dtype=torch.float16).step(same_sign)[0]
        for n in SHAPES:
            exact = sum(step[n].double() for step in same_sign) / world
            torch.testing.assert_close(delivered[n].double(), exact, rtol=2.0**-10, atol=2.0**-25)
            if low and world == 64:
                assert not plain[n].any()


@dtypes
@pytest.mark.parametrize("scale", [1e-38, 1e-36, 1e-20, 1e20, 3e37])
def test_any_unit_arrives(dtype, scale):
    fed = draw(3, 0, scale=scale)
    delivered = Ranks(Cast(dtype), SHAPES, 3).step(fed)[0]
    for n in SHAPES:
        exact = sum(rank[n].double() for rank in fed) / 3
        assert torch.allclose(delivered[n].double(), exact, rtol=0.01, atol=max(0.01 * scale, 1e-40))


@dtypes
def test_the_same_loss_as_the_exact_average(dtype):
    assert final_loss(Cast(dtype)) == pytest.approx(final_loss(AllReduce()), rel=1e-3)


def test_small_parts_arrive_in_the_end():
    """A number far below the spacing of its rank's code is delivered when enough of it has gathered."""
    ranks = Ranks(Cast(torch.bfloat16), {"w": (2, 2)}, 1)
    total = torch.zeros(2, 2)
    for _ in range(400):
        total += ranks.step([{"w": torch.full((2, 2), 1 + 2.0**-12)}])[0]["w"]
    assert torch.allclose(total + ranks.residual(0, "w"), torch.full((2, 2), 400 * (1 + 2.0**-12)), rtol=1e-6)
    assert float(total[0, 0]) > 400.0


@pytest.mark.parametrize("wrong", [torch.float32, torch.int16, "bfloat16", 16, None, []], ids=str)
def test_settings(wrong):
    with pytest.raises(SettingError, match=r"Cast\.dtype is .*, but must be torch\.bfloat16 or torch\.float16"):
        Cast(wrong)
