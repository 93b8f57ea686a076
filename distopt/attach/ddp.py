"""Meeting the gradients of `DistributedDataParallel`: its communication hook.

DDP hands over its buckets in their order, on the thread that runs backward, and waits for all of them when backward
ends. We take a bucket there, reduce it on our worker's thread, and complete no bucket before the last one is known to
be sound.
"""

# DDP compares the hook's annotations with objects: this module cannot defer their evaluation.

import dataclasses
import re
import weakref
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.futures import Future
from torch.nn.parallel import DistributedDataParallel

from distopt.attach.cutting import Bucketful, Part, cut
from distopt.attach.engine import Engine
from distopt.attach.exemptions import plain_name
from distopt.attach.gradients import gradients_of
from distopt.attach.streams import Lanes
from distopt.attach.transaction import spoil
from distopt.comm.worker import Worker
from distopt.errors import RegistrationError

STEPS_TO_SETTLE = 2
"""DDP lays its buckets out anew after the first step (``static_graph``: the second), in the order in which gradients
turned up. Sums over three or more ranks depend on the layout in their last bits, so a run that saves and a run that
resumes both keep the layout of the save until the latter's buckets have settled."""


_FROM_BACKEND = re.compile(r"\[.*(gloo|nccl)", re.IGNORECASE)
"""How an error begins that a connection has failed, unlike DDP's own of what a model did."""


@dataclasses.dataclass
class _Step:
    """A backward pass under way."""

    units: list[tuple[str, ...]] | None  # the layout to keep to; None: whatever buckets come
    arrived: dict[str, Part] = dataclasses.field(default_factory=dict[str, Part])
    waiting: list[tuple[Future[Tensor], Tensor]] = dataclasses.field(
        default_factory=list[tuple[Future[Tensor], Tensor]]
    )
    copied: list[tuple[Tensor, Tensor]] = dataclasses.field(default_factory=list[tuple[Tensor, Tensor]])
    layout: list[Sequence[str]] = dataclasses.field(default_factory=list[Sequence[str]])
    error: Exception | None = None


