"""Models and loops for the tests with real processes."""

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP


def mlp(layers=5, width=48, dtype=torch.float32):
    """The same weights on every rank."""
    torch.manual_seed(0)
    return nn.Sequential(*[nn.Linear(width, width) for _ in range(layers)]).to(dtype)


def wrap(model, bucket_kib=12, **options):
    """DDP with buckets small enough to have several."""
    return DDP(model, bucket_cap_mb=bucket_kib / 1024, **options)


def batch(rank, step, width=48, dtype=torch.float32, rows=8):
    """This rank's input at a step."""
    generator = torch.Generator().manual_seed(1000 * rank + step)
    return torch.randn(rows, width, generator=generator, dtype=torch.float64).to(dtype)


def gradients(model):
    """Copies of all gradients by name."""
    return {n: None if p.grad is None else p.grad.detach().clone() for n, p in model.module.named_parameters()}


def parameters(model):
    """Copies of all parameters by name."""
    return {n: p.detach().clone() for n, p in model.module.named_parameters()}


def same(left, right):
    """Bitwise equality of two dictionaries of tensors."""
    return left.keys() == right.keys() and all(
        (left[n] is None and right[n] is None) or torch.equal(left[n], right[n]) for n in left
    )
