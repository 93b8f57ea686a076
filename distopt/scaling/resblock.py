"""Per-resblock gradient scaling: the loop of a ``GradScaler``, with a scale for every residual branch.

Source: Ramesh et al. 2021 (arXiv:2102.12092), section 2.4 and appendix D.
"""

import math
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from distopt.attach.selection import Blocks
from distopt.comm.agreement import agree
from distopt.comm.communicator import Communicator
from distopt.errors import RegistrationError, ScaleError, SettingError, StateError
from distopt.scaling.branches import find_branches
from distopt.scaling.checks import count_non_finite, widen
from distopt.scaling.installation import Gauge, Installation, Place
from distopt.scaling.policy import Preset, ScalePolicy, Scales, policy_of
from distopt.scaling.stats import BlockFigures, ScalerStats

_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_PATIENCE = 200
_TOP = 16.0
"""Of float16. Wider formats could hold larger numbers, but nothing is gained by them."""
_T = TypeVar("_T")


class ResblockScaler:
    """Gives every residual branch of a model a gradient scale of its own, and skips steps as a ``GradScaler`` does.

    The residual stream stays float32, and its gradient unscaled. A branch runs in 16 bits; the gradient that enters
    it from the stream is scaled and filtered, the one that leaves it is unscaled and filtered, so that what overflows
    in one branch stays there. Parameter gradients are not filtered: they tell of the overflow. Then all ranks skip the
    step, and the scale of that branch alone is lowered.

    Float32 parameters get unscaled gradients, as soon as backward has them: clipping, communication hooks and
    residuals need to know nothing. Gradients of 16-bit parameters stay scaled until `unscale_`, which makes them
    float32; residuals of `distopt.register` follow their scales by themselves.

    Args:
        blocks: the branches, ``f`` of ``x + f(x)``: modules, tuples of modules (a branch that begins where the first is
            entered and ends where the last is left), a mapping of names to them; or, with ``model``, a pattern or
            several of modules' names (``"*.mlp"``), or a callable that is given the model and returns any of these.
        dtype: what the branches run in; ``torch.bfloat16`` seldom needs scales, ``torch.float32`` is for comparisons.
        preset: ``"default"`` measures what scale fits, ``"paper"`` is the rule of DALL-E to the letter; or a policy.
        process_group: the ranks that step together; all of them by default, where there are any.
        model: where patterns and callables look, and where the branches' names come from.
        measure_every: updates from one step whose zeros are counted to the next; 0 for never.

    Raises:
        SettingError: if a setting is not allowed, nothing is found, or a parameter is in two branches.
        AgreementError: if the ranks were given different branches or settings.

    Example:
        >>> block = nn.Linear(4, 4)
        >>> scaler = ResblockScaler({"mlp": block})
        >>> optimizer = torch.optim.SGD(block.parameters(), lr=0.1)
        >>> x = torch.ones(2, 4)
        >>> loss = (x + block(x)).square().mean()
        >>> scaler.scale(loss).backward()
        >>> scaler.step(optimizer)
        >>> scaler.update()
        >>> scaler.stats().skipped_steps
        0
    """

    def __init__(
        self,
        blocks: Blocks,
        *,
        dtype: torch.dtype = torch.float16,
        preset: Preset | ScalePolicy = "default",
        process_group: dist.ProcessGroup | None = None,
        model: nn.Module | None = None,
        measure_every: int = 100,
    ) -> None:
        if dtype not in _DTYPES:
            raise SettingError("dtype", dtype, "torch.float16, torch.bfloat16 or torch.float32")
        if measure_every < 0:
            raise SettingError("measure_every", measure_every, "an integer of at least 0")
        branches = find_branches(blocks, model)
        self._policy = policy_of(preset)
        self._names = [branch.name for branch in branches]
        self._communicator = _communicator(process_group, [*self._names, repr(self._policy), str(dtype)])
        self._replicas = 1 if self._communicator is None else self._communicator.world_size
        parameters = [parameter for branch in branches for parameter in branch.parameters().values()]
        device = parameters[0].device if parameters else torch.device("cpu")
        self._top = min(math.log2(torch.finfo(dtype).max), _TOP)
        self._scales = self._policy.start(len(branches), self._replicas, device)
        self._skips = torch.zeros(len(branches), dtype=torch.int64, device=device)
        self._skipped = torch.zeros((), dtype=torch.int64, device=device)
        self._last_skipped = torch.zeros((), dtype=torch.bool, device=device)
        self._updates = 0
        self._measure_every = measure_every
        self._gauge = Gauge(len(branches), device)
        self._installation = Installation(branches, dtype, self._gauge, self)
        self._lost = torch.zeros((), device=device)
        """Whether a loss was not finite since the last update, on this rank."""
        self._findings: dict[int, Tensor] = {}
        self._agreed: Tensor | None = None
        self._powers: list[float] | None = None
        self._begin()

    def scale(self, outputs: _T) -> _T:
        """Take a loss, or several, and give them back as they are: what is scaled is the branches' gradients.

        A loss that is not finite makes all ranks skip the step, and lowers no scale.

        Args:
            outputs: a tensor, or an iterable of tensors.
        """
        losses = [outputs] if isinstance(outputs, Tensor) else list(cast(Iterable[Tensor], outputs))
        for loss in losses:
            bad = (~torch.isfinite(loss.detach())).any().to(self._lost)
            self._lost.copy_(torch.maximum(self._lost, bad))
        return outputs if isinstance(outputs, Tensor) else cast(_T, losses)

    def unscale_(self, optimizer: Optimizer) -> None:
        """Make every gradient of an optimizer unscaled, and agree with the other ranks whether all are finite.

        Call it before clipping; `step` calls it otherwise. Gradients of 16-bit parameters become float32. Collective.

        Args:
            optimizer: whose parameters to look at.

        Raises:
            RegistrationError: if it was called since the last `update`, or if a branch's gradient came about
                unnoticed.
        """
        if id(optimizer) in self._findings:
            raise RegistrationError("unscale_ was called for this optimizer since the last update() already")
        parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        places = self._installation.places()
        self._check_seen(parameters, places)
        self._findings[id(optimizer)] = self._agree(count_non_finite(parameters, self._gauge.peak.device))
        for parameter in parameters:
            place = places.get(id(parameter))
            if place is not None and place.narrow:
                widen(parameter, self._gauge.inverse[place.index])

    def step(self, optimizer: Optimizer, *args: Any, **kwargs: Any) -> Any:
        """Let the optimizer step, unless a gradient was not finite on any rank.

        Args:
            optimizer: anything from ``torch.optim``; those that know ``found_inf``, as fused ones do, are asked to skip
                on the device, the others cost one look of the host.
            args: for ``optimizer.step``.
            kwargs: for ``optimizer.step``.

        Returns:
            What ``optimizer.step`` returned, ``None`` if it was not called.
        """
        if id(optimizer) not in self._findings:
            self.unscale_(optimizer)
        found = self._findings[id(optimizer)]
        if getattr(optimizer, "_step_supports_amp_scaling", False):
            skipping = cast(Any, optimizer)
            skipping.found_inf, skipping.grad_scale = found, None
            try:
                return optimizer.step(*args, **kwargs)
            finally:
                del skipping.found_inf, skipping.grad_scale
        return None if bool(found) else optimizer.step(*args, **kwargs)

    def update(self) -> None:
        """Let the scales follow what was found; once, after all optimizers have stepped.

        Raises:
            RegistrationError: if no gradient was looked at since the last update.
            ScaleError: if a branch overflows again and again at its lowest scale.
        """
        if self._agreed is None:
            raise RegistrationError("update() needs a step(optimizer) or unscale_(optimizer) since the last one")
        count = len(self._names)
        blamed, peaks, (lost, *_) = self._agreed[:count] > 0, self._agreed[count : 2 * count], self._agreed[2 * count :]
        following = self._policy.update(self._scales, torch.where(blamed, torch.inf, peaks), self._top, self._replicas)
        # With a loss that is not finite, every gradient may be: no branch is to blame.
        keep = lost > 0
        self._scales = Scales(*(torch.where(keep, a, b) for a, b in zip(self._scales, following, strict=True)))
        self._skips += blamed & ~keep
        found = torch.stack(list(self._findings.values()))
        self._last_skipped = (found > 0).any()
        self._skipped += self._last_skipped
        self._updates += 1
        self._findings.clear()
        self._agreed = None
        if self._measure_every and self._updates % self._measure_every == 0:
            self._check_stuck()
        self._begin()

    @property
    def skipped(self) -> bool:
        """Whether the step before the last `update` was skipped; a schedule should not step then."""
        return bool(self._last_skipped)

    def scales(self) -> dict[str, float]:
        """The scale of every branch, by name."""
        return dict(zip(self._names, torch.exp2(self._scales.log2).tolist(), strict=True))

    def stats(self) -> ScalerStats:
        """Give figures as plain numbers. Reads them from the device."""
        gauge = self._gauge
        shares = [
            zeros / numbers if numbers else math.nan
            for zeros, numbers in zip(gauge.zeros.tolist(), gauge.numbers, strict=True)
        ]
        columns = zip(self.scales().items(), self._skips.tolist(), shares, strict=True)
        blocks = {name: BlockFigures(scale, skips, share) for (name, scale), skips, share in columns}
        return ScalerStats(self._updates, int(self._skipped), blocks)

    def get_scale(self) -> float:
        """What `scale` multiplies a loss by: 1, always."""
        return 1.0

    def is_enabled(self) -> bool:
        """Whether it does anything: always."""
        return True

    def gradient_scale(self, index: int) -> float:
        """What scaled gradients of the branch number ``index`` are multiplied by at present."""
        if self._powers is None:
            self._powers = self._gauge.scale.tolist()
        return self._powers[index]

    def remove(self) -> None:
        """Leave the model as it was, in full precision: no scales, no hooks."""
        self._installation.remove()

    def state_dict(self) -> dict[str, Any]:
        """Give everything that decides the future, as plain numbers by branch name; the same on every rank."""
        rows = zip(*(tensor.tolist() for tensor in (*self._scales, self._skips)), strict=True)
        keys = (*Scales._fields, "skips")
        return {
            "policy": repr(self._policy),
            "updates": self._updates,
            "skipped": int(self._skipped),
            "last_skipped": bool(self._last_skipped),
            "blocks": {name: dict(zip(keys, row, strict=True)) for name, row in zip(self._names, rows, strict=True)},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` returned, on any number of ranks. Between steps.

        Raises:
            StateError: if it is of other branches or another policy; nothing has been changed then.
        """
        blocks = state.get("blocks")
        if not isinstance(blocks, Mapping) or state.keys() != self.state_dict().keys():
            raise StateError("not the state of a ResblockScaler")
        blocks = cast(Mapping[str, Mapping[str, Any]], blocks)
        strange = sorted(set(blocks) ^ set(self._names))
        if strange:
            where = "there" if strange[0] in blocks else "here"
            raise StateError(f"the state is of other branches: {strange[0]!r} is only {where}")
        if state["policy"] != repr(self._policy):
            raise StateError(f"the state is of the policy {state['policy']}, but this one is {self._policy!r}")
        for field, tensor in (*zip(Scales._fields, self._scales, strict=True), ("skips", self._skips)):
            tensor.copy_(torch.tensor([blocks[name][field] for name in self._names], dtype=tensor.dtype))
        self._updates = state["updates"]
        self._skipped.fill_(state["skipped"])
        self._last_skipped.fill_(state["last_skipped"])
        self._begin()

    def _begin(self) -> None:
        """Get ready for the next step."""
        self._gauge.set(self._scales.log2)
        self._gauge.clear(counting=self._measure_every > 0 and self._updates % self._measure_every == 0)
        self._lost.zero_()
        self._powers = None

    def _agree(self, bad: Tensor) -> Tensor:
        """Tell the other ranks what was found here; give whether anything was found anywhere, as a 0-dim number."""
        peak = self._gauge.peak
        finite = torch.isfinite(peak)
        mine = torch.cat([(~finite).float(), torch.where(finite, peak, 0.0), self._lost.view(1), bad.view(1)])
        if self._communicator is not None:
            self._communicator.maximum_(mine)
        self._agreed = mine if self._agreed is None else torch.maximum(self._agreed, mine)
        count = len(self._names)
        return torch.maximum(mine[:count].amax(), mine[2 * count :].amax())

    def _check_seen(self, parameters: Iterable[nn.Parameter], places: Mapping[int, Place]) -> None:
        missed = next((places[id(p)] for p in parameters if id(p) in places and not places[id(p)].seen), None)
        if missed is not None:
            raise RegistrationError(
                f"{missed.name!r} has a gradient that never passed its hook: it was frozen when the scaler was made, "
                "or its gradient was set by hand, or the branch was compiled in a sharded model"
            )

    def _check_stuck(self) -> None:
        """Raise instead of skipping for ever."""
        low = self._policy.lowest(self._replicas)
        stuck = ((self._scales.bad >= _PATIENCE) & (self._scales.log2 <= low)).tolist()
        if any(stuck):
            raise ScaleError(
                f"the gradients of {self._names[stuck.index(True)]!r} were not finite in each of the last {_PATIENCE} "
                f"steps or more, at its lowest scale, 2^{low:g}: a policy with a lower bound beneath that may help"
            )


def _communicator(process_group: dist.ProcessGroup | None, facts: Iterable[str]) -> Communicator | None:
    """The ranks to agree with, if there are others, once they are known to have the same settings."""
    if not dist.is_initialized():
        return None
    group = process_group or cast(dist.ProcessGroup, dist.group.WORLD)
    if group.size() == 1:
        return None
    communicator = Communicator(group)
    named = [(f"ResblockScaler's fact {place}", fact) for place, fact in enumerate(facts)]
    communicator.guard("the comparison of scalers", agree, communicator.group, named, "setting")
    return communicator
