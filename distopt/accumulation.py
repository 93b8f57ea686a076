"""Windows of micro-batches that make one optimizer step, and are exactly one big batch.

The mean over a window is the sum of its losses divided by the window's weight: the number of tokens, say, of all its
micro-batches on all ranks. A mean of the micro-batches' own means is something else wherever they differ in weight. So
the weights are counted before the first backward pass, by looking ahead at the window's batches.
"""

import collections
import contextlib
import dataclasses
import itertools
import math
import numbers
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Generic, Literal, TypeVar, cast

import torch.distributed as dist
from torch import Tensor, nn

from distopt.attach.register import REGISTRATION, group_of
from distopt.comm.meeting import MOST_NUMBERS, Meeting, communicator_of
from distopt.errors import AgreementError, SettingError, WindowError

_ONLY = ""  # the key of a weight that has none
_ALLOWED = "a finite number of at least 0 for each batch, or a dictionary of them by name"

Batch = TypeVar("Batch")
Weight = float | Tensor | Mapping[str, float | Tensor]


def accumulate(
    loader: Iterable[Batch],
    model: nn.Module,
    *,
    steps: int,
    weight: Callable[[Batch], Weight] | None = None,
    last: Literal["step", "drop", "carry"] = "step",
    process_group: dist.ProcessGroup | None = None,
) -> "Accumulation[Batch]":
    """Cut a loader's batches into windows of ``steps`` micro-batches, each of which is one optimizer step.

    Call it at the same point on every rank; iterate over what it returns once an epoch. Ranks may have different
    numbers of batches: one that has run out while others go on is given its last batch again, with weight zero. On a
    model of `distopt.shard`, whose ranks compute together, it is given it for every micro-batch of the others.

    Args:
        loader: gives the micro-batches; iterated anew in every epoch. Up to ``steps`` of them are in memory.
        model: what the gradients are of: a ``DistributedDataParallel`` model, which then communicates on the last
            micro-batch only, one of `distopt.shard`, whose replicas do, or a plain module; compiled or not.
        steps: micro-batches a window and rank, at least 1; the same on all ranks.
        weight: of a batch, finite and at least 0: how many terms its loss is the sum of, tokens that are not ignored
            for example. With a dictionary, `Window.backward` takes a dictionary of losses, each divided by the sum of
            its own weight. Default: the batch size, which is the first dimension of the batch's first tensor.
        last: what becomes of the last window if no rank has ``steps`` micro-batches for it: ``"step"`` takes what there
            is, ``"drop"`` leaves it out, ``"carry"`` puts it in front of the next epoch.
        process_group: whose ranks make a step together; the model's own, or the default one.

    Returns:
        Windows, and in each window batches.

    Raises:
        SettingError: if ``steps`` or ``last`` is not allowed; while it is iterated, if a weight is not.
        AgreementError: while it is iterated, on every rank, if the ranks differ in the settings or in the keys of their
            weights, or if one has no batch at all.

    Example:
        >>> import torch
        >>> model = nn.Linear(3, 1)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> loader = [torch.ones(rows, 3) for rows in (5, 2, 8)]
        >>> for window in accumulate(loader, model, steps=2):
        ...     for batch in window:
        ...         window.backward(model(batch).square().sum())
        ...     optimizer.step(); optimizer.zero_grad()
        ...     print(window.steps, window.weight)
        2 7.0
        1 8.0
    """
    if not isinstance(cast(object, steps), int) or isinstance(steps, bool) or steps < 1:
        raise SettingError("steps", steps, "an integer of at least 1")
    if last not in ("step", "drop", "carry"):
        raise SettingError("last", last, "'step', 'drop' or 'carry'")
    if weight is not None and not callable(weight):
        raise SettingError("weight", weight, "a function of a batch")
    inner = getattr(model, "_orig_mod", model)
    communicator = None
    if dist.is_available() and dist.is_initialized():
        communicator = communicator_of(process_group or group_of(inner))
    meeting = Meeting(communicator, {"steps": str(steps), "last": last}, "accumulate")
    return Accumulation(loader, inner, steps, weight or _batch_size, last, meeting)


