"""Scores of a trained model: exact scores on the drawn task, losses against a baseline on pictures of a folder."""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from . import rerank
from .context import Context
from .data import opening
from .data.stream import StreamSource
from .folder import FolderSource
from .grading import Score, evaluate_generation
from .model import Model
from .ranks import single_thread
from .report import best_of_lines, finite, framed, held_out_lines, score_lines
from .runs import Run
from .scenes import Scenes, to_uint8
from .settings import InputError
from .stage1 import evaluate_tokenizer

_T = TypeVar("_T")
SPLITS: tuple[str, ...] = ("s0", "s1", "s2")
_HELD_OUT_LIMIT = 4096
_BATCH = 256
_PART = 50
"""Captions whose candidates are drawn and judged as one piece of work."""


@dataclass(frozen=True)
class Graded:
    """Samples of one split: the score over all, and the first few captions, verdicts and pictures to show."""

    score: Score
    captions: Sequence[tuple[str, bool]]
    pictures: np.ndarray


def evaluate(run: Run, device: str) -> None:
    """Compute the scores of a run anew and print them, as a table and then as one line of JSON.

    Raises:
        InputError: the run's files are damaged.
    """
    single_thread()
    chosen = torch.device(device)
    model = Model.load(run, chosen)
    if run.kind == "demo":
        try:
            seed, n, task_seed = (int(run.settings[name]) for name in ("seed", "n", "task_seed"))
        except (KeyError, TypeError, ValueError):
            raise InputError(f"--run {run.folder}: its settings are damaged") from None
        task, context = Scenes(task_seed), Context(device=chosen, seed=seed)
        figures, _ = score_scenes(model, task, n=n, show=0, context=context)
        best, _ = score_best_of(model, task, n=n, context=context)
        figures |= best
        lines = [*score_lines(figures), *best_of_lines(figures)]
    else:
        data = run.settings["data"]
        source = opening.load(run.folder, size=model.dvae.settings.size, held_out=data["held_out"])
        figures = score_folder(model, source, chosen)
        lines = held_out_lines(figures)
    print(framed(str(run.folder), lines))
    print(json.dumps(finite(figures)))


def score_scenes(
    model: Model, task: Scenes, *, n: int, show: int, context: Context
) -> tuple[dict[str, Any], dict[str, Graded]]:
    """Score a model on the drawn task; the ranks share the work, and every rank gets the whole result.

    The numbers do not depend on how many ranks there are.

    Args:
        model: what to score.
        task: gives the captions.
        n: captions a split, one free sample each.
        show: how many samples of each split to hand back.
        context: rank, world size, device and seed.

    Returns:
        ``tokenizer``, ``s0``, ``s1``, ``s2`` and ``control`` for the report, and samples by split.
    """

    def sampled(split: str, shuffled: bool) -> Graded:
        score, captions, pictures = evaluate_generation(
            task,
            model.transformer,
            model.dvae,
            model.tokenizer,
            split=split,
            n=n,
            sampling=model.sampling,
            seed=context.seed,
            shuffled=shuffled,
        )
        return Graded(score, captions[:show], to_uint8(pictures[:show]))

    jobs: list[Callable[[], Any]] = [lambda split=split: sampled(split, False) for split in SPLITS]
    jobs += [lambda: sampled("s0", True), lambda: evaluate_tokenizer(model.dvae, task, seed=context.seed)]
    *graded, control, tokenizer = _share(jobs, context)
    samples = dict(zip(SPLITS, graded, strict=True))
    tokenizer["codes"] = model.dvae.settings.codes
    figures = {"tokenizer": tokenizer, **{name: asdict(found.score) for name, found in samples.items()}}
    return {**figures, "control": asdict(control.score)}, samples


