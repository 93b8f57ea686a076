"""The package ``powersgd`` of PowerSGD's author, which is compared where it is installed.

    pip install git+https://github.com/epfml/powersgd

What the package index has under this name holds no code.
"""

import importlib
from typing import Any

HOW_TO_INSTALL = "pip install git+https://github.com/epfml/powersgd"


def is_installed() -> bool:
    """Whether the package is there, and not only its name."""
    try:
        return hasattr(importlib.import_module("powersgd"), "PowerSGD")
    except ImportError:
        return False


def package() -> Any:
    """The package.

    Raises:
        ImportError: if it is not installed.
    """
    return importlib.import_module("powersgd")


def settings(rank: int) -> Any:
    """Its settings as distopt's: one iteration a step, from the first on, of matrices that save half.

    Args:
        rank: of the factors.
    """
    return package().Config(
        rank=rank, min_compression_rate=2, num_iters_per_step=1, start_compressing_after_num_steps=0
    )
