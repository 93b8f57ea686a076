"""The paper's filters: captions that are too short, boilerplate or not English, and pictures that are too long.

The paper (appendix C) gives the kinds and, for the aspect ratio, the bounds; the other numbers here are ours. It tells
English by a language detector that is no longer maintained (cld3). The share of letters that are a to z stands in for
it: that finds other scripts, not other languages written in the same one.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from ..settings import DataOptions

_MONTHS = "jan|feb|mar|apr|may|jun|jul|aug|sep|oct|nov|dec"
BOILERPLATE = (
    r"(?i)\b(photographed|photo(graph)?|picture|image|taken|shot|captured|uploaded)\s+(taken\s+|shot\s+)?(on|in|at)\s+"
    rf"(the\s+)?(\d{{1,4}}\b|({_MONTHS})[a-z]*\.?\s+\d)"
)
"""The paper names one pattern, "photographed on <date>"."""


@dataclass(frozen=True)
class Filters:
    """What is left out, and why.

    Args:
        shortest: words of a caption, at least.
        boilerplate: regular expression of what no caption may contain; empty allows all.
        latin: share of a caption's letters that are a to z, at least; a caption without letters has none.
        aspect: longer side of a picture over the shorter one, at most; ``None`` allows all, and reads no sizes.

    Example:
        >>> filters = Filters(shortest=2)
        >>> filters.of_captions(["a dog", "dog"])
        (['a dog'], ['too short'])
    """

    shortest: int = 0
    boilerplate: str = ""
    latin: float = 0.0
    aspect: float | None = None

    @classmethod
    def chosen(cls, options: DataOptions) -> "Filters":
        """The filters that a user chose."""
        base = cls(shortest=3, boilerplate=BOILERPLATE, latin=0.9, aspect=2.0) if options.filters == "paper" else cls()
        return cls(
            shortest=base.shortest if options.shortest is None else options.shortest,
            boilerplate=base.boilerplate if options.boilerplate is None else options.boilerplate,
            latin=base.latin if options.latin is None else options.latin,
            aspect=base.aspect if options.aspect is None else options.aspect,
        )

    def of_captions(self, captions: Sequence[str]) -> tuple[list[str], list[str]]:
        """Give the captions of a picture that stay, and the reason for each of the others."""
        judged = [(caption, self._against(caption)) for caption in captions]
        return [caption for caption, why in judged if not why], [why for _, why in judged if why]

    def allow(self, width: int, height: int) -> bool:
        """Whether a picture of that size stays."""
        return self.aspect is None or max(width, height) <= self.aspect * min(width, height)

    def _against(self, caption: str) -> str:
        if len(caption.split()) < self.shortest:
            return "too short"
        if self.boilerplate and re.search(self.boilerplate, caption):
            return "boilerplate"
        letters = [char for char in caption if char.isalpha()]
        if self.latin and sum(char.isascii() for char in letters) < self.latin * max(1, len(letters)):
            return "not in Latin letters"
        return ""
