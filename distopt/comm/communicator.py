"""A process group of our own, and the one collective that reducers need."""

import torch
import torch.distributed as dist
from torch import Tensor


class Communicator:
    """Averages tensors over a process group that nobody else talks on.

    The group has the ranks and the backend of the one it is made from, so that our collectives can never be matched
    with those of the trainer (DDP sends its map of unused parameters and its buffers while gradients are on their way).

    Args:
        process_group: whose ranks to average over. Every one of them makes its communicator at the same point.
    """

    def __init__(self, process_group: dist.ProcessGroup) -> None:
        ranks = dist.get_process_group_ranks(process_group)
        self._group = dist.new_group(ranks, backend=dist.get_backend(process_group), use_local_synchronization=True)
        self.world_size = len(ranks)
        self.bytes_sent = 0
        """Bytes handed to collectives so far by this rank: one copy, no ring factor."""

    def average_(self, tensor: Tensor) -> Tensor:
        """Replace ``tensor`` by its average over the ranks, bitwise the same on each of them.

        Every rank divides before the sum, which 16-bit numbers would not survive otherwise; this is also how
        ``DistributedDataParallel`` does it, to the bit.

        Args:
            tensor: contiguous, floating point or complex, of the same shape and dtype on every rank.

        Returns:
            ``tensor`` itself.
        """
        tensor.mul_(1.0 / self.world_size)
        wire = torch.view_as_real(tensor) if tensor.is_complex() else tensor
        dist.all_reduce(wire, group=self._group)
        self.bytes_sent += tensor.numel() * tensor.element_size()
        return tensor
