"""Scores of a trained model: exact scores on the drawn task, losses against a baseline on pictures of a folder.

``evaluate`` adds what a run's own report has no time for: the evidence bound, how alike reconstructions are, and the
Frechet distance of samples to pictures.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from ..running.ranks import single_thread
from ..scenes.draw import Scenes, to_tensor, to_uint8
from . import pages, rerank, runs, tables
from .context import Context
from .data import opening
from .data.stream import StreamSource
from .features import Features, contrast_features, named_features
from .folder import FolderSource
from .grading import Score, attributes, evaluate_generation
from .measures import measure
from .metrics import unigram_loss
from .model import Model
from .report import best_of_lines, finite, framed, held_out_lines, score_lines
from .runs import Run
from .settings import InputError
from .stage1 import evaluate_tokenizer, usage

_T = TypeVar("_T")
SPLITS: tuple[str, ...] = ("s0", "s1", "s2")
_HELD_OUT_LIMIT = 4096
_SAMPLED = 512
"""Held-out captions of a folder that samples are drawn for, at most."""
_BATCH = 256
_SHOWN = 8
_PART = 50
"""Captions whose candidates are drawn and judged as one piece of work."""
_PICTURES = 1_000_000_009
"""A stage number, in the seeds of what is drawn, that no training batch has."""


@dataclass(frozen=True)
class Graded:
    """Samples of one split: the score over all, what about them is right, and the captions, verdicts and pictures."""

    score: Score
    attributes: Mapping[str, Score | None]
    captions: Sequence[tuple[str, bool]]
    pictures: np.ndarray


def evaluate(run: Run, device: str, out: Path, *, features: str | None = None) -> None:
    """Compute the scores of a run anew and print them, as a table and then as one line of JSON; write pictures.

    Args:
        run: a finished run.
        device: where to compute.
        out: folder of the pictures, which exists.
        features: ``package.module:factory`` of the network for the Frechet distance; ``None`` takes the run's
            contrastive model, if there is one.

    Raises:
        InputError: the run's files are damaged, or the features cannot be had.
    """
    single_thread()
    chosen = torch.device(device)
    model = Model.load(run, chosen)
    network = None
    if features is not None:
        network = named_features(features, model.dvae.settings.size, chosen)
    elif model.contrast is not None:
        network = contrast_features(model.contrast)
    figures, lines = (_on_scenes if run.kind == "demo" else _on_pictures)(run, model, network, out)
    print(framed(str(run.folder), [*lines, f"pictures: {out}"]))
    print(json.dumps(finite(figures)))


def _on_scenes(run: Run, model: Model, network: Features | None, out: Path) -> tuple[dict[str, Any], list[str]]:
    """Figures and lines of a run on the drawn task."""
    try:
        seed, n, task_seed = (int(run.settings[name]) for name in ("seed", "n", "task_seed"))
    except (KeyError, TypeError, ValueError):
        raise InputError(f"--run {run.folder}: its settings are damaged") from None
    task = Scenes(task_seed)
    context = Context(device=model.transformer.start.device, seed=seed)
    figures, samples = score_scenes(model, task, n=n, show=n, context=context)
    best, candidates = score_best_of(model, task, n=n, context=context)
    figures |= best
    real = {split: _fresh_pictures(task, split, n, seed) for split in SPLITS}
    figures["measures"] = {split: measure(model, *real[split], seed) for split in SPLITS}
    shown = {
        split: Graded(of.score, of.attributes, of.captions[:_SHOWN], of.pictures[:_SHOWN])
        for split, of in samples.items()
    }
    pages.draw_samples(out / "samples.png", figures, shown)
    pages.draw_reconstructions(
        out / "reconstructions.png", model, torch.cat([pictures for _, pictures in real.values()])
    )
    if candidates:
        pages.draw_choices(out / runs.CHOICES, figures["best_of"], candidates)
    lines = [*score_lines(figures), *best_of_lines(figures), "", tables.heading([split.upper() for split in SPLITS])]
    lines += tables.attribute_rows([figures["attributes"][split] for split in SPLITS])
    lines += tables.measure_rows([figures["measures"][split] for split in SPLITS])
    if network is not None and n > 1:
        pairs = {split: (to_tensor(of.pictures), real[split][1]) for split, of in samples.items()}
        others = {split: _fresh_pictures(task, split, n, seed, again=1)[1] for split in SPLITS}
        figures["frechet"] = _frechet(network, pairs, others)
        lines += _frechet_lines(figures["frechet"])
    return figures, lines


def _on_pictures(run: Run, model: Model, network: Features | None, out: Path) -> tuple[dict[str, Any], list[str]]:
    """Figures and lines of a run on the user's pictures."""
    source = opening.load(run.folder, size=model.dvae.settings.size, held_out=run.settings["data"]["held_out"])
    figures = score_folder(model, source, model.transformer.start.device)
    seed = int(run.settings["seed"])
    judged = source.held_out(_HELD_OUT_LIMIT)
    captions, pictures = judged.captions, judged.pictures
    figures["measures"] = {"held_out": measure(model, captions, pictures, seed)}
    pages.draw_held_out(out / "samples.png", model, judged, seed)
    pages.draw_reconstructions(out / "reconstructions.png", model, pictures)
    lines = [*held_out_lines(figures), "", tables.heading(["held out"])]
    lines += tables.measure_rows([figures["measures"]["held_out"]])
    if network is not None and len(pictures) > 3:
        some = slice(0, min(_SAMPLED, len(pictures) // 2))
        drawn = to_tensor(model.draw(captions[some], seed))
        others = pictures[len(pictures) - len(drawn) :]
        figures["frechet"] = _frechet(network, {"held_out": (drawn, pictures[some])}, {"held_out": others})
        lines += _frechet_lines(figures["frechet"])
    return figures, lines


def _fresh_pictures(task: Scenes, split: str, n: int, seed: int, again: int = 0) -> tuple[list[str], Tensor]:
    """Captions of a split with pictures of them, other ones for every ``again``."""
    rng = np.random.default_rng([seed, _PICTURES, SPLITS.index(split), again])
    drawn = task.test_captions(split, n, rng)
    return [caption for _, caption in drawn], to_tensor(task.render([triple for triple, _ in drawn], rng))


def _frechet(
    network: Features, pairs: Mapping[str, tuple[Tensor, Tensor]], others: Mapping[str, Tensor]
) -> dict[str, Any]:
    """Distances by split, of samples to pictures, and of these pictures to others: what can be reached."""
    splits = {
        split: {
            "distance": network.distance(drawn, real),
            "of_pictures": network.distance(others[split], real),
            "n": [len(drawn), len(real)],
        }
        for split, (drawn, real) in pairs.items()
    }
    return {"label": network.label, **splits}


def _frechet_lines(found: Mapping[str, Any]) -> list[str]:
    splits = [of for name, of in found.items() if name != "label"]
    return tables.frechet_rows(found["label"], [of["distance"] for of in splits], [of["of_pictures"] for of in splits])


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
        ``tokenizer``, ``s0``, ``s1``, ``s2``, ``control`` and ``attributes`` (of the samples of each split) for the
        report, and samples by split.
    """

    def sampled(split: str, shuffled: bool) -> Graded:
        score, captions, pictures, triples = evaluate_generation(
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
        shown = to_uint8(pictures)
        return Graded(score, attributes(shown, triples), captions[:show], shown[:show])

    jobs: list[Callable[[], Any]] = [lambda split=split: sampled(split, False) for split in SPLITS]
    jobs += [lambda: sampled("s0", True), lambda: evaluate_tokenizer(model.dvae, task, seed=context.seed)]
    *graded, control, tokenizer = _share(jobs, context)
    samples = dict(zip(SPLITS, graded, strict=True))
    tokenizer["codes"] = model.dvae.settings.codes
    scores = {name: asdict(found.score) for name, found in samples.items()}
    right = {
        name: {attribute: None if of is None else asdict(of) for attribute, of in found.attributes.items()}
        for name, found in samples.items()
    }
    return {"tokenizer": tokenizer, **scores, "control": asdict(control.score), "attributes": right}, samples


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
    """Score a model on held-out pictures of a folder.

    Returns:
        ``tokenizer``: ``mse`` of the reconstructions (pixels in [0, 1]), ``codes_used``, ``perplexity``, ``codes`` and
        ``n``. ``held_out``: mean ``image_loss`` and ``text_loss`` in nats a token, and what is reached by knowing
        nothing of captions or of other tokens: ``unigram``, the cross-entropy under how often each code occurs in
        training pictures, and ``unigram_by_position``, under how often it occurs at its place; ``unseen``: false
        where the pictures were trained on, because none are held out or none of those can be read.
    """
    judged = source.held_out(_HELD_OUT_LIMIT)
    captions, pictures = judged.captions, judged.pictures
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
    used, perplexity = usage(codes, total)
    return {
        "tokenizer": {"mse": mse, "codes_used": used, "perplexity": perplexity, "codes": total, "n": len(codes)},
        "held_out": {
            "image_loss": float(image_loss),
            "text_loss": float(text_loss),
            "unigram": unigram_loss(trained.reshape(-1, 1), codes.reshape(-1, 1), total),
            "unigram_by_position": unigram_loss(trained, codes, total),
            "n": len(codes),
            "unseen": judged.unseen,
        },
    }


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
