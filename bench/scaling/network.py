"""A GPT-like network that predicts the next byte, and the text that it reads: the sources of Python's own library."""

import sysconfig
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

HEADS = 4
CONTEXT = 64
EXIT_AFTER = 8
"""Branches before the head of the early exit."""


class Attention(nn.Module):
    """A residual branch that looks back: pre-norm, causal.

    Args:
        width: of the residual stream.
        branches: of the whole network; the output is made smaller by the root of it, as in GPT-2.
    """

    def __init__(self, width: int, branches: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.inwards = _linear(width, 3 * width, width**-0.5)
        self.outwards = _linear(width, width, (width * branches) ** -0.5)

    def forward(self, x: Tensor) -> Tensor:
        """``(rows, length, width)`` to the same."""
        rows, length, width = x.shape
        parts = self.inwards(self.norm(x)).view(rows, length, 3, HEADS, width // HEADS).permute(2, 0, 3, 1, 4)
        seen = functional.scaled_dot_product_attention(*parts.unbind(0), is_causal=True)
        return self.outwards(seen.transpose(1, 2).reshape(rows, length, width))


class Feedforward(nn.Sequential):
    """A residual branch that looks at each place alone: pre-norm, GELU.

    Args:
        width: of the residual stream.
        branches: as for `Attention`.
    """

    def __init__(self, width: int, branches: int) -> None:
        inwards = _linear(width, 4 * width, width**-0.5)
        outwards = _linear(4 * width, width, (4 * width * branches) ** -0.5)
        super().__init__(nn.LayerNorm(width), inwards, nn.GELU(), outwards)


class Network(nn.Module):
    """Residual branches on a float32 stream, and two heads: one at the end, one after `EXIT_AFTER` branches.

    Args:
        width: of the residual stream.
        branches: how many, attention and feedforward in turn.
    """

    def __init__(self, width: int, branches: int) -> None:
        super().__init__()
        self.symbols, self.places = nn.Embedding(256, width), nn.Embedding(CONTEXT, width)
        for embedding in (self.symbols, self.places):
            nn.init.normal_(embedding.weight, std=0.1)
        kinds = (Attention, Feedforward)
        self.branches = nn.ModuleList([kinds[place % 2](width, branches) for place in range(branches)])
        self.early, self.last = (nn.Sequential(nn.LayerNorm(width), _linear(width, 256, width**-0.5)) for _ in range(2))
        self.halves = False
        """Whether branches run in float16 by autocast alone. The stream and the heads are float32 in any case."""

    def forward(self, symbols: Tensor) -> tuple[Tensor, Tensor]:
        """Give the logits of both heads, the early one first, for integers ``(rows, length)``."""
        x = self.symbols(symbols) + self.places.weight[: symbols.shape[1]]
        exit_at = x
        for place, branch in enumerate(self.branches):
            exit_at = x if place == EXIT_AFTER else exit_at
            with torch.autocast("cpu", torch.float16, enabled=self.halves):
                y = branch(x)
            x = x + y.float()
        return self.early(exit_at), self.last(x)

    def matrices(self) -> list[list[nn.Parameter]]:
        """The weight matrices of each branch."""
        return [[p for p in branch.parameters() if p.dim() > 1] for branch in self.branches]


def losses(network: Network, batch: Tensor) -> tuple[Tensor, Tensor]:
    """Give the mean loss of both heads, the early one first.

    Args:
        network: to be judged.
        batch: integers ``(rows, length + 1)``.
    """
    early, last = (functional.cross_entropy(y.flatten(0, 1), batch[:, 1:].flatten()) for y in network(batch[:, :-1]))
    return early, last


class Text:
    """Bytes to learn from, and others to be judged by: every tenth source file.

    Args:
        size: bytes to learn from, at most.
    """

    def __init__(self, size: int = 2_000_000) -> None:
        files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
        kept, other = ([f for i, f in enumerate(files) if (i % 10 == 0) == judged] for judged in (False, True))
        self._learn, self._judge = (
            torch.frombuffer(bytearray(b"".join(f.read_bytes() for f in part)[:size]), dtype=torch.uint8)
            for part in (kept, other)
        )

    def batch(self, rows: int, seed: int, *, judge: bool = False) -> Tensor:
        """Random windows, integers ``(rows, CONTEXT + 1)``."""
        source = self._judge if judge else self._learn
        starts = torch.randint(len(source) - CONTEXT, (rows,), generator=torch.Generator().manual_seed(seed))
        return torch.stack([source[i : i + CONTEXT + 1] for i in starts.tolist()]).long()


def _linear(before: int, after: int, std: float) -> nn.Linear:
    linear = nn.Linear(before, after, bias=False)
    nn.init.normal_(linear.weight, std=std)
    return linear
