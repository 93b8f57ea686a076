"""The journal: lines in a log, a bar on a terminal, events for TensorBoard, silence on the other ranks."""

import io

from distopt.integrations.running.journal import RunJournal
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator


def _lines(total, **arguments):
    stream = io.StringIO()
    journal = RunJournal(None, stream=stream, **arguments)
    with journal.stage("stage 1") as stage:
        for step in range(1, total + 1):
            stage.log(step, total, {"loss": 1 / step, "learning_rate": 1e-3})
    return stream.getvalue().splitlines()


def test_a_log_gets_about_twenty_lines_a_stage_the_first_and_the_last_among_them():
    lines = _lines(1000)
    assert 20 <= len(lines) <= 22
    assert lines[0].startswith("stage 1  step 1/1000  loss 1  learning_rate 0.001")
    assert lines[-1].startswith("stage 1  step 1000/1000  loss 0.001")


def test_a_name_with_a_slash_makes_a_curve_and_no_text(tmp_path):
    stream = io.StringIO()
    journal = RunJournal(tmp_path, stream=stream)
    with journal.stage("stage 2") as stage:
        stage.log(1, 1, {"loss": 1.0, "log2 scale/0.mlp": 16.0})
    journal.close()
    assert "loss 1" in stream.getvalue()
    assert "scale" not in stream.getvalue()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert set(events.Tags()["scalars"]) == {"stage 2/loss", "stage 2/log2 scale/0.mlp"}


def test_a_short_stage_gets_every_step():
    assert len(_lines(3)) == 3


def test_other_ranks_are_silent(tmp_path):
    assert _lines(10, shown=False) == []
    RunJournal(tmp_path, shown=False).close()
    assert not (tmp_path / "tensorboard").exists()


def test_a_terminal_gets_a_bar(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setenv("TERM", "xterm")
    stream = Terminal()
    with RunJournal(None, stream=stream).stage("stage 2") as stage:
        stage.log(5, 10, {"loss": 0.25})
    shown = stream.getvalue()
    assert "5/10" in shown
    assert "loss 0.25" in shown
    assert "━" in shown


def test_square_brackets_are_shown_as_they_are():
    stream = io.StringIO()
    RunJournal(None, stream=stream).say("left out: [bold].png")
    assert stream.getvalue() == "left out: [bold].png\n"


def test_events_are_those_of_the_last_run(tmp_path):
    for value in (1.0, 2.0):
        journal = RunJournal(tmp_path, stream=io.StringIO())
        with journal.stage("stage 1") as stage:
            stage.log(1, 1, {"loss": value})
        journal.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("stage 1/loss")] == [(1, 2.0)]
