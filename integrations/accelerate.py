"""A reducer for the model that Hugging Face Accelerate's ``prepare`` returns.

Accelerate's own ``DistributedDataParallelKwargs(comm_hook=...)`` knows four hooks, and loses their state. Here it is
any reducer, and ``save_state`` and ``load_state`` take its state along.
"""

from typing import Any

from torch import nn

from distopt.reducers.reducer import Reducer

from .late import LateRegistration

try:
    from accelerate import Accelerator
except ModuleNotFoundError as error:
    raise ModuleNotFoundError("distopt.integrations.accelerate needs accelerate: pip install accelerate") from error


def attach(accelerator: Accelerator, model: nn.Module, reducer: Reducer, **options: Any) -> LateRegistration:
    """Let ``reducer`` average a prepared model's gradients, and save its state with the accelerator's. Collective.

    ``accumulate`` and ``no_sync`` work as with DDP alone, and the scale of ``mixed_precision="fp16"`` is followed. In a
    single process nothing is reduced.

    Args:
        accelerator: the state goes into its ``save_state`` folders, as one more ``custom_checkpoint_*.pkl``: call this
            before ``load_state``, for several models in the same order every time.
        model: what ``accelerator.prepare`` returned.
        reducer: ``distopt.PowerSGD(rank=8)`` for example.
        options: keywords of `distopt.register`.

    Returns:
        Its ``stats()`` tell what was sent; ``registration`` is what `distopt.register` returned, None in a single
        process.

    Raises:
        SettingError: if ``reducer`` is none.
        RegistrationError: in several processes, if ``model`` is not ``DistributedDataParallel``: not prepared yet, or
            prepared for FSDP or DeepSpeed.

    Example:
        >>> import distopt
        >>> accelerator = Accelerator(cpu=True)
        >>> model = accelerator.prepare(nn.Linear(4, 4))
        >>> attach(accelerator, model, distopt.PowerSGD(rank=8)).stats().saving
        0.0
    """
    hook = LateRegistration(
        reducer, "attach to what accelerator.prepare(model) returns, without FSDP or DeepSpeed", **options
    )
    hook.attach(model, accelerator.scaler)
    accelerator.register_for_checkpointing(hook)
    return hook
