"""The figures of a `ResblockScaler`, as plain numbers."""

import math
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class BlockFigures:
    """How one branch fares.

    Args:
        scale: its scale; gradients are multiplied by the next lower power of two.
        skips: steps in which one of its parameter gradients was not finite, on any rank.
        zero_fraction: share of zeros among this rank's parameter gradients, scaled, in the last step that was
            measured; NaN before.
    """

    scale: float
    skips: int
    zero_fraction: float


@dataclass(frozen=True)
class ScalerStats:
    """What a `ResblockScaler` has done so far.

    Args:
        steps: updates.
        skipped_steps: those in which no optimizer stepped, because of a gradient that was not finite on some rank.
        blocks: figures of each branch, by name.
    """

    steps: int
    skipped_steps: int
    blocks: Mapping[str, BlockFigures]

    def numbers(self) -> dict[str, float]:
        """Everything as plain numbers by tag, for TensorBoard: ``scale_log2/<branch>`` and so on.

        Example:
            >>> ScalerStats(9, 1, {"mlp": BlockFigures(2.0**13, 1, 0.25)}).numbers()
            {'skipped_steps': 1, 'scale_log2/mlp': 13.0, 'skips/mlp': 1, 'zero_fraction/mlp': 0.25}
        """
        numbers: dict[str, float] = {"skipped_steps": self.skipped_steps}
        for name, block in self.blocks.items():
            numbers[f"scale_log2/{name}"] = math.log2(block.scale)
            numbers[f"skips/{name}"] = block.skips
            if not math.isnan(block.zero_fraction):
                numbers[f"zero_fraction/{name}"] = block.zero_fraction
        return numbers
