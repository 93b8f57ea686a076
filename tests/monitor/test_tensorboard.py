"""Scalars: what is written, of what, and that the real writer takes it."""

import math
import subprocess
import sys

import pytest
import torch

import distopt
from distopt.monitor.tensorboard import log_to_tensorboard
from tests.attach.models import batch, mlp, wrap
from tests.processes import run_ranks

TOTALS = {"saving", "matrix_saving", "bytes_sent_per_step", "bytes_uncompressed_per_step", "skipped_steps"}
MEASURED = {"reconstruction_error", "residual_ratio", "worst_reconstruction_error", "worst_residual_ratio"}
WEIGHTS = {f"{i}.weight" for i in range(5)}


class Recorder:
    """A writer that is not TensorBoard's."""

    def __init__(self):
        self.scalars = {}
        self.steps = set()

    def add_scalar(self, tag, scalar_value, global_step):
        assert isinstance(scalar_value, (int, float))
        assert tag not in self.scalars
        self.scalars[tag] = scalar_value
        self.steps.add(global_step)


def figures(gradient, given, residual, sent=10):
    return distopt.Figures(gradient, given, residual, 100, sent)


class Fixed:
    """A registration whose figures are known."""

    def __init__(self, layers, steps=4):
        self._layers = layers
        self._stats = distopt.Stats(steps, 1, 400, 100, 200, 20, {})

    def stats(self):
        return self._stats

    def figures(self):
        return self._layers


def written(registration, **options):
    recorder = Recorder()
    log_to_tensorboard(registration, recorder, 7, **options)
    assert recorder.steps == {7}
    return recorder.scalars


def test_totals_and_layers():
    """All layers as one vector, and the worst, which is not the same layer for error and for ratio."""
    scalars = written(Fixed({"a": figures(3.0, 4.0, 2.0, 30), "b": figures(4.0, 3.0, 1.8)}))
    assert {k: v for k, v in scalars.items() if k.startswith("distopt/")} == pytest.approx(
        {
            "distopt/saving": 0.75,
            "distopt/matrix_saving": 0.9,
            "distopt/bytes_sent_per_step": 25.0,
            "distopt/bytes_uncompressed_per_step": 100.0,
            "distopt/skipped_steps": 1,
            "distopt/reconstruction_error": math.hypot(2.0, 1.8) / 5.0,
            "distopt/residual_ratio": math.hypot(2.0, 1.8) / 5.0,
            "distopt/worst_reconstruction_error": 1.8 / 3.0,
            "distopt/worst_residual_ratio": 2.0 / 3.0,
        }
    )
    assert scalars["distopt.reconstruction_error/a"] == 0.5
    assert scalars["distopt.residual_ratio/b"] == 0.45
    assert scalars["distopt.bytes_sent/a"] == 30
    assert len(scalars) == 9 + 6


def test_before_anything_was_measured():
    assert {tag.removeprefix("distopt/") for tag in written(Fixed({}, steps=0))} == TOTALS


def test_without_layers_and_under_another_prefix():
    scalars = written(Fixed({"a": figures(3.0, 4.0, 2.0)}), per_layer=False, prefix="critic")
    assert scalars.keys() == {f"critic/{name}" for name in TOTALS | MEASURED}


def test_scales_of_a_scaler():
    model = mlp(3)
    scaler = distopt.ResblockScaler(list(model)[:1], dtype=torch.float32)
    recorder = Recorder()
    log_to_tensorboard(Fixed({}), recorder, 7, scaler=scaler)
    assert recorder.scalars["distopt.scaler/scale_log2/0"] == 13
    assert recorder.scalars["distopt.scaler/skips/0"] == recorder.scalars["distopt.scaler/skipped_steps"] == 0
    assert "distopt.scaler/zero_fraction/0" not in recorder.scalars  # nothing was counted yet


def test_zero_gradients_divide_nothing_by_zero():
    scalars = written(Fixed({"a": figures(0.0, 0.0, 0.0), "b": figures(0.0, 1.0, 1.0)}))
    assert scalars["distopt.residual_ratio/a"] == 0.0
    assert scalars["distopt/worst_residual_ratio"] == math.inf


def one_rank_job(rank, folder):
    """Rank 0 alone writes, between steps, with the real writer; the others know nothing of it."""
    # Only where it is used, as it is an extra.
    from torch.utils.tensorboard import SummaryWriter

    model = wrap(mlp())
    registration = distopt.register(model, distopt.PowerSGD(rank=2), measure_every=1)
    writer = SummaryWriter(folder) if rank == 0 else None
    for step in range(3):
        model(batch(rank, step)).square().mean().backward()
        if writer is not None:
            log_to_tensorboard(registration, writer, step)
        model.zero_grad()
    if writer is not None:
        writer.close()
    return registration.figures(), registration.stats()


def test_rank_0_alone_writes_what_tensorboard_reads(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    layers, stats = run_ranks(2, one_rank_job, str(tmp_path))[0]
    events = EventAccumulator(str(tmp_path)).Reload()
    tags = events.Tags()["scalars"]
    kinds = ("reconstruction_error", "residual_ratio", "bytes_sent")
    assert set(tags) == {f"distopt/{n}" for n in TOTALS | MEASURED} | {
        f"distopt.{k}/{w}" for k in kinds for w in WEIGHTS
    }
    assert [event.step for event in events.Scalars("distopt/saving")] == [0, 1, 2]

    def last(tag):
        return events.Scalars(tag)[-1].value

    assert last("distopt/saving") == pytest.approx(stats.saving, rel=1e-6)
    assert last("distopt/bytes_sent_per_step") == stats.bytes_sent / 3
    for name, of_layer in layers.items():
        assert last(f"distopt.reconstruction_error/{name}") == pytest.approx(of_layer.reconstruction_error, rel=1e-6)


def test_tensorboard_is_not_needed():
    """Importing loads no TensorBoard: any writer will do."""
    code = (
        "import sys, distopt.monitor.tensorboard; assert not any('tensorboard' == m.split('.')[0] for m in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=100)
