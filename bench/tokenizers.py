"""Which tokenizer should stage 1 of DALL-E be? The demo with every bottleneck, at equal budgets.

    python -m bench.tokenizers                                   # hours on two cores; goes on where it was stopped
    python -m bench.tokenizers --steps-2 0                       # stage 1 alone
    python -m bench.tokenizers --bottlenecks simvq fsq --steps-1 600 --steps-2 600 --seeds 0

Each row is the demo without stage 3, on one rank and one thread: the same networks, pictures, batches and steps, but
another bottleneck between encoder and decoder. What is told of stage 1 is added to ``tokenizers.jsonl`` when it has
ended, and what is told of stage 2 when that has. A row that is there is not made again, and one that was stopped goes
on from its last checkpoint: ``--fresh`` begins anew. Reconstruction is of pictures of all kinds that were not trained
on; the round trip is that of the demo's report.
"""

import argparse
import dataclasses
import shutil
import statistics
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from distopt.integrations.dalle import demo, recipe
from distopt.integrations.dalle.architectures import AnyDVAE, nearest_codes
from distopt.integrations.dalle.checkpoints import RunCheckpoints
from distopt.integrations.dalle.context import Context
from distopt.integrations.dalle.evaluate import score_scenes
from distopt.integrations.dalle.metrics import psnr
from distopt.integrations.dalle.settings import BOTTLENECKS, TABLES, CheckpointOptions, DemoSettings, TokenizerOptions
from distopt.integrations.dalle.stage1 import evaluate_tokenizer
from distopt.integrations.running.journal import RunJournal
from distopt.integrations.scenes.draw import Scenes

from bench.stamp import append_lines, markdown, read_lines

NAME = "tokenizers"
ROTATED = "+rotation"
WAYS = tuple(name + more for name in BOTTLENECKS for more in (("", ROTATED) if name in TABLES else ("",)))
"""Bottlenecks by name, those with a table of vectors also with the rotation trick."""
_PICTURES, _SEED_OF_PICTURES = 1024, 10**9
_SAVED_EVERY = 60.0


@dataclasses.dataclass(frozen=True)
class Case:
    """What decides a row.

    Args:
        way: out of `WAYS`.
        codes: K that is wished for; a bottleneck that cannot have it takes the nearest.
        steps_1: of stage 1.
        steps_2: of stage 2; 0 for stage 1 alone.
        seed: of weights and batches.
        n: captions a split.
    """

    way: str
    codes: int
    steps_1: int
    steps_2: int
    seed: int
    n: int

    @property
    def recipe(self) -> recipe.Recipe:
        """The demo with this bottleneck, without stage 3."""
        name = self.way.removesuffix(ROTATED)
        rotation = True if self.way.endswith(ROTATED) else None
        options = TokenizerOptions(bottleneck=name, rotation=rotation, codes=nearest_codes(name, self.codes))
        checkpoint = CheckpointOptions(every_seconds=_SAVED_EVERY, keep=1)
        settings = DemoSettings(
            seed=self.seed,
            stage1=options,
            steps_1=self.steps_1,
            steps_2=max(1, self.steps_2),
            steps_3=0,
            checkpoint=checkpoint,
        )
        return demo.recipe_of(settings)

    def key(self, stage: int) -> dict[str, object]:
        """What a record of the stage is found by."""
        told = {"stage": stage, **dataclasses.asdict(self)}
        return told if stage == 2 else {name: told[name] for name in ("stage", "way", "codes", "steps_1", "seed")}

    def place(self, stage: int, folder: Path) -> Path:
        """Where the checkpoints of the stage lie; stage 2 begins with a copy of those of stage 1."""
        key = self.key(stage)
        key.pop("n", None)
        own = folder / "-".join(str(value) for value in key.values())
        if stage == 2 and not own.exists():
            shutil.copytree(self.place(1, folder), own)
        own.mkdir(parents=True, exist_ok=True)
        return own


def main() -> None:
    """Read the command line, make the rows that are missing, and report."""
    chosen = _parser().parse_args()
    torch.set_num_threads(1)  # the stamp says so
    path, folder = chosen.out / f"{NAME}.jsonl", chosen.out / NAME
    if chosen.fresh:
        path.unlink(missing_ok=True)
        shutil.rmtree(folder, ignore_errors=True)
    for seed in chosen.seeds:
        for way in chosen.bottlenecks:
            case = Case(way, chosen.codes, chosen.steps_1, chosen.steps_2, seed, chosen.n)
            for stage in (1, 2) if case.steps_2 else (1,):
                if not is_there(case, stage, path):
                    make(case, stage, path, folder)
    found = tables(read_lines(path))
    (chosen.out / f"{NAME}.md").write_text("\n\n".join(found.values()) + "\n", encoding="utf-8")
    print("\n" + "\n\n".join(found.values()))


def is_there(case: Case, stage: int, path: Path) -> bool:
    """Whether the file has the record of this stage."""
    records = read_lines(path) if path.exists() else []
    return any(all(record.get(name) == value for name, value in case.key(stage).items()) for record in records)


