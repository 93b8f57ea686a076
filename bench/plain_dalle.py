"""The second stage of DALL-E without distopt: torch's modules, torch's AdamW and a loop, for one process.

It is what `bench.dalle_speed` compares with. Its parameters have the names and shapes of ours, so both can be given the
same weights, and shown to compute the same losses and draw the same codes. Masks are the definition's, and dense.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

PAD = -1
ABOVE = ((-1, 0), (-1, 1), (-1, -1))


class PlainBlock(nn.Module):
    """Attention and an MLP; ``mask`` is bool ``(n, n)``, or None for causal attention."""

    def __init__(self, width: int, heads: int, mask: Tensor | None) -> None:
        super().__init__()
        self.heads, self.mask = heads, mask
        self.attention_norm = nn.LayerNorm(width)
        self.attention_in = nn.Linear(width, 3 * width)
        self.attention_out = nn.Linear(width, width)
        self.mlp_norm = nn.LayerNorm(width)
        self.mlp_in = nn.Linear(width, 4 * width)
        self.mlp_out = nn.Linear(4 * width, width)

    def forward(self, x: Tensor, cache: list[Tensor] | None = None) -> Tensor:
        """Positions ``(B, n, D)``, or with a filled cache the next one."""
        batch, positions, width = x.shape
        q, k, v = self.attention_in(self.attention_norm(x)).split(width, dim=2)
        q, k, v = (t.view(batch, positions, self.heads, -1).transpose(1, 2) for t in (q, k, v))
        if cache is not None:
            if cache:
                k, v = torch.cat([cache[0], k], dim=2), torch.cat([cache[1], v], dim=2)
            cache[:] = [k, v]
        known = k.shape[2]
        if self.mask is None:
            out = F.scaled_dot_product_attention(q, k, v, is_causal=positions > 1)
        else:
            mask = self.mask[known - positions : known, :known]
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        x = x + self.attention_out(out.transpose(1, 2).reshape(batch, positions, width))
        return x + self.mlp_out(F.relu(self.mlp_in(self.mlp_norm(x))))


class PlainDalle(nn.Module):
    """The transformer of stage 2; ``masks`` has one for each layer."""

    def __init__(
        self, *, words: int, text: int, codes: int, grid: int, width: int, heads: int, masks: list[Tensor | None]
    ) -> None:
        super().__init__()
        self.codes, self.grid, self.slots = codes, grid, grid * grid
        self.start = nn.Parameter(torch.zeros(width))
        self.text_embedding = nn.Embedding(words, width)
        self.text_position_embedding = nn.Embedding(text, width)
        self.padding_embedding = nn.Embedding(text, width)
        self.code_embedding = nn.Embedding(codes + 1, 64)
        self.code_projection = nn.Linear(4 * 64, width)
        self.row_embedding = nn.Embedding(grid, width)
        self.column_embedding = nn.Embedding(grid, width)
        self.blocks = nn.ModuleList(PlainBlock(width, heads, mask) for mask in masks)
        self.norm = nn.LayerNorm(width)
        self.text_unembedding = nn.Linear(width, words)
        self.image_unembedding_in = nn.Linear(width, 64)
        self.image_unembedding = nn.Linear(64, codes)
        self.fed = torch.tensor([self._fed(slot) for slot in range(self.slots)])

    def _fed(self, slot: int) -> list[int]:
        """Which codes a slot is fed: the one before, and those above."""
        fed = [slot - 1 if slot else self.slots]
        for down, right in ABOVE:
            row, column = slot // self.grid + down, slot % self.grid + right
            inside = row >= 0 and 0 <= column < self.grid
            fed.append(row * self.grid + column if inside else self.slots)
        return fed

    def embed(self, text: Tensor) -> Tensor:
        """Start and text, ``(B, 1 + T, D)``."""
        words = self.text_embedding(text.clamp(min=0)) + self.text_position_embedding.weight
        words = torch.where((text == PAD)[..., None], self.padding_embedding.weight, words)
        return torch.cat([self.start.expand(len(text), 1, -1), words], dim=1)

    def embed_slots(self, codes: Tensor, first: int, last: int) -> Tensor:
        """Slots from ``first`` to before ``last``, ``(B, last - first, D)``."""
        known = F.pad(codes, (0, self.slots + 1 - codes.shape[1]), value=self.codes)
        fed = self.code_embedding(known[:, self.fed[first:last]])
        slots = torch.arange(first, last)
        place = self.row_embedding(slots // self.grid) + self.column_embedding(slots % self.grid)
        return self.code_projection(fed.flatten(2)) + place

    def forward(self, text: Tensor, image: Tensor) -> Tensor:
        """The paper's loss."""
        length = text.shape[1]
        x = torch.cat([self.embed(text), self.embed_slots(image, 0, self.slots)], dim=1)
        for block in self.blocks:
            x = block(x)
        x = self.norm(x)
        text_logits = self.text_unembedding(x[:, :length])
        image_logits = self.image_unembedding(self.image_unembedding_in(x[:, length + 1 :]))
        text_loss = F.cross_entropy(text_logits.flatten(0, 1), text.flatten(), ignore_index=PAD)
        return text_loss / 8 + F.cross_entropy(image_logits.flatten(0, 1), image.flatten()) * 7 / 8

    @torch.no_grad()
    def sample(self, text: Tensor, generator: torch.Generator) -> Tensor:
        """Draw codes with keys and values kept, ``(B, G)``."""
        caches: list[list[Tensor]] = [[] for _ in self.blocks]
        x = self.embed(text)
        codes = torch.empty(len(text), 0, dtype=torch.int64)
        for block, cache in zip(self.blocks, caches, strict=True):
            x = block(x, cache)
        for slot in range(self.slots):
            x = self.embed_slots(codes, slot, slot + 1)
            for block, cache in zip(self.blocks, caches, strict=True):
                x = block(x, cache)
            logits = self.image_unembedding(self.image_unembedding_in(self.norm(x[:, 0])))
            codes = torch.cat([codes, torch.multinomial(logits.softmax(-1), 1, generator=generator)], dim=1)
        return codes


def plain_optimizer(model: nn.Module, learning_rate: float) -> torch.optim.Optimizer:
    """AdamW as the paper has it; matrices of linear layers decay."""
    linear = {id(module.weight) for module in model.modules() if isinstance(module, nn.Linear)}
    decay = [p for p in model.parameters() if id(p) in linear]
    rest = [p for p in model.parameters() if id(p) not in linear]
    groups = [{"params": decay, "weight_decay": 0.045}, {"params": rest, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, 0.96), fused=True)


def plain_step(
    model: nn.Module, optimizer: torch.optim.Optimizer, text: Tensor, image: Tensor, learning_rate: float, clip: float
) -> float:
    """One optimizer step; the loss before it."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
    loss = model(text, image)
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), clip)
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()
