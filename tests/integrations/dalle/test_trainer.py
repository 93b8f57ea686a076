"""The trainer: the same run on any number of ranks."""

import dataclasses

import numpy as np
import pytest
import torch
from distopt.integrations.dalle.context import Context
from distopt.integrations.dalle.dvae import DVAE, DVAESettings
from distopt.integrations.dalle.stage1 import train_dvae
from distopt.integrations.dalle.stage1_settings import Stage1Settings
from distopt.integrations.dalle.stage2 import Stage2Settings, train_transformer
from distopt.integrations.dalle.text import Tokenizer
from distopt.integrations.dalle.transformer import TransformerSettings
from distopt.integrations.scenes.draw import Scenes

import distopt
from distopt.errors import SettingError
from tests.processes import run_ranks


class Wide(Scenes):
    """The drawn task in float64."""

    def pictures(self, n, rng):
        return super().pictures(n, rng).double()

    def pairs(self, n, rng):
        captions, pictures = super().pairs(n, rng)
        return captions, pictures.double()


TASK = Wide()
TOKENIZER = Tokenizer.train(TASK.captions(), 64)
DVAE_SETTINGS = DVAESettings(codes=16, width=16, neck=8)
TRANSFORMER = TransformerSettings(
    text_vocabulary=TOKENIZER.vocabulary, text_length=16, codes=16, grid=6, width=16, layers=1, heads=2, code_width=8
)
# The push towards equal use looks at the codes of a rank's own part of the batch: it alone depends on the ranks.
STAGE1 = Stage1Settings(steps=20, batch=12, start=16, usage=0.0)
STAGE2 = Stage2Settings(steps=20, batch=12)


def both_stages(rank, ranks):
    """The weights that both stages end with in float64, the same tokenizer under the second."""
    torch.set_default_dtype(torch.float64)
    context = Context(rank=rank, world_size=ranks, reducer=distopt.PowerSGD(rank=2))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        dvae = DVAE(DVAE_SETTINGS).eval()
    first = train_dvae(TASK, DVAE_SETTINGS, STAGE1, context)
    second = train_transformer(TASK, dvae, TOKENIZER, TRANSFORMER, STAGE2, context)
    return [torch.cat([p.flatten() for p in result.model.parameters()]).numpy() for result in (first, second)]


def test_any_number_of_ranks_trains_alike_up_to_rounding():
    alone, *others = (run_ranks(ranks, both_stages, ranks)[0] for ranks in (1, 2, 3))
    for other in others:
        for ours, theirs in zip(alone, other, strict=True):
            assert ours.dtype == np.float64
            assert abs(ours - theirs).max() < 1e-9


class Watching:
    """A journal that looks at pictures."""

    def __init__(self):
        self.seen = []

    def log(self, step, total, values):
        pass

    def show(self, step, values, pictures):
        self.seen.append((step, dict(values), {name: each.shape for name, each in pictures.items()}))


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_looking_changes_nothing(precision):
    task, journal = Scenes(), Watching()
    torch.manual_seed(0)
    dvae = DVAE(DVAE_SETTINGS).eval()
    how = {"steps": 5, "batch": 8}

    def both(**looking):
        context = Context(precision=precision, **looking)
        first = train_dvae(task, DVAE_SETTINGS, Stage1Settings(**how, start=16), context)
        second = train_transformer(task, dvae, TOKENIZER, TRANSFORMER, Stage2Settings(**how), context)
        return [first.model.state_dict(), second.model.state_dict()]

    state = torch.get_rng_state()
    for blind, seeing in zip(both(), both(journal=journal, pictures_every=2), strict=True):
        assert all(torch.equal(blind[name], seeing[name]) for name in blind)
    assert torch.equal(torch.get_rng_state(), state)
    assert [step for step, *_ in journal.seen] == [2, 4, 5] * 2
    assert journal.seen[0][1].keys() == {"codes/used", "codes/perplexity"}
    assert 1 <= journal.seen[0][1]["codes/perplexity"] <= journal.seen[0][1]["codes/used"] <= 16
    assert journal.seen[0][2] == {"reconstructions": (16, 3, 24, 24)}
    assert journal.seen[-1][2] == {"samples": (16, 3, 24, 24)}


@pytest.mark.parametrize("parts", [2, 3, 12])
def test_micro_batches_are_the_batch(parts):
    """In float64; the push towards equal use, which looks at a micro-batch, is off."""
    torch.set_default_dtype(torch.float64)
    try:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            dvae = DVAE(DVAE_SETTINGS).eval()
        ends = []
        for accumulate in (1, parts):
            first, second = (dataclasses.replace(how, steps=6, accumulate=accumulate) for how in (STAGE1, STAGE2))
            one = train_dvae(TASK, DVAE_SETTINGS, first, Context())
            two = train_transformer(TASK, dvae, TOKENIZER, TRANSFORMER, second, Context())
            ends.append([one, two])
    finally:
        torch.set_default_dtype(torch.float32)
    for whole, cut in zip(*ends, strict=True):
        for a, b in zip(whole.model.parameters(), cut.model.parameters(), strict=True):
            torch.testing.assert_close(a, b, atol=1e-10, rtol=0)
        assert [loss for _, loss in whole.curve] == pytest.approx([loss for _, loss in cut.curve], abs=1e-10)


def test_a_batch_that_cannot_be_cut_is_refused():
    with pytest.raises(
        SettingError, match=r"Stage1Settings.batch is 12, but must be .* 2 ranks and their 4 micro-batch"
    ):
        train_dvae(Scenes(), DVAE_SETTINGS, dataclasses.replace(STAGE1, accumulate=4), Context(world_size=2))
