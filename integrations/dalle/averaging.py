"""Averaged weights, in the pieces that a rank has of them."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from distopt.attach.shards import piece_of


class Averaged:
    """A running average of a module's weights. Of a sharded module every rank keeps its own pieces.

    Buffers are no weights: those of the averaged module are the last ones.

    Args:
        module: whose weights are averaged, after it was sharded; they are where the average starts.

    Example:
        >>> module = nn.Linear(2, 1, bias=False)
        >>> averaged = Averaged(module)
        >>> _ = module.weight.data.fill_(4.0)
        >>> averaged.move(1.0)
        >>> averaged.write(nn.Linear(2, 1, bias=False)).weight.tolist()
        [[4.0, 4.0]]
    """

    def __init__(self, module: nn.Module) -> None:
        self._parameters = list(module.parameters())
        self._buffers = list(module.buffers())
        self._means = [piece_of(parameter.detach()).clone() for parameter in self._parameters]

    @torch.no_grad()
    def move(self, weight: float) -> None:
        """Move the average towards the present weights, by ``weight`` of the way."""
        for mean, parameter in zip(self._means, self._parameters, strict=True):
            mean.lerp_(piece_of(parameter.detach()), weight)

    def state_dict(self) -> dict[str, Tensor]:
        """The averages by place, sharded like the parameters, for a checkpoint."""
        pairs = zip(self._means, self._parameters, strict=True)
        return {str(place): _like(mean, parameter) for place, (mean, parameter) in enumerate(pairs)}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """From a checkpoint of the same module, sharded in any way."""
        for place, mean in enumerate(self._means):
            mean.copy_(piece_of(state[str(place)]))

    @torch.no_grad()
    def write(self, module: nn.Module) -> nn.Module:
        """Write the average into a module of the same parameters, whole. Collective if the averaged one is sharded.

        Args:
            module: one without memory is given some, where the averaged one is.

        Returns:
            ``module``, not to be trained any more, in eval mode.
        """
        if next(module.parameters()).is_meta:
            module.to_empty(device=self._means[0].device)
        for written, mean, like in zip(module.parameters(), self._means, self._parameters, strict=True):
            written.copy_(_whole(mean, like))
        for written, last in zip(module.buffers(), self._buffers, strict=True):
            written.copy_(last)
        return module.requires_grad_(False).eval()


def _like(piece: Tensor, parameter: nn.Parameter) -> Tensor:
    """A piece as a part of what the parameter is a part of."""
    weights = parameter.detach()
    if not isinstance(weights, DTensor):
        return piece
    mesh, placements = weights.device_mesh, weights.placements
    return DTensor.from_local(piece, mesh, placements, shape=weights.shape, stride=weights.stride())


def _whole(piece: Tensor, parameter: nn.Parameter) -> Tensor:
    tensor = _like(piece, parameter)
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
