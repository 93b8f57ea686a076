"""A trained model as one thing: both networks, the text tokenizer and how to sample; saved to and loaded from a run."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save
from torch import nn

from ..scenes.draw import to_tensor, to_uint8
from . import architectures, runs
from .contrast import Contrast, ContrastSettings
from .grading import generate
from .sampling import SamplingSettings
from .settings import InputError
from .text import Tokenizer
from .transformer import Transformer, TransformerSettings


@dataclass(frozen=True, kw_only=True)
class Model:
    """Everything that turns a caption into a picture; all networks in eval mode, on one device.

    ``contrast`` chooses among samples; runs without it cannot choose.
    """

    dvae: architectures.AnyDVAE
    transformer: Transformer
    tokenizer: Tokenizer
    sampling: SamplingSettings
    contrast: Contrast | None = None

    def draw(self, captions: Sequence[str], seed: int, top: torch.Tensor | None = None) -> np.ndarray:
        """Draw one free sample for each caption.

        Args:
            captions: any texts; what the tokenizer never saw is unknown to it.
            seed: decides the samples.
            top: ``(n,)`` int64, the first n codes of every picture, in raster order; ``None`` draws all codes.

        Returns:
            uint8 ``(len(captions), size, size, 3)``.
        """
        generator = torch.Generator(self.transformer.start.device).manual_seed(seed)
        networks = (self.transformer, self.dvae, self.tokenizer)
        return to_uint8(generate(*networks, captions, self.sampling, generator, prompt=top))

    def draw_best(self, caption: str, seed: int, top: torch.Tensor | None = None, *, n: int, of: int) -> np.ndarray:
        """Draw ``n`` times ``of`` samples for a caption and keep the ``n`` that fit it best, the best one first.

        Args:
            caption: any text.
            seed: decides the samples.
            top: see ``draw``.
            n: pictures to keep.
            of: pictures to draw for each of them.

        Returns:
            uint8 ``(n, size, size, 3)``.

        Raises:
            InputError: the run has no contrastive model.
        """
        if self.contrast is None:
            raise InputError("--best-of: the run has no contrastive model, which would choose")
        drawn = self.draw([caption] * (n * of), seed, top)
        text = self.tokenizer.encode([caption], self.contrast.settings.text_length)
        device = self.transformer.start.device
        parts = to_tensor(drawn).unsqueeze(0).split(256, dim=1)
        scores = torch.cat([self.contrast.scores(some.to(device), text.to(device))[0] for some in parts])
        return drawn[scores.argsort(descending=True, stable=True)[:n].cpu().numpy()]

    def save(self, folder: Path, kind: str, more: Mapping[str, Any]) -> None:
        """Write the model into a run's folder; the settings come last and make it a finished run.

        Args:
            folder: must exist.
            kind: "demo" or "folder".
            more: further settings to keep, ready for JSON.
        """
        # Through our own file: the library's would be readable by its owner alone.
        (folder / runs.DVAE).write_bytes(save(_tensors(self.dvae)))
        (folder / runs.TRANSFORMER).write_bytes(save(_tensors(self.transformer)))
        self.tokenizer.save(folder / runs.TOKENIZER)
        (folder / runs.CONTRAST).unlink(missing_ok=True)
        if self.contrast is not None:
            (folder / runs.CONTRAST).write_bytes(save(_tensors(self.contrast)))
            more = {"contrast": dataclasses.asdict(self.contrast.settings), **more}
        settings = {
            "format": runs.FORMAT,
            "kind": kind,
            "dvae": architectures.to_table(self.dvae.settings),
            "transformer": dataclasses.asdict(self.transformer.settings),
            "sampling": dataclasses.asdict(self.sampling),
            **more,
        }
        runs.write_json(folder / runs.SETTINGS, settings)

    @classmethod
    def load(cls, run: runs.Run, device: torch.device) -> "Model":
        """Read the model of a finished run.

        Raises:
            InputError: a file is damaged, or does not belong to the settings.
        """
        try:
            dvae = architectures.build(architectures.from_table(run.settings["dvae"]))
            dvae.load_state_dict(load_file(run.folder / runs.DVAE))
            transformer = Transformer(TransformerSettings(**run.settings["transformer"]))
            transformer.load_state_dict(load_file(run.folder / runs.TRANSFORMER))
            tokenizer = Tokenizer.load(run.folder / runs.TOKENIZER)
            sampling = SamplingSettings(**run.settings["sampling"])
            contrast = None
            if "contrast" in run.settings:
                contrast = Contrast(ContrastSettings(**run.settings["contrast"]))
                contrast.load_state_dict(load_file(run.folder / runs.CONTRAST))
        # The tokenizer's library raises bare exceptions for files that it cannot read.
        except Exception as error:
            first = str(error).strip().split("\n")[0]
            raise InputError(f"--run {run.folder}: the model cannot be read: {first}") from error
        return cls(
            dvae=dvae.to(device).eval(),
            transformer=transformer.to(device).eval(),
            tokenizer=tokenizer,
            sampling=sampling,
            contrast=None if contrast is None else contrast.to(device).eval(),
        )


def _tensors(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in module.state_dict().items()}
