"""The discrete VAEs that stage 1 can train, by name."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from distopt.errors import SettingError

from .dvae import DVAE, DVAESettings
from .paper_dvae import PaperDVAE, PaperDVAESettings
from .published import find_published, published_settings
from .relaxed import RelaxedVAE
from .settings import InputError, Stage1Options

AnyDVAESettings = DVAESettings | PaperDVAESettings
_SETTINGS: dict[str, type[AnyDVAESettings]] = {"small": DVAESettings, "paper": PaperDVAESettings}


def build(settings: AnyDVAESettings) -> RelaxedVAE:
    """Make the dVAE that ``settings`` are of.

    Example:
        >>> type(build(DVAESettings())).__name__
        'DVAE'
    """
    return DVAE(settings) if isinstance(settings, DVAESettings) else PaperDVAE(settings)


def settings_of(options: Stage1Options, size: int) -> AnyDVAESettings:
    """The dVAE's settings, from what a user chose; what is left out keeps the architecture's own default.

    Args:
        options: checked already.
        size: side of the pictures, in pixels.

    Raises:
        InputError: the weights that are named cannot be read.
        SettingError: something does not suit the architecture or the weights.

    Example:
        >>> settings_of(Stage1Options(architecture="paper", patch=8, n_hid=16), 32).grid
        4
    """
    if options.weights is not None:
        try:
            found = published_settings(*find_published(Path(options.weights)), size)
        except InputError as error:
            raise InputError(f"stage1.weights: {error}") from None
        if options.codes not in (None, found.codes):
            raise SettingError("stage1.codes", options.codes, f"{found.codes}, as the weights have, or left out")
        return found
    names = ("codes", "likelihood", "log_scale_floor", "n_hid", "n_init", "blocks", "width", "neck")
    given = {name: getattr(options, name) for name in names if getattr(options, name) is not None}
    if options.architecture == "paper":
        return PaperDVAESettings(size=size, groups=options.patch.bit_length(), **given)
    return DVAESettings(size=size, grid=size // options.patch, **given)


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
