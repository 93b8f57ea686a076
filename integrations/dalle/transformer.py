"""Stage 2: one decoder-only transformer over text tokens and image tokens.

The stream is ``start, text (T), image (G)``; what stands at a position predicts the next token, so the last text
position predicts nothing, and image slot i is fed at position ``T + 1 + i`` with the tokens before it. Attention is
causal, and pads are attended to; ``attention.py`` has the paper's masks.

=========  ====================================================================================
symbol     meaning
=========  ====================================================================================
B, D       batch, width of the residual stream
T          text positions, pads included; every one has a padding embedding of its own
g, G       side of the token grid; number of image tokens, G = g * g
V, K       text tokens, image codes
C          width of a code's vector
=========  ====================================================================================

Four departures from the paper are what the defaults have, for they make a small model learn fast. A code's vector is,
in and out, what the code looks like, form and colour apart (``codes.code_vectors``), and stays so: codes that look
alike share what is learned, and a form is drawn in a colour that no caption ever gave it. A slot is also fed the three
codes above it, which are earlier in the raster. The activation is a ReLU, for its price on a CPU. Every layer attends
to all that came before. The presets of the paper's sizes have none of them.

Source: Ramesh et al., "Zero-Shot Text-to-Image Generation", 2021, section 2.2 and appendix B.1.
"""

import dataclasses
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from distopt.errors import SettingError

from .attention import Pattern, layer_kinds
from .cache import Cache
from .settings import ACTIVATIONS, ATTENTIONS
from .sparse_attention import attend
from .text import PAD

_NEIGHBOURS = ((-1, 0), (-1, 1), (-1, -1))
"""Codes besides the previous one that a slot is fed, by row and column offset, the most telling first."""
_CHOICES = {"attention": ATTENTIONS, "activation": ACTIVATIONS}


@dataclasses.dataclass(frozen=True, kw_only=True)
class TransformerSettings:
    """The size of a transformer.

    Args:
        text_vocabulary: V, number of text tokens.
        text_length: T, text positions.
        codes: K, number of image codes.
        grid: g, side of the square grid of image tokens.
        width: D, a multiple of ``heads``.
        layers: residual pairs of attention and MLP.
        heads: attention heads.
        expansion: width of the MLP as a multiple of D.
        code_width: C, width of a code's vector; 0 embeds codes at the full width D, as the paper does.
        neighbours: codes above a slot that are fed to it besides the previous one, 0 to 3; 0 where ``code_width`` is.
        attention: "full", or "paper" for rows, columns and a last convolution.
        kernel: side of the square that the convolution sees, an odd number; the paper's is 11.
        activation: of the MLP, "relu" or "gelu"; the paper names none.
        fixed_codes: leave the codes' vectors as they start, see ``codes.code_vectors``; not where ``code_width`` is 0.

    Raises:
        SettingError: where a value is out of its range.
    """

    text_vocabulary: int
    text_length: int
    codes: int
    grid: int
    width: int = 96
    layers: int = 3
    heads: int = 4
    expansion: int = 4
    code_width: int = 64
    neighbours: int = 3
    attention: str = "full"
    kernel: int = 11
    activation: str = "relu"
    fixed_codes: bool = False

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name == "fixed_codes":
                continue
            if field.name in _CHOICES:
                if value not in _CHOICES[field.name]:
                    raise SettingError(f"TransformerSettings.{field.name}", value, f"one of {_CHOICES[field.name]}")
                continue
            low = 0 if field.name in ("neighbours", "code_width") else 1
            if not isinstance(value, int) or value < low:
                raise SettingError(f"TransformerSettings.{field.name}", value, f"an integer of at least {low}")
        most = len(_NEIGHBOURS) if self.code_width else 0
        if self.neighbours > most:
            raise SettingError("TransformerSettings.neighbours", self.neighbours, f"at most {most}")
        if self.width % self.heads:
            raise SettingError("TransformerSettings.width", self.width, f"a multiple of heads ({self.heads})")
        if self.kernel % 2 == 0:
            raise SettingError("TransformerSettings.kernel", self.kernel, "an odd number")

    @property
    def image_length(self) -> int:
        """G, number of image tokens."""
        return self.grid * self.grid


class Losses(NamedTuple):
    """Mean cross-entropies in nats per token, 0-dimensional; pads are not counted as text."""

    text: Tensor
    image: Tensor

    def total(self) -> Tensor:
        """The paper's weighting: an eighth for text, seven eighths for the image."""
        return self.text / 8 + self.image * (7 / 8)


