"""The one line: put a reducer to work on a model."""

from collections.abc import Iterable
from datetime import timedelta
from typing import Any, cast

import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from distopt.attach.accumulating import AccumulatingAttachment, check_fusible
from distopt.attach.compiled import CompiledDDPAttachment
from distopt.attach.copies import copy_without
from distopt.attach.ddp import DDPAttachment
from distopt.attach.engine import Engine, LossScaler, Watch
from distopt.attach.exemptions import exempt_names, plain_name
from distopt.attach.fairscale import (
    FSDP,
    SHARDED_DDP,
    ShardedDDPAttachment,
    kind_of,
    refuse_recomputing_pipes,
    refuse_wrappers,
    sharded_ddp_slots,
)
from distopt.attach.gradients import GradientsAttachment, slots_of
from distopt.attach.registration import Attachment, Registration
from distopt.comm.communicator import Communicator
from distopt.errors import RegistrationError, SettingError
from distopt.reducers.reducer import Reducer, Slot

REGISTRATION = "_distopt_registration"
"""The attribute of a wrapped model that holds its registration."""


def register(
    model_or_parameters: nn.Module | Iterable[object],
    reducer: Reducer,
    *,
    process_group: dist.ProcessGroup | None = None,
    grad_scaler: LossScaler | None = None,
    accumulate: bool = False,
    timeout: timedelta | None = None,
    agreement: bool = True,
    check_replicas_every: int = 1000,
    measure_every: int = 100,
    residual_bound: float = 100.0,
) -> Registration:
    """Let ``reducer`` average a model's gradients from now on. Collective: every rank calls it at the same point.

    On a ``DistributedDataParallel`` model it takes the place of DDP's own averaging, in the communication hook that DDP
    has for this; the training loop stays as it is. fairscale's ``ShardedDataParallel`` will do as well
    (``docs/fairscale.md``). Given parameters instead, for trainers that wrap nothing, it
    averages their ``.grad`` when `Registration.reduce` is called, after ``backward``.

    A model wrapped under ``torch._dynamo.config.optimize_ddp = "python_reducer"`` is reduced when backward is over;
    compiled autograd besides is refused by then.

    If a gradient is not finite on one rank, every gradient of that step becomes NaN on all ranks, and neither
    residuals nor factors change: a ``GradScaler``, or any check of the gradient's norm, then skips the same step on
    every rank, and the next one is as if it had not been.

    A copy of a registered model, by ``copy.deepcopy`` or ``torch.save`` of the whole model, is a plain DDP model, which
    may be registered on its own. A model that nobody holds on to any more is freed with its residuals; the connections
    of its new group stay open until ``destroy_process_group``.

    Args:
        model_or_parameters: a DDP model, compiled or not, before or after its first step; or
            ``model.named_parameters()``, or a list of parameters, which are then called by their place in it. Without
            the modules, embeddings and norms can be told by their names only (``*embed*``, ``*norm*``).
        reducer: the settings, ``distopt.PowerSGD(rank=8)`` for example; the same on all ranks.
        process_group: whose ranks to average over; the model's own, or the default one. The collectives run on a new
            group of the same ranks.
        grad_scaler: the ``torch.amp.GradScaler`` that multiplies the loss, so that residuals keep their meaning when
            its scale changes. A `distopt.ResblockScaler` may be given but need not.
        accumulate: for a list of parameters: add every gradient to its residual as soon as backward has it, and free
            its ``.grad`` until `Registration.reduce`, so that error feedback takes no memory of its own while
            activations are alive. A step that is dropped then delays its gradients, those that are finite, instead of
            losing them. Clip after `Registration.reduce`.
        timeout: how long a collective may take; as long as the backend sees fit if ``None``.
        agreement: whether ranks compare step, buckets and number of forward passes before each reduction, for the price
            of one all-gather of five numbers.
        check_replicas_every: steps from one comparison of all parameters, bit for bit, to the next; the first is made
            before the first step; 0 for never.
        measure_every: steps from one step whose errors are measured (`Registration.figures`) to the next; 0 for never.
        residual_bound: warn when the norm of a residual is more than this many times that of its gradient, in a step
            that is measured.

    Returns:
        The registration, with statistics, the state to save with the model, and the means to change the reducer.

    Raises:
        RegistrationError: if ``torch.distributed`` is not initialised or did not make the group, or if a model is not
            DDP, has sparse gradients, has a communication hook already, or if ``accumulate`` does not go with what was
            given.
        SettingError: if ``reducer`` is none, or asks something impossible of a parameter.
        AgreementError: if the ranks have different parameters or settings; later on, out of ``backward``, if they do
            different things, or their parameters have drifted apart. It names the rank.
        PeerLostError: later on, out of ``backward``, if a rank is gone or does not answer. It names the rank.

    Example:
        >>> import distopt
        >>> from torch.nn.parallel import DistributedDataParallel as DDP
        >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        >>> registration = distopt.register(DDP(nn.Linear(4, 4)), distopt.PowerSGD(rank=2))
        >>> registration.stats().steps
        0
        >>> dist.destroy_process_group()
    """
    _check_arguments(reducer, grad_scaler, timeout)
    watch = Watch(agreement, check_replicas_every, measure_every, residual_bound)
    return _register(model_or_parameters, reducer, watch, process_group, grad_scaler, accumulate, timeout)


