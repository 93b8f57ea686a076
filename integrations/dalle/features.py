"""Features of pictures for the Frechet distance: of a network that the user names, or of the contrastive model."""

import importlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .contrast import Contrast
from .metrics import Moments, frechet_distance
from .settings import InputError

_BATCH = 64


@dataclass(frozen=True)
class Features:
    """A network that gives features, and what the distance of its features is called.

    Args:
        label: "FID" if the name of the network says Inception, for that is what FID means; else "Frechet distance",
            with the name of the network.
        network: pictures ``(B, 3, H, W)`` in [0, 1] to features ``(B, D)``; in eval mode, on its device.
        device: where the pictures go.
    """

    label: str
    network: Callable[[Tensor], Tensor]
    device: torch.device

    @torch.no_grad()
    def moments(self, pictures: Tensor) -> Moments:
        """Mean and covariance of the features of pictures ``(B, 3, H, W)`` in [0, 1]."""
        moments = Moments()
        for part in pictures.split(_BATCH):
            moments.add(self.network(part.to(self.device)))
        return moments

    def distance(self, pictures: Tensor, others: Tensor) -> float:
        """Frechet distance of two sets of pictures, each ``(B, 3, H, W)`` in [0, 1]."""
        return frechet_distance(self.moments(pictures), self.moments(others))


def named_features(name: str, size: int, device: torch.device) -> Features:
    """Import what the user named, and try it on two pictures.

    Args:
        name: ``package.module:factory``; the factory takes no arguments and gives an ``nn.Module``.
        size: side of the pictures.
        device: where to compute.

    Raises:
        InputError: there is no such thing, or it does not give ``(B, D)``; the message is one line.
    """
    module, colon, factory = name.partition(":")
    if not (module and colon and factory):
        raise InputError(f"--features {name}: must be package.module:factory")
    try:
        network = getattr(importlib.import_module(module), factory)()
        if not isinstance(network, nn.Module):
            raise TypeError(f"{factory} gives a {type(network).__name__}, not a torch.nn.Module")
        network = network.to(device).eval()
        with torch.no_grad():
            found = network(torch.rand(2, 3, size, size, device=device))
        if not isinstance(found, Tensor) or found.ndim != 2 or len(found) != 2:
            shape = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
            raise TypeError(f"it gives {shape} for two pictures, not (2, D)")
    except Exception as error:  # whatever the user's own code raises
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise InputError(f"--features {name}: {reason}") from error
    kind = f"{factory} {type(network).__name__}"
    label = "FID" if "inception" in kind.lower() else f"Frechet distance ({factory})"
    return Features(label, network, device)


def contrast_features(contrast: Contrast) -> Features:
    """The mean of what the contrastive model sees in all places."""
    device = contrast.log_scale.device
    return Features("Frechet distance (contrast)", lambda pictures: contrast.places(pictures).mean(1), device)
