"""All ranks skip the same step, whoever overflows; what is averaged and kept back is unscaled."""

import copy

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel as DDP

import distopt
from distopt.scaling import PaperPolicy, to_16bit
from tests.processes import run_ranks
from tests.scaling.networks import Residual, batch, loss_of

STEPS, BAD = 6, 3


def train(rank, reducer, narrow=False, scaled=True, precision=torch.float16):
    """Six steps of two micro-batches each; branch 2 of rank 1 overflows in the second of step 3."""
    model = Residual()
    if narrow:
        to_16bit(model.branches)
    scaler = distopt.ResblockScaler(model.branches, dtype=precision, preset=PaperPolicy(initial=8.0, growth=1.0))
    wrapped = DDP(model)
    registration = distopt.register(wrapped, reducer) if reducer is not None else None
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    skipped = []
    for step in range(STEPS):
        optimizer.zero_grad()
        with wrapped.no_sync():
            scaler.scale(loss_of(wrapped, batch(10 * step + rank)) / 2).backward()
        model.branches[2].amplify = float("inf") if (rank, step) == (1, BAD) else 1.0
        scaler.scale(loss_of(wrapped, batch(100 + 10 * step + rank)) / 2).backward()
        model.branches[2].amplify = 1.0
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        skipped.append(scaler.skipped)
    state = registration.state_dict() if registration is not None else {"residuals": {}}
    return {
        "weights": copy.deepcopy(model.state_dict()),
        "scaler": scaler.state_dict(),
        "skipped": skipped,
        "residuals": state["residuals"],
    }


@pytest.mark.parametrize(
    ("reducer", "narrow"),
    [
        (None, False),
        (distopt.PowerSGD(rank=1), False),
        (distopt.PowerSGD(rank=1), True),
        (distopt.TopK(0.2), True),
    ],
    ids=str,
)
def test_an_overflow_on_one_rank(reducer, narrow):
    first, second = run_ranks(2, train, reducer, narrow)
    assert first["skipped"] == second["skipped"] == [step == BAD for step in range(STEPS)]
    assert first["scaler"] == second["scaler"]
    octaves = [block["log2"] for block in first["scaler"]["blocks"].values()]
    start = 8 + 1  # of a replica, and one octave for two of them
    assert octaves == [start + STEPS, start + STEPS, start + STEPS - 1 - 0.5, start + STEPS]
    assert all(torch.equal(first["weights"][name], second["weights"][name]) for name in first["weights"])
    assert all(bool(torch.isfinite(weight).all()) for weight in first["weights"].values())
    plain, _ = run_ranks(2, train, reducer, False, True, torch.float32)
    if reducer is not None:  # in another unit they would be 2**8 and more times as large
        ours, theirs = (_together(run["residuals"]) for run in (first, plain))
        assert (ours - theirs).norm() < 0.3 * theirs.norm()
    for name, weight in plain["weights"].items():
        torch.testing.assert_close(first["weights"][name].float(), weight, rtol=0.02, atol=2e-3)


def _together(tensors):
    return torch.cat([tensors[name].flatten() for name in sorted(tensors)])


def settings_job(rank):
    model = Residual(depth=2 + rank)
    try:
        distopt.ResblockScaler(model.branches)
    except distopt.AgreementError as error:
        return str(error)
    return None


def test_ranks_with_other_branches_are_told():
    first, second = run_ranks(2, settings_job)
    assert first == second
    assert "setting" in first


def group_job(rank):
    """Ranks 0 and 1 step together, rank 2 alone."""
    groups = [dist.new_group([0, 1]), dist.new_group([2])]
    model = Residual(depth=1)
    scaler = distopt.ResblockScaler(model.branches, process_group=groups[rank // 2])
    model.branches[0].amplify = float("inf") if rank == 0 else 1.0
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler.scale(loss_of(model, batch())).backward()
    scaler.step(optimizer)
    scaler.update()
    return scaler.skipped


def test_a_chosen_process_group():
    assert run_ranks(3, group_job) == [True, True, False]
