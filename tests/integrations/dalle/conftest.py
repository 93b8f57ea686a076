"""A model that is too small to have learned anything, for tests of what is done with models."""

import pytest
import torch
from distopt.integrations.dalle.dvae import DVAE, DVAESettings
from distopt.integrations.dalle.model import Model
from distopt.integrations.dalle.sampling import SamplingSettings
from distopt.integrations.dalle.text import Tokenizer
from distopt.integrations.dalle.transformer import Transformer, TransformerSettings


@pytest.fixture
def tiny_model():
    """Untrained, 16 codes, pictures of 24 x 24 and captions of the drawn task."""
    torch.manual_seed(0)
    dvae = DVAE(DVAESettings(codes=16, width=8, neck=4))
    tokenizer = Tokenizer.train(["a red circle above a blue square"], 64)
    settings = TransformerSettings(
        text_vocabulary=tokenizer.vocabulary,
        text_length=16,
        codes=16,
        grid=6,
        width=8,
        layers=1,
        heads=1,
        code_width=8,
    )
    transformer = Transformer(settings, dvae.codebook())
    return Model(
        dvae=dvae.eval(),
        transformer=transformer.eval(),
        tokenizer=tokenizer,
        sampling=SamplingSettings(temperature=0.9),
    )
