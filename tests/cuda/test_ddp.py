"""DDP on CUDA: the hook's own stream changes nothing in what is computed, and holds nothing up."""

import math

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import distopt
from bench.gpu.traces import OURS, traced
from tests.attach.models import batch, mlp
from tests.processes import run_ranks

REDUCERS = {
    "AllReduce": distopt.AllReduce(),
    "Cast": distopt.Cast(torch.bfloat16),
    "PowerSGD": distopt.PowerSGD(rank=2),
    "alternate": distopt.PowerSGD(rank=2, passes="alternate"),
    "16-bit residual": distopt.PowerSGD(rank=2, residual_dtype="1-6-9"),
    "coded": distopt.PowerSGD(rank=2, wire_dtype=torch.bfloat16),
    "energy": distopt.PowerSGD(rank=distopt.EnergyRank(0.9, most=4)),
    "TopK": distopt.TopK(fraction=0.1),
}


def trained(rank, device, reducer, bad_step, backend=None, steps=8):
    """Parameters after some steps, the loss of one of them NaN on the last rank."""
    torch.backends.cuda.matmul.allow_tf32 = False
    group = dist.new_group(backend=backend) if backend is not None else None
    model = DistributedDataParallel(mlp(layers=7).to(device), bucket_cap_mb=9 / 1024, process_group=group)
    registration = distopt.register(model, reducer)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for step in range(steps):
        loss = model(batch(rank, step).to(device)).square().mean()
        (loss * math.nan if step == bad_step and rank == dist.get_world_size() - 1 else loss).backward()
        if all(bool(parameter.grad.isfinite().all()) for parameter in model.parameters()):
            optimizer.step()
        optimizer.zero_grad()
    stats = registration.stats()
    return [parameter.detach().cpu() for parameter in model.parameters()], stats.skipped_steps


@pytest.mark.parametrize("reducer", REDUCERS)
def test_two_ranks_on_one_gpu(reducer):
    """Over gloo: both have the same bits, and those of a CPU but for rounding; a bad step is dropped by both."""
    found = run_ranks(2, trained, "cuda", REDUCERS[reducer], 4, timeout=100)
    wanted = run_ranks(2, trained, "cpu", REDUCERS[reducer], 4, timeout=100)
    for mine, other in zip(found[0][0], found[1][0], strict=True):
        assert torch.equal(mine, other)
    assert [skipped for _, skipped in found] == [1, 1]
    tolerance = 5e-3 if reducer in ("16-bit residual", "coded", "Cast") else 1e-4
    if reducer not in ("TopK", "energy"):  # which of two nearly equal numbers is larger is for rounding to say
        for mine, theirs in zip(found[0][0], wanted[0][0], strict=True):
            torch.testing.assert_close(mine, theirs, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("reducer", ["AllReduce", "PowerSGD", "alternate"])
def test_one_rank_over_nccl(reducer):
    ((found, skipped),) = run_ranks(1, trained, "cuda", REDUCERS[reducer], 4, "nccl", timeout=100)
    ((wanted, _),) = run_ranks(1, trained, "cpu", REDUCERS[reducer], 4, timeout=100)
    assert skipped == 1
    for mine, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("ranks", "backend"), [(1, "nccl"), (2, "gloo")])
def test_backward_is_enqueued_while_the_hook_works(ranks, backend):
    """And the thread of backward waits for nothing meanwhile; ours once, to hear whether the step is sound."""
    for seen in run_ranks(ranks, traced, OURS, backend, timeout=100):
        assert seen.ours > 10
        assert seen.meanwhile > 10
        assert seen.waits_of_backward == 0
        if backend == "nccl":  # gloo waits for the device to have its tensors on the host
            assert seen.waits <= 2  # ours, and the profiler's own in the end
