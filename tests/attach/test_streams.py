"""What is enqueued where, and in which order, told by a stand-in for torch.cuda; and on the CPU nothing at all."""

import math
import threading

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import distopt
from distopt.attach.streams import Lane, Lanes, SideLane
from distopt.attach.transaction import Transaction
from distopt.comm.worker import Worker
from distopt.numerics.finite import all_finite, largest
from distopt.reducers.reducer import Proposal


class Event:
    """Stands for everything before a place of a stream."""

    def __init__(self, seen):
        self.seen = frozenset(seen)


class Stream:
    """Knows what has to be over before its next kernel runs."""

    def __init__(self, name):
        self.name, self.seen = name, set()

    def run(self, kernel):
        """Enqueue a kernel; gives what is over when it runs."""
        before = set(self.seen)
        self.seen.add(kernel)
        return before

    def record_event(self):
        return Event(self.seen)

    def wait_event(self, event):
        self.seen |= event.seen

    def wait_stream(self, other):
        self.seen |= other.seen


class Cuda:
    """What a lane asks of torch.cuda; the current stream is each thread's own, as is the device."""

    def __init__(self):
        self.default, self.local, self.made = Stream("default"), threading.local(), []

    def Stream(self, device, priority):
        self.made.append((Stream("side"), device, priority))
        return self.made[-1][0]

    def set_device(self, device):
        self.local.device = device

    def set_stream(self, stream):
        self.local.stream = stream

    def current_stream(self, device):
        return getattr(self.local, "stream", self.default)


class Memory:
    """A tensor that notes which streams use it."""

    def __init__(self):
        self.streams = []

    def record_stream(self, stream):
        self.streams.append(stream.name)


def test_a_step_on_two_threads():
    """The worker's kernels run after the bucket's, backward's after nothing of ours, and the optimizer's after all."""
    cuda, device = Cuda(), torch.device("cuda", 1)
    lane, worker, bucket = SideLane(device, cuda), Worker("test"), Memory()
    over = {}

    def job(number, mark):
        lane.enter()
        assert cuda.local.device == device
        lane.follow(mark, (bucket,))
        over[f"reduce {number}"] = cuda.current_stream(device).run(f"reduce {number}")

    for number in range(2):
        over[f"backward {number}"] = cuda.current_stream(device).run(f"backward {number}")
        mark = lane.mark()
        worker.submit(lambda number=number, mark=mark: job(number, mark))
        worker.drain()
    over["optimizer, not joined"] = cuda.current_stream(device).run("late")
    lane.join()
    over["optimizer"] = cuda.current_stream(device).run("optimizer")
    assert over["reduce 0"] == {"backward 0"}
    assert over["backward 1"] == {"backward 0"}
    assert over["reduce 1"] == {"backward 0", "backward 1", "reduce 0"}
    assert over["optimizer, not joined"] == {"backward 0", "backward 1"}
    assert over["optimizer"] >= {"reduce 0", "reduce 1"}
    assert bucket.streams == ["side", "side"]
    assert [(d, priority) for _, d, priority in cuda.made] == [(device, -1)]


def test_a_cpu_has_nothing_to_order():
    lanes = Lanes()
    lane = lanes.of(torch.device("cpu"))
    assert type(lane) is Lane
    assert lane is Lanes().of(torch.device("cpu"))
    lane.enter()
    lane.follow(lane.mark(), (torch.ones(1),))
    lane.join()
    lanes.join()


def test_a_lane_a_device(monkeypatch):
    made = []
    monkeypatch.setattr("distopt.attach.streams.SideLane", lambda device: made.append(device) or object())
    lanes, devices = Lanes(), [torch.device("cuda", 0), torch.device("cuda", 1)]
    assert lanes.of(devices[0]) is lanes.of(devices[0])
    assert lanes.of(devices[0]) is not lanes.of(devices[1])
    assert made == devices


Numbers = st.lists(st.floats(width=32) | st.sampled_from([math.inf, -math.inf, math.nan, 3.4e38]), max_size=6)


@given(numbers=Numbers, dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64]))
def test_the_largest_number_is_finite_if_all_are(numbers, dtype):
    tensor = torch.tensor(numbers, dtype=dtype)
    assert bool(largest(tensor).isfinite()) == all_finite(tensor)
    assert largest(tensor).shape == ()


class Later(Transaction):
    """Treats a CPU's numbers as an accelerator's."""

    def __init__(self, communicator):
        super().__init__(communicator)
        self.asked = 0

    def _is_finite(self, answer):
        self._unread.append(largest(answer))
        return True

    def _ask(self):
        self.asked += 1
        super()._ask()


