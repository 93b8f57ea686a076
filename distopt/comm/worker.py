"""One thread that does things in the order in which they were asked for.

Collectives are issued from this thread only. Chaining them in completion callbacks instead, as torch's own PowerSGD
hook does, lets two ranks issue them in different orders, and blocks the very threads that would complete them.
"""

import queue
import threading
import weakref
from collections.abc import Callable

from torch.profiler import record_function


class Worker:
    """Runs jobs one after the other on a thread of its own, which starts with the first job and ends with the worker.

    Jobs must not raise: each hands its outcome, an error included, to whoever waits for it.

    Args:
        name: the thread's name, as it shows in stack dumps.

    Example:
        >>> done = []
        >>> worker = Worker("example")
        >>> worker.submit(lambda: done.append(1)); worker.submit(lambda: done.append(2)); worker.drain()
        >>> done
        [1, 2]
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._jobs: queue.SimpleQueue[Callable[[], object] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    def submit(self, job: Callable[[], object]) -> None:
        """Queue a job; returns at once."""
        if self._thread is None:
            # A daemon: a rank whose peers are gone must be able to exit while its last collective still waits.
            self._thread = threading.Thread(target=_run, args=(self._jobs,), name=self._name, daemon=True)
            self._thread.start()
            weakref.finalize(self, self._jobs.put, None).atexit = False
        self._jobs.put(job)

    def drain(self) -> None:
        """Wait until every job queued so far has run."""
        if self._thread is not None:
            done = threading.Event()
            self._jobs.put(done.set)
            with record_function("distopt::wait"):
                done.wait()


def _run(jobs: "queue.SimpleQueue[Callable[[], object] | None]") -> None:
    """Do jobs until there is ``None``, which comes when the worker is gone."""
    while (job := jobs.get()) is not None:
        job()
        del job  # it may be what keeps the worker
