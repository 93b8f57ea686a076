"""All ranks in one process: reductions driven in lockstep, averages taken by plain sums."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from distopt.numerics.finite import all_finite
from distopt.reducers.reducer import Bucket, Reducer, Slot, State

Gradients = Mapping[str, Tensor]


class Ranks:
    """As many ranks as there are states, all at work with one reducer on one bucket.

    Args:
        reducer: the settings.
        shapes: shape of each parameter by name.
        world_size: number of ranks.
        dtype: of parameters and gradients.
        optional: whether parameters may be without a gradient.
    """

    def __init__(
        self,
        reducer: Reducer,
        shapes: Mapping[str, Sequence[int]],
        world_size: int,
        *,
        dtype: torch.dtype = torch.float32,
        optional: bool = False,
    ) -> None:
        self.slots = [
            Slot(name, nn.Parameter(torch.zeros(shape, dtype=dtype)), exempt=len(shape) < 2, optional=optional)
            for name, shape in shapes.items()
        ]
        self.plan = reducer.plan(self.slots)
        self.states = [State() for _ in range(world_size)]
        self.payload_sizes: list[int] = []
        """Elements in each average of the last step."""

    def step(self, gradients: Sequence[Gradients]) -> list[dict[str, Tensor]] | None:
        """Reduce one gradient a rank; what each rank is left with, or None if the step was dropped."""
        outputs = [{slot.name: rank[slot.name].clone() for slot in self.slots} for rank in gradients]
        reductions = [
            self.plan.reduce(Bucket(list(out.values()), [g.view(-1) for g in out.values()]), state)
            for out, state in zip(outputs, self.states, strict=True)
        ]
        proposals, self.payload_sizes = [], []
        sent: list[Tensor | None] = [None] * len(reductions)
        while not proposals:
            payloads: list[Tensor] = []
            for reduction, payload in zip(reductions, sent, strict=True):
                try:
                    payloads.append(next(reduction) if payload is None else reduction.send(payload))
                except StopIteration as returned:
                    proposals.append(returned.value)
            if payloads:
                assert not proposals, "some ranks average while others are done"
                self.payload_sizes.append(payloads[0].numel())
                average = torch.stack([p * (1.0 / len(payloads)) for p in payloads]).sum(0)
                if not all_finite(average):
                    return None
                sent = [p.copy_(average) for p in payloads]
        if proposals[0] is None:
            assert proposals == [None] * len(proposals)
            return None
        for proposal, state in zip(proposals, self.states, strict=True):
            proposal.commit()
            state.step += 1
        return outputs

    def residual(self, rank: int, name: str) -> Tensor:
        """What a rank holds back of a parameter's gradient; zeros where it keeps nothing."""
        slot = next(slot for slot in self.slots if slot.name == name)
        return self.states[rank].residuals.get(name, torch.zeros_like(slot.parameter.detach()))

    def snapshot(self) -> list[dict[str, Tensor]]:
        """A copy of everything that the ranks remember."""
        return [
            {f"{kind}.{name}": t.clone() for kind in ("residuals", "factors") for name, t in getattr(s, kind).items()}
            for s in self.states
        ]
