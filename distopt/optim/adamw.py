"""AdamW with its moments in float32, bfloat16, or DALL-E's 16-bit formats."""

from collections.abc import Callable, Iterator
from typing import Any, Literal, TypeAlias, cast

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT, StateDict

from distopt.attach.exemptions import is_exempt_by_name
from distopt.errors import DistoptError, SettingError
from distopt.optim.fused import Launches, Work, fits
from distopt.optim.saving import TORCH_SETTINGS, Shielded, decoded, shield, taken_over
from distopt.optim.settings import check_settings
from distopt.optim.state import is_reduced, moment_bytes, new_state, piece_of, stored
from distopt.optim.update import Hyper, update_blocks, update_lists, widest

# pyright: reportPrivateUsage=false, reportPrivateImportUsage=false
# torch._foreach_* is how torch's own optimizers work on lists, and has no public name.

Moments: TypeAlias = Literal["float32", "bfloat16", "packed16"]


class AdamW(Optimizer):
    """``torch.optim.AdamW`` whose moments take 4 bytes a parameter instead of 8.

    ``"packed16"`` keeps the mean in 1-6-9 and the variance in 0-6-10, with a power of two for every 4096 numbers;
    ``"bfloat16"`` keeps both in bfloat16. Both are rounded stochastically, by draws that follow from ``seed``, the
    parameter's number and its step. ``"float32"`` is ``torch.optim.AdamW(foreach=True)`` bit for bit: the moments have
    the parameter's own precision, at least float32.

    In full precision remain parameters with fewer than two sides longer than 1, those of groups that say
    ``"moments": "float32"``, and, where the optimizer is given ``model.named_parameters()``, embeddings, norms and
    unembeddings, which it knows by their names.

    ``state_dict()`` has the layout of ``torch.optim.AdamW``, with the moments as float32: each can load the other's. A
    step takes gradients of any floating dtype. It reads nothing back from an accelerator, unless a gradient scaler
    has set ``found_inf``: one flag then, and if it is set nothing changes.

    With ``capturable`` it reads nothing back then either, and can be captured in a CUDA graph after one step outside of
    it: steps are counted on the parameters' device, and a learning rate that is a tensor there may change from one
    replay to the next. All parameters, those in full precision too, are updated by the Triton kernels then, which
    take float32, bfloat16 and float16.

    Args:
        params: parameters, named parameters, or groups of them. A group may have its own value of any setting but the
            seed.
        lr: learning rate, at least 0.
        betas: decay of mean and variance, each at least 0 and below 1.
        eps: what is added to the root of the variance, at least 0.
        weight_decay: at least 0; multiplied by the learning rate.
        moments: how they are kept.
        max_variance: the variance is clipped to it before it is used or kept; DALL-E has 5. ``None``: no clipping.
        seed: of the stochastic rounding.
        capturable: whether a step can be captured in a CUDA graph; for the whole optimizer.

    Raises:
        SettingError: a setting is out of its range, or a parameter is not a real floating-point tensor.

    Example:
        >>> model = torch.nn.Linear(300, 300)
        >>> optimizer = AdamW(model.named_parameters(), lr=1e-3, moments="packed16", max_variance=5)
        >>> model(torch.ones(1, 300)).sum().backward()
        >>> optimizer.step()
        >>> torch.optim.AdamW(model.parameters()).load_state_dict(optimizer.state_dict())

    Source: Loshchilov and Hutter 2019 (arXiv:1711.05101); formats and clipping: Ramesh et al. 2021 (arXiv:2102.12092),
    appendices B.2 and D.
    """

    _step_supports_amp_scaling = True  # GradScaler sets `found_inf` and `grad_scale`, and leaves the rest to `step`

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        moments: Moments = "float32",
        max_variance: float | None = None,
        seed: int = 0,
        capturable: bool = False,
    ) -> None:
        self._seed = seed
        self._launches = Launches()
        settings = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        own = {"moments": moments, "max_variance": max_variance, "capturable": capturable}
        check_settings({**settings, **own})
        super().__init__(params, {**settings, **TORCH_SETTINGS, **own})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; see ``torch.optim.Optimizer.add_param_group``."""
        check_settings({**self.defaults, **param_group})
        super().add_param_group(param_group)
        for parameter in self.param_groups[-1]["params"]:
            if not parameter.is_floating_point():
                del self.param_groups[-1]
                raise SettingError("AdamW.params", parameter.dtype, "real floating-point tensors")

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Update all parameters that have a gradient.

        Args:
            closure: computes the loss anew, with its gradients.

        Returns:
            The closure's loss.

        Raises:
            DistoptError: a gradient is sparse; or the step has to be capturable, and the kernels do not take a
                parameter. Nothing has changed then.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        found_inf = cast(Tensor | None, getattr(self, "found_inf", None))
        counted = self._check_gradients()
        if found_inf is not None and not counted and bool(found_inf):
            return loss
        scale = cast(Tensor | None, getattr(self, "grad_scale", None))
        for first, group in self._numbered_groups():
            if counted:
                self._step_counted(first, group, scale, found_inf)
            else:
                self._step_group(first, group, scale)
        return loss

    def moment_bytes(self, *, exempt: bool = True) -> float:
        """Say how many bytes the moments take per parameter element.

        Args:
            exempt: count parameters whose moments stay in full precision too.

        Returns:
            The bytes, scales included, over the elements that have moments; 0 if there are none.

        Example:
            >>> weight = torch.nn.Parameter(torch.ones(64, 64))
            >>> optimizer = AdamW([weight], moments="bfloat16")
            >>> weight.grad = torch.ones(64, 64)
            >>> optimizer.step()
            >>> optimizer.moment_bytes()
            4.0
        """
        counted = [(p, state) for p, state in self.state.items() if state and (exempt or is_reduced(state))]
        elements = sum(piece_of(parameter).numel() for parameter, _ in counted)
        return sum(moment_bytes(state) for _, state in counted) / elements if elements else 0.0

    def expected_moment_bytes(self) -> int:
        """Say how many bytes the moments of all parameters will take, once each has had a gradient.

        Nothing is allocated for parameters on the meta device.

        Example:
            >>> weight = torch.nn.Parameter(torch.ones(64, 64, device="meta"))
            >>> AdamW([weight], moments="bfloat16").expected_moment_bytes()
            16384
        """
        return sum(
            moment_bytes(self._new_state(group, index))
            for group in self.param_groups
            for index, parameter in enumerate(group["params"])
            if parameter.requires_grad
        )

    def state_dict(self) -> StateDict:
        """Give the state in the layout of ``torch.optim.AdamW``, moments in float32 at least.

        ``moments``, ``max_variance`` and ``seed`` are no part of it.
        """
        hook = self.register_state_dict_post_hook(decoded, prepend=True)
        try:
            return super().state_dict()
        finally:
            hook.remove()

    def load_state_dict(self, state_dict: StateDict) -> None:
        """Load a state of this class or of ``torch.optim.AdamW``; moments are encoded as this optimizer keeps them.

        What this class has saved is restored exactly, and training goes on bit for bit.

        Raises:
            StateError: the state is not that of an AdamW over these parameters, or uses ``amsgrad`` or ``maximize``.
        """
        hook = self.register_load_state_dict_pre_hook(shield)
        try:
            super().load_state_dict(state_dict)
        finally:
            hook.remove()

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_seed": self._seed}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._launches = Launches()
        for _, group in self._numbered_groups():
            for index, parameter in enumerate(group["params"]):
                kept = self.state.get(parameter, {})
                if isinstance(kept.get("exp_avg"), Shielded):
                    kind, counted = self._kind(group, index), group["capturable"]
                    self.state[parameter] = taken_over(kept, parameter, kind, counted=counted)

    def _numbered_groups(self) -> Iterator[tuple[int, dict[str, Any]]]:
        """Every group with the number of its first parameter."""
        first = 0
        for group in self.param_groups:
            yield first, group
            first += len(group["params"])

    def _check_gradients(self) -> bool:
        """Whether all is done on the device, the counting of steps included: where the step is to be capturable."""
        counted = self.defaults["capturable"]
        for first, group in self._numbered_groups():
            names = group.get("param_names")
            for index, parameter in enumerate(group["params"]):
                gradient = parameter.grad
                if gradient is None:
                    continue
                name = repr(names[index]) if names else f"number {first + index}"
                if gradient.layout != torch.strided:
                    raise DistoptError(f"the gradient of parameter {name} is sparse, which AdamW cannot use")
                if counted and not fits(piece_of(parameter), piece_of(gradient)):
                    if parameter.device.type != "cpu":
                        raise DistoptError(f"a capturable AdamW needs the kernels, which do not take parameter {name}")
                    counted = False
        return counted

    def _new_state(self, group: dict[str, Any], index: int) -> dict[str, Any]:
        return new_state(group["params"][index], self._kind(group, index), counted=group["capturable"])

    def _kind(self, group: dict[str, Any], index: int) -> str:
        """How the moments of a parameter are kept."""
        parameter, names = group["params"][index], group.get("param_names")
        exempt = sum(side > 1 for side in parameter.shape) < 2 or (names and is_exempt_by_name(names[index]))
        return "float32" if exempt else group["moments"]

    def _step_counted(self, first: int, group: dict[str, Any], scale: Tensor | None, held: Tensor | None) -> None:
        """A step of which the host knows nothing, not even whether it is taken: not if ``held`` is anything but 0."""
        works: list[Work] = []
        for index, parameter in enumerate(group["params"]):
            if parameter.grad is None:
                continue
            state = self.state[parameter]
            if not state:
                state.update(self._new_state(group, index))
            pieces = piece_of(parameter), piece_of(_unscaled(parameter.grad, scale))
            works.append(Work(*pieces, state, first + index))
        if not works:
            return
        steps = [work.state["step"] for work in works]
        torch._foreach_add_(steps, 1.0)
        if held is not None:
            held = held.to(torch.float32).reshape(())
            torch._foreach_sub_(steps, [held.to(step.device) for step in steps])
        self._launches.step(first, Hyper.of(group, counted=True), works, self._seed, counted=True, held=held)

    def _step_group(self, first: int, group: dict[str, Any], scale: Tensor | None) -> None:
        hyper = Hyper.of(group)
        lists: dict[tuple[torch.device, torch.dtype], list[tuple[Tensor, Tensor, dict[str, Any]]]] = {}
        works: list[Work] = []
        for index, parameter in enumerate(group["params"]):
            if parameter.grad is None:
                continue
            state = self.state[parameter]
            if not state:
                state.update(self._new_state(group, index))
            state["step"] += 1
            gradient = _unscaled(parameter.grad, scale)
            pieces = piece_of(parameter), piece_of(gradient)
            if group["moments"] != "float32" and fits(*pieces):
                works.append(Work(*pieces, state, first + index))
            elif is_reduced(state):
                key = (self._seed, first + index)
                update_blocks(hyper, *pieces, stored(state), state["step"].item(), key)
            else:
                lists.setdefault((parameter.device, parameter.dtype), []).append((parameter, gradient, state))
        if works:
            self._launches.step(first, hyper, works, self._seed)
        for members in lists.values():
            parameters, gradients, states = (list(each) for each in zip(*members, strict=True))
            means, variances = ([state[name] for state in states] for name in ("exp_avg", "exp_avg_sq"))
            steps = [state["step"].item() for state in states]
            update_lists(hyper, parameters, gradients, means, variances, steps)


def _unscaled(gradient: Tensor, scale: Tensor | None) -> Tensor:
    """Divide by the scale that GradScaler left to us: in place, but for 16 bits, which might not hold the result."""
    if scale is None:
        return gradient
    return gradient.to(widest(gradient.dtype)).div_(scale.to(gradient.device))