class Block(nn.Module):
    """Causal self-attention under the layer's mask and an MLP, each behind a LayerNorm and around a residual."""

    def __init__(self, settings: TransformerSettings, layer: int) -> None:
        super().__init__()
        width, hidden = settings.width, settings.width * settings.expansion
        self.layer, self.heads = layer, settings.heads
        kind = layer_kinds(settings.attention, settings.layers)[layer]
        self.pattern = Pattern(kind, text=1 + settings.text_length, grid=settings.grid, kernel=settings.kernel)
        self.activation = F.gelu if settings.activation == "gelu" else F.relu
        self.attention_norm = nn.LayerNorm(width)
        self.attention_in = nn.Linear(width, 3 * width)
        self.attention_out = nn.Linear(width, width)
        self.mlp_norm = nn.LayerNorm(width)
        self.mlp_in = nn.Linear(width, hidden)
        self.mlp_out = nn.Linear(hidden, width)

    def forward(self, x: Tensor, cache: Cache | None = None) -> Tensor:
        """Map ``(B, n, D)`` to ``(B, n, D)``; with a cache, n is the first positions or one next position."""
        x = x + self.attention_out(self._attend(self.attention_in(self.attention_norm(x)), cache))
        return x + self.mlp_out(self.activation(self.mlp_in(self.mlp_norm(x))))

    def _attend(self, projected: Tensor, cache: Cache | None) -> Tensor:
        positions = projected.shape[1]
        queries, keys, values = projected.unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        if cache is not None:
            keys, values = cache.extend(self.layer, self.pattern, keys, values)
        if keys.shape[2] == positions:
            out = attend(queries, keys, values, self.pattern)
        else:  # the one position after those in the cache, which gave what it sees
            out = F.scaled_dot_product_attention(queries, keys, values)
        return out.transpose(1, 2).flatten(2)


