"""The one line: put a reducer to work on a model."""

from typing import cast

import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from distopt.attach.ddp import DDPAttachment
from distopt.attach.registration import Registration, Tally
from distopt.comm.communicator import Communicator
from distopt.errors import RegistrationError, SettingError
from distopt.reducers.reducer import Reducer, State

_REGISTRATION = "_distopt_registration"


def register(
    model_or_parameters: nn.Module, reducer: Reducer, *, process_group: dist.ProcessGroup | None = None
) -> Registration:
    """Let ``reducer`` average a model's gradients from now on. Collective: every rank calls it at the same point.

    It takes the place of DDP's own averaging, in the communication hook that DDP has for this; the training loop stays
    as it is. If a gradient is not finite on one rank, every gradient of that step becomes NaN on all ranks, and neither
    residuals nor factors change: a ``GradScaler``, or any check of the gradient's norm, then skips the same step on
    every rank, and the next one is as if it had not been.

    Args:
        model_or_parameters: a ``DistributedDataParallel`` model, before or after its first step.
        reducer: the settings, ``distopt.PowerSGD(rank=8)`` for example; the same on all ranks.
        process_group: whose ranks to average over; the model's own by default. The collectives run on a new group of
            the same ranks.

    Returns:
        The registration: statistics, and the state to save with the model.

    Raises:
        RegistrationError: if ``torch.distributed`` is not initialised, if the model is not DDP, has sparse gradients,
            or
            has a communication hook already.
        SettingError: if ``reducer`` is none, or asks something impossible of a parameter.

    Example:
        >>> import distopt
        >>> from torch.nn.parallel import DistributedDataParallel as DDP
        >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        >>> registration = distopt.register(DDP(nn.Linear(4, 4)), distopt.PowerSGD(rank=2))
        >>> registration.stats().steps
        0
        >>> dist.destroy_process_group()
    """
    model = model_or_parameters
    if not isinstance(cast(object, reducer), Reducer):
        raise SettingError("reducer", reducer, "a reducer such as distopt.PowerSGD(rank=4)")
    if not dist.is_initialized():
        raise RegistrationError(
            "torch.distributed is not initialised: call init_process_group and wrap the model before register"
        )
    if not isinstance(model, DistributedDataParallel):
        raise RegistrationError(
            f"register needs a DistributedDataParallel model, but was given {type(model).__name__}: wrap it first"
        )
    _check(model)
    state, tally = State(), Tally()
    attachment = DDPAttachment(model, reducer, state, tally)
    try:
        model.register_comm_hook(None, attachment.hook)
    except RuntimeError as error:
        if "only be called once" not in str(error):
            raise
        # HACK: DDP lists the hook before it refuses it, and its compiled form would call it.
        model._comm_hooks.pop()  # pyright: ignore[reportPrivateUsage]
        raise RegistrationError(
            "the model has a communication hook already (or DDP's mixed_precision, which is one), "
            "and DDP takes one for life: register on a newly wrapped model"
        ) from None
    attachment.communicator = Communicator(process_group or cast(dist.ProcessGroup, model.process_group))
    registration = Registration(reducer, state, tally, attachment.communicator, attachment)
    setattr(model, _REGISTRATION, registration)
    return registration


def _check(model: DistributedDataParallel) -> None:
    earlier = getattr(model, _REGISTRATION, None)
    if earlier is not None:
        raise RegistrationError(
            f"the model is registered already, with {earlier.reducer!r}; DDP takes one hook for life"
        )
    for name, module in model.module.named_modules():
        if getattr(module, "sparse", False) and isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
            raise RegistrationError(
                f"{name}.weight has sparse gradients, which cannot be reduced: build the embedding with sparse=False"
            )
