"""Tensors on their way from an accelerator to the host, while the accelerator goes on."""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor


class Carrier(Protocol):
    """Copies tensors off their device again and again, one copy at a time."""

    def start(self, tensors: Sequence[Tensor]) -> None:
        """Begin a copy of tensors as they are now, and return at once."""
        ...

    def guard(self) -> None:
        """Let the device wait for the copy before it does what is asked of it from now on."""
        ...

    def arrived(self) -> list[Tensor]:
        """Wait for the copy, on any thread, and give it. It is overwritten by the next one."""
        ...


def carrier_between(tensors: Sequence[Tensor], device: torch.device) -> Carrier | None:
    """Make what carries tensors to a device without waiting.

    Args:
        tensors: such as will be carried, on any devices.
        device: where they are to go.

    Returns:
        A carrier from CUDA to the CPU; ``None`` in all other cases, where a plain copy will do.

    Example:
        >>> carrier_between([torch.ones(2)], torch.device("cpu")) is None
        True
    """
    if device.type == "cpu" and any(tensor.is_cuda for tensor in tensors):
        return StreamCarrier(tensors)
    return None


class StreamCarrier:
    """From CUDA into pinned memory, on a stream of its own for each device.

    Args:
        tensors: such as will be carried, on CUDA or on the CPU.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._pinned = [torch.empty_like(tensor, device="cpu", pin_memory=True) for tensor in tensors]
        devices = {tensor.device for tensor in tensors if tensor.is_cuda}
        self._streams = {device: torch.cuda.Stream(device) for device in devices}
        self._copied: dict[torch.device, torch.cuda.Event] = {}

    def start(self, tensors: Sequence[Tensor]) -> None:
        """Queue the copies behind what has been asked of the devices so far."""
        for device, stream in self._streams.items():
            stream.wait_stream(torch.cuda.current_stream(device))
        for tensor, pinned in zip(tensors, self._pinned, strict=True):
            if tensor.is_cuda:
                with torch.cuda.stream(self._streams[tensor.device]):
                    pinned.copy_(tensor.detach(), non_blocking=True)
            else:
                pinned.copy_(tensor.detach())
        for device, stream in self._streams.items():
            self._copied[device] = event = torch.cuda.Event()
            event.record(stream)

    def guard(self) -> None:
        """Let each device's current stream wait for the last copy; the host goes on."""
        for device, event in self._copied.items():
            torch.cuda.current_stream(device).wait_event(event)

    def arrived(self) -> list[Tensor]:
        """Wait on the host for the last copy, and give it."""
        for event in self._copied.values():
            event.synchronize()
        return self._pinned
