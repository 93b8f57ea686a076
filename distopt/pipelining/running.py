"""A pipeline at work: steps, evaluation, and the part of the model that this rank has."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, cast

import torch
from torch import Tensor, nn

from distopt.attach.registration import Registration
from distopt.comm.communicator import Communicator
from distopt.errors import AgreementError, PeerLostError, SettingError
from distopt.pipelining.attachment import PipelineAttachment
from distopt.pipelining.place import Place
from distopt.pipelining.schedules import Action, Loss, ScheduleName, build
from distopt.pipelining.stages import Chain, Look, Stage, find_looks, look_at, reshard


class LossScaling(Protocol):
    """What is asked of a ``torch.amp.GradScaler``, or of a `ResblockScaler`."""

    def get_scale(self) -> float:
        """What `scale` multiplies a loss by."""
        ...

    def scale(self, outputs: Tensor) -> Tensor:
        """Take a loss, and give what backward begins with."""
        ...


class Plan(NamedTuple):
    """How a pipeline goes through a batch."""

    schedule: ScheduleName
    stages: int
    microbatches: int
    loss_fn: Loss | None
    mean: bool
    grad_scaler: LossScaling | None


class Ranks(NamedTuple):
    """Whom this rank talks to."""

    place: Place
    pipe: Communicator
    everyone: Communicator
    device: torch.device


class Pipeline:
    """A model whose blocks are divided over ranks; `distopt.pipeline` makes it.

    Args:
        plan: how it goes through a batch.
        ranks: whom this rank talks to.
        chains: this rank's stages by their number, sharded.
        split: names of the blocks of every stage.
        attachment: reduces the gradients.
        registration: the reducer at work.
    """

    def __init__(
        self,
        plan: Plan,
        ranks: Ranks,
        chains: Mapping[int, Chain],
        split: Sequence[Sequence[str]],
        attachment: PipelineAttachment,
        registration: Registration,
    ) -> None:
        self._plan = plan
        self._ranks = ranks
        self._chains = dict(chains)
        self._attachment = attachment
        self._losses: list[Tensor] = []
        self._error: Exception | None = None
        self._actions: list[Action] = []
        self._ready: dict[bool, tuple[Look | None, Any]] = {}
        """Schedules for training and for evaluation, and the micro-batch that each is made for."""
        self.split = tuple(tuple(names) for names in split)
        """Names of the blocks in each stage, of all ranks."""
        self.registration = registration
        """The reducer at work, with ``stats()``, ``state_dict()``, ``clip_grad_norm_()``; see `distopt.register`."""
        self.module = nn.ModuleDict({name: block for chain in chains.values() for name, block in chain.blocks.items()})
        """This rank's blocks, by their names in the model, for an optimizer, or to be saved."""

    def __repr__(self) -> str:
        stages = ", ".join(f"{index}: {' '.join(self.split[index])}" for index in self._chains)
        return f"Pipeline({self._plan.schedule!r}, stages={self._plan.stages}, here {{{stages}}})"

    @property
    def is_first(self) -> bool:
        """Whether this rank has the first stage, which needs ``x``."""
        return 0 in self._chains

    @property
    def is_last(self) -> bool:
        """Whether this rank has the last stage, which needs ``target``."""
        return self._plan.stages - 1 in self._chains

    def parameters(self) -> Iterator[nn.Parameter]:
        """This rank's parameters, for an optimizer."""
        return self.module.parameters()

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """This rank's parameters, by their names in the whole model."""
        return self.module.named_parameters()

    def actions(self) -> list[Action]:
        """What this rank did in the last step, in its order, and when."""
        return list(self._actions)

    def step(self, x: Tensor | None = None, *, target: Tensor | None = None) -> Tensor:
        """Go forward and backward through one batch, micro-batch by micro-batch, and reduce the gradients. Collective.

        Afterwards ``.grad`` holds the gradient of the loss of the batch, averaged over replicas and shards, each of
        which is given a batch of its own; it is added to what was there. If a gradient was not finite on any rank of
        any stage, every ``.grad`` is NaN on all ranks, and nothing of the step lasts.

        Args:
            x: the batch ``(n, ...)``; needed on ranks that have the first stage, ignored on others.
            target: what the loss needs ``(n, ...)``; needed on ranks that have the last stage, ignored on others.

        Returns:
            The loss, 0-dimensional, float64, which is the mean over the batches of all replicas and shards, the same on
            every rank.

        Raises:
            SettingError: on all ranks, before any work, if any of them was given a batch that cannot be divided.
            AgreementError: if ranks do not do the same thing.
            PeerLostError: if a rank failed or is gone; where it failed, what its block or the loss raised. The pipeline
                is of no use afterwards.
        """
        self._attachment.set_aside()
        try:
            self._run(x, target, training=True)
        except BaseException:
            self._attachment.put_back()
            raise
        self._attachment.conclude()
        return self._mean_loss()

    @torch.no_grad()
    def evaluate(self, x: Tensor | None = None, *, target: Tensor | None = None) -> Tensor:
        """Give the loss of a batch in evaluation mode; no gradient changes. Collective; see `step`.

        Args:
            x: as in `step`.
            target: as in `step`.
        """
        training = [module for module in self.module.modules() if module.training]
        self.module.eval()
        self._attachment.set_aside()  # torch takes gradients away when it prepares, and divides them in the end
        try:
            output = self._run(x, target, training=False)
        finally:
            for module in training:
                module.training = True
            self._attachment.put_back()
        reshard(list(self._chains.values()))
        if self.is_last:
            assert output is not None
            for part, wanted in zip(*self._parts(output, target), strict=True):
                self._losses.append(self._loss(part, wanted))
        return self._mean_loss()

    def _run(self, x: Tensor | None, target: Tensor | None, *, training: bool) -> Tensor | None:
        """Go through a batch; give what comes out of the last stage, in evaluation."""
        plan, pipe = self._plan, self._ranks.pipe
        self._prepare(x, target, training)
        if not self.is_last and plan.grad_scaler is not None and training:
            plan.grad_scaler.scale(torch.ones((), device=self._ranks.device))  # torch's begins to exist with this
        if plan.loss_fn is None:  # torch splits a target in any case
            target = torch.zeros(plan.microbatches)
        self._losses, self._error = [], None
        for chain in self._chains.values():
            chain.error = None
        if training:
            self._actions.clear()
        inputs = (x,) if self.is_first else ()
        schedule = self._ready[training][1]
        pipe.step += training
        try:
            return pipe.guard(
                "a step of the pipeline",
                schedule.step,
                *inputs,
                target=target if self.is_last and training else None,
                return_outputs=not training,
            )
        except PeerLostError:
            own = self._error or next((chain.error for chain in self._chains.values() if chain.error), None)
            if own is not None:
                raise own from None
            raise

    def _prepare(self, x: Tensor | None, target: Tensor | None, training: bool) -> None:
        """Let all ranks raise if one cannot work; get ready for another kind of batch, if it is one."""
        everyone, before = self._ranks.everyone, self._ready.get(training)
        fault = self._fault(x, target)
        first = x.detach().chunk(self._plan.microbatches)[0] if self.is_first and x is not None and not fault else None
        look = None if first is None else look_at(first)
        renewed = before is None or (self.is_first and before[0] != look)
        told = everyone.gather_numbers([fault is not None, renewed, training])
        if any(kind != training for *_, kind in told):
            odd = [rank for rank, (*_, kind) in zip(everyone.ranks, told, strict=True) if not kind]
            raise AgreementError(f"ranks {odd} evaluate, while the others make a step", odd)
        if any(bad for bad, *_ in told):
            raise SettingError(*next(found for found in everyone.gather_objects(fault) if found is not None))
        new = [rank for rank, (_, new, _) in zip(everyone.ranks, told, strict=True) if new]
        error = None
        if not set(new).isdisjoint(self._ranks.place.pipe):
            try:
                self._ready[training] = look, self._build(first, training)
            except Exception as raised:
                error = raised
        if new:
            self._agree_on(error)

    def _agree_on(self, error: Exception | None) -> None:
        """Let all ranks raise if the pipeline of one could not be made ready."""
        everyone = self._ranks.everyone
        told = everyone.gather_objects(None if error is None else str(error).partition("\n")[0])
        if error is not None:
            raise error
        odd = [rank for rank, text in zip(everyone.ranks, told, strict=True) if text is not None]
        if odd:
            raise AgreementError(f"on rank {odd[0]}: {told[everyone.ranks.index(odd[0])]}", odd)

    def _build(self, first: Tensor | None, training: bool) -> Any:
        plan, (_, pipe, _, device) = self._plan, self._ranks
        looks = find_looks(self._chains, plan.stages, first, pipe, device)
        stages = [
            Stage(chain, index, plan.stages, looks[index], device, pipe, self._actions if training else [])
            for index, chain in self._chains.items()
        ]
        loss_fn = self._scaled_loss if training else None
        return build(plan.schedule, cast(Any, stages), plan.microbatches, loss_fn, plan.mean)

    def _scaled_loss(self, output: Tensor, target: Tensor) -> Tensor:
        """What backward begins with; RuntimeErrors alone are noticed by the guard of a step."""
        try:
            loss = self._loss(output, target)
            self._losses.append(loss.detach())
            return loss if self._plan.grad_scaler is None else self._plan.grad_scaler.scale(loss)
        except Exception as error:
            self._error = error
            raise RuntimeError(f"the loss failed: {error}") from error

    def _loss(self, output: Tensor, target: Tensor) -> Tensor:
        return output if self._plan.loss_fn is None else self._plan.loss_fn(output, target)

    def _parts(self, output: Tensor, target: Tensor | None) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        count = self._plan.microbatches
        return output.chunk(count), (output if target is None else target).chunk(count)

    def _mean_loss(self) -> Tensor:
        """The mean over all replicas and shards, on every rank; each sums up its micro-batches in their order."""
        plan, everyone = self._plan, self._ranks.everyone
        mine = sum((loss.double() for loss in self._losses), torch.zeros((), dtype=torch.float64))
        mine = mine / (plan.microbatches if plan.mean else 1)
        told = everyone.gather_numbers([float(self.is_last), float(mine)])
        losses = [loss for is_last, loss in told if is_last]
        return torch.tensor(sum(losses) / len(losses), dtype=torch.float64, device=self._ranks.device)

    def _fault(self, x: Tensor | None, target: Tensor | None) -> tuple[str, object, str] | None:
        """What is wrong with a batch on this rank."""
        needs_target = self.is_last and self._plan.loss_fn is not None
        for field, needed, tensor in (("x", self.is_first, x), ("target", needs_target, target)):
            if not needed:
                continue
            if not isinstance(tensor, Tensor) or tensor.ndim == 0:
                return field, type(tensor).__name__, "a tensor whose first dimension is the batch"
            if len(tensor) == 0 or len(tensor) % self._plan.microbatches:
                return f"len({field})", len(tensor), f"a multiple of the {self._plan.microbatches} micro-batches"
        return None
