"""The state of every random generator of this process: Python's, NumPy's if it is loaded, torch's on CPU and CUDA."""

import random
import sys
from typing import Any

import torch


def generator_states() -> dict[str, Any]:
    """Give the state of all generators, in tensors and plain values.

    Example:
        >>> before = generator_states()
        >>> first = torch.rand(())
        >>> restore_generators(before)
        >>> bool(torch.rand(()) == first)
        True
    """
    states: dict[str, Any] = {"python": random.getstate(), "torch": torch.get_rng_state()}
    if (numpy := sys.modules.get("numpy")) is not None:
        kind, keys, *rest = numpy.random.get_state()
        states["numpy"] = (str(kind), keys.tolist(), *rest)
    if torch.cuda.is_initialized():
        states["cuda"] = torch.cuda.get_rng_state_all()
    return states


def restore_generators(states: dict[str, Any]) -> None:
    """Go on from saved states. Devices that are not there now, and a NumPy that is not loaded, are passed over."""
    random.setstate(states["python"])
    torch.set_rng_state(states["torch"])
    if "numpy" in states and (numpy := sys.modules.get("numpy")) is not None:
        kind, keys, *rest = states["numpy"]
        numpy.random.set_state((kind, numpy.array(keys, dtype=numpy.uint32), *rest))
    if "cuda" in states and torch.cuda.is_available():
        for device in range(min(torch.cuda.device_count(), len(states["cuda"]))):
            torch.cuda.set_rng_state(states["cuda"][device], device)
