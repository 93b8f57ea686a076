"""The command: what is refused in one line with exit code 2, and a run that begins, goes on and is sampled from."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from distopt.integrations.biggan import runs, train
from distopt.integrations.biggan.cli import main
from distopt.integrations.biggan.settings import TrainSettings
from distopt.integrations.biggan.trainer import Trainer
from distopt.integrations.running import launch
from distopt.integrations.running.fields import InputError
from PIL import Image

TINY = ["--width", "8", "--noise", "12", "--shared", "8", "--batch", "8", "--judged", "12", "--readings_every", "1"]
TINY += ["--standing", "2", "--discriminator_steps", "1", "--group", "4"]


@pytest.fixture(autouse=True)
def _no_ranks(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)


def _refused(capsys, arguments, *words):
    assert main([str(argument) for argument in arguments]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert err.startswith("distopt-biggan")
    for word in words:
        assert word in err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], ["COMMAND"]),
        (["paint"], ["paint", "train"]),
        (["train", "--steps", "0"], ["--steps is 0", "from 1"]),
        (["train", "--gamma", "much"], ["--gamma is 'much'", "a number"]),
        (["train", "--kind", "wide"], ["--kind is 'wide'", "hierarchical, deep"]),
        (["train", "--batch", "30", "--accumulate", "4"], ["batch is 30", "a multiple of 8"]),
        (["train", "--group", "1"], ["group is 1", "at least 2"]),
        (["train", "--group", "24"], ["group is 24", "the 32 pictures of a micro-batch"]),
        (["train", "--batch", "30", "--ranks", "4"], ["batch is 30", "a multiple of 4"]),
        (["train", "--judged", "100"], ["judged is 100", "6 classes"]),
        (["train", "--width", "12"], ["width is 12", "a multiple of 8"]),
        (["train", "--noise", "40"], ["noise is 40", "a multiple of 3"]),
        (["train", "--attention", "5"], ["attention is 5", "0 or one of 8"]),
        (["train", "--out", "/proc/nowhere"], ["--out", "cannot be written"]),
        (["train", "--ranks", "0"], ["--ranks", "from 1 to 64"]),
        (["sample", "--out", "a.png"], ["--run"]),
        (["sample", "--run", "/nowhere", "--out", "a.png"], ["--run /nowhere", "no such folder"]),
        (["sample", "--run", ".", "--out", "a.gif"], ["--out a.gif", ".png"]),
        (["sample", "--run", "/tmp", "--out", "a.png", "--truncation", "0"], ["--truncation", "'0'", "0.01"]),
        (["sample", "--run", "/tmp", "--out", "a.png", "--class", "star"], ["--class", "star", "circle"]),
        (["ring", "--gamma", "-1"], ["--gamma is -1"]),
        (["ring", "--out", "/proc/nowhere"], ["--out", "cannot be written"]),
    ],
)
def test_bad_input_is_one_line(capsys, monkeypatch, arguments, words):
    monkeypatch.setattr(launch, "start", lambda *_: pytest.fail("a process was started"))
    _refused(capsys, arguments, *words)


def test_a_folder_without_a_run(capsys, tmp_path):
    _refused(capsys, ["sample", "--run", tmp_path, "--out", tmp_path / "a.png"], "is not a run", "settings.json")
    (tmp_path / runs.SETTINGS).write_text("{}")
    _refused(capsys, ["sample", "--run", tmp_path, "--out", tmp_path / "a.png"], "is damaged")
    runs.begin(tmp_path, TrainSettings(), fresh=True)
    _refused(capsys, ["sample", "--run", tmp_path, "--out", tmp_path / "a.png"], "not a finished run")
    (tmp_path / runs.GENERATOR).write_bytes(b"x")
    _refused(capsys, ["sample", "--run", tmp_path, "--out", tmp_path / "a.png"], "is damaged")


def test_what_becomes_of_a_folder(tmp_path):
    assert runs.begin(tmp_path, TrainSettings(), fresh=False)
    assert runs.begin(tmp_path, TrainSettings(steps=9, checkpoint_every=1), fresh=False)
    with pytest.raises(InputError, match=r"a run with seed = 0, not 1; give another --out, or --fresh"):
        runs.begin(tmp_path, TrainSettings(seed=1), fresh=False)
    (tmp_path / runs.GENERATOR).write_bytes(b"")
    assert not runs.begin(tmp_path, TrainSettings(), fresh=False)
    assert runs.begin(tmp_path, TrainSettings(seed=1), fresh=True)
    assert not (tmp_path / runs.GENERATOR).exists()
    assert runs.read_settings("--run", tmp_path).seed == 1


def test_a_run_from_before_there_were_groups_is_one_without(tmp_path):
    table = dataclasses.asdict(TrainSettings(group=0))
    del table["group"]
    runs.write_json(tmp_path / runs.SETTINGS, {"format": runs.FORMAT, "settings": table})
    assert runs.read_settings("--run", tmp_path).group == 0
    with pytest.raises(InputError, match="holds a run with group = 0, not 8"):
        runs.begin(tmp_path, TrainSettings(group=8), fresh=False)


def _start(arguments):
    command = [sys.executable, "-m", "distopt.integrations.biggan", *arguments]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(entry for entry in sys.path if entry)}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)


@pytest.mark.timeout(300)
def test_a_run_that_is_killed_goes_on_and_is_sampled_from(tmp_path, capsys):
    """It ends with the same bytes as one that was left alone; `test_trainer` has the same on two ranks."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    command = ["train", *TINY, "--ranks", "1", "--steps", "8", "--checkpoint_every", "3", "--out"]
    with _start([*command, str(killed)]) as process:
        while process.poll() is None and not list(killed.glob(f"{runs.CHECKPOINTS}/*-step-*")):
            time.sleep(0.02)
        process.kill()
    assert not (killed / runs.GENERATOR).exists()
    with _start([*command, str(killed)]) as process:
        assert "goes on after step" in process.communicate()[0]
    with _start([*command, str(whole)]) as process:
        process.communicate()
    assert (killed / runs.GENERATOR).read_bytes() == (whole / runs.GENERATOR).read_bytes()
    report, other = (json.loads((folder / runs.REPORT).read_text()) for folder in (killed, whole))
    assert report["curve"] == other["curve"]
    assert [entry["step"] for entry in report["history"]] == list(range(1, 9))
    assert report["history"] == other["history"]
    assert other["communication"]["generator"]["steps"] == 8
    assert not (killed / runs.CHECKPOINTS).exists()
    assert {path.name for path in killed.glob("*.png")} == {"samples.png", "spectra.png", "truncation.png"}
    assert main(["train", *TINY, "--ranks", "1", "--out", str(killed)]) == 0
    assert main(["train", "--out", str(killed)]) == 2
    capsys.readouterr()
    sheets = [tmp_path / f"{name}.png" for name in ("first", "again", "truncated")]
    for sheet, threshold in zip(sheets, ("none", "none", "0.5"), strict=True):
        arguments = ["--run", str(killed), "--class", "ring", "--n", "5", "--truncation", threshold]
        assert main(["sample", *arguments, "--out", str(sheet)]) == 0
    assert capsys.readouterr().out.split() == [str(sheet) for sheet in sheets]
    assert sheets[0].read_bytes() == sheets[1].read_bytes() != sheets[2].read_bytes()
    assert Image.open(sheets[0]).size[0] == 2 * (16 + 2) * 3


