"""A pipeline with the other plugins: scales of branches, a loss scaler, small moments, checkpoints."""

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn

import distopt
from distopt.scaling import PaperPolicy
from tests.pipelining.models import mesh_of, whole, worst
from tests.processes import run_ranks
from tests.scaling.networks import Branch, batch

STEPS, BAD, MICROBATCHES = 6, 3, 2
POLICY = PaperPolicy(low=0.0, initial=3.0, growth=1.0)
POWER = distopt.PowerSGD(rank=2, min_saving=0.0, residual_dtype="1-6-9")


class Residual(nn.Module):
    """x + f(x)."""

    def __init__(self):
        super().__init__()
        self.branch = Branch()

    def forward(self, x):
        return x + self.branch(x)


def blocks():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 8), *(Residual() for _ in range(4)), nn.Linear(8, 1))


def loss_fn(output, target):
    return (output - target).square().mean()


def data(step, replica):
    x = batch(100 * step + replica, n=8)
    return x, x.sum(1, keepdim=True)


class Training:
    """Two stages of two replicas, branches in float16 with scales of their own."""

    def __init__(self, rank, reducer=POWER, **options):
        model = blocks()
        self.rank = rank
        self.scaler = distopt.ResblockScaler("*.branch", model=model, preset=POLICY)
        options = {"stages": 2, "mesh": mesh_of(2, 2), **options}
        self.pipe = distopt.pipeline(
            model, microbatches=MICROBATCHES, loss_fn=loss_fn, reducer=reducer, grad_scaler=self.scaler, **options
        )
        self.optimizer = torch.optim.SGD(self.pipe.parameters(), lr=0.02)

    def run(self, steps, bad=None):
        """The branch of block 4, in the last stage, overflows on one rank in the step ``bad``."""
        losses, skipped = [], []
        for step in steps:
            self.optimizer.zero_grad()
            x, target = data(step, self.rank % 2)
            for name, block in self.pipe.module.items():
                if name == "4":
                    block.branch.amplify = float("inf") if (self.rank, step) == (3, bad) else 1.0
            losses.append(self.pipe.step(x, target=target).item())
            self.scaler.unscale_(self.optimizer)
            self.pipe.registration.clip_grad_norm_(5.0)
            self.scaler.step(self.optimizer)
            self.scaler.update()
            skipped.append(self.scaler.skipped)
        return losses, skipped


def scaled_job(rank):
    exact, plain = Training(rank, distopt.AllReduce()), Training(rank)
    found = [exact.run(range(STEPS), BAD), plain.run(range(STEPS), BAD)]
    stats = plain.pipe.registration.stats()
    assert (stats.steps, stats.skipped_steps) == (STEPS, 1), (stats, found)
    assert all(bool(torch.isfinite(p).all()) for p in whole(plain.pipe).values())
    plain.pipe.registration.check_replicas()
    return found, exact.scaler.state_dict(), plain.scaler.state_dict(), whole(exact.pipe)


def one_process():
    """The same without ranks: both replicas' micro-batches one after the other."""
    model = blocks()
    scaler = distopt.ResblockScaler("*.branch", model=model, preset=POLICY)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
    losses = []
    for step in range(STEPS):
        optimizer.zero_grad()
        total = 0.0
        for replica in range(2):
            model[4].branch.amplify = float("inf") if (replica, step) == (1, BAD) else 1.0
            for x, target in zip(*(t.chunk(MICROBATCHES) for t in data(step, replica)), strict=True):
                loss = loss_fn(model(x), target) / (2 * MICROBATCHES)
                scaler.scale(loss).backward()
                total += loss.item()
        losses.append(total)
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        scaler.step(optimizer)
        scaler.update()
    return losses, scaler, dict(model.named_parameters())


