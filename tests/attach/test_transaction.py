"""Buckets of a step overlap, in an order that nothing but they themselves decides, and with the same outcome."""

import math
import random
import time

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import distopt
from distopt.attach import engine
from distopt.attach.transaction import Transaction
from distopt.comm.requests import Gather, Swap, Within
from distopt.errors import PeerLostError
from distopt.reducers.reducer import Proposal
from tests.attach.models import batch, mlp, wrap
from tests.processes import run_ranks
from tests.simulation import plain


class Pending:
    """An average over ranks that all have the same; may be looked at when it was waited for."""

    def __init__(self, line, label, answer):
        self.line, self.label, self.answer = line, label, answer

    def wait(self):
        self.line.waited.append(self.label)
        self.line.landed(self.label)
        return self.answer


class Line:
    """A communicator that notes what is begun and waited for."""

    def __init__(self, landed=lambda label: None):
        self.begun, self.waited, self.landed = [], [], landed

    def start(self, request):
        inner = request.request if isinstance(request, Within) else request
        tensor = getattr(inner, "tensor", getattr(inner, "rows", inner))
        label = tuple(int(number) for number in tensor.flatten()[:2])
        self.begun.append(label)
        return Pending(self, label, tensor)


KINDS = {
    "average": lambda tensor: tensor,
    "gather": Gather,
    "swap": Swap,
    "inside": lambda tensor: Within("inside", tensor),
}
"""Ways to ask for something."""

Buckets = st.lists(st.lists(st.sampled_from(["average", "gather", "swap"]), max_size=3), min_size=1, max_size=7)


def reduction(bucket, kinds, *, bad=None, fails=None, none=False, log=None):
    """Ask once for each of the kinds; something is wrong with the round ``bad``, or before the round ``fails``."""
    try:
        for number, kind in enumerate(kinds):
            if number == fails:
                raise ValueError(f"bucket {bucket} fails")
            tensor = torch.tensor([bucket, number, math.nan if number == bad else 0.0])
            answer = yield KINDS[kind](tensor)
            assert answer is tensor
        if fails == len(kinds):
            raise ValueError(f"bucket {bucket} fails")
        return None if none else Proposal(lambda: log.append(bucket) if log is not None else None)
    finally:
        if log is not None:
            log.append(("closed", bucket))


def expected(counts):
    """The order of what is begun: each bucket's first round, then one more of each that waits, oldest first."""
    order, waiting = [], []
    for bucket, count in enumerate(counts):
        before, waiting = waiting, []
        if count:
            order.append((bucket, 0))
            waiting.append((bucket, 0))
        ahead = []
        for b, r in before:
            if r + 1 < counts[b]:
                order.append((b, r + 1))
                ahead.append((b, r + 1))
        waiting = waiting + ahead
    while waiting:
        b, r = waiting.pop(0)
        if r + 1 < counts[b]:
            order.append((b, r + 1))
            waiting.append((b, r + 1))
    return order


def test_two_rounds_a_bucket():
    """P0, P1 Q0, P2 Q1, Q2."""
    line = Line()
    transaction = Transaction(line)
    for bucket in range(3):
        transaction.propose(reduction(bucket, ["average"] * 2))
    assert transaction.complete()
    assert line.begun == [(0, 0), (1, 0), (0, 1), (2, 0), (1, 1), (2, 1)]
    assert line.waited == line.begun


@given(buckets=Buckets)
def test_the_order_is_that_of_buckets_and_requests(buckets):
    line, log = Line(), []
    transaction = Transaction(line)
    for bucket, kinds in enumerate(buckets):
        transaction.propose(reduction(bucket, kinds, log=log))
    assert transaction.complete()
    assert line.begun == line.waited == expected([len(kinds) for kinds in buckets])
    log.clear()
    transaction.commit()
    assert log == list(range(len(buckets)))


@given(buckets=Buckets, inside=st.integers(0, 6), rounds=st.tuples(st.integers(0, 4), st.integers(0, 4)))
def test_rounds_among_some_ranks_move_nothing_else(buckets, inside, rounds):
    """Other ranks may need more or fewer of them: what all ranks do together stays in one order."""
    orders = []
    for count in rounds:
        line = Line()
        transaction = Transaction(line)
        for bucket, kinds in enumerate(buckets):
            extra = ["inside"] * count if bucket == inside else []
            transaction.propose(reduction(bucket, extra + kinds))
        assert transaction.complete()
        shift = dict.fromkeys([inside], count)
        labels = [(b, r - shift.get(b, 0)) for b, r in line.begun]
        orders.append([(b, r) for b, r in labels if r >= 0])
        own = [place for place, (b, r) in enumerate(labels) if r < 0]
        assert own == list(range(own[0], own[0] + count)) if own else True
    assert orders[0] == orders[1]


