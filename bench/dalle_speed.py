"""How fast stage 2 of DALL-E trains and samples, by mask and size, beside the same step in plain PyTorch.

    python -m bench.dalle_speed
    python -m bench.dalle_speed --sizes demo --rounds 40

One process, one thread, processor time. All that is compared takes one step in turn, and so on for many rounds; given
are the median time, and the median and the quartiles of its ratio to the plain step of the same round. Plain is
`bench.plain_dalle`: no distopt, every mask dense. Before anything is timed both are given the same weights, and must
have the same losses over some steps and draw the same codes.

Training:

- ``plain``, and ``distopt``: the transformer, its optimizer, windows and stepper in a process alone, as ``train`` has
  them;
- ``plain DDP``, and ``distopt DDP``: both inside DistributedDataParallel over one rank, ours with ``distopt.register``
  and exact averaging; its ratio is to plain DDP. PowerSGD as a third compresses, too, what one rank need not send;
- ``distopt dense``: under the paper's masks, without gathering the keys.

Sampling: ours and the plain one with keys and values kept; ours without, from the passes for every eighth slot.
"""

import argparse
import dataclasses
import itertools
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from distopt.integrations.dalle import sparse_attention
from distopt.integrations.dalle.attention import stream_mask
from distopt.integrations.dalle.context import Context
from distopt.integrations.dalle.precision import LossScaler, Stepper
from distopt.integrations.dalle.sampling import sample
from distopt.integrations.dalle.stage2 import Stage2Settings, optimizer_of
from distopt.integrations.dalle.text import PAD
from distopt.integrations.dalle.transformer import Transformer, TransformerSettings
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel as DDP

import distopt
from bench.plain_dalle import PlainDalle, plain_optimizer, plain_step
from bench.stamp import markdown, write_lines

CLIP, LEARNING_RATE, RANK = 1.0, 1e-3, 6
SKIPPED = 2
"""Rounds that are not counted: the first make the optimizers' state."""
EVERY = 8


@dataclasses.dataclass(frozen=True)
class Size:
    """A transformer and its batches."""

    settings: dict[str, int]
    batch: int
    samples: int


SIZES = {
    "demo": Size({"text_vocabulary": 256, "text_length": 16, "codes": 192, "grid": 6}, 16, 64),
    "16": Size({"text_vocabulary": 1024, "text_length": 32, "codes": 512, "grid": 16, "width": 256, "layers": 4}, 4, 8),
    "32": Size(
        {"text_vocabulary": 1024, "text_length": 64, "codes": 1024, "grid": 32, "width": 256, "layers": 4}, 1, 2
    ),
}
"""The demo's transformer, and two that are larger; the heads are four."""

Batch = tuple[Tensor, Tensor]
Step = Callable[[], float]


def main() -> None:
    """Read the command line, measure, and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--masks", nargs="+", choices=("full", "paper"), default=["full", "paper"])
    parser.add_argument("--rounds", type=int, default=30, help="of training; sampling takes a tenth of them")
    parser.add_argument("--out", type=Path, default=Path("runs/bench"))
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    records: list[dict[str, Any]] = []
    for name in chosen.sizes:
        for attention in chosen.masks:
            case = Case(name, attention)
            case.check()
            records += [{"what": "training", **record} for record in case.training(chosen.rounds)]
            records += [{"what": "sampling", **record} for record in case.sampling(max(3, chosen.rounds // 10))]
            print(*records[-9:], sep="\n", flush=True)
    dist.destroy_process_group()
    write_lines(chosen.out / "dalle_speed.jsonl", "dalle_speed", records)
    table = "\n\n".join(f"{mark}\n\n{text}" for mark, text in tables(records).items())
    (chosen.out / "dalle_speed.md").write_text(table + "\n", encoding="utf-8")
    print("\n" + table)


def tables(records: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Both tables, by their marks."""
    return {f"dalle-{what}": _table(records, what) for what in ("training", "sampling")}


