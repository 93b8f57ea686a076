"""Tensors that all ranks hold: copied to the bit at any number of ranks, and sent in few payloads."""

import pytest
import torch

from distopt.attach import replicas


class FirstOfMany:
    """The first of ``world_size`` ranks, whose companions send zeros."""

    def __init__(self, world_size):
        self.world_size = world_size
        self.sizes = []

    def average_(self, tensor):
        self.sizes.append(tensor.numel())
        return tensor.mul_(1.0 / self.world_size)


@pytest.mark.parametrize("worlds", [range(1, 100), (127, 1000, 4095, 16384)])
def test_every_byte_survives_the_copy(worlds):
    for world in worlds:
        tensor = torch.arange(256, dtype=torch.uint8).view(torch.float16).clone()
        before = tensor.clone()
        replicas.copy_from_first(FirstOfMany(world), {"all": tensor}, first=True)
        assert torch.equal(tensor.view(torch.uint8), before.view(torch.uint8)), world


def test_tensors_of_one_dtype_travel_together_up_to_the_limit(monkeypatch):
    monkeypatch.setattr(replicas, "PAYLOAD_BYTES", 40)
    tensors = {name: torch.ones(size) for name, size in {"a": 4, "b": 5, "c": 1, "d": 20, "e": 2}.items()}
    tensors |= {"f": torch.ones(2, dtype=torch.float64)}
    communicator = FirstOfMany(1)
    means = replicas.average(communicator, dict(tensors))
    assert communicator.sizes == [10, 20, 2, 2]
    assert means.keys() == tensors.keys()
    assert all(torch.equal(means[name], tensors[name]) for name in tensors)
