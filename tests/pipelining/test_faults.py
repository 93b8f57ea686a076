"""When one rank cannot go on, all are told, soon, and by name; and ranks that were given different things notice."""

import pytest
import torch
import torch.distributed as dist

import distopt
from tests.pipelining.models import batch, blocks, loss_fn, mesh_of, piped
from tests.processes import run_ranks


class Broken(Exception):
    """What a user's own code raises."""


def caught(act):
    """What is raised, as its type's name and its text."""
    try:
        act()
    except Exception as error:
        return type(error).__name__, str(error)
    return None


def batches_job(rank):
    """A bad batch on the rank that needs it is everyone's, and leaves the pipeline as it was."""
    pipe = piped(stages=2)
    x, target = batch(0)
    told = [
        caught(lambda: pipe.step(x[:7], target=target)),
        caught(lambda: pipe.step(x, target=target[:5])),
        caught(lambda: pipe.step(x if rank else None, target=target)),
    ]
    told.append(caught(lambda: pipe.evaluate(x, target=target) if rank else pipe.step(x, target=target)))
    pipe.step(x, target=target)
    return told


def settings_job(rank):
    """Ranks that disagree are told before anything is done."""
    return [
        caught(lambda: piped(blocks(depth=4 + rank), stages=2)),
        caught(lambda: piped(stages=2, microbatches=4 + 4 * rank)),
        caught(lambda: piped(stages=2, schedule=["gpipe", "1f1b"][rank])),
        caught(lambda: piped(stages=2, costs=[1, 1, 1, 1, 1, 1 + rank])),
        caught(lambda: piped(stages=2, reducer=[distopt.AllReduce(), distopt.TopK(0.1)][rank])),
        caught(lambda: piped(stages=2, mesh=mesh_of(1, 2))),
        caught(lambda: piped(stages=2, sample=torch.full((2, 5), 999))),
    ]


def measured_job(rank):
    """The first rank's sample decides for all; all begin with its parameters."""
    model = blocks(seed=rank)
    pipe = piped(model, stages=2, sample=batch(0)[0] if rank == 0 else None)
    everyone = [None, None]
    dist.all_gather_object(everyone, pipe.split)
    assert everyone[0] == everyone[1]
    first = blocks(seed=0)
    mine = {name: p.full_tensor() for name, p in pipe.named_parameters()}
    return all(torch.equal(value, first.get_parameter(name)) for name, value in mine.items()), len(mine)


def shapes_job(rank):
    """Blocks that do not fit on one another: found when the first batch comes, on the ranks of all pipelines."""
    model = [torch.nn.Linear(3, 4), torch.nn.Linear(4, 3)]
    x = torch.zeros(4, 3 + (rank == 1))  # of one replica only
    pipe = piped(model, stages=2, mesh=mesh_of(2, 2), loss_fn=torch.nn.functional.mse_loss)
    told = caught(lambda: pipe.step(x, target=x))
    ones = torch.ones(4, 3)
    assert pipe.step(ones, target=ones) > 0  # and then all can go on
    return told


def two_ranks_job(rank):
    return batches_job(rank), settings_job(rank), measured_job(rank)


@pytest.fixture(scope="module")
def two():
    """What two ranks were told."""
    return run_ranks(2, two_ranks_job, timeout=110.0)


def test_a_bad_batch_is_told_to_all(two):
    (first, *_), (second, *_) = two
    assert first == second
    assert [kind for kind, _ in first] == ["SettingError"] * 3 + ["AgreementError"]
    assert [text.partition(" is ")[0] for _, text in first[:3]] == ["len(x)", "len(target)", "x"]
    assert "ranks [1] evaluate" in first[3][1]


def test_other_settings_on_other_ranks(two):
    (_, first, _), (_, second, _) = two
    for name, mine, theirs in zip(
        ["parameter", "microbatches", "schedule", "costs", "reducer", "stages", "could not measure"],
        first,
        second,
        strict=True,
    ):
        assert name in mine[1]
        assert name in theirs[1]
        assert "\n" not in mine[1] + theirs[1]


def test_blocks_that_do_not_fit():
    told = run_ranks(4, shapes_job, timeout=110.0)
    assert [kind for kind, _ in told] == ["AgreementError", "RuntimeError", "AgreementError", "AgreementError"]
    assert all("rank 1" in text for kind, text in told if kind == "AgreementError")


def test_the_first_rank_measures(two):
    assert all(equal for *_, (equal, _) in two)
    assert sum(count for *_, (_, count) in two) == len(list(blocks().parameters()))


def fault_job(rank, where):
    """Two good steps; then a block, or the loss, fails on one of three ranks in its second micro-batch."""
    calls = []

    def fail(*_):
        calls.append(1)
        if armed and len(calls) == 2:
            raise Broken("out of luck")

    def loss(output, target):
        if where == "loss":
            fail()
        return loss_fn(output, target)

    armed = []
    pipe = piped(stages=3, loss_fn=loss)
    if where in pipe.module:
        pipe.module[where].register_forward_pre_hook(fail)
    if where == "backward" and rank == 1:
        next(iter(pipe.module.values())).register_full_backward_hook(fail)
    x, target = batch(0)
    for _ in range(2):
        pipe.step(x, target=target)
    calls.clear()
    armed.append(True)
    return caught(lambda: pipe.step(x, target=target))


@pytest.mark.parametrize("where", ["2", "loss", "backward"])
def test_a_rank_that_fails_is_named_everywhere(where):
    told = run_ranks(3, fault_job, where, timeout=110.0)
    culprit = 2 if where == "loss" else 1
    for rank, (kind, text) in enumerate(told):
        if rank == culprit:
            assert "out of luck" in text or "rank 1" in text
        else:
            assert kind == "PeerLostError"
            assert f"rank {culprit}" in text
