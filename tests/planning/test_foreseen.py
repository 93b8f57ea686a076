"""What a plan foresees of the collectives is what the reducers themselves ask for, to the byte."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import distopt
from distopt.planning.foreseen import HALF, WHOLE, collectives, may_be_ranked, sent
from distopt.planning.workload import gradients_of
from distopt.reducers.reducer import Place
from distopt.reducers.rehearsal import rehearse

DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float64])
SHAPES = st.lists(
    st.one_of(
        st.tuples(st.integers(16, 40), st.integers(16, 40)),
        st.tuples(st.integers(1, 9)),
        st.just(()),
        st.tuples(st.integers(8, 12), st.just(4), st.just(3)),
    ),
    min_size=1,
    max_size=5,
)


def slots_of(shapes, dtype):
    return gradients_of([(f"p{i}", shape, dtype) for i, shape in enumerate(shapes)])


@given(
    SHAPES,
    DTYPES,
    st.integers(1, 3),
    st.sampled_from(["both", "alternate"]),
    st.sampled_from([None, torch.float32, torch.bfloat16, torch.float16]),
    st.integers(2, 5),
    st.integers(0, 1),
)
def test_low_rank(shapes, dtype, rank, passes, wire_dtype, peers, step):
    slots = slots_of(shapes, dtype)
    reducer = distopt.PowerSGD(rank, passes=passes, wire_dtype=wire_dtype)
    ways = [rank if may_be_ranked(slot, rank, 0.5, wire_dtype) else WHOLE for slot in slots]
    told = collectives(slots, ways, peers, passes=passes, wire_dtype=wire_dtype, step=step)
    found = rehearse(reducer, slots, Place(0, peers), step)
    assert tuple(told) == found.asked
    assert sent(told) == found.sent


@given(SHAPES, DTYPES, st.integers(2, 5))
def test_sixteen_bits(shapes, dtype, peers):
    slots = slots_of(shapes, dtype)
    found = rehearse(distopt.Cast(torch.bfloat16), slots, Place(0, peers))
    told = collectives(slots, [HALF] * len(slots), peers)
    assert (tuple(told), sent(told)) == (found.asked, found.sent)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_whole(dtype):
    slots = slots_of([(3, 4), (5,)], dtype)
    assert tuple(collectives(slots, [WHOLE] * 2, 4)) == rehearse(distopt.AllReduce(), slots, Place(0, 4)).asked
