"""Signals that ask a run to stop: it takes note of them, and saves before it ends."""

import contextlib
import signal
import threading
from collections.abc import Generator

import torch
import torch.distributed as dist

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Signals:
    """Takes note of SIGTERM and Ctrl-C while it listens; a second Ctrl-C interrupts at once.

    Attributes:
        number: of the signal that came; 0 while none has.

    Example:
        >>> signals = Signals()
        >>> with signals.heard():
        ...     signal.raise_signal(signal.SIGTERM)
        >>> signals.number == signal.SIGTERM
        True
    """

    def __init__(self) -> None:
        self.number = 0

    @contextlib.contextmanager
    def heard(self) -> Generator[None]:
        """The context in which it listens; nothing changes outside of the main thread, which alone gets signals."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = [signal.signal(number, self._note) for number in _SIGNALS]
        try:
            yield
        finally:
            for number, handler in zip(_SIGNALS, before, strict=True):
                signal.signal(number, handler)

    def agreed(self, device: torch.device) -> int:
        """The number of a signal that any rank has got, the same on all of them. Collective."""
        if not dist.is_initialized():
            return self.number
        number = torch.tensor(self.number, device=device)
        dist.all_reduce(number, op=dist.ReduceOp.MAX)
        return int(number)

    def _note(self, number: int, frame: object) -> None:
        if number == signal.SIGINT and self.number == signal.SIGINT:
            raise KeyboardInterrupt
        self.number = number
