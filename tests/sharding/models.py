"""A model with all that sharding has to cope with, and loops for the tests with real processes."""

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard
from torch.nn.parallel import DistributedDataParallel as DDP

import distopt

WIDTH, VOCABULARY = 18, 13
"""Neither can be divided by 4; three rows of 4 would leave one shard out."""


class Block(nn.Module):
    """x + f(x), with a matrix that is frozen."""

    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up, self.mix, self.down = (
            nn.Linear(WIDTH, 2 * WIDTH),
            nn.Linear(2 * WIDTH, 2 * WIDTH, bias=False),
            nn.Linear(2 * WIDTH, WIDTH),
        )
        self.mix.weight.requires_grad_(False)

    def forward(self, x):
        return x + self.down(torch.tanh(self.mix(self.up(self.norm(x)))))


class Model(nn.Module):
    """Tokens in, logits out; the head is tied to the embedding, and a parameter has fewer rows than there are shards.

    ``poisoned`` makes a gradient NaN in one row, which one shard has.
    """

    def __init__(self, depth=2, dtype=torch.float64, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(depth))
        self.few = nn.Parameter(torch.randn(3, WIDTH))
        self.lm_head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.lm_head.weight = self.embedding.weight
        self.register_buffer("shift", torch.randn(WIDTH))
        self.unused = nn.Linear(WIDTH, WIDTH)
        self.poisoned = False
        self.to(dtype)

    def forward(self, tokens):
        few = self.few * 1.0
        if self.poisoned:
            few.register_hook(lambda gradient: gradient.index_fill(0, torch.tensor([2]), float("nan")))
        x = self.embedding(tokens) + self.shift + few.sum(0)
        for block in self.blocks:
            x = block(x)
        return self.lm_head(x)


def tokens(rank, step, rows=4):
    """This rank's input ``(rows, 6)`` at a step."""
    return torch.randint(VOCABULARY, (rows, 6), generator=torch.Generator().manual_seed(1000 * rank + step))


def loss_of(model, batch, reduction="mean"):
    """Predict each token from itself, shifted by one."""
    logits = model(batch).flatten(0, 1)
    return nn.functional.cross_entropy(logits, (batch.flatten() + 1) % VOCABULARY, reduction=reduction)


def mesh_of(shape):
    """Replicas by shards."""
    return init_device_mesh("cpu", shape, mesh_dim_names=("replica", "shard"))


def optimizer_of(model):
    """One that has a state, and whose steps follow the gradient's size.

    With a rate of 0.1 the run is chaotic: DDP's own last bits grow to 1e-11 in 20 steps if ranks swap their batches.
    """
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.02, momentum=0.9)


def by_columns(parameter):
    """A placement: the last matrix of each block is cut along its second dimension."""
    return Shard(1) if parameter.shape == (WIDTH, 2 * WIDTH) else None


def sharded(shape, reducer, model=None, **options):
    """A sharded model and its registration."""
    model = model or Model()
    options.setdefault("shard_placement_fn", by_columns)
    return model, distopt.shard(model, "blocks.?", mesh=mesh_of(shape), reducer=reducer, **options)


def wrapped(reducer, model=None):
    """The same under DDP."""
    model = DDP(model or Model(), find_unused_parameters=False)
    return model, distopt.register(model, reducer)


def train(model, rank, steps, first=0, optimizer=None):
    """A plain loop."""
    optimizer = optimizer or optimizer_of(model)
    for step in range(first, first + steps):
        optimizer.zero_grad()
        loss_of(model, tokens(rank, step)).backward()
        optimizer.step()
    return optimizer


def whole(model):
    """Copies of all parameters by name, whole, as a plain model has them."""
    named = getattr(model, "module", model).named_parameters()
    return {
        name: (p.full_tensor() if hasattr(p, "full_tensor") else p).detach().clone()
        for name, p in named
        if not name.startswith("unused")
    }


def local(tensor):
    """This rank's piece."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def worst(left, right):
    """The largest difference of two dictionaries of tensors."""
    assert left.keys() == right.keys()
    return max(float((left[name] - right[name]).abs().max()) for name in left)


def gradients(model):
    """This rank's pieces of all gradients, by name."""
    return {name: local(p.grad).clone() for name, p in model.named_parameters() if p.grad is not None}
