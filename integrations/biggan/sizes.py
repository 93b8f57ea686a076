"""How large pictures and networks are."""

import dataclasses

from distopt.errors import SettingError


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Sizes of a generator and its discriminator.

    Args:
        classes: how many.
        size: side of the pictures: 4 times a power of two, at least 8.
        width: channels at full resolution, a multiple of 8; twice as many at half of it, and so on down to 4 x 4.
        noise: numbers of noise, of which the hierarchical generator gives an equal part to its first layer and to each
            of its blocks.
        shared: width of the classes' embedding in the generator.
        attention: side of what attention looks at, in both networks, above 4 and below ``size``; 0 for none.
        kind: "hierarchical" or "deep".

    Example:
        >>> sizes = Sizes(classes=6, size=32)
        >>> sizes.levels, [sizes.channels(side) for side in (4, 8, 16, 32)]
        (3, [128, 64, 32, 16])
    """

    classes: int
    size: int = 16
    width: int = 16
    noise: int = 48
    shared: int = 32
    attention: int = 8
    kind: str = "hierarchical"

    @property
    def levels(self) -> int:
        """How often the resolution is doubled from 4 x 4."""
        return (self.size // 4).bit_length() - 1

    def channels(self, side: int) -> int:
        """Channels at the resolution ``side`` x ``side``."""
        return self.width * self.size // side


def check_sizes(sizes: Sizes) -> None:
    """Refuse sizes that do not fit together.

    Raises:
        SettingError: names the one that does not.
    """
    for name, low in (("classes", 1), ("width", 8), ("noise", 1), ("shared", 1)):
        if getattr(sizes, name) < low:
            raise SettingError(f"Sizes.{name}", getattr(sizes, name), f"at least {low}")
    if sizes.kind not in ("hierarchical", "deep"):
        raise SettingError("Sizes.kind", sizes.kind, "'hierarchical' or 'deep'")
    if sizes.size < 8 or sizes.size & (sizes.size - 1):
        raise SettingError("Sizes.size", sizes.size, "a power of two of at least 8")
    if sizes.width % 8:
        raise SettingError("Sizes.width", sizes.width, "a multiple of 8")
    parts = 1 + sizes.levels
    if sizes.kind == "hierarchical" and sizes.noise % parts:
        raise SettingError(
            "Sizes.noise", sizes.noise, f"a multiple of {parts}: one part a block and one for the first layer"
        )
    sides = [4 << level for level in range(1, sizes.levels)]
    if sizes.attention not in (0, *sides):
        raise SettingError("Sizes.attention", sizes.attention, f"0 or one of {', '.join(map(str, sides))}")
