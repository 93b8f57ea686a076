"""Tells how well pictures fit captions: the contrastive model that re-ranks samples, read at the pixels' own size.

A picture becomes one vector for each place of a coarse grid, a caption one for each text token, and a caption fits a
picture as well as its tokens find their places:

    similarity = sum over tokens of max over places of <token, place>

A vector for the whole picture would have to keep apart what belongs to which thing; a token that finds its place need
not. The maximum is a smooth one, so that every place learns.

Form and colour are seen apart. Form is how far a pixel is from the picture's median colour, one number a pixel, at the
pixels' own size; colour is averaged over each place, as it is and as it differs from the median. A form learned in one
colour is then known in every other, and no "cyan diamond" has to be met for both words to find it.

=======  =======================================
symbol   meaning
=======  =======================================
B, G     captions, pictures they are compared with
T, P     text positions, places
D        width of the vectors, all of length 1
=======  =======================================

Source: Radford et al., "Learning Transferable Visual Models From Natural Language Supervision", 2021, section 2.3 (the
symmetric loss, the learned temperature); Yao et al., "FILIP", 2021, section 3.1 (tokens that find their places);
Ramesh et al., "Zero-Shot Text-to-Image Generation", 2021, section 2.6 (samples re-ranked by such a model).
"""

import dataclasses
import itertools
import math
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from distopt.errors import SettingError

from .text import PAD