def score_best_of(
    model: Model, task: Scenes, *, n: int, context: Context
) -> tuple[dict[str, Any], dict[str, rerank.Chosen]]:
    """Score what the contrastive model chooses among several samples; the ranks share the work as in `score_scenes`.

    Args:
        model: what to score; without a contrastive model there is nothing to do.
        task: gives the captions.
        n: captions a split, at least; they are judged in pieces of equal size.
        context: rank, world size, device and seed.

    Returns:
        ``best_of`` for the report, by split, see ``rerank.BestOf``; and a first piece of each split to show.
    """
    if model.contrast is None:
        return {}, {}
    parts = [(split, part) for part in range(-(-n // _PART)) for split in SPLITS]
    jobs = [
        lambda split=split, part=part: rerank.choose(
            task, model, split=split, n=min(n, _PART), part=part, seed=context.seed
        )
        for split, part in parts
    ]
    found = dict(zip(parts, _share(jobs, context), strict=True))
    figures: dict[str, Any] = {}
    for split in SPLITS:
        mine = [chosen for (name, _), chosen in found.items() if name == split]
        right, best = (np.concatenate([getattr(chosen, name) for chosen in mine]) for name in ("right", "best"))
        figures[split] = rerank.count(right, best).figures()
    return {"best_of": figures}, {split: found[split, 0] for split in SPLITS}


@torch.no_grad()
def score_folder(model: Model, source: FolderSource | StreamSource, device: torch.device) -> dict[str, Any]:
    """Score a model on held-out pictures of a folder (on training pictures if none are held out).

    Returns:
        ``tokenizer``: ``mse`` of the reconstructions (pixels in [0, 1]), ``codes_used``, ``perplexity``, ``codes`` and
        ``n``. ``held_out``: mean ``image_loss`` and ``text_loss`` in nats a token, and what is reached by knowing
        nothing of captions or of other tokens: ``unigram``, the cross-entropy under how often each code occurs in
        training pictures, and ``unigram_by_position``, under how often it occurs at its place.
    """
    captions, pictures = source.held_out(_HELD_OUT_LIMIT)
    codes, decoded = _round_trip(model, pictures)
    parts = source.training(_HELD_OUT_LIMIT).split(_BATCH)
    trained = torch.cat([model.dvae.tokenize(part.to(device)).cpu() for part in parts])
    text = model.tokenizer.encode(captions, model.transformer.settings.text_length)
    losses = []
    for words, image in zip(text.split(_BATCH), codes.split(_BATCH), strict=True):
        batch = model.transformer(words.to(device), image.to(device))
        losses.append([batch.text.item() * len(image), batch.image.item() * len(image)])
    text_loss, image_loss = np.sum(losses, axis=0) / len(codes)
    total = model.transformer.settings.codes
    mse = float((decoded - pictures).square().mean())
    return {
        "tokenizer": {"mse": mse, **_code_figures(model, codes), "n": len(codes)},
        "held_out": {
            "image_loss": float(image_loss),
            "text_loss": float(text_loss),
            "unigram": unigram_loss(trained.reshape(-1, 1), codes.reshape(-1, 1), total),
            "unigram_by_position": unigram_loss(trained, codes, total),
            "n": len(codes),
        },
    }


def unigram_loss(training: Tensor, held_out: Tensor, codes: int) -> float:
    """Cross-entropy of ``held_out`` under how often each code occurs in the same column of ``training``.

    Args:
        training: ``(N, columns)`` int64 below ``codes``.
        held_out: ``(M, columns)`` int64 below ``codes``.
        codes: number of codes; every count is raised by one, so that a code never seen has a chance.

    Returns:
        Nats a token.

    Example:
        >>> round(unigram_loss(torch.tensor([[0], [0], [1]]), torch.tensor([[0]]), codes=2), 4)
        0.5108
    """
    counts = torch.ones(codes, training.shape[1], dtype=torch.float64)
    counts.scatter_add_(0, training, torch.ones(training.shape, dtype=torch.float64))
    return float(-(counts / counts.sum(0)).log().gather(0, held_out).mean())


def _share(jobs: Sequence[Callable[[], _T]], context: Context) -> list[_T]:
    """Do every job on one of the ranks and give all results to all of them."""
    mine = {i: jobs[i]() for i in range(context.rank, len(jobs), context.world_size)}
    found: list[dict[int, _T] | None] = [mine]
    if context.world_size > 1:
        found = [None] * context.world_size
        dist.all_gather_object(found, mine)
    together = {i: result for part in found for i, result in (part or {}).items()}
    return [together[i] for i in range(len(jobs))]


@torch.no_grad()
def _round_trip(model: Model, pictures: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens ``(n, G)`` of ``pictures`` and what they decode to, on the CPU."""
    device = model.transformer.start.device
    codes = [model.dvae.tokenize(part.to(device)) for part in pictures.split(_BATCH)]
    return torch.cat(codes).cpu(), torch.cat([model.dvae.decode(part).cpu() for part in codes])


def _code_figures(model: Model, codes: Tensor) -> dict[str, Any]:
    total = model.transformer.settings.codes
    share = torch.bincount(codes.flatten(), minlength=total).double() / codes.numel()
    used = share[share > 0]
    return {"codes_used": len(used), "perplexity": float((-(used * used.log()).sum()).exp()), "codes": total}
