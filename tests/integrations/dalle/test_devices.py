"""The networks on a device that is not the CPU, without one: the meta device, whose tensors have no numbers.

Operations that mix its tensors with a CPU's raise, as they would on a GPU.
"""

import pytest
import torch
from distopt.integrations.dalle.contrast import Contrast, ContrastSettings
from distopt.integrations.dalle.dvae import DVAE, DVAESettings
from distopt.integrations.dalle.transformer import Transformer, TransformerSettings
from torch import nn

DEVICE = torch.device("meta")
SHAPE = {"text_vocabulary": 9, "text_length": 4, "codes": 8, "grid": 4, "width": 16, "heads": 2, "kernel": 3}


def made(make, *args):
    """A module whose parameters have gone to the device; its other tensors stay where they are."""
    model = make(*args)
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            setattr(module, name, nn.Parameter(parameter.detach().to(DEVICE), parameter.requires_grad))
    return model


@pytest.mark.parametrize("attention", ["full", "paper"])
def test_the_transformer(attention):
    settings = TransformerSettings(**SHAPE, layers=4, attention=attention)
    model = made(Transformer, settings)
    assert model._sources.device.type == "cpu"
    text, image = (torch.zeros(2, length, dtype=torch.int64, device=DEVICE) for length in (4, 16))
    assert model(text, image).total().device == DEVICE
    assert model._sources.device == DEVICE


def test_the_dvae():
    model = made(DVAE, DVAESettings(size=8, grid=2, codes=16))
    pictures, noise = torch.zeros(2, 3, 8, 8, device=DEVICE), torch.zeros(2, 16, 2, 2, device=DEVICE)
    assert model(pictures, tau=1.0, beta=1.0, usage=0.1, edges=2.0, noise=noise).total.device == DEVICE
    assert model.decode(model.tokenize(pictures)).device == DEVICE


def test_the_contrastive_model():
    model = made(Contrast, ContrastSettings(text_vocabulary=9, text_length=4, size=24))
    pictures = torch.zeros(2, 3, 3, 24, 24, device=DEVICE)
    text = torch.zeros(2, 3, 4, dtype=torch.int64, device=DEVICE)
    assert model(pictures, text, pictures[:, :1]).total.device == DEVICE


def test_a_cpu_s_tensor_is_noticed():
    """Or the tests above would show nothing."""
    model = made(nn.Linear, 3, 3)
    with pytest.raises(RuntimeError, match="device"):
        model(torch.zeros(2, 3))
