"""What is refused before anything is done."""

from collections.abc import Iterable, Mapping, Sequence
from typing import cast

import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel

from distopt.attach.fairscale import refuse_to_shard
from distopt.attach.register import refuse_sparse
from distopt.errors import RegistrationError, SettingError
from distopt.pipelining.schedules import SCHEDULES
from distopt.reducers.reducer import Reducer
from distopt.sharding.units import refuse_numbers


def named_blocks(blocks: object) -> dict[str, nn.Module]:
    """Blocks by their names in the model, first to last.

    Raises:
        SettingError: if there is anything else in it.
    """
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


def check_settings(stages: object, schedule: object, microbatches: object, blocks: int) -> None:
    """Refuse numbers that no pipeline of so many blocks can have.

    Raises:
        SettingError: with one line that says which are allowed.
    """
    for field, value in (("stages", stages), ("microbatches", microbatches)):
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise SettingError(field, value, "an integer of at least 1")
    if cast(int, stages) > blocks:
        raise SettingError("stages", stages, f"at most the number of blocks, which is {blocks}")
    if schedule not in SCHEDULES:
        raise SettingError("schedule", schedule, f"one of {', '.join(map(repr, SCHEDULES))}")


def check_parts(loss_fn: object, reducer: object, grad_scaler: object) -> None:
    """Refuse what is of another kind.

    Raises:
        SettingError: with one line that says what is asked for.
    """
    if loss_fn is not None and not callable(loss_fn):
        raise SettingError("loss_fn", loss_fn, "a function of output and target, or None")
    if not isinstance(reducer, Reducer):
        raise SettingError("reducer", reducer, "None, or a reducer such as distopt.PowerSGD(rank=4)")
    if grad_scaler is not None and not all(hasattr(grad_scaler, name) for name in ("scale", "get_scale")):
        raise SettingError("grad_scaler", type(grad_scaler).__name__, "a torch.amp.GradScaler or a ResblockScaler")


def check_flags(flags: Mapping[str, object]) -> None:
    """Refuse what is neither True nor False, by name.

    Raises:
        SettingError: if there is any.
    """
    for field, value in flags.items():
        if not isinstance(value, bool):
            raise SettingError(field, value, "True or False")


def check_blocks(named: Mapping[str, nn.Module]) -> None:
    """Refuse blocks that cannot be divided over ranks.

    Raises:
        RegistrationError: if ``torch.distributed`` is not initialised, or a block is wrapped, sharded, without memory,
            or has sparse gradients or a parameter without a dimension, or none has a parameter.
        SettingError: if two share a parameter.
    """
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
        refuse_to_shard(block)
    refuse_numbers(nn.ModuleDict(dict(named)))
    if not owners:
        raise RegistrationError("no block has a parameter")