def _check_arguments(reducer: object, grad_scaler: object, timeout: object) -> None:
    if not isinstance(reducer, Reducer):
        raise SettingError("reducer", reducer, "a reducer such as distopt.PowerSGD(rank=4)")
    if grad_scaler is not None and not callable(getattr(grad_scaler, "get_scale", None)):
        raise SettingError("grad_scaler", grad_scaler, "None or what has get_scale(), as a torch.amp.GradScaler")
    if timeout is not None and (not isinstance(timeout, timedelta) or timeout <= timedelta(0)):
        raise SettingError("timeout", timeout, "None or a datetime.timedelta above 0")


def _register(
    model_or_parameters: nn.Module | Iterable[object],
    reducer: Reducer,
    watch: Watch,
    process_group: dist.ProcessGroup | None,
    grad_scaler: LossScaler | None,
    accumulate: bool,
    timeout: timedelta | None,
) -> Registration:
    if not dist.is_initialized():
        raise RegistrationError(
            "torch.distributed is not initialised: call init_process_group and wrap the model before register"
        )
    model = _wrapper_of(model_or_parameters)
    group = process_group or group_of(model)
    _check_group(group)
    slots = slots_of(_listed(model_or_parameters, process_group)) if model is None else _slots_of_model(model)
    engine = Engine(slots, reducer, watch, grad_scaler)
    engine.check(reducer, group.size())
    if accumulate:
        if model is not None:
            raise RegistrationError("accumulate=True is for lists of parameters: DDP reduces its gradients in backward")
        check_fusible(reducer, group.size())
    # Nothing is done to the model before the ranks agree: it can be registered again if they do not.
    engine.connect(Communicator(group, timeout=timeout))
    listed = AccumulatingAttachment if accumulate else GradientsAttachment
    attachment = listed(engine) if model is None else _attachment_of(model, engine)
    registration = Registration(engine, attachment)
    if model is not None:
        setattr(model, REGISTRATION, registration)
    if isinstance(model, DistributedDataParallel):
        copy_without(model, attachment, REGISTRATION)
    return registration


