"""Train a small model on the bytes of a text: sharded inside each node, compressed between nodes.

Started by `torchrun`, on one node or many; it saves as it goes, and goes on from what it finds in --out.
"""

import argparse
import hashlib
import os
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

import distopt

CONTEXT = 16


class Block(nn.Module):
    """A residual branch."""

    def __init__(self, width):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x):
        """``(rows, width)`` to the same."""
        return x + self.down(nn.functional.gelu(self.up(self.norm(x))))


class Model(nn.Module):
    """The next byte from the ones before it."""

    def __init__(self, width=64, depth=2):
        super().__init__()
        self.embedding = nn.Embedding(256, width)
        self.mix = nn.Linear(CONTEXT * width, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(depth))
        self.lm_head = nn.Linear(width, 256)

    def forward(self, symbols):
        """Integers ``(rows, CONTEXT)`` to logits ``(rows, 256)``."""
        x = self.mix(self.embedding(symbols).flatten(1))
        for block in self.blocks:
            x = block(x)
        return self.lm_head(x)


def batch(text, rank, step, rows=64):
    """Each rank draws its own places in each step, the same ones in a run that was resumed."""
    drawn = torch.randint(len(text) - CONTEXT, (rows, 1), generator=torch.Generator().manual_seed(step * 4096 + rank))
    window = text[drawn + torch.arange(CONTEXT + 1)]
    return window[:, :-1], window[:, -1]


def save(folder, step, model, optimizer, registration):
    """Parameters, optimizer and what the reducer has not sent yet; each rank writes its own part."""
    parameters, moments = get_state_dict(model, optimizer)
    state = {"model": parameters, "optimizer": moments, "registration": registration}
    dcp.save(state, checkpoint_id=folder / f"step-{step}")


def resume(folder, model, optimizer, registration):
    """Go on from the last checkpoint that is complete, on any number of nodes; tell its step."""
    # DCP writes .metadata last.
    steps = [int(found.parent.name.removeprefix("step-")) for found in folder.glob("step-*/.metadata")]
    if not steps:
        return 0
    parameters, moments = get_state_dict(model, optimizer)
    state = {"model": parameters, "optimizer": moments, "registration": registration}
    dcp.load(state, checkpoint_id=folder / f"step-{max(steps)}")
    set_state_dict(model, optimizer, model_state_dict=parameters, optim_state_dict=moments)
    return max(steps)


def main():
    """Read the command line and train."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--text", type=Path, default=Path(argparse.__file__), help="default: a source of Python's own")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--save-every", type=int, default=30, metavar="STEPS")
    parser.add_argument("--rank", type=int, default=8, help="of PowerSGD")
    parser.add_argument("--out", type=Path, default=Path("runs/launch"), help="a folder that all nodes share")
    chosen = parser.parse_args()

    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if device == "cuda" else "gloo")
    rank = dist.get_rank()

    mesh = distopt.node_mesh(device)  # what shard takes if it is given no mesh
    shards, replicas = (dist.get_process_group_ranks(mesh.get_group(name)) for name in ("shard", "replica"))
    print(f"rank {rank}: shards {shards}, replicas {replicas}", flush=True)

    model = Model().to(device)
    registration = distopt.shard(model, "blocks.*", mesh=mesh, reducer=distopt.PowerSGD(rank=chosen.rank))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    first = resume(chosen.out, model, optimizer, registration)

    text = torch.tensor(list(chosen.text.read_bytes()))
    started = time.monotonic()
    for step in range(first, chosen.steps):
        symbols, following = (part.to(device) for part in batch(text, rank, step))
        loss = nn.functional.cross_entropy(model(symbols), following)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if rank == 0 and step % 10 == 0:
            print(f"step {step}: loss {loss.item():.4f}, {time.monotonic() - started:.1f} s", flush=True)
        if (step + 1) % chosen.save_every == 0:
            save(chosen.out, step + 1, model, optimizer, registration)

    stats = registration.stats()
    pieces = hashlib.sha256(b"".join(p.to_local().detach().cpu().numpy().tobytes() for p in model.parameters()))
    print(f"rank {rank}: {stats.steps} steps, saving {stats.saving:.2f}, pieces {pieces.hexdigest()[:16]}", flush=True)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    try:
        main()
    except distopt.DistoptError as error:  # one line, and all ranks end
        sys.exit(f"rank {os.environ.get('RANK')}: {error}")