def loss_scaler_job(rank):
    """A GradScaler's loss scale is in every stage's gradients, and its residuals are unscaled by it."""
    found = []
    for scaler in (None, torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=2)):
        pipe = distopt.pipeline(
            blocks().double(),
            stages=2,
            mesh=mesh_of(2, 2),
            microbatches=MICROBATCHES,
            loss_fn=loss_fn,
            reducer=POWER,
            grad_scaler=scaler,
        )
        optimizer = torch.optim.SGD(pipe.parameters(), lr=0.02)
        losses = []
        for step in range(5):
            optimizer.zero_grad()
            x, target = (t.double() for t in data(step, rank % 2))
            losses.append(pipe.step(x, target=target).item())
            if scaler is None:
                optimizer.step()
            else:
                scaler.step(optimizer)
                scaler.update()
        found.append((losses, whole(pipe), pipe.registration.stats().residual_norm))
    assert scaler.get_scale() == 2.0**12
    return found


def checkpoint_job(rank, folder):
    """What a pipeline saves of its model, optimizer and reducer goes on with other stages, through DCP."""
    training = Training(rank, stages=2)
    adam = distopt.optim.AdamW(training.pipe.named_parameters(), lr=0.02, moments="packed16")
    training.optimizer = adam
    losses = training.run(range(3))[0]
    saved = {"model": training.pipe.module.state_dict(), "registration": training.pipe.registration}
    dcp.save(saved, checkpoint_id=folder)
    other = Training(rank, stages=4, schedule="gpipe", mesh=mesh_of(4, 1))
    parameters = other.pipe.module.state_dict()
    dcp.load({"model": parameters, "registration": other.pipe.registration}, checkpoint_id=folder)
    other.pipe.module.load_state_dict(parameters)
    everyone = [None] * 4
    dist.all_gather_object(everyone, whole(training.pipe))
    wanted = {name: value for part in everyone for name, value in part.items()}
    x, target = data(9, 0)
    ours = [each.pipe.evaluate(x, target=target).item() for each in (training, other)]
    return losses, worst(whole(other.pipe), wanted), ours, other.pipe.registration._engine.state.step


def four_ranks_job(rank, folder):
    return scaled_job(rank), loss_scaler_job(rank), checkpoint_job(rank, folder)


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What four ranks found."""
    return run_ranks(4, four_ranks_job, str(tmp_path_factory.mktemp("checkpoint")), timeout=110.0)


def test_scales_are_those_of_one_process(found):
    """An overflow in a branch of one stage on one rank: all ranks skip the step, and only this branch is to blame."""
    losses, scaler, parameters = one_process()
    octaves = {name: block["log2"] for name, block in scaler.state_dict()["blocks"].items()}
    for (runs, exact, compressed, mine), *_ in found:
        for ours, skipped in runs:
            assert skipped == [step == BAD for step in range(STEPS)]
            assert ours[:1] == pytest.approx(losses[:1], rel=1e-5)
        assert runs[0][0] == pytest.approx(losses, rel=2e-3)
        assert exact == found[0][0][1]
        assert compressed["blocks"] == exact["blocks"]
        # Every scale begins higher with more ranks, by the same octaves.
        more = exact["blocks"]["1.branch"]["log2"] - octaves["1.branch"]
        assert {name: block["log2"] - more for name, block in exact["blocks"].items()} == octaves
        assert {name: block["skips"] for name, block in exact["blocks"].items()} == {
            "1.branch": 0,
            "2.branch": 0,
            "3.branch": 0,
            "4.branch": 1,
        }
        assert worst(mine, parameters) < 2e-3


def test_a_loss_scaler(found):
    for _, (plain, scaled), _ in found:
        assert scaled[0] == plain[0]
        assert worst(scaled[1], plain[1]) == 0.0
        assert scaled[2] == plain[2]


def test_checkpoints(found):
    for *_, (losses, difference, evaluations, step) in found:
        assert losses == found[0][-1][0]
        assert difference == 0.0
        assert step == 3
        assert evaluations[0] == pytest.approx(evaluations[1], rel=1e-6)