class Accumulation(Generic[Batch]):
    """The windows of a loader, anew each time it is iterated; `accumulate` makes it.

    Args:
        loader: gives the micro-batches.
        model: DDP's own module, or a plain one.
        steps: micro-batches a window.
        weight: of a batch.
        last: the policy for a partial window at the end.
        meeting: where the ranks agree.
    """

    def __init__(
        self,
        loader: Iterable[Batch],
        model: nn.Module,
        steps: int,
        weight: Callable[[Batch], Weight],
        last: str,
        meeting: Meeting,
    ) -> None:
        self._loader = loader
        self._model = model
        self._steps = steps
        self._weight = weight
        self._last = last
        self._meeting = meeting
        self._keys: tuple[str, ...] | None = None  # None until there was a batch
        self._seen: list[Batch] = []  # the last batch, for when this rank runs out before others do
        self._carried: list[_Micro[Batch]] = []
        self._window: Window[Batch] | None = None
        self._epoch = 0

    def __iter__(self) -> "Iterator[Window[Batch]]":
        self._check_left()
        self._epoch += 1
        stream = self._weighed()
        for number in itertools.count(1):
            micros, failure = self._look_ahead(stream)
            place = f"window {number} of epoch {self._epoch}"
            sums = {key: math.fsum(micro.weights[key] for micro in micros) for key in self._keys or ()}
            counts, weights = self._meeting.gather(place, len(micros), sums, failure)
            if 0 < max(counts) < self._steps and self._last == "carry":
                self._carried = micros
            partial = max(counts) < self._steps
            if max(counts) == 0 or (partial and self._last != "step"):
                return
            batches = [micro.batch for micro in micros] or list(self._seen)
            if getattr(_attachment_of(self._model), "in_lockstep", False):
                batches += batches[-1:] * (max(counts) - len(batches))
            self._window = Window(batches, len(micros), self._model, weights, self._meeting, place)
            self._meeting.step += 1
            yield self._window
            self._check_left()
            if partial:
                return

    @property
    def carried(self) -> int:
        """How many micro-batches of this rank wait for the next epoch (``last="carry"``)."""
        return len(self._carried)

    def _weighed(self) -> "Iterator[_Micro[Batch]]":
        carried, self._carried = self._carried, []
        yield from carried
        for batch in self._loader:
            weights = _weights(self._weight(batch))
            if self._keys is None:
                self._keys = tuple(weights)
                told = ", ".join(map(repr, weights)) if _ONLY not in weights else "a number"
                self._meeting.settings["weight"] = told
            if tuple(weights) != self._keys:
                raise SettingError("weight", list(weights), f"of the same keys for every batch, {list(self._keys)}")
            yield _Micro(batch, weights)

    def _look_ahead(self, stream: "Iterator[_Micro[Batch]]") -> "tuple[list[_Micro[Batch]], Exception | None]":
        """The next window's micro-batches; an error is kept until the other ranks can be told of it."""
        try:
            micros = list(itertools.islice(stream, self._steps))
        except Exception as error:
            return [], error
        if self._keys is None:
            me = self._meeting.rank
            return [], AgreementError(f"rank {me} has no batch at all: its loader is empty from the start", [me])
        if self._meeting.ranks > 1 and micros:
            self._seen = [micros[-1].batch]
        return micros, None

    def _check_left(self) -> None:
        window, self._window = self._window, None
        if window is not None and window.left is not None:
            raise WindowError(
                f"a window was left after {window.left} micro-batches, before its end: set its gradients to zero, and "
                "go through all micro-batches of a window before the next one"
            )


