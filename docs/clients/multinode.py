"""A trainer with snapshots for many nodes, in the way of PyTorch's DDP tutorial series: restarted, it goes on.

torchrun --nnodes=2 --nproc_per_node=2 --rdzv_backend=c10d --rdzv_endpoint=HOST:29500 docs/clients/multinode.py 10 2
"""

import argparse
import os

import torch
from torch.distributed import destroy_process_group, init_process_group
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel as DDP
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.data.distributed import DistributedSampler


def ddp_setup():
    """Join the other ranks, at the address that torchrun gives."""
    init_process_group(backend="nccl" if torch.cuda.is_available() else "gloo")
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))


class Trainer:
    """Trains a model from its last snapshot on."""

    def __init__(self, model, train_data, optimizer, save_every, snapshot_path):
        self.local_rank, self.global_rank = int(os.environ["LOCAL_RANK"]), int(os.environ["RANK"])
        self.device = torch.device("cuda", self.local_rank) if torch.cuda.is_available() else torch.device("cpu")
        self.train_data, self.optimizer = train_data, optimizer
        self.save_every, self.snapshot_path = save_every, snapshot_path
        self.epochs_run = 0
        self.model = DDP(model.to(self.device), device_ids=[self.local_rank] if torch.cuda.is_available() else None)
        if os.path.exists(snapshot_path):
            self._load_snapshot()

    def _load_snapshot(self):
        snapshot = torch.load(self.snapshot_path, map_location=self.device, weights_only=True)
        self.model.module.load_state_dict(snapshot["MODEL_STATE"])
        self.optimizer.load_state_dict(snapshot["OPTIMIZER_STATE"])
        self.epochs_run = snapshot["EPOCHS_RUN"]
        print(f"[rank {self.global_rank}] goes on from epoch {self.epochs_run}", flush=True)

    def _save_snapshot(self, epoch):
        snapshot = {
            "MODEL_STATE": self.model.module.state_dict(),
            "OPTIMIZER_STATE": self.optimizer.state_dict(),
            "EPOCHS_RUN": epoch + 1,
        }
        if self.global_rank == 0:
            torch.save(snapshot, self.snapshot_path)

    def _run_batch(self, source, targets):
        self.optimizer.zero_grad()
        loss = F.mse_loss(self.model(source), targets)
        loss.backward()
        self.optimizer.step()
        return loss.item()

    def _run_epoch(self, epoch):
        self.train_data.sampler.set_epoch(epoch)
        losses = [self._run_batch(s.to(self.device), t.to(self.device)) for s, t in self.train_data]
        loss = sum(losses) / len(losses)
        print(f"[rank {self.global_rank}] epoch {epoch} | steps {len(losses)} | loss {loss:.5f}", flush=True)

    def train(self, max_epochs):
        """Go on to the end."""
        for epoch in range(self.epochs_run, max_epochs):
            self._run_epoch(epoch)
            if (epoch + 1) % self.save_every == 0:
                self._save_snapshot(epoch)


def load_train_objs():
    """Numbers, what another network makes of them, and a network that shall learn it."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(1024, 32, generator=generator)
    targets = torch.tanh(inputs @ torch.randn(32, 64, generator=generator) / 4) @ torch.randn(
        64, 8, generator=generator
    )
    torch.manual_seed(0)
    layers = (
        torch.nn.Linear(32, 256),
        torch.nn.ReLU(),
        torch.nn.Linear(256, 256),
        torch.nn.ReLU(),
        torch.nn.Linear(256, 8),
    )
    model = torch.nn.Sequential(*layers)
    return TensorDataset(inputs, targets), model, torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)


def main(total_epochs, save_every, batch_size, snapshot_path="snapshot.pt"):
    """Train on all ranks together."""
    ddp_setup()
    dataset, model, optimizer = load_train_objs()
    train_data = DataLoader(dataset, batch_size=batch_size, shuffle=False, sampler=DistributedSampler(dataset))
    Trainer(model, train_data, optimizer, save_every, snapshot_path).train(total_epochs)
    destroy_process_group()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="a trainer with snapshots for many nodes")
    parser.add_argument("total_epochs", type=int, help="epochs to train for")
    parser.add_argument("save_every", type=int, help="epochs from one snapshot to the next")
    parser.add_argument("--batch_size", default=32, type=int, help="of each rank (default: 32)")
    args = parser.parse_args()
    main(args.total_epochs, args.save_every, args.batch_size)
