"""Sharded models on real processes equal unsharded ones, for every layout, and keep the laws of the DDP path."""

import distopt
from tests.processes import run_ranks
from tests.sharding.models import Model, sharded, train, whole, worst, wrapped

LOW_RANK = distopt.PowerSGD(rank=2, min_saving=0.0)


def trained(rank, shape, reducer, steps, **options):
    """Parameters after some steps; without a shape, under DDP."""
    model = Model(seed=rank)  # the first rank's parameters are everyone's
    del model.unused  # DDP would ask for its gradients
    model, registration = sharded(shape, reducer, model, **options) if shape else wrapped(reducer, model)
    train(model, rank, steps)
    registration.check_replicas()
    return whole(model), registration.stats()


def bitwise_job(rank):
    reducers = [distopt.AllReduce(), LOW_RANK, distopt.TopK(0.3)]
    found = []
    for reducer in reducers:
        ours, theirs = (trained(rank, shape, reducer, 6) for shape in ((2, 1), None))
        found.append((str(reducer), worst(ours[0], theirs[0]), ours[1].bytes_sent == theirs[1].bytes_sent))
    return found


def test_one_shard_is_ddp_to_the_bit():
    for name, difference, same_bytes in run_ranks(2, bitwise_job)[0]:
        assert difference == 0.0, name
        assert same_bytes, name


def layouts_job(rank):
    runs = [((2, 2), 20, {}), ((1, 4), 4, {"recompute": False}), ((4, 1), 4, {"prefetch": False})]
    references = {steps: trained(rank, None, distopt.AllReduce(), steps)[0] for steps in (20, 4)}
    exact = [
        worst(trained(rank, shape, None, steps, **options)[0], references[steps]) for shape, steps, options in runs
    ]
    compressed = [trained(rank, shape, LOW_RANK, 4)[0] for shape in ((4, 1), None)]
    return max(exact), worst(*compressed)


def test_every_layout_is_the_unsharded_run():
    """Uneven and empty shards, tied and frozen parameters, with and without recomputing and prefetching."""
    exact, compressed = zip(*run_ranks(4, layouts_job, timeout=110), strict=True)
    assert max(exact) < 1e-12
    assert max(compressed) < 1e-9  # four replicas are added up in another order than under DDP
