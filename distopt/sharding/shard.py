"""The one line for models that one device cannot hold."""

from collections.abc import Callable
from datetime import timedelta
from typing import Any, NamedTuple, cast

import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from distopt.attach.engine import Engine, LossScaler, Watch
from distopt.attach.exemptions import exempt_names, plain_name
from distopt.attach.fairscale import refuse_to_shard
from distopt.attach.fsdp import FSDPAttachment
from distopt.attach.register import REGISTRATION, refuse_sparse
from distopt.attach.registration import Registration
from distopt.attach.replicas import copy_from_first, named_buffers, named_parameters
from distopt.attach.selection import Blocks, Part
from distopt.attach.shards import Cut, Shards
from distopt.comm.agreement import agree, describe
from distopt.comm.communicator import Communicator
from distopt.errors import DistoptError, RegistrationError, SettingError
from distopt.reducers.allreduce import AllReduce
from distopt.reducers.reducer import Reducer, Slot
from distopt.sharding.mesh import Grid, grid_of, members
from distopt.sharding.topology import mesh_of_nodes
from distopt.sharding.units import find_units, names_by_unit, prefetch, recompute_in_backward


class _Options(NamedTuple):
    """How to shard."""

    recompute: bool
    prefetch: bool
    mp_policy: MixedPrecisionPolicy
    placement: Callable[[nn.Parameter], Any] | None
    timeout: timedelta | None


def shard(
    model: nn.Module,
    units: Blocks,
    *,
    mesh: DeviceMesh | None = None,
    reducer: Reducer | None = None,
    recompute: bool = True,
    prefetch: bool = True,
    grad_scaler: LossScaler | None = None,
    mp_policy: MixedPrecisionPolicy | None = None,
    shard_placement_fn: Callable[[nn.Parameter], Any] | None = None,
    timeout: timedelta | None = None,
    agreement: bool = True,
    check_replicas_every: int = 1000,
    measure_every: int = 100,
    residual_bound: float = 100.0,
) -> Registration:
    """Shard a model inside each node, and let ``reducer`` average gradients between nodes. Collective.

    Parameters, gradients and the state of an optimizer that is made afterwards are cut over the shards (torch's
    ``fully_shard``). Each unit is gathered just before it computes and dropped after it; its gradients are averaged
    over the shards at once, and each rank's piece of them over the replicas, compressed. When ``backward`` returns,
    ``.grad`` of every parameter holds the average over all ranks.

    All ranks begin with the first one's parameters and buffers. What `register` says of gradients that are not finite,
    of agreement and of the state holds here too, over the ranks of all shards; the state holds whole tensors, and goes
    on with other numbers of replicas and of shards.

    Args:
        model: on its device; changed in place.
        units: what is gathered together, in the order of forward: its blocks, in the ways that `ResblockScaler` may be
            given branches. Of what a pattern matches, the outermost modules. Parameters outside of them are a unit too.
        mesh: replicas by shards; with one dimension there is one replica. If ``None``, nodes by the ranks of a node, as
            `node_mesh` finds them.
        reducer: the settings, ``distopt.PowerSGD(rank=8)`` for example; exact if ``None``. It sees this rank's piece of
            each gradient: a block of rows. With one replica gradients stay exact, as nothing is sent.
        recompute: keep the inputs of each unit only, and compute the rest a second time in backward.
        prefetch: gather each unit while the one before it computes.
        grad_scaler: as in `register`.
        mp_policy: as in ``fully_shard``. Its ``reduce_dtype`` is that of the sum inside a node; the reducer is given
            gradients in the dtype of the parameters.
        shard_placement_fn: as in ``fully_shard``, with one dimension a parameter.
        timeout: as in `register`.
        agreement: as in `register`.
        check_replicas_every: as in `register`.
        measure_every: as in `register`.
        residual_bound: as in `register`.

    Returns:
        The registration, as from `register`.

    Raises:
        RegistrationError: if ``torch.distributed`` is not initialised, or the model is wrapped, sharded or registered
            already, on the meta device, or has sparse gradients.
        SettingError: if a setting is not allowed, no unit is found, or a parameter is tied to one in another unit.
        AgreementError: if the ranks have different parameters or settings.

    Example:
        >>> import distopt
        >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        >>> model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
        >>> registration = distopt.shard(model, list(model), reducer=distopt.PowerSGD(rank=2))
        >>> registration.stats().steps
        0
        >>> dist.destroy_process_group()

    Source: Ramesh et al. 2021 (arXiv:2102.12092), section 2.5 and appendix E.2.
    """
    reducer = AllReduce() if reducer is None else reducer
    if not isinstance(cast(object, reducer), Reducer):
        raise SettingError("reducer", reducer, "None, or a reducer such as distopt.PowerSGD(rank=4)")
    for field, value in (("recompute", recompute), ("prefetch", prefetch)):
        if not isinstance(cast(object, value), bool):
            raise SettingError(field, value, "True or False")
    watch = Watch(agreement, check_replicas_every, measure_every, residual_bound)
    _check(model)
    options = _Options(recompute, prefetch, mp_policy or MixedPrecisionPolicy(), shard_placement_fn, timeout)
    return _shard(model, find_units(units, model), mesh, reducer, options, watch, grad_scaler)