class Transformer(nn.Module):
    """The joint model of a caption and its picture's codes.

    Args:
        settings: its size.
        vectors: ``(K, C)``, where the codes' vectors start; ``None`` draws them from a Gaussian. Without effect where
            ``code_width`` is 0.

    Raises:
        SettingError: if ``vectors`` do not have the shape that the settings say.

    Example:
        >>> settings = TransformerSettings(text_vocabulary=9, text_length=4, codes=8, grid=2, width=16, heads=2)
        >>> text, image = torch.tensor([[1, 2, 3, PAD]]), torch.tensor([[0, 7, 1, 2]])
        >>> Transformer(settings)(text, image).image.shape
        torch.Size([])
    """

    def __init__(self, settings: TransformerSettings, vectors: Tensor | None = None) -> None:
        super().__init__()
        self.settings = settings
        width, codes, code_width = settings.width, settings.codes, settings.code_width
        self.start = nn.Parameter(torch.zeros(width))
        self.text_embedding = nn.Embedding(settings.text_vocabulary, width)
        self.text_position_embedding = nn.Embedding(settings.text_length, width)
        self.padding_embedding = nn.Embedding(settings.text_length, width)
        # The last stands for all outside the known grid, and so for the start of the image.
        self.code_embedding = nn.Embedding(codes + 1, code_width or width)
        self.code_projection = nn.Linear((1 + settings.neighbours) * code_width, width) if code_width else nn.Identity()
        self.row_embedding = nn.Embedding(settings.grid, width)
        self.column_embedding = nn.Embedding(settings.grid, width)
        self.blocks = nn.ModuleList(Block(settings, layer) for layer in range(settings.layers))
        self.norm = nn.LayerNorm(width)
        self.text_unembedding = nn.Linear(width, settings.text_vocabulary)
        self.image_unembedding_in = nn.Linear(width, code_width) if code_width else nn.Identity()
        self.image_unembedding = nn.Linear(code_width or width, codes)
        self._sources: Tensor
        # No buffer: DDP would broadcast it before every forward pass.
        self._sources = _sources(settings)
        self._initialise(vectors)

    @torch.no_grad()
    def _initialise(self, vectors: Tensor | None) -> None:
        settings = self.settings
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=module.in_features**-0.5)
                nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=0.5)
        for name, weight in self.named_parameters():
            if name.endswith(("attention_out.weight", "mlp_out.weight")):
                weight.mul_((2 * settings.layers) ** -0.5)
        # At zero every LayerNorm would make the gradient of the start 300 times larger: clipping would leave nothing of
        # the others in the first steps, and deep models would overflow.
        nn.init.normal_(self.start, std=0.5)
        self.code_embedding.weight[-1].zero_()
        # Small logits at first: the first steps need not unlearn a guess.
        self.text_unembedding.weight.mul_(0.1)
        if not settings.code_width:
            self.image_unembedding.weight.mul_(0.1)
            return
        shape = (settings.codes, settings.code_width)
        if vectors is None:
            vectors = torch.randn(shape, device=self.start.device)
        elif vectors.shape != shape:
            raise SettingError("vectors", tuple(vectors.shape), f"of shape (codes, code_width), {shape}")
        unit = vectors / vectors.square().mean().sqrt().clamp(min=1e-12)
        self.code_embedding.weight[:-1].copy_(unit)
        self.image_unembedding.weight.copy_(unit * settings.code_width**-0.5)
        self.image_unembedding_in.weight.mul_(0.1)
        for vectors_of_codes in (self.code_embedding, self.image_unembedding):
            vectors_of_codes.weight.requires_grad_(not settings.fixed_codes)

    def embed_text(self, text: Tensor) -> Tensor:
        """Embed the start and ``text`` ``(B, T)`` int64 with ``PAD``; gives ``(B, 1 + T, D)``."""
        pad = (text == PAD).unsqueeze(-1)
        words = self.text_embedding(text.clamp(min=0)) + self.text_position_embedding.weight
        embedded = torch.where(pad, self.padding_embedding.weight, words)
        return torch.cat([self.start.expand(len(text), 1, -1), embedded], dim=1)

    def embed_image(self, codes: Tensor, slots: slice) -> Tensor:
        """Embed what the image ``slots`` are fed.

        Args:
            codes: ``(B, n)`` int64, the first n codes of the raster; slots up to n can be embedded.
            slots: which slots, in raster order.

        Returns:
            ``(B, len(slots), D)``. Rows and columns are those of the slot that is predicted.
        """
        grid, outside = self.settings.grid, self.settings.codes
        known = F.pad(codes, (0, self.settings.image_length + 1 - codes.shape[1]), value=outside)
        if self._sources.device != codes.device:  # once: a copy makes the host wait for the device
            with torch.inference_mode(False):
                self._sources = self._sources.to(codes.device)
        vectors = self.code_embedding(known[:, self._sources[slots]])
        places = torch.arange(self.settings.image_length, device=codes.device)[slots]
        position = self.row_embedding(places // grid) + self.column_embedding(places % grid)
        return self.code_projection(vectors.flatten(2)) + position

    def hidden(self, x: Tensor, cache: Cache | None = None) -> Tensor:
        """Run embedded positions ``(B, n, D)`` through the blocks and the last LayerNorm."""
        for block in self.blocks:
            x = block(x, cache)
        return self.norm(x)

    def text_logits(self, hidden: Tensor) -> Tensor:
        """Logits ``(..., V)`` of the next text token."""
        return self.text_unembedding(hidden)

    def image_logits(self, hidden: Tensor) -> Tensor:
        """Logits ``(..., K)`` of the next image code."""
        return self.image_unembedding(self.image_unembedding_in(hidden))

    def logits(self, text: Tensor, image: Tensor) -> tuple[Tensor, Tensor]:
        """Predict every token from those before it.

        Args:
            text: ``(B, T)`` int64 with ``PAD``.
            image: ``(B, G)`` int64; the last code is fed to nothing.

        Returns:
            Text logits ``(B, T, V)`` and image logits ``(B, G, K)``.
        """
        length = self.settings.text_length
        x = torch.cat([self.embed_text(text), self.embed_image(image, slice(None))], dim=1)
        hidden = self.hidden(x)
        return self.text_logits(hidden[:, :length]), self.image_logits(hidden[:, length + 1 :])

    def forward(self, text: Tensor, image: Tensor) -> Losses:
        """Cross-entropies of ``text`` ``(B, T)`` and ``image`` ``(B, G)``, each over the tokens of its kind."""
        text_logits, image_logits = self.logits(text, image)
        count = (text != PAD).sum().clamp(min=1)
        text_loss = F.cross_entropy(text_logits.flatten(0, 1), text.flatten(), ignore_index=PAD, reduction="sum")
        return Losses(text_loss / count, F.cross_entropy(image_logits.flatten(0, 1), image.flatten()))


def _sources(settings: TransformerSettings) -> Tensor:
    """Slots whose codes each slot is fed, ``(G, 1 + neighbours)``; G, which is never known, where there is none."""
    grid, outside = settings.grid, settings.image_length
    table = torch.full((outside, 1 + settings.neighbours), outside)
    table[1:, 0] = torch.arange(outside - 1)
    for kind, (down, right) in enumerate(_NEIGHBOURS[: settings.neighbours], start=1):
        for slot in range(outside):
            row, column = slot // grid + down, slot % grid + right
            if 0 <= row and 0 <= column < grid:
                table[slot, kind] = row * grid + column
    return table
