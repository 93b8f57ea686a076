"""distopt makes an existing PyTorch trainer cheap to distribute, without taking the trainer over.

Names are loaded when they are first used: a command of the integrations can refuse a bad setting before torch is
loaded.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from distopt.attach.register import register as register
    from distopt.attach.registration import Registration as Registration
    from distopt.attach.registration import Stats as Stats
    from distopt.errors import DistoptError as DistoptError
    from distopt.errors import RegistrationError as RegistrationError
    from distopt.errors import SettingError as SettingError
    from distopt.errors import StateError as StateError
    from distopt.reducers.allreduce import AllReduce as AllReduce
    from distopt.reducers.powersgd import PowerSGD as PowerSGD

__version__ = "0.1.0"

_HOMES = {
    "register": "distopt.attach.register",
    "Registration": "distopt.attach.registration",
    "Stats": "distopt.attach.registration",
    "DistoptError": "distopt.errors",
    "RegistrationError": "distopt.errors",
    "SettingError": "distopt.errors",
    "StateError": "distopt.errors",
    "AllReduce": "distopt.reducers.allreduce",
    "PowerSGD": "distopt.reducers.powersgd",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'distopt' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return [*_HOMES, "__version__"]
