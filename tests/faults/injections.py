"""One number that is not finite, in one gradient of one rank, in one step: a trial, and what must hold in it."""

import dataclasses
import hashlib
import math
import random

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel as DDP

import distopt
from distopt.attach.ddp import STEPS_TO_SETTLE
from distopt.attach.registration import Registration
from distopt.numerics.storage import Packed, unpack
from distopt.reducers.reducer import Reducer
from tests.faults.draw import batch, loss, net, reducer

STEPS = 6


@dataclasses.dataclass(frozen=True)
class Injection:
    """Everything that decides a trial."""

    reducer: Reducer
    ddp: bool
    options: dict[str, bool]
    bucket_kib: int
    dtype: torch.dtype
    optimizer: str
    accumulate: int
    culprit: int
    when: int
    micro: int
    parameter: str
    element: float  # as a fraction of the number of elements
    value: float


def injection(seed: int, world: int) -> Injection:
    """Draw a trial."""
    chance = random.Random(seed)
    options: dict[str, bool] = chance.choice(
        [{}, {}, {"gradient_as_bucket_view": True}, {"find_unused_parameters": True}, {"static_graph": True}]
    )
    ddp = chance.random() < 0.8
    accumulate = 1 if "static_graph" in options else chance.choice([1, 1, 2])
    return Injection(
        reducer=reducer(chance, world),
        ddp=ddp,
        options=options if ddp else {},
        bucket_kib=chance.choice([1, 3, 6, 1000]),
        dtype=chance.choice([torch.float32] * 3 + [torch.bfloat16]),
        optimizer=chance.choice(["SGD", "AdamW"]),
        accumulate=accumulate,
        culprit=chance.randrange(world),
        when=chance.randrange(STEPS - 1),
        micro=chance.randrange(accumulate),
        parameter=chance.choice([*["0.weight", "2.weight", "4.weight"] * 2, "0.bias", "2.bias", "6.weight"]),
        element=chance.random(),
        value=chance.choice([math.nan, math.inf, -math.inf]),
    )


class Run:
    """A model in training, whose trainer skips a step when a gradient is not finite."""

    def __init__(self, plan: Injection, rank: int) -> None:
        self.plan, self.rank = plan, rank
        module = net(3, seed=1, dtype=plan.dtype)
        self.model: nn.Module = (
            DDP(module, bucket_cap_mb=plan.bucket_kib / 1024, **plan.options) if plan.ddp else module
        )
        self.module = module
        self.registration: Registration = distopt.register(
            self.model if plan.ddp else module.named_parameters(), plan.reducer
        )
        trained = [p for p in module.parameters() if p.requires_grad]
        if plan.optimizer == "SGD":
            self.optimizer: torch.optim.Optimizer = torch.optim.SGD(trained, lr=0.05, momentum=0.9)
        else:
            self.optimizer = torch.optim.AdamW(trained, lr=0.01)

    def step(self, number: int, inject: bool) -> bool:
        """One step; whether its gradients were finite, and so taken."""
        self.optimizer.zero_grad()
        for micro in range(self.plan.accumulate):
            strike = inject and micro == self.plan.micro and self.rank == self.plan.culprit
            hook = self._poison() if strike else None
            if isinstance(self.model, DDP):
                self.model.require_backward_grad_sync = micro == self.plan.accumulate - 1
            index = number * self.plan.accumulate + micro
            loss(self.model(batch(self.rank, index, self.plan.dtype)), index).backward()
            if hook is not None:
                hook.remove()
        if not self.plan.ddp:
            self.registration.reduce()
        gradients = [p.grad for p in self.module.parameters() if p.grad is not None]
        finite = [bool(g.isfinite().all()) for g in gradients]
        if all(finite):
            self.optimizer.step()
        elif any(bool(g.isfinite().any()) for g in gradients):
            raise AssertionError("a step that is dropped left finite gradients behind")
        return all(finite)

    def leave_out(self, number: int) -> None:
        """What a trainer does that is told to skip a step."""
        if self.plan.ddp and number < STEPS_TO_SETTLE:
            # Last bits depend on the layout of the buckets, which DDP rebuilds after its first steps: it has to see
            # them, while the registration is paused and the gradients are thrown away.
            self.registration.pause()
            loss(self.model(batch(self.rank, number, self.plan.dtype)), number).backward()
            self.registration.resume()

    def state(self) -> dict[str, Tensor]:
        """All that lasts, by name."""
        state = self.registration._engine.state
        found = {f"parameter {n}": p.detach() for n, p in self.module.named_parameters()}
        found |= {f"residual {n}": r for n, r in state.residuals.items() if not isinstance(r, Packed)}
        found |= {f"factor {n}": f for n, f in state.factors.items() if not isinstance(f, Packed)}
        packed = {f"residual {n}": r for n, r in state.residuals.items() if isinstance(r, Packed)}
        packed |= {f"factor {n}": f for n, f in state.factors.items() if isinstance(f, Packed)}
        found |= {name: unpack(value) for name, value in packed.items()}
        for i, kept in enumerate(self.optimizer.state.values()):
            found |= {f"optimizer {i} {n}": t for n, t in kept.items() if isinstance(t, Tensor)}
        return found

    def _poison(self) -> torch.utils.hooks.RemovableHandle:
        def poison(gradient: Tensor) -> Tensor:
            bad = gradient.clone()
            bad.reshape(-1)[int(self.plan.element * bad.numel())] = self.plan.value
            return bad

        return self.module.get_parameter(self.plan.parameter).register_hook(poison)


def inject(rank: int, world: int, seed: int) -> tuple[list[str], str]:
    """Carry out a trial on this rank: what went wrong, and a digest of what must be equal on all ranks."""
    plan = injection(seed, world)
    struck, told = Run(plan, rank), Run(plan, rank)
    wrong: list[str] = []
    skipped: list[int] = []
    for step in range(STEPS):
        if not struck.step(step, inject=step == plan.when):
            skipped.append(step)
        wrong += [f"{n} is not finite after step {step}" for n, t in struck.state().items() if not t.isfinite().all()]
        if step == plan.when:
            told.leave_out(step)
        elif not told.step(step, inject=False):
            wrong.append(f"the healthy run skipped step {step}")
    if skipped != [plan.when] or struck.registration.stats().skipped_steps != 1:
        wrong.append(f"skipped {skipped} instead of [{plan.when}]")
    ours, theirs = struck.state(), told.state()
    if ours.keys() != theirs.keys():
        wrong.append(f"only one run has {sorted(ours.keys() ^ theirs.keys())}")
    else:
        wrong += [f"{n} is not what it is in the run told to skip" for n in ours if not same_bits(ours[n], theirs[n])]
    # Where ranks share the parameters between them (Hierarchical), each has factors of its own.
    local = ("residual", "factor") if plan.reducer.parts(world) else ("residual",)
    shared = {n: t for n, t in ours.items() if not n.startswith(local)}
    return wrong, digest(shared) + str(skipped)


def same_bits(left: Tensor, right: Tensor) -> bool:
    """Whether two tensors are equal to the bit, the sign of zero included."""
    return left.dtype == right.dtype and digest({"": left}) == digest({"": right})


def digest(tensors: dict[str, Tensor]) -> str:
    """A short text that differs where any bit does."""
    total = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        total.update(name.encode())
        total.update(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return total.hexdigest()[:16]
