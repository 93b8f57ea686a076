"""Keys and values of the positions that a sample has behind it, and no more of them than its layers still look at."""

import functools

import torch
from torch import Tensor

from .attention import Pattern


class Cache:
    """Keys and values by layer, for inference: what is kept is overwritten in place, and no gradient flows through it.

    A layer keeps all text, and of the image the latest slots, as far back as its mask looks: under the row mask of a
    32 x 32 image 33 slots of 1,024. They lie in a ring, in an order of their own, to which attention is blind.
    """

    def __init__(self) -> None:
        self._layers: dict[int, _Ring] = {}

    def extend(self, layer: int, pattern: Pattern, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Add positions of one layer and give what they may look at.

        Args:
            layer: its number.
            pattern: its mask, the same in every call.
            keys: ``(B, heads, n, d)`` of the first n positions, all text among them, or of the next one.
            values: of the same shape.

        Returns:
            After the first n positions these themselves; after a next one the keys and values that it sees, in any
            order, ``(B, heads, m, d)`` each. They are valid until the next call.

        Raises:
            ValueError: the first positions do not hold all text, or more than one follows.
        """
        if layer not in self._layers:
            self._layers[layer] = _Ring(pattern, keys, values)
            return keys, values
        return self._layers[layer].append(keys, values)

    @property
    def numbers(self) -> int:
        """How many numbers are kept."""
        return sum(2 * ring.keys.numel() for ring in self._layers.values())


class _Ring:
    """Text, then as many of the latest slots as the pattern's greatest distance asks for."""

    def __init__(self, pattern: Pattern, keys: Tensor, values: Tensor) -> None:
        self.pattern, self.slots = pattern, keys.shape[2] - pattern.text
        if self.slots < 0:
            raise ValueError(f"an empty cache takes all {pattern.text} text positions at once, got {keys.shape[2]}")
        batch, heads, _, width = keys.shape
        length = _length(pattern)
        kept = torch.arange(max(0, self.slots - length), self.slots, device=keys.device)
        self.keys = keys.new_empty(batch, heads, pattern.text + length, width)
        self.values = torch.empty_like(self.keys)
        for ring, given in ((self.keys, keys), (self.values, values)):
            ring[:, :, : pattern.text] = given[:, :, : pattern.text].detach()
            ring[:, :, pattern.text + kept % length] = given[:, :, pattern.text + kept].detach()

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        if keys.shape[2] != 1:
            raise ValueError(f"a filled cache takes one position at a time, got {keys.shape[2]}")
        slot, text, length = self.slots, self.pattern.text, _length(self.pattern)
        if slot >= self.pattern.slots:
            raise ValueError(f"all {slot} image positions are in the cache already")
        place = text + slot % length
        self.keys[:, :, place : place + 1] = keys.detach()
        self.values[:, :, place : place + 1] = values.detach()
        self.slots += 1
        seen = _seen(self.pattern, slot, keys.device)
        if seen is None:
            filled = text + min(slot + 1, length)
            return self.keys[:, :, :filled], self.values[:, :, :filled]
        return self.keys.index_select(2, seen), self.values.index_select(2, seen)


def _length(pattern: Pattern) -> int:
    """Slots that a layer can still look at, the one that is added included."""
    return pattern.offsets[-1] + 1


@functools.lru_cache(maxsize=8192)
def _seen(pattern: Pattern, slot: int, device: torch.device) -> Tensor | None:
    """Places in the ring that ``slot`` sees, text first; ``None`` if it sees all that are filled."""
    length = _length(pattern)
    distances = [distance for distance in pattern.offsets if distance <= slot]
    if len(distances) == min(slot + 1, length):
        return None
    places = [*range(pattern.text), *(pattern.text + (slot - distance) % length for distance in distances)]
    with torch.inference_mode(False):
        return torch.tensor(places, device=device)