def test_a_run_that_is_asked_to_stop_saves_first(tmp_path, monkeypatch):
    """Its command then ends with 143 (`work` is tested with DALL-E's), and goes on from there."""
    small = {"width": 8, "noise": 12, "shared": 8, "batch": 8, "group": 4}
    settings = TrainSettings(**small, steps=3, checkpoint_every=0, judged=12, standing=2)
    taken, step = [], Trainer.step

    def interrupted(trainer):
        if not taken:
            signal.raise_signal(signal.SIGTERM)
        progress = step(trainer)
        taken.append(trainer.taken)
        return progress

    monkeypatch.setattr(Trainer, "step", interrupted)
    assert runs.begin(tmp_path, settings, fresh=False)
    with pytest.raises(launch.Stopped, match="stopped by SIGTERM and saved after step 1"):
        train.run(settings, tmp_path, torch.device("cpu"))
    train.run(settings, tmp_path, torch.device("cpu"))
    assert taken == [1, 2, 3]
    assert (tmp_path / runs.GENERATOR).exists()


def test_the_ring(tmp_path, capsys):
    assert main(["ring", "--steps", "4", "--every", "2", "--out", str(tmp_path)]) == 0
    assert [line.split()[1] for line in capsys.readouterr().out.splitlines()] == ["2", "4"]
    assert (tmp_path / "ring.png").exists()
    history = json.loads((tmp_path / "ring.json").read_text())["history"]
    assert [entry["step"] for entry in history] == [2, 4]
