"""Ranks that differ are found at once, on every rank, and named with what differs; ranks that agree are left alone."""

import itertools
import math

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

from distopt.comm.agreement import Step, StepCheck, agree, describe, difference, drift
from distopt.errors import AgreementError
from tests.processes import run_ranks

FACTS = [("a", "float32 [2, 3]"), ("b", "float32 [3]"), ("c", "float32 []")]
facts = st.lists(
    st.tuples(st.sampled_from("abcdef"), st.sampled_from("xyz")), max_size=5, unique_by=lambda fact: fact[0]
)


# --- comparing, in one process


@given(facts, st.integers(1, 6))
def test_the_same_facts_are_no_difference(same, world):
    assert difference(dict.fromkeys(range(world), same), "setting") is None


@given(facts, facts, st.integers(3, 6), st.data())
def test_one_rank_that_differs_in_anything_is_named_alone(most, other, world, data):
    odd = data.draw(st.integers(0, world - 1))
    error = difference({rank: other if rank == odd else most for rank in range(world)}, "setting")
    if most == other:
        assert error is None
    else:
        assert error.ranks == (odd,)
        assert f"rank {odd} " in str(error)
        assert "\n" not in str(error)


@given(st.lists(facts, min_size=2, max_size=5))
def test_any_difference_is_found(by_rank):
    error = difference(dict(enumerate(by_rank)), "setting")
    assert (error is None) == all(own == by_rank[0] for own in by_rank)


def test_two_ranks_are_both_told():
    error = difference({0: [("rank", "4")], 1: [("rank", "8")]}, "setting")
    assert (str(error), error.ranks) == ("setting 'rank' differs: rank 0 has 4 where rank 1 has 8", (0, 1))


@pytest.mark.parametrize(
    ("by_rank", "message"),
    [
        (
            [FACTS, FACTS[:2], FACTS],
            "rank 1 has no parameter 'c', which ranks 0, 2 have",
        ),
        (
            [FACTS, [*FACTS, ("d", "")], FACTS],
            "rank 1 has parameter 'd', which ranks 0, 2 have not",
        ),
        (
            [FACTS, [FACTS[1], FACTS[0], FACTS[2]], FACTS],
            "order differs: rank 1 has 'b' where ranks 0, 2 have 'a'",
        ),
        (
            [FACTS, FACTS, [*FACTS[:2], ("c", "float32 [1]")]],
            "parameter 'c' differs: rank 2 has float32 [1] where ranks 0, 1 have float32 []",
        ),
        (
            [[("c", "1")], [("c", "2")], [("c", "3")], [("c", "3")]],
            "parameter 'c' differs: rank 0 has 1, rank 1 has 2 where ranks 2, 3 have 3",
        ),
    ],
)
def test_what_is_said(by_rank, message):
    assert str(difference(dict(enumerate(by_rank)), "parameter")) == message


def test_a_tensor_in_words():
    assert describe(torch.nn.Parameter(torch.ones(2, 3, dtype=torch.bfloat16))) == "bfloat16 [2, 3] with gradient"
    assert describe(torch.ones((), dtype=torch.bool)) == "bool []"


# --- real worlds


def caught(check, *args):
    """The message and the ranks of the error that a check raises, None if it raises none."""
    try:
        check(*args)
    except AgreementError as error:
        return str(error), error.ranks
    return None


def agree_job(rank):
    group = dist.new_group([1, 2, 3], use_local_synchronization=True) if rank else None
    told = [caught(agree, dist.group.WORLD, FACTS, "parameter")]
    told.append(caught(agree, dist.group.WORLD, [("reducer", f"PowerSGD(rank={8 if rank == 2 else 4})")], "setting"))
    told.append(caught(agree, dist.group.WORLD, FACTS[: 3 - (rank == 1)], "parameter"))
    if rank:
        told.append(caught(agree, group, FACTS[:: -1 if rank == 3 else 1], "parameter"))
    return told


def test_every_rank_is_told_the_same_in_global_ranks():
    for rank, told in enumerate(run_ranks(4, agree_job)):
        expected = [
            None,
            ("setting 'reducer' differs: rank 2 has PowerSGD(rank=8) where ranks 0, 1, 3 have PowerSGD(rank=4)", (2,)),
            ("rank 1 has no parameter 'c', which ranks 0, 2, 3 have", (1,)),
            ("order differs: rank 3 has 'c' where ranks 1, 2 have 'a'", (3,)),
        ]
        assert told == (expected if rank else expected[:3])


