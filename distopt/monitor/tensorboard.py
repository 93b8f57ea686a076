"""The figures of a registration as curves."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Protocol

from distopt.reducers.reducer import Figures

if TYPE_CHECKING:
    from distopt.attach.registration import Registration, Stats


class ScalarWriter(Protocol):
    """What is asked of a writer: the one method of ``torch.utils.tensorboard.SummaryWriter`` that is used."""

    def add_scalar(self, tag: str, scalar_value: float, global_step: int) -> object:
        """Put one number on the curve named ``tag``."""
        ...


class Scales(Protocol):
    """What is asked of the figures of a `distopt.ResblockScaler`."""

    def numbers(self) -> Mapping[str, float]:
        """Give plain numbers by tag."""
        ...


class Scaler(Protocol):
    """What is asked of a `distopt.ResblockScaler`."""

    def stats(self) -> Scales:
        """Give its figures."""
        ...


def log_to_tensorboard(
    registration: "Registration",
    writer: ScalarWriter,
    step: int,
    *,
    per_layer: bool = True,
    prefix: str = "distopt",
    scaler: Scaler | None = None,
) -> None:
    """Write a registration's figures as scalars, as this rank sees them. Not collective: rank 0 alone may call it.

    Call it every ``measure_every`` steps, or as often as the loss is written; the figures of the layers change when a
    step has been measured, and nothing is written of them before. It waits for the reduction that is under way.

    Written under ``distopt/``, for all layers together:

    - ``saving`` and ``matrix_saving``: fraction of the bytes removed so far, of all gradients and of those compressed;
    - ``bytes_sent_per_step`` and ``bytes_uncompressed_per_step``: the mean so far, over all gradients;
    - ``skipped_steps``: so far;
    - ``reconstruction_error`` and ``residual_ratio``: of the last measured step, all compressed gradients taken as one
      vector; ``worst_reconstruction_error`` and ``worst_residual_ratio``: of the layer where it is largest.

    And for every layer that was compressed in the last measured step, ``distopt.reconstruction_error/<layer>``,
    ``distopt.residual_ratio/<layer>`` and ``distopt.bytes_sent/<layer>``; see `Figures`. Of a scaler,
    ``distopt.scaler/skipped_steps``, and for every branch ``distopt.scaler/scale_log2/<branch>``, ``skips`` and
    ``zero_fraction``; see `distopt.scaling.BlockFigures`.

    Args:
        registration: what ``distopt.register`` returned.
        writer: a ``torch.utils.tensorboard.SummaryWriter``, or whatever else has its ``add_scalar``.
        step: the trainer's own number of the step, where the points stand on the curves.
        per_layer: whether to write the curves of single layers; thousands of layers make TensorBoard slow.
        prefix: what all tags begin with; two models need two.
        scaler: a `distopt.ResblockScaler` whose scales are to be written too.

    Example:
        >>> import distopt, torch
        >>> import torch.distributed as dist
        >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        >>> layer = torch.nn.Linear(8, 8)
        >>> registration = distopt.register(layer.named_parameters(), distopt.PowerSGD(rank=1))
        >>> layer(torch.ones(2, 8)).sum().backward()
        >>> registration.reduce()
        True
        >>> class Printer:
        ...     def add_scalar(self, tag, scalar_value, global_step):
        ...         print(tag, scalar_value) if "bytes" in tag else None
        >>> log_to_tensorboard(registration, Printer(), step=0)
        distopt/bytes_sent_per_step 104.0
        distopt/bytes_uncompressed_per_step 288.0
        distopt.bytes_sent/weight 64
        >>> dist.destroy_process_group()
    """
    stats, figures = registration.stats(), registration.figures()
    for name, value in {**_progress(stats), **_together(figures)}.items():
        writer.add_scalar(f"{prefix}/{name}", value, step)
    for layer, of_layer in figures.items() if per_layer else ():
        writer.add_scalar(f"{prefix}.reconstruction_error/{layer}", of_layer.reconstruction_error, step)
        writer.add_scalar(f"{prefix}.residual_ratio/{layer}", of_layer.residual_ratio, step)
        writer.add_scalar(f"{prefix}.bytes_sent/{layer}", of_layer.bytes_sent, step)
    for tag, value in scaler.stats().numbers().items() if scaler is not None else ():
        writer.add_scalar(f"{prefix}.scaler/{tag}", value, step)


def _progress(stats: "Stats") -> dict[str, float]:
    """What has been counted since the registration began."""
    steps = max(1, stats.steps)
    return {
        "saving": stats.saving,
        "matrix_saving": stats.matrix_saving,
        "bytes_sent_per_step": stats.bytes_sent / steps,
        "bytes_uncompressed_per_step": stats.bytes_uncompressed / steps,
        "skipped_steps": stats.skipped_steps,
    }


def _together(figures: Mapping[str, Figures]) -> dict[str, float]:
    """The layers of one measured step: as one vector, and the worst of them."""
    if not figures:
        return {}
    layers = figures.values()
    total = Figures(
        gradient_norm=sum(f.gradient_norm**2 for f in layers) ** 0.5,
        input_norm=sum(f.input_norm**2 for f in layers) ** 0.5,
        residual_norm=sum(f.residual_norm**2 for f in layers) ** 0.5,
        bytes_uncompressed=sum(f.bytes_uncompressed for f in layers),
        bytes_sent=sum(f.bytes_sent for f in layers),
    )
    return {
        "reconstruction_error": total.reconstruction_error,
        "residual_ratio": total.residual_ratio,
        "worst_reconstruction_error": max(f.reconstruction_error for f in layers),
        "worst_residual_ratio": max(f.residual_ratio for f in layers),
    }
