"""The arithmetic of AdamW in Triton's edition: few launches for all parameters, whatever their number."""

import functools
import hashlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from distopt.kernels.choice import chosen
from distopt.optim.pieces import in_memory_order
from distopt.optim.state import MOMENTS, piece_of
from distopt.optim.update import Hyper

_FORMS = {
    torch.int16: ("1-6-9", "0-6-10"),
    torch.bfloat16: ("bfloat16", "bfloat16"),
    torch.float32: ("float32", "float32"),
}
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Work(NamedTuple):
    """A parameter to be updated.

    Args:
        parameter: changed in place.
        gradient: of its shape.
        state: its moments, with their scales, and its step, this one included.
        number: which with the seed and the step decides the rounding.
    """

    parameter: Tensor
    gradient: Tensor
    state: dict[str, Any]
    number: int


def fits(parameter: Tensor, gradient: Tensor) -> bool:
    """Whether Triton's edition updates a parameter.

    Example:
        >>> fits(torch.ones(2), torch.ones(2))
        False
    """
    return chosen(parameter.device) and parameter.dtype in _DTYPES and gradient.dtype in _DTYPES


class Launches:
    """Updates parameters as `distopt.optim.update` does, and keeps the tables of where they are.

    Rounding draws from another generator than on the CPU, so that codes differ by a unit in the last place; and sums of
    products are rounded once. Equal runs are equal bit for bit.
    """

    def __init__(self) -> None:
        self._tables: dict[tuple[Any, ...], Any] = {}

    def step(
        self,
        group: int,
        hyper: Hyper,
        works: Sequence[Work],
        seed: int,
        *,
        counted: bool = False,
        held: Tensor | None = None,
    ) -> None:
        """Update parameters of one group, which have what is set there in common.

        Args:
            group: tells it from other groups.
            hyper: its settings.
            works: in the same order at every step; of any devices and of all dtypes that `fits` takes.
            seed: of the rounding.
            counted: whether steps are tensors on the parameters' device, which the host does not read.
            held: with them: one number, also there; nothing is updated unless it is 0.
        """
        kinds: dict[tuple[Any, ...], list[Work]] = {}
        for work in works:
            if work.parameter.numel():
                step = None if counted else work.state["step"].item()
                kinds.setdefault((step, *_kind(work)), []).append(work)
        for place, ((step, *kind), members) in enumerate(kinds.items()):
            # Not the step itself, which never comes again.
            self._launch((group, place, *kind), hyper, members, step, seed, held)

    def _launch(
        self,
        key: tuple[Any, ...],
        hyper: Hyper,
        works: list[Work],
        step: float | None,
        seed: int,
        held: Tensor | None,
    ) -> None:
        from distopt.kernels import adamw

        table = self._tables.setdefault(key, adamw.Table())
        members = [_member(work) for work in works]
        held = None if held is None else held.to(members[0].parameter.device)
        counted = None if step is not None else adamw.Counted(_numbers(hyper, works), held)
        with torch.cuda.device_of(members[0].parameter):
            forms, factors = _FORMS[members[0].mean.dtype], _factors(hyper, step)
            adamw.step(table, members, forms, factors, _key(seed), counted)
        for work, member in zip(works, members, strict=True):
            if member.parameter.data_ptr() != work.parameter.data_ptr():  # memory with gaps was copied
                layout = piece_of(work.state["exp_avg"])
                work.parameter.copy_(member.parameter.as_strided(layout.shape, layout.stride()))


def _kind(work: Work) -> tuple[Any, ...]:
    """What the parameters of a launch have in common but for the step: what the kernel is compiled for."""
    dtypes = work.parameter.dtype, work.gradient.dtype, work.state["exp_avg"].dtype
    aligned = all(each.data_ptr() % 16 == 0 for each in (work.parameter, work.gradient))
    return work.parameter.device, *dtypes, aligned


def _member(work: Work) -> Any:
    from distopt.kernels.adamw import Member

    layout = piece_of(work.state["exp_avg"])
    tensors = (work.parameter.detach(), work.gradient, layout, piece_of(work.state["exp_avg_sq"]))
    # Of a regular part of a larger tensor, the view has gaps.
    parameter, gradient, mean, variance = (in_memory_order(each, layout).contiguous() for each in tensors)
    scales = (work.state.get(name + "_scales", layout) for name in MOMENTS)
    return Member(parameter, gradient, mean, variance, *scales, number=work.number)


@functools.cache
def _key(seed: int) -> int:
    """63 bits, of which near seeds have nothing in common."""
    return int.from_bytes(hashlib.sha256(repr(seed).encode()).digest()[:8], "little") >> 1


def _factors(hyper: Hyper, step: float | None) -> Any:
    """What all parameters have in common; ``None``: what depends on the step is not for the host to know."""
    from distopt.kernels.adamw import Factors

    varying = (0, 0.0, 0.0, 0.0) if step is None else (int(step), *_of_step(hyper, float(hyper.lr), step))
    most = float("inf") if hyper.max_variance is None else hyper.max_variance
    return Factors(*varying, hyper.beta1, 1 - hyper.beta1, hyper.beta2, 1 - hyper.beta2, most)


def _numbers(hyper: Hyper, works: Sequence[Work]) -> Tensor:
    """The same that `_factors` has first, a row a parameter, computed on the device as the host would."""
    steps = torch.stack([work.state["step"] for work in works]).double()
    there = isinstance(hyper.lr, Tensor) and hyper.lr.device == steps.device
    lr = hyper.lr.double() if there else float(hyper.lr)
    return torch.stack([steps, *(torch.zeros_like(steps) + each for each in _of_step(hyper, lr, steps))], 1).float()


def _of_step(hyper: Hyper, lr: Any, step: Any) -> tuple[Any, Any, Any]:
    """What decays, and eps and the learning rate with the corrections of both moments' biases."""
    root = (1 - hyper.beta2**step) ** 0.5
    return 1 - lr * hyper.weight_decay, hyper.eps * root, -lr * root / (1 - hyper.beta1**step)
