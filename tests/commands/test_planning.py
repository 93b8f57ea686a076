"""``distopt plan``: what it prints, and what it refuses in one line."""

import subprocess
import sys

import pytest
from torch import nn

from distopt.commands.main import main

GIVEN = ["plan", "--model", f"{__name__}:network", "--world", "64", "--bandwidth", "1Gbit", "--memory-rate", "1TB"]


def network():
    return nn.Sequential(nn.Linear(512, 512), nn.LayerNorm(512))


def broken():
    raise RuntimeError("no such\nthing")


def test_a_model_of_the_users(capsys):
    assert main(GIVEN) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("compress: rank ")
    assert lines[1].startswith("64 ranks; 125 MB/s out of a node")
    assert any(line.startswith("0.weight 512 x 512") for line in lines)


def test_off(capsys):
    assert main([*GIVEN, "--bandwidth", "inf", "--compute-seconds", "1s"]) == 0
    assert capsys.readouterr().out.startswith("off: this would not help here: ")


def test_the_papers_largest_model(capsys):
    """112 columns for each of 8 shards: 86 % less of the matrices."""
    cluster = ["--world", "1024", "--ranks-a-node", "8", "--sharded", "--bandwidth", "10Gbit", "--memory-rate", "800GB"]
    assert main(["plan", "--model", "dalle:paper-12b", *cluster, "--ranks", "112", "--compute-seconds", "2.8"]) == 0
    text = capsys.readouterr().out
    assert "1024 ranks on 128 nodes, 128 copies of the model" in text
    assert text.startswith("compress: rank 112")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--bandwidth", "fast"], "--bandwidth is 'fast', but must be a rate above 0"),
        (["--world", "0"], "--world is 0, but must be an integer of at least 1"),
        (["--world", "many"], "argument --world: invalid int value: 'many'"),
        (["--ranks-a-node", "5"], "--ranks-a-node is 5, but must be a divisor of --world, 64"),
        (["--latency", "1 day"], "--latency is '1 day'"),
        (["--memory-rate", "-3"], "--memory-rate"),
        (["--compute-seconds", "soon"], "--compute-seconds is 'soon'"),
        (["--ranks", "4", "0"], "--ranks is 0, but must be an integer of at least 1"),
        (["--margin", "2"], "--margin is 2.0"),
        (["--model", "resnet"], "--model is 'resnet', but must be 'dalle:PRESET' or 'package.module:factory'"),
        (["--model", "dalle:paper-13b"], "--model is 'dalle:paper-13b', but must be one of dalle:paper-12b, "),
        (["--model", "nowhere.at.all:f"], "(ModuleNotFoundError: No module named 'nowhere')"),
        (["--model", f"{__name__}:missing"], "(AttributeError: "),
        (["--model", f"{__name__}:broken"], "(RuntimeError: no such)"),
        (["--model", f"{__name__}:GIVEN"], "(TypeError: 'list' object is not callable)"),
        (["--model", "builtins:int"], "model is 0, but must be a module"),
    ],
)
def test_refusals(arguments, words, capsys):
    assert main([*GIVEN, *arguments]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.count("\n") == 1
    assert words in said.err


def test_bad_settings_are_refused_before_torch_is_loaded():
    code = (
        "import sys; from distopt.commands.main import main;"
        f"assert main({[*GIVEN, '--bandwidth', 'fast']!r}) == 2; assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=100, capture_output=True)


def test_no_command(capsys):
    assert main([]) == 2
    assert capsys.readouterr().err.startswith("distopt: error: ")