def make(case: Case, stage: int, path: Path, folder: Path) -> dict[str, Any]:
    """Train a stage from what there is of it, add its record to the file, and give it back."""
    began, task, context = time.process_time(), Scenes(), Context(seed=case.seed)
    checkpoints = RunCheckpoints(case.place(stage, folder), case.recipe.checkpoint, context)
    given = (task, case.recipe, context, RunJournal(None, shown=False), checkpoints)
    if stage == 1:
        trained = recipe.train_tokenizer(*given)
        figures = {**judged(trained.model.eval(), task, case.n, case.seed), "loss": trained.final_loss}
    else:
        model = recipe.train(*given)
        scores, _ = score_scenes(model.model, task, n=case.n, show=0, context=context)
        figures = {split: scores[split] for split in ("s0", "s1", "s2", "control")}
        figures["loss"] = model.stages[1].final_loss
    record = {**case.key(stage), **figures, "cpu_seconds": round(time.process_time() - began, 1)}
    append_lines(path, NAME, [record])
    print(record, flush=True)
    return record


@torch.no_grad()
def judged(tokenizer: AnyDVAE, task: Scenes, n: int, seed: int) -> dict[str, Any]:
    """Usage, the exact round trip, and the squared error of pictures that come back."""
    pictures = task.pictures(_PICTURES, np.random.default_rng(_SEED_OF_PICTURES))
    decoded = torch.cat([tokenizer.decode(tokenizer.tokenize(part)) for part in pictures.split(256)])
    found = evaluate_tokenizer(tokenizer, task, n=n, seed=seed)
    mse = float((decoded - pictures).double().square().mean())
    parameters = sum(p.numel() for p in tokenizer.parameters())
    return {**found, "of": tokenizer.settings.codes, "mse": mse, "psnr": psnr(mse), "parameters": parameters}


def tables(records: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """One row a bottleneck and budget, means over seeds, by the mark of the table."""
    head = [
        "bottleneck",
        "codes in use",
        "perplexity",
        "PSNR, dB",
        "exact round trip",
        "S0",
        "S1",
        "S2",
        "steps",
        "seeds",
    ]
    first, second = ([record for record in records if record["stage"] == stage] for stage in (1, 2))
    order = {way: i for i, way in enumerate(WAYS)}
    rows: list[list[str]] = []
    budgets = sorted({(r["steps_1"], r["steps_2"]) for r in second} | {(r["steps_1"], 0) for r in first}, reverse=True)
    shown: set[tuple[str, int, int]] = set()
    for one, two in budgets:
        of = _grouped(r for r in first if r["steps_1"] == one)
        scored = _grouped(r for r in second if (r["steps_1"], r["steps_2"]) == (one, two))
        for way, codes in sorted(of, key=lambda found: (found[1], order[found[0]])):
            if (not two and (way, codes, one) in shown) or (two and (way, codes) not in scored):
                continue
            shown.add((way, codes, one))
            mine, ends = of[way, codes], scored.get((way, codes), [])
            splits = [_percent([r[split]["exact"] for r in ends]) for split in ("s0", "s1", "s2")]
            steps = f"{one:,} + {two:,}" if two else f"{one:,}"
            rows.append(
                [
                    way.replace(ROTATED, ", rotation trick"),
                    f"{_mean(mine, 'codes_used'):.0f} of {mine[0]['of']}",
                    f"{_mean(mine, 'perplexity'):.1f}",
                    f"{_mean(mine, 'psnr'):.2f}",
                    _percent([r["exact"] for r in mine]),
                    *splits,
                    steps,
                    str(len(ends) if two else len(mine)),
                ]
            )
    return {"dalle-tokenizers": markdown(head, rows)}


def _grouped(records: Iterable[Mapping[str, Any]]) -> dict[tuple[str, int], list[Mapping[str, Any]]]:
    found: dict[tuple[str, int], list[Mapping[str, Any]]] = {}
    for record in records:
        found.setdefault((record["way"], record["codes"]), []).append(record)
    return found


def _mean(records: Sequence[Mapping[str, Any]], name: str) -> float:
    return statistics.fmean(record[name] for record in records)


def _percent(shares: Sequence[float]) -> str:
    return f"{100 * statistics.fmean(shares):.1f} %" if shares else ""


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of at least 1")
    return int(text)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bottlenecks", nargs="+", choices=WAYS, default=list(WAYS), metavar="NAME")
    parser.add_argument(
        "--codes", type=_count, default=192, help="where a bottleneck can have as many, else the nearest"
    )
    parser.add_argument("--steps-1", type=_count, default=3700, help="of stage 1; the demo's own are 3,700")
    parser.add_argument("--steps-2", type=int, default=3800, help="of stage 2, the demo's are 3,800; 0: stage 1 alone")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--n", type=_count, default=400, help="captions scored in each split")
    parser.add_argument("--fresh", action="store_true", help="forget all rows that the file has")
    parser.add_argument("--out", type=Path, default=Path("runs/bench"))
    return parser


if __name__ == "__main__":
    main()
