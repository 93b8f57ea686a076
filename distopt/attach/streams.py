"""Where the kernels of a step are enqueued: on CUDA on a stream of our own, beside the one of backward.

A thread that enqueues kernels orders them after those before them on the same stream, and after nothing else. So the
autograd thread *marks* what a bucket waits for, our worker's thread *follows* that mark on its own stream, and whoever
reads the outcome *joins*: the GPU waits, and no thread does. On a CPU all of it is done when a call returns, and
nothing is left to order.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor


class Lane:
    """That of a CPU: calls that do nothing."""

    def mark(self) -> Any:
        """Note all that the calling thread has enqueued so far, to be followed by another."""
        return None

    def enter(self) -> None:
        """Let whatever the calling thread computes from here on be enqueued on this lane."""

    def follow(self, mark: Any, tensors: Iterable[Tensor] = ()) -> None:
        """Let what comes on this lane begin when everything before a mark is over.

        Args:
            mark: what `mark` gave.
            tensors: other lanes', which are used here: their memory is not given to others before that is over.
        """

    def join(self) -> None:
        """Let what the calling thread enqueues from here on begin when everything on this lane is over."""


class SideLane(Lane):
    """A stream of a CUDA device.

    It has priority: the few kernels on it are what the network waits for.

    Args:
        device: with its index.
        cuda: ``torch.cuda``, or what stands for it in a test.
    """

    def __init__(self, device: torch.device, cuda: Any = torch.cuda) -> None:
        self._cuda = cuda
        self._device = device
        self._stream = cuda.Stream(device, priority=-1)

    def mark(self) -> Any:
        """See `Lane.mark`."""
        return self._cuda.current_stream(self._device).record_event()

    def enter(self) -> None:
        """See `Lane.enter`. A thread begins on the first device, and on its default stream."""
        self._cuda.set_device(self._device)
        self._cuda.set_stream(self._stream)

    def follow(self, mark: Any, tensors: Iterable[Tensor] = ()) -> None:
        """See `Lane.follow`."""
        self._stream.wait_event(mark)
        for tensor in tensors:
            tensor.record_stream(self._stream)

    def join(self) -> None:
        """See `Lane.join`."""
        self._cuda.current_stream(self._device).wait_stream(self._stream)


_CPU = Lane()


class Lanes:
    """The lanes of one attachment, one a device."""

    def __init__(self) -> None:
        self._used: dict[torch.device, Lane] = {}

    def of(self, device: torch.device) -> Lane:
        """The lane of a device.

        Example:
            >>> Lanes().of(torch.device("cpu")).mark() is None
            True
        """
        if device.type != "cuda":
            return _CPU
        lane = self._used.get(device)
        if lane is None:
            lane = self._used[device] = SideLane(device)
        return lane

    def join(self) -> None:
        """`Lane.join` of all of them."""
        for lane in self._used.values():
            lane.join()


def keep(tensors: Iterable[Tensor]) -> None:
    """Let the calling thread use tensors that another one made, and may let go of while they are being used here."""
    for tensor in tensors:
        if tensor.is_cuda:
            tensor.record_stream(torch.cuda.current_stream(tensor.device))