def _shard(
    model: nn.Module,
    parts: list[Part],
    mesh: DeviceMesh | None,
    reducer: Reducer,
    options: _Options,
    watch: Watch,
    grad_scaler: LossScaler | None,
) -> Registration:
    world = cast(dist.ProcessGroup, dist.group.WORLD)
    everyone = Communicator(world, ranks=members(mesh), timeout=options.timeout)
    grid = grid_of(mesh_of_nodes(everyone, next(model.parameters()).device.type) if mesh is None else mesh)
    exempt = {plain_name(name) for name in exempt_names(model)}
    _assemble(model, parts, grid, everyone)
    managed = _cut(model, parts, grid.shards, options)
    parameters = named_parameters(model)
    cuts = {name: cut_of(parameter) for name, parameter in parameters.items()}
    shards = Shards(Communicator(grid.shards.get_group(), timeout=options.timeout), everyone, cuts)
    slots = [slot_of(name, parameter, name in exempt) for name, parameter in parameters.items()]
    engine = Engine(slots, reducer, watch, grad_scaler, shards)
    check_everywhere(engine, reducer, everyone, len(grid.replicas))
    attachment = FSDPAttachment(cast(FSDPModule, model), managed, parameters, engine, shards)
    engine.connect(Communicator(world, ranks=grid.replicas, timeout=options.timeout))
    registration = Registration(engine, attachment)
    setattr(model, REGISTRATION, registration)
    cast(Any, model).no_sync = attachment.no_sync
    return registration


def _check(model: object) -> None:
    if not dist.is_initialized():
        raise RegistrationError("torch.distributed is not initialised: call init_process_group before shard")
    if not isinstance(model, nn.Module) or isinstance(model, DistributedDataParallel):
        raise RegistrationError(f"shard needs a model without a wrapper, but was given {type(model).__name__}")
    refuse_to_shard(model)
    for name, module in model.named_modules():
        if isinstance(module, FSDPModule):
            raise RegistrationError(f"{name or 'the model'} is sharded already: shard calls fully_shard itself")
    if next(model.parameters(), None) is None:
        raise RegistrationError("the model has no parameter to shard")
    for name, parameter in model.named_parameters():
        if parameter.is_meta:
            raise RegistrationError(f"{name!r} is on the meta device: give it memory and values before shard")
    refuse_sparse(model)


def _assemble(model: nn.Module, parts: list[Part], grid: Grid, everyone: Communicator) -> None:
    """Let all ranks have the same parameters, to the bit, once they are known to have the same ones."""
    tensors = {**named_parameters(model), **named_buffers(model)}
    facts = [(name, describe(tensor)) for name, tensor in tensors.items()]
    everyone.guard("the comparison of parameters", agree, everyone.group, facts, "parameter")
    settings = [("units", repr([part.name for part in parts])), ("replicas", str(len(grid.replicas)))]
    everyone.guard("the comparison of settings", agree, everyone.group, settings, "setting")
    copy_from_first(everyone, tensors)


def _cut(model: nn.Module, parts: list[Part], mesh: DeviceMesh, options: _Options) -> dict[FSDPModule, list[str]]:
    """Shard every unit and the rest; tell by the module that FSDP has for each which parameters it manages."""
    for part in parts:
        for module in part.modules:
            if options.recompute:
                recompute_in_backward(module)
        whole = part.modules[0] if len(part.modules) == 1 else list(part.modules)
        fully_shard(whole, mesh=mesh, mp_policy=options.mp_policy, shard_placement_fn=options.placement)
    fully_shard(model, mesh=mesh, mp_policy=options.mp_policy, shard_placement_fn=options.placement)
    sharded = [cast(FSDPModule, part.modules[0]) for part in parts]
    if options.prefetch:
        prefetch(cast(FSDPModule, model), sharded)
    return dict(zip([*sharded, cast(FSDPModule, model)], names_by_unit(parts, model), strict=True))


def slot_of(name: str, parameter: nn.Parameter, exempt: bool) -> Slot:
    """This rank's piece, in the parameter's own memory."""
    piece = cast(DTensor, parameter.detach()).to_local()
    return Slot(name, nn.Parameter(piece, requires_grad=parameter.requires_grad), exempt=exempt)


def cut_of(parameter: nn.Parameter) -> Cut:
    """How a parameter that is sharded is cut."""
    (placement,) = cast(DTensor, parameter).placements
    return Cut(tuple(parameter.shape), cast(Any, placement).dim)


def check_everywhere(engine: Engine, reducer: Reducer, everyone: Communicator, replicas: int) -> None:
    """Pieces differ, and a setting may fit some of them only: all ranks are told."""
    error = None
    try:
        engine.check(reducer, replicas)
    except DistoptError as found:
        error = found
    told = everyone.gather_objects(None if error is None else str(error))
    if error is not None:
        raise error
    odd = next((text for text in told if text is not None), None)
    if odd is not None:
        raise RegistrationError(f"on another rank's shard: {odd}")
