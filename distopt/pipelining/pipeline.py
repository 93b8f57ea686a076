"""The one line for models whose blocks are divided over ranks."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import timedelta
from typing import NamedTuple, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

from distopt.attach.engine import Engine, Watch
from distopt.attach.exemptions import exempt_names
from distopt.attach.register import REGISTRATION, refuse_sparse
from distopt.attach.replicas import copy_from_first, named_buffers, named_parameters
from distopt.comm.agreement import agree, describe
from distopt.comm.communicator import Communicator
from distopt.errors import RegistrationError, SettingError
from distopt.pipelining.attachment import Column, PipelineAttachment
from distopt.pipelining.costs import agreed_costs, check_costs
from distopt.pipelining.partition import partition
from distopt.pipelining.place import Place, place_of
from distopt.pipelining.registration import PipelineRegistration
from distopt.pipelining.running import LossScaling, Pipeline, Plan, Ranks
from distopt.pipelining.schedules import SCHEDULES, ScheduleName, check_schedule
from distopt.pipelining.stages import Chain
from distopt.reducers.allreduce import AllReduce
from distopt.reducers.reducer import Reducer
from distopt.sharding.shard import check_everywhere, cut_of, slot_of
from distopt.sharding.units import recompute_in_backward


class _Options(NamedTuple):
    """How to prepare the stages."""

    recompute: bool
    reshard_after_forward: bool
    mp_policy: MixedPrecisionPolicy
    timeout: timedelta | None


def pipeline(
    blocks: nn.Sequential | nn.ModuleList | Iterable[nn.Module],
    *,
    stages: int,
    schedule: ScheduleName = "1f1b",
    microbatches: int,
    reducer: Reducer | None = None,
    mesh: DeviceMesh | None = None,
    loss_fn: Callable[[Tensor, Tensor], Tensor] | None = None,
    mean: bool = True,
    costs: Sequence[float] | None = None,
    sample: Tensor | None = None,
    recompute: bool = False,
    reshard_after_forward: bool = False,
    grad_scaler: LossScaling | None = None,
    mp_policy: MixedPrecisionPolicy | None = None,
    timeout: timedelta | None = None,
    agreement: bool = True,
    check_replicas_every: int = 1000,
    measure_every: int = 100,
    residual_bound: float = 100.0,
) -> Pipeline:
    """Divide a list of blocks into stages on different ranks, and let micro-batches go through them. Collective.

    Every rank is given all blocks, and keeps those of its stages, sharded by torch's ``fully_shard``; the others are
    emptied. All ranks begin with the first one's parameters and buffers. Replicas of a stage average their gradients
    through ``reducer``. What `register` says of gradients that are not finite, of agreement and of the state holds
    here too, over the ranks of all stages.

    Args:
        blocks: the model, first to last; each takes one tensor and gives one. Their names are those of the
            ``nn.Sequential`` or ``nn.ModuleList``, or their places.
        stages: how many there are; as many as ranks in a pipeline, or a multiple of it if ``schedule`` is
            ``"interleaved"``: rank 0 then has the first stage, and one more every so many.
        schedule: ``"gpipe"`` (all forward, then all backward), ``"1f1b"`` (keeps at most as many micro-batches as there
            are stages) or ``"interleaved"`` (waits less, and sends more).
        microbatches: how many pieces a batch is cut into, along its first dimension.
        reducer: the settings, ``distopt.PowerSGD(rank=8)`` for example; exact if ``None``. With one replica gradients
            stay exact, as nothing is sent.
        mesh: stages, by replicas, by shards; the last ones may be missing. ``None``: all ranks are one pipeline.
        loss_fn: of output and target of a micro-batch; ``None`` if the last block gives the loss.
        mean: whether ``loss_fn`` is a mean over samples, so that the batch's loss is the mean of its micro-batches';
            if not, it is their sum.
        costs: of each block, in any unit, to divide them by.
        sample: a micro-batch; the first rank measures the costs of the blocks with it. Without either, all blocks
            count alike.
        recompute: keep the inputs of each block only, and compute the rest a second time in backward.
        reshard_after_forward: with shards, gather each block anew for every micro-batch, forward and backward; if not,
            once a step, and keep it until then.
        grad_scaler: a ``torch.amp.GradScaler`` or a `ResblockScaler`, whose ``scale`` the loss is given to.
        mp_policy: as in ``fully_shard``.
        timeout: as in `register`.
        agreement: as in `register`.
        check_replicas_every: as in `register`.
        measure_every: as in `register`.
        residual_bound: as in `register`.

    Returns:
        The pipeline: ``step(x, target=...)`` gives the loss, and leaves gradients of ``parameters()``.

    Raises:
        RegistrationError: if ``torch.distributed`` is not initialised, or a block is wrapped, sharded or on the meta
            device, or has sparse gradients.
        SettingError: if a setting is not allowed, or blocks share a parameter.
        AgreementError: if the ranks have different parameters or settings.

    Example:
        >>> import distopt
        >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        >>> blocks = [nn.Linear(4, 4), nn.Linear(4, 1)]
        >>> pipe = distopt.pipeline(blocks, stages=1, microbatches=2, loss_fn=nn.functional.mse_loss)
        >>> optimizer = torch.optim.SGD(pipe.parameters(), lr=0.1)
        >>> loss = pipe.step(torch.ones(6, 4), target=torch.ones(6, 1))
        >>> optimizer.step()
        >>> pipe.split, bool(pipe.step(torch.ones(6, 4), target=torch.ones(6, 1)) < loss)
        ((('0', '1'),), True)
        >>> dist.destroy_process_group()

    Source: Huang et al. 2019 (arXiv:1811.06965); Narayanan et al. 2021 (arXiv:2104.04473).
    """
    named = _named(blocks)
    reducer = AllReduce() if reducer is None else reducer
    _check_settings(stages, schedule, microbatches, loss_fn, len(named))
    flags = {"mean": mean, "recompute": recompute, "reshard_after_forward": reshard_after_forward}
    for field, value in flags.items():
        if not isinstance(cast(object, value), bool):
            raise SettingError(field, value, "True or False")
    if not isinstance(cast(object, reducer), Reducer):
        raise SettingError("reducer", reducer, "None, or a reducer such as distopt.PowerSGD(rank=4)")
    if grad_scaler is not None and not all(hasattr(grad_scaler, name) for name in ("scale", "get_scale")):
        raise SettingError("grad_scaler", type(grad_scaler).__name__, "a torch.amp.GradScaler or a ResblockScaler")
    given = check_costs(costs, len(named))
    if given is not None and sample is not None:
        raise SettingError("sample", type(sample).__name__, "None where costs are given")
    watch = Watch(agreement, check_replicas_every, measure_every, residual_bound)
    _check_blocks(named)
    place = place_of(mesh)
    check_schedule(schedule, len(place.pipe), stages, microbatches)
    plan = Plan(schedule, stages, microbatches, loss_fn, mean, grad_scaler)
    options = _Options(recompute, reshard_after_forward, mp_policy or MixedPrecisionPolicy(), timeout)
    ranks = _meet(named, plan, place, timeout, [*flags.items(), ("costs", given)])
    split = partition(given or agreed_costs(list(named.values()), sample, ranks.everyone), stages)
    return _pipeline(named, split, plan, ranks, reducer, options, watch)


def _pipeline(
    named: Mapping[str, nn.Module],
    split: Sequence[range],
    plan: Plan,
    ranks: Ranks,
    reducer: Reducer,
    options: _Options,
    watch: Watch,
) -> Pipeline:
    place, pipe, everyone, device = ranks
    names, whole = list(named), nn.ModuleDict(dict(named))
    exempt, everything = exempt_names(whole), list(named_parameters(whole))
    world = cast(dist.ProcessGroup, dist.group.WORLD)
    communicator = Communicator(world, ranks=place.shards, timeout=options.timeout)
    mesh = place.mesh or DeviceMesh.from_group(communicator.group, device.type)
    chains = {
        index: _chain({names[block]: named[names[block]] for block in split[index]}, mesh, options)
        for index in range(pipe.rank, plan.stages, pipe.world_size)
    }
    mine = nn.ModuleDict({name: block for chain in chains.values() for name, block in chain.blocks.items()})
    _empty([block for name, block in named.items() if name not in mine], mine)
    parameters = named_parameters(mine)
    shards = Column(communicator, everyone, {name: cut_of(p) for name, p in parameters.items()}, place.column)
    engine = Engine(
        [slot_of(name, p, name in exempt) for name, p in parameters.items()], reducer, watch, plan.grad_scaler, shards
    )
    check_everywhere(engine, reducer, everyone, len(place.replicas))
    units = [[f"{name}.{key}" for key in named_parameters(block)] for name, block in reversed([*mine.items()])]
    attachment = PipelineAttachment(engine, shards, parameters, units, device)
    engine.connect(Communicator(world, ranks=place.replicas, timeout=options.timeout))
    registration = PipelineRegistration(engine, attachment, shards, pipe, everything)
    made = Pipeline(plan, ranks, chains, [[names[i] for i in part] for part in split], attachment, registration)
    setattr(made.module, REGISTRATION, registration)
    return made


def _named(blocks: object) -> dict[str, nn.Module]:
    allowed = "an nn.Sequential, an nn.ModuleList or a list of modules"
    if isinstance(blocks, (nn.Sequential, nn.ModuleList)):
        return dict(blocks.named_children()) if len({*map(id, blocks)}) == len(blocks) else dict(_listed(list(blocks)))
    if isinstance(blocks, nn.Module) or not isinstance(blocks, Iterable):
        raise SettingError("blocks", type(blocks).__name__, allowed)
    return dict(_listed(list(cast(Iterable[object], blocks))))


def _listed(blocks: Sequence[object]) -> Iterable[tuple[str, nn.Module]]:
    for place, block in enumerate(blocks):
        if not isinstance(block, nn.Module):
            raise SettingError(f"blocks[{place}]", type(block).__name__, "a module")
        yield str(place), block


def _check_settings(stages: int, schedule: object, microbatches: int, loss_fn: object, blocks: int) -> None:
    for field, value in (("stages", stages), ("microbatches", microbatches)):
        if not isinstance(cast(object, value), int) or isinstance(value, bool) or value < 1:
            raise SettingError(field, value, "an integer of at least 1")
    if stages > blocks:
        raise SettingError("stages", stages, f"at most the number of blocks, which is {blocks}")
    if schedule not in SCHEDULES:
        raise SettingError("schedule", schedule, f"one of {', '.join(map(repr, SCHEDULES))}")
    if loss_fn is not None and not callable(loss_fn):
        raise SettingError("loss_fn", loss_fn, "a function of output and target, or None")


def _check_blocks(named: Mapping[str, nn.Module]) -> None:
    if not dist.is_initialized():
        raise RegistrationError("torch.distributed is not initialised: call init_process_group before pipeline")
    owners: dict[int, str] = {}
    for name, block in named.items():
        for path, module in block.named_modules():
            if isinstance(module, (FSDPModule, DistributedDataParallel)):
                where = f"{name}.{path}" if path else name
                raise RegistrationError(f"{where} is a {type(module).__name__}: pipeline calls fully_shard itself")
        for key, parameter in block.named_parameters():
            if parameter.is_meta:
                raise RegistrationError(f"'{name}.{key}' is on the meta device: give it memory and values first")
            owner = owners.setdefault(id(parameter), name)
            if owner != name:
                raise SettingError("blocks", f"{name}.{key}", f"of one block only: block {owner} has it too")
        refuse_sparse(block)
    if not owners:
        raise RegistrationError("no block has a parameter")


def _meet(
    named: Mapping[str, nn.Module],
    plan: Plan,
    place: Place,
    timeout: timedelta | None,
    settings: Iterable[tuple[str, object]],
) -> Ranks:
    """Let all ranks have the same blocks, to the bit, once they are known to have the same ones and settings."""
    world = cast(dist.ProcessGroup, dist.group.WORLD)
    everyone = Communicator(world, ranks=place.everyone, timeout=timeout)
    whole = nn.ModuleDict(dict(named))
    tensors = {**named_parameters(whole), **named_buffers(whole)}
    facts = [(name, describe(tensor)) for name, tensor in tensors.items()]
    everyone.guard("the comparison of parameters", agree, everyone.group, facts, "parameter")
    stated = [
        ("schedule", plan.schedule),
        ("stages", str(plan.stages)),
        ("microbatches", str(plan.microbatches)),
        ("replicas", str(len(place.replicas))),
        *((name, repr(value)) for name, value in settings),
    ]
    everyone.guard("the comparison of settings", agree, everyone.group, stated, "setting")
    copy_from_first(everyone, tensors)
    device = next(iter(named_parameters(whole).values())).device
    return Ranks(place, Communicator(world, ranks=place.pipe, timeout=timeout), everyone, device)


def _chain(blocks: Mapping[str, nn.Module], mesh: DeviceMesh, options: _Options) -> Chain:
    """Shard the blocks of a stage; what has no parameter needs none of it."""
    chain = Chain(blocks)
    whole = [block for block in blocks.values() if any(True for _ in block.parameters())]
    for module in [*whole, chain]:
        if options.recompute and module is not chain:
            recompute_in_backward(module)
        fully_shard(module, mesh=mesh, mp_policy=options.mp_policy, reshard_after_forward=options.reshard_after_forward)
    return chain


@torch.no_grad()
def _empty(others: Iterable[nn.Module], mine: nn.Module) -> None:
    """Give back the memory of other ranks' blocks; the objects stay, for whoever has noted them."""
    kept = {id(module) for module in mine.modules()}
    for module in (module for block in others for module in block.modules() if id(module) not in kept):
        for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
            tensor.data = tensor.data.new_empty(0)
