"""Branches are found however they are named, and what cannot work is refused."""

import pytest
import torch
from torch import nn

from distopt.errors import SettingError
from distopt.scaling.branches import find_branches


class Layer(nn.Module):
    """A layer of a transformer, as far as names go."""

    def __init__(self):
        super().__init__()
        self.norm, self.attention, self.mlp = nn.LayerNorm(2), nn.Linear(2, 2), nn.Linear(2, 2)


class Model(nn.Module):
    """An embedding and two layers."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(5, 2)
        self.layers = nn.ModuleList([Layer(), Layer()])


EXPECTED = ["layers.0.attention", "layers.0.mlp", "layers.1.attention", "layers.1.mlp"]


def names(blocks, model=None):
    return [branch.name for branch in find_branches(blocks, model)]


@pytest.mark.parametrize(
    "blocks",
    [
        ["*.attention", "*.mlp"],
        "layers.*.[am]*",
        lambda model: [part for layer in model.layers for part in (layer.attention, layer.mlp)],
        lambda model: (pair for pair in model.named_modules() if pair[0].endswith(("attention", "mlp"))),
        lambda model: "layers.?.[am]*",
    ],
)
def test_in_a_model(blocks):
    model = Model()
    assert names(blocks, model) == EXPECTED
    assert names(blocks, torch.compile(model, backend="eager")) == EXPECTED


def test_the_outermost_of_what_a_pattern_matches():
    assert names("layers.*", Model()) == ["layers.0", "layers.1"]
    assert names(["layers.0.mlp", "layers.1"], Model()) == ["layers.0.mlp", "layers.1"]


def test_without_a_model():
    model = Model()
    first, second = model.layers
    assert names([first.mlp, second.mlp]) == ["0", "1"]
    assert names(nn.ModuleList([first.mlp, second.mlp])) == ["0", "1"]
    assert names({"a": first.mlp, "b": (second.norm, second.mlp)}) == ["a", "b"]
    assert names(nn.ModuleDict({"a": first.mlp})) == ["a"]
    assert names([("a", first.mlp), (second.norm, second.mlp)]) == ["a", "1"]
    assert names([first.mlp], model) == ["layers.0.mlp"]
    assert names([(first.norm, first.mlp)], model) == ["layers.0.mlp"]
    (branch,) = find_branches({"a": (first.norm, first.mlp)})
    assert list(branch.parameters()) == ["a[0].weight", "a[0].bias", "a[1].weight", "a[1].bias"]


def tied():
    model = Model()
    model.layers[1].mlp.weight = model.layers[0].mlp.weight
    return model


def tied_outside():
    model = Model()
    model.layers[1].norm.weight = model.layers[0].mlp.bias
    return model


@pytest.mark.parametrize(
    ("blocks", "model", "message"),
    [
        ([], None, "blocks is [], but must be something that is not empty"),
        (Model(), None, "blocks is 'Model', but must be its parts: modules"),
        (3, None, "blocks is 3, but must be modules"),
        ([3], None, "blocks[0] is 3, but must be modules"),
        ({"a": 3}, None, "blocks['a'] is 3, but must be modules"),
        ({"a": ()}, None, "blocks['a'] is (), but must be modules"),
        ("*.mlp", None, "blocks is '*.mlp', but must be given together with model="),
        (len, None, "given together with model="),
        (["*.mlp", "*.nothing"], Model(), "blocks is '*.nothing', but must be a pattern that matches"),
        ([("a", nn.Linear(2, 2)), ("a", nn.Linear(2, 2))], None, "blocks is 'a', but must be named once"),
        ("*.mlp", tied(), "blocks is 'layers.1.mlp.weight', but must be in one branch only: layers.0.mlp has it too"),
        (lambda model: [model.layers[0], model.layers[0].mlp], Model(), "in one branch only: layers.0 has it too"),
        ("*.mlp", tied_outside(), "blocks is 'layers.0.mlp', but must be without the parameter that is also"),
        ([nn.Linear(2, 2), nn.Linear(2, 2, device="meta")], None, "blocks is 'cpu, meta', but must be on one device"),
    ],
)
def test_what_cannot_work_is_refused(blocks, model, message):
    with pytest.raises(SettingError) as caught:
        find_branches(blocks, model)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value).replace(repr(blocks), "")
