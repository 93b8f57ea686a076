"""Whether the Triton editions do the work, or torch's own operations."""

import functools
import importlib.util
import os

import torch

from distopt.errors import SettingError

VARIABLE = "DISTOPT_KERNELS"
"""The environment variable that decides, read once: ``auto`` (as if it were not set) takes Triton on CUDA devices
wherever it is installed, ``off`` never, ``on`` on every device: on a CPU that is Triton's interpreter, which needs
``TRITON_INTERPRET=1``."""

SETTINGS = ("auto", "off", "on")


def chosen(device: torch.device) -> bool:
    """Tell whether tensors of a device are worked on by the Triton editions.

    Raises:
        SettingError: if the environment variable ``DISTOPT_KERNELS`` is none of ``auto``, ``off`` and ``on``.

    Example:
        >>> chosen(torch.device("cpu"))
        False
    """
    setting = chosen_setting()
    if setting == "auto":
        return device.type == "cuda" and _has_triton()
    return setting == "on"


@functools.cache
def chosen_setting() -> str:
    """What the environment asks for."""
    setting = os.environ.get(VARIABLE, "auto")
    if setting not in SETTINGS:
        raise SettingError(VARIABLE, setting, "auto, off or on")
    return setting


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None
