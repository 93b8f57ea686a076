"""The stages of one rank: chains of blocks, what goes in and out of them, and what they did when."""

import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.pipelining.stage import PipelineStage

from distopt.attach.iteration import reset_iteration
from distopt.comm.communicator import Communicator
from distopt.errors import AgreementError, RegistrationError
from distopt.pipelining.schedules import Action


class Chain(nn.Module):
    """Blocks, one after the other, by their names in the model."""

    def __init__(self, blocks: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self.blocks = nn.ModuleDict(dict(blocks))
        self.error: Exception | None = None
        """What a block raised."""

    def forward(self, x: Tensor) -> Tensor:
        """Give what comes out of the last block, in one piece of memory, as it may have to be sent."""
        try:
            for block in self.blocks.values():
                x = block(x)
            if not isinstance(cast(object, x), Tensor):
                name = [*self.blocks][-1]
                raise RegistrationError(
                    f"block {name!r} ends a stage with a {type(x).__name__}, but must give one tensor"
                )
            return x.contiguous()
        except Exception as error:
            self.error = error
            raise


class Look(NamedTuple):
    """What a tensor looks like."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    requires_grad: bool

    def example(self, device: torch.device | str) -> Tensor:
        """A tensor of zeros that looks so."""
        return torch.zeros(self.shape, dtype=self.dtype, device=device).requires_grad_(self.requires_grad)


def look_at(tensor: Tensor) -> Look:
    """Tell what a tensor looks like."""
    return Look(tuple(tensor.shape), tensor.dtype, tensor.requires_grad)


class Stage(PipelineStage):
    """torch's stage, which notes what it does.

    Args:
        chain: sharded.
        index: from 0 on.
        stages: how many there are.
        looks: of what goes in and comes out.
        device: where it computes.
        pipe: the ranks of the pipeline.
        notes: where to note.
    """

    def __init__(
        self,
        chain: Chain,
        index: int,
        stages: int,
        looks: tuple[Look, Look],
        device: torch.device,
        pipe: Communicator,
        notes: list[Action],
    ) -> None:
        inside, outside = (look.example("meta") for look in looks)
        super().__init__(chain, index, stages, device, input_args=(inside,), output_args=(outside,), group=pipe.group)
        self._notes = notes

    def forward_one_chunk(self, fwd_chunk_id: int, *args: Any, **kwargs: Any) -> Any:
        """See ``PipelineStage``."""
        begin = time.perf_counter()
        output = super().forward_one_chunk(fwd_chunk_id, *args, **kwargs)
        self._notes.append(Action("forward", self.stage_index, fwd_chunk_id, begin, time.perf_counter()))
        return output

    def backward_one_chunk(self, bwd_chunk_id: int, *args: Any, **kwargs: Any) -> None:
        """See ``PipelineStage``."""
        begin = time.perf_counter()
        super().backward_one_chunk(bwd_chunk_id, *args, **kwargs)
        if self.has_backward:
            self._notes.append(Action("backward", self.stage_index, bwd_chunk_id, begin, time.perf_counter()))


def find_looks(
    chains: Mapping[int, Chain], stages: int, first: Tensor | None, pipe: Communicator, device: torch.device
) -> dict[int, tuple[Look, Look]]:
    """Send one micro-batch of zeros down the pipeline, to learn what goes in and out of each stage. Collective.

    torch would do so with forward and backward in training mode, and what counts there would count it as a step.

    Args:
        chains: this rank's, by stage.
        stages: how many there are.
        first: a real micro-batch, on the first stage's rank: numbers of tokens cannot all be zero everywhere.
        pipe: the ranks of the pipeline.
        device: where they compute.

    Returns:
        Of this rank's stages.

    Raises:
        AgreementError: if a block of another rank failed; on that rank, what it raised.
    """
    looks: dict[int, tuple[Look, Look]] = {}
    arriving: Look | None = None
    for index in range(stages):
        found: tuple[Look, Look] | str | None = None
        error: Exception | None = None
        if index in chains:
            try:
                found = looks[index] = _try(chains[index], arriving, first, device)
            except Exception as raised:
                error, found = raised, f"{type(raised).__name__}: {str(raised).partition(chr(10))[0]}"
        owner = index % pipe.world_size
        told = pipe.gather_objects(found)[owner]
        if error is not None:
            raise error
        if isinstance(told, str):
            raise AgreementError(f"stage {index}, on rank {pipe.ranks[owner]}, failed: {told}", [pipe.ranks[owner]])
        arriving = told[1]
    return looks


def _try(chain: Chain, arriving: Look | None, first: Tensor | None, device: torch.device) -> tuple[Look, Look]:
    x = first if arriving is None else arriving.example(device)
    assert x is not None
    training = [module for module in chain.modules() if module.training]
    chain.eval()
    try:
        with torch.enable_grad():
            return look_at(x), look_at(chain(x))
    finally:
        for module in training:
            module.training = True
        reshard([chain])


def reshard(chains: Sequence[Chain]) -> None:
    """Drop what was gathered for a forward pass that no backward pass follows: it would be used again, grown old."""
    for chain in chains:
        for module in chain.modules():
            if isinstance(module, FSDPModule):
                module.reshard()
        reset_iteration(cast(FSDPModule, chain))
