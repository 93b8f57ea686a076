"""Bringing FSDP back to where a forward pass can begin."""

from typing import Any, cast

import torch
from torch.distributed.fsdp import FSDPModule


def reset_iteration(root: FSDPModule) -> None:
    """Let FSDP forget a forward or backward pass that nothing follows. Its gradients are lost.

    torch has a method for that from 2.13 on. Before, what it does is done here, to the same private state.

    Args:
        root: the module that ``fully_shard`` was called on last.
    """
    if hasattr(root, "reset_iter_state"):
        root.reset_iter_state()
        return
    state = cast(Any, root)._get_fsdp_state()
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()  # whatever is under way may still read what is dropped here
    state._comm_ctx.all_gather_state = None
    state._comm_ctx.post_forward_order.clear()
    for name in ("reduce_scatter_state", "reduce_scatter_states"):
        if getattr(state._comm_ctx, name, None):
            setattr(state._comm_ctx, name, [] if name.endswith("s") else None)
    for each in state._state_ctx.all_states:
        each._modules_to_run_forward.clear()
        each._training_state = _idle_like(each._training_state)
        for group in getattr(each, "_fsdp_param_groups", None) or [each._fsdp_param_group]:
            if group is not None:
                _reset_group(group)
    state._state_ctx.iter_forward_root = None
    state._state_ctx.post_backward_final_callback_queued = False


def _reset_group(group: Any) -> None:
    result = group._all_gather_result
    if result is not None and hasattr(result.all_gather_work, "wait"):
        result.all_gather_work.wait()
    group._all_gather_result = group._post_reduce_event = group._all_reduce_state = None
    group._reshard_after_forward_event = group._partial_reduce_output = None
    group._post_forward_indices.clear()
    group._training_state = _idle_like(group._training_state)
    group._to_sharded()


def _idle_like(training_state: Any) -> Any:
    return type(training_state).IDLE
