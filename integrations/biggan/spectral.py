"""Spectral normalisation of every weight, with one power iteration an optimizer step, however often forward runs.

The normalisation is torch's own: ``W / sigma`` with ``sigma = u^T W v``. Its vectors u and v are buffers that each
forward pass in training mode moves on. In a GAN that is too often: the discriminator judges for both networks, and
micro-batches of one step would see different weights, so that their sum would not be the gradient of one big batch.
`held` stops that.

u and v are functions of their start and of the weights, so replicas with equal weights keep equal vectors: DDP need not
broadcast them before forward (``forward_sync_buffers=False``), if they are equal where it wraps the model.

Source: Miyato et al. 2018 (arXiv:1802.05957), algorithm 1; Brock et al. 2019 (arXiv:1809.11096), appendix C.
"""

import contextlib
from collections.abc import Generator, Iterator

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

from distopt.errors import SettingError

_NORMALISED = (
    nn.Linear,
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
    nn.Embedding,
)
_EPSILON = 1e-6


def normalise(model: nn.Module) -> nn.Module:
    """Give every linear, convolutional and embedding weight of a model spectral norm 1, in place.

    Args:
        model: weights that are normalised already are left as they are.

    Returns:
        ``model``. A weight's own numbers are now called ``parametrizations.weight.original``.

    Raises:
        SettingError: a weight is computed by one of torch's older normalisations, which `held` cannot hold.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> critic = normalise(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 1)))
        >>> settle(critic)
        >>> [round(torch.linalg.matrix_norm(layer.weight, 2).item(), 4) for layer in (critic[0], critic[2])]
        [1.0, 1.0]
    """
    for name, module in list(model.named_modules()):
        if not isinstance(module, _NORMALISED):
            continue
        if parametrize.is_parametrized(module, "weight"):
            if any(isinstance(each, parametrizations._SpectralNorm) for each in module.parametrizations["weight"]):
                continue
        elif "weight" not in dict(module.named_parameters(recurse=False)):
            older = f"the normalisation of {name or type(module).__name__}"
            raise SettingError(older, "one of torch.nn.utils", "one of torch.nn.utils.parametrizations, or none")
        parametrizations.spectral_norm(module, eps=_EPSILON)
    return model


@contextlib.contextmanager
def held(model: nn.Module) -> Generator[None]:
    """Leave u and v as they are inside, in training mode too; gradients are the same functions of the weights.

    Example:
        >>> layer = normalise(nn.Linear(3, 3))
        >>> with held(layer):
        ...     bool((layer.weight == layer.weight).all())
        True
    """
    norms = [(norm, norm.training) for norm in _norms(model)]
    for norm, _ in norms:
        norm.training = False
    try:
        yield
    finally:
        for norm, training in norms:
            norm.training = training


@torch.no_grad()
def settle(model: nn.Module, iterations: int = 50) -> None:
    """Let u and v of every weight converge, for weights that were put there from elsewhere, averaged ones for example.

    Args:
        model: normalised by ``torch.nn.utils.parametrizations.spectral_norm``; training mode and weights stay.
        iterations: power iterations.
    """
    norms = {id(norm): norm for norm in _norms(model)}
    for module in model.modules():
        if isinstance(module, parametrize.ParametrizationList):
            own = [(norms[id(each)], each.training) for each in module if id(each) in norms]
            for norm, _ in own:
                norm.train()
            for _ in range(iterations if own else 0):
                module()
            for norm, training in own:
                norm.train(training)


def weights(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The trained matrices and kernels of a model by their plain names; of normalised weights what is trained.

    Returns:
        Name and parameter, of two dimensions or more.

    Example:
        >>> [name for name, _ in weights(normalise(nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))))]
        ['0.weight']
    """
    for name, parameter in model.named_parameters():
        if parameter.dim() >= 2:
            yield plain_name(name), parameter


def plain_name(name: str) -> str:
    """A parameter's name without what normalisation puts into it.

    Example:
        >>> plain_name("blocks.0.first.parametrizations.weight.original")
        'blocks.0.first.weight'
    """
    return name.replace("parametrizations.", "").removesuffix(".original")


def _norms(model: nn.Module) -> list[nn.Module]:
    return [m for m in model.modules() if isinstance(m, parametrizations._SpectralNorm)]
