"""Do all ranks do the same thing? Cheap where they do; where they do not, an error that says who differs in what.

Where all is well one small all-gather of digests is all that is sent. Only on a mismatch, which every rank sees in the
same numbers, do the ranks exchange what the digests stand for, and every rank raises the same error.

Ranks in messages are global ranks. Every function here that takes a group is collective: all its ranks call it at the
same point, and the group's own timeout is the deadline.
"""

import dataclasses
import re
import struct
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from distopt.errors import AgreementError
from distopt.numerics.fingerprint import digest, fingerprint

_ADDRESS = re.compile(r" at 0x[0-9a-f]+")

Facts = Sequence[tuple[str, str]]
"""Ordered pairs of a name, unique among them, and what is to be the same on all ranks, as a text."""


def agree(group: dist.ProcessGroup, facts: Facts, what: str) -> None:
    """Check that every rank states the same facts in the same order.

    Args:
        group: the ranks to compare.
        facts: names (of parameters, settings) and texts (shapes, values).
        what: what kind of thing the names name, for the message: ``parameter``.

    Raises:
        AgreementError: on every rank, if any rank differs; the message names the odd ranks and the first difference.

    Example:
        >>> agree(group, [("head.weight", "float32 [10, 64]"), ("head.bias", "float32 [10]")], "parameter")
        ... # doctest: +SKIP
    """
    rows = _gather_numbers(group, [len(facts), _digest(facts)])
    if any(row != rows[0] for row in rows):
        by_rank = _gather_objects(group, list(facts))
        raise difference(by_rank, what) or _unexplained(what)


def drift(group: dist.ProcessGroup, tensors: Mapping[str, Tensor]) -> None:
    """Check that replicas hold the same bits.

    Args:
        group: the ranks that hold replicas.
        tensors: parameters, buffers, or whatever else must be equal, by name; dense, of any shape and dtype.

    Raises:
        AgreementError: on every rank, if a tensor's bits differ; it names the first such tensor and, with three ranks
            or more, the odd ranks; or if the ranks do not have the same tensors.
    """
    # A gather of different lengths would not fail cleanly: first make sure that there is the same to compare.
    agree(group, [(name, describe(tensor)) for name, tensor in tensors.items()], "tensor")
    if not tensors:
        return
    device = device_of(group)
    mine = torch.stack([fingerprint(tensor).to(device) for tensor in tensors.values()])
    rows = _gather(group, mine)
    ranks = dist.get_process_group_ranks(group)
    differing = [name for name, column in zip(tensors, zip(*rows, strict=True), strict=True) if len(set(column)) > 1]
    if differing:
        column = list(tensors).index(differing[0])
        raise _drifted(differing, {rank: row[column] for rank, row in zip(ranks, rows, strict=True)})


@dataclasses.dataclass(frozen=True)
class Step:
    """What a rank is about to reduce.

    Args:
        number: of the step.
        names: the parameters in the step's first bucket, in their order.
        forwards: forward passes since the last reduction; 0 on a rank that ran none because it has joined (torch's
            ``Join``), which agrees with any number.
        loss_scale: what the loss is multiplied by; a rank that has joined agrees with any.
    """

    number: int
    names: tuple[str, ...]
    forwards: int
    loss_scale: float = 1.0


