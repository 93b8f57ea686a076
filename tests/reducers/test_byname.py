"""Rules by name: who reduces what, and that several reducers make one step."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from distopt import AllReduce, ByName, Cast, EnergyRank, Hierarchical, PowerSGD, Quantize, SettingError, TopK
from tests.attach.models import same
from tests.simulation import Ranks

SHAPES = {"mlp.up": (12, 20), "mlp.down": (20, 12), "attention.out": (16, 16), "attention.bias": (16,), "head": (9, 16)}
seeds = st.integers(0, 2**31)


def draw(world, seed):
    generator = torch.Generator().manual_seed(seed)
    return [{n: torch.randn(s, generator=generator) for n, s in SHAPES.items()} for _ in range(world)]


def only(gradients, names):
    return [{n: rank[n] for n in names} for rank in gradients]


@given(world=st.integers(1, 3), seed=seeds)
def test_each_part_is_what_its_reducer_would_do_alone(world, seed):
    rules = {"mlp.*": PowerSGD(rank=2), "*.out": TopK(0.1), "att*": Cast(torch.bfloat16)}
    parts = {
        PowerSGD(rank=2): ["mlp.up", "mlp.down"],
        TopK(0.1): ["attention.out"],
        Cast(torch.bfloat16): ["attention.bias"],
        Quantize(8): ["head"],
    }
    ranks = Ranks(ByName(rules, default=Quantize(8)), SHAPES, world)
    alone = {r: Ranks(r, {n: SHAPES[n] for n in names}, world) for r, names in parts.items()}
    for step in range(3):
        fed = draw(world, seed + step)
        delivered = ranks.step(fed)[0]
        for reducer, names in parts.items():
            expected = alone[reducer].step(only(fed, names))[0]
            assert same({n: delivered[n] for n in names}, expected), reducer
    assert set(ranks.states[0].residuals) == {name for names in parts.values() for name in names}


def test_the_first_pattern_decides():
    rules = {"mlp.up": AllReduce(), "mlp.*": Quantize(4), "*": Cast(torch.float16)}
    ranks = Ranks(ByName(rules), SHAPES, 2)
    ranks.step(draw(2, 0))
    assert set(ranks.states[0].residuals) == set(SHAPES) - {"mlp.up"}
    swapped = Ranks(ByName(dict(reversed(rules.items()))), SHAPES, 2)
    swapped.step(draw(2, 0))
    assert set(swapped.states[0].residuals) == set(SHAPES)


def test_without_a_match_the_default_averages_exactly():
    fed = draw(3, 0)
    assert same(
        Ranks(ByName({"nothing*": TopK(0.1)}), SHAPES, 3).step(fed)[0], Ranks(AllReduce(), SHAPES, 3).step(fed)[0]
    )


def test_equal_reducers_of_different_rules_stay_apart_and_one_object_works_once():
    one = Quantize(8)
    together = Ranks(ByName({"mlp.*": one, "att*": one}, default=one), SHAPES, 2)
    together.step(draw(2, 0))
    apart = Ranks(ByName({"mlp.*": Quantize(8), "att*": Quantize(8)}, default=Quantize(8)), SHAPES, 2)
    apart.step(draw(2, 0))
    assert len(together.payload_sizes) < len(apart.payload_sizes)


@given(seed=seeds)
def test_a_bad_number_in_one_part_drops_all(seed):
    ranks = Ranks(ByName({"mlp.*": PowerSGD(rank=2), "att*": TopK(0.1)}, default=Quantize(8)), SHAPES, 2)
    ranks.step(draw(2, seed))
    before = ranks.snapshot()
    for name in SHAPES:
        poisoned = draw(2, seed + 1)
        poisoned[1][name].view(-1)[-1] = float("inf")
        assert ranks.step(poisoned) is None
        assert all(same(now, then) for now, then in zip(ranks.snapshot(), before, strict=True))


def test_parts_that_divide_the_ranks():
    nested = Hierarchical(AllReduce(), PowerSGD(rank=2), ranks_per_node=2)
    ranks = Ranks(ByName({"mlp.*": nested, "att*": TopK(0.1)}), SHAPES, 4)
    for step in range(3):
        outputs = ranks.step(draw(4, step))
        assert all(same(outputs[0], other) for other in outputs)
    poisoned = draw(4, 9)
    poisoned[3]["mlp.up"][0, 0] = float("nan")
    assert ranks.step(poisoned) is None
    other = Hierarchical(AllReduce(), TopK(0.1), ranks_per_node=4)
    with pytest.raises(SettingError, match="agree on the ranks of a node"):
        ByName({"mlp.*": nested, "att*": other}).parts(4)


def test_ranks_may_adapt_inside():
    reducer = ByName({"mlp.*": PowerSGD(EnergyRank(0.9, most=6, every=2), min_saving=-9.0)})
    ranks = Ranks(reducer, SHAPES, 2)
    base = torch.outer(torch.arange(1.0, 13.0), torch.linspace(-1, 1, 20))
    for step in range(6):
        fed = draw(2, step)
        for rank in fed:
            rank["mlp.up"] = base.clone()
        ranks.step(fed)
    factor = next(f for name, f in ranks.states[0].factors.items() if name.startswith("mlp.up"))
    assert factor.shape[1] < 6


@pytest.mark.parametrize(
    "rules", [{}, None, [("a", AllReduce())], {"a": AllReduce}, {1: AllReduce()}, {"a": None}], ids=str
)
def test_wrong_rules_are_refused(rules):
    with pytest.raises(SettingError, match=r"ByName\.rules"):
        ByName(rules)
    with pytest.raises(SettingError, match=r"ByName\.default"):
        ByName({"a": AllReduce()}, default="AllReduce")
