"""The command line: what is refused in one line with exit code 2, before torch is imported or a process is started."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from distopt.integrations.dalle import cli, resume, runs
from distopt.integrations.dalle.cli import main
from distopt.integrations.dalle.settings import TrainSettings, build
from distopt.integrations.running import flags, launch
from distopt.integrations.running.fields import leaves, nested
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from distopt.errors import SettingError


@pytest.fixture
def data(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    for i in range(4):
        Image.new("RGB", (8, 8), (60 * i, 0, 0)).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(f"shade {i}")
    return folder


@pytest.fixture(autouse=True)
def _no_process(monkeypatch):
    def refuse(*_args, **_kwargs):
        pytest.fail("a process was started")

    monkeypatch.setattr(launch, "start", refuse)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)


def _refused(capsys, arguments, *words):
    assert main([str(argument) for argument in arguments]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert err.endswith("\n")
    assert "Traceback" not in err
    for word in words:
        assert word in err
    return err


RUN = ["--data", ".", "--out", "/nowhere/run"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], ["COMMAND"]),
        (["paint"], ["paint", "demo"]),
        (["demo", "--rnaks", "2"], ["--rnaks"]),
        (["demo", "--ranks", "0"], ["--ranks", "'0'", "from 1 to 64"]),
        (["demo", "--ranks", "two"], ["--ranks", "'two'", "a whole number"]),
        (["demo", "--seed", "-1"], ["--seed is -1", "from 0"]),
        (["demo", "--steps-1", "1.5"], ["--steps-1 is 1.5"]),
        (["demo", "--rank", "0"], ["--rank is 0", "from 1 to 1024"]),
        (["demo", "--device", "tpu"], ["--device", "tpu", "cpu"]),
        (["demo", "--shard", "0"], ["--shard is 0", "from 1 to 1024"]),
        (["demo", "--shard", "2", "--ranks", "3"], ["shard is 2", "a divisor of the number of ranks, which is 3"]),
        (["train", "--data", ".", "--out", "x", "--preset", "huge"], ["--preset", "huge", "paper-12b"]),
        (["demo", "--precision", "fp8"], ["--precision", "fp8", "fp32", "bf16", "fp16"]),
        (["train", "--data", ".", "--out", "x", "--precision", "half"], ["--precision", "half", "fp16"]),
        (["demo", "--reducer", "magic"], ["--reducer", "magic", "powersgd"]),
        (["demo", "--out", "/proc/nowhere"], ["--out", "/proc/nowhere", "cannot be written"]),
        (["demo", "--out", __file__], ["--out", "cannot be written"]),
        (["train"], ["--data", "--out"]),
        (["train", *RUN, "--stage2.learning_rate", "fast"], ["--stage2.learning_rate is 'fast'", "from 1e-08 to 1"]),
        (["train", *RUN, "--stage2.learning_rate", "7"], ["--stage2.learning_rate is 7.0", "from 1e-08 to 1"]),
        (["train", *RUN, "--stage1.betas", "0.9"], ["--stage1.betas is [0.9]", "a list of 2 numbers from 0 to 1"]),
        (["train", *RUN, "--stage1.accumulate", "2", "--stage1.batch", "6"], ["stage1.batch is 6", "accumulate"]),
        (["train", *RUN, "--communication.separate", "maybe"], ["--communication.separate", "true or false"]),
        (["train", *RUN, "--checkpoint.keep", "0"], ["--checkpoint.keep is 0", "from 1 to 1000"]),
        (["train", *RUN, "--stage2.width", "10"], ["stage2.width is 10", "a multiple of stage2.heads"]),
        (["train", "--data", "/nowhere", "--out", "x"], ["--data /nowhere", "no such folder"]),
        (["train", "--data", __file__, "--out", "x"], ["--data", "is not a folder"]),
        (["sample", "--run", "/nowhere", "--caption", "a", "--out", "a.png"], ["--run /nowhere", "no such folder"]),
        (["sample", "--run", ".", "--caption", " ", "--out", "a.png"], ["--caption", "at least one word"]),
        (["sample", "--run", ".", "--caption", "a", "--out", "a.jpg"], ["--out a.jpg", ".png"]),
        (["sample", "--run", ".", "--caption", "a", "--out", "a.png", "--n", "0"], ["--n", "'0'", "from 1"]),
        (["evaluate", "--run", "/nowhere"], ["--run /nowhere", "no such folder"]),
    ],
)
def test_bad_arguments_are_refused_in_one_line(capsys, arguments, words):
    _refused(capsys, arguments, *words)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ("sise = 3", ["sise", "3", "size"]),
        ("size = 'big'", ["size", "'big'", "a whole number"]),
        ("size = 33", ["size", "33", "a multiple of stage1.patch, which is 4"]),
        ("[stage1]\nstepz = 3", ["stage1.stepz", "steps"]),
        ("[stage2]\nbatch = 63", ["stage2.batch", "63", "a multiple", "2"]),
        ("precision = 'fp8'", ["precision", "'fp8'", "one of fp32, bf16, fp16"]),
        ("size = ", ["not valid TOML"]),
        ("shard = 3", ["shard", "3", "a divisor of the number of ranks, which is 2"]),
        ("size = 32\n[stage1]\npatch = 5", ["size", "32", "a multiple of stage1.patch, which is 5"]),
        ("[communication]\nwire = 'int8'", ["communication.wire", "'int8'", "one of float32, bfloat16, float16"]),
        (
            "shard = 2\n[stage2]\nwidth = 15\nheads = 3\n[communication]\nseparate = true",
            ["stage2.width", "15", "shard"],
        ),
    ],
)
def test_bad_configurations_are_refused_in_one_line(capsys, tmp_path, data, config, words):
    path = tmp_path / "f.toml"
    path.write_text(config)
    _refused(capsys, ["train", "--data", data, "--out", tmp_path / "run", "--config", path], *words)
    assert not (tmp_path / "run").exists()


def test_a_flag_that_does_not_fit_is_refused(capsys, tmp_path, data):
    _refused(
        capsys,
        ["train", "--data", data, "--out", tmp_path / "run", "--size", "33"],
        "33",
        "a multiple of stage1.patch, which is 4",
    )


@given(st.data())
@settings(max_examples=20, deadline=None)
def test_a_flag_says_what_the_file_says(data):
    """Every field, by its own name: a command line and a file make the same settings."""
    table, arguments = {}, ["train", *RUN]
    for name, field, kind in data.draw(
        st.lists(st.sampled_from(leaves(TrainSettings)), unique_by=lambda leaf: leaf[0])
    ):
        value = data.draw(_values(field, kind), label=name)
        table[name] = value
        arguments += [f"--{name}", str(value).lower() if isinstance(value, bool) else str(value)]
    parsed = cli._parser().parse_args(arguments)
    chosen = flags.chosen(parsed, TrainSettings, cli._ALSO)
    assert _built(chosen) == _built(nested(table))


def _built(table):
    """All values by name, or why they do not go together."""
    try:
        return resume.flat(build(TrainSettings, table))
    except SettingError as error:
        return str(error)


def _values(field, kind):
    """Values that a field allows."""
    limits = field.metadata
    if "options" in limits:
        return st.sampled_from(limits["options"])
    if "length" in limits:
        return st.integers(0, 10_000) | st.floats(0, 1, allow_subnormal=False)
    if kind is bool:
        return st.booleans()
    if kind is str:
        return st.sampled_from(["jpg", "caption"])
    if kind is int:
        return st.integers(limits["low"], min(limits["high"], limits["low"] + 50))
    number = st.floats(limits["low"], limits["high"], allow_subnormal=False)
    return number if kind is float else st.lists(number, min_size=2, max_size=2)


def test_a_folder_without_usable_pictures_is_refused(capsys, tmp_path):
    folder = tmp_path / "empty"
    folder.mkdir()
    _refused(capsys, ["train", "--data", folder, "--out", tmp_path / "run"], "0 usable pictures", "name.txt")
    (folder / "a.png").write_bytes(b"no")
    (folder / "a.txt").write_text("a")
    _refused(capsys, ["train", "--data", folder, "--out", tmp_path / "run"], "1 broken")
    assert not (tmp_path / "run").exists()


def test_a_run_must_not_lie_among_its_data(capsys, data):
    _refused(capsys, ["train", "--data", data, "--out", data], "--out", "data folder")
    _refused(capsys, ["train", "--data", data, "--out", data / "run"], "--out", "data folder")


def test_check_says_what_is_usable_and_trains_nothing(capsys, tmp_path, data):
    (data / "3.txt").write_text("")
    out = tmp_path / "run"
    assert main(["train", "--data", str(data), "--out", str(out), "--check"]) == 0
    said = capsys.readouterr().out
    assert "3 pictures with captions" in said
    assert "left out: 1 with an empty caption: 3.png" in said
    assert not out.exists()


def test_check_plans_for_more_ranks_than_can_be_started(capsys, tmp_path, data):
    config = tmp_path / "f.toml"
    config.write_text("[stage2]\nlayers = 2")
    arguments = ["train", "--data", data, "--out", tmp_path / "run", "--preset", "paper-12b", "--config", config]
    arguments += ["--ranks", "1024", "--shard", "8"]
    assert main([*map(str, arguments), "--check"]) == 0
    said = capsys.readouterr().out
    assert "stage 2, each of 128 x 8 ranks" in said
    assert "saved of the matrices' numbers: 85.9%" in said
    _refused(capsys, arguments, "--ranks 1024", "at most 64")
    assert not (tmp_path / "run").exists()


def test_check_refuses_an_output_that_cannot_be_written(capsys, data):
    _refused(capsys, ["train", "--data", data, "--out", __file__ + "/run", "--check"], "--out", "cannot be written")


def test_a_good_command_starts_the_ranks_it_was_asked_for(monkeypatch, tmp_path, data):
    started = []
    monkeypatch.setattr(launch, "start", lambda *given: started.append(given) or 0)
    arguments = ["train", "--data", str(data), "--out", str(tmp_path / "run"), "--ranks", "4"]
    assert main(arguments) == 0
    assert started == [(cli.COMMAND, arguments, 4, tmp_path / "run" / "error.txt")]
    assert len(json.loads((tmp_path / "run" / "pictures.json").read_text())["names"]) == 4
    assert main(["demo", "--out", str(tmp_path / "demo"), "--ranks", "3"]) == 0
    assert started[1][2] == 3


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (None, "it has no settings.json"),
        ("{", "damaged"),
        ("[]", "damaged"),
        ('{"format": 99, "kind": "demo"}', "format 99"),
        ('{"format": 1, "kind": "demo"}', "it has no dvae.safetensors"),
    ],
)
def test_what_is_no_run_is_refused(capsys, tmp_path, settings, words):
    if settings is not None:
        (tmp_path / runs.SETTINGS).write_text(settings)
    _refused(capsys, ["evaluate", "--run", tmp_path], str(tmp_path), words)


@pytest.mark.parametrize("command", [[], ["demo"], ["train"], ["sample"], ["evaluate"]])
def test_help_explains_the_options(capsys, command):
    assert main([*command, "--help"]) == 0
    out = capsys.readouterr().out
    for action in {"demo": ["--ranks", "--reducer"], "train": ["--check", "--config"]}.get("".join(command), []):
        assert action in out


@pytest.mark.parametrize("arguments", [["demo", "--rnaks"], ["train", "--data", "/nowhere", "--out", "x"], ["--help"]])
def test_a_typo_does_not_wait_for_torch(arguments):
    program = (
        "import sys; from distopt.integrations.dalle.cli import main; main(sys.argv[1:]);"
        "assert 'torch' not in sys.modules"
    )
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-c", program, *arguments]
    subprocess.run(command, check=True, env=environment, capture_output=True, cwd=Path(__file__).parent)


def test_under_torchrun_only_rank_zero_speaks(capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert main(["train", "--data", "/nowhere", "--out", "x"]) == 2
    assert capsys.readouterr().err == ""
