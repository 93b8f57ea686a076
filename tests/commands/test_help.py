"""What ``--help`` tells: of every command, what it does; of every option, what it means and what it is otherwise."""

import argparse
import importlib
import re

import pytest

from distopt.commands.main import make_parser

CLIS = [f"distopt.integrations.{name}.cli" for name in ("dalle", "recipes", "tokenizers", "biggan")]


def each(parser):
    """A parser and those of its subcommands."""
    yield parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for inner in action.choices.values():
                yield from each(inner)


TOPS = [make_parser(), *(importlib.import_module(name)._parser() for name in CLIS)]
PARSERS = [parser for top in TOPS for parser in each(top)]
OPTIONS = [
    (parser.prog, action)
    for parser in PARSERS
    for action in parser._actions
    if not isinstance(action, argparse._HelpAction | argparse._SubParsersAction)
    and action.help is not argparse.SUPPRESS
]


def test_commands_were_found():
    found = {parser.prog for parser in PARSERS}
    assert {"distopt", "distopt report", "distopt plan", "distopt doctor", "distopt-dalle sample"} <= found
    assert len(OPTIONS) > 100


@pytest.mark.parametrize("parser", PARSERS, ids=lambda parser: parser.prog)
def test_every_command_says_what_it_does(parser):
    assert len(parser.description.split()) > 4
    text = parser.format_help()
    assert parser.description.split()[0] in text
    for line in (line for action in parser._actions if (line := action.help) not in (None, "", argparse.SUPPRESS)):
        assert line.replace("%%", "%").split()[0] in text
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            assert {choice.dest for choice in action._choices_actions if choice.help} == set(action.choices)


def test_every_option_says_what_it_means():
    """Beyond its default."""
    silent = [
        (command, option.option_strings or option.dest)
        for command, option in OPTIONS
        if len(re.sub(r"\(?default: [^)]*\)?", "", option.help or "").split()) < 2
    ]
    assert not silent


def test_every_option_tells_its_default():
    """Those that have a value and may be left out: the default by its value, or what it is without one."""
    untold = []
    for command, option in OPTIONS:
        if not option.option_strings or option.nargs == 0 or option.required or option.dest == "print_completion":
            continue
        help = option.help or ""
        value = "" if option.default is None else str(option.default)
        if "default" not in help or (value and value not in help and "installed" not in help):
            untold.append((command, option.option_strings, help, option.default))
    assert not untold
