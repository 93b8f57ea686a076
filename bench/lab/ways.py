"""The ways of reducing gradients that are compared: each is one model at work, told apart by what it hands over."""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.distributed.algorithms.ddp_comm_hooks import powerSGD_hook as torch_hook
from torch.distributed.algorithms.ddp_comm_hooks.debugging_hooks import noop_hook
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.futures import Future
from torch.nn.parallel import DistributedDataParallel

import distopt
from bench import epfml
from bench.lab.workloads import Batch, Workload
from distopt.reducers.reducer import Reducer

ONE_BUCKET = 100_000
"""Megabytes of a bucket that holds every gradient."""
NOOP, PLAIN, EPFML = "no-op hook", "DDP", "epfml powersgd, rank 4"
NATIVE, NODE = "native HSDP", "no averaging between nodes"
RANKS = (4, 8, 32)
PASSES: tuple[Literal["both", "alternate"], ...] = ("both", "alternate")

Group = dist.ProcessGroup | None


class Way(Protocol):
    """One way at work on a model of its own."""

    def step(self, batch: Batch) -> None:
        """Forward and backward, gradients averaged."""
        ...

    def rest(self) -> None:
        """Let go of the gradients, so that other ways have room for theirs."""
        ...

    def payload(self) -> float:
        """Bytes that this rank has handed to be averaged since the last call, one copy; 0 if that is not known."""
        ...

    def reducing(self) -> float:
        """Seconds that the reducer has computed since the last call, where that is known; its waiting is left out."""
        ...


class Trained:
    """A model that takes steps of forward and backward; nothing is known of how its gradients are averaged.

    Args:
        workload: whose model it is.
        model: wrapped.
        each_step: bytes that a rank hands over at each step.
    """

    def __init__(self, workload: Workload, model: nn.Module, each_step: float = 0.0) -> None:
        self._loss, self._model, self._each_step = workload.loss, model, each_step
        self._steps = 0

    def step(self, batch: Batch) -> None:
        """See `Way.step`."""
        self._model.zero_grad(set_to_none=True)
        self._loss(self._model(*batch)).backward()
        self._steps += 1

    def rest(self) -> None:
        """See `Way.rest`."""
        self._model.zero_grad(set_to_none=True)

    def payload(self) -> float:
        """See `Way.payload`."""
        steps, self._steps = self._steps, 0
        return steps * self._each_step

    def reducing(self) -> float:
        """See `Way.reducing`."""
        return 0.0


class TorchPowerSGD(Trained):
    """torch's hook with one bucket, the only layout that it survives on gloo.

    Args:
        workload: whose model it is.
        model: built.
        rank: of its factors.
    """

    def __init__(self, workload: Workload, model: nn.Module, rank: int) -> None:
        ddp = DistributedDataParallel(model, bucket_cap_mb=ONE_BUCKET)
        super().__init__(workload, ddp)
        self._state = torch_hook.PowerSGDState(None, matrix_approximation_rank=rank, start_powerSGD_iter=2)
        ddp.register_comm_hook(self._state, torch_hook.powerSGD_hook)
        self._before = 0

    def payload(self) -> float:
        """See `Way.payload`. Steps before it compresses are not counted."""
        numbers = int(self._state.compression_stats()[2])
        numbers, self._before = numbers - self._before, numbers
        return 4.0 * numbers


class EpfmlPowerSGD(Trained):
    """The package ``powersgd``: no wrapper; gradients are averaged after backward, and keep what was not sent.

    Args:
        workload: whose model it is.
        model: built.
        rank: of its factors.
    """

    def __init__(self, workload: Workload, model: nn.Module, rank: int) -> None:
        super().__init__(workload, model)
        self._parameters = list(model.parameters())
        config = epfml.settings(rank)
        self._aggregator = epfml.package().PowerSGD(self._parameters, config)
        self._errors: list[Tensor | None] = [None] * len(self._parameters)
        self.averages: Sequence[Tensor] = ()

    def step(self, batch: Batch) -> None:
        """See `Way.step`."""
        for parameter, error in zip(self._parameters, self._errors, strict=True):
            parameter.grad = error  # which backward adds to
        self._loss(self._model(*batch)).backward()
        self._errors = [parameter.grad for parameter in self._parameters]
        self.averages = self._aggregator.aggregate([error for error in self._errors if error is not None])

    def rest(self) -> None:
        """See `Way.rest`. What was not sent is kept: it is the package's memory."""
        for parameter in self._parameters:
            parameter.grad = None
        self.averages = ()


