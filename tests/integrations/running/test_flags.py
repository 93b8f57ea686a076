"""Flags of settings: every field by its name, with dashes too, and once in the help."""

import dataclasses

import pytest
from distopt.integrations.running import command, fields, flags


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stage:
    learning_rate: float = fields.number(0.1, 0, 1, "how far a step goes")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    save_every: int = fields.number(5, 0, 9, "steps")
    first: Stage = Stage()


def made():
    parser = command.Parser(prog="distopt-task")
    flags.add_fields(parser, Settings)
    return parser


@pytest.mark.parametrize("every", ["--save_every", "--save-every"])
@pytest.mark.parametrize("rate", ["--first.learning_rate", "--first.learning-rate"])
def test_underscores_and_dashes_are_one(every, rate):
    given = flags.chosen(made().parse_args([every, "7", f"{rate}=0.5"]), Settings)
    assert given == {"save_every": 7, "first": {"learning_rate": 0.5}}
    assert flags.chosen(made().parse_args([]), Settings) == {}


def test_the_help_shows_each_once():
    told = made().format_help()
    assert told.count("save_every") == 2  # in the usage, and where it is explained
    assert "save-every" not in told
