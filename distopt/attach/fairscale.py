"""Meeting the gradients of fairscale's wrappers, and telling apart those that can be met from those that cannot.

Nothing here imports fairscale: whoever gives us one of its objects has loaded it. What is used of it that is private is
that of one version, which the ``fairscale`` extra pins.
"""

import functools
import importlib.metadata
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils import _pytree as pytree

from distopt.attach.engine import Engine
from distopt.attach.exemptions import exempt_names, plain_name
from distopt.attach.gradients import GradientsAttachment
from distopt.errors import RegistrationError
from distopt.reducers.reducer import Slot

VERSION = "0.4.13"
"""The release whose private parts are used here: the last one."""

SHARDED_DDP, FSDP, PIPE, ASYNC_PIPE = "ShardedDataParallel", "FullyShardedDataParallel", "Pipe", "AsyncPipe"


def kind_of(thing: object) -> str | None:
    """The name of the fairscale class that something is of; None if it is of none.

    Example:
        >>> kind_of(nn.Linear(2, 2)) is None
        True
    """
    return next((cls.__name__ for cls in type(thing).__mro__ if _is_fairscale(cls.__module__)), None)


def refuse_wrappers(model: nn.Module) -> None:
    """Raise a `RegistrationError` that names the native way, if a part of a model is one that we cannot work with."""
    for name, module in model.named_modules():
        kind, where = kind_of(module), f"{name or 'the model'} is fairscale's"
        if kind == FSDP and not torch.cuda.is_available():
            raise RegistrationError(
                f"{where} {FSDP}, which runs on CUDA only: distopt.shard(model, units) on the model inside it does the "
                "same on torch's own fully_shard"
            )
        if kind == ASYNC_PIPE:
            raise RegistrationError(
                f"{where} {ASYNC_PIPE}, which needs RPC and hangs on torch 2: use distopt.pipeline, or fairscale's Pipe"
            )


def refuse_to_shard(model: nn.Module) -> None:
    """Raise a `RegistrationError` if a part of a model decides by itself where its parameters are."""
    refuse_wrappers(model)
    instead = {
        SHARDED_DDP: "give shard the model inside it, and make a plain optimizer afterwards",
        FSDP: "give shard the model inside it",
        PIPE: "give the layers inside it to distopt.pipeline",
    }
    for name, module in model.named_modules():
        kind = kind_of(module)
        if kind in instead:
            raise RegistrationError(f"{name or 'the model'} is fairscale's {kind}: {instead[kind]}")


def refuse_recomputing_pipes(model: DistributedDataParallel) -> None:
    """Raise a `RegistrationError` if a part of a DDP model gives a parameter several gradients in one backward pass."""
    if model.static_graph:
        return
    for name, module in model.named_modules():
        pipe = cast(Any, module)
        if kind_of(module) == PIPE and pipe.checkpoint != "never" and pipe.chunks > 1:
            raise RegistrationError(
                f"{name} is fairscale's {PIPE} with checkpoint={pipe.checkpoint!r}, which DDP takes with static_graph="
                "True only; or give register the named_parameters(), without DDP, and call reduce() after backward()"
            )


def checkpoint_of(forward: object) -> "functools.partial[Any] | None":
    """What ``checkpoint_wrapper`` has put in the place of a module's ``forward``; None if it is something else."""
    if isinstance(forward, functools.partial) and _is_fairscale(getattr(forward.func, "__module__", "")):
        return cast("functools.partial[Any]", forward)
    return None


def forgets_overrides(module: nn.Module) -> bool:
    """Whether ``checkpoint_wrapper`` calls the ``forward`` of a module's class, past what was done around it before."""
    recomputing = checkpoint_of(module.__dict__.get("forward"))
    return recomputing is not None and recomputing.args[0] is type(module).forward


def sharded_ddp_slots(model: nn.Module) -> list[Slot]:
    """The parameters that a ``ShardedDataParallel`` model's optimizers have, named as in the model.

    Raises:
        RegistrationError: if fairscale is another version, casts gradients itself, or an optimizer has a parameter that
            the model has not.
    """
    sharded = cast(Any, model)
    found = importlib.metadata.version("fairscale")
    if found != VERSION:
        raise RegistrationError(
            f"fairscale {found} is installed, but its {SHARDED_DDP} is known to distopt as of {VERSION}: "
            "pip install distopt[fairscale]"
        )
    if sharded._reduce_fp16:
        raise RegistrationError("reduce_fp16=True is the reducer's business: give register distopt.Cast(torch.float16)")
    optimized = {id(parameter) for parameter in sharded._all_params}
    exempt = exempt_names(sharded.module)
    slots = [
        Slot(plain_name(name), parameter, exempt=name in exempt)
        for name, parameter in sharded.module.named_parameters()
        if id(parameter) in optimized
    ]
    if len(slots) < len(optimized):
        raise RegistrationError(f"an optimizer of the {SHARDED_DDP} model has a parameter that the model has not")
    return slots


