"""Gradients that are added straight into the residuals, so that backward leaves one buffer a parameter, not two.

Source: Ramesh et al. 2021 (arXiv:2102.12092), appendix E.2: gradients are accumulated in the error buffer.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from distopt.attach.engine import Engine
from distopt.attach.gradients import GradientsAttachment
from distopt.errors import RegistrationError
from distopt.numerics.storage import unpack
from distopt.reducers.memory import working_dtype
from distopt.reducers.reducer import Reducer, Slot


class AccumulatingAttachment(GradientsAttachment):
    """Takes each gradient as soon as it is there, and frees ``.grad``.

    A gradient that is not finite is not taken. All ranks drop the step then, and what was taken in it waits for the
    next one.

    Args:
        engine: carries out the steps.
    """

    fused = True

    def __init__(self, engine: Engine) -> None:
        super().__init__(engine)
        self._taken: dict[str, Slot] = {}
        self._sound: Tensor | None = None
        for slot in engine.slots.values():
            if slot.parameter.requires_grad and slot.parameter.is_floating_point():
                slot.parameter.register_post_accumulate_grad_hook(self._taker(slot))

    def reduce(self) -> bool:
        """See `Registration.reduce`."""
        sound = self._sound is None or bool(self._sound)
        residuals = self._engine.state.residuals
        for name, slot in self._taken.items():
            parameter = slot.parameter
            if not sound:
                parameter.grad = torch.full_like(parameter, float("nan"))
            elif working_dtype(slot) == parameter.dtype:
                parameter.grad = unpack(residuals.pop(name), parameter.dtype)
            else:  # the residual is wider, and is added to this by whoever compresses it
                parameter.grad = torch.zeros_like(parameter)
        try:
            return super().reduce()
        finally:
            self._taken.clear()
            self._sound = None

    def _drop(self, slots: Sequence[Slot]) -> None:
        """Take back what was handed over, before it is spoilt."""
        for slot in slots:
            gradient = slot.parameter.grad
            if slot.name in self._taken and slot.name not in self._engine.state.residuals and gradient is not None:
                self._engine.state.residuals[slot.name] = gradient
                slot.parameter.grad = torch.empty_like(gradient)
        super()._drop(slots)

    def _taker(self, slot: Slot) -> Callable[[Tensor], None]:
        def take(parameter: Tensor) -> None:
            gradient, parameter.grad = parameter.grad, None
            assert gradient is not None
            if gradient.is_sparse:
                raise RegistrationError(f"the gradient of {slot.name!r} is sparse, which cannot be reduced")
            if not self._taken:
                self._engine.follow_scales()
            self._taken[slot.name] = slot
            # No question is asked of the device here, which would have to finish its work to answer.
            finite = torch.isfinite(gradient).all()
            self._sound = finite if self._sound is None else self._sound & finite.to(self._sound.device)
            wide = gradient.masked_fill_(~finite, 0.0).to(working_dtype(slot))
            kept = self._engine.state.residuals.get(slot.name)
            self._engine.state.residuals[slot.name] = wide if kept is None else unpack(kept, wide.dtype).add_(wide)

        return take


def check_fusible(reducer: Reducer, world_size: int) -> None:
    """Refuse a reducer that writes to gradients before the step is known to be sound.

    Raises:
        RegistrationError: if ranks share the parameters between them, as in `Hierarchical`.
    """
    if reducer.parts(world_size):
        raise RegistrationError(f"accumulate=True needs every rank to keep every residual, unlike {reducer!r}")
