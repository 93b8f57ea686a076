"""Meeting the gradients of `DistributedDataParallel`: its communication hook.

DDP hands over its buckets in their order, on the thread that runs backward, and waits for all of them when backward
ends. We take a bucket there, reduce it on our worker's thread, and complete no bucket before the last one is known to
be sound.
"""

# DDP compares the hook's annotations with objects: this module cannot defer their evaluation.

import dataclasses
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.futures import Future
from torch.nn.parallel import DistributedDataParallel

from distopt.attach.exemptions import exempt_names
from distopt.attach.registration import Shapes, Tally
from distopt.attach.transaction import Transaction, spoil
from distopt.comm.communicator import Communicator
from distopt.comm.worker import Worker
from distopt.reducers.reducer import Bucket, Plan, Reducer, Slot, State

STEPS_TO_SETTLE = 2
"""DDP lays its buckets out anew after the first step (``static_graph``: the second), in the order in which gradients
turned up. Sums over three or more ranks depend on the layout in their last bits, so a run that saves and a run that
resumes both keep the layout of the save until the latter's buckets have settled."""


@dataclasses.dataclass
class _Step:
    """A backward pass under way."""

    transaction: Transaction
    units: list[tuple[str, ...]] | None  # the layout to keep to; None: whatever buckets come
    arrived: dict[str, tuple[Tensor, Tensor]] = dataclasses.field(default_factory=dict[str, tuple[Tensor, Tensor]])
    waiting: list[tuple[Future[Tensor], Tensor]] = dataclasses.field(
        default_factory=list[tuple[Future[Tensor], Tensor]]
    )
    layout: list[list[str]] = dataclasses.field(default_factory=list[list[str]])
    error: Exception | None = None


