"""The command ``distopt-dalle``: reads its arguments, checks them, and only then imports what takes seconds."""

import argparse
import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from distopt.errors import DistoptError

from ..running import command, flags, launch
from ..running.fields import MAX_SEED
from . import drawing, resume, runs
from .settings import (
    PRESETS,
    RELAXED,
    TABLES,
    DemoSettings,
    InputError,
    TokenizerOptions,
    TrainSettings,
    build,
    check_batch,
    check_shard,
    load_toml,
    merged,
    preset,
)

COMMAND = launch.Command("distopt-dalle", "distopt.integrations.dalle")
_ALSO = {f"stage{i}.steps": f"--steps-{i}" for i in (1, 2, 3)} | {f"steps_{i}": f"--steps-{i}" for i in (1, 2, 3)}
"""Flags that fields have besides their own."""
_UNSET = {
    "sampling": "as it is without",
    "sampling.top_k": "all",
    "sampling.top_p": "all",
    "data": "what filters says",
    "data.images": "looked for beside that file",
    "stage1.weights": "none, it is trained",
}
"""What fields are where they are not set; others depend on preset, task and bottleneck."""
_HIDDEN = ("n", "steps_1", "steps_2", "steps_3")
"""Fields of the demo that have no flag of their own name."""
_MOST_PLANNED = 65_536
"""Ranks that ``--check`` plans for; those that are started are fewer."""
_DATA = "a folder of pictures with captions, COCO's .json, a .tsv, or shards: 'shards/{000..009}.tar'"
_EXAMPLES = """examples:
  distopt-dalle demo                                   train and score the drawn task, about 10 minutes on two cores
  distopt-dalle train --data photos --out runs/photos  train on name.jpg beside name.txt
  distopt-dalle sample --run runs/demo --caption "a red circle above a blue square" --out red.png
  distopt-dalle evaluate --run runs/demo
  torchrun --nproc_per_node 4 -m distopt.integrations.dalle demo   use ranks that torchrun starts
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; arguments and exit codes are those of `running.command.run`."""
    return command.run(COMMAND, _parser(), arguments)


def _demo(parsed: argparse.Namespace, given: Sequence[str]) -> int:
    settings = build(DemoSettings, flags.chosen(parsed, DemoSettings, _ALSO))
    out: Path = parsed.out
    _check_codes(settings.stage1)
    place = launch.place()
    check_shard(settings, parsed.ranks if place is None else place.world_size)
    launch.check_devices(parsed.device, parsed.ranks if place is None else 1)
    if place is None or place.rank == 0:
        command.make_writable("--out", out)
    if not _begin(parsed, settings, out, place):
        return 0
    if place is None:
        return launch.start(COMMAND, given, parsed.ranks, out / "error.txt")
    from .demo import run

    return _work(place, parsed.device, settings.seed, lambda context: run(settings, out, context))


def _train(parsed: argparse.Namespace, given: Sequence[str]) -> int:
    settings = _train_settings(parsed)
    data, out = parsed.data, parsed.out
    from .data import opening

    opening.kind_of(data, settings.data)
    if out.resolve() == data.resolve() or data.resolve() in out.resolve().parents:
        raise InputError(f"--out {out}: lies in the data folder {data}, whose pictures would mix with the run's own")
    place = launch.place()
    ranks = parsed.ranks if place is None else place.world_size
    check_shard(settings, ranks)
    check_batch(settings, ranks)
    launch.check_devices(parsed.device, parsed.ranks if place is None else 1)
    _check_codes(settings.stage1)
    if settings.stage1.weights is not None:
        from .architectures import settings_of

        settings_of(settings.stage1, settings.size)
    if parsed.check:
        if place is None or place.rank == 0:
            _check_only(settings, data, out, ranks)
        return 0
    if place is None:
        launch.check_startable(parsed.ranks)
        # Read once, here: every reason to refuse the data is known before a process is started.
        found = opening.read(data, settings, out)
        command.make_writable("--out", out)
        if not _begin(parsed, settings, out, place):
            return 0
        opening.keep(found, out)
        return launch.start(COMMAND, given, parsed.ranks, out / "error.txt")
    if place.rank == 0:
        command.make_writable("--out", out)
    if not _begin(parsed, settings, out, place):
        return 0
    from .train import run

    ours = launch.started_by_us()
    return _work(place, parsed.device, settings.seed, lambda context: run(settings, data, out, context, read=not ours))


def _check_codes(options: TokenizerOptions) -> None:
    """Refuse codes that a bottleneck cannot have; what tells of them costs seconds to import."""
    if options.codes is not None and options.bottleneck not in (*RELAXED, *TABLES):
        from .architectures import check_codes

        check_codes(options)


def _work(place: launch.Place, device: str, seed: int, task: Callable[..., None]) -> int:
    """Join the other ranks and do ``task`` with them, in a context that is made for it."""
    from ..running.ranks import work
    from .context import Context

    return work(
        COMMAND,
        place,
        device,
        lambda found: task(Context(rank=place.rank, world_size=place.world_size, device=found, seed=seed)),
    )


def _check_only(settings: TrainSettings, data: Path, out: Path, ranks: int) -> None:
    from .data import opening
    from .plan import plan_lines
    from .train import recipe_of

    found = opening.read(data, settings, out)
    command.check_writable("--out", out)
    training = int((~found.held_out(settings.held_out)).sum())
    for line in (*found.summary(), *plan_lines(recipe_of(settings), ranks, training)):
        print(line)
    print("settings and data are fine; --check ends here")


