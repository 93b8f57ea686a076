"""A command's frame: bad input is one line and exit code 2."""

import argparse
import os

import pytest
from distopt.integrations.running import command
from distopt.integrations.running.fields import InputError
from distopt.integrations.running.launch import Command
from hypothesis import given
from hypothesis import strategies as st

from distopt.errors import DistoptError

TASK = Command("distopt-task", "none")


def parser(run):
    made = command.Parser(prog="distopt-task")
    command.add_ranks(made, 8)
    command.add_device(made)
    made.set_defaults(run=run)
    return made


@pytest.mark.parametrize(
    ("given", "line"),
    [
        (["--ranks", "9"], "argument --ranks: is '9', but must be a whole number from 1 to 8"),
        (["--ranks", "two"], "argument --ranks: is 'two', but must be a whole number from 1 to 8"),
        (["--device", "tpu"], "argument --device: invalid choice: 'tpu' (choose from 'cpu', 'cuda')"),
        (["--speed"], "unrecognized arguments: --speed"),
    ],
)
def test_flags_that_make_no_sense(given, line, capsys):
    assert command.run(TASK, parser(None), given) == 2
    assert capsys.readouterr().err.replace("cpu, cuda", "'cpu', 'cuda'") == f"distopt-task: error: {line}\n"


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (DistoptError("steps is 0, but must be 1"), 2, "distopt-task: error: steps is 0, but must be 1\n"),
        (KeyboardInterrupt(), 130, "distopt-task: interrupted\n"),
        (SystemExit(5), 5, ""),
    ],
)
def test_how_a_command_ends(error, code, line, capsys):
    def fail(parsed: argparse.Namespace, given):
        raise error

    assert command.run(TASK, parser(fail), []) == code
    assert capsys.readouterr().err == line


def test_what_it_returns_is_the_exit_code():
    assert command.run(TASK, parser(lambda parsed, given: parsed.ranks + len(given)), ["--ranks", "3"]) == 5


@given(st.integers(-5, 20))
def test_whole_numbers_within_their_limits(value):
    read = command.whole(0, 10)
    if 0 <= value <= 10:
        assert read(str(value)) == value
    else:
        with pytest.raises(argparse.ArgumentTypeError, match="from 0 to 10"):
            read(str(value))


def test_folders(tmp_path):
    made = tmp_path / "a" / "b"
    command.check_writable("--out", made)
    assert not made.exists()
    command.make_writable("--out", made)
    assert os.listdir(made) == []
    file = tmp_path / "file"
    file.touch()
    for check in (command.check_writable, command.make_writable):
        with pytest.raises(InputError, match=r"--out .*file/x: cannot be written to"):
            check("--out", file / "x")
