"""The trainer: the same run on any number of ranks."""

import numpy as np
import torch
from distopt.integrations.dalle.context import Context
from distopt.integrations.dalle.dvae import DVAE, DVAESettings
from distopt.integrations.dalle.scenes import Scenes
from distopt.integrations.dalle.stage1 import Stage1Settings, train_dvae
from distopt.integrations.dalle.stage2 import Stage2Settings, train_transformer
from distopt.integrations.dalle.text import Tokenizer
from distopt.integrations.dalle.transformer import TransformerSettings

import distopt
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