@given(buckets=Buckets.filter(lambda b: any("average" in kinds for kinds in b)), data=st.data())
def test_an_unsound_bucket_drops_the_step(buckets, data):
    """Alike on all ranks: what is begun depends on the averages alone. Nothing stays under way."""
    places = [(b, r) for b, kinds in enumerate(buckets) for r, kind in enumerate(kinds) if kind == "average"]
    bucket, bad = data.draw(st.sampled_from(places))
    line, log = Line(), []
    transaction = Transaction(line)
    for number, kinds in enumerate(buckets):
        transaction.propose(reduction(number, kinds, bad=bad if number == bucket else None, log=log))
    assert not transaction.complete()
    order = expected([len(kinds) for kinds in buckets])
    assert line.begun == order[: len(line.begun)]
    assert line.waited == line.begun
    assert (bucket, bad) in line.begun
    assert (bucket, bad + 1) not in line.begun
    assert {entry[1] for entry in log} >= {b for b, _ in line.begun}


def test_a_bucket_that_cannot_be_represented_drops_the_step():
    line = Line()
    transaction = Transaction(line)
    for number in range(4):
        transaction.propose(reduction(number, ["average"] * 2, none=number == 1))
    assert not transaction.complete()
    assert line.waited == line.begun


@given(counts=st.lists(st.integers(0, 3), min_size=1, max_size=6), place=st.integers(0, 5), before=st.integers(0, 3))
def test_a_plan_that_fails(counts, place, before):
    """Its error is raised, and what was under way is waited for: nothing writes into memory any more."""
    place %= len(counts)
    before = min(before, counts[place])
    line = Line()
    transaction = Transaction(line)

    def carry_out():
        for number, count in enumerate(counts):
            fails = before if number == place else None
            transaction.propose(reduction(number, ["average"] * count, fails=fails))
        transaction.complete()

    with pytest.raises(ValueError, match=f"bucket {place} fails"):
        carry_out()
    assert sorted(line.waited) == sorted(line.begun)
    assert not transaction.sound


def test_a_lost_peer_is_raised_at_once():
    """Its connections are closed: there is nothing to wait for."""

    def landed(label):
        raise PeerLostError("rank 1 is gone", (1,))

    line = Line(landed)
    transaction = Transaction(line)
    transaction.propose(reduction(0, ["average"] * 2))
    with pytest.raises(PeerLostError, match="rank 1"):
        transaction.propose(reduction(1, ["average"] * 2))
    assert line.waited == [(0, 0)]


class OneByOne(Transaction):
    """Ends with each bucket before it begins with the next."""

    def propose(self, reduction):
        super().propose(reduction)
        self.complete()


def trained(rank, transaction, reducer, bad_step):
    """What a model of many buckets comes to; each rank's backward is held up here and there."""
    torch.manual_seed(0)
    engine.Transaction = transaction
    chance = random.Random(rank)
    model = wrap(mlp(layers=7), bucket_kib=9)
    registration = distopt.register(model, reducer)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for parameter in model.parameters():
        parameter.register_hook(lambda gradient: time.sleep(chance.choice([0, 0, 0.003])))
    for step in range(6):
        loss = model(batch(rank, step)).square().mean()
        (loss * math.nan if step == bad_step and rank == 1 else loss).backward()
        if all(parameter.grad.isfinite().all() for parameter in model.parameters()):
            optimizer.step()
        optimizer.zero_grad()
    stats = registration.stats()
    kept = [plain(residual) for residual in registration._engine.state.residuals.values()]
    return [*model.parameters(), *kept], stats.skipped_steps, len(registration._attachment.layout())


REDUCERS = {
    "PowerSGD": distopt.PowerSGD(rank=2),
    "alternate": distopt.PowerSGD(rank=2, passes="alternate"),
    "coded": distopt.PowerSGD(rank=2, wire_dtype=torch.bfloat16),
    "TopK": distopt.TopK(fraction=0.1),
    "AllReduce": distopt.AllReduce(),
    "mixed": distopt.ByName({"0.*": distopt.TopK(fraction=0.1)}, default=distopt.PowerSGD(rank=2)),
}


def overlapping_job(rank):
    outcomes = {}
    for name, reducer in REDUCERS.items():
        (ours, *told), (theirs, *as_told) = (trained(rank, t, reducer, 3) for t in (Transaction, OneByOne))
        same = all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
        outcomes[name] = same, told == as_told, *told
    return outcomes


@pytest.mark.parametrize("world", [2, 3])
def test_overlapping_changes_no_bit(world):
    """On real ranks, whose buckets come at times of their own."""
    for outcomes in run_ranks(world, overlapping_job, timeout=240):
        assert {name: found[:3] for name, found in outcomes.items()} == dict.fromkeys(REDUCERS, (True, True, 1))
        assert all(buckets >= 4 for *_, buckets in outcomes.values())
