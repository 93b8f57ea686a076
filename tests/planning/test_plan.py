"""What a plan says: laws of its cost model, and the paper's sizes."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import distopt
from distopt import PowerSGD, SettingError, plan
from distopt.planning.machine import Network, Processor
from distopt.planning.workload import buckets_of, gradients_of
from distopt.reducers.reducer import Place
from distopt.reducers.rehearsal import Asked, rehearse
from tests.processes import run_ranks

MODELS = st.lists(
    st.tuples(st.sampled_from([(64, 48), (512, 512), (2048, 512), (100,), (7, 5)]), st.sampled_from([torch.float32])),
    min_size=1,
    max_size=8,
).map(lambda shapes: [(f"p{i}", *shape) for i, shape in enumerate(shapes)])
RATES = st.floats(1e5, 1e12)
SETTINGS = st.fixed_dictionaries({
    "world_size": st.sampled_from([2, 4, 64, 4096]),
    "latency": st.sampled_from([0.0, 1e-6, 1e-3]),
    "memory_rate": st.floats(1e8, 1e13),
    "compute_seconds": st.sampled_from([0.0, 0.01, 1.0]),
    "bucket_seconds": st.sampled_from([0.0, 1e-4]),
    "algorithm": st.sampled_from(["ring", "tree"]),
    "bucket_bytes": st.sampled_from([2**18, 2**25]),
})  # fmt: skip
RANKS = (1, 4, 16)


@given(MODELS, RATES, st.floats(1.0, 100.0), SETTINGS)
def test_more_bandwidth_never_makes_plain_ddp_slower(model, bandwidth, times, settings):
    slow = plan(model, bandwidth=bandwidth, ranks=RANKS, **settings)
    fast = plan(model, bandwidth=bandwidth * times, ranks=RANKS, **settings)
    assert fast.plain.step_seconds <= slow.plain.step_seconds * (1 + 1e-9)


@given(MODELS, RATES, SETTINGS, st.floats(0.0, 0.5))
def test_compression_is_chosen_only_where_it_is_predicted_faster(model, bandwidth, settings, margin):
    found = plan(model, bandwidth=bandwidth, ranks=RANKS, margin=margin, **settings)
    assert found.chosen.step_seconds <= found.plain.step_seconds
    if found.helps:
        assert found.expected_saving > margin - 1e-9
        assert str(found).startswith("compress: ")
    else:
        assert found.chosen is found.plain
        assert isinstance(found.reducer(), distopt.AllReduce)
        assert str(found).startswith("off: this would not help here")
    assert found.seconds[found.chosen.scheme.label] <= min(found.seconds.values()) / (1 - margin) * (1 + 1e-9)


@given(MODELS, RATES, SETTINGS)
def test_the_whole_is_the_sum_of_its_parts(model, bandwidth, settings):
    found = plan(model, bandwidth=bandwidth, ranks=RANKS, **settings)
    for estimate, after in ((found.plain, False), (found.chosen, True)):
        seconds = sum(choice.seconds_after if after else choice.seconds_before for choice in found.choices)
        nbytes = sum(choice.bytes_after if after else choice.bytes_before for choice in found.choices)
        assert seconds + estimate.fixed_seconds == pytest.approx(estimate.reducing_seconds)
        assert nbytes == pytest.approx(estimate.nbytes)
    for estimate in found.estimates.values():
        compute = found.compute_seconds
        # What is hidden is at most all of it, and no step is shorter than what it computes.
        assert max(compute, estimate.reducing_seconds) <= estimate.step_seconds * (1 + 1e-9)
        assert estimate.step_seconds <= (compute + estimate.reducing_seconds) * (1 + 1e-9)


@given(MODELS, SETTINGS)
def test_off_without_others_and_without_a_limit(model, settings):
    alone = plan(model, bandwidth="10Mbit", ranks=RANKS, **(settings | {"world_size": 1}))
    assert not alone.helps
    assert alone.expected_saving == 0.0
    assert "nobody to send gradients to" in alone.reason
    assert not plan(model, bandwidth=math.inf, ranks=RANKS, **(settings | {"latency": 0.0})).helps


@pytest.mark.parametrize("passes", ["both", "alternate"])
@pytest.mark.parametrize("wire_dtype", [None, torch.float16])
@pytest.mark.parametrize("vocabulary", [100, 5000])
def test_the_reducer_sends_what_the_plan_says(passes, wire_dtype, vocabulary):
    """Its own code, gone through without numbers; with a large embedding the rest travels in 16 bits."""
    model = [("embed", (vocabulary, 64), torch.float32), ("bias", (9,), torch.float32)]
    model += [(f"w{i}", (256, (i + 1) * 128), torch.float32) for i in range(3)]
    settings = {"ranks": (2, 32), "passes": passes, "like": PowerSGD(wire_dtype=wire_dtype), "bucket_bytes": 2**18}
    found = plan(model, world_size=4, bandwidth="100Mbit", latency=0.0, memory_rate="100GB", **settings)
    assert found.helps
    assert isinstance(found.reducer(), distopt.ByName) or vocabulary < 5000
    buckets = buckets_of(gradients_of(model), 2**18)
    steps = [sum(rehearse(found.reducer(), bucket, Place(0, 4), step).sent for bucket in buckets) for step in (0, 1)]
    assert found.chosen.nbytes == sum(steps) / 2


def real_bytes(rank, bandwidth, steps):
    """Train under the reducer of a plan; bytes sent in these steps, and what was planned."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(96, 128), nn.LayerNorm(128), nn.Linear(128, 96))
    found = plan(model, world_size=2, bandwidth=bandwidth, memory_rate="1GB", bucket_seconds=0.0, ranks=(2, 4))
    ddp = nn.parallel.DistributedDataParallel(model)
    registration = distopt.register(ddp, found.reducer())
    for _ in range(steps):
        ddp(torch.randn(4, 96)).square().mean().backward()
    stats = registration.stats()
    return (
        found.helps,
        found.chosen.nbytes * steps,
        stats.bytes_sent,
        found.plain.nbytes * steps,
        stats.bytes_uncompressed,
    )


