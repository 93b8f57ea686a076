"""A minimal GPT on characters, in the way of nanoGPT: one file, settings as globals, gradient accumulation by hand.

    torchrun --standalone --nproc_per_node=2 docs/clients/gpt.py --max_iters=200

Its text is the source of Python's own argparse, so that nothing is downloaded.
"""

import argparse
import math
import os
import sys
from contextlib import nullcontext
from pathlib import Path

import torch
from torch import nn
from torch.distributed import destroy_process_group, init_process_group
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel as DDP

# settings; --name=value changes one
data = argparse.__file__
eval_interval = 50
eval_iters = 5
gradient_accumulation_steps = 4  # over all ranks
batch_size = 8
block_size = 64
n_layer, n_head, n_embd = 2, 4, 96
learning_rate = 2e-3
max_iters = 200
warmup_iters = 20
min_lr = 2e-4
weight_decay = 0.1
grad_clip = 1.0
for arg in sys.argv[1:]:
    key, _, value = arg.removeprefix("--").partition("=")
    globals()[key] = type(globals()[key])(value)

# one process, or one of those that torchrun started
ddp = int(os.environ.get("RANK", -1)) != -1
ddp_rank, ddp_local_rank, ddp_world_size = 0, 0, 1
if ddp:
    init_process_group(backend="nccl" if torch.cuda.is_available() else "gloo")
    ddp_rank, ddp_local_rank = int(os.environ["RANK"]), int(os.environ["LOCAL_RANK"])
    ddp_world_size = int(os.environ["WORLD_SIZE"])
    assert gradient_accumulation_steps % ddp_world_size == 0
    gradient_accumulation_steps //= ddp_world_size
device = f"cuda:{ddp_local_rank}" if torch.cuda.is_available() else "cpu"
master_process = ddp_rank == 0
torch.manual_seed(1337 + ddp_rank)
ctx = torch.amp.autocast("cuda", torch.bfloat16) if "cuda" in device else nullcontext()

text = Path(data).read_text()
chars = sorted(set(text))
ids = torch.tensor([chars.index(c) for c in text])
split = int(0.9 * len(ids))
splits = {"train": ids[:split], "val": ids[split:]}


def get_batch(split):
    """Windows of the text, and the same one character on."""
    ids = splits[split]
    ix = torch.randint(len(ids) - block_size, (batch_size,))
    x = torch.stack([ids[i : i + block_size] for i in ix])
    y = torch.stack([ids[i + 1 : i + 1 + block_size] for i in ix])
    return x.to(device), y.to(device)


class Block(nn.Module):
    """Attention to what came before, and an MLP."""

    def __init__(self):
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(n_embd), nn.LayerNorm(n_embd)
        self.c_attn, self.c_proj = nn.Linear(n_embd, 3 * n_embd), nn.Linear(n_embd, n_embd)
        self.mlp = nn.Sequential(nn.Linear(n_embd, 4 * n_embd), nn.GELU(), nn.Linear(4 * n_embd, n_embd))

    def forward(self, x):
        """``(B, T, C)`` to the same."""
        B, T, C = x.shape
        q, k, v = (part.view(B, T, n_head, -1).transpose(1, 2) for part in self.c_attn(self.ln_1(x)).split(C, dim=2))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(B, T, C)
        x = x + self.c_proj(y)
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    """Characters to the loss of the next ones."""

    def __init__(self):
        super().__init__()
        self.wte, self.wpe = nn.Embedding(len(chars), n_embd), nn.Embedding(block_size, n_embd)
        self.h = nn.Sequential(*(Block() for _ in range(n_layer)))
        self.ln_f, self.lm_head = nn.LayerNorm(n_embd), nn.Linear(n_embd, len(chars), bias=False)

    def forward(self, idx, targets):
        """Mean cross-entropy of ``targets``, both ``(B, T)``."""
        x = self.wte(idx) + self.wpe(torch.arange(idx.shape[1], device=idx.device))
        logits = self.lm_head(self.ln_f(self.h(x)))
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def get_lr(it):
    """Warm up, then fall as a cosine."""
    if it < warmup_iters:
        return learning_rate * (it + 1) / warmup_iters
    ratio = (it - warmup_iters) / max(1, max_iters - warmup_iters)
    return min_lr + 0.5 * (1 + math.cos(math.pi * ratio)) * (learning_rate - min_lr)


@torch.no_grad()
def estimate_loss():
    """Mean losses of a few batches of both splits."""
    model.eval()
    losses = {s: sum(raw_model(*get_batch(s)).item() for _ in range(eval_iters)) / eval_iters for s in splits}
    model.train()
    return losses


model = GPT().to(device)
if ddp:
    model = DDP(model, device_ids=[ddp_local_rank] if "cuda" in device else None)
raw_model = model.module if ddp else model
optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=weight_decay)

for iter_num in range(max_iters + 1):
    for group in optimizer.param_groups:
        group["lr"] = get_lr(iter_num)
    if iter_num % eval_interval == 0 and master_process:
        losses = estimate_loss()
        print(f"step {iter_num}: train loss {losses['train']:.4f}, val loss {losses['val']:.4f}", flush=True)
    for micro_step in range(gradient_accumulation_steps):
        if ddp:
            # ranks meet in the last micro-batch only
            model.require_backward_grad_sync = micro_step == gradient_accumulation_steps - 1
        with ctx:
            loss = model(*get_batch("train")) / gradient_accumulation_steps
        loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), grad_clip)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)

if ddp:
    destroy_process_group()
