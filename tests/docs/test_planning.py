"""The formulas in docs/planning.md are those of the code."""

import re
from pathlib import Path

from distopt.planning.costs import ALTERNATE, BOTH, CAST

PAGE = (Path(__file__).parent.parent.parent / "docs/planning.md").read_text()


def test_the_formulas():
    """As many passes and products as are charged for."""
    for name, efforts in (("PowerSGD, an", BOTH), ("the same, alternating", ALTERNATE), ("16 bits, n numbers", CAST)):
        row = next(line for line in PAGE.splitlines() if line.startswith(f"| {name}"))
        assert int(re.search(r"`(\d+) \* 4n", row)[1]) == sum(effort.passes for effort in efforts)
        products = re.search(r"\((\d+)nmr", row)
        assert (int(products[1]) // 2 if products else 0) == sum(effort.products for effort in efforts)
