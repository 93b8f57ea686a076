"""The command ``distopt-tokenizers``: reads its arguments, checks them, and only then imports what takes seconds."""

import argparse
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from distopt.errors import SettingError

from ..running import command, flags, launch
from ..running.fields import build
from .settings import TrainSettings
from .sweeps import compared, curve, sizes_of

COMMAND = launch.Command("distopt-tokenizers", "distopt.integrations.tokenizers")
_SWEPT = ("bottleneck", "options", "start")
"""Fields that a sweep sets itself."""
# Defaults of the sweeps, where they differ from those of one run.
_COMPARED: Mapping[str, Any] = {"steps": 3000, "save_every": 0}
_CURVED: Mapping[str, Any] = {"steps": 3000, "width": 32, "data": "photos", "save_every": 0}
_EXAMPLES = """examples:
  distopt-tokenizers train --bottleneck simvq --codes 512 --out runs/simvq
  distopt-tokenizers train --bottleneck vq --options 'rotation = true' --data photos --out runs/vq
  distopt-tokenizers compare --out runs/compare      every kind at the same budget: table and pictures
  distopt-tokenizers curve --out runs/curve          usage and reconstruction over the size of the codebook
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; arguments and exit codes are those of `running.command.run`."""
    return command.run(COMMAND, _parser(), arguments)


def _train(parsed: argparse.Namespace, given: Sequence[str]) -> int:
    settings = build(TrainSettings, flags.chosen(parsed, TrainSettings))

    def task() -> None:
        from .experiments import run_one

        run_one(settings, parsed.out, settings.bottleneck, fresh=parsed.fresh)

    return _on_ranks(parsed, given, settings, task)


def _compare(parsed: argparse.Namespace, given: Sequence[str]) -> int:
    base = build(TrainSettings, {**_COMPARED, **flags.chosen(parsed, TrainSettings)})
    if base.codes & (base.codes - 1):
        raise SettingError("--codes", base.codes, "a power of two, which LFQ needs")
    entries = compared(base)

    def task() -> None:
        from . import tables
        from .experiments import run_all

        rows = run_all(entries, parsed.out, fresh=parsed.fresh)
        if _is_first():
            rows = [{**row, **dict.fromkeys(tables.STAGE_2)} for row in rows]
            print(tables.write(parsed.out, rows))
            tables.draw_pictures(parsed.out / "pictures.png", parsed.out, rows)

    return _on_ranks(parsed, given, base, task)


def _curve(parsed: argparse.Namespace, given: Sequence[str]) -> int:
    sizes = sizes_of(parsed.sizes)
    base = build(TrainSettings, {**_CURVED, **flags.chosen(parsed, TrainSettings)})
    entries = curve(base, sizes)

    def task() -> None:
        from . import tables
        from .experiments import run_all

        rows = run_all(entries, parsed.out, fresh=parsed.fresh)
        if _is_first():
            print(tables.write(parsed.out, rows))
            tables.draw_curve(parsed.out / "curve.png", rows)

    return _on_ranks(parsed, given, base, task)


def _on_ranks(
    parsed: argparse.Namespace, given: Sequence[str], settings: TrainSettings, task: Callable[[], None]
) -> int:
    """Do ``task`` on ranks: those of torchrun, or our own."""
    place = launch.place()
    ranks = parsed.ranks if place is None else place.world_size
    if settings.batch % ranks:
        raise SettingError("--batch", settings.batch, f"a multiple of the {ranks} ranks")
    if settings.data == "photos":
        from .data import Photos

        Photos()
    if place is None or place.rank == 0:
        command.make_writable("--out", parsed.out)
    if place is None:
        return launch.start(COMMAND, given, parsed.ranks, parsed.out / "error.txt")
    from ..running.ranks import work

    return work(COMMAND, place, "cpu", lambda _: task())


def _is_first() -> bool:
    place = launch.place()
    return place is None or place.rank == 0


def _parser() -> argparse.ArgumentParser:
    parser = command.Parser(
        prog="distopt-tokenizers",
        description="One autoencoder with exchangeable bottlenecks, trained with distopt's compressed gradients.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND", dest="command")

    def add(
        name: str,
        run: Callable[..., int],
        help: str,
        hidden: Sequence[str] = (),
        otherwise: Mapping[str, Any] | None = None,
    ) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=help, description=help, allow_abbrev=False)
        added.set_defaults(run=run)
        out = None if otherwise is None else Path("runs", name)
        meaning = "folder of the run, made if missing" + ("" if out is None else f" (default: {out})")
        added.add_argument("--out", type=Path, required=out is None, default=out, metavar="RUN", help=meaning)
        command.add_ranks(added)
        meaning = "train anew, whatever --out holds; otherwise what is finished stays, and a stopped run goes on"
        added.add_argument("--fresh", action="store_true", help=meaning)
        unset = {"options": "the bottleneck's own"}
        flags.add_fields(added, TrainSettings, hidden=hidden, unset=unset, otherwise=otherwise)
        return added

    add("train", _train, "Train one autoencoder, and judge it.")
    meaning = "Train every kind of bottleneck at the same budget: a table, and pictures."
    add("compare", _compare, meaning, _SWEPT, _COMPARED)
    meaning = "Train codebooks of rising size: a table, and a plot."
    swept = add("curve", _curve, meaning, (*_SWEPT, "codes"), _CURVED)
    sizes = "sizes of the codebooks (default: 64,256,1024,4096)"
    swept.add_argument("--codes", default="64,256,1024,4096", dest="sizes", metavar="K,K,...", help=sizes)
    return parser
