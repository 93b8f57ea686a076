"""The competitors behind one small face: distopt's PowerSGD, and the PowerSGD hook that torch ships.

Both are attached to a DDP model and asked the same questions. ``Torch`` is given what its documentation recommends: it
starts after the two steps in which DDP settles its buckets, and each rank saves and loads its own state.
"""

import abc
import dataclasses
import io
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.algorithms.ddp_comm_hooks import powerSGD_hook as torch_hook
from torch.futures import Future
from torch.nn.parallel import DistributedDataParallel

import distopt


class Attached(abc.ABC):
    """A competitor at work on one DDP model."""

    @abc.abstractmethod
    def steps(self) -> int:
        """How many optimizer steps it has counted."""

    @abc.abstractmethod
    def residual_norms(self) -> dict[str, float]:
        """Norm of what this rank has not sent yet, by parameter name."""

    @abc.abstractmethod
    def residuals(self) -> dict[str, Tensor]:
        """The mean over the ranks of what has not been sent yet, by parameter name, flat. Collective."""

    @abc.abstractmethod
    def save(self) -> bytes:
        """What goes into this rank's checkpoint. Collective."""


class Competitor(abc.ABC):
    """Settings of a reducer; picklable, so that every rank gets them."""

    label: str

    @abc.abstractmethod
    def attach(
        self,
        model: DistributedDataParallel,
        *,
        rank: int = 2,
        start: int = 2,
        warm: bool = True,
        scaler: torch.amp.GradScaler | None = None,
        saved: bytes | None = None,
    ) -> Attached:
        """Put it to work on a model.

        Args:
            model: freshly wrapped.
            rank: columns of the factors.
            start: the first step that is compressed.
            warm: whether a step starts from the factors of the one before.
            scaler: whose loss scale the gradients carry.
            saved: what `Attached.save` returned, to go on from.
        """


@dataclasses.dataclass(frozen=True)
class Distopt(Competitor):
    """distopt's PowerSGD.

    Args:
        label: its name in tables.
        options: further settings of ``distopt.PowerSGD``.
    """

    label: str = "distopt"
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict[str, Any])

    def attach(
        self,
        model: DistributedDataParallel,
        *,
        rank: int = 2,
        start: int = 2,
        warm: bool = True,
        scaler: torch.amp.GradScaler | None = None,
        saved: bytes | None = None,
    ) -> Attached:
        """See `Competitor.attach`."""
        basis = {} if warm else {"basis": "fresh"}
        reducer = distopt.PowerSGD(rank, start_step=start, **basis, **self.options)
        scaling = {} if scaler is None else {"grad_scaler": scaler}
        registration = distopt.register(model, reducer, **scaling)
        if saved is not None:
            registration.load_state_dict(torch.load(io.BytesIO(saved), weights_only=True))
        return AttachedDistopt(registration)


class AttachedDistopt(Attached):
    """A distopt registration."""

    def __init__(self, registration: distopt.Registration) -> None:
        self.registration = registration

    def steps(self) -> int:
        """See `Attached.steps`."""
        return self.registration.stats().steps

    def residual_norms(self) -> dict[str, float]:
        """See `Attached.residual_norms`."""
        return dict(self.registration.stats().residual_norm)

    def residuals(self) -> dict[str, Tensor]:
        """See `Attached.residuals`."""
        return {name: r.flatten() for name, r in self.registration.state_dict()["residuals"].items()}

    def save(self) -> bytes:
        """See `Attached.save`."""
        return _bytes(self.registration.state_dict())


@dataclasses.dataclass(frozen=True)
class Torch(Competitor):
    """The hook of ``torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook``.

    Args:
        label: its name in tables.
        options: further settings of its ``PowerSGDState``.
    """

    label: str = "torch"
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict[str, Any])

    def attach(
        self,
        model: DistributedDataParallel,
        *,
        rank: int = 2,
        start: int = 2,
        warm: bool = True,
        scaler: torch.amp.GradScaler | None = None,
        saved: bytes | None = None,
    ) -> Attached:
        """See `Competitor.attach`. The hook has no way to be told of a loss scale."""
        if saved is not None:  # an object of a class, which the safe loader refuses
            state = torch.load(io.BytesIO(saved), weights_only=False)
            state.process_group = model.process_group
            return AttachedTorch(model, state)
        state = torch_hook.PowerSGDState(
            process_group=model.process_group,
            matrix_approximation_rank=rank,
            start_powerSGD_iter=start,
            warm_start=warm,
            **self.options,
        )
        return AttachedTorch(model, state)


class AttachedTorch(Attached):
    """torch's hook, registered through a method that notes which parameter lies where in its flat error buffers."""

    def __init__(self, model: DistributedDataParallel, state: torch_hook.PowerSGDState) -> None:
        self._names = {id(parameter): name for name, parameter in model.module.named_parameters()}
        self._state = state
        self._buckets: dict[int, list[tuple[str, int]]] = {}
        model.register_comm_hook(state, self._hook)

    def _hook(self, state: torch_hook.PowerSGDState, bucket: dist.GradBucket) -> Future[Tensor]:
        self._buckets[bucket.index()] = [(self._names[id(p)], p.numel()) for p in bucket.parameters()]
        return torch_hook.powerSGD_hook(state, bucket)

    def _own(self) -> dict[str, Tensor]:
        own: dict[str, Tensor] = {}
        for index, error in self._state.error_dict.items():
            names, sizes = zip(*self._buckets[index], strict=True)
            own.update(zip(names, error.split(sizes), strict=True))
        return own

    def steps(self) -> int:
        """See `Attached.steps`."""
        return self._state.iter

    def residual_norms(self) -> dict[str, float]:
        """See `Attached.residual_norms`."""
        return {
            name: float(torch.linalg.vector_norm(error, dtype=torch.float64)) for name, error in self._own().items()
        }

    def residuals(self) -> dict[str, Tensor]:
        """See `Attached.residuals`."""
        means = {name: error.double() / dist.get_world_size() for name, error in sorted(self._own().items())}
        for mean in means.values():
            dist.all_reduce(mean)
        return means

    def save(self) -> bytes:
        """See `Attached.save`."""
        return _bytes(self._state)


def _bytes(state: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue()
