"""Meeting the gradients of a model under ``fully_shard``: what a rank's shard of them is after the reduce-scatter.

FSDP calls our all-reduce hook as soon as the gradients of a unit are summed up inside the node, then gives each
parameter its piece and calls the parameter's own hook. By the first we know that a unit begins, by the second where its
gradients are: of FSDP's flat buffer nothing needs to be known. A complete unit is reduced on our worker's thread, while
backward goes on. When it is over, and the ranks of all shards have found the step sound, it is put in force.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Generator, Mapping, Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.utils import _pytree as pytree

from distopt.attach.engine import Engine
from distopt.attach.gradients import segment_of
from distopt.attach.iteration import reset_iteration
from distopt.attach.shards import Shards, piece_of
from distopt.attach.streams import Lanes, keep
from distopt.attach.transaction import spoil
from distopt.attach.units import declare, scale_of
from distopt.comm.worker import Worker
from distopt.errors import PeerLostError, RegistrationError


@dataclasses.dataclass
class _Step:
    """A backward pass under way."""

    forwards: int
    arrived: dict[str, Tensor] = dataclasses.field(default_factory=dict[str, Tensor])
    """Gradients of this pass, by name."""
    earlier: dict[str, Tensor] = dataclasses.field(default_factory=dict[str, Tensor])
    """Averages of passes before that nobody took away, to be added in the end."""
    begun: bool = False
    sound: bool = False
    error: Exception | None = None


class FSDPAttachment:
    """The hooks of one sharded model.

    Args:
        model: the root, which ``fully_shard`` was called on last.
        units: names of the parameters that each FSDP module manages.
        parameters: all of them by name, DTensors.
        engine: carries out the steps; its slots are this rank's pieces.
        shards: where this rank stands.
    """

    fused = False
    in_lockstep = True
    """Whether every rank has to go through forward and backward as often as the others."""

    def __init__(
        self,
        model: FSDPModule,
        units: Mapping[FSDPModule, Sequence[str]],
        parameters: Mapping[str, nn.Parameter],
        engine: Engine,
        shards: Shards,
    ) -> None:
        self._engine = engine
        self._shards = shards
        self._parameters = dict(parameters)
        self._worker = Worker("distopt-fsdp")
        self._lanes = Lanes()
        self._forwards = 0
        self._syncing = True
        self._model = model
        self._in_backward = False
        self._backward_pass = -1
        self._step: _Step | None = None
        self._open: dict[str, Tensor] = {}
        """Gradients of the unit that FSDP is at, by name."""
        self._awaited: set[str] = set()
        self._left: dict[str, Tensor] = {}
        """What lay in ``.grad`` of that unit's parameters before."""
        self._partial: set[str] = set()
        """Parameters whose ``.grad`` is this rank's own sum over passes that did not synchronise."""
        self._scales = [ScaleOf(parameter) for parameter in self._parameters.values()]
        for slot, scale in zip(engine.slots.values(), self._scales, strict=True):
            declare(slot.parameter, scale, 0)
        module = cast(nn.Module, model)
        module.register_forward_pre_hook(self._before_forward, prepend=True)
        module.register_forward_hook(self._after_forward)
        for module, names in units.items():
            module.set_all_reduce_hook(functools.partial(self._enter_unit, tuple(names)))
        for name, parameter in self._parameters.items():
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(functools.partial(self._take, name))

    def settle(self) -> None:
        """See `Attachment.settle`."""
        self._worker.drain()

    def layout(self) -> list[list[str]]:
        """See `Attachment.layout`: it is the model's own, and never changes."""
        return []

    def keep_layout(self, layout: Sequence[Sequence[str]]) -> None:
        """See `Attachment.keep_layout`."""

    def gradients(self) -> dict[str, Tensor]:
        """See `Attachment.gradients`."""
        return {name: piece_of(p.grad) for name, p in self._parameters.items() if p.grad is not None}

    def reduce(self) -> bool:
        """See `Attachment.reduce`."""
        raise RegistrationError("the sharded model's backward pass reduces the gradients: there is nothing to call")

    def forget_forwards(self) -> None:
        """Count forward passes from here on: the ranks have agreed beforehand on those since the last step."""
        self._forwards = 0

    @contextlib.contextmanager
    def no_sync(self) -> Generator[None]:
        """Sum up gradients inside the node only, until the next backward pass outside of this context."""
        before, self._syncing = self._syncing, False
        try:
            yield
        finally:
            self._syncing = before

    def _before_forward(self, model: nn.Module, inputs: object) -> None:
        if self._in_backward and torch._C._current_graph_task_id() < 0:  # pyright: ignore
            # A pass that raised: FSDP would reduce nothing from here on, and say nothing.
            self._in_backward = False
            reset_iteration(self._model)
        if model.training and torch.is_grad_enabled():
            self._forwards += 1

    def _after_forward(self, model: nn.Module, inputs: object, output: object) -> None:
        for tensor in pytree.tree_leaves(output):
            if isinstance(tensor, Tensor) and tensor.requires_grad:
                tensor.register_hook(self._note_backward)

    def _note_backward(self, gradient: Tensor) -> None:
        if not self._in_backward:
            self._in_backward = True
            _when_backward_ends(self._note_end)

    def _note_end(self) -> None:
        self._in_backward = False

    @torch.no_grad()
    def _enter_unit(self, names: Sequence[str], flat: Tensor) -> None:
        """Take away what lies in ``.grad``, so that FSDP gives us this pass's gradients alone."""
        # The engine's number of the pass, not a flag: a pass that raised would leave it up.
        current = torch._C._current_graph_task_id()  # pyright: ignore
        if current != self._backward_pass:
            self._backward_pass, self._step = current, None
            self._open, self._left = {}, {}
        self._leave_unit()
        if self._syncing and self._step is None:
            self._step, self._forwards = _Step(self._forwards), 0
            # FSDP's own callback, which may reduce the last units, was queued when backward began.
            _when_backward_ends(self._finish)
        for name in names:
            parameter = self._parameters[name]
            if parameter.grad is not None:
                self._left[name], parameter.grad = parameter.grad, None
        self._awaited = {name for name in names if self._parameters[name].requires_grad}

    @torch.no_grad()
    def _take(self, name: str, parameter: Tensor) -> None:
        """Take the gradient of one parameter, which FSDP has just cut out."""
        if name not in self._awaited:  # without its unit's hook it is nobody's: a gradient set by hand
            return
        assert parameter.grad is not None
        gradient, left = piece_of(parameter.grad), self._left.pop(name, None)
        self._awaited.remove(name)
        if not self._syncing:
            self._partial.add(name)
        if left is not None and (name in self._partial or self._step is None):
            gradient.add_(piece_of(left))
        elif left is not None and self._step is not None:
            self._step.earlier[name] = piece_of(left)
        self._open[name] = gradient
        if not self._awaited:
            self._leave_unit()

    def _leave_unit(self) -> None:
        """Reduce the gradients of a unit; those that this pass has none of stay as they were."""
        for name, left in self._left.items():
            self._parameters[name].grad = left
        arrived, self._open, self._left = self._open, {}, {}
        self._awaited = set()
        if self._syncing and arrived:
            self._submit(arrived)

    def _submit(self, gradients: dict[str, Tensor]) -> None:
        step = self._step
        assert step is not None
        step.arrived.update(gradients)
        lane = self._lanes.of(next(iter(gradients.values())).device)
        ready = lane.mark()

        def job() -> None:
            lane.enter()
            lane.follow(ready, gradients.values())
            _guarded(step, lambda: self._propose(step, gradients))

        self._worker.submit(job)

    def _propose(self, step: _Step, gradients: Mapping[str, Tensor]) -> None:
        names = tuple(gradients)
        if not step.begun:
            self._engine.begin(names, step.forwards)
            step.begun = True
        parts = list(gradients.values())
        segments = [segment_of(part) for part in parts]
        self._engine.propose(names, parts, segments, _joined(segments))

    @torch.no_grad()
    def _finish(self) -> None:
        """Take the step on all ranks, or drop it on all; in the end of backward."""
        self._leave_unit()
        step = self._step
        assert step is not None
        # A parameter may have had its last gradient in a pass before this one.
        late = [name for name in self._parameters if name in self._partial and name not in step.arrived]
        grads = {name: piece_of(p.grad) for name in late if (p := self._parameters[name]).grad is not None}
        if grads:
            self._submit(grads)
        self._step, self._partial = None, set()
        self._worker.submit(lambda: _guarded(step, lambda: self._settle_on(step), always=True))
        self._worker.drain()
        self._lanes.join()
        if step.error is not None:
            raise step.error

    def _complete(self, step: _Step) -> None:
        step.sound = self._engine.complete()

    def _settle_on(self, step: _Step) -> None:
        _guarded(step, lambda: self._complete(step))
        if isinstance(step.error, PeerLostError):  # the others see it by themselves, when this rank is gone
            return
        device = next(iter(step.arrived.values())).device
        if self._engine.finish(self._shards.agree(step.sound, step.error, device)):
            keep(step.earlier.values())
            for name, earlier in step.earlier.items():
                step.arrived[name].add_(earlier)
                self._engine.norms.pop(name, None)  # it is not that of the sum
        else:
            spoil(iter(step.arrived.values()))


class ScaleOf:
    """Tells by what the gradient of a whole parameter is scaled to whoever asks for its piece."""

    def __init__(self, parameter: nn.Parameter) -> None:
        self._parameter = parameter

    def gradient_scale(self, index: int) -> float:
        """See `GradientScaling`."""
        return scale_of(self._parameter)


def _guarded(step: _Step, act: Callable[[], None], *, always: bool = False) -> None:
    """Do something for a step unless it has failed; an error is kept for the end of backward."""
    if step.error is not None and not always:
        return
    try:
        act()
    except Exception as error:
        step.error = error


def _when_backward_ends(act: Callable[[], None]) -> None:
    torch.autograd.Variable._execution_engine.queue_callback(act)  # pyright: ignore


def _joined(segments: Sequence[Tensor]) -> Tensor | None:
    """All segments as one, if they lie side by side in one piece of memory."""
    first = segments[0]
    end = first.storage_offset()
    for segment in segments:
        same = segment.dtype == first.dtype and _memory(segment) == _memory(first)
        if not same or segment.storage_offset() != end:
            return None
        end += segment.numel()
    return first.as_strided((end - first.storage_offset(),), (1,))


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