class StepCheck:
    """The check before the first collective of each step: one all-gather of five numbers.

    Args:
        group: the ranks to compare. Every one of them checks before it calls anything else on this group in a step.
        settings: what else must be the same, the settings of the reducer for example; see `restate`.

    Example:
        >>> check = StepCheck(group, [("reducer", "PowerSGD(rank=4)")])  # doctest: +SKIP
        >>> check(Step(17, ("head.weight", "head.bias"), forwards=1))  # doctest: +SKIP
    """

    def __init__(self, group: dist.ProcessGroup, settings: Facts = ()) -> None:
        self._group = group
        self._digests: dict[tuple[str, ...], int] = {}
        self.restate(settings)

    def restate(self, settings: Facts) -> None:
        """Replace the settings, from the next check on.

        Args:
            settings: names and texts.
        """
        self._settings = list(settings)
        self._settings_digest = _digest(settings)

    def __call__(self, step: Step) -> int:
        """Compare with all other ranks.

        Args:
            step: what this rank is about to reduce.

        Returns:
            How many ranks have joined: they ran no forward pass, while others did.

        Raises:
            AgreementError: on every rank, if they differ; it names the odd ranks and what differs.
        """
        names = self._digests.get(step.names)
        if names is None:
            names = self._digests[step.names] = digest(*step.names)
        (scale,) = struct.unpack("q", struct.pack("d", step.loss_scale))
        rows = _gather_numbers(self._group, [step.number, self._settings_digest, names, step.forwards, scale])
        forwards = {row[3] for row in rows} - {0}
        scales = {row[4] for row in rows if row[3] or not forwards}
        if len(forwards) > 1 or len(scales) > 1 or any(row[:3] != rows[0][:3] for row in rows):
            by_rank = _gather_objects(self._group, (self._settings, step))
            raise _step_difference(by_rank) or _unexplained("step")
        return sum(row[3] == 0 for row in rows) if forwards else 0


def without_addresses(value: object) -> str:
    """The representation of a value without the addresses of objects, which differ between processes.

    Example:
        >>> without_addresses(print), "0x" in without_addresses(lambda: 0)
        ('<built-in function print>', False)
    """
    return _ADDRESS.sub("", repr(value))


def describe(tensor: Tensor) -> str:
    """Shape, dtype and whether it wants a gradient, in words.

    Example:
        >>> describe(torch.ones(2, 3))
        'float32 [2, 3]'
    """
    kind = str(tensor.dtype).removeprefix("torch.")
    return f"{kind} {list(tensor.shape)}" + (" with gradient" if tensor.requires_grad else "")


def difference(by_rank: Mapping[int, Facts], what: str) -> AgreementError | None:
    """The first thing in which ranks differ: a name that some lack, then the order of names, then a text.

    Args:
        by_rank: the facts of every rank.
        what: what kind of thing the names name.

    Returns:
        None if all are the same.

    Example:
        >>> print(difference({0: [("rank", "4")], 1: [("rank", "8")], 2: [("rank", "4")]}, "setting"))
        setting 'rank' differs: rank 1 has 8 where ranks 0, 2 have 4
    """
    names = {rank: [name for name, _ in facts] for rank, facts in by_rank.items()}
    for name in dict.fromkeys(name for own in names.values() for name in own):
        having = [rank for rank, own in names.items() if name in own]
        if len(having) < len(names):
            return _missing(name, having, [rank for rank in names if rank not in having], what)
    longest = max(map(len, names.values()))
    for place in range(longest):
        here = {rank: own[place] if place < len(own) else None for rank, own in names.items()}
        if len(set(here.values())) > 1:
            return _odd({rank: repr(name) if name else "nothing" for rank, name in here.items()}, "order differs: ")
    texts = {rank: dict(facts) for rank, facts in by_rank.items()}
    for name in dict.fromkeys(name for own in names.values() for name in own):
        here = {rank: own[name] for rank, own in texts.items()}
        if len(set(here.values())) > 1:
            return _odd(here, f"{what} {name!r} differs: ")
    return None


def _missing(name: str, having: list[int], lacking: list[int], what: str) -> AgreementError:
    if len(having) < len(lacking):
        message = f"{_ranks(having)} {_verb(having)} {what} {name!r}, which {_ranks(lacking)} {_verb(lacking)} not"
        return AgreementError(message, having)
    odd = lacking if len(lacking) < len(having) else sorted(having + lacking)
    message = f"{_ranks(lacking)} {_verb(lacking)} no {what} {name!r}, which {_ranks(having)} {_verb(having)}"
    return AgreementError(message, odd)


