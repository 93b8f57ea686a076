"""The command ``distopt-recipes``: reads its arguments, checks them, and only then imports what takes seconds."""

import argparse
import dataclasses
import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ..running import command, flags, launch
from ..running.fields import InputError, build
from .settings import BagsSettings, DistillationSettings, TasksSettings, TrainerSettings

COMMAND = launch.Command("distopt-recipes", "distopt.integrations.recipes")
_EXAMPLES = """examples:
  distopt-recipes tasks                     two tasks, one in units a hundred times larger
  distopt-recipes distillation --labels 50  digits of which few have labels
  distopt-recipes bags --data unit-tests    which poolings can be misled
  distopt-recipes trainer --out runs/mine   the plain trainer; the same command goes on after a crash
"""
_NEEDED = {"sklearn": "scikit-learn", "matplotlib": "matplotlib"}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; arguments and exit codes are those of `running.command.run`."""
    return command.run(COMMAND, _parser(), arguments)


def _train(parsed: argparse.Namespace, given: Sequence[str]) -> int:
    """Start ranks, or be one."""
    settings = build(parsed.kind, flags.chosen(parsed, parsed.kind))
    _check(settings)
    place = launch.place()
    launch.check_devices(parsed.device, parsed.ranks if place is None else 1)
    if place is None or place.rank == 0:
        command.make_writable("--out", parsed.out)
    if place is None:
        return launch.start(COMMAND, given, parsed.ranks, parsed.out / "error.txt")
    from ..running.ranks import work
    from .training import Place

    return work(
        COMMAND,
        place,
        parsed.device,
        lambda device: parsed.task()(settings, parsed.out, Place(place.rank, place.world_size, device)),
    )


def _check(settings: object) -> None:
    for module, name in _NEEDED.items():
        if importlib.util.find_spec(module) is None:
            raise InputError(f"{name} is missing: pip install 'distopt[recipes]'")
    if isinstance(settings, BagsSettings) and settings.sizes[0] > settings.sizes[1]:
        raise InputError(f"--sizes {settings.sizes}: the smallest bag comes first")


def _tasks() -> Callable[..., None]:
    from .run_tasks import run

    return run


def _distillation() -> Callable[..., None]:
    from .run_distillation import run

    return run


def _bags() -> Callable[..., None]:
    from .run_bags import run

    return run


def _trainer() -> Callable[..., None]:
    from .results import write_json
    from .trainer import train

    def run(settings: TrainerSettings, out: Path, place: Any) -> None:
        chosen = dataclasses.asdict(settings)
        figures = train(out / "snapshots", place.device, **chosen)
        if place.rank == 0:
            print("  ".join(f"{name} {value}" for name, value in figures.items()))
            write_json(out / "results.json", {"settings": chosen, "ranks": place.ranks, **figures})

    return run


_COMMANDS: dict[str, tuple[type, Callable[[], Callable[..., None]], str]] = {
    "tasks": (TasksSettings, _tasks, "Two tasks in one loss: weights learned from uncertainty, against fixed ones."),
    "distillation": (
        DistillationSettings,
        _distillation,
        "Self-distillation of two distorted views, against training without.",
    ),
    "bags": (BagsSettings, _bags, "Labels of bags: every pooling on bags of digits, or on algorithmic unit tests."),
    "trainer": (TrainerSettings, _trainer, "The plain DDP trainer, with snapshots; run again, it goes on."),
}


def _parser() -> argparse.ArgumentParser:
    parser = command.Parser(
        prog=COMMAND.name,
        description="Small recipes trained with distopt's plugins, each against its control.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND", dest="command")
    for name, (kind, task, meaning) in _COMMANDS.items():
        added = commands.add_parser(name, help=meaning, description=meaning, allow_abbrev=False)
        added.set_defaults(run=_train, kind=kind, task=task)
        default = Path("runs/recipes") / name
        added.add_argument(
            "--out", type=Path, default=default, metavar="DIR", help=f"folder of the results (default: {default})"
        )
        command.add_device(added)
        command.add_ranks(added)
        flags.add_fields(added, kind)
    return parser
