"""The command ``distopt-biggan``: reads its arguments, checks them, and only then imports what takes seconds."""

import argparse
import math
from collections.abc import Callable, Sequence
from pathlib import Path

from ..running import command, flags, launch
from ..running.fields import MAX_SEED, InputError, build
from . import runs
from .settings import CLASSES, RingOptions, TrainSettings
from .sizes import check_sizes

COMMAND = launch.Command("distopt-biggan", "distopt.integrations.biggan")
_EXAMPLES = """examples:
  distopt-biggan train                                        train on drawn shapes and judge what is drawn
  distopt-biggan train --batch 256 --accumulate 4 --out runs/large   the same with micro-batches
  distopt-biggan sample --run runs/biggan --truncation 0.5 --class ring --n 64 --out rings.png
  distopt-biggan ring --gamma 0 --out runs/no-penalty         eight Gaussians, without R1
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; arguments and exit codes are those of `running.command.run`."""
    return command.run(COMMAND, _parser(), arguments)


def _train(parsed: argparse.Namespace, given: Sequence[str]) -> int:
    settings = build(TrainSettings, flags.chosen(parsed, TrainSettings))
    out: Path = parsed.out
    place = launch.place()
    settings.check_ranks(parsed.ranks if place is None else place.world_size)
    check_sizes(settings.sizes())
    launch.check_devices(parsed.device, parsed.ranks if place is None else 1)
    if place is None or (place.rank == 0 and not launch.started_by_us()):
        command.make_writable("--out", out)
        if not runs.begin(out, settings, fresh=parsed.fresh):
            print(f"{out}: has been trained with these settings; --fresh trains it anew")
            return 0
    if place is None:
        return launch.start(COMMAND, given, parsed.ranks, out / "error.txt")
    from ..running.ranks import work
    from .train import run

    return work(COMMAND, place, parsed.device, lambda device: run(settings, out, device))


def _sample(parsed: argparse.Namespace, given: Sequence[str]) -> int:
    out: Path = parsed.out
    if out.suffix.lower() != ".png":
        raise InputError(f"--out {out}: must end with .png")
    if not parsed.run_folder.is_dir():
        raise InputError(f"--run {parsed.run_folder}: there is no such folder")
    runs.read_settings("--run", parsed.run_folder)
    command.make_writable("--out", out.parent)
    from .generate import write_samples

    write_samples(
        parsed.run_folder, out, wanted=parsed.wanted, count=parsed.n, threshold=parsed.truncation, seed=parsed.seed
    )
    print(out)
    return 0


def _ring(parsed: argparse.Namespace, given: Sequence[str]) -> int:
    options = build(RingOptions, flags.chosen(parsed, RingOptions))
    command.make_writable("--out", parsed.out)
    from .generate import run_ring

    run_ring(options, parsed.out)
    return 0


def _threshold(text: str) -> float | None:
    if text == "none":
        return None
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0.01 <= value <= 100:
        raise argparse.ArgumentTypeError(f"is {text!r}, but must be none, or a number from 0.01 to 100")
    return value


def _parser() -> argparse.ArgumentParser:
    parser = command.Parser(
        prog="distopt-biggan",
        description="A complete, small BigGAN, trained with distopt's compressed gradients and exact micro-batches.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND", dest="command")

    def add(name: str, run: Callable[..., int], help: str) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=help, description=help, allow_abbrev=False)
        added.set_defaults(run=run)
        return added

    train = add("train", _train, "Train on drawn shapes and judge what is drawn; a run that was stopped goes on.")
    train.add_argument(
        "--out",
        type=Path,
        default=Path("runs/biggan"),
        metavar="RUN",
        help="folder of the run, made if missing (default: runs/biggan)",
    )
    train.add_argument("--fresh", action="store_true", help="train anew, whatever --out holds")
    command.add_ranks(train)
    command.add_device(train)
    flags.add_fields(train, TrainSettings)

    sample = add("sample", _sample, "Draw pictures with a trained run.")
    sample.add_argument("--run", type=Path, required=True, metavar="RUN", dest="run_folder", help="a folder of train")
    sample.add_argument("--out", type=Path, required=True, metavar="F.png", help="a sheet, one row a class")
    sample.add_argument("--class", choices=CLASSES, dest="wanted", help="what to draw (default: all of them)")
    sample.add_argument("--n", type=command.whole(1, 1024), default=8, metavar="N", help="of each class (default: 8)")
    sample.add_argument(
        "--truncation", type=_threshold, default=None, metavar="T", help="largest number of noise (default: none)"
    )
    sample.add_argument(
        "--seed", type=command.whole(0, MAX_SEED), default=0, metavar="N", help="decides what is drawn (default: 0)"
    )

    ring = add("ring", _ring, "Train a small GAN on a ring of eight Gaussians, and watch for collapse.")
    ring.add_argument(
        "--out", type=Path, default=Path("runs/ring"), metavar="DIR", help="folder of the curves (default: runs/ring)"
    )
    flags.add_fields(ring, RingOptions)
    return parser
