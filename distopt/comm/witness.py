"""When a collective fails: who is to blame, told to every survivor, and no survivor left waiting.

gloo tells a rank that its neighbour's connection closed; ranks further away in the ring wait on, until the group's
timeout. So a rank whose collective failed closes its own connections too, and the failure reaches all others at once.
Before that it reports in the store where it was and whose connections it lost, so that its own leaving is not mistaken
for a death. Who lost its connections without a report is dead; who neither reports nor lets go has stopped.

Nothing here is called while all is well, except `Witness.begin`, which counts in memory.
"""

import contextlib
import json
import os
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore, Store, TCPStore

from distopt.errors import PeerLostError

_TAG = 0x0D157  # of receives that nothing is ever sent to
_POLL = 0.02
_OWN_TIMEOUT = "Application timeout"  # what gloo says of connections that this process closed after a timeout


@dataclass(frozen=True)
class Report:
    """What a rank says of itself after a collective of its own has failed. Ranks are global.

    Args:
        rank: who reports.
        step: the step it was in.
        collective: the number of the one that failed, in the order in which they were begun.
        what: the collective that failed, in words.
        error: the first line of the error.
        lost: ranks that had closed their connection to it.
        expired: ranks whose connection it had closed itself because a time limit passed.
    """

    rank: int
    step: int
    collective: int
    what: str
    error: str
    lost: tuple[int, ...] = ()
    expired: tuple[int, ...] = ()


class Witness:
    """Finds out which rank is to blame for a failed collective.

    Args:
        group: whose collectives are watched; nobody else should use it. Made on every rank at the same point.
        store: where ranks report; default: the store of the default group, over a connection of our own.
        grace: seconds to wait for the reports of others. A rank that is known to be dead is named after a fifth of it.

    Example:
        >>> witness = Witness(group)  # doctest: +SKIP
        >>> witness.begin(step=17)  # doctest: +SKIP
        >>> try:  # doctest: +SKIP
        ...     dist.all_reduce(tensor, group=group)
        ... except RuntimeError as error:
        ...     raise witness.blame(error, "the all-reduce of bucket 3") from error
    """

    def __init__(self, group: dist.ProcessGroup, store: Store | None = None, *, grace: float = 5.0) -> None:
        self._group = group
        self._groups = [group]
        self._ranks = dist.get_process_group_ranks(group)
        self._rank = dist.get_rank()
        self._grace = grace
        shared: Any = store or dist.distributed_c10d._get_default_store()  # pyright: ignore[reportPrivateUsage]
        self._host = _host(shared)
        # The trainer's thread may be waiting in the shared store, for the very rank that died, and would keep us out.
        name = f"distopt/witness/{group.group_name}"
        # A group that is made again after a failure can bear the same name: old reports are not about it.
        life = shared.add(f"{name}/lives/{self._rank}", 1)
        self._store = PrefixStore(f"{name}/{life}", shared.clone())
        self._verdict: PeerLostError | None = None
        self._step = 0
        self._collective = 0

    def watch(self, parts: Sequence[dist.ProcessGroup]) -> None:
        """Look at groups of some of the ranks besides, in the place of those watched so far.

        A failure in one of them ends all of them: ranks of other parts could not know of it.

        Args:
            parts: the groups that this rank is in.
        """
        self._groups = [self._group, *parts]

    def begin(self, step: int) -> int:
        """Count a collective that is about to be called. No traffic.

        Args:
            step: the step it belongs to.

        Returns:
            Its number.
        """
        self._step = step
        self._collective += 1
        return self._collective

    def blame(self, error: BaseException, what: str, collective: int | None = None) -> PeerLostError:
        """Find out why a collective failed. Closes the group's connections: it is of no use afterwards.

        Args:
            error: what the collective raised.
            what: the collective, in words: ``the all-reduce of bucket 3``.
            collective: its number, if others may have been begun since.

        Returns:
            The error to raise, with the ranks to blame; after the first call always the same one.
        """
        if self._verdict is None:
            lost, expired = _connections(self._groups)
            text = next(iter(str(error).splitlines()), "") or type(error).__name__
            number = self._collective if collective is None else collective
            mine = Report(self._rank, self._step, number, what, text, lost, expired)
            reports = {self._rank: mine}
            reachable = _within(self._grace, lambda: self._post(mine))
            for group in self._groups:
                abort(group)
            reachable = reachable and _within(2 * self._grace, lambda: self._collect(reports))
            message, ranks = judge(mine, dict(reports), self._ranks, None if reachable else self._host, reachable)
            if any(report.expired for report in reports.values()):
                message += f" (deadline {_gloo(self._group).options._timeout.total_seconds():g} s)"
            self._verdict = PeerLostError(message, ranks)
            if reachable:
                _within(self._grace, lambda: self._part(ranks))
        return self._verdict

    def _post(self, mine: Report) -> None:
        self._store.set(f"report/{mine.rank}", json.dumps(asdict(mine)))
        self._store.check([f"report/{mine.rank}"])  # the answer proves that the report has arrived

    def _collect(self, reports: dict[int, Report]) -> None:
        """Wait for reports until all have come, or it is clear who will send none."""
        start = time.monotonic()
        while len(reports) < len(self._ranks):
            for rank in self._ranks:
                if rank not in reports and self._store.check([f"report/{rank}"]):
                    reports[rank] = _parse(self._store.get(f"report/{rank}"))
            # A rank whose time limit passes closes its connections a moment before it reports: leave it the moment.
            clear = _gone(reports) and not any(report.expired for report in reports.values())
            if time.monotonic() - start > (self._grace / 5 if clear else self._grace):
                return
            time.sleep(_POLL)

    def _part(self, blamed: Iterable[int]) -> None:
        """The rank that hosts the store must not take it away before the others have read it."""
        self._store.set(f"read/{self._rank}", "")
        self._store.check([f"read/{self._rank}"])
        if self._rank == self._host:
            keys = [f"read/{rank}" for rank in self._ranks if rank not in set(blamed)]
            start = time.monotonic()
            while not self._store.check(keys) and time.monotonic() - start < self._grace:
                time.sleep(_POLL)


