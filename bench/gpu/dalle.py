"""How fast DALL-E's transformer trains on a GPU, and in how much memory, by precision; and the demo as users run it."""

import importlib.util
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any
from unittest import mock

import torch

import distopt
from bench.gpu.clock import Clock
from bench.stamp import ROOT

PRECISIONS = ("fp32", "bf16", "fp16")
_SIZE = {"text_vocabulary": 16384, "text_length": 256, "codes": 8192, "grid": 32, "width": 1024, "layers": 12}
_TINY = {"text_vocabulary": 32, "text_length": 4, "codes": 16, "grid": 3, "width": 16, "layers": 1}
_HEADS, _BATCH, _CLIP, _LEARNING_RATE = 16, 8, 1.0, 3e-4
_DEMO_SECONDS = 300


def dalle(clock: Clock, out: Path, *, tiny: bool) -> Iterator[dict[str, Any]]:
    """Tokens a second and the most memory of a training step in each precision, then the demo on the device.

    Args:
        clock: on which device.
        out: where the demo's folder goes.
        tiny: a small transformer, and no demo.
    """
    _find_integration()
    for precision in PRECISIONS:
        record: dict[str, Any] = {"part": "dalle", "precision": precision, "who": "distopt"}
        try:
            yield {**record, **_trained(precision, clock, tiny)}
        except (RuntimeError, AssertionError, ImportError) as error:
            yield {**record, "error": f"{type(error).__name__}: {str(error).splitlines()[0]}"}
    if not tiny:
        yield {"part": "dalle", **_demo(clock.device.type, out)}


def _find_integration() -> None:
    """Find the integrations where distopt is not installed, and do without the library that splits texts."""
    if not (Path(distopt.__path__[0]) / "integrations").exists():
        distopt.__path__.append(str(ROOT))
    if importlib.util.find_spec("tokenizers") is None:
        for name in ("tokenizers", "tokenizers.models", "tokenizers.trainers"):
            sys.modules[name] = mock.MagicMock()


def _link(folder: Path) -> None:
    """Lay the package out in a folder as it is where it is installed, with its integrations inside."""
    (folder / "distopt").mkdir()
    for path in (ROOT / "distopt").iterdir():
        if path.name != "integrations":
            (folder / "distopt" / path.name).symlink_to(path)
    (folder / "distopt" / "integrations").symlink_to(ROOT / "integrations")


def _trained(precision: str, clock: Clock, tiny: bool) -> dict[str, Any]:
    from distopt.integrations.dalle.transformer import Transformer, TransformerSettings

    torch.manual_seed(0)
    heads, batch = (2, 2) if tiny else (_HEADS, _BATCH)
    settings = TransformerSettings(**(_TINY if tiny else _SIZE), heads=heads)
    model = Transformer(settings).to(clock.device)
    step = _step(model, settings, batch, precision, clock.device)
    before = step()
    found = clock.time(step)
    peak = clock.peak(step)
    if not step() < before:
        raise AssertionError("the loss does not fall")
    tokens = batch * (settings.text_length + settings.image_length)
    whole = None if peak is None else torch.cuda.max_memory_allocated()
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return {"ms": found.ms, "tokens_per_second": 1e3 * tokens / found.ms, "peak_bytes": whole, "parameters": parameters}


def _step(model: Any, settings: Any, batch: int, precision: str, device: torch.device) -> Callable[[], float]:
    """A step of stage 2 as the trainer takes it, with one learning rate."""
    from distopt.integrations.dalle.context import Context
    from distopt.integrations.dalle.precision import Stepper
    from distopt.integrations.dalle.stage2 import Stage2Settings, optimizer_of, scaler_of

    context = Context(device=device, precision=precision)
    options = Stage2Settings(learning_rate=_LEARNING_RATE)
    optimizer = optimizer_of(model, dict(model.named_parameters()), options, context)
    scaler = scaler_of(model, context)
    stepper = Stepper(model.parameters(), optimizer, scaler, _CLIP, 1_000_000, context)
    generator = torch.Generator().manual_seed(1)
    text = torch.randint(1, settings.text_vocabulary, (batch, settings.text_length), generator=generator).to(device)
    image = torch.randint(settings.codes, (batch, settings.image_length), generator=generator).to(device)
    counts: Mapping[str, int] = {"text": text.numel(), "image": image.numel()}
    windows = iter(distopt.accumulate(itertools.repeat((text, image)), model, steps=1, weight=lambda _: counts))

    def step() -> float:
        loss = 0.0
        window = next(windows)
        for words, codes in window:
            with stepper.products():
                losses = model(words, codes)
                sums = {"text": losses.text * counts["text"] / 8, "image": losses.image * counts["image"] * (7 / 8)}
                window.backward({kind: scaler.scale(part) for kind, part in sums.items()})
            loss = losses.total().item()
        stepper.step(_LEARNING_RATE)
        return loss

    return step


def _demo(device: str, out: Path) -> dict[str, Any]:
    """Run the demo as a user would; what it scores."""
    folder = out / "gpu-demo"
    command = [sys.executable, "-P", "-m", "distopt.integrations.dalle", "demo", "--device", device, "--ranks", "1"]
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as linked:
        _link(Path(linked))
        try:
            run = subprocess.run(
                [*command, "--fresh", "--out", str(folder)],
                cwd=linked,
                env={**os.environ, "PYTHONPATH": linked},
                capture_output=True,
                text=True,
                timeout=_DEMO_SECONDS,
            )
        except subprocess.TimeoutExpired:
            return {"demo": f"demo --device {device}: not over after {_DEMO_SECONDS} s"}
    if run.returncode != 0:
        last = (run.stderr.strip().splitlines() or ["nothing said"])[-1]
        return {"demo": f"demo --device {device}: exit code {run.returncode}: {last}"}
    report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    figures = ", ".join(f"{k} {v:.3g}" for k, v in report.items() if isinstance(v, float) and k != "wall_seconds")
    return {"demo": f"demo --device {device}: {time.monotonic() - began:.0f} s; {figures}"}
