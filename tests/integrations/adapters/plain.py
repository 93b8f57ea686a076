"""What every adapter is compared with: a loop of one's own around DDP and `distopt.register`."""

import os

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP

import distopt

REDUCER = distopt.PowerSGD(rank=2)
WIDTH = 24


def net():
    """The same weights whenever it is called."""
    torch.manual_seed(7)
    return nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.Tanh(), nn.Linear(2 * WIDTH, WIDTH))


class Net(nn.Module):
    """With the parameters' names that it has in a LightningModule: first factors are drawn by name."""

    def __init__(self):
        super().__init__()
        self.net = net()

    def forward(self, batch):
        return self.net(batch)


def loss_of(model, batch):
    return (model(batch) - batch.roll(1, dims=1)).square().mean()


def batches(rank, count):
    """This rank's, the same whenever they are asked for."""
    generator = torch.Generator().manual_seed(rank)
    return [torch.randn(6, WIDTH, generator=generator) for _ in range(count)]


def optimizer_of(model):
    return torch.optim.AdamW(model.parameters(), lr=1e-2)


def values(model):
    """Copies of the parameters, in their order."""
    return [parameter.detach().clone() for parameter in model.parameters()]


def same(left, right):
    """Whether two lists of tensors agree to the bit."""
    return len(left) == len(right) and all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


def train(rank, *, steps, accumulate=1, save_every=0, reducer=REDUCER, fp16=False, again=0, epochs=1):
    """The loop: parameters in the end, and the registration's figures.

    Args:
        rank: whose batches.
        steps: of the optimizer.
        accumulate: batches a step.
        save_every: steps from one state that is taken to the next, which makes residuals equal on all ranks.
        reducer: None for DDP alone.
        fp16: autocast, and a scaler.
        again: steps more, on a model that was wrapped anew, with a new optimizer and the first residuals.
        epochs: how often the same batches come.
    """
    scaler = torch.amp.GradScaler("cpu", enabled=fp16)
    inner = Net()
    model = DDP(inner)
    hook = None if reducer is None else distopt.register(model, reducer, grad_scaler=scaler if fp16 else None)

    def go(count):
        data, optimizer = iter(batches(rank, count * accumulate // epochs) * epochs), optimizer_of(inner)
        for step in range(1, count + 1):
            for part in range(accumulate):
                model.require_backward_grad_sync = part == accumulate - 1
                with torch.autocast("cpu", torch.float16, enabled=fp16):
                    loss = loss_of(model, next(data)) / accumulate
                scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            if save_every and step % save_every == 0 and hook is not None:
                hook.state_dict()

    go(steps)
    if again:
        state = hook.state_dict()
        model = DDP(inner)
        hook = distopt.register(model, reducer)
        hook.load_state_dict(state)
        go(again)
    return values(inner), None if hook is None else hook.stats()


def as_torchrun(rank, world_size=2):
    """The environment that torchrun gives, for trainers that look for it; the process group is there already."""
    variables = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "LOCAL_WORLD_SIZE": world_size}
    address = {"GROUP_RANK": 0, "MASTER_ADDR": "localhost", "MASTER_PORT": 29500, "TORCHELASTIC_RUN_ID": "test"}
    os.environ.update({name: str(value) for name, value in {**variables, **address}.items()})
