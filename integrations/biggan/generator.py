"""The generator, from noise and a class to a picture: BigGAN's with hierarchical noise, and BigGAN-deep's."""

import torch
from torch import Tensor, nn

from .layers import ConditionalBatchNorm, SelfAttention, doubled, kernel
from .sizes import Sizes, check_sizes
from .spectral import normalise


class GeneratorBlock(nn.Module):
    """A residual block that doubles the resolution: two kernels of 3 x 3.

    Args:
        before: channels that come in.
        after: channels that go out.
        condition: width of the condition of its batch norms.
    """

    def __init__(self, before: int, after: int, condition: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList([ConditionalBatchNorm(before, condition), ConditionalBatchNorm(after, condition)])
        self.kernels = nn.ModuleList([kernel(before, after, 3), kernel(after, after, 3)])
        self.skip = kernel(before, after, 1)

    def forward(self, pictures: Tensor, condition: Tensor) -> Tensor:
        """``(n, before, H, W)`` to ``(n, after, 2H, 2W)``."""
        hidden = self.kernels[0](doubled(self.norms[0](pictures, condition).relu()))
        hidden = self.kernels[1](self.norms[1](hidden, condition).relu())
        return hidden + doubled(self.skip(pictures))


class DeepGeneratorBlock(nn.Module):
    """BigGAN-deep's block: a bottleneck of 1 x 1, 3 x 3, 3 x 3, 1 x 1, and a skip that drops channels.

    Args:
        before: channels that come in.
        after: channels that go out, not more.
        condition: width of the condition of its batch norms.
        doubles: whether the resolution is doubled.

    Source: Brock et al. 2019 (arXiv:1809.11096), appendix B.2.
    """

    def __init__(self, before: int, after: int, condition: int, *, doubles: bool) -> None:
        super().__init__()
        narrow = max(1, before // 4)
        self.norms = nn.ModuleList(ConditionalBatchNorm(width, condition) for width in (before, narrow, narrow, narrow))
        self.kernels = nn.ModuleList(
            [kernel(before, narrow, 1), kernel(narrow, narrow, 3), kernel(narrow, narrow, 3), kernel(narrow, after, 1)]
        )
        self.after, self.doubles = after, doubles

    def forward(self, pictures: Tensor, condition: Tensor) -> Tensor:
        """``(n, before, H, W)`` to ``(n, after, H, W)``, or twice as high and wide."""
        hidden, kept = pictures, pictures[:, : self.after]
        for place, (norm, convolution) in enumerate(zip(self.norms, self.kernels, strict=True)):
            hidden = norm(hidden, condition).relu()
            hidden = convolution(doubled(hidden) if self.doubles and place == 1 else hidden)
        return hidden + (doubled(kept) if self.doubles else kept)


class Generator(nn.Module):
    """Noise and classes to pictures in [-1, 1], all weights but the classes' embedding spectrally normalised.

    The embedding of the class is shared by all conditional batch norms. Of the noise, the hierarchical generator gives
    each block a chunk of its own, and the deep one gives every block the whole.

    Args:
        sizes: of the pictures and the networks.

    Raises:
        SettingError: the sizes do not fit together.

    Example:
        >>> generator = Generator(Sizes(classes=6, size=16, width=16))
        >>> noise, classes = torch.randn(2, generator.sizes.noise), torch.tensor([0, 5])
        >>> generator(noise, classes).shape
        torch.Size([2, 3, 16, 16])

    Source: Brock et al. 2019 (arXiv:1809.11096), appendix B.
    """

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        check_sizes(sizes)
        self.sizes = sizes
        deep = sizes.kind == "deep"
        self.chunks = 1 if deep else 1 + sizes.levels
        chunk = sizes.noise // self.chunks
        condition = sizes.shared + chunk
        self.classes = nn.Embedding(sizes.classes, sizes.shared)
        self.first = nn.Linear(condition if deep else chunk, sizes.channels(4) * 16)
        self.blocks, self.attention = nn.ModuleList(), nn.ModuleDict()
        for side in (4 << level for level in range(sizes.levels)):
            before, after = sizes.channels(side), sizes.channels(2 * side)
            if deep:
                self.blocks.append(DeepGeneratorBlock(before, before, condition, doubles=False))
                self.blocks.append(DeepGeneratorBlock(before, after, condition, doubles=True))
            else:
                self.blocks.append(GeneratorBlock(before, after, condition))
            if 2 * side == sizes.attention:
                self.attention[str(len(self.blocks) - 1)] = SelfAttention(after)
        self.norm = nn.BatchNorm2d(sizes.width, eps=1e-4)
        self.last = kernel(sizes.width, 3, 3)
        for part in (self.first, self.blocks, self.attention, self.last):
            normalise(part)

    def forward(self, noise: Tensor, classes: Tensor) -> Tensor:
        """Draw one picture of each class.

        Args:
            noise: ``(n, sizes.noise)``.
            classes: int64 ``(n,)``.

        Returns:
            ``(n, 3, size, size)`` in [-1, 1].
        """
        shared = self.classes(classes)
        chunks = noise.chunk(self.chunks, dim=1)
        conditions = [torch.cat([shared, chunk], dim=1) for chunk in chunks]
        hidden = self.first(conditions[0] if self.chunks == 1 else chunks[0])
        hidden = hidden.unflatten(1, (-1, 4, 4))
        for place, block in enumerate(self.blocks):
            hidden = block(hidden, conditions[0] if self.chunks == 1 else conditions[1 + place])
            if str(place) in self.attention:
                hidden = self.attention[str(place)](hidden)
        return self.last(self.norm(hidden).relu()).tanh()
