"""The paper's discrete VAE: encoder and decoder as published, at any size (Ramesh et al. 2021, arXiv:2102.12092, A.2).

Both networks are stacks of groups of residual blocks without any normalisation. The encoder halves the side by
max-pooling between groups and doubles the width; the decoder doubles the side by repeating pixels and halves the width.

=============  ====================================================  ===================================================
at full size   encoder, 53.8 million parameters                      decoder, 43.8 million
=============  ====================================================  ===================================================
input          7 x 7, 3 to 256                                       **1 x 1, 8192 to 128**: the codebook
group_1        2 blocks of 256, max-pool                             2 blocks of 2048, repeat
group_2        2 blocks of 512, max-pool                             2 blocks of 1024, repeat
group_3        2 blocks of 1024, max-pool                            2 blocks of 512, repeat
group_4        2 blocks of 2048                                      2 blocks of 256
output         ReLU, **1 x 1, 2048 to 8192**: the logits             ReLU, 1 x 1, 256 to 6: means and log-widths
a block's f    3 x 3, 3 x 3, 3 x 3, 1 x 1, a ReLU before each        1 x 1, 3 x 3, 3 x 3, 3 x 3, a ReLU before each
=============  ====================================================  ===================================================

A block is ``x + f(x) / n**2``, where n counts the blocks of a network; inside it is a fourth as wide as its output.
Where the width changes, a 1 x 1 convolution takes the place of x. Weights start from N(0, 1 / fan-in), biases at zero.
In 16 bits the two bold layers stay in float32; they are the ones that meet the relaxation.

Names and shapes of the parameters are those of the published weights, so that these can be loaded (``published``).
"""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distopt.errors import SettingError

from .likelihood import squeezed
from .relaxed import RelaxedVAE, run_in

_ENCODER_KERNELS = (3, 3, 3, 1)
_DECODER_KERNELS = (1, 3, 3, 3)


@dataclass(frozen=True, kw_only=True)
class PaperDVAESettings:
    """The shape of the paper's dVAE; the defaults are the published one.

    Args:
        size: side S of the square RGB pictures, in pixels; a multiple of ``patch``.
        codes: K.
        n_hid: channels of the encoder's first group and of the decoder's last; a multiple of 4.
        n_init: channels of a codebook vector.
        groups: of residual blocks in each network; each but the last halves, or doubles, the side.
        blocks: residual blocks in a group.
        likelihood: "logit_laplace" (A.3), or "mse" (a Gaussian of fixed width).
        log_scale_floor: smallest log-width of the logit-Laplace; ``None``: none, for the paper tells of none.

    Raises:
        SettingError: a value out of its range.
    """

    size: int = 256
    codes: int = 8192
    n_hid: int = 256
    n_init: int = 128
    groups: int = 4
    blocks: int = 2
    likelihood: Literal["mse", "logit_laplace"] = "logit_laplace"
    log_scale_floor: float | None = None

    def __post_init__(self) -> None:
        for name in ("size", "n_hid", "n_init", "groups", "blocks"):
            if not isinstance(getattr(self, name), int) or getattr(self, name) < 1:
                raise SettingError(f"PaperDVAESettings.{name}", getattr(self, name), "an integer of at least 1")
        if self.n_hid % 4:
            raise SettingError("PaperDVAESettings.n_hid", self.n_hid, "a multiple of 4")
        if self.size % self.patch:
            raise SettingError("PaperDVAESettings.size", self.size, f"a multiple of the patch, {self.patch}")
        if not isinstance(self.codes, int) or self.codes < 2:
            raise SettingError("PaperDVAESettings.codes", self.codes, "an integer of at least 2")
        if self.likelihood not in ("mse", "logit_laplace"):
            raise SettingError("PaperDVAESettings.likelihood", self.likelihood, "'mse' or 'logit_laplace'")

    @property
    def patch(self) -> int:
        """Side of the pixels under one token."""
        return 2 ** (self.groups - 1)

    @property
    def grid(self) -> int:
        """Side g of the token grid."""
        return self.size // self.patch

    @property
    def tokens(self) -> int:
        """Tokens in a picture, g squared."""
        return self.grid**2


class Convolution(nn.Module):
    """A convolution with stride 1 that keeps the side; its parameters have the published names ``w`` and ``b``."""

    def __init__(self, inputs: int, outputs: int, kernel: int) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.empty(outputs, inputs, kernel, kernel))
        self.b = nn.Parameter(torch.zeros(outputs))
        self._padding = kernel // 2
        nn.init.normal_(self.w, std=(inputs * kernel**2) ** -0.5)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(B, inputs, h, w)`` to ``(B, outputs, h, w)``."""
        return F.conv2d(x, self.w, self.b, padding=self._padding)


class PaperBlock(nn.Module):
    """``x + post_gain f(x)``, with a 1 x 1 convolution in place of x where the width changes."""

    def __init__(self, inputs: int, outputs: int, kernels: Sequence[int], post_gain: float) -> None:
        super().__init__()
        self.post_gain = post_gain
        self.id_path = nn.Identity() if inputs == outputs else Convolution(inputs, outputs, 1)
        widths = (inputs, *(outputs // 4 for _ in kernels[1:]), outputs)
        path = OrderedDict[str, nn.Module]()
        for i, kernel in enumerate(kernels):
            path[f"relu_{i + 1}"] = nn.ReLU()
            path[f"conv_{i + 1}"] = Convolution(widths[i], widths[i + 1], kernel)
        self.res_path = nn.Sequential(path)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(B, inputs, h, w)`` to ``(B, outputs, h, w)``."""
        return self.id_path(x) + self.post_gain * self.res_path(x)


