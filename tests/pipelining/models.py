"""A list of blocks with all that a pipeline has to cope with, and what it has to be equal to."""

import copy

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

import distopt

WIDTH, VOCABULARY = 10, 11
NAMES = ("stage", "replica", "shard")


class Block(nn.Module):
    """x + f(x), with a matrix that is frozen; ``poisoned`` makes gradients in its middle infinite."""

    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up, self.mix, self.down = nn.Linear(WIDTH, 14), nn.Linear(14, 14, bias=False), nn.Linear(14, WIDTH)
        self.mix.weight.requires_grad_(False)
        self.poisoned = False

    def forward(self, x):
        hidden = torch.tanh(self.mix(self.up(self.norm(x))))
        if self.poisoned and hidden.requires_grad:
            hidden.register_hook(lambda gradient: gradient * float("inf"))
        return x + self.down(hidden)


def blocks(depth=4, dtype=torch.float64, seed=0):
    """Tokens in, logits out: an embedding, residual blocks, a norm, a head; float64."""
    torch.manual_seed(seed)
    head = nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, VOCABULARY))
    return nn.Sequential(nn.Embedding(VOCABULARY, WIDTH), *(Block() for _ in range(depth)), head).to(dtype)


def batch(seed, rows=8):
    """Tokens ``(rows, 5)``, and the same shifted by one."""
    tokens = torch.randint(VOCABULARY, (rows, 5), generator=torch.Generator().manual_seed(seed))
    return tokens, (tokens + 1) % VOCABULARY


def loss_fn(logits, target):
    """Mean cross-entropy."""
    return nn.functional.cross_entropy(logits.flatten(0, 1), target.flatten())


def mesh_of(*shape):
    """Stages, replicas, shards."""
    return init_device_mesh("cpu", shape, mesh_dim_names=NAMES[: len(shape)])


def optimizer_of(parameters):
    """One that has a state, and whose steps follow the gradient's size."""
    return torch.optim.SGD([p for p in parameters if p.requires_grad], lr=0.05, momentum=0.9)


def sequential_step(model, batches, microbatches, mean=True):
    """The same batches, each in micro-batches that are added up in their order, and averaged; gives the mean loss."""
    total, found = 0.0, []
    for x, target in batches:
        model.zero_grad()
        pairs = zip(x.chunk(microbatches), target.chunk(microbatches), strict=True)
        losses = [loss_fn(model(part), wanted) for part, wanted in pairs]
        for loss in losses:
            loss.backward()
        count = microbatches if mean else 1
        total += sum(loss.item() for loss in losses) / count
        found.append([None if p.grad is None else p.grad / count for p in model.parameters()])
    for parameter, *parts in zip(model.parameters(), *found, strict=True):
        parameter.grad = None if parts[0] is None else sum(parts[1:], parts[0]) / len(batches)
    return total / len(batches)


def whole(pipe):
    """This rank's parameters by name, whole."""
    return {name: full(p.detach()).clone() for name, p in pipe.named_parameters()}


def gradients(pipe):
    """This rank's gradients by name, whole."""
    return {name: full(p.grad).clone() for name, p in pipe.named_parameters() if p.grad is not None}


def full(tensor):
    """All shards' pieces."""
    if not hasattr(tensor, "full_tensor"):
        return tensor
    return tensor.to_local() if tensor.device_mesh.size() == 1 else tensor.full_tensor()


def worst(mine, reference):
    """The largest difference to what a dictionary of all names has, of whole tensors or of this rank's pieces."""
    return max(difference(value, reference[name].detach()) for name, value in mine.items())


def difference(value, reference):
    """The largest difference, 0 of nothing."""
    if hasattr(value, "to_local"):
        mesh = value.device_mesh
        pieces = reference.chunk(mesh.size())
        place = mesh.get_local_rank()
        value = value.detach()
        value, reference = value.to_local(), pieces[place] if place < len(pieces) else reference[:0]
    return (value - reference).abs().max().item() if value.numel() else 0.0


def piped(model=None, **options):
    """A pipeline of these blocks, four micro-batches."""
    options = {"microbatches": 4, "loss_fn": loss_fn, **options}
    return distopt.pipeline(copy.deepcopy(model) if model is not None else blocks(), **options)