class DDPAttachment:
    """The communication hook of one DDP model.

    Args:
        model: the wrapped model; the hook is registered on it, for life.
        reducer: makes the plans.
        state: what the reducer remembers.
        tally: is kept here.
    """

    def __init__(self, model: DistributedDataParallel, reducer: Reducer, state: State, tally: Tally) -> None:
        exempt = exempt_names(model.module)
        optional = bool(model.find_unused_parameters or model.static_graph)
        self._slots = {
            id(parameter): Slot(_plain(name), parameter, exempt=name in exempt, optional=optional)
            for name, parameter in model.module.named_parameters()
        }
        self._by_name = {slot.name: slot for slot in self._slots.values()}
        self._reducer = reducer
        self._state = state
        self._tally = tally
        self._plans: dict[tuple[str, ...], Plan] = {}
        self._worker = Worker("distopt-ddp")
        self._step: _Step | None = None
        self._layout: list[list[str]] = []
        self._kept: tuple[list[tuple[str, ...]], int] = ([], 0)
        self.communicator: Communicator
        """Set by whoever made us, once the hook is known to be accepted."""
        self.shapes()  # settings that do not fit a parameter must fail here, not in backward

    def settle(self) -> None:
        """See `Attachment.settle`."""
        self._worker.drain()

    def layout(self) -> list[list[str]]:
        """See `Attachment.layout`."""
        return [list(names) for names in self._layout]

    def keep_layout(self, layout: Sequence[Sequence[str]]) -> None:
        """See `Attachment.keep_layout`."""
        self._kept = ([tuple(names) for names in layout], STEPS_TO_SETTLE if layout else 0)

    def shapes(self) -> Shapes:
        """See `Attachment.shapes`."""
        plans = [self._reducer.plan([slot]) for slot in self._by_name.values()]
        return {
            "parameter": {name: slot.parameter.shape for name, slot in self._by_name.items()},
            "residual": {name: shape for plan in plans for name, shape in plan.residual_shapes().items()},
            "factor": {name: shape for plan in plans for name, shape in plan.factor_shapes().items()},
        }

    def hook(
        self,
        state: object,
        bucket: dist.GradBucket,  # pyright: ignore[reportPrivateImportUsage]
    ) -> Future[Tensor]:
        """Take a bucket from DDP; its future completes, with all others of the step, when the last one is reduced."""
        buffer = bucket.buffer()
        on_device = buffer.device.type != "cpu"
        future: Future[Tensor] = Future(devices=[buffer.device]) if on_device else Future()
        parts = {
            self._slots[id(parameter)].name: _parts(buffer, gradient, parameter)
            for parameter, gradient in zip(bucket.parameters(), bucket.gradients(), strict=True)
        }
        ready = torch.cuda.current_stream(buffer.device).record_event() if buffer.is_cuda else None
        first, last = bucket.index() == 0, bucket.is_last()

        def job() -> None:
            if ready is not None:
                torch.cuda.current_stream(buffer.device).wait_event(ready)
            step = self._begin() if first or self._step is None else self._step
            step.waiting.append((future, buffer))
            self._guarded(step, lambda: self._deliver(step, parts, buffer))
            if last:
                self._guarded(step, lambda: self._finish(step))
                self._release(step)

        self._worker.submit(job)
        return future

    def _begin(self) -> _Step:
        kept, steps = self._kept
        self._kept = (kept, max(0, steps - 1))
        self._step = _Step(Transaction(self.communicator), list(kept) if steps else None)
        return self._step

    def _guarded(self, step: _Step, act: Callable[[], None]) -> None:
        """Do something for a step unless it has failed; an error is kept for whoever waits on its futures."""
        if step.error is not None:
            return
        try:
            act()
        except Exception as error:
            step.error = error

    def _deliver(self, step: _Step, parts: dict[str, tuple[Tensor, Tensor]], buffer: Tensor) -> None:
        """Reduce the units that are complete with this bucket."""
        self._tally.bytes_uncompressed += buffer.numel() * buffer.element_size()
        names = tuple(parts)
        if step.units is None or step.units[:1] == [names]:
            if step.units is not None:
                step.units.pop(0)
            self._propose(step, names, parts, buffer)
            return
        step.arrived.update(parts)
        while step.units and all(name in step.arrived for name in step.units[0]):
            unit = step.units.pop(0)
            self._propose(step, unit, {name: step.arrived.pop(name) for name in unit}, None)

    def _propose(
        self, step: _Step, names: tuple[str, ...], parts: dict[str, tuple[Tensor, Tensor]], flat: Tensor | None
    ) -> None:
        step.layout.append(list(names))
        plan = self._plans.get(names)
        if plan is None:
            plan = self._plans[names] = self._reducer.plan([self._by_name[name] for name in names])
        gradients, segments = zip(*(parts[name] for name in names), strict=True)
        step.transaction.propose(plan.reduce(Bucket(gradients, segments, flat), self._state))

    def _finish(self, step: _Step) -> None:
        """Take or drop the step, now that all of it is known."""
        if step.arrived:
            # The kept layout does not cover these: a parameter that was frozen when the state was saved.
            names = tuple(step.arrived)
            self._propose(step, names, step.arrived, None)
        self._layout = step.layout
        self._tally.steps += 1
        self._tally.bytes_sent = self.communicator.bytes_sent
        if step.transaction.sound:
            raw, sent = step.transaction.commit()
            self._tally.matrix_bytes_uncompressed += raw
            self._tally.matrix_bytes_sent += sent
            self._state.step += 1
        else:
            self._tally.skipped_steps += 1
            spoil(buffer for _, buffer in step.waiting)

    def _release(self, step: _Step) -> None:
        self._step = None
        for future, buffer in step.waiting:
            if step.error is None:
                future.set_result(buffer)
            else:
                future.set_exception(step.error)  # pyright: ignore[reportArgumentType]  torch annotates a result


def _parts(buffer: Tensor, gradient: Tensor, parameter: Tensor) -> tuple[Tensor, Tensor]:
    """A parameter's gradient in the bucket, in the parameter's own shape and layout, and as the segment that it is.

    `GradBucket.gradients()` cuts the buffer as if every parameter were row-major. DDP lays a dense gradient out like
    its parameter, so that the numbers of a transposed or channels-last one stand elsewhere.
    """
    start, numel = gradient.storage_offset(), gradient.numel()
    segment = buffer.as_strided((numel,), (1,), start)
    if parameter.is_contiguous() or not _is_dense(parameter):
        return gradient, segment
    return buffer.as_strided(parameter.shape, parameter.stride(), start), segment


def _is_dense(tensor: Tensor) -> bool:
    """Whether the elements fill their memory without gaps or overlaps, in whatever order of dimensions."""
    expected = 1
    for stride, size in sorted((st, si) for st, si in zip(tensor.stride(), tensor.shape, strict=True) if si > 1):
        if stride != expected:
            return False
        expected *= size
    return True


def _plain(name: str) -> str:
    return name.replace("_orig_mod.", "")
