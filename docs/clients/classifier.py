"""A classifier of pictures, in the way of torch's ImageNet example: arguments, meters, top-1 accuracy, a checkpoint.

    torchrun --standalone --nproc_per_node=2 docs/clients/classifier.py --epochs 5

The pictures are scikit-learn's 1797 digits of 8 x 8 pixels, which come with it.
"""

import argparse
import os

import torch
import torch.distributed as dist
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.data.distributed import DistributedSampler

parser = argparse.ArgumentParser(description="Digits")
parser.add_argument("--epochs", default=5, type=int, help="(default: 5)")
parser.add_argument("--start-epoch", default=0, type=int, help="(default: 0)")
parser.add_argument("-b", "--batch-size", default=64, type=int, help="over all ranks (default: 64)")
parser.add_argument("--lr", default=0.05, type=float, help="(default: 0.05)")
parser.add_argument("--momentum", default=0.9, type=float, help="(default: 0.9)")
parser.add_argument("--wd", default=1e-4, type=float, help="(default: 1e-4)")
parser.add_argument("--print-freq", default=5, type=int, help="(default: 5)")
parser.add_argument("--checkpoint", default="", help="where the best model is saved (default: nowhere)")


class AverageMeter:
    """The mean of what it was given."""

    def __init__(self):
        self.sum = self.count = 0

    def update(self, value, n=1):
        """Take the mean of ``n`` values."""
        self.sum += value * n
        self.count += n

    @property
    def avg(self):
        """The mean so far."""
        return self.sum / max(1, self.count)

    def all_reduce(self):
        """Over all ranks."""
        total = torch.tensor([self.sum, self.count], dtype=torch.float64)
        dist.all_reduce(total)
        self.sum, self.count = total.tolist()


class Residual(nn.Module):
    """Two convolutions beside an identity."""

    def __init__(self, width):
        super().__init__()
        self.conv1, self.conv2 = (nn.Conv2d(width, width, 3, padding=1, bias=False) for _ in range(2))
        self.bn1, self.bn2 = nn.BatchNorm2d(width), nn.BatchNorm2d(width)

    def forward(self, x):
        """``(B, width, H, W)`` to the same."""
        y = torch.relu(self.bn1(self.conv1(x)))
        return torch.relu(x + self.bn2(self.conv2(y)))


def resnet(width=32):
    """Pictures ``(B, 1, 8, 8)`` to 10 logits."""
    stem = [nn.Conv2d(1, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
    body = [Residual(width), nn.MaxPool2d(2), Residual(width), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return nn.Sequential(*stem, *body, nn.Linear(width, 10))


def digits():
    """Pictures and labels to train on, and to test on."""
    images, target = (torch.tensor(part) for part in load_digits(return_X_y=True))
    images = ((images.float() - 4.9) / 6.0).reshape(-1, 1, 8, 8)
    order = torch.randperm(len(target), generator=torch.Generator().manual_seed(0))
    images, target = images[order], target[order]
    return TensorDataset(images[400:], target[400:]), TensorDataset(images[:400], target[:400])


def accuracy(output, target):
    """Percentage that is right."""
    return 100 * (output.argmax(1) == target).float().mean().item()


def train(loader, model, criterion, optimizer, epoch, args):
    """One epoch."""
    losses, top1 = AverageMeter(), AverageMeter()
    model.train()
    for i, (images, target) in enumerate(loader):
        output = model(images)
        loss = criterion(output, target)
        losses.update(loss.item(), len(target))
        top1.update(accuracy(output, target), len(target))

        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if i % args.print_freq == 0 and dist.get_rank() == 0:
            print(f"Epoch: [{epoch}][{i}/{len(loader)}]  Loss {losses.avg:.4f}  Acc@1 {top1.avg:.2f}", flush=True)


@torch.no_grad()
def validate(loader, model):
    """Accuracy over the pictures of all ranks."""
    top1 = AverageMeter()
    model.eval()
    for images, target in loader:
        top1.update(accuracy(model(images), target), len(target))
    top1.all_reduce()
    return top1.avg


def main():
    """Join the other ranks, and train."""
    args = parser.parse_args()
    dist.init_process_group("gloo")
    torch.manual_seed(0)
    model = DistributedDataParallel(resnet())
    criterion = nn.CrossEntropyLoss()
    optimizer = torch.optim.SGD(model.parameters(), args.lr, momentum=args.momentum, weight_decay=args.wd)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=30, gamma=0.1)

    training, testing = digits()
    batch = args.batch_size // int(os.environ["WORLD_SIZE"])
    sampler = DistributedSampler(training)
    train_loader = DataLoader(training, batch_size=batch, sampler=sampler)
    val_loader = DataLoader(testing, batch_size=100, sampler=DistributedSampler(testing, shuffle=False))
    best = 0.0
    for epoch in range(args.start_epoch, args.epochs):
        sampler.set_epoch(epoch)
        train(train_loader, model, criterion, optimizer, epoch, args)
        scheduler.step()
        found = validate(val_loader, model)
        if dist.get_rank() == 0:
            print(f" * Acc@1 {found:.2f}", flush=True)
            if args.checkpoint and found > best:
                torch.save({"epoch": epoch + 1, "state_dict": model.module.state_dict()}, args.checkpoint)
        best = max(best, found)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