class Alone:
    """A rank that is alone: an average is the tensor itself."""

    def __init__(self, request=None):
        self.request = request

    def start(self, request):
        return Alone(request)

    def wait(self):
        return self.request


@pytest.mark.parametrize("bad", [None, 0, 2])
def test_an_accelerator_is_asked_once_a_step(bad):
    """And if anything was not finite, nothing is put in force."""
    transaction, done = Later(Alone()), []

    def reduction(number):
        yield torch.full((3,), math.inf if number == bad else 1.0)
        yield torch.ones(2, dtype=(torch.float16, torch.float32, torch.complex64)[number])
        return Proposal(lambda: done.append(number))

    for number in range(3):
        transaction.propose(reduction(number))
    assert transaction.asked == 0
    assert transaction.complete() == (bad is None)
    assert transaction.complete() == (bad is None)
    assert transaction.asked == 1


@pytest.mark.parametrize("bad", [None, 1])
def test_what_proposals_say_of_themselves_is_asked_with_it(bad):
    transaction = Later(Alone())

    def reduction(number):
        yield torch.ones(2)
        return Proposal(lambda: None, sound=torch.tensor(number != bad))

    for number in range(3):
        transaction.propose(reduction(number))
    assert transaction.complete() == (bad is None)
    assert transaction.complete() == (bad is None)
    assert transaction.asked == 1


def test_what_cannot_be_represented_stays_unsound():
    """Whatever the numbers that were averaged."""
    transaction = Later(Alone())

    def reduction():
        yield torch.ones(2)
        return None

    transaction.propose(reduction())
    assert not transaction.complete()


def test_tensors_of_other_threads_are_adopted_once(alone, monkeypatch):
    """Whatever has come into the state beside the steps: memory that a step lets go of may not be given away at once."""
    kept = []
    monkeypatch.setattr("distopt.attach.engine.keep", lambda tensors: kept.append(len(list(tensors))))
    model = DistributedDataParallel(nn.Linear(8, 8, bias=False))
    registration = distopt.register(model, distopt.PowerSGD(rank=1))

    def steps(count):
        for _ in range(count):
            model(torch.ones(1, 8)).sum().backward()
        registration.stats()

    steps(2)
    assert kept == [0]
    registration.load_state_dict(registration.state_dict())
    steps(2)
    assert kept == [0, 2]
    registration.load_own_residuals(registration.own_residuals())
    steps(1)
    assert kept == [0, 2, 2]


class Noted(Lane):
    """A lane that notes what is asked of it, and on which thread."""

    def __init__(self):
        self.calls = []

    def _note(self, what):
        ours = threading.current_thread().name == "distopt-ddp"
        self.calls.append((what, "worker" if ours else "backward"))

    def mark(self):
        self._note("mark")
        return f"mark {len(self.calls)}"

    def enter(self):
        self._note("enter")

    def follow(self, mark, tensors=()):
        assert mark.startswith("mark")
        assert len(list(tensors)) == 1
        self._note("follow")

    def join(self):
        self._note("join")


@pytest.mark.parametrize("fails", [False, True])
def test_what_ddp_asks_of_its_lane(alone, monkeypatch, fails):
    """A mark a bucket in backward, followed on the worker's thread before anything of it is computed."""
    lane, lanes = Noted(), Lanes()
    lanes._used[torch.device("cpu")] = lane
    monkeypatch.setattr(lanes, "of", lambda device: lane)
    model = DistributedDataParallel(nn.Sequential(*[nn.Linear(32, 32) for _ in range(4)]), bucket_cap_mb=0.005)
    registration = distopt.register(model, distopt.PowerSGD(rank=1))
    registration._attachment._lanes = lanes
    for _ in range(3):  # the first of which has one bucket
        model(torch.ones(1, 32)).sum().backward()
    lane.calls.clear()
    propose = registration._engine.propose

    def proposing(*args):
        lane._note("propose")
        if fails:
            raise ValueError("no such plan")
        propose(*args)

    monkeypatch.setattr(registration._engine, "propose", proposing)
    loss = model(torch.ones(1, 32)).sum()
    if fails:
        with pytest.raises(ValueError, match="no such plan"):
            loss.backward()
    else:
        loss.backward()
    registration._attachment.settle()
    backward = [what for what, thread in lane.calls if thread == "backward"]
    worker = [what for what, thread in lane.calls if thread == "worker"]
    buckets = backward.count("mark")
    assert buckets > 1
    assert backward == ["mark"] * buckets + ["join"] * fails
    once = ["enter", "follow", "propose"]
    assert worker == (once + ["enter", "follow"] * (buckets - 1) if fails else once * buckets)
