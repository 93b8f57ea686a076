"""The discrete VAEs that stage 1 can train, by name."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from .dvae import DVAE, DVAESettings
from .paper_dvae import PaperDVAE, PaperDVAESettings
from .relaxed import RelaxedVAE

AnyDVAESettings = DVAESettings | PaperDVAESettings
_SETTINGS: dict[str, type[AnyDVAESettings]] = {"small": DVAESettings, "paper": PaperDVAESettings}


def build(settings: AnyDVAESettings) -> RelaxedVAE:
    """Make the dVAE that ``settings`` are of.

    Example:
        >>> type(build(DVAESettings())).__name__
        'DVAE'
    """
    return DVAE(settings) if isinstance(settings, DVAESettings) else PaperDVAE(settings)


def to_table(settings: Any) -> dict[str, Any]:
    """Settings of a dVAE as they are saved with it, with the name of its architecture.

    Example:
        >>> to_table(PaperDVAESettings())["architecture"]
        'paper'
    """
    name = next(name for name, kind in _SETTINGS.items() if isinstance(settings, kind))
    return {"architecture": name, **dataclasses.asdict(settings)}


def from_table(table: Mapping[str, Any]) -> AnyDVAESettings:
    """Undo `to_table`; a table without the name is of the small architecture, which once was the only one.

    Raises:
        KeyError, TypeError, SettingError: the table is not one.

    Example:
        >>> from_table({"size": 24, "codes": 64}).codes
        64
    """
    fields = dict(table)
    return _SETTINGS[fields.pop("architecture", "small")](**fields)