class ShardedDDPAttachment(GradientsAttachment):
    """Takes the place of the reduction in one ``ShardedDataParallel`` model.

    Gradients are averaged when the backward pass is over. Then each rank keeps those that its `OSS` optimizer steps on,
    as fairscale does. Its buckets are switched off: they lie where ``.grad`` is expected to stay, and since torch 2
    ``zero_grad`` gives ``.grad`` away, so that fairscale goes on averaging buckets that nothing is written to.

    Args:
        model: the wrapped model.
        engine: carries out the steps; its slots are those of `sharded_ddp_slots`.
    """

    def __init__(self, model: nn.Module, engine: Engine) -> None:
        super().__init__(engine)
        self._model = cast(Any, model)
        self._averaged: set[str] = set()
        """Parameters whose ``.grad`` is an average that only its owner has."""
        self._backward_pass = -1
        self._opened = False
        self._model._use_buckets = False
        self._model._buckets, self._model._bucket_list, self._model._should_bucket_grad = {}, [], []
        self._model._get_reduce_fn = self._noting
        self._model.reduce = self.reduce
        model.register_forward_hook(self._after_forward)
        if self._model._grad_hooks:
            self._model.refresh_trainable()

    def gradients(self) -> dict[str, Tensor]:
        """See `Attachment.gradients`."""
        raise RegistrationError(
            f"each rank of a {SHARDED_DDP} model keeps some gradients only: call the OSS optimizer's clip_grad_norm"
        )

    def reduce(self) -> bool:
        """See `Attachment.reduce`."""
        raise RegistrationError("the wrapped model's backward pass reduces the gradients: there is nothing to call")

    def _noting(self, index: int, parameter: Tensor, owner: int) -> Callable[..., None]:
        """What fairscale is to call when the gradient of a parameter is there."""

        def note(*_: object) -> None:
            if self._model._should_accumulate_grads:
                return
            if not self._opened:
                raise RegistrationError(
                    "a gradient arrived that is not that of an output: call the wrapped model, and let it return "
                    "tensors, or tuples, lists and dictionaries of them"
                )
            self._model._grad_to_be_reduced[index] = False

        return note

    def _after_forward(self, model: nn.Module, inputs: object, output: object) -> None:
        """Await the backward pass at the outputs: inside of it, others may run that end before (recomputation)."""
        if not any(slot.parameter.requires_grad for slot in self._engine.slots.values()):
            return
        for tensor in pytree.tree_leaves(output):
            if isinstance(tensor, Tensor) and tensor.requires_grad:
                tensor.register_hook(self._open)

    @torch.no_grad()
    def _open(self, gradient: Tensor) -> None:
        """At the beginning of a backward pass, let its gradients be added to the sum of the ranks' earlier ones."""
        # The engine's number of the pass, not a flag: a pass that raised would leave it up.
        current = torch._C._current_graph_task_id()  # pyright: ignore[reportPrivateUsage]
        if current == self._backward_pass:
            return
        self._backward_pass, self._opened = current, True
        for name in self._averaged:
            if (earlier := self._engine.slots[name].parameter.grad) is not None:
                earlier.mul_(len(self._model._local_to_global_rank))
        self._averaged.clear()
        torch.autograd.Variable._execution_engine.queue_callback(self._finish)  # pyright: ignore

    @torch.no_grad()
    def _finish(self) -> None:
        """Average, and keep what this rank's optimizer steps on."""
        self._opened = False
        if self._model._should_accumulate_grads:
            return
        super().reduce()
        owners, rank = self._model._trainable_param_to_rank, self._model._rank
        for name, slot in self._engine.slots.items():
            if owners.get(slot.parameter) == rank:
                self._averaged.add(name)
            else:
                slot.parameter.grad = None


def _is_fairscale(module: str) -> bool:
    return module.partition(".")[0] == "fairscale"
