"""The plain trainer: killed at any step and started again, alone or by Slurm, it ends as if nothing had happened."""

import os
import random
import re
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from distopt.integrations.recipes import trainer
from torch.utils.data import TensorDataset

from distopt import checkpoint
from tests.docs.test_launch import LAUNCH, ROOT, SCONTROL, SRUN, free_port, launched
from tests.processes import run_mortals, run_ranks

pytestmark = pytest.mark.timeout(300)
"""Many processes load torch, on a machine that may have two cores."""
SAVE_EVERY, EPOCHS, STEPS = 8, 2, 38
"""An epoch has 19 steps a rank: no save falls on its end but one in eight."""


def whole(rank, folder, **settings):
    # The trainer draws from torch alone, but a snapshot has these as well: they would differ from run to run.
    random.seed(rank)
    np.random.seed(rank)
    return trainer.train(
        Path(folder), torch.device("cpu"), epochs=EPOCHS, save_every=SAVE_EVERY, learning_rate=0.1, **settings
    )


def dying(rank, say, folder, out, doomed, at):
    """Rank ``doomed`` is killed in the middle of the loss of step ``at``, counted from 0."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    steps = [0]
    loss = torch.nn.functional.cross_entropy

    def counted(*inputs):
        if rank == doomed and steps[0] == at:
            os.kill(os.getpid(), signal.SIGKILL)
        steps[0] += 1
        return loss(*inputs)

    torch.nn.functional.cross_entropy = counted
    whole(rank, out)


def contents(folder):
    """The last snapshot: its step, and everything in it, random generators of each rank included."""
    last = max(Path(folder).glob("*-step-*"), key=lambda path: int(path.name.rsplit("-", 1)[1]))
    return last.name.rsplit("-", 1)[1], {path.name: torch.load(path, weights_only=True) for path in last.glob("*.pt")}


def same(a, b):
    """Whether two states are equal, tensors bit for bit."""
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(value, b[key]) for key, value in a.items())
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """What two ranks end with, and where their snapshots lie."""
    folder = tmp_path_factory.mktemp("undisturbed")
    return run_ranks(2, whole, str(folder), timeout=100), folder


def test_ranks_agree_and_have_learnt(undisturbed):
    (first, second), _ = undisturbed
    assert first["weights"] == second["weights"]
    assert first["steps"] == STEPS
    assert first["test_error"] < 20
    assert 0.3 < first["saving"] < 1


@pytest.mark.parametrize(("doomed", "at"), [(1, 29), (0, 12)])
def test_killed_and_resumed_equals_undisturbed_bit_for_bit(undisturbed, tmp_path, doomed, at):
    results, folder = undisturbed
    fates = run_mortals(2, dying, str(tmp_path), doomed, at, timeout=100)
    assert fates[doomed].code == -signal.SIGKILL
    assert "PeerLostError" in fates[1 - doomed].error
    assert checkpoint.latest(tmp_path) == at // SAVE_EVERY * SAVE_EVERY
    assert run_ranks(2, whole, str(tmp_path), timeout=100) == results
    (step, resumed), (last, wanted) = contents(tmp_path), contents(folder)
    assert step == last == "32"
    assert set(wanted) == {
        f"{name}.pt" for name in ("model", "optimizer", "scheduler", "sampler", "registration", "rank-0", "rank-1")
    }
    assert [name for name in wanted if not same(resumed[name], wanted[name])] == []


def other_seed(rank, folder):
    return whole(rank, folder, seed=7)


def test_a_snapshot_holds_everything_that_the_end_follows_from(undisturbed, tmp_path):
    """Another seed at the restart changes weights, order and noise: none of it may be seen."""
    results, folder = undisturbed
    shutil.copytree(folder, tmp_path / "copy")
    again = run_ranks(2, other_seed, str(tmp_path / "copy"), timeout=100)
    assert [result["weights"] for result in again] == [result["weights"] for result in results]


def order(sampler):
    return list(iter(sampler))


def test_epochs_have_orders_of_their_own_and_ranks_share_nothing():
    data = TensorDataset(torch.arange(24))
    first, second = (trainer.Sampler(data, num_replicas=2, rank=rank, seed=3) for rank in (0, 1))
    early = order(first)
    assert sorted(early + order(second)) == list(range(24))
    first.set_epoch(1)
    late = order(first)
    assert late != early
    first.position = 5
    other = trainer.Sampler(data, num_replicas=2, rank=0, seed=9)
    other.load_state_dict(first.state_dict())
    assert order(first) == order(other) == late[5:]


def test_is_short_enough_to_copy():
    assert len(Path(trainer.__file__).read_text().splitlines()) < 120


def test_two_nodes_by_slurm_end_with_the_same_weights_as_one_machine(undisturbed, tmp_path):
    (alone, _), _ = undisturbed
    commands = tmp_path / "commands"
    commands.mkdir()
    for name, text in {"scontrol": SCONTROL, "srun": SRUN}.items():
        (commands / name).write_text(text)
        (commands / name).chmod(0o755)
    port = free_port()
    variables = {"SLURM_NNODES": "2", "SLURM_GPUS_ON_NODE": "1", "SLURM_JOB_NODELIST": "node[1-2]"}
    variables |= {"SLURM_JOB_ID": str(port), "PORT": str(port), "PIDS": str(tmp_path / "pids"), "path": str(commands)}
    variables["TRAIN"] = str(ROOT / "integrations/recipes/trainer.py")
    arguments = ("--epochs", EPOCHS, "--save-every", SAVE_EVERY, "--learning-rate", 0.1, "--out", tmp_path / "run")
    with launched("bash", LAUNCH / "slurm.sbatch", *arguments, **variables) as process:
        text, _ = process.communicate()
    assert process.returncode == 0, text
    assert re.findall(r"'weights': '(\w+)'", text) == [alone["weights"]] * 2
