"""A rank that follows the spectrum of each gradient."""

import dataclasses

import torch
from torch import Tensor

from distopt.errors import SettingError
from distopt.numerics.orthogonal import unit_size
from distopt.numerics.storage import Packed, Stored
from distopt.reducers.settings import is_integer, is_number


@dataclasses.dataclass(frozen=True)
class EnergyRank:
    """For ``PowerSGD(rank=...)``: as many columns as hold a share of what the factors capture, layer by layer.

    Every ``every`` steps the squared singular values of the averaged low-rank gradient are looked at. If its leading
    directions hold ``target`` of their sum before the last one, the rank becomes their number and one more; if even the
    last direction is needed, the rank grows by half. What lies outside the captured directions cannot be seen in the
    factors: the one column more, and error feedback, is how a growing tail comes to notice.

    Args:
        target: share of the captured energy, in (0, 1).
        least: smallest rank.
        most: largest rank; the rank that ``min_saving`` is judged by.
        every: steps between two changes.

    Raises:
        SettingError: if a setting is out of its range.

    Example:
        >>> EnergyRank(0.95, most=16)
        EnergyRank(target=0.95, least=1, most=16, every=20)
    """

    target: float = 0.95
    _: dataclasses.KW_ONLY
    least: int = 1
    most: int = 32
    every: int = 20

    def __post_init__(self) -> None:
        if not is_number(self.target) or not 0 < self.target < 1:
            raise SettingError("EnergyRank.target", self.target, "a number between 0 and 1")
        for field in ("least", "most", "every"):
            value = getattr(self, field)
            if not is_integer(value) or value < 1:
                raise SettingError(f"EnergyRank.{field}", value, "an integer of at least 1")
        if self.least > self.most:
            raise SettingError("EnergyRank.least", self.least, f"at most EnergyRank.most, which is {self.most}")

    def rank(self, factor: Stored | None) -> int:
        """The rank that a kept factor stands for, in this rule's range; the middle of the range before the first."""
        if factor is None:
            return max(self.least, self.most // 2)
        columns = (factor.codes if isinstance(factor, Packed) else factor).shape[1]
        return min(max(columns, self.least), self.most)

    def adapts_after(self, step: int) -> bool:
        """Whether the rank may change after this step."""
        return (step + 1) % self.every == 0

    def sorted_columns(self, right: Tensor) -> Tensor:
        """Turn Q, ``(..., m, r)``, so that its columns are orthogonal and the longest comes first."""
        scaled = unit_size(right)
        _, vectors = torch.linalg.eigh((scaled.mT @ scaled).double())
        return (right.double() @ vectors.flip(-1)).to(right.dtype)

    def choose(self, right: Tensor, most: int) -> int:
        """The next rank, from Q with sorted columns, ``(m, r)``; not more than ``most``."""
        energy = unit_size(right).double().square().sum(dim=0)
        share = energy.cumsum(0) / energy.sum()
        needed = int((share < self.target).sum()) + 1
        columns = right.shape[1]
        wanted = columns + max(1, columns // 2) if needed >= columns else needed + 1
        return max(min(self.least, most), min(wanted, self.most, most))