class Window(Generic[Batch]):
    """The micro-batches of one optimizer step; `accumulate` makes it. Iterate over it once.

    Args:
        batches: what this rank goes through.
        steps: how many of them count, the first ones; none on a rank that has run out and goes through its last batch
            again.
        model: DDP's own module, or a plain one.
        weights: of the whole window, by key.
        meeting: where the ranks agree.
        place: which window it is, for messages.
    """

    def __init__(
        self,
        batches: Sequence[Batch],
        steps: int,
        model: nn.Module,
        weights: Mapping[str, float],
        meeting: Meeting,
        place: str,
    ) -> None:
        self.steps = steps
        """Micro-batches of this rank; 0 where it only keeps the others company."""
        self.is_last = False
        """Whether the current micro-batch is this rank's last one, on which it communicates."""
        self._batches = collections.deque(batches)
        self._size = len(batches)
        self._model = model
        self._weights = weights
        # DDP and reducers average over the ranks: times their number, it is the sum.
        self._factors = {key: meeting.ranks / w if w > 0 else 0.0 for key, w in weights.items()}
        self._losses: dict[str, list[Tensor]] = {key: [] for key in weights}
        self._meeting = meeting
        self._place = place
        self._due = False

    @property
    def weight(self) -> float | dict[str, float]:
        """The sum of weights over all micro-batches and ranks, or a dictionary of them."""
        return _bare(self._weights)

    @property
    def left(self) -> int | None:
        """After how many micro-batches the window was left, if it was begun and has not come to its end."""
        taken = self._size - len(self._batches)
        return taken if self._due or 0 < taken < self._size else None

    def __iter__(self) -> Iterator[Batch]:
        if len(self._batches) < self._size:
            raise WindowError("a window was iterated twice: its micro-batches are gone through once")
        while self._batches:
            batch = self._batches.popleft()
            self.is_last = not self._batches
            self._due = True
            # DDP decides in forward whether the next backward communicates: both belong inside.
            with self._quiet():
                yield batch
            if self._due:
                raise WindowError("window.backward was not called for a micro-batch: call it once for each")

    def backward(self, loss: Tensor | Mapping[str, Tensor]) -> None:
        """Add the gradient of a micro-batch, divided by the weight of the whole window.

        Args:
            loss: one number: the *sum* over the micro-batch of what `accumulate`'s ``weight`` counts, not its mean; or
                a dictionary of such sums with the keys of the weights, to be added up. ``scaler.scale(loss)`` of a
                ``GradScaler`` will do as well.

        Raises:
            WindowError: if it is called twice for a micro-batch, or outside of the loop over the window; if the loss
                is not one number, or has other keys than the weights.
        """
        if not self._due:
            raise WindowError("window.backward was called twice for a micro-batch, or outside of the window's loop")
        losses = self._checked(loss)
        self._due = False
        counts = self._size - len(self._batches) <= self.steps
        if counts:
            for key, part in losses.items():
                self._losses[key].append(part.detach())
        cast(Tensor, sum(part * self._factors[key] * counts for key, part in losses.items())).backward()

    def loss(self) -> float | dict[str, float]:
        """Give the window's mean loss over all micro-batches and ranks, for logging. Collective.

        Returns:
            The sum of what `backward` was given, divided by the weight; 0 where the weight is 0. With several weights a
            dictionary, each sum divided by its own.

        Raises:
            WindowError: if the window has not come to its end.
        """
        if self._batches or self._due:
            raise WindowError("window.loss() was called before the window's last backward")
        sums = {key: math.fsum(map(float, losses)) for key, losses in self._losses.items()}
        _, totals = self._meeting.gather(f"the loss of {self._place}", self.steps, sums)
        return _bare({key: total / w if (w := self._weights[key]) > 0 else 0.0 for key, total in totals.items()})

    def _checked(self, loss: Tensor | Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        losses = loss if isinstance(loss, Mapping) else {_ONLY: loss}
        if losses.keys() != self._weights.keys():
            wanted = "one loss" if _ONLY in self._weights else f"losses for {sorted(self._weights)}"
            given = f"losses for {sorted(losses)}" if isinstance(loss, Mapping) else "one loss"
            raise WindowError(f"window.backward was given {given}, but the weights ask for {wanted}")
        for part in losses.values():
            if not isinstance(cast(object, part), Tensor):
                raise WindowError(f"a loss must be a tensor of one number, but is a {type(part).__name__}")
            if part.numel() != 1:
                raise WindowError(f"a loss must be a tensor of one number, but has shape {list(part.shape)}")
        return losses

    def _quiet(self) -> contextlib.AbstractContextManager[None]:
        """No communication before the last micro-batch."""
        if not self.is_last:
            no_sync = getattr(self._model, "no_sync", contextlib.nullcontext)
            return cast(contextlib.AbstractContextManager[None], no_sync())
        forget = getattr(_attachment_of(self._model), "forget_forwards", None)
        if forget is not None:
            forget()
        return contextlib.nullcontext()


def _attachment_of(model: nn.Module) -> object:
    """Where the gradients of a registered model are met."""
    return getattr(getattr(model, REGISTRATION, None), "_attachment", None)


@dataclasses.dataclass(frozen=True)
class _Micro(Generic[Batch]):
    batch: Batch
    weights: Mapping[str, float]


def _weights(given: object) -> dict[str, float]:
    """What ``weight`` returned, as numbers by key, in the order of keys."""
    if not isinstance(given, Mapping):
        return {_ONLY: _number(given)}
    keys = list(cast(Mapping[object, object], given))
    if not 0 < len(keys) <= MOST_NUMBERS or not all(isinstance(key, str) and key for key in keys):
        raise SettingError("weight", keys, f"a dictionary with 1 to {MOST_NUMBERS} names as keys")
    return {key: _number(given[key]) for key in sorted(cast(list[str], keys))}


def _number(given: object) -> float:
    if isinstance(given, Tensor):
        if given.dim() != 0 or given.is_complex():
            raise SettingError("weight", f"a tensor of shape {list(given.shape)}", _ALLOWED)
        given = given.item()
    if not isinstance(given, numbers.Real) or not 0 <= float(given) < math.inf:
        raise SettingError("weight", given, _ALLOWED)
    return float(given)


def _bare(by_key: Mapping[str, float]) -> float | dict[str, float]:
    return by_key[_ONLY] if _ONLY in by_key else dict(by_key)


def _batch_size(batch: object) -> float:
    size = next((tensor.shape[0] for tensor in _tensors(batch) if tensor.dim() > 0), None)
    if size is None:
        raise SettingError("weight", None, f"given: there is no tensor in a {type(batch).__name__} to take a size from")
    return size


def _tensors(batch: Any) -> Iterator[Tensor]:
    """All tensors in nested mappings, sequences and dataclasses, in their order."""
    if isinstance(batch, Tensor):
        yield batch
    elif isinstance(batch, Mapping):
        yield from itertools.chain.from_iterable(map(_tensors, cast(Mapping[Any, Any], batch).values()))
    elif isinstance(batch, (list, tuple)):
        yield from itertools.chain.from_iterable(map(_tensors, cast(Sequence[Any], batch)))
    elif dataclasses.is_dataclass(batch):
        yield from itertools.chain.from_iterable(_tensors(getattr(batch, f.name)) for f in dataclasses.fields(batch))
