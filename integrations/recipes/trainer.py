"""A plain DDP trainer to copy: snapshots from which it goes on to the bit, and one line of distopt.

    torchrun --standalone --nproc-per-node 2 integrations/recipes/trainer.py --out runs/trainer
    TRAIN=integrations/recipes/trainer.py sbatch docs/launch/slurm.sbatch --out runs/trainer

Run again, it goes on from the last snapshot in --out, which all nodes have to see.
"""

import argparse
import hashlib
import itertools
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import distopt
from distopt import checkpoint


class Sampler(DistributedSampler):
    """torch's, which knows how far into the epoch it is, so that a snapshot may be taken anywhere."""

    position = 0  # how many samples of this rank have been trained on in this epoch

    def __iter__(self):
        return itertools.islice(super().__iter__(), self.position, None)

    def state_dict(self):
        """Where it stands."""
        return {"seed": self.seed, "epoch": self.epoch, "position": self.position}

    def load_state_dict(self, state):
        """Go on from there."""
        self.seed, self.epoch, self.position = state["seed"], state["epoch"], state["position"]


def data():
    """Digits to train on and to test on."""
    pictures, labels = (torch.tensor(part) for part in load_digits(return_X_y=True))
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    pictures, labels = pictures[order].float() / 16, labels[order]
    return TensorDataset(pictures[597:], labels[597:]), (pictures[:597], labels[:597])


def network():
    """64 pixels to 10 logits; dropout shows whether random numbers go on where they were."""
    first, second, last = nn.Linear(64, 256), nn.Linear(256, 256), nn.Linear(256, 10)
    return nn.Sequential(first, nn.ReLU(), nn.Dropout(0.2), second, nn.ReLU(), last)


def train(out, device, *, epochs=20, batch=32, rank=4, learning_rate=0.05, save_every=50, seed=0):
    """Train from the last snapshot in ``out`` to the end; every rank calls it."""
    training, (pictures, labels) = data()
    torch.manual_seed(seed)
    model = DDP(network().to(device), device_ids=[device.index] if device.type == "cuda" else None)
    torch.manual_seed(seed + 1 + dist.get_rank())  # each rank has noise of its own from here on
    # The one line. AllReduce is what DDP does by itself.
    registration = distopt.register(model, distopt.PowerSGD(rank=rank) if rank else distopt.AllReduce())
    optimizer = torch.optim.SGD(model.parameters(), lr=learning_rate, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    sampler = Sampler(training, seed=seed, drop_last=True)
    # A generator of its own: making an iterator draws from it, which must not depend on how often we were started.
    loader = DataLoader(training, batch, sampler=sampler, generator=torch.Generator())

    # Random generators of every rank are saved as well, without being named.
    things = dict(model=model, optimizer=optimizer, scheduler=scheduler, sampler=sampler, registration=registration)
    step = checkpoint.load(out, **things) if checkpoint.latest(out) is not None else 0
    while sampler.epoch < epochs:
        for some, answers in loader:
            loss = nn.functional.cross_entropy(model(some.to(device)), answers.to(device))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            step, sampler.position = step + 1, sampler.position + len(answers)
            if step % save_every == 0:
                checkpoint.save(out, step, keep=2, **things)
                if dist.get_rank() == 0:
                    print(f"step {step}, epoch {sampler.epoch}: loss {loss.item():.4f}, saved", flush=True)
        scheduler.step()
        sampler.set_epoch(sampler.epoch + 1)
        sampler.position = 0

    with torch.no_grad():
        error = (model.eval()(pictures.to(device)).argmax(1).cpu() != labels).float().mean().item()
    weights = hashlib.sha256(b"".join(p.detach().cpu().numpy().tobytes() for p in model.parameters())).hexdigest()
    return {"steps": step, "test_error": 100 * error, "saving": registration.stats().saving, "weights": weights[:16]}


def main():
    """Read the command line, join the other ranks, and train."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/trainer"), help="a folder that all nodes see")
    numbers = {"--epochs": 20, "--batch": 32, "--rank": 4, "--learning-rate": 0.05, "--save-every": 50, "--seed": 0}
    for name, default in numbers.items():
        parser.add_argument(name, type=type(default), default=default, help=f"default: {default}")
    chosen = parser.parse_args()
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    figures = train(device=device, **vars(chosen))
    print(f"rank {dist.get_rank()}: {figures}", flush=True)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    try:
        main()
    except distopt.DistoptError as error:  # one line, and all ranks end
        sys.exit(f"rank {os.environ.get('RANK')}: {error}")
