"""A reducer as a section of a config, in torchtitan's way: a dataclass of plain values that builds what it describes.

The section goes into the config tree of a trainer, torchtitan's or one's own, into TOML and onto a command line that is
made from dataclasses. Nothing of torchtitan is imported: its sections are such dataclasses too.
"""

import dataclasses
import inspect
from collections.abc import Iterable, Mapping
from typing import Any, Literal

import torch
from torch import nn

import distopt
from distopt import Registration, SettingError
from distopt.reducers.reducer import Reducer

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclasses.dataclass(kw_only=True, slots=True)
class ReducerConfig:
    """One of distopt's reducers, by name, with its settings by theirs; what is ``None`` keeps the reducer's default.

    Args:
        name: which.
        rank: `distopt.PowerSGD`: columns of a factor.
        min_saving: `distopt.PowerSGD`: a matrix that saves less is sent whole.
        start_step: `distopt.PowerSGD`: steps that are averaged exactly before.
        uncompressed: `distopt.PowerSGD`: patterns of names that are sent whole.
        residual_dtype: `distopt.PowerSGD`: what residuals are kept in.
        fraction: `distopt.TopK`, `distopt.RandomK`: of the numbers.
        bits: `distopt.Quantize`: of a number.
        dtype: `distopt.Cast`: what travels.
        seed: of reducers that draw at random.

    Example:
        >>> import tomllib
        >>> text = '''
        ... [reducer]
        ... name = "PowerSGD"
        ... rank = 8
        ... '''
        >>> ReducerConfig.from_table(tomllib.loads(text)["reducer"]).build()
        PowerSGD(rank=8)
    """

    name: Literal["AllReduce", "Cast", "PowerSGD", "TopK", "RandomK", "Quantize", "Sign"] = "PowerSGD"
    rank: int | None = None
    min_saving: float | None = None
    start_step: int | None = None
    uncompressed: list[str] | None = None
    residual_dtype: Literal["float32", "bfloat16", "float16"] | None = None
    fraction: float | None = None
    bits: int | None = None
    dtype: Literal["bfloat16", "float16"] | None = None
    seed: int | None = None

    @classmethod
    def from_table(cls, table: Mapping[str, Any]) -> "ReducerConfig":
        """Take a section as ``tomllib`` gives it.

        Raises:
            SettingError: if a name in it is unknown.
        """
        known = [field.name for field in dataclasses.fields(cls)]
        for name, value in table.items():
            if name not in known:
                raise SettingError(f"reducer.{name}", value, f"left out: the names are {', '.join(known)}")
        return cls(**table)

    def build(self) -> Reducer:
        """Make the reducer.

        Raises:
            SettingError: if it is unknown, lacks a setting, is given another's, or refuses a value.
        """
        names = inspect.get_annotations(type(self))["name"].__args__
        if self.name not in names:
            raise SettingError("reducer.name", self.name, f"one of {', '.join(names)}")
        kind = getattr(distopt, self.name)
        settings = {field.name: field for field in dataclasses.fields(kind)}
        given: dict[str, Any] = {}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value is None or field.name == "name":
                continue
            if field.name not in settings:
                raise SettingError(f"reducer.{field.name}", value, f"left out: {self.name} has no such setting")
            given[field.name] = self._dtype(field.name) if field.name.endswith("dtype") else value
        for name, setting in settings.items():
            if setting.default is dataclasses.MISSING and name not in given:
                raise SettingError(f"reducer.{name}", None, f"given: {self.name} has no default for it")
        return kind(**given)

    def register(self, model_or_parameters: nn.Module | Iterable[object], **options: Any) -> Registration:
        """`distopt.register` with this reducer and ``options``."""
        return distopt.register(model_or_parameters, self.build(), **options)

    def shard(self, model: nn.Module, units: Any, **options: Any) -> Registration:
        """`distopt.shard` with this reducer between the replicas, and ``options``, the trainer's mesh for one."""
        return distopt.shard(model, units, reducer=self.build(), **options)

    def _dtype(self, field: str) -> torch.dtype:
        value = getattr(self, field)
        if value not in _DTYPES:
            raise SettingError(f"reducer.{field}", value, f"one of {', '.join(_DTYPES)}")
        return _DTYPES[value]