def judge(
    mine: Report, reports: Mapping[int, Report], ranks: Iterable[int], host: int | None = None, reachable: bool = True
) -> tuple[str, tuple[int, ...]]:
    """Who is to blame, given what is known.

    Args:
        mine: this rank's report.
        reports: all reports that were read, by rank, with this rank's own.
        ranks: all ranks of the group.
        host: the rank that hosts the store, if the store does not answer and the rank is known.
        reachable: whether the store answers.

    Returns:
        A sentence, and the ranks it names as the cause.

    Example:
        >>> mine = Report(0, 17, 40, "the all-reduce of bucket 3", "closed by peer", lost=(2,))
        >>> judge(mine, {0: mine, 1: replace(mine, rank=1)}, [0, 1, 2])
        ('rank 2 is gone, its connections closed, in the all-reduce of bucket 3 at step 17', (2,))
    """
    where = f"in {mine.what} at step {mine.step}"
    if not reachable:
        return _judge_alone(mine, reports, where, host)
    gone = _gone(reports)
    expired = any(report.expired for report in reports.values())
    if gone and not expired:
        return f"{_ranks(gone)} gone, {_their(gone)} connections closed, {where}", gone
    silent = tuple(sorted(set(ranks) - set(reports)))
    if silent:
        return f"{_ranks(silent, '')} stopped answering {where}", silent
    origins = tuple(sorted(rank for rank, report in reports.items() if not report.lost and not report.expired))
    own = f"{_ranks(origins[:1], '')} reports: {reports[origins[0]].error}" if origins else ""
    places: dict[tuple[int, int], list[int]] = {}
    for rank, report in sorted(reports.items()):
        places.setdefault((report.step, report.collective), []).append(rank)
    if len(places) > 1:
        told, blamed = _elsewhere(list(places.values()), reports)
        return f"{told}{own and '; '}{own}", blamed
    if origins:
        return f"{_ranks(origins, '')} failed {where}; {own}", origins
    return f"no rank is missing, but connections failed {where}: {mine.error}", ()


