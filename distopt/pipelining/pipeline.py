"""The one line for models whose blocks are divided over ranks."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import timedelta
from typing import NamedTuple, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from distopt.attach.engine import Engine, Watch
from distopt.attach.exemptions import exempt_names
from distopt.attach.register import REGISTRATION
from distopt.attach.replicas import copy_from_first, named_buffers, named_parameters
from distopt.comm.agreement import agree, describe, without_addresses
from distopt.comm.communicator import Communicator
from distopt.pipelining.attachment import Column, PipelineAttachment
from distopt.pipelining.checks import check_blocks, check_flags, check_parts, check_settings, named_blocks
from distopt.pipelining.costs import agreed_costs, check_costs
from distopt.pipelining.partition import partition
from distopt.pipelining.place import Place, place_of
from distopt.pipelining.registration import PipelineRegistration
from distopt.pipelining.running import LossScaling, Pipeline, Plan, Ranks
from distopt.pipelining.schedules import ScheduleName, check_schedule
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
    costs: Sequence[float] | None
    sample: Tensor | None


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
        stages: as many as ranks in a pipeline; twice as many or more, in turn, if ``schedule`` is ``"interleaved"``.
        schedule: ``"gpipe"`` (all forward, then all backward), ``"1f1b"`` (keeps at most as many micro-batches as there
            are stages) or ``"interleaved"`` (waits less, and sends more).
        microbatches: how many pieces a batch is cut into, along its first dimension.
        reducer: the settings, ``distopt.PowerSGD(rank=8)`` for example; exact if ``None``, or with one replica.
        mesh: stages, by replicas, by shards; the last ones may be missing. ``None``: all ranks are one pipeline.
        loss_fn: of output and target of a micro-batch; ``None`` if the last block gives the loss.
        mean: whether the loss of a batch is the mean of its micro-batches' losses; if not, it is their sum.
        costs: of each block, in any unit, to divide them by.
        sample: a micro-batch, for the first rank to measure costs with. Without either, all blocks count alike.
        recompute: keep the inputs of each block only, and compute the rest a second time in backward.
        reshard_after_forward: gather each block's shards anew for every micro-batch; if not, once a step.
        grad_scaler: a ``torch.amp.GradScaler`` or a `ResblockScaler`, whose ``scale`` the loss is given to.
        mp_policy: as in ``fully_shard``.
        timeout: as in `register`.
        agreement: as in `register`.
        check_replicas_every: as in `register`.
        measure_every: as in `register`.
        residual_bound: as in `register`.

    Returns:
        The pipeline, whose ``step(x, target=...)`` gives the loss, and leaves gradients of ``parameters()``.

    Raises:
        RegistrationError: if ``torch.distributed`` is not initialised, or a block is not fit to be sharded.
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
    plan = Plan(schedule, stages, microbatches, loss_fn, mean, grad_scaler)
    options = _Options(recompute, reshard_after_forward, mp_policy or MixedPrecisionPolicy(), timeout, costs, sample)
    watch = Watch(agreement, check_replicas_every, measure_every, residual_bound)
    return _checked(blocks, plan, mesh, AllReduce() if reducer is None else reducer, options, watch)


def _checked(
    blocks: object, plan: Plan, mesh: DeviceMesh | None, reducer: Reducer, options: _Options, watch: Watch
) -> Pipeline:
    """Refuse what is not allowed, agree with the other ranks, and divide the blocks."""
    named = named_blocks(blocks)
    check_settings(plan.stages, plan.schedule, plan.microbatches, len(named))
    check_parts(plan.loss_fn, reducer, plan.grad_scaler)
    flags = {
        "mean": plan.mean,
        "recompute": options.recompute,
        "reshard_after_forward": options.reshard_after_forward,
    }
    check_flags(flags)
    costs = check_costs(options.costs, options.sample, len(named))
    check_blocks(named)
    place = place_of(mesh)
    check_schedule(plan.schedule, len(place.pipe), plan.stages, plan.microbatches)
    ranks = _meet(named, plan, place, options.timeout, [*flags.items(), ("costs", costs), ("reducer", reducer)])
    costs = costs or agreed_costs(list(named.values()), options.sample, ranks.everyone)
    return _pipeline(named, partition(costs, plan.stages), plan, ranks, reducer, options, watch)


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
        *((name, without_addresses(value)) for name, value in settings),
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
