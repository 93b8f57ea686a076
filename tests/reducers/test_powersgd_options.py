"""What PowerSGD can be set to: bases, passes, schedules, formats, slices."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import distopt
from distopt import EnergyRank, PowerSGD
from distopt.numerics.orthogonal import IDENTITY
from distopt.numerics.reference import alternating, power_sgd
from distopt.numerics.storage import Packed, nbytes, unpack
from distopt.reducers.reducer import Place, Slot
from tests.simulation import Ranks, plain

seeds = st.integers(0, 2**31)
ALWAYS = -1e9


def generator_of(seed):
    return torch.Generator().manual_seed(seed)


def noise(shape, world, generator, dtype=torch.float32):
    return [{"w": torch.randn(shape, generator=generator, dtype=dtype)} for _ in range(world)]


def low_rank(shape, rank, generator, dtype=torch.float32):
    left = torch.randn(shape[0], rank, generator=generator, dtype=dtype)
    return left @ torch.randn(rank, shape[1], generator=generator, dtype=dtype)


@given(seed=seeds, world=st.integers(1, 3), rows=st.integers(2, 9), extra=st.integers(0, 9), rank=st.integers(1, 4))
def test_alternating_equals_the_reference(seed, world, rows, extra, rank):
    """P on even steps, Q on odd ones; what is kept is orthonormalised."""
    generator, shape = generator_of(seed), (rows, rows + extra)
    ranks = Ranks(PowerSGD(rank=rank, passes="alternate", min_saving=ALWAYS), {"w": shape}, world, dtype=torch.float64)
    ranks.plans[0].prepare(ranks.states[0])
    kept = ranks.states[0].factors["w"]
    residuals = [torch.zeros(shape, dtype=torch.float64)] * world
    for step in range(4):
        gradients = noise(shape, world, generator, torch.float64)
        basis = kept[rows:] if step % 2 == 0 else kept[:rows]
        expected = alternating([g["w"] for g in gradients], residuals, basis, IDENTITY, send_left=step % 2 == 0)
        delivered = ranks.step(gradients)[0]["w"]
        assert ranks.payload_sizes == [min(rank, rows) * shape[step % 2]]
        assert torch.allclose(delivered, expected.average, rtol=0, atol=1e-9)
        residuals = [ranks.residual(r, "w").clone() for r in range(world)]
        for found, wanted in zip(residuals, expected.residuals, strict=True):
            assert torch.allclose(found, wanted, rtol=0, atol=1e-9)
        kept = ranks.states[0].factors["w"]


def test_alternating_delivers_a_lasting_low_rank_gradient_every_second_step():
    gradient = low_rank((20, 30), 3, generator_of(0), torch.float64)
    ranks = Ranks(PowerSGD(rank=3, passes="alternate"), {"w": (20, 30)}, 2, dtype=torch.float64)
    errors = []
    fed = delivered = torch.zeros(20, 30, dtype=torch.float64)
    for _ in range(6):
        out = ranks.step([{"w": gradient}, {"w": gradient}])[0]["w"]
        fed, delivered = fed + gradient, delivered + out
        errors.append(float((fed - delivered).norm() / gradient.norm()))
    assert errors[0] > 0.1
    assert max(errors[1::2]) < 1e-4
    assert max(errors) == errors[0]


@given(seed=seeds, world=st.integers(1, 3))
def test_a_fixed_basis_never_moves_and_is_not_kept(seed, world):
    """Every step is the reference's with the same Q; afterwards the residuals' mean has nothing left along Q."""
    generator = generator_of(seed)
    ranks = Ranks(PowerSGD(rank=3, basis="fixed", min_saving=ALWAYS), {"w": (8, 13)}, world, dtype=torch.float64)
    q = ranks.plans[0].draw(ranks.plans[0].matrices[0], 13, 3, 0)
    residuals = [torch.zeros(8, 13, dtype=torch.float64)] * world
    for _ in range(4):
        gradients = noise((8, 13), world, generator, torch.float64)
        expected = power_sgd([g["w"] for g in gradients], residuals, q, IDENTITY)
        assert torch.allclose(ranks.step(gradients)[0]["w"], expected.average, rtol=0, atol=1e-9)
        residuals = [ranks.residual(r, "w").clone() for r in range(world)]
        assert float((sum(residuals) @ q).norm()) < 1e-4 * float(sum(residuals).norm())
    assert all(state.factors == {} for state in ranks.states)


def test_a_fixed_basis_starves_without_noise():
    """Under a constant gradient its residual grows without bound; a warm basis recovers."""
    gradient = torch.randn(16, 24, generator=generator_of(0))
    grown = {}
    for basis in ("fixed", "warm"):
        ranks = Ranks(PowerSGD(rank=2, basis=basis, min_saving=ALWAYS), {"w": (16, 24)}, 1)
        norms = []
        for _ in range(200):
            ranks.step([{"w": gradient}])
            norms.append(float(ranks.residual(0, "w").norm()))
        grown[basis] = norms[199] / norms[99]
    assert grown["fixed"] > 1.9
    assert grown["warm"] < 1.3


def test_a_fresh_basis_is_another_one_at_every_step_and_alike_on_all_ranks():
    ranks = Ranks(PowerSGD(rank=2, basis="fresh", min_saving=ALWAYS), {"w": (8, 13)}, 2)
    gradient = torch.randn(8, 13, generator=generator_of(0))
    outputs = []
    for _ in range(3):
        for state in ranks.states:
            state.residuals.clear()
        outputs.append(ranks.step([{"w": gradient}] * 2))
    assert all(torch.equal(a["w"], b["w"]) for a, b in outputs)
    assert not torch.equal(outputs[0][0]["w"], outputs[1][0]["w"])
    assert all(state.factors == {} for state in ranks.states)


@given(seed=seeds, world=st.integers(1, 3), slices=st.sampled_from([2, 3, 6]))
def test_slices_are_compressed_as_parameters_of_their_own(seed, world, slices):
    generator, rows = generator_of(seed), 6 // slices
    together = Ranks(PowerSGD(rank=1, stacked={"w": slices}, min_saving=ALWAYS), {"w": (6, 4, 5)}, world)
    apart = Ranks(PowerSGD(rank=1, min_saving=ALWAYS), {f"w[{i}]": (rows, 4, 5) for i in range(slices)}, world)
    for _ in range(3):
        gradients = noise((6, 4, 5), world, generator)
        pieces = [{f"w[{i}]": p for i, p in enumerate(g["w"].split(rows))} for g in gradients]
        one, other = together.step(gradients)[0]["w"], apart.step(pieces)[0]
        assert torch.equal(one, torch.cat([other[f"w[{i}]"] for i in range(slices)]))
    assert sorted(together.states[0].factors) == sorted(apart.states[0].factors)


def test_slices_that_do_not_divide_are_refused():
    slot = Slot("qkv", nn.Parameter(torch.zeros(10, 4)))
    with pytest.raises(
        distopt.SettingError, match=r"PowerSGD.stacked\['q\*'\] is 3, but must be a divisor of the first"
    ):
        PowerSGD(stacked={"q*": 3}).plan([slot], Place())


@pytest.mark.parametrize("passes", ["both", "alternate"])
def test_a_16_bit_wire_halves_the_bytes_and_loses_nothing(passes):
    sent, errors = {}, {}
    for wire in (None, torch.bfloat16, torch.float16):
        generator = generator_of(0)
        ranks = Ranks(PowerSGD(rank=4, passes=passes, wire_dtype=wire), {"w": (64, 128)}, 2)
        fed = delivered = torch.zeros(64, 128)
        size = 0
        for _ in range(4):
            gradients = noise((64, 128), 2, generator)
            fed = fed + sum(g["w"] for g in gradients)
            delivered = delivered + 2 * ranks.step(gradients)[0]["w"]
            size += sum(ranks.payload_sizes) * (1 if wire else 4)
        kept = sum(ranks.residual(r, "w") for r in range(2))
        sent[wire], errors[wire] = size, float((fed - delivered - kept).abs().max())
    assert sent[torch.bfloat16] * 2 == sent[None]
    assert sent[torch.float16] <= sent[torch.bfloat16] + 2 * 2 * 8  # an exponent a row and round
    assert max(errors.values()) < 1e-4


@pytest.mark.parametrize(
    ("dtype", "kind"), [(torch.bfloat16, torch.Tensor), (torch.float16, Packed), ("1-6-9", Packed)], ids=str
)
def test_residuals_and_factors_in_half_the_memory(dtype, kind):
    ranks = Ranks(PowerSGD(rank=4, residual_dtype=dtype, factor_dtype=dtype), {"w": (64, 128)}, 2)
    full = Ranks(PowerSGD(rank=4), {"w": (64, 128)}, 2)
    generator = generator_of(0)
    for _ in range(5):
        gradients = noise((64, 128), 2, generator)
        ranks.step(gradients)
        full.step(gradients)
    for kept in ("residuals", "factors"):
        stored = getattr(ranks.states[0], kept)["w"]
        assert isinstance(stored, kind)
        assert nbytes(stored) * 2 == nbytes(getattr(full.states[0], kept)["w"])
    assert float((ranks.residual(0, "w") - full.residual(0, "w")).norm()) < 0.5 * float(full.residual(0, "w").norm())


@pytest.mark.parametrize("dtype", [torch.bfloat16, "1-6-9"], ids=str)
def test_what_is_smaller_than_a_16_bit_step_still_arrives(dtype):
    """A steady trickle beside large residuals: rounding to nearest would lose all of it, stochastic rounding none."""
    generator = generator_of(0)
    ranks = Ranks(PowerSGD(rank=1, min_saving=ALWAYS, residual_dtype=dtype), {"w": (16, 16)}, 1)
    trickle = 2e-3 * torch.randn(16, 16, generator=generator)
    delivered = torch.zeros(16, 16)
    for _ in range(4000):
        loud = torch.outer(torch.randn(16, generator=generator), torch.randn(16, generator=generator))
        delivered += ranks.step([{"w": loud + trickle}])[0]["w"] - loud
    total = delivered + unpack(ranks.states[0].residuals["w"])
    assert float((total / 4000 - trickle).norm()) < 0.25 * float(trickle.norm())


def test_a_schedule_of_ranks():
    """Exact before its first step, then each rank from its step on; the columns found so far are kept."""
    ranks = Ranks(PowerSGD(rank={2: 4, 4: 2, 5: 3}, min_saving=ALWAYS), {"w": (8, 12)}, 2)
    generator = generator_of(0)
    sizes = []
    for step in range(7):
        before = copy.deepcopy(ranks.states[0].factors.get("w"))
        gradients = noise((8, 12), 2, generator)
        out = ranks.step(gradients)[0]["w"]
        sizes.append(list(ranks.payload_sizes))
        if step < 2:
            assert torch.equal(out, sum(g["w"] * 0.5 for g in gradients))
        if step in (4, 5):
            plan = ranks.plans[0]._phases[-2 if step == 4 else -1].plan
            state = copy.copy(ranks.states[0])
            state.factors = {"w": before}
            start = plan.kept_factor(plan.matrices[0], state, 12)
            assert torch.equal(start[:, :2], before[:, :2])
    assert sizes == [[96], [96], [32, 48], [32, 48], [16, 24], [24, 36], [24, 36]]


def test_a_rank_that_follows_the_energy():
    generator = generator_of(0)
    rule = EnergyRank(0.95, least=2, most=16, every=5)
    found = {}
    for true_rank in (1, 4, 32):
        ranks = Ranks(PowerSGD(rank=rule, min_saving=ALWAYS), {"w": (32, 48)}, 2)
        for _ in range(60):
            gradient = low_rank((32, 48), true_rank, generator)
            ranks.step([{"w": gradient}, {"w": gradient}])
        found[true_rank] = ranks.states[0].factors["w"].shape[1]
        assert torch.equal(ranks.states[0].factors["w"], ranks.states[1].factors["w"])
        assert sum(ranks.payload_sizes) == (32 + 48) * found[true_rank]
    assert found[1] == 2
    assert 4 <= found[4] <= 6
    assert 9 <= found[32] <= 16


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"target": 1.0}, "EnergyRank.target is 1.0, but must be a number between 0 and 1"),
        ({"least": 0}, "EnergyRank.least is 0, but must be an integer of at least 1"),
        ({"every": 0}, "EnergyRank.every is 0"),
        ({"least": 9, "most": 4}, "EnergyRank.least is 9, but must be at most EnergyRank.most, which is 4"),
    ],
)
def test_energy_settings_out_of_range(settings, message):
    with pytest.raises(distopt.SettingError, match=message):
        EnergyRank(**settings)


def test_the_residual_stays_in_its_memory_and_the_input_in_the_gradients():
    ranks = Ranks(PowerSGD(rank=2), {"w": (16, 40)}, 1)
    generator = generator_of(0)
    ranks.step(noise((16, 40), 1, generator))
    where = ranks.states[0].residuals["w"].data_ptr()
    for _ in range(3):
        ranks.step(noise((16, 40), 1, generator))
        assert ranks.states[0].residuals["w"].data_ptr() == where


@pytest.mark.parametrize("passes", ["both", "alternate"])
def test_what_is_prepared_for_a_loader_is_what_the_first_step_begins_with(passes):
    prepared, bare = (Ranks(PowerSGD(rank=2, passes=passes), {"w": (16, 40)}, 2) for _ in range(2))
    for plan, state in zip(prepared.plans, prepared.states, strict=True):
        plan.prepare(state)
    generator = generator_of(0)
    for _ in range(3):
        gradients = noise((16, 40), 2, generator)
        assert torch.equal(prepared.step(gradients)[0]["w"], bare.step(gradients)[0]["w"])
    shapes = prepared.plans[0].factor_shapes()
    assert {n: tuple(plain(t).shape) for n, t in prepared.states[0].factors.items()} == shapes


def test_what_one_reducer_keeps_the_next_one_sends():
    generator = generator_of(0)
    chain = [
        PowerSGD(rank=2),
        distopt.TopK(0.1),
        distopt.Sign(),
        PowerSGD(rank=1, passes="alternate"),
        distopt.AllReduce(),
    ]
    ranks = Ranks(chain[0], {"w": (16, 40)}, 2, dtype=torch.float64)
    fed = delivered = torch.zeros(16, 40, dtype=torch.float64)
    for reducer in chain:
        ranks.use(reducer)
        for _ in range(3):
            gradients = noise((16, 40), 2, generator, torch.float64)
            fed = fed + sum(g["w"] for g in gradients)
            delivered = delivered + 2 * ranks.step(gradients)[0]["w"]
    assert ranks.states[0].residuals == {}
    assert torch.allclose(fed, delivered, rtol=0, atol=1e-11)
