"""The discrete VAEs that stage 1 can train, by the names of their networks and of their bottleneck."""

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from distopt.errors import SettingError

from ..tokenizers.fsq import levels_for
from .dvae import DVAE, DVAESettings
from .paper_dvae import PaperDVAE, PaperDVAESettings
from .published import find_published, published_settings
from .quantized import QuantizedSettings, QuantizedVAE
from .relaxed import RelaxedVAE
from .settings import RELAXED, InputError, Stage1Options, TokenizerOptions

AnyDVAESettings = DVAESettings | PaperDVAESettings | QuantizedSettings
AnyDVAE = RelaxedVAE | QuantizedVAE
_OPTIONS = {"commitment_weight": "commitment", "rotation": "rotation"}
"""Options of a quantizer by the names that they have among those of stage 1."""
_SETTINGS: dict[str, type[DVAESettings | PaperDVAESettings]] = {"small": DVAESettings, "paper": PaperDVAESettings}


def build(settings: AnyDVAESettings) -> AnyDVAE:
    """Make the discrete VAE that ``settings`` are of.

    Example:
        >>> type(build(DVAESettings())).__name__
        'DVAE'
    """
    if isinstance(settings, QuantizedSettings):
        return QuantizedVAE(settings)
    return DVAE(settings) if isinstance(settings, DVAESettings) else PaperDVAE(settings)


def settings_of(options: Stage1Options, size: int) -> AnyDVAESettings:
    """The discrete VAE's settings, from what a user chose; what is left out keeps the architecture's own default.

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
        networks = PaperDVAESettings(size=size, groups=options.patch.bit_length(), **given)
    else:
        networks = DVAESettings(size=size, grid=size // options.patch, **given)
    return networks if options.bottleneck in RELAXED else quantized(networks, options)


def quantized(networks: DVAESettings | PaperDVAESettings, options: TokenizerOptions) -> QuantizedSettings:
    """The settings of a discrete VAE with a quantizer between these networks.

    Args:
        networks: their shape, which has the number of codes.
        options: checked already, of no relaxed bottleneck; without ``codes`` the nearest possible number is taken.

    Raises:
        SettingError: the quantizer cannot have so many codes.

    Example:
        >>> quantized(DVAESettings(codes=1024), Stage1Options(bottleneck="fsq", codes=1024))
        Traceback (most recent call last):
            ...
        distopt.errors.SettingError: stage1.codes is 1024, but must be 1000, the nearest number that fsq can have
    """
    given = {name: getattr(options, field) for name, field in _OPTIONS.items() if getattr(options, field) is not None}
    if options.rotation:
        # At 0.25 vectors leave their codes, and all but a few codes are lost: see ``QuantizedVAE``.
        given.setdefault("commitment_weight", 1.0)
    dimension = {} if options.dimension is None else {"dimension": options.dimension}
    check_codes(options)
    networks = dataclasses.replace(networks, codes=nearest_codes(options.bottleneck, networks.codes))
    return QuantizedSettings(networks=networks, bottleneck=options.bottleneck, options=given, **dimension)


def check_codes(options: TokenizerOptions) -> None:
    """Refuse a number of codes that the bottleneck cannot have.

    Raises:
        SettingError: says which is the nearest.
    """
    if options.codes is not None and (nearest := nearest_codes(options.bottleneck, options.codes)) != options.codes:
        allowed = f"{nearest}, the nearest number that {options.bottleneck} can have"
        raise SettingError("stage1.codes", options.codes, allowed)


def nearest_codes(bottleneck: str, codes: int) -> int:
    """The number of codes nearest to ``codes`` that a bottleneck can have: fsq a product of levels, lfq a power of two.

    Example:
        >>> nearest_codes("fsq", 1024), nearest_codes("lfq", 192), nearest_codes("vq", 100)
        (1000, 256, 100)
    """
    if bottleneck == "fsq":
        return math.prod(levels_for(codes))
    if bottleneck == "lfq":
        return 2 ** max(1, round(math.log2(codes)))
    return codes


def to_table(settings: Any) -> dict[str, Any]:
    """Settings of a dVAE as they are saved with it, with the name of its architecture.

    Example:
        >>> to_table(PaperDVAESettings())["architecture"]
        'paper'
    """
    if isinstance(settings, QuantizedSettings):
        more = {name: getattr(settings, name) for name in ("bottleneck", "dimension", "options")}
        return {**to_table(settings.networks), **more}
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
    if "bottleneck" in fields:
        more = {name: fields.pop(name) for name in ("bottleneck", "dimension", "options")}
        networks = from_table(fields)
        assert not isinstance(networks, QuantizedSettings)
        return QuantizedSettings(networks=networks, **more)
    return _SETTINGS[fields.pop("architecture", "small")](**fields)