def _step_difference(by_rank: Mapping[int, tuple[Facts, Step]]) -> AgreementError | None:
    settings = difference({rank: facts for rank, (facts, _) in by_rank.items()}, "setting")
    if settings is not None:
        return settings
    steps = {rank: step for rank, (_, step) in by_rank.items()}
    active = {rank: step.forwards for rank, step in steps.items() if step.forwards}
    if len(set(active.values())) > 1:
        texts = {rank: f"{n} forward pass{'es' if n > 1 else ''}" for rank, n in active.items()}
        error = _odd(texts, "", verbs=("did", "did"), since=" since its last reduction")
        return AgreementError(f"{error}: {_no_sync(error.ranks)}", error.ranks)
    scales = {rank: f"{step.loss_scale:g}" for rank, step in steps.items() if step.forwards or not active}
    if len(set(scales.values())) > 1:
        return _odd(scales, "the loss scale differs: ")
    if len({step.number for step in steps.values()}) > 1:
        return _odd({rank: f"step {step.number}" for rank, step in steps.items()}, "", verbs=("is at", "are at"))
    names = difference({rank: [(name, "") for name in step.names] for rank, step in steps.items()}, "parameter")
    return names and AgreementError(f"in the first bucket of a step: {names}", names.ranks)


def _no_sync(odd: Sequence[int]) -> str:
    return "was it in no_sync() alone?" if len(odd) == 1 else "was one of them in no_sync() alone?"


def _odd(
    texts: Mapping[int, str], prefix: str, verbs: tuple[str, str] = ("has", "have"), since: str = ""
) -> AgreementError:
    """Tell the minority's texts from the majority's; without a majority tell all of them."""
    groups: dict[str, list[int]] = {}
    for rank, text in texts.items():
        groups.setdefault(text, []).append(rank)
    ordered = sorted(groups.items(), key=lambda item: len(item[1]))
    told = [f"{_ranks(ranks)} {_verb(ranks, verbs)} {text}" for text, ranks in ordered]
    told[0] += since
    tie = len(ordered[-2][1]) == len(ordered[-1][1])
    odd = [rank for _, ranks in (ordered if tie else ordered[:-1]) for rank in ranks]
    return AgreementError(f"{prefix}{', '.join(told[:-1])} where {told[-1]}", sorted(odd))


def _drifted(names: list[str], values: Mapping[int, int]) -> AgreementError:
    more = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
    groups: dict[int, list[int]] = {}
    for rank, value in values.items():
        groups.setdefault(value, []).append(rank)
    ordered = sorted(groups.values(), key=len)
    if len(ordered[-2]) == len(ordered[-1]):
        sides = " and ".join(_ranks(ranks) for ranks in ordered)
        return AgreementError(
            f"replicas drifted apart: tensor {names[0]!r}{more} differs between {sides}", list(values)
        )
    odd = sorted(rank for ranks in ordered[:-1] for rank in ranks)
    message = f"replicas drifted apart: tensor {names[0]!r}{more} differs on {_ranks(odd)} from {_ranks(ordered[-1])}"
    return AgreementError(message, odd)


def _unexplained(what: str) -> AgreementError:
    return AgreementError(f"the ranks differ in a {what}, but tell the same about it: a rank's digest is wrong")


def _ranks(ranks: Sequence[int]) -> str:
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, sorted(ranks)))}"


def _verb(ranks: Sequence[int], verbs: tuple[str, str] = ("has", "have")) -> str:
    return verbs[len(ranks) > 1]


def _digest(facts: Facts) -> int:
    return digest(*(text for fact in facts for text in fact))


def device_of(group: dist.ProcessGroup) -> torch.device:
    """Where this group's small tensors live: the CPU if its backend reaches it."""
    cpu = torch.device("cpu")
    if cpu in group._device_types:  # pyright: ignore[reportPrivateUsage]
        return cpu
    return torch.device("cuda", torch.cuda.current_device())


def _gather_numbers(group: dist.ProcessGroup, numbers: list[int]) -> list[list[int]]:
    return _gather(group, torch.tensor(numbers, dtype=torch.int64, device=device_of(group)))


def _gather(group: dist.ProcessGroup, mine: Tensor) -> list[list[int]]:
    """Every rank's numbers, by rank in the group."""
    everyone = torch.empty(group.size(), mine.numel(), dtype=mine.dtype, device=mine.device)
    dist.all_gather(list(everyone.unbind()), mine, group=group)
    return everyone.tolist()


def _gather_objects(group: dist.ProcessGroup, mine: object) -> dict[int, Any]:
    """Every rank's object, by global rank."""
    everyone: list[Any] = [None] * group.size()
    dist.all_gather_object(everyone, mine, group=group)
    return dict(zip(dist.get_process_group_ranks(group), everyone, strict=True))
