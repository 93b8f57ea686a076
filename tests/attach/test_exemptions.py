"""What goes uncompressed is decided from the modules."""

import torch
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm
from torch.nn.utils.parametrize import register_parametrization

from distopt.attach.exemptions import exempt_names


class TheirRMSNorm(nn.Module):
    def __init__(self):
        super().__init__()
        self.gain = nn.Parameter(torch.ones(4, 4))


class PatchEmbedding(nn.Module):
    def __init__(self):
        super().__init__()
        self.position = nn.Parameter(torch.zeros(9, 8))
        self.project = nn.Linear(8, 8)


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(20, 8)
        self.bags = nn.EmbeddingBag(20, 8)
        self.patches = PatchEmbedding()
        self.norm = nn.LayerNorm((4, 8))
        self.theirs = TheirRMSNorm()
        self.batch = nn.BatchNorm2d(8)
        self.mix = nn.Linear(8, 8)
        self.conv = nn.Conv2d(8, 8, 3)
        self.depthwise = nn.Conv1d(8, 8, 1, groups=8)
        self.bare = nn.Parameter(torch.zeros(8, 8))
        self.tied = nn.Linear(8, 20, bias=False)
        self.tied.weight = self.words.weight
        self.lm_head = nn.Linear(8, 20)
        self.image_unembed = nn.Linear(8, 20)


def test_everything_but_matrices_is_exempt():
    model = Model()
    compressed = {name for name, _ in model.named_parameters()} - exempt_names(model)
    assert compressed == {"patches.project.weight", "mix.weight", "conv.weight", "bare"}


class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.by = nn.Linear(8, 8, bias=False)

    def forward(self, weight):
        return self.by(weight)


def test_a_parametrised_embedding_is_one():
    model = nn.ModuleDict({"words": nn.Embedding(20, 8), "mix": nn.Linear(8, 8, bias=False)})
    for module in model.values():
        spectral_norm(module)
    register_parametrization(model["words"], "weight", Scaled())
    compressed = {name for name, _ in model.named_parameters()} - exempt_names(model)
    assert compressed == {"mix.parametrizations.weight.original", "words.parametrizations.weight.1.by.weight"}