class Encoder(nn.Module):
    """From pictures, squeezed into [0.1, 0.9], to logits, or to what else has ``outputs`` channels."""

    def __init__(self, settings: PaperDVAESettings, outputs: int) -> None:
        super().__init__()
        s = settings
        widths = [s.n_hid * 2**i for i in range(s.groups)]
        groups = _groups(s.n_hid, widths, s.blocks, _ENCODER_KERNELS, ("pool", nn.MaxPool2d(2)))
        first, last = Convolution(3, s.n_hid, 7), Convolution(widths[-1], outputs, 1)
        self.blocks = nn.Sequential(OrderedDict([("input", first), *groups, ("output", _output(last))]))

    def forward(self, x: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Map ``(B, 3, S, S)`` to ``(B, outputs, g, g)``; all but the output runs in ``dtype``."""
        return self.blocks[-1](run_in(self.blocks[:-1], x, dtype))


class Decoder(nn.Module):
    """From weights of the codes, or what else has ``inputs`` channels, to the parameters of the likelihood."""

    def __init__(self, settings: PaperDVAESettings, inputs: int) -> None:
        super().__init__()
        s = settings
        widths = [s.n_hid * 2**i for i in reversed(range(s.groups))]
        groups = _groups(s.n_init, widths, s.blocks, _DECODER_KERNELS, ("upsample", nn.Upsample(scale_factor=2)))
        first = Convolution(inputs, s.n_init, 1)
        last = Convolution(s.n_hid, 6 if s.likelihood == "logit_laplace" else 3, 1)
        self.blocks = nn.Sequential(OrderedDict([("input", first), *groups, ("output", _output(last))]))

    def forward(self, z: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Map ``(B, inputs, g, g)`` to ``(B, 6 or 3, S, S)``; all but the input runs in ``dtype``."""
        return run_in(self.blocks[1:], self.blocks[0](z), dtype)


class PaperNetworks(nn.Module):
    """Encoder and decoder of this shape, for whatever stands between them.

    Args:
        settings: the shape.
        outputs: channels that the encoder ends with.
        inputs: channels that the decoder begins with.
    """

    def __init__(self, settings: PaperDVAESettings, outputs: int, inputs: int) -> None:
        super().__init__()
        self.settings = settings
        self.encoder, self.decoder = Encoder(settings, outputs), Decoder(settings, inputs)

    def encode(self, pictures: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Map ``(B, 3, S, S)`` in [0, 1] to ``(B, outputs, g, g)``; all but the last layer runs in ``dtype``."""
        return self.encoder(squeezed(pictures), dtype)

    def render(self, z: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Map ``(B, inputs, g, g)`` to the likelihood's parameters; all but the first layer runs in ``dtype``."""
        return self.decoder(z, dtype)

    def units(self) -> list[nn.Module]:
        """Their residual blocks, in the order in which they run."""
        return [module for module in self.modules() if isinstance(module, PaperBlock)]


class PaperDVAE(PaperNetworks, RelaxedVAE):
    """The paper's relaxed categorical VAE.

    Args:
        settings: its shape.

    Example:
        >>> dvae = PaperDVAE(PaperDVAESettings(size=16, codes=32, n_hid=8, n_init=4, groups=3, blocks=1))
        >>> tokens = dvae.tokenize(torch.rand(3, 3, 16, 16))
        >>> tokens.shape, dvae.decode(tokens).shape
        (torch.Size([3, 16]), torch.Size([3, 3, 16, 16]))
    """

    def __init__(self, settings: PaperDVAESettings) -> None:
        super().__init__(settings, settings.codes, settings.codes)


def _groups(
    inputs: int, widths: Sequence[int], blocks: int, kernels: Sequence[int], between: tuple[str, nn.Module]
) -> list[tuple[str, nn.Module]]:
    """Groups of residual blocks by name, with ``between`` at the end of each but the last."""
    post_gain = 1 / (len(widths) * blocks) ** 2
    groups: list[tuple[str, nn.Module]] = []
    for i, width in enumerate(widths):
        before = widths[i - 1] if i else inputs
        members = [
            (f"block_{j + 1}", PaperBlock(width if j else before, width, kernels, post_gain)) for j in range(blocks)
        ]
        last = [between] if i + 1 < len(widths) else []
        groups.append((f"group_{i + 1}", nn.Sequential(OrderedDict([*members, *last]))))
    return groups


def _output(convolution: Convolution) -> nn.Sequential:
    return nn.Sequential(OrderedDict([("relu", nn.ReLU()), ("conv", convolution)]))