def abort(group: dist.ProcessGroup) -> None:
    """Close this rank's connections of a group, so that whoever waits for it in a collective fails at once.

    Safe to call from any thread, also while a collective is under way, and more than once.

    Args:
        group: the group; of no use afterwards, but to be destroyed.
    """
    gloo = _gloo(group)
    if gloo is None:
        group.abort()
        return
    # ProcessGroupGloo.abort() and shutdown() do nothing (torch 2.13), and destroying the group closes nothing while a
    # failed operation holds on to it. But gloo closes all connections of a context whose receive runs out of time.
    for peer in range(group.size()):
        if peer != group.rank():
            with contextlib.suppress(RuntimeError):
                gloo.recv([torch.empty(1)], peer, _TAG).wait(timedelta(milliseconds=1))


def _connections(groups: Iterable[dist.ProcessGroup]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Global ranks that have closed a connection to us, and those to whom we closed one after a timeout."""
    lost: set[int] = set()
    expired: set[int] = set()
    for group in groups:
        gloo = _gloo(group)
        for peer, rank in enumerate(dist.get_process_group_ranks(group) if gloo else ()):
            if peer != group.rank():
                try:
                    gloo.recv([torch.empty(1)], peer, _TAG)  # refused at once if the connection is closed
                except RuntimeError as refusal:
                    (expired if _OWN_TIMEOUT in str(refusal) else lost).add(rank)
    return tuple(sorted(lost)), tuple(sorted(expired))


def _gloo(group: dist.ProcessGroup) -> Any:
    """The gloo backend of a group, None if it has none."""
    with contextlib.suppress(RuntimeError):
        backend = group._get_backend(torch.device("cpu"))  # pyright: ignore[reportPrivateUsage]
        if backend.name() == "gloo":
            return backend
    return None


def _host(store: Store) -> int | None:
    """The rank whose process serves a store, as far as that is known."""
    while isinstance(store, PrefixStore):
        store = store.underlying_store
    # torchrun's agent serves the store itself and says so to its workers; otherwise rank 0 does.
    by_agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    return 0 if isinstance(store, TCPStore) and not by_agent else None


def _within(seconds: float, act: Callable[[], None]) -> bool:
    """Whether ``act`` ended without an error in time. It goes on alone if not: a store can block without end."""
    done: list[bool] = []

    def job() -> None:
        with contextlib.suppress(RuntimeError):
            act()
            done.append(True)

    thread = threading.Thread(target=job, name="distopt-witness", daemon=True)
    thread.start()
    thread.join(seconds)
    return bool(done)


def _parse(data: bytes) -> Report:
    report = Report(**json.loads(data))
    return replace(report, lost=tuple(report.lost), expired=tuple(report.expired))


def _gone(reports: Mapping[int, Report]) -> tuple[int, ...]:
    """Ranks that closed their connections without a report."""
    return tuple(sorted({rank for report in reports.values() for rank in report.lost} - set(reports)))


def _judge_alone(
    mine: Report, reports: Mapping[int, Report], where: str, host: int | None
) -> tuple[str, tuple[int, ...]]:
    """Without the store: its host if that is known and sent no report, or else who let this rank down.

    Neighbours that gave up waiting for the host close their connections too: who did says nothing here.
    """
    if host is not None and host not in reports:
        return f"rank {host} stopped answering {where}, and with it the store that it hosts", (host,)
    suspects = tuple(sorted(set(mine.lost or mine.expired) - set(reports)))
    known = f"no answer from {_ranks(suspects, '')}" if suspects else mine.error
    return f"the store does not answer, and who is to blame cannot be told: {known} {where}", suspects


def _elsewhere(places: list[list[int]], reports: Mapping[int, Report]) -> tuple[str, tuple[int, ...]]:
    ordered = sorted(places, key=len)
    told = [f"{_ranks(ranks)} at step {reports[ranks[0]].step} in {reports[ranks[0]].what}" for ranks in ordered]
    tie = len(ordered[-1]) == len(ordered[-2])
    blamed = [rank for ranks in (ordered if tie else ordered[:-1]) for rank in ranks]
    return f"{', '.join(told[:-1])} where {told[-1]}", tuple(sorted(blamed))


def _ranks(ranks: Iterable[int], verb: str = "is are") -> str:
    ranks = sorted(ranks)
    many = len(ranks) > 1
    return " ".join([f"rank{'s' if many else ''} {', '.join(map(str, ranks))}", *verb.split()[many : many + 1]])


def _their(ranks: tuple[int, ...]) -> str:
    return "their" if len(ranks) > 1 else "its"