class Registered(Trained):
    """A model that distopt averages the gradients of.

    Args:
        workload: whose model it is.
        model: wrapped.
        registration: what was given for it.
    """

    def __init__(self, workload: Workload, model: nn.Module, registration: distopt.Registration) -> None:
        super().__init__(workload, model)
        self._registration, self._before, self._seconds = registration, 0, 0.0
        engine = registration._engine
        for act in ("propose", "complete", "finish"):
            setattr(engine, act, self._timed(getattr(engine, act)))

    def payload(self) -> float:
        """See `Way.payload`."""
        sent = self._registration.stats().bytes_sent
        sent, self._before = sent - self._before, sent
        return float(sent)

    def reducing(self) -> float:
        """See `Way.reducing`."""
        seconds, self._seconds = self._seconds, 0.0
        return seconds

    def _timed(self, act: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any) -> Any:
            started = time.thread_time()
            try:
                return act(*args)
            finally:
                self._seconds += time.thread_time() - started

        return timed


def powersgd(rank: int, passes: Literal["both", "alternate"]) -> str:
    """The label of distopt's PowerSGD.

    Example:
        >>> powersgd(4, "both")
        'distopt PowerSGD rank 4, both'
    """
    return f"distopt PowerSGD rank {rank}, {passes}"


OURS: Mapping[str, Reducer] = {
    powersgd(rank, passes): distopt.PowerSGD(rank, passes=passes) for rank in RANKS for passes in PASSES
}


def replicated(workload: Workload, label: str, weights: Sequence[Tensor], group: Group = None) -> Way:
    """Make a way of the first layout: a whole model on each rank, in DDP. Collective.

    Args:
        workload: what is trained.
        label: out of `REPLICATED`.
        weights: the parameters, which all ways share: no optimizer changes them.
        group: whose ranks average, all of them if None.
    """
    model = workload.build()
    for parameter, shared in zip(model.parameters(), weights, strict=True):
        parameter.data = shared.data
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    if label.startswith("torch PowerSGD"):
        return TorchPowerSGD(workload, model, int(label.rpartition(" ")[2]))
    if label == EPFML:
        return EpfmlPowerSGD(workload, model, 4)
    ddp = DistributedDataParallel(model, process_group=group)
    if label in OURS:
        return Registered(workload, ddp, distopt.register(ddp, OURS[label]))
    if label == PLAIN:
        return Trained(workload, ddp, size)
    hook, part = {
        NOOP: (noop_hook, 0.0),
        "DDP, torch's fp16 hook": (default_hooks.fp16_compress_hook, 0.5),
        "DDP, torch's bf16 hook": (_bf16_hook, 0.5),
    }[label]
    ddp.register_comm_hook(None, hook)
    return Trained(workload, ddp, part * size)


def _bf16_hook(state: Any, bucket: dist.GradBucket) -> Future[Tensor]:
    """Torch's hook: under its own name DDP refuses it on gloo, which has had sums of bfloat16 since."""
    return default_hooks.bf16_compress_hook(state, bucket)


REPLICATED = (
    NOOP, PLAIN, "DDP, torch's fp16 hook", "DDP, torch's bf16 hook",
    "torch PowerSGD, one bucket, rank 4", "torch PowerSGD, one bucket, rank 32",
    *((EPFML,) if epfml.is_installed() else ()), *OURS,
)  # fmt: skip
"""Labels of what is compared where each rank has a whole model. ``torch PowerSGD`` ends in its rank."""

SHARDED = (NODE, NATIVE, "distopt AllReduce", *OURS)
"""The same where ranks of a node share the parameters."""


def sharded(workload: Workload, label: str, mesh: DeviceMesh) -> Way:
    """Make a way of the second layout: parameters cut over the ranks of a node. Collective.

    Args:
        workload: what is trained.
        label: out of `SHARDED`.
        mesh: replicas by shards.
    """
    if label == NODE:
        return _native(workload, mesh[(mesh.mesh_dim_names or ())[1]], 0.0)
    return sharded_by(workload, None if label == NATIVE else OURS.get(label, distopt.AllReduce()), mesh)


def sharded_by(workload: Workload, reducer: Reducer | None, mesh: DeviceMesh) -> Way:
    """Shard a model by distopt, or by torch if there is no reducer. Collective."""
    if reducer is None:
        return _native(workload, mesh, 1 / mesh.size(1))
    torch.manual_seed(0)
    model = workload.build()
    registration = distopt.shard(model, workload.units, mesh=mesh, reducer=reducer, recompute=False)
    return Registered(workload, model, registration)


def _native(workload: Workload, mesh: DeviceMesh, part: float) -> Way:
    torch.manual_seed(0)
    model = workload.build()
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    for unit in getattr(model, workload.units.removesuffix(".*")):
        fully_shard(unit, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return Trained(workload, model, part * size)
