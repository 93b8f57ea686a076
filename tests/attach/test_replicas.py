"""Tensors that all ranks hold: copied to the bit at any number of ranks, and sent in few payloads."""

import torch
import torch.distributed as dist

from distopt.attach import replicas
from distopt.comm.communicator import Communicator
from tests.processes import run_ranks


class FirstOfMany:
    """The first of ``world_size`` ranks, whose companions send zeros."""

    def __init__(self, world_size):
        self.world_size = world_size
        self.sizes = []

    def average_(self, tensor):
        self.sizes.append(tensor.numel())
        return tensor.mul_(1.0 / self.world_size)


def copy_job(rank):
    everything = torch.arange(65536, dtype=torch.int32).to(torch.uint16).view(torch.float16)  # every NaN among them
    tensors = {
        "half": everything.clone() if rank == 0 else torch.zeros(65536, dtype=torch.float16),
        "complex": torch.full((3,), complex(rank, -rank)),
        "count": torch.tensor(7 * (rank == 0)),
        "none": torch.empty(0, 4),
        "transposed": torch.full((5, 3), float(rank)).t(),
    }
    replicas.copy_from_first(Communicator(dist.group.WORLD), tensors)
    bits = torch.equal(tensors["half"].view(torch.uint8), everything.view(torch.uint8))
    return bits, not tensors["complex"].any(), int(tensors["count"]), not tensors["transposed"].any()


def test_every_bit_survives_the_copy():
    assert run_ranks(3, copy_job) == [(True, True, 7, True)] * 3


def test_tensors_of_one_dtype_travel_together_up_to_the_limit(monkeypatch):
    monkeypatch.setattr(replicas, "PAYLOAD_BYTES", 40)
    tensors = {name: torch.ones(size) for name, size in {"a": 4, "b": 5, "c": 1, "d": 20, "e": 2}.items()}
    tensors |= {"f": torch.ones(2, dtype=torch.float64)}
    communicator = FirstOfMany(1)
    means = replicas.average(communicator, dict(tensors))
    assert communicator.sizes == [10, 20, 2, 2]
    assert means.keys() == tensors.keys()
    assert all(torch.equal(means[name], tensors[name]) for name in tensors)