HEALTHY = (7, ("head.weight", "head.bias"), 1)
STEPS = {
    "the loss scale differs: rank 2 has 65536 where ranks 0, 1 have 1": {2: (*HEALTHY, 2.0**16)},
    "rank 1 did 2 forward passes since its last reduction where ranks 0, 2 did 1 forward pass: "
    "was it in no_sync() alone?": {1: (7, HEALTHY[1], 2)},
    "rank 2 is at step 8 where ranks 0, 1 are at step 7": {2: (8, HEALTHY[1], 1)},
    "in the first bucket of a step: rank 0 has parameter 'tail', which ranks 1, 2 have not": {0: (7, ("tail",), 1)},
    "in the first bucket of a step: order differs: rank 0 has 'head.bias' where ranks 1, 2 have 'head.weight'": {
        0: (7, HEALTHY[1][::-1], 1)
    },
}


def steps_job(rank):
    check = StepCheck(dist.group.WORLD, [("reducer", "AllReduce()")])
    told = [caught(check, Step(*odd.get(rank, HEALTHY))) for odd in STEPS.values()]
    healthy = [caught(check, Step(number, ("a", "b"), forwards=number % 3)) for number in range(2000)]
    joined = caught(
        check, Step(7, ("a", "b"), forwards=0 if rank == 1 else 2, loss_scale=2.0**rank if rank == 1 else 8)
    )
    check.restate([("reducer", "AllReduce()" if rank else "Cast()")])
    changed = caught(check, Step(*HEALTHY))
    return told, healthy, joined, changed


def test_every_step_is_compared():
    for told, healthy, joined, changed in run_ranks(3, steps_job):
        assert [message for message, _ in told] == list(STEPS)
        assert [ranks for _, ranks in told] == [tuple(odd) for odd in STEPS.values()]
        assert set(healthy) == {None}
        assert joined is None
        assert changed == ("setting 'reducer' differs: rank 0 has Cast() where ranks 1, 2 have AllReduce()", (0,))


def two_job(rank):
    check = StepCheck(dist.group.WORLD)
    return caught(check, Step(3, ("a",), forwards=1 + rank))


def test_two_ranks_cannot_tell_who_is_odd():
    for message, ranks in run_ranks(2, two_job):
        assert "rank 0 did 1 forward pass since its last reduction where rank 1 did 2 forward passes" in message
        assert ranks == (0, 1)


FLIPS = 200


def replica():
    generator = torch.Generator().manual_seed(0)
    dtypes = [torch.float32, torch.bfloat16, torch.float64, torch.int64, torch.float16, torch.complex64]
    tensors = {
        f"layer.{i}": torch.randn(shape, generator=generator).to(dtype)
        for i, (shape, dtype) in enumerate(itertools.product([(), (7,), (5, 3), (100, 33)], dtypes))
    }
    return tensors | {"mask": torch.zeros(9, dtype=torch.bool), "none": torch.empty(0, 3), "t": torch.ones(4, 5).t()}


def drift_job(rank, world):
    """Flip one bit of one tensor of one rank, check, and flip it back; 200 times."""
    tensors = replica()
    names = [name for name, tensor in tensors.items() if tensor.numel() and tensor.is_contiguous()]
    chance = torch.Generator().manual_seed(1)

    def draw(high):
        return int(torch.randint(high, (), generator=chance))

    told = [caught(drift, dist.group.WORLD, tensors)]
    expected = []
    for _ in range(FLIPS):
        odd, name = draw(world), names[draw(len(names))]
        data = tensors[name].reshape(-1).view(torch.uint8)
        place, bit = draw(data.numel()), 0 if name == "mask" else draw(8)
        if rank == odd:
            data[place] ^= 1 << bit
        told.append(caught(drift, dist.group.WORLD, tensors))
        if rank == odd:
            data[place] ^= 1 << bit
        expected.append((odd, name))
    return told, expected, caught(drift, dist.group.WORLD, tensors)


@pytest.mark.parametrize("world", [2, 4])
def test_200_of_200_flipped_bits_are_found_and_named_on_every_rank(world):
    for (before, *told), expected, after in run_ranks(world, drift_job, world):
        assert before is None
        assert after is None
        assert len(told) == FLIPS
        for (message, ranks), (odd, name) in zip(told, expected, strict=True):
            assert f"tensor {name!r} differs" in message
            assert ranks == ((odd,) if world > 2 else (0, 1))
            assert world == 2 or f"on rank {odd} from ranks " in message


def different_job(rank):
    tensors = {"a": torch.ones(2), "b": torch.ones(3 if rank == 2 else 2)}
    lists = caught(drift, dist.group.WORLD, tensors)
    several = {name: torch.full((3,), float(rank == 1)) for name in "ab"}
    nan = {"nan": torch.full((2,), math.nan)}
    return lists, caught(drift, dist.group.WORLD, several), caught(drift, dist.group.WORLD, nan)


def test_different_tensors_and_several_that_drifted():
    for lists, several, nan in run_ranks(3, different_job):
        assert lists == ("tensor 'b' differs: rank 2 has float32 [3] where ranks 0, 1 have float32 [2]", (2,))
        assert several == ("replicas drifted apart: tensor 'a' (and 1 more) differs on rank 1 from ranks 0, 2", (1,))
        assert nan is None