@pytest.mark.parametrize(("bandwidth", "helps"), [("1Mbit", True), ("100GB", False)])
def test_bytes_are_those_of_real_ranks(bandwidth, helps):
    for found, *counted in run_ranks(2, real_bytes, bandwidth, 4):
        planned, sent, before, uncompressed = counted
        assert (found, planned, before) == (helps, sent, uncompressed)


@pytest.mark.parametrize(
    ("asked", "ring", "tree"),
    [
        (Asked("average", 1000), (1.75, 14.0), (1.75, 6.0)),
        (Asked("gather", 125), (0.875, 7.0), (0.875, 3.0)),
        (Asked("swap", 1000), (0.875, 7.0), (0.875, 7.0)),
    ],
)
def test_collectives_by_hand(asked, ring, tree):
    """Eight ranks, 1000 bytes and messages of a second each."""
    for algorithm, seconds in (("ring", ring), ("tree", tree)):
        network = Network(bandwidth=1000.0, latency=1.0, world_size=8, algorithm=algorithm)
        assert network.seconds(asked) == (*seconds, 0.0)


def test_the_processors_part_of_a_transfer_by_hand():
    """Eight ranks, each of which sends 1750, 875 and 875 bytes, for a thousandth of a second of its processor each."""
    asked = [Asked("average", 1000), Asked("gather", 125), Asked("swap", 1000)]
    for ranks_a_node in (1, 4):
        network = Network(100.0, 0.0, 8, ranks_a_node, cpu_seconds_per_byte=1e-3)
        assert [network.seconds(a).computing for a in asked] == pytest.approx([1.75, 0.875, 0.875])
    sharded = Network(100.0, 0.0, 8, 4, sharded=True, cpu_seconds_per_byte=1e-3)
    assert sharded.seconds(asked[0]).computing == pytest.approx(1.0)
    # Whoever is busy with sending for longer than the bytes travel is so much slower.
    assert Network(1e6, 0.0, 2, cpu_seconds_per_byte=1e-3).seconds(Asked("average", 1000)).transfer == 1.0


@pytest.mark.parametrize(("busy", "seconds"), [(0.0, 3.5), (0.5, 3.75), (1.0, 4.0)])
def test_what_sending_computes_is_not_hidden(busy, seconds):
    """Two equal buckets, half a second of wire each; forward takes 1 s, each one's part of backward as long."""
    model = [(name, (2**20,), torch.float32) for name in "ab"]
    rate, each = 4 * 2**20 / 0.5, busy * 0.5 / (4 * 2**20)
    settings = {"bandwidth": rate, "latency": 0.0, "memory_rate": 1e12, "compute_seconds": 3.0, "bucket_bytes": 2**20}
    found = plan(model, world_size=2, cpu_seconds_per_byte=each, **settings)
    assert found.plain.step_seconds == pytest.approx(seconds)


@pytest.mark.parametrize("rank", [1, 4])
@pytest.mark.parametrize(("passes", "gone_through", "products"), [("both", 8, 4), ("alternate", 7, 3)])
def test_compressing_by_hand(rank, passes, gone_through, products):
    """Three matrices in one bucket: passes, products, reflections, and what each and the bucket take besides."""
    model = [(f"w{i}", (64, 256), torch.float32) for i in range(3)]
    rates = {"memory_rate": 1e6, "flops_rate": 1e7, "bucket_seconds": 3.0, "matrix_seconds": 0.5}
    settings = {"world_size": 2, "bandwidth": 1.0, "latency": 0.0, "ranks": rank, "passes": passes}
    found = plan(model, **rates, **settings).estimates[
        f"rank {rank}" + (", alternate" if passes == "alternate" else "")
    ]
    computing = gone_through * 4 * 64 * 256 / 1e6 + (2 * products * 64 * 256 * rank + 4 * 64 * rank**2) / 1e7
    travelling = 4 * (64 + 256) * rank / (1 if passes == "both" else 2)
    assert found.step_seconds == pytest.approx(3 * (computing + 0.5 + travelling) + 3.0)
    assert found.fixed_seconds == pytest.approx(3.0)


