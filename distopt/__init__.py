"""distopt makes an existing PyTorch trainer cheap to distribute, without taking the trainer over.

Names are loaded when they are first used: a command of the integrations can refuse a bad setting before torch is
loaded.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from distopt import checkpoint as checkpoint
    from distopt import optim as optim
    from distopt import scaling as scaling
    from distopt.accumulation import Accumulation as Accumulation
    from distopt.accumulation import Window as Window
    from distopt.accumulation import accumulate as accumulate
    from distopt.attach.outer import Nesterov as Nesterov
    from distopt.attach.periodic import Periodic as Periodic
    from distopt.attach.periodic import PeriodicStats as PeriodicStats
    from distopt.attach.register import register as register
    from distopt.attach.registration import Registration as Registration
    from distopt.attach.registration import Stats as Stats
    from distopt.errors import AgreementError as AgreementError
    from distopt.errors import CheckpointError as CheckpointError
    from distopt.errors import DistoptError as DistoptError
    from distopt.errors import MissingPackageError as MissingPackageError
    from distopt.errors import PeerLostError as PeerLostError
    from distopt.errors import RegistrationError as RegistrationError
    from distopt.errors import ScaleError as ScaleError
    from distopt.errors import SettingError as SettingError
    from distopt.errors import StateError as StateError
    from distopt.errors import WindowError as WindowError
    from distopt.monitor.recording import Recorder as Recorder
    from distopt.monitor.recording import record as record
    from distopt.monitor.tensorboard import log_to_tensorboard as log_to_tensorboard
    from distopt.pipelining.pipeline import pipeline as pipeline
    from distopt.pipelining.running import Pipeline as Pipeline
    from distopt.planning.outcome import Plan as Plan
    from distopt.planning.plan import plan as plan
    from distopt.reducers.allreduce import AllReduce as AllReduce
    from distopt.reducers.byname import ByName as ByName
    from distopt.reducers.cast import Cast as Cast
    from distopt.reducers.energy import EnergyRank as EnergyRank
    from distopt.reducers.hierarchical import Hierarchical as Hierarchical
    from distopt.reducers.powersgd import PowerSGD as PowerSGD
    from distopt.reducers.quantize import Quantize as Quantize
    from distopt.reducers.randomk import RandomK as RandomK
    from distopt.reducers.reducer import Figures as Figures
    from distopt.reducers.sign import Sign as Sign
    from distopt.reducers.topk import TopK as TopK
    from distopt.scaling.resblock import ResblockScaler as ResblockScaler
    from distopt.sharding.shard import shard as shard
    from distopt.sharding.topology import node_mesh as node_mesh

__version__ = "0.1.0"

_HOMES = {
    "Accumulation": "distopt.accumulation",
    "Window": "distopt.accumulation",
    "accumulate": "distopt.accumulation",
    "Nesterov": "distopt.attach.outer",
    "Periodic": "distopt.attach.periodic",
    "PeriodicStats": "distopt.attach.periodic",
    "register": "distopt.attach.register",
    "Registration": "distopt.attach.registration",
    "Stats": "distopt.attach.registration",
    "AgreementError": "distopt.errors",
    "CheckpointError": "distopt.errors",
    "DistoptError": "distopt.errors",
    "MissingPackageError": "distopt.errors",
    "PeerLostError": "distopt.errors",
    "RegistrationError": "distopt.errors",
    "ScaleError": "distopt.errors",
    "SettingError": "distopt.errors",
    "StateError": "distopt.errors",
    "WindowError": "distopt.errors",
    "Recorder": "distopt.monitor.recording",
    "record": "distopt.monitor.recording",
    "log_to_tensorboard": "distopt.monitor.tensorboard",
    "pipeline": "distopt.pipelining.pipeline",
    "Pipeline": "distopt.pipelining.running",
    "Plan": "distopt.planning.outcome",
    "plan": "distopt.planning.plan",
    "AllReduce": "distopt.reducers.allreduce",
    "ByName": "distopt.reducers.byname",
    "Cast": "distopt.reducers.cast",
    "EnergyRank": "distopt.reducers.energy",
    "Hierarchical": "distopt.reducers.hierarchical",
    "PowerSGD": "distopt.reducers.powersgd",
    "Quantize": "distopt.reducers.quantize",
    "RandomK": "distopt.reducers.randomk",
    "Figures": "distopt.reducers.reducer",
    "Sign": "distopt.reducers.sign",
    "TopK": "distopt.reducers.topk",
    "ResblockScaler": "distopt.scaling.resblock",
    "shard": "distopt.sharding.shard",
    "node_mesh": "distopt.sharding.topology",
}


_ROOMS = ("checkpoint", "optim", "scaling")
"""Modules with public names of their own."""


def __getattr__(name: str) -> Any:
    if name in _ROOMS:
        return importlib.import_module(f"distopt.{name}")
    if name not in _HOMES:
        raise AttributeError(f"module 'distopt' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return [*_HOMES, *_ROOMS, "__version__"]