_PLACES = 8
"""Pictures are halved until they are at most this many places wide."""
_FAINT = 0.02
"""Distance from the median colour below which a place has no colour of its own."""
_LARGEST_SCALE = 100.0
"""The learned factor of the similarities stays below it, as in the source."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ContrastSettings:
    """The size of a contrastive model.

    Args:
        text_vocabulary: number of text tokens.
        text_length: T, text positions.
        size: side of the pictures in pixels.
        width: channels of the form after the first halving of the picture; the last ones are twice as many. Those of
            the colour are as many.
        features: D, a multiple of ``heads``.
        heads: of the attention between text tokens.
        sharpness: of the smooth maximum over places; infinity would be the hard one.

    Raises:
        SettingError: where a value is out of its range.
    """

    text_vocabulary: int
    text_length: int
    size: int
    width: int = 24
    features: int = 64
    heads: int = 4
    sharpness: float = 10.0

    def __post_init__(self) -> None:
        for name in ("text_vocabulary", "text_length", "size", "width", "features", "heads"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise SettingError(f"ContrastSettings.{name}", value, "an integer of at least 1")
        if self.features % self.heads:
            raise SettingError("ContrastSettings.features", self.features, f"a multiple of heads, {self.heads}")
        if not self.sharpness > 0:
            raise SettingError("ContrastSettings.sharpness", self.sharpness, "above 0")

    @property
    def halvings(self) -> int:
        """How often pictures are halved.

        Example:
            >>> ContrastSettings(text_vocabulary=9, text_length=4, size=24).halvings
            2
        """
        return max(1, math.ceil(math.log2(self.size / _PLACES)))


class ContrastLoss(NamedTuple):
    """What a batch costs: the mean loss a pair, and the share of captions that found their own picture."""

    total: Tensor
    right: Tensor


class Contrast(nn.Module):
    """A picture encoder, a text encoder and a temperature.

    Args:
        settings: the size.

    Example:
        >>> model = Contrast(ContrastSettings(text_vocabulary=9, text_length=4, size=24))
        >>> text = torch.tensor([[3, 1, PAD, PAD], [5, PAD, PAD, PAD]])
        >>> model.similarity(model.places(torch.rand(3, 3, 24, 24)), model.tokens(text)).shape
        torch.Size([2, 3])
    """

    def __init__(self, settings: ContrastSettings) -> None:
        super().__init__()
        self.settings = settings
        last, features = 2 * settings.width, settings.features
        self.stem = nn.Conv2d(1, settings.width // 2, 5, padding=2)
        channels = [settings.width // 2, *[settings.width] * (settings.halvings - 1), last]
        self.halvings = nn.ModuleList(_Halving(a, b) for a, b in itertools.pairwise(channels))
        side = settings.size
        for _ in range(settings.halvings):
            side = math.ceil(side / 2)
        self.position = nn.Parameter(0.1 * torch.randn(last, side, side))
        self.around = nn.ModuleList(_Around(last) for _ in range(2))
        self.colour = nn.Sequential(nn.Conv2d(6, settings.width, 1), nn.GELU(), nn.Conv2d(settings.width, last, 1))
        self.place_norm, self.place_out = nn.LayerNorm(2 * last), nn.Linear(2 * last, features)
        self.embedding = nn.Embedding(settings.text_vocabulary, features)
        self.text_position = nn.Parameter(0.1 * torch.randn(settings.text_length, features))
        nn.init.normal_(self.embedding.weight, std=0.5)
        self.between = nn.TransformerEncoderLayer(
            features, settings.heads, 4 * features, 0.0, "gelu", batch_first=True, norm_first=True
        )
        self.token_norm, self.token_out = nn.LayerNorm(features), nn.Linear(features, features)
        self.log_scale = nn.Parameter(torch.tensor(math.log(10.0)))

    def places(self, pictures: Tensor) -> Tensor:
        """Encode pictures.

        Args:
            pictures: ``(G, 3, size, size)`` float in [0, 1].

        Returns:
            ``(G, P, D)``, vectors of length 1.
        """
        differing = pictures - pictures.flatten(2).median(-1).values[..., None, None]
        distance = torch.linalg.vector_norm(differing, dim=1, keepdim=True)
        form = self.stem(distance)
        for halving in self.halvings:
            form = halving(form)
        form = form + self.position
        for block in self.around:
            form = block(form)
        # What a place differs by, whatever part of it does: the edge of a thing has the colour of its middle.
        side = form.shape[-2:]
        colour = F.adaptive_avg_pool2d(differing, side) / (F.adaptive_avg_pool2d(distance, side) + _FAINT)
        colour = torch.cat([colour, F.adaptive_avg_pool2d(pictures, side)], dim=1)
        hidden = torch.cat([form, self.colour(colour)], dim=1).flatten(2).transpose(1, 2)
        return F.normalize(self.place_out(self.place_norm(hidden)), dim=-1)

    def tokens(self, text: Tensor) -> Tensor:
        """Encode captions.

        Args:
            text: ``(B, T)`` int64 with ``PAD``.

        Returns:
            ``(B, T, D)``, vectors of length 1, and of length 0 where a pad stands.
        """
        said = text != PAD
        hidden = self.embedding(text.clamp(min=0)) + self.text_position
        # A caption without words would have nothing to attend to; what stands there counts for nothing in the end.
        silent = ~said & said.any(1, keepdim=True)
        hidden = self.between(hidden, src_key_padding_mask=silent)
        return F.normalize(self.token_out(self.token_norm(hidden)), dim=-1) * said.unsqueeze(-1)

    def similarity(self, places: Tensor, tokens: Tensor) -> Tensor:
        """Compare every caption with every picture.

        Args:
            places: ``(..., G, P, D)``, see ``places``.
            tokens: ``(..., B, T, D)``, see ``tokens``.

        Returns:
            ``(..., B, G)``: the sum over a caption's tokens of the smooth maximum over places.
        """
        shape = (tokens.shape[-3], tokens.shape[-2], places.shape[-3], places.shape[-2])
        inner = tokens.flatten(-3, -2) @ places.flatten(-3, -2).transpose(-1, -2)
        inner = inner.unflatten(-1, shape[2:]).unflatten(-3, shape[:2])
        sharp = self.settings.sharpness
        found = (torch.logsumexp(sharp * inner, -1) - math.log(shape[3])) / sharp
        return found.sum(-2)

    def forward(self, pictures: Tensor, text: Tensor, spoilt: Tensor) -> ContrastLoss:
        """Let pictures find their captions, and captions their pictures, within each group.

        Args:
            pictures: ``(N, G, 3, size, size)``, N groups.
            text: ``(N, G, T)``, the pictures' captions. Those that are equal are no wrong answers to each other.
            spoilt: ``(N, M, 3, size, size)``, the first M pictures of each group with something wrong about them, which
                no caption is to find. Those that are as they were are left out.

        Returns:
            The loss, and the share of captions whose best picture is their own.
        """
        groups, each = text.shape[:2]
        seen = torch.cat([pictures, spoilt], dim=1)
        places = self.places(seen.flatten(0, 1)).unflatten(0, (groups, -1))
        tokens = self.tokens(text.flatten(0, 1)).unflatten(0, (groups, each))
        logits = self.similarity(places, tokens) * self.log_scale.exp().clamp(max=_LARGEST_SCALE)
        whole = (spoilt == pictures[:, : spoilt.shape[1]]).flatten(2).all(2)
        wrong = logits[:, :, each:].masked_fill(whole.unsqueeze(1), -torch.inf)
        logits = logits[:, :, :each]
        same = (text.unsqueeze(1) == text.unsqueeze(2)).all(-1) & ~torch.eye(each, dtype=torch.bool, device=text.device)
        logits = logits.masked_fill(same, -torch.inf)
        own = torch.arange(each, device=text.device).expand(groups, each)
        # Dimension 1 are the captions that a picture chooses from; dimension 1 of the transposed, the pictures.
        choices = torch.cat([logits, wrong], dim=2).transpose(1, 2)
        total = (F.cross_entropy(logits, own) + F.cross_entropy(choices, own)) / 2
        return ContrastLoss(total, (choices.argmax(1) == own).float().mean())

    @torch.no_grad()
    def scores(self, pictures: Tensor, text: Tensor) -> Tensor:
        """How well each of several pictures fits its caption.

        Args:
            pictures: ``(B, G, 3, size, size)``, G pictures for each caption.
            text: ``(B, T)``.

        Returns:
            ``(B, G)``; higher fits better. Only scores under one caption can be compared.
        """
        places = self.places(pictures.flatten(0, 1)).unflatten(0, pictures.shape[:2])
        return self.similarity(places, self.tokens(text).unsqueeze(1)).squeeze(1)


class _Halving(nn.Module):
    """The maximum of 2 x 2, and a convolution of what is left."""

    def __init__(self, before: int, after: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(1, before)
        self.first = nn.Conv2d(before, after, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.first(F.gelu(self.norm(F.max_pool2d(x, 2, ceil_mode=True))))


class _Around(nn.Module):
    """A residual block: what is around a place."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(1, channels)
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + F.gelu(self.conv(self.norm(x)))