def _wrapper_of(model_or_parameters: nn.Module | Iterable[object]) -> nn.Module | None:
    """The wrapped model, out of what ``torch.compile`` made of it; None for a list of parameters."""
    model = getattr(model_or_parameters, "_orig_mod", model_or_parameters)
    if isinstance(model, nn.Module):
        refuse_wrappers(model)
    if isinstance(model, DistributedDataParallel) or kind_of(model) == SHARDED_DDP:
        return cast(nn.Module, model)
    if isinstance(model, nn.Module) and kind_of(model) != FSDP:
        raise RegistrationError(
            f"register needs a DistributedDataParallel model, but was given {type(model).__name__}: wrap it first, or "
            "give its named_parameters() and call reduce() on the registration after backward()"
        )
    if not isinstance(model, (Iterable, nn.Module)):
        raise RegistrationError(f"register needs a model or parameters, but was given {type(model).__name__}")
    return None


def _listed(given: nn.Module | Iterable[object], process_group: dist.ProcessGroup | None) -> Iterable[object]:
    """The parameters given; of fairscale's FSDP this rank's shards, which it averages inside its own group."""
    if not isinstance(given, nn.Module):
        return given
    if process_group is None:
        raise RegistrationError(f"of fairscale's {FSDP} register needs process_group=, the ranks with the same shard")
    return given.named_parameters()


def group_of(model: nn.Module | None) -> dist.ProcessGroup:
    """Whose ranks average a model's gradients: those that its wrapper was given, if it has one, or all."""
    if isinstance(model, DistributedDataParallel):
        return cast(dist.ProcessGroup, model.process_group)
    return (
        cast(Any, model)._process_group if kind_of(model) == SHARDED_DDP else cast(dist.ProcessGroup, dist.group.WORLD)
    )


def _slots_of_model(model: nn.Module) -> list[Slot]:
    _check(model)
    if not isinstance(model, DistributedDataParallel):
        return sharded_ddp_slots(model)
    refuse_recomputing_pipes(model)
    exempt = exempt_names(model.module)
    compiled = model._use_python_reducer  # pyright: ignore[reportPrivateUsage]
    optional = bool(model.find_unused_parameters or model.static_graph) and not compiled
    return [
        Slot(plain_name(name), parameter, exempt=name in exempt, optional=optional)
        for name, parameter in model.module.named_parameters()
        if name not in model.parameters_to_ignore
    ]


def _attachment_of(model: nn.Module, engine: Engine) -> Attachment:
    if not isinstance(model, DistributedDataParallel):
        return ShardedDDPAttachment(model, engine)
    compiled = model._use_python_reducer  # pyright: ignore[reportPrivateUsage]
    attachment = CompiledDDPAttachment(engine) if compiled else DDPAttachment(model, engine)
    try:
        model.register_comm_hook(None, attachment.hook)
    except RuntimeError as error:
        if "only be called once" not in str(error):
            raise
        # HACK: DDP lists the hook before it refuses it, and its compiled form would call it.
        model._comm_hooks.pop()  # pyright: ignore[reportPrivateUsage]
        raise _hooked() from None
    return attachment


def _hooked() -> RegistrationError:
    return RegistrationError(
        "the model has a communication hook already (or DDP's mixed_precision, which is one), "
        "and DDP takes one for life: register on a newly wrapped model"
    )


def _check(model: nn.Module) -> None:
    earlier = getattr(model, REGISTRATION, None)
    if earlier is not None:
        raise RegistrationError(
            f"the model is registered already, with {earlier.reducer!r}: set_reducer on its registration changes it"
        )
    if getattr(model, "_comm_hooks", None):
        raise _hooked()
    refuse_sparse(cast(Any, model).module)


def _check_group(group: dist.ProcessGroup) -> None:
    try:
        dist.get_process_group_ranks(group)
    except KeyError:
        raise RegistrationError(
            f"torch.distributed does not know the {type(group).__name__} to average over: make it by new_group"
        ) from None


def refuse_sparse(model: nn.Module) -> None:
    """Raise a `RegistrationError` if a module's gradients will be sparse."""
    for name, module in model.named_modules():
        if getattr(module, "sparse", False) and isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
            raise RegistrationError(
                f"{name}.weight has sparse gradients, which cannot be reduced: build the embedding with sparse=False"
            )
