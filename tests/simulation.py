"""All ranks in one process: reductions driven in lockstep, what they ask for answered by plain sums and copies."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from distopt.comm.requests import Gather, Request, Swap, Within
from distopt.numerics.finite import all_finite
from distopt.numerics.storage import Packed, unpack
from distopt.reducers.reducer import Bucket, Place, Reducer, Slot, State

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
        self.states = [State() for _ in range(world_size)]
        self.use(reducer)
        self.payload_sizes: list[int] = []
        """Elements in each round of the last step."""

    def use(self, reducer: Reducer) -> None:
        """Go on with another reducer."""
        world = len(self.states)
        self.plans = [reducer.plan(self.slots, Place(rank, world)) for rank in range(world)]
        self.parts = reducer.parts(world)

    def step(self, gradients: Sequence[Gradients]) -> list[dict[str, Tensor]] | None:
        """Reduce one gradient a rank; what each rank is left with, or None if the step was dropped."""
        outputs = [{slot.name: rank[slot.name].clone() for slot in self.slots} for rank in gradients]
        reductions = [
            plan.reduce(Bucket(list(out.values()), [g.view(-1) for g in out.values()]), state)
            for plan, out, state in zip(self.plans, outputs, self.states, strict=True)
        ]
        proposals = self._drive(reductions)
        if proposals is None or proposals[0] is None:
            assert proposals is None or proposals == [None] * len(proposals)
            return None
        for proposal, state in zip(proposals, self.states, strict=True):
            proposal.commit()
            state.step += 1
        return outputs

    def _drive(self, reductions):
        """The proposals of all ranks, or None if an average was not finite."""
        self.payload_sizes = []
        proposals = {}
        waiting: dict[int, Request] = {}
        answers: dict[int, Tensor | None] = dict.fromkeys(range(len(reductions)))
        while len(proposals) < len(reductions):
            for rank, answer in answers.items():
                try:
                    waiting[rank] = next(reductions[rank]) if answer is None else reductions[rank].send(answer)
                except StopIteration as returned:
                    proposals[rank] = returned.value
            answers = {}
            for group in self._complete_groups(waiting):
                requests = [waiting.pop(rank) for rank in group]
                answers.update(zip(group, self._answer(requests), strict=True))
                if isinstance(requests[0], Tensor) and not all_finite(requests[0]):
                    return None
            assert answers or len(proposals) == len(reductions), "some ranks wait for others that are done"
        return [proposals[rank] for rank in range(len(reductions))]

    def _complete_groups(self, waiting):
        """Groups of ranks all of whom wait for one another."""
        everyone = [tuple(range(len(self.states)))]
        groups = [(None, group) for group in everyone] + [(p, g) for p, groups in self.parts.items() for g in groups]
        return [
            group
            for part, group in groups
            if all(rank in waiting and getattr(waiting[rank], "part", None) == part for rank in group)
        ]

    def _answer(self, requests):
        first = requests[0]
        if isinstance(first, Within):
            return self._answer([request.request for request in requests])
        world = len(requests)
        if isinstance(first, Swap):
            self.payload_sizes.append(first.rows.numel())
            return [torch.stack([request.rows[rank] for request in requests]) for rank in range(world)]
        if isinstance(first, Gather):
            if not first.returning:
                self.payload_sizes.append(first.tensor.numel())
            return [torch.stack([request.tensor for request in requests])] * world
        self.payload_sizes.append(first.numel())
        average = torch.stack([p * (1.0 / world) for p in requests]).sum(0)
        return [p.copy_(average) for p in requests]

    def residual(self, rank: int, name: str) -> Tensor:
        """What a rank holds back of a parameter's gradient; zeros where it keeps nothing."""
        slot = next(slot for slot in self.slots if slot.name == name)
        kept = self.states[rank].residuals.get(name)
        dtype = torch.promote_types(slot.parameter.dtype, torch.float32)
        return torch.zeros_like(slot.parameter.detach()) if kept is None else unpack(kept, dtype)

    def snapshot(self) -> list[dict[str, Tensor]]:
        """A copy of everything that the ranks remember."""
        return [
            {
                f"{kind}.{name}": plain(t).clone()
                for kind in ("residuals", "factors")
                for name, t in getattr(s, kind).items()
            }
            for s in self.states
        ]


def plain(stored):
    """What is kept, as a tensor to compare."""
    return unpack(stored) if isinstance(stored, Packed) else stored
