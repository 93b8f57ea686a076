"""Events of a run that goes on: each step of each stage once."""

import io

import torch
from distopt.integrations.running.journal import RunJournal
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator


def write(folder, stage, steps, done=None):
    journal = RunJournal(folder, stream=io.StringIO())
    journal.begin(done)
    with journal.stage(stage) as part:
        for step in steps:
            part.log(step, 10, {"loss": float(step)})
            part.show(step, {"codes/used": step}, {"samples": torch.rand(5, 3, 4, 4)})
    journal.close()


def test_steps_that_are_taken_again_are_drawn_once(tmp_path):
    write(tmp_path, "stage 1", range(1, 11))
    write(tmp_path, "stage 2", range(1, 8), {"stage 1": 10})
    write(tmp_path, "stage 2", range(5, 10), {"stage 1": 10, "stage 2": 4})
    events = EventAccumulator(str(tmp_path / "tensorboard"), size_guidance={"images": 0})
    events.Reload()
    for stage, last in (("stage 1", 10), ("stage 2", 9)):
        for name in ("loss", "codes/used"):
            assert [event.step for event in events.Scalars(f"{stage}/{name}")] == list(range(1, last + 1))
        images = events.Images(f"{stage}/samples")
        assert [event.step for event in images] == list(range(1, last + 1))
        assert (images[0].width, images[0].height) == (4 * 4 * 5, 2 * 4 * 5)  # four a row, a line between, enlarged
    write(tmp_path, "stage 1", [1])
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert events.Tags()["scalars"] == ["stage 1/loss", "stage 1/codes/used"]
