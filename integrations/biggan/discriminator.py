"""The discriminator: from a picture and a class to a score, by projection."""

import torch
from torch import Tensor, nn

from .deviation import with_deviation
from .layers import SelfAttention, halved, kernel
from .sizes import Sizes, check_sizes
from .spectral import normalise


class DiscriminatorBlock(nn.Module):
    """A residual block of two kernels of 3 x 3.

    Args:
        before: channels that come in.
        after: channels that go out.
        first: whether it looks at the picture itself, which is not to be rectified.
        halves: whether the resolution is halved.
    """

    def __init__(self, before: int, after: int, *, first: bool = False, halves: bool = True) -> None:
        super().__init__()
        self.kernels = nn.ModuleList([kernel(before, after, 3), kernel(after, after, 3)])
        self.skip = kernel(before, after, 1) if halves or before != after else nn.Identity()
        self.first, self.halves = first, halves

    def forward(self, pictures: Tensor) -> Tensor:
        """``(n, before, H, W)`` to ``(n, after, H, W)``, or half as high and wide."""
        hidden = self.kernels[0](pictures if self.first else pictures.relu())
        hidden, kept = self.kernels[1](hidden.relu()), self.skip(pictures)
        return halved(hidden + kept) if self.halves else hidden + kept


class DeepDiscriminatorBlock(nn.Module):
    """BigGAN-deep's block: a bottleneck; the skip keeps all channels, and a kernel of 1 x 1 makes those that are new.

    Args:
        before: channels that come in.
        after: channels that go out, not fewer.
        halves: whether the resolution is halved.

    Source: Brock et al. 2019 (arXiv:1809.11096), appendix B.2.
    """

    def __init__(self, before: int, after: int, *, halves: bool) -> None:
        super().__init__()
        narrow = max(1, after // 4)
        self.kernels = nn.ModuleList(
            [kernel(before, narrow, 1), kernel(narrow, narrow, 3), kernel(narrow, narrow, 3), kernel(narrow, after, 1)]
        )
        self.more = kernel(before, after - before, 1) if after > before else None
        self.halves = halves

    def forward(self, pictures: Tensor) -> Tensor:
        """``(n, before, H, W)`` to ``(n, after, H, W)``, or half as high and wide."""
        hidden = pictures
        for place, convolution in enumerate(self.kernels):
            hidden = hidden.relu()
            hidden = convolution(halved(hidden) if self.halves and place == 3 else hidden)
        kept = halved(pictures) if self.halves else pictures
        return hidden + (kept if self.more is None else torch.cat([kept, self.more(kept)], dim=1))


class Discriminator(nn.Module):
    """Pictures and classes to scores ``psi(phi(x)) + <embedding(y), phi(x)>``; all weights spectrally normalised.

    Args:
        sizes: of the pictures and the networks.
        group: pictures of which the last block sees how much those of a class differ, see `deviation`; 0 for none.

    Raises:
        SettingError: the sizes do not fit together, or pictures are not whole groups.

    Example:
        >>> discriminator = Discriminator(Sizes(classes=6, size=16, width=16))
        >>> discriminator(torch.rand(2, 3, 16, 16), torch.tensor([0, 5])).shape
        torch.Size([2])

    Source: Miyato and Koyama 2018 (arXiv:1802.05637), equation 4; Brock et al. 2019 (arXiv:1809.11096), appendix B.
    """

    def __init__(self, sizes: Sizes, group: int = 0) -> None:
        super().__init__()
        check_sizes(sizes)
        self.sizes, self.group = sizes, group
        deep = sizes.kind == "deep"
        self.blocks, self.attention = nn.ModuleList(), nn.ModuleDict()
        # A deep block keeps the channels that come in, so there a kernel makes more of the picture's three first.
        self.first = kernel(3, sizes.width, 3) if deep else nn.Identity()
        before, side = (sizes.width if deep else 3), sizes.size
        more = 1 if group else 0
        features = sizes.channels(4) + (more if deep else 0)
        while side > 4:
            after = sizes.channels(side // 2) if deep else sizes.channels(side)
            if deep:
                self.blocks.append(DeepDiscriminatorBlock(before, after, halves=True))
                width = features if side == 8 else after
                self.blocks.append(DeepDiscriminatorBlock(width, width, halves=False))
            else:
                self.blocks.append(DiscriminatorBlock(before, after, first=side == sizes.size))
            before, side = after, side // 2
            if side == sizes.attention:
                self.attention[str(len(self.blocks) - 1)] = SelfAttention(after)
        if not deep:
            self.blocks.append(DiscriminatorBlock(before + more, features, halves=False))
        self.score = nn.Linear(features, 1)
        self.classes = nn.Embedding(sizes.classes, features)
        normalise(self)

    def forward(self, pictures: Tensor, classes: Tensor) -> Tensor:
        """Score pictures.

        Args:
            pictures: ``(n, 3, size, size)`` in [-1, 1], n a multiple of the group.
            classes: int64 ``(n,)``.

        Returns:
            ``(n,)``, high for real ones.
        """
        hidden = self.first(pictures)
        for place, block in enumerate(self.blocks):
            if self.group and place == len(self.blocks) - 1:
                hidden = with_deviation(hidden, self.group, classes)
            hidden = block(hidden)
            if str(place) in self.attention:
                hidden = self.attention[str(place)](hidden)
        features = hidden.relu().sum((2, 3))
        return self.score(features).squeeze(1) + (self.classes(classes) * features).sum(1)
