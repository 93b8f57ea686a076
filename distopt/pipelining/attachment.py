"""Meeting the gradients of a pipeline: when a rank has gone through its micro-batches.

Under ``torch.distributed.pipelining`` FSDP sums up gradients inside a node after the last micro-batch, outside of any
backward pass, and the schedule divides them by the number of micro-batches after that. What lies in ``.grad`` then is
the gradient of the mean loss, and that is what is reduced here. A rank begins as soon as its own part of the schedule
is over, while earlier stages are still at theirs.
"""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from distopt.attach.engine import Engine
from distopt.attach.fsdp import ScaleOf
from distopt.attach.gradients import segment_of
from distopt.attach.shards import Cut, Shards, piece_of
from distopt.attach.transaction import spoil
from distopt.attach.units import declare
from distopt.comm.communicator import Communicator
from distopt.errors import PeerLostError, RegistrationError


class Column(Shards):
    """One rank's place among the shards of its stages, in a model that has other stages as well.

    Args:
        communicator: the ranks that hold a replica of these stages together.
        everyone: all ranks.
        cuts: of every parameter of these stages.
        column: the ranks that hold this replica of the whole model together.
    """

    def __init__(
        self, communicator: Communicator, everyone: Communicator, cuts: Mapping[str, Cut], column: Sequence[int]
    ) -> None:
        super().__init__(communicator, everyone, cuts)
        self._column = frozenset(column)

    def norm(self, norm: Tensor) -> Tensor:
        """See `Shards.norm`; of all stages."""
        norms = self.everyone.gather_numbers([float(norm)])
        mine = [theirs for rank, (theirs,) in zip(self.everyone.ranks, norms, strict=True) if rank in self._column]
        return norm.new_tensor(math.sqrt(math.fsum(theirs * theirs for theirs in mine)))


class PipelineAttachment:
    """Reduces ``.grad`` of the stages of a rank, block by block.

    Args:
        engine: carries out the steps; its slots are this rank's pieces.
        shards: where this rank stands.
        parameters: of this rank's stages by name, DTensors.
        blocks: names of the parameters of each block, the last block first.
        device: where they are.
    """

    fused = False

    def __init__(
        self,
        engine: Engine,
        shards: Shards,
        parameters: Mapping[str, nn.Parameter],
        blocks: Sequence[Sequence[str]],
        device: torch.device,
    ) -> None:
        self._engine = engine
        self._shards = shards
        self._parameters = dict(parameters)
        self._blocks = [list(names) for names in blocks]
        self._device = device
        self._earlier: dict[str, Tensor] = {}
        self._scales = [ScaleOf(parameter) for parameter in parameters.values()]
        for slot, scale in zip(engine.slots.values(), self._scales, strict=True):
            declare(slot.parameter, scale, 0)

    def settle(self) -> None:
        """See `Attachment.settle`."""

    def layout(self) -> list[list[str]]:
        """See `Attachment.layout`: it is the model's own, and never changes."""
        return []

    def keep_layout(self, layout: Sequence[Sequence[str]]) -> None:
        """See `Attachment.keep_layout`."""

    def gradients(self) -> dict[str, Tensor]:
        """See `Attachment.gradients`."""
        return {name: piece_of(p.grad) for name, p in self._parameters.items() if p.grad is not None}

    def reduce(self) -> bool:
        """See `Attachment.reduce`."""
        raise RegistrationError("Pipeline.step reduces the gradients: there is nothing to call")

    def set_aside(self) -> None:
        """Take away what lies in ``.grad``: the schedule would divide it, and it has been reduced already."""
        for name, parameter in self._parameters.items():
            if parameter.grad is not None:
                self._earlier[name], parameter.grad = parameter.grad, None

    def put_back(self) -> None:
        """Add to ``.grad`` what was there before."""
        earlier, self._earlier = self._earlier, {}
        # A norm that is known from factors is not that of the sum.
        self._engine.norms = {name: norm for name, norm in self._engine.norms.items() if name not in earlier}
        for name, gradient in earlier.items():
            parameter = self._parameters[name]
            parameter.grad = gradient if parameter.grad is None else gradient.add_(parameter.grad)

    @torch.no_grad()
    def conclude(self) -> bool:
        """Average the gradients of a step; take it on all ranks of all stages, or drop it on all. Collective.

        Returns:
            Whether it was taken.
        """
        sound, error = False, None
        try:
            sound = self._propose()
        except PeerLostError:  # the others see it by themselves, when this rank is gone
            raise
        except Exception as raised:
            error = raised
        taken = self._engine.finish(self._shards.agree(sound, error, self._device))
        self.put_back()
        if not taken:
            spoil(iter(self.gradients().values()))
        return taken

    def _propose(self) -> bool:
        present = self._present()
        blocks = [tuple(name for name in names if name in present) for names in self._blocks]
        blocks = [names for names in blocks if names]
        self._engine.begin(blocks[0] if blocks else ())
        for names in blocks:
            gradients = [piece_of(self._gradient(name)) for name in names]
            self._engine.propose(names, gradients, [segment_of(gradient) for gradient in gradients], None)
        return self._engine.complete()

    def _present(self) -> set[str]:
        """Parameters that have a gradient in any replica; where this one has none, it gets one of zeros."""
        names = [name for name, p in self._parameters.items() if p.requires_grad]
        here = [float(self._parameters[name].grad is not None) for name in names]
        communicator = self._engine.communicator
        if communicator.world_size > 1 and names:
            here = communicator.maximum_(torch.tensor(here, device=self._device)).tolist()
        present = {name for name, anywhere in zip(names, here, strict=True) if anywhere}
        for name in present:
            if self._parameters[name].grad is None:
                self._parameters[name].grad = torch.zeros_like(self._parameters[name])
        return present

    def _gradient(self, name: str) -> Tensor:
        gradient = self._parameters[name].grad
        assert gradient is not None
        return gradient
