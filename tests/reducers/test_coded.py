"""The average of coded numbers: nothing lost, the same everywhere, in bytes that do not grow with the ranks."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from distopt.comm.requests import Gather, Swap
from distopt.numerics.codecs import FloatCodec, IntegerCodec, PlainCodec, SignCodec
from distopt.reducers.coded import Coded, coded_average
from distopt.reducers.reducer import Place

CODECS = [PlainCodec(), FloatCodec(torch.bfloat16), FloatCodec(torch.float16), IntegerCodec(8), IntegerCodec(4)]
CODECS.append(SignCodec())
every_codec = pytest.mark.parametrize("codec", CODECS, ids=str)
worlds = st.integers(1, 8)
seeds = st.integers(0, 2**31)
sizes = st.sampled_from([1, 2, 5, 8, 63, 300, 1030])


def average(by_rank, codecs, key=("k",)):
    """What every rank is given, and the bytes of its first message."""
    world = len(by_rank)
    ranks = [
        coded_average([Coded(t, c) for t, c in zip(tensors, codecs, strict=True)], Place(rank, world), *key)
        for rank, tensors in enumerate(by_rank)
    ]
    swaps = [next(rank) for rank in ranks]
    assert all(isinstance(swap, Swap) and len(swap.rows) == world for swap in swaps)
    backs = [rank.send(torch.stack([s.rows[i] for s in swaps])) for i, rank in enumerate(ranks)]
    assert all(isinstance(back, Gather) and back.returning for back in backs)
    results = []
    for rank in ranks:
        with pytest.raises(StopIteration) as returned:
            rank.send(torch.stack([back.tensor for back in backs]))
        results.append(returned.value.value)
    return results, swaps[0].rows.numel()


def draw(world, size, seed, dtype=torch.float64, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    return [scale * torch.randn(size, generator=generator, dtype=dtype) for _ in range(world)]


@every_codec
@given(world=worlds, size=sizes, other=sizes, seed=seeds)
def test_the_shares_average_to_what_is_delivered_and_all_ranks_have_it(codec, world, size, other, seed):
    first, second = draw(world, size, seed), draw(world, other, seed + 1)
    results, _ = average(list(zip(first, second, strict=True)), [codec, PlainCodec()])
    for part, fed in enumerate((first, second)):
        sents = [result[part] for result in results]
        assert all(torch.equal(sents[0].average, sent.average) for sent in sents)
        assert all(sent.average.shape == fed[0].shape == sent.own.shape for sent in sents)
        shares = torch.stack([sent.own for sent in sents]).mean(0)
        assert torch.allclose(shares, sents[0].average, rtol=0, atol=1e-13 * world)


@given(world=worlds, size=sizes, seed=seeds)
def test_plain_is_the_average(world, size, seed):
    fed = draw(world, size, seed)
    results, _ = average([[t] for t in fed], [PlainCodec()])
    assert torch.allclose(results[0][0].average, torch.stack(fed).mean(0), rtol=0, atol=1e-14)
    assert all(torch.equal(result[0].own, t) for result, t in zip(results, fed, strict=True)) or world > 1


@every_codec
@given(world=worlds, size=st.sampled_from([8 * 840, 840 * 512]), seed=st.just(0))
def test_bytes_do_not_grow_with_the_ranks(codec, world, size, seed):
    _, sent = average([[t] for t in draw(world, size, seed, torch.float32)], [codec])
    _, alone = average([[t] for t in draw(1, size, seed, torch.float32)], [codec])
    assert sent == world * codec.nbytes(size // world)
    assert sent <= alone + world * 8  # a scale more for each rank's last block


@every_codec
@given(world=worlds, size=sizes, seed=seeds, bad=st.sampled_from([math.nan, math.inf, -math.inf]), data=st.data())
def test_what_is_not_finite_arrives_everywhere(codec, world, size, seed, bad, data):
    fed = draw(world, size, seed, torch.float32)
    place = data.draw(st.integers(0, size - 1))
    fed[data.draw(st.integers(0, world - 1))][place] = bad
    results, _ = average([[t] for t in fed], [codec])
    assert all(not math.isfinite(result[0].average[place]) for result in results)


@every_codec
@given(world=st.integers(2, 8), power=st.integers(120, 127), seed=seeds)
def test_near_the_end_of_the_range_shares_are_finite_or_the_average_is_not(codec, world, power, seed):
    """A share that overflows would poison one rank's residual for ever: the others have to hear of it."""
    fed = [t.clamp(-1.99, 1.99) * 2.0**power for t in draw(world, 40, seed, torch.float32)]
    results, _ = average([[t] for t in fed], [codec])
    residuals = [t - result[0].own for t, result in zip(fed, results, strict=True)]
    if torch.isfinite(results[0][0].average).all():
        assert all(torch.isfinite(residual).all() for residual in residuals)


def test_a_sum_beyond_the_range_is_no_obstacle_to_the_average():
    fed = [torch.full((6,), 3e38), torch.full((6,), 2e38), torch.full((6,), 1e38)]
    for codec in (PlainCodec(), FloatCodec(torch.bfloat16), FloatCodec(torch.float16), IntegerCodec(8)):
        results, _ = average([[t] for t in fed], [codec])
        assert torch.allclose(results[0][0].average, torch.full((6,), 2e38), rtol=0.01)


def test_an_owners_share_beyond_the_range_is_told_to_all():
    """A large average among small ones becomes as small as they: what that takes off is kept by one rank."""
    fed = [torch.full((512,), 3e38) * (-1) ** rank for rank in range(8)]
    for tensor in fed:
        tensor[::64] = 3e38
    results, _ = average([[t] for t in fed], [SignCodec()])
    finite = torch.isfinite(results[0][0].average).all()
    assert finite == all(torch.isfinite(t - r[0].own).all() for t, r in zip(fed, results, strict=True))
    assert not finite


def test_ranks_are_added_up_in_their_order():
    """So that two backends, or two layouts of buckets, give the same bits."""
    fed = draw(5, 100, 0, torch.float32)
    results, _ = average([[t] for t in fed], [PlainCodec()])
    total = fed[0].clone()
    for tensor in fed[1:]:
        total += tensor
    assert torch.equal(results[3][0].average, total / 5)


def test_random_bits_differ_between_ranks_and_keys_and_repeat():
    same = [[torch.linspace(-1, 1, 400)] for _ in range(2)]
    first, _ = average(same, [IntegerCodec(4)], key=(0, "w", 1))
    again, _ = average(same, [IntegerCodec(4)], key=(0, "w", 1))
    later, _ = average(same, [IntegerCodec(4)], key=(0, "w", 2))
    assert torch.equal(first[0][0].average, again[0][0].average)
    assert not torch.equal(first[0][0].average, later[0][0].average)
    assert not torch.equal(first[0][0].own[:200], first[1][0].own[:200])
