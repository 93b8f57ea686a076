"""A folder from one line: what is written of a DDP model on two ranks, when, and by whom."""

import sys

import pytest
import torch
import torch.distributed as dist

import distopt
from distopt.monitor.records import read_records
from tests.attach.models import batch, mlp, wrap
from tests.processes import run_ranks

pytest.importorskip("tensorboard")


def _train(rank, folder):
    """25 steps, with a loss of the trainer's own."""
    model = wrap(mlp())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    registration = distopt.register(model, distopt.PowerSGD(rank=2), measure_every=20)
    recorder = distopt.record(registration, f"{folder}/{'run' if rank == 0 else 'other'}", optimizer, every=10)
    for step in range(25):
        loss = model(batch(rank, step)).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        recorder.add_scalar("train/loss", loss.item())
    recorder.close()
    recorder.add_scalar("train/loss", 1e9)  # after which nothing is written
    return recorder.step, registration.stats().saving


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    return folder, run_ranks(2, _train, str(folder))


def test_figures_are_written_after_the_optimizers_steps(run):
    folder, results = run
    curves = {curve.tag: curve for curve in read_records(folder / "run").curves}
    saving = curves["distopt/saving"]
    assert [steps for steps, _ in results] == [25, 25]
    assert saving.values[-1] == pytest.approx(results[0][1], rel=1e-6)
    assert saving.steps == (1, 10, 20)
    assert curves["distopt/seconds_per_step"].steps == (10, 20)
    assert all(0 < seconds < 10 for seconds in curves["distopt/seconds_per_step"].values)
    assert curves["train/loss"].steps == tuple(range(1, 26))


def test_layers_are_written_when_they_were_measured(run):
    curves = {curve.tag: curve for curve in read_records(run[0] / "run").curves}
    # Steps 0 and 20 of the reducer are measured; the second lies before the optimizer's 21st step, seen at the 30th.
    assert curves["distopt.reconstruction_error/0.weight"].steps == (1,)
    assert curves["distopt/reconstruction_error"].steps == (1, 10, 20)


def test_the_first_rank_alone_writes(run):
    assert not (run[0] / "other").exists()


@pytest.fixture
def layer(tmp_path):
    """A registration without other ranks, and its optimizer."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    layer = torch.nn.Linear(8, 8)
    yield distopt.register(layer.named_parameters(), distopt.AllReduce()), torch.optim.SGD(layer.parameters(), lr=0.1)
    dist.destroy_process_group()


def test_a_run_that_goes_on_counts_from_where_it_was(layer, tmp_path):
    for taken in (0, 30):
        recorder = distopt.record(layer[0], tmp_path, layer[1], every=20, step=taken)
        for _ in range(40):
            recorder.after_step()
        recorder.close()
    (curve,) = (curve for curve in read_records(tmp_path).curves if curve.tag == "distopt/saving")
    assert curve.steps == (1, 20, 31, 40, 60)


@pytest.mark.parametrize("every", [0, -1, 2.0, True])
def test_every_must_be_a_number_of_steps(layer, tmp_path, every):
    with pytest.raises(distopt.SettingError, match=r"every is .*, but must be an integer of at least 1"):
        distopt.record(layer[0], tmp_path, layer[1], every=every)


def test_a_folder_that_cannot_be_written(layer, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(distopt.SettingError, match=r"folder is .*/file/run', but must be a folder that can be written"):
        distopt.record(layer[0], tmp_path / "file/run", layer[1])


def test_tensorboard_that_is_missing_is_told(layer, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(distopt.MissingPackageError, match=r"tensorboard is missing: pip install 'distopt.report.'"):
        distopt.record(layer[0], tmp_path, layer[1])