class Case:
    """One size under one mask: the models, all with the same weights, and what they are fed."""

    def __init__(self, name: str, attention: str) -> None:
        self.size, self.name, self.attention = SIZES[name], name, attention
        self.settings = TransformerSettings(**self.size.settings, attention=attention)
        torch.manual_seed(0)
        with torch.no_grad():
            self.weights = Transformer(self.settings).state_dict()
        generator = torch.Generator().manual_seed(1)
        self.text = torch.randint(self.settings.text_vocabulary, self._shape("text_length"), generator=generator)
        self.image = torch.randint(self.settings.codes, self._shape("image_length"), generator=generator)

    def _shape(self, length: str) -> tuple[int, int]:
        return max(self.size.batch, self.size.samples), getattr(self.settings, length)

    def ours(self) -> Transformer:
        """Our transformer."""
        model = Transformer(self.settings)
        model.load_state_dict(self.weights)
        return model

    def plain(self) -> PlainDalle:
        """The plain one, with the same weights."""
        chosen = self.settings
        patterns = [block.pattern for block in self.ours().blocks]
        model = PlainDalle(
            words=chosen.text_vocabulary,
            text=chosen.text_length,
            codes=chosen.codes,
            grid=chosen.grid,
            width=chosen.width,
            heads=chosen.heads,
            masks=[None if p.kind == "full" else stream_mask(p, torch.device("cpu")) for p in patterns],
        )
        model.load_state_dict(self.weights)
        return model

    def check(self) -> None:
        """Both compute the same: losses over some steps, and samples."""
        ours, plain = _our_step(self.ours(), self._batch()), _plain_step(self.plain(), self._batch())
        for _ in range(3):
            pair = [step() for step in (ours, plain)]
            if abs(pair[0] - pair[1]) > 2e-3 * abs(pair[1]):
                raise AssertionError(f"{self.name}, {self.attention}: the losses are {pair}")
        text = self.text[: self.size.samples]
        drawn = sample(self.ours().eval(), text, generator=_generator())
        same = (drawn == self.plain().eval().sample(text, _generator())).float().mean().item()
        if same < 0.9:  # a draw that falls on an edge of two codes may differ, and what follows then does
            raise AssertionError(f"{self.name}, {self.attention}: {same:.0%} of the codes are the same")

    def _batch(self) -> Batch:
        return self.text[: self.size.batch], self.image[: self.size.batch]

    def training(self, rounds: int) -> list[dict[str, Any]]:
        """Time one step of everything, in turn."""
        batch = self._batch()
        jobs = {
            "plain": _plain_step(self.plain(), batch),
            "distopt": _our_step(self.ours(), batch),
            "plain DDP": _plain_step(DDP(self.plain()), batch),
            "distopt DDP": _our_step(self.ours(), batch, distopt.AllReduce()),
            "distopt DDP, PowerSGD": _our_step(self.ours(), batch, distopt.PowerSGD(RANK)),
        }
        if self.attention == "paper":
            jobs["distopt dense"] = _densely(_our_step(self.ours(), batch))
        seconds = _in_turn(jobs, rounds)
        base = {name: seconds["plain DDP" if "DDP" in name else "plain"] for name in jobs}
        return [self._record(name, times, base[name], self.size.batch) for name, times in seconds.items()]

    def sampling(self, rounds: int) -> list[dict[str, Any]]:
        """Time the drawing of one batch by everything, in turn."""
        ours, plain, text = self.ours().eval(), self.plain().eval(), self.text[: self.size.samples]
        jobs: dict[str, Callable[[], Any]] = {
            "plain, cache": lambda: plain.sample(text, _generator()),
            "distopt, cache": lambda: sample(ours, text, generator=_generator()),
            "distopt, no cache": lambda: _passes(ours, text, self.image[: self.size.samples]),
        }
        seconds = _in_turn(jobs, rounds)
        seconds["distopt, no cache"] = [EVERY * each for each in seconds["distopt, no cache"]]
        base = seconds["plain, cache"]
        return [self._record(name, times, base, self.size.samples) for name, times in seconds.items()]

    def _record(self, name: str, times: list[float], base: list[float], pictures: int) -> dict[str, Any]:
        ratios = [time / other for time, other in zip(times, base, strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        return {
            "size": self.name,
            "mask": self.attention,
            "who": name,
            "rounds": len(times),
            "pictures": pictures,
            "seconds": statistics.median(times),
            "least_seconds": min(times),
            "pictures_per_second": pictures / statistics.median(times),
            "ratio": middle,
            "ratio_low": low,
            "ratio_high": high,
        }


def _our_step(model: Transformer, batch: Batch, reducer: Any = None) -> Step:
    """A step of stage 2 as the trainer takes it, with one learning rate."""
    context = Context()
    optimizer = optimizer_of(
        model, dict(model.named_parameters()), Stage2Settings(learning_rate=LEARNING_RATE), context
    )
    stepper = Stepper(model.parameters(), optimizer, LossScaler("cpu", enabled=False), CLIP, 1_000_000, context)
    trained = model if reducer is None else DDP(model)
    if reducer is not None:
        distopt.register(trained, reducer)
    counts = {"text": int((batch[0] != PAD).sum()), "image": batch[1].numel()}
    windows = iter(distopt.accumulate(itertools.repeat(batch), trained, steps=1, weight=lambda _: counts))

    def step() -> float:
        total = 0.0
        window = next(windows)
        for text, image in window:
            with stepper.products():
                losses = trained(text, image)
                sums = {"text": losses.text * counts["text"] / 8, "image": losses.image * counts["image"] * (7 / 8)}
                window.backward(sums)
            total = losses.total().item()
        stepper.step(LEARNING_RATE)
        return total

    return step


def _plain_step(model: nn.Module, batch: Batch) -> Step:
    optimizer = plain_optimizer(model, LEARNING_RATE)
    return lambda: plain_step(model, optimizer, *batch, LEARNING_RATE, CLIP)


def _densely(step: Step) -> Step:
    def dense() -> float:
        with mock.patch.object(sparse_attention, "attend_gathered", sparse_attention.attend_densely):
            return step()

    return dense


@torch.no_grad()
def _passes(model: Transformer, text: Tensor, image: Tensor) -> None:
    """A pass over all that is known, for every eighth slot."""
    for slot in range(EVERY // 2, image.shape[1], EVERY):
        x = torch.cat([model.embed_text(text), model.embed_image(image[:, :slot], slice(0, slot + 1))], dim=1)
        model.image_logits(model.hidden(x)[:, -1]).softmax(-1).multinomial(1)


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(2)


def _in_turn(jobs: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Processor seconds of every job in every round; the order turns, so that none always follows the same other."""
    names = list(jobs)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(rounds + SKIPPED):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            began = time.process_time()
            jobs[name]()
            if turn >= SKIPPED:
                seconds[name].append(time.process_time() - began)
    return seconds


def _table(records: Sequence[Mapping[str, Any]], what: str) -> str:
    rows = [
        [
            r["size"],
            r["mask"],
            r["who"],
            f"{1e3 * r['seconds'] / r['pictures']:.2f}",
            f"{r['pictures_per_second']:.1f}",
            f"{r['ratio']:.3f} ({r['ratio_low']:.3f} to {r['ratio_high']:.3f})",
        ]
        for r in records
        if r["what"] == what
    ]
    head = ["size", "mask", "", "CPU ms a picture", "pictures a CPU second", "of plain (quartiles)"]
    return markdown(head, rows)


if __name__ == "__main__":
    main()
