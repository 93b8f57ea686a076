"""The way of AdamW's state to and from the layout of ``torch.optim.AdamW``."""

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import StateDict

from distopt.errors import StateError
from distopt.optim.state import MOMENTS, is_reduced, new_state, piece_of, sharded_like, stored

TORCH_SETTINGS = {
    "amsgrad": False,
    "maximize": False,
    "foreach": None,
    "differentiable": False,
    "fused": None,
    "decoupled_weight_decay": True,
}
"""Settings of a group that ``torch.optim.AdamW`` saves, at the only values that ours can have."""

KEPT_SETTINGS = ("capturable",)
"""Settings that both have, of which the optimizer's own stay in force."""

OWN_SETTINGS = ("moments", "max_variance")
"""Settings of a group that torch's has not."""


@dataclass(frozen=True, eq=False)
class Shielded:
    """A saved moment on its way through torch's loading, which would round it to the parameter's dtype."""

    tensor: Tensor


def decoded(optimizer: Optimizer, state_dict: StateDict) -> StateDict:
    """Turn a raw state into the layout of torch's AdamW: a hook that runs when the state is read."""
    states: dict[Any, Any] = {}
    parameters = list(itertools.chain.from_iterable(group["params"] for group in optimizer.param_groups))
    for key, state in state_dict["state"].items():
        if state and is_reduced(state):
            values = {
                name: sharded_like(moment.decoded(), parameters[key])
                for name, moment in zip(MOMENTS, stored(state), strict=True)
            }
            state = {"step": state["step"], **values}
        states[key] = state
    groups = [
        {name: value for name, value in g.items() if name not in OWN_SETTINGS} for g in state_dict["param_groups"]
    ]
    return {**state_dict, "state": states, "param_groups": groups}


def shield(optimizer: Optimizer, state_dict: StateDict) -> StateDict:
    """Prepare a saved state for torch's loading: a hook that runs before it.

    Moments are shielded, and the groups get the optimizer's own settings, which are not saved.

    Raises:
        StateError: the state is not of an AdamW, or of one with ``amsgrad`` or ``maximize``, or of other parameters.
    """
    groups: list[dict[str, Any]] = []
    for ours, saved in zip(optimizer.param_groups, state_dict["param_groups"], strict=False):
        for name in ("amsgrad", "maximize"):
            if saved.get(name):
                raise StateError(f"the state was saved with {name}=True, which distopt.optim.AdamW does not have")
        groups.append({**saved, **TORCH_SETTINGS, **{name: ours[name] for name in (*KEPT_SETTINGS, *OWN_SETTINGS)}})
    groups += state_dict["param_groups"][len(groups) :]
    keys = itertools.chain.from_iterable(group["params"] for group in state_dict["param_groups"])
    parameters = itertools.chain.from_iterable(group["params"] for group in optimizer.param_groups)
    shapes = {key: parameter.shape for key, parameter in zip(keys, parameters, strict=False)}
    states = {key: _shielded(key, state, shapes.get(key)) for key, state in state_dict["state"].items()}
    return {**state_dict, "state": states, "param_groups": groups}


def _shielded(key: object, state: Mapping[str, Any], shape: torch.Size | None) -> dict[str, Any]:
    if state and sorted(state) != ["exp_avg", "exp_avg_sq", "step"]:
        raise StateError(f"the state of parameter {key!r} is not of AdamW: it holds {', '.join(sorted(state))}")
    for name in MOMENTS if state else ():
        if shape is not None and state[name].shape != shape:
            here, there = tuple(shape), tuple(state[name].shape)
            raise StateError(f"{name} of parameter {key!r} has the shape {there} in the state, but {here} here")
    return {name: Shielded(value) if name in MOMENTS else value for name, value in state.items()}


def taken_over(saved: Mapping[str, Any], parameter: Tensor, moments: str, *, counted: bool = False) -> dict[str, Any]:
    """Encode a saved state.

    Args:
        saved: ``step`` and two moments, as `shield` left them.
        parameter: what it is for.
        moments: how they are to be kept.
        counted: whether steps are counted on the parameter's device.

    Returns:
        The state, which shares no memory with the saved one.
    """
    state = new_state(parameter, moments, counted=counted)
    state["step"].copy_(torch.as_tensor(saved["step"], dtype=torch.float32, device="cpu").detach())
    values = {name: cast(Shielded, saved[name]).tensor for name in MOMENTS}
    if is_reduced(state):
        for moment, numbers in zip(stored(state), values.values(), strict=True):
            moment.encode(piece_of(numbers))
    else:
        for name, numbers in values.items():
            state[name].copy_(numbers)
    return state