class DDPAttachment:
    """The communication hook of one DDP model.

    Args:
        model: the wrapped model; the hook is registered on it, for life.
        engine: carries out the steps.
    """

    fused = False

    def __init__(self, model: DistributedDataParallel, engine: Engine) -> None:
        self._names = {id(parameter): plain_name(name) for name, parameter in model.module.named_parameters()}
        self._engine = engine
        # DDP's reducer keeps the hook, where no garbage collector sees it: a model held here would never be freed.
        self._model = weakref.ref(model)
        self._forwards = 0
        self._passes = 0
        self._delayed = self._handed = 0
        self._count_buckets(model)
        model.register_forward_hook(self._count_forward)
        self._watch_forward(model)
        self._worker = Worker("distopt-ddp")
        self._lanes = Lanes()
        self._step: _Step | None = None
        self._error: Exception | None = None
        self._layout: Sequence[Sequence[str]] = []
        self._cut: dict[int, Bucketful] = {}
        self._kept: tuple[list[tuple[str, ...]], int] = ([], 0)

    def settle(self) -> None:
        """See `Attachment.settle`."""
        self._worker.drain()

    def layout(self) -> list[list[str]]:
        """See `Attachment.layout`."""
        return [list(names) for names in self._layout]

    def keep_layout(self, layout: Sequence[Sequence[str]]) -> None:
        """See `Attachment.keep_layout`."""
        self._layout = [list(names) for names in layout]
        self._kept = ([tuple(names) for names in layout], STEPS_TO_SETTLE if layout else 0)

    def gradients(self) -> dict[str, Tensor]:
        """See `Attachment.gradients`."""
        return gradients_of(self._engine.slots.values())

    def reduce(self) -> bool:
        """See `Attachment.reduce`."""
        raise RegistrationError("DDP's backward pass reduces the gradients: there is nothing to call")

    def hook(
        self,
        state: object,
        bucket: dist.GradBucket,  # pyright: ignore[reportPrivateImportUsage]
    ) -> Future[Tensor]:
        """Take a bucket from DDP; its future completes, with all others of the step, when the last one is reduced."""
        buffer = bucket.buffer()
        on_device = buffer.device.type != "cpu"
        future: Future[Tensor] = Future(devices=[buffer.device]) if on_device else Future()
        bucketful = self._bucketful(bucket, buffer)
        lane = self._lanes.of(buffer.device)
        ready = lane.mark()
        first, last = self._first_and_last(bucket)
        # Outside of a backward pass it is ``Join`` that calls, for a rank that has run out of inputs.
        in_backward = torch._C._current_graph_task_id() >= 0  # pyright: ignore
        forwards = self._forwards if in_backward else 0
        if last:
            self._forwards = 0
            self._passes += 1
        if last and in_backward:
            torch.autograd.Variable._execution_engine.queue_callback(self._raise)  # pyright: ignore

        def job() -> None:
            lane.enter()
            lane.follow(ready, (buffer,))
            step = self._begin(bucketful.names, forwards) if first or self._step is None else self._step
            step.waiting.append((future, buffer))
            self._guarded(step, lambda: self._deliver(step, bucketful))
            if last:
                self._guarded(step, lambda: self._finish(step))
                self._release(step)

        self._worker.submit(job)
        return future

    def _first_and_last(self, bucket: Any) -> tuple[bool, bool]:
        """Whether a bucket is the first of its backward pass, and whether it is the last.

        With ``static_graph`` DDP hands over all buckets of its first pass when that is over, each as number 0.
        """
        if self._passes > 0 or self._delayed < 2 or bucket.index() > 0:
            return bucket.index() == 0, bucket.is_last()
        self._handed += 1
        return self._handed == 1, self._handed == self._delayed

    def _count_buckets(self, model: DistributedDataParallel) -> None:
        """Note how many buckets DDP may hand over at once; it tells outside of its backward pass only."""
        if model.static_graph and self._passes == 0 and self._delayed == 0:
            self._delayed = len(model.reducer._get_zeros_like_grad_buckets())

    def _bucketful(self, bucket: Any, buffer: Tensor) -> Bucketful:
        """The gradients of a bucket: those of the step before, if they lie in the same memory."""
        index: int = bucket.index()
        known = self._cut.get(index)
        # As long as we hold on to the memory of a bucket, no other one can have its address.
        if known is not None and known.buffer.data_ptr() == buffer.data_ptr() != 0:
            return known
        if known is not None:
            self._cut.clear()
        found = cut(buffer, {self._names[id(parameter)]: parameter for parameter in bucket.parameters()})
        if self._passes >= STEPS_TO_SETTLE:  # DDP would not be rid of its first buckets otherwise
            self._cut[index] = found
        return found

    def forget_forwards(self) -> None:
        """Count forward passes from here on: the ranks have agreed beforehand on those since the last step."""
        self._forwards = 0

    def _watch_forward(self, ddp: DistributedDataParallel) -> None:
        """Let DDP's own collectives before a forward pass name the rank that died in them, as ours do.

        They give all ranks the first one's buffers, and once the order of its buckets.
        """
        model = cast(Any, ddp)
        begin = model._pre_forward

        def watched(*inputs: Any, **kwargs: Any) -> Any:
            try:
                return begin(*inputs, **kwargs)
            except RuntimeError as error:
                if _FROM_BACKEND.match(str(error)) is None:
                    raise
                raise self._engine.communicator.blame(error, "what DDP sends before a forward pass") from error

        model._pre_forward = watched

    def _count_forward(self, model: nn.Module, inputs: object, output: object) -> None:
        # One that raised is not counted: it may be tried again on its rank alone, with fewer rows for example.
        if model.training and torch.is_grad_enabled() and not torch.compiler.is_compiling():
            self._forwards += 1
            self._count_buckets(cast(DistributedDataParallel, model))

    @property
    def _joining(self) -> bool:
        model = cast(Any, self._model())
        return model is not None and bool(model._join_config.enable)

    def _raise(self) -> None:
        """Raise what went wrong in this backward pass: DDP, which asks next, would make a RuntimeError of it."""
        self.settle()
        if self._error is not None:
            self._lanes.join()  # nobody waits for the futures: kernels of ours may still use the buckets
            raise self._error

    def _begin(self, names: tuple[str, ...], forwards: int) -> _Step:
        kept, steps = self._kept
        self._kept = (kept, max(0, steps - 1))
        self._step = step = _Step(list(kept) if steps else None)
        self._guarded(step, lambda: self._engine.begin(names, forwards, joining=self._joining))
        return step

    def _guarded(self, step: _Step, act: Callable[[], None]) -> None:
        """Do something for a step unless it has failed; an error is kept for whoever waits on its futures."""
        if step.error is not None:
            return
        try:
            act()
        except Exception as error:
            step.error = error

    def _deliver(self, step: _Step, bucketful: Bucketful) -> None:
        """Reduce the units that are complete with this bucket."""
        if step.units is None or step.units[:1] == [bucketful.names]:
            if step.units is not None:
                step.units.pop(0)
            self._propose(step, bucketful, bucketful.buffer)
            return
        step.arrived.update(bucketful.parts())
        while step.units and all(name in step.arrived for name in step.units[0]):
            unit = step.units.pop(0)
            gathered = self._gathered(step, {name: step.arrived.pop(name) for name in unit})
            self._propose(step, gathered, gathered.buffer)

    def _gathered(self, step: _Step, parts: dict[str, Part]) -> Bucketful:
        """Copy gradients to where they would lie in a bucket of their own.

        The last bits of a matrix product depend on how its operands are aligned in memory: buckets of the same names
        must be the same in this as well.
        """
        first = next(iter(parts.values())).segment
        flat = first.new_empty(sum(part.segment.numel() for part in parts.values()))
        gathered = cut(flat, {name: self._engine.slots[name].parameter for name in parts})
        pairs = [(part.segment, copy) for part, copy in zip(parts.values(), gathered.segments, strict=True)]
        for original, copy in pairs:
            copy.copy_(original)
        step.copied.extend(pairs)
        return gathered

    def _propose(self, step: _Step, bucketful: Bucketful, flat: Tensor | None) -> None:
        step.layout.append(bucketful.names)
        self._engine.propose(bucketful.names, bucketful.gradients, bucketful.segments, flat)

    def _finish(self, step: _Step) -> None:
        """Take or drop the step, now that all of it is known."""
        if step.arrived:
            # The kept layout does not cover these: a parameter that was frozen when the state was saved.
            gradients, segments = zip(*step.arrived.values(), strict=True)
            step.layout.append(tuple(step.arrived))
            self._engine.propose(tuple(step.arrived), gradients, segments, None)
        self._layout = step.layout
        taken = self._engine.finish()
        for original, copy in step.copied:
            original.copy_(copy)
        if not taken:
            spoil(buffer for _, buffer in step.waiting)
        elif self._engine.joined > 0 and not getattr(self._model(), "_divide_by_initial_world_size", True):
            world_size = self._engine.communicator.world_size
            for _, buffer in step.waiting:
                buffer.mul_(world_size / (world_size - self._engine.joined))

    def _release(self, step: _Step) -> None:
        self._step, self._error = None, step.error
        for future, buffer in step.waiting:
            if step.error is None:
                future.set_result(buffer)
            else:
                future.set_exception(step.error)  # pyright: ignore[reportArgumentType]  torch annotates a result
