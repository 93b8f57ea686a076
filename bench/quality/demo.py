"""Stage 2 of the DALL-E demo, with the tokenizer of the model that comes with the package: one run on one rank."""

import dataclasses

import numpy as np
import torch
from distopt.integrations.dalle import runs
from distopt.integrations.dalle.context import Context
from distopt.integrations.dalle.model import Model
from distopt.integrations.dalle.stage2 import Stage2Settings, train_transformer
from distopt.integrations.scenes.draw import Scenes

from bench.quality.case import WORLD, Case, Outcome

HELD_OUT = 512
"""Captions with pictures, always the same; a training run draws its own anew at every step."""
_SEED_OF_HELD_OUT = 10**9


def settings_of(run: runs.Run, steps: int) -> Stage2Settings:
    """How the demo trains its stage 2, in so many steps."""
    table = run.settings["training"]["stage2"]
    whole = Stage2Settings(**{name: tuple(v) if isinstance(v, list) else v for name, v in table.items()})
    return dataclasses.replace(whole, steps=steps)


def train(rank: int, case: Case) -> Outcome:
    """One run on this rank. Collective."""
    run = runs.open_run(runs.BUNDLED)
    model = Model.load(run, torch.device("cpu"))
    task = Scenes(int(run.settings["task_seed"]))
    reducer = case.way.reducer(case.steps, None if case.precision == "fp32" else "1-6-9")
    context = Context(rank=rank, world_size=WORLD, seed=case.seed, reducer=reducer, precision=case.precision)
    size = model.transformer.settings
    result = train_transformer(task, model.dvae, model.tokenizer, size, settings_of(run, case.steps), context)
    captions, pictures = task.pairs(HELD_OUT, np.random.default_rng(_SEED_OF_HELD_OUT))
    with torch.no_grad():
        image = model.dvae.tokenize(pictures)
        held_out = result.model(model.tokenizer.encode(captions, size.text_length), image).total().item()
    saving = 0.0 if result.stats is None else result.stats.saving
    return Outcome([loss for _, loss in result.curve], held_out, saving, result.skipped_steps)