def _train_settings(parsed: argparse.Namespace) -> TrainSettings:
    table = {} if parsed.preset is None else preset(parsed.preset)
    own = {} if parsed.config is None else load_toml(parsed.config)
    below = merged(table, own)
    try:
        build(TrainSettings, below)
    except DistoptError as error:
        raise InputError(f"--config {parsed.config}: {error}") from None
    return build(TrainSettings, merged(below, flags.chosen(parsed, TrainSettings, _ALSO)))


def _begin(parsed: argparse.Namespace, settings: Any, out: Path, place: launch.Place | None) -> bool:
    """Whether there is something to do in ``out``; under torchrun the first rank alone changes it."""
    if launch.started_by_us():
        return True
    first = place is None or place.rank == 0
    if resume.begin(out, parsed.command, settings, fresh=parsed.fresh, first=first):
        return True
    if first:
        print(f"{out}: has been trained with these settings; its report is {out / runs.REPORT}; --fresh trains it anew")
    return False


def _sample(parsed: argparse.Namespace, given: Sequence[str]) -> int:
    if not parsed.caption.strip():
        raise InputError(f"--caption {parsed.caption!r}: must have at least one word")
    out: Path = parsed.out
    if out.suffix.lower() != ".png":
        raise InputError(f"--out {out}: must end with .png")
    if out.is_dir():
        raise InputError(f"--out {out}: is a folder; name a file that ends with .png")
    run = runs.open_run(parsed.run_folder)
    request = drawing.request_of(parsed, run)
    launch.check_devices(parsed.device, 1)
    command.make_writable("--out", out.parent)
    from .generate import write_samples

    write_samples(run, request, out, device=parsed.device)
    print(out)
    return 0


def _evaluate(parsed: argparse.Namespace, given: Sequence[str]) -> int:
    run = runs.open_run(parsed.run_folder)
    launch.check_devices(parsed.device, 1)
    out: Path = parsed.run_folder / runs.EVALUATION if parsed.out is None else parsed.out
    command.make_writable("--out", out)
    from .evaluate import evaluate

    evaluate(run, parsed.device, out, features=parsed.features)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = command.Parser(
        prog="distopt-dalle",
        description="A complete, small DALL-E, trained with distopt's compressed gradients.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND", dest="command")

    def add(name: str, run: Callable[..., int], help: str) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=help, description=help, allow_abbrev=False)
        added.set_defaults(run=run)
        command.add_device(added)
        return added

    demo = add("demo", _demo, "Train both stages on the drawn task, sample, score, and write a report.")
    demo.add_argument(
        "--out",
        type=Path,
        default=Path("runs/demo"),
        metavar="RUN",
        help="folder of the run, made if missing (default: runs/demo)",
    )
    command.add_ranks(demo)
    _add_fresh(demo)
    flags.add_fields(demo, DemoSettings, _ALSO, _HIDDEN, _UNSET)

    train = add("train", _train, "Train both stages on pictures with captions.")
    train.add_argument("--data", type=Path, required=True, metavar="DATA", help=_DATA)
    train.add_argument("--out", type=Path, required=True, metavar="RUN", help="folder of the run, made if missing")
    train.add_argument(
        "--preset",
        choices=PRESETS,
        help="settings of the paper's sizes, which --config and flags change (default: none)",
    )
    train.add_argument("--config", type=Path, metavar="F.toml", help=f"settings (default: none): {_toml_names()}")
    command.add_ranks(train, _MOST_PLANNED)
    _add_fresh(train)
    flags.add_fields(train, TrainSettings, _ALSO, _HIDDEN, _UNSET)
    train.add_argument("--check", action="store_true", help="check data and settings, then exit without training")

    sample = add("sample", _sample, "Draw pictures for a caption with a trained run.")
    _add_run(sample, runs.BUNDLED, " (default: the model of the demo that is installed with the package)")
    sample.add_argument("--caption", required=True, metavar="TEXT", help="what to draw")
    sample.add_argument("--out", type=Path, required=True, metavar="F.png", help="one picture, or a sheet of several")
    sample.add_argument(
        "--n", type=command.whole(1, 1024), default=1, metavar="N", help="how many pictures (default: 1)"
    )
    sample.add_argument(
        "--seed", type=command.whole(0, MAX_SEED), default=0, metavar="N", help="decides what is drawn (default: 0)"
    )
    drawing.add_flags(sample)

    evaluate = add("evaluate", _evaluate, "Compute the scores of a run anew; the last line printed is JSON.")
    _add_run(evaluate)
    evaluate.add_argument(
        "--out", type=Path, metavar="DIR", help=f"folder of the pictures (default: {runs.EVALUATION} in the run's own)"
    )
    evaluate.add_argument(
        "--features",
        metavar="MODULE:FACTORY",
        help="network of the Frechet distance, pictures in [0, 1] to (B, D) (default: the run's contrastive model)",
    )
    return parser


def _add_fresh(parser: argparse.ArgumentParser) -> None:
    meaning = "train anew, whatever --out holds; otherwise a run that was stopped goes on"
    parser.add_argument("--fresh", action="store_true", help=meaning)


def _add_run(parser: argparse.ArgumentParser, default: Path | None = None, remark: str = "") -> None:
    meaning = "a folder that demo or train wrote" + remark
    required = default is None
    parser.add_argument(
        "--run", type=Path, required=required, default=default, metavar="RUN", dest="run_folder", help=meaning
    )


def _toml_names() -> str:
    values = {field.name: getattr(TrainSettings(), field.name) for field in dataclasses.fields(TrainSettings)}
    return ", ".join(f"[{name}]" if dataclasses.is_dataclass(value) else name for name, value in values.items())
