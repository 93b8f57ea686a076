"""The arithmetic of AdamW: over lists of tensors where the moments are kept in full, block by block where they are not.

Source: Loshchilov and Hutter 2019 (arXiv:1711.05101), algorithm 2; the clipped variance: Ramesh et al. 2021
(arXiv:2102.12092), appendix B.2.
"""

from typing import Any, NamedTuple

# pyright: reportPrivateUsage=false, reportPrivateImportUsage=false
# torch._foreach_* is how torch's own optimizers work on lists, and has no public name.
import torch
from torch import Tensor

from distopt.optim.moments import Slot, Stored
from distopt.optim.pieces import Noise, in_memory_order, pieces


class Hyper(NamedTuple):
    """What the parameters of a group have in common."""

    lr: Any  # a float; a tensor only where steps are counted on the device
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    max_variance: float | None

    @classmethod
    def of(cls, group: dict[str, Any], *, counted: bool = False) -> "Hyper":
        """Read a parameter group; where steps are ``counted`` on the device, the learning rate may be there too."""
        lr = group["lr"] if counted else float(group["lr"])
        beta1, beta2 = group["betas"]
        return cls(lr, beta1, beta2, group["eps"], group["weight_decay"], group["max_variance"])


def widest(dtype: torch.dtype) -> torch.dtype:
    """What a parameter is updated in: its own precision, at least float32."""
    return torch.promote_types(dtype, torch.float32)


def update_lists(
    hyper: Hyper,
    parameters: list[Tensor],
    gradients: list[Tensor],
    means: list[Tensor],
    variances: list[Tensor],
    steps: list[float],
) -> None:
    """Update tensors of one device and dtype as ``torch.optim.AdamW(foreach=True)`` does, in the same operations.

    Args:
        hyper: of the group.
        parameters: changed in place; those of 16 bits are updated in float32 and rounded.
        gradients: one a parameter, of any floating dtype.
        means: of the parameters' precision, at least float32; changed in place.
        variances: as means.
        steps: of each parameter, this one included.
    """
    wide = means[0].dtype
    gradients = [gradient.to(wide) for gradient in gradients]
    targets = [parameter.to(wide) for parameter in parameters]
    if hyper.weight_decay:
        torch._foreach_mul_(targets, 1 - hyper.lr * hyper.weight_decay)
    torch._foreach_lerp_(means, gradients, 1 - hyper.beta1)
    torch._foreach_mul_(variances, hyper.beta2)
    torch._foreach_addcmul_(variances, gradients, gradients, 1 - hyper.beta2)
    if hyper.max_variance is not None:
        torch._foreach_clamp_max_(variances, hyper.max_variance)
    divisors = torch._foreach_sqrt(variances)
    torch._foreach_div_(divisors, [(1 - hyper.beta2**step) ** 0.5 for step in steps])
    torch._foreach_add_(divisors, hyper.eps)
    torch._foreach_addcdiv_(targets, means, divisors, [-(hyper.lr / (1 - hyper.beta1**step)) for step in steps])
    if targets[0].dtype != parameters[0].dtype:
        torch._foreach_copy_(parameters, targets)


def update_blocks(
    hyper: Hyper,
    parameter: Tensor,
    gradient: Tensor,
    moments: tuple[Stored, Stored],
    step: float,
    key: tuple[int, int],
) -> None:
    """Update one parameter whose moments are kept in 16 bits.

    All arithmetic is in float32. The update uses the moments before they are rounded.

    Args:
        hyper: of the group.
        parameter: changed in place.
        gradient: of any floating dtype.
        moments: mean and variance; changed in place.
        step: of the parameter, this one included.
        key: seed and number of the parameter, which with the step decide the rounding.
    """
    layout = moments[0].codes
    flat = in_memory_order(parameter.detach(), layout)
    gradients = in_memory_order(gradient, layout)
    mean_codes, variance_codes = (in_memory_order(each.codes, layout) for each in moments)
    mean_noise, variance_noise = (Noise(*key, int(step), moment) for moment in ("mean", "variance"))
    for piece in pieces(flat.numel(), flat.device):
        first = Slot(moments[0], mean_codes, mean_noise, piece)
        second = Slot(moments[1], variance_codes, variance_noise, piece)
        update = piece.of(gradients).to(torch.float32)
        mean = first.load(hyper.beta1).add_(update, alpha=1 - hyper.beta1)
        variance = second.load(hyper.beta2).addcmul_(update, update, value=1 - hyper.beta2)
        if hyper.max_variance is not None:
            variance.clamp_max_(hyper.max_variance)
        _apply(hyper, piece.of(flat), mean, variance, step)
        first.store(mean)
        second.store(variance)
    if flat.data_ptr() != parameter.data_ptr():  # memory with gaps was copied
        parameter.copy_(flat.as_strided(layout.shape, layout.stride()))


def _apply(hyper: Hyper, parameter: Tensor, mean: Tensor, variance: Tensor, step: float) -> None:
    """Move a piece of a parameter."""
    root = (1 - hyper.beta2**step) ** 0.5
    # sqrt(v / root**2) + eps, times root, which goes into the factor
    divisor = variance.sqrt().add_(hyper.eps * root)
    target = parameter.to(widest(parameter.dtype))
    if hyper.weight_decay:
        target.mul_(1 - hyper.lr * hyper.weight_decay)
    target.addcdiv_(mean.to(target.dtype), divisor.to(target.dtype), value=-hyper.lr * root / (1 - hyper.beta1**step))
    if target.dtype != parameter.dtype:
        parameter.copy_(target)
