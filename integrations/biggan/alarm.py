"""An alarm before collapse: the largest singular value of some weight grows much faster than it used to.

Brock et al. saw in every run the first singular values of the generator's weights grow slowly and then explode at
collapse, and those of the discriminator jump and fall back. So the alarm knows no fixed bound, but the pace that a
weight has had.

Source: Brock et al. 2019 (arXiv:1809.11096), section 4.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

from distopt.errors import SettingError


@dataclasses.dataclass(frozen=True)
class Warned:
    """Why the alarm went off.

    Args:
        step: at which it did.
        weight: the weight's name.
        growth: by how much its largest singular value grew since the reading before, 0.1 for a tenth; NaN if the value
            is not finite.
        usual: the median size of such changes in the readings before.
    """

    step: int
    weight: str
    growth: float
    usual: float

    def __str__(self) -> str:
        """One line for a log."""
        if math.isnan(self.growth):
            return f"step {self.step}: the largest singular value of {self.weight} is not finite"
        return (
            f"step {self.step}: the largest singular value of {self.weight} grew by {self.growth:.0%}, "
            f"usually by {self.usual:.1%}"
        )


class CollapseAlarm:
    """Watches the largest singular values of a model's weights, read at equal distances.

    It goes off for a weight whose value grows from one reading to the next by more than ``least``, and by more than
    ``times`` the median of its changes in the ``window`` readings before; or that is not finite.

    Args:
        times: above 1.
        least: growth that is never alarming, above 0.
        window: readings that make the usual pace; none is alarming before there are as many.

    Raises:
        SettingError: a setting is out of its range.

    Example:
        >>> alarm = CollapseAlarm(window=3)
        >>> for step, value in enumerate([1.0, 1.02, 1.04, 1.06, 1.08, 1.6]):
        ...     for warned in alarm.read(step, {"first.weight": (value, 1.0, 0.5)}):
        ...         print(warned)
        step 5: the largest singular value of first.weight grew by 48%, usually by 1.9%
    """

    def __init__(self, *, times: float = 5.0, least: float = 0.1, window: int = 10) -> None:
        if not times > 1:
            raise SettingError("CollapseAlarm.times", times, "a number above 1")
        if not least > 0:
            raise SettingError("CollapseAlarm.least", least, "a number above 0")
        if not isinstance(window, int) or window < 1:
            raise SettingError("CollapseAlarm.window", window, "a whole number of at least 1")
        self._times, self._least, self._window = times, math.log1p(least), window
        self._last: dict[str, float] = {}
        self._changes: dict[str, list[float]] = {}

    def read(self, step: int, values: Mapping[str, Sequence[float]]) -> list[Warned]:
        """Take a reading.

        Args:
            step: when it was taken.
            values: singular values by weight, the largest first, as `spectra.top_singular_values_of` gives them.

        Returns:
            The weights that are alarming now.
        """
        warned: list[Warned] = []
        for name, (largest, *_) in values.items():
            now = math.log(largest) if 0 < largest < math.inf else (math.nan if largest != 0 else -math.inf)
            before, changes = self._last.get(name), self._changes.setdefault(name, [])
            self._last[name] = now
            if before is None:
                continue
            change = now - before
            usual = sorted(changes)[len(changes) // 2] if len(changes) == self._window else math.inf
            if math.isnan(now) or change > max(self._least, self._times * usual):
                warned.append(Warned(step, name, math.expm1(change), math.expm1(usual)))
            if math.isfinite(change):
                changes.append(abs(change))
                del changes[: -self._window]
        return warned

    def state_dict(self) -> dict[str, Any]:
        """What was read, for a checkpoint."""
        return {"last": dict(self._last), "changes": {name: list(changes) for name, changes in self._changes.items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """From a checkpoint."""
        self._last = dict(state["last"])
        self._changes = {name: list(changes) for name, changes in state["changes"].items()}
