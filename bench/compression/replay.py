"""A step's tensor operations without the Python that calls for them: what is left of its time is overhead."""

from collections.abc import Callable
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode


class _Recorder(TorchDispatchMode):
    """Notes every operation with what it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Callable[..., Any], Any, dict[str, Any]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Carry an operation out, and note it."""
        self.calls.append((func, args, kwargs or {}))
        return func(*args, **(kwargs or {}))


def operations(step: Callable[[], None]) -> tuple[Callable[[], None], int]:
    """Take a step, and give what carries out its operations once more, on the same tensors, and how many they are."""
    with _Recorder() as recorder:
        step()

    def again() -> None:
        for operation, args, kwargs in recorder.calls:
            operation(*args, **kwargs)

    return again, len(recorder.calls)
