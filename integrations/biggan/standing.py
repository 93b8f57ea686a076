"""Standing statistics: what batch norms are to use when single pictures are drawn.

Running statistics follow a network that changes, under untruncated noise. The averaged network has had none of its own,
and truncated noise has others. So they are measured anew: passes in which batch norms alone are in training mode,
averaged. ``torch.optim.swa_utils.update_bn`` puts the whole model in training mode, in which spectral norms move on,
too.
"""

from collections.abc import Callable

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm  # pyright: ignore[reportPrivateUsage]

from distopt.errors import SettingError


@torch.no_grad()
def measure_statistics(model: nn.Module, draw: Callable[[], object], passes: int = 100) -> nn.Module:
    """Set the statistics of every batch norm to their mean over some passes; the model is in eval mode afterwards.

    Args:
        model: any with batch norms that track statistics; without, it is just put in eval mode.
        draw: runs the model once, on the noise that it will be sampled with.
        passes: how often, at least 1.

    Returns:
        ``model``.

    Raises:
        SettingError: there are no passes, or they meet no batch norm: statistics would be none.

    Example:
        >>> model = nn.Sequential(nn.BatchNorm1d(1))
        >>> batches = iter([torch.tensor([[1.0], [3.0]]), torch.tensor([[4.0], [8.0]])])
        >>> _ = measure_statistics(model, lambda: model(next(batches)), passes=2)
        >>> model[0].running_mean.item(), model[0].running_var.item()
        (4.0, 5.0)

    Source: Brock et al. 2019 (arXiv:1809.11096), appendix C.
    """
    if passes < 1:
        raise SettingError("passes", passes, "at least 1")
    model.eval()
    norms = [(m, m.momentum) for m in model.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
    for norm, _ in norms:
        norm.reset_running_stats()
        norm.momentum = None  # a plain mean over all passes
        norm.train()
    try:
        for _ in range(passes if norms else 0):
            draw()
    finally:
        for norm, momentum in norms:
            norm.momentum = momentum
            norm.eval()
    if norms and all(norm.num_batches_tracked == 0 for norm, _ in norms):
        raise SettingError("draw", "a function that meets no batch norm of the model", "one that runs the model")
    return model
