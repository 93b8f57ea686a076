"""The command: what it refuses, in one line and without torch, and what it leaves behind."""

import argparse
import dataclasses
import json
import subprocess
import sys

import pytest
from distopt.integrations.tokenizers import cli, sweeps, tables
from distopt.integrations.tokenizers.experiments import run_all
from distopt.integrations.tokenizers.settings import TrainSettings
from PIL import Image

from distopt.errors import SettingError

REFUSED = [
    (["train", "--bottleneck", "vqvae"], "--bottleneck is 'vqvae', but must be one of gaussian, relaxed"),
    (["train", "--codes", "1"], "--codes is 1, but must be a whole number from 2 to 65536"),
    (["train", "--codes", "many"], "--codes is 'many', but must be a whole number"),
    (["train", "--batch", "5"], "--batch is 5, but must be a multiple of the 2 ranks"),
    (["train", "--options", "rotation"], "options is 'rotation', but must be names and values"),
    (["train", "--ranks", "0"], "argument --ranks: is '0', but must be a whole number from 1 to 64"),
    (["train", "--out", "/proc/no/folder"], "--out /proc/no/folder: cannot be written to"),
    (["compare", "--codes", "100"], "--codes is 100, but must be a power of two, which LFQ needs"),
    (["compare", "--bottleneck", "vq"], "unrecognized arguments: --bottleneck vq"),
    (["curve", "--codes", "64,16"], "--codes is '64,16', but must be rising whole numbers"),
    (["curve", "--codes", "a"], "--codes is 'a', but must be rising whole numbers"),
    (["draw"], "invalid choice: 'draw'"),
]


@pytest.mark.parametrize(
    ("arguments", "line"), REFUSED, ids=lambda value: " ".join(value) if isinstance(value, list) else ""
)
def test_refuses_in_one_line(arguments, line, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if arguments[0] == "train" and "--out" not in arguments:
        arguments = [*arguments, "--out", "run"]
    assert cli.main(arguments) == 2
    said = capsys.readouterr().err
    assert line in said
    assert said.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_a_typo_does_not_wait_for_torch():
    code = (
        "import sys; from distopt.integrations.tokenizers import cli; code = cli.main(['curve', '--codes', 'x']);"
        "assert 'torch' not in sys.modules and 'matplotlib' not in sys.modules; sys.exit(code)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=60).returncode == 2


def test_a_wrong_option_is_said_by_a_rank_in_one_line(tmp_path, capfd):
    arguments = ["train", "--options", "beta = 1", "--ranks", "1", "--out", str(tmp_path / "run")]
    assert cli.main(arguments) == 2
    said = capfd.readouterr().err
    assert "simvq.beta is 1, but must be left out: the options are codebook_weight" in said
    assert "Traceback" not in said


def test_a_curve_on_two_ranks(tmp_path, capfd):
    given = [
        "--judged",
        "30",
        "--codes",
        "8,16",
        "--steps",
        "2",
        "--batch",
        "4",
        "--hidden",
        "8",
        "--width",
        "4",
        "--data",
        "scenes",
    ]
    assert cli.main(["curve", *given, "--out", str(tmp_path)]) == 0
    rows = json.loads((tmp_path / "table.json").read_text())
    lines = ("vq", "ema", "ema-unreplaced", "simvq")
    assert [row["name"] for row in rows] == [f"{line}-{size}" for line in lines for size in (8, 16)]
    assert all(0 < row["used"] <= 1 and row["mse"] > 0 and row["exact"] >= 0 for row in rows)
    assert (tmp_path / "table.md").read_text() in capfd.readouterr().out
    assert Image.open(tmp_path / "curve.png").size[0] > 500
    assert list((tmp_path / "vq-8/tensorboard").iterdir())


def test_a_comparison_has_columns_to_be_filled_in(tmp_path):
    base = TrainSettings(judged=30, codes=16, steps=1, batch=4, hidden=8, width=4, save_every=0)
    entries = [entry for entry in sweeps.compared(base) if entry.name in ("gaussian", "vq", "fsq")]
    rows = run_all(entries, tmp_path)
    tables.draw_pictures(tmp_path / "pictures.png", tmp_path, rows)
    assert Image.open(tmp_path / "pictures.png").size[0] > 500
    rows = [{**row, "s0": 0.5, "s1": None} for row in rows]
    table = tables.write(tmp_path, rows).splitlines()
    assert "| S0 |" in table[0]
    assert "S1" not in table[0]
    assert len(table) == 5
    assert all(line.count("|") == table[0].count("|") for line in table)
    assert rows == run_again(entries, tmp_path)


def run_again(entries, out):
    """Nothing is trained a second time."""
    return [{**row, "s0": 0.5, "s1": None} for row in run_all(entries, out)]


@pytest.mark.parametrize(("sweep", "defaults"), [("compare", cli._COMPARED), ("curve", cli._CURVED)])
def test_a_sweep_s_help_tells_its_own_defaults(sweep, defaults):
    (commands,) = (action for action in cli._parser()._actions if action.dest == "command")
    shown = (action for action in commands.choices[sweep]._actions if action.help is not argparse.SUPPRESS)
    helps = {action.dest: action.help for action in shown}
    for field in dataclasses.fields(TrainSettings):
        if field.name in helps and field.default is not None:
            assert f"(default: {defaults.get(field.name, field.default)!s}" in helps[field.name]


def test_sizes():
    assert sweeps.sizes_of("64,4096") == [64, 4096]
    for text in ("", "64,,128", "64,64", "1,2", "64,70000"):
        with pytest.raises(SettingError, match="--codes"):
            sweeps.sizes_of(text)


def test_a_sweep_differs_in_the_bottleneck_alone():
    base = TrainSettings(steps=7, seed=3)
    for entry in [*sweeps.compared(base), *sweeps.curve(base, [64, 128])]:
        assert (entry.settings.steps, entry.settings.seed, entry.settings.width) == (7, 3, base.width)
