"""What a saved state must look like before anything in it is compared with the model at hand."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, cast

from torch import Tensor

from distopt.attach.engine import Tally
from distopt.errors import StateError
from distopt.numerics.finite import all_finite
from distopt.reducers.settings import is_integer


class _Form(NamedTuple):
    """What is allowed, and the words for it."""

    fits: Callable[[Any], bool]
    allowed: str


def check_form(state: Mapping[str, Any]) -> None:
    """Refuse a state whose fields are not of the kind that `Registration.state_dict` gives.

    Args:
        state: with all fields.

    Raises:
        StateError: it names the field, what it is and what is allowed.
    """
    for field, form in _FORMS.items():
        if not form.fits(state[field]):
            given = repr(state[field])
            shown = given if len(given) <= 40 else f"a {type(state[field]).__name__}"
            raise StateError(f"the state's {field} is {shown}, but must be {form.allowed}")


def check_numbers(what: str, tensor: Tensor) -> None:
    """Refuse what would make every later step non-finite.

    Args:
        what: whose numbers they are, for the message.
        tensor: any.

    Raises:
        StateError: it holds NaN, infinity, or no real numbers.

    Example:
        >>> import torch
        >>> check_numbers("the residual of 'w'", torch.tensor([1.0, float("nan")]))
        Traceback (most recent call last):
        distopt.errors.StateError: the residual of 'w' holds NaN or infinity: the state is damaged
    """
    if not tensor.is_floating_point():
        raise StateError(f"{what} is of dtype {tensor.dtype}, but must be floating point")
    if not all_finite(tensor):
        raise StateError(f"{what} holds NaN or infinity: the state is damaged")


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_count(value: Any) -> bool:
    return is_integer(value) and value >= 0


def _is_layout(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and all(
        isinstance(names, (list, tuple)) and all(isinstance(name, str) for name in cast(list[Any], names))
        for names in cast(list[Any], value)
    )


def _is_tally(value: Any) -> bool:
    if not isinstance(value, Mapping):
        return False
    counts = cast(Mapping[Any, Any], value)
    return set(counts) == set(_TALLY) and all(map(_is_count, counts.values()))


def _are_tensors(value: Any) -> bool:
    return isinstance(value, Mapping) and all(
        isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in cast(Mapping[Any, Any], value).items()
    )


def _are_factors(value: Any) -> bool:
    return isinstance(value, bytes) or _are_tensors(value)


_TALLY = [field.name for field in dataclasses.fields(Tally)]
_FORMS = {
    "reducer": _Form(_is_text, "a text"),
    "step": _Form(_is_count, "an integer of at least 0"),
    "layout": _Form(_is_layout, "lists of parameter names"),
    "tally": _Form(_is_tally, f"integers for {', '.join(_TALLY)}"),
    "residuals": _Form(_are_tensors, "tensors by parameter name"),
    "factors": _Form(_are_factors, "tensors by parameter name"),
}
