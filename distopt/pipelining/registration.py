"""What a pipeline's user holds of its reducer: figures of this rank, and a state of all stages together."""

import io
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from distopt.attach.engine import Engine
from distopt.attach.registration import Attachment, Registration
from distopt.attach.saving import check_state
from distopt.attach.shards import Shards
from distopt.comm.communicator import Communicator
from distopt.errors import StateError

Factors = list[dict[str, Tensor]]
"""Of each shard."""


class PipelineRegistration(Registration):
    """A registration whose state is that of the whole model, so that it goes on with other stages.

    ``stats()``, ``figures()`` and byte counts are those of this rank's stages; ``clip_grad_norm_`` takes the norm of
    all stages.

    Args:
        engine: what carries out the steps.
        attachment: where the gradients are met.
        shards: where this rank stands.
        pipe: the ranks that hold the other stages.
        names: of the parameters of the whole model, in their order.
    """

    def __init__(
        self, engine: Engine, attachment: Attachment, shards: Shards, pipe: Communicator, names: Sequence[str]
    ) -> None:
        super().__init__(engine, attachment)
        self._shards = shards
        self._pipe = pipe
        self._names = list(names)

    def state_dict(self) -> dict[str, Any]:
        """See `Registration.state_dict`; by names of the whole model, the same on every rank. Collective."""
        mine = super().state_dict()
        parts = self._pipe.gather_objects((mine["residuals"], mine["factors"]))
        residuals: dict[str, Tensor] = {}
        factors: Factors = [{} for _ in range(self._shards.count)]
        for theirs, packed in parts:
            residuals.update(theirs)
            for all_stages, one in zip(factors, _unpack(packed), strict=True):
                all_stages.update(one)
        ordered = {name: residuals[name] for name in self._names if name in residuals}
        return mine | {"residuals": ordered, "factors": _pack(factors)}

    def load_state_dict(self, state: Mapping[str, Any], *, allow_fresh: bool = False) -> None:
        """See `Registration.load_state_dict`; with whatever stages and replicas. Collective, unlike there."""
        self._attachment.settle()
        error, mine = None, state
        known = {key for keys in self._pipe.gather_objects(list(self._engine.shapes()[1])) for key in keys}
        try:
            mine = self._mine(state, known)
            check_state(mine, self._engine)
        except StateError as raised:
            error = raised
        told = self._shards.everyone.gather_objects(None if error is None else str(error))
        odd = next((text for text in told if text is not None), None)
        if odd is None:
            super().load_state_dict(mine)
        elif allow_fresh:
            warnings.warn(f"residuals and factors begin anew: {odd}", stacklevel=2)
            self._engine.restart()
        else:
            raise error or StateError(odd)

    def _mine(self, state: Mapping[str, Any], known: set[str]) -> Mapping[str, Any]:
        """What a state holds of this rank's stages, and of what no stage has, which is refused."""
        if not {"residuals", "factors"} <= state.keys():
            return state
        foreign = set(self._names) - set(self._engine.slots)
        residuals = {name: value for name, value in state["residuals"].items() if name not in foreign}
        known = known - set(self._engine.shapes()[1])
        factors = [{key: value for key, value in one.items() if key not in known} for one in _unpack(state["factors"])]
        return {**state, "residuals": residuals, "factors": _pack(factors), "layout": []}


def _pack(factors: Factors) -> bytes:
    buffer = io.BytesIO()
    torch.save(factors, buffer)
    return buffer.getvalue()


def _unpack(packed: Mapping[str, Tensor] | bytes) -> Factors:
    """Factors of each shard, from a state of a sharded model or of one that is not."""
    if not isinstance(packed, bytes):
        return [dict(packed)]
    try:
        return cast(Factors, torch.load(io.BytesIO(packed), weights_only=True))
    except Exception as error:
        raise StateError(f"the factors cannot be read: {str(error).partition(chr(10))[0]}") from error