def test_units_of_a_sharded_model():
    """Backward ends with the first unit, and what is outside of all units comes last of all."""
    model = nn.Sequential(*[nn.Linear(256, 256, bias=False) for _ in range(3)], nn.Linear(256, 64, bias=False))
    settings = {"world_size": 4, "ranks_a_node": 2, "sharded": True, "bandwidth": 1e6, "memory_rate": 1e9, "ranks": 4}
    counts = [
        plan(model, **settings, units=units).plain.collectives
        for units in ([model[0]], [model[0], model[1], model[2]], None)
    ]
    assert counts == [2, 4, 1]
    with pytest.raises(SettingError, match="units is 'a', but must be None where the model is a list"):
        plan([("a", (4, 4), torch.float32)], **settings, units="a")


def test_ranks_that_share_a_link():
    flat = Network(bandwidth=1000.0, latency=0.0, world_size=8, ranks_a_node=4)
    sharded = Network(bandwidth=1000.0, latency=0.0, world_size=8, ranks_a_node=4, sharded=True)
    assert (flat.peers, sharded.peers) == (8, 2)
    assert flat.seconds(Asked("average", 800)).transfer == pytest.approx(2 * 7 / 8 * 0.8)
    assert sharded.seconds(Asked("average", 200)).transfer == pytest.approx(0.8)  # each of four sends a quarter
    assert flat.seconds(Asked("swap", 800)).transfer == pytest.approx(4 * 0.8 * 4 / 8)


def test_a_sharded_model_is_planned_piece_by_piece():
    model = [("w", (4096, 4096), torch.float32)]
    found = plan(model, world_size=64, ranks_a_node=8, sharded=True, bandwidth="1Gbit", memory_rate="1TB", ranks=16)
    (choice,) = found.choices
    assert (choice.shape, choice.way) == ((512, 4096), 16)
    assert found.network.peers == 8
    assert plan(model, world_size=8, ranks_a_node=8, sharded=True, bandwidth="1Gbit", memory_rate=1e12).helps is False


def test_everything_else_of_powersgd_is_kept():
    like = PowerSGD(wire_dtype=torch.float16, residual_dtype="1-6-9", uncompressed=["head.*"], seed=3)
    model = [("head.w", (512, 512), torch.float32), ("body.w", (512, 512), torch.float32)]
    found = plan(model, world_size=4, bandwidth="1Mbit", memory_rate="1GB", ranks=8, passes="both", like=like)
    assert [choice.way for choice in found.choices][1] == 8
    assert found.choices[0].way in ("whole", "16 bits")
    inner = found.reducer()
    inner = inner.rules["body.w"] if isinstance(inner, distopt.ByName) else inner
    assert (inner.wire_dtype, inner.residual_dtype, inner.seed, inner.rank) == (torch.float16, "1-6-9", 3, 8)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"world_size": 0}, "world_size is 0, but must be an integer of at least 1"),
        ({"ranks_a_node": 3}, "ranks_a_node is 3, but must be a divisor of the world size, 4"),
        ({"bandwidth": "10 parsecs"}, "bandwidth is '10 parsecs', but must be a rate above 0"),
        ({"bandwidth": None}, "bandwidth is None, but must be a rate, unless torch.distributed is initialised"),
        ({"latency": "-1us"}, "latency is '-1us'"),
        ({"memory_rate": 0}, "memory_rate is 0"),
        ({"compute_seconds": math.nan}, "compute_seconds is nan"),
        ({"ranks": []}, "ranks is []"),
        ({"ranks": 0}, "ranks is 0"),
        ({"passes": "three"}, "passes is 'three'"),
        ({"like": distopt.AllReduce()}, "like is AllReduce()"),
        ({"algorithm": "star"}, "algorithm is 'star'"),
        ({"margin": 1.0}, "margin is 1.0"),
        ({"bucket_bytes": 0}, "bucket_bytes is 0"),
    ],
)
def test_wrong_settings(wrong, words):
    given = {"world_size": 4, "bandwidth": "1Gbit", "memory_rate": 1e9} | wrong
    with pytest.raises(SettingError) as refused:
        plan([("w", (4, 4), torch.float32)], **given)
    assert str(refused.value).startswith(words)


@pytest.mark.parametrize(
    "model", ["w", 3, [("w", (4, 4))], [("w", (4, 4), torch.int8)], [("w", (2,), torch.float32)] * 2]
)
def test_what_is_no_model(model):
    with pytest.raises(SettingError, match="model"):
        plan(model, world_size=4, bandwidth="1Gbit", memory_rate=1e9)


def test_a_processor_by_hand():
    assert Processor(1e9, 1e10, 0.0).seconds(nbytes=2e9, flops=1e10) == 3.0


def test_nothing_to_train():
    model = nn.Linear(4, 4).requires_grad_(False)
    assert not plan(model, world_size=4, bandwidth="1Gbit", memory_rate=1e9).helps
