"""A Lightning ``Callback`` that puts a reducer to work on the model that ``Trainer(strategy="ddp")`` wraps.

Lightning's own ``ddp_comm_hook`` is left out on CPU without a word, and its state is not saved. This one works on every
device, and goes into Lightning's checkpoints and out of them.
"""

from collections.abc import Mapping
from typing import Any

from distopt import Registration, Stats
from distopt.reducers.reducer import Reducer

from .late import LateRegistration

try:
    import lightning.pytorch as pl
except ModuleNotFoundError as error:
    raise ModuleNotFoundError("distopt.integrations.lightning needs lightning: pip install lightning") from error


class ReducerCallback(pl.Callback):
    """Averages gradients by a reducer, from the first training step of every ``fit`` on.

    A second ``fit`` of the same model goes on with the residuals of the first. Validation and tests leave it alone, and
    in a single process it does nothing. It follows the scale of a mixed-precision plugin. A checkpoint holds its state
    under ``["callbacks"]["ReducerCallback"]``; all ranks have to save together, which Lightning asks for anyway.

    Args:
        reducer: ``distopt.PowerSGD(rank=8)`` for example.
        options: keywords of `distopt.register`.

    Raises:
        SettingError: if ``reducer`` is none.
        RegistrationError: when training begins, if the strategy of several processes is not DDP.

    Example:
        >>> import distopt
        >>> hook = ReducerCallback(distopt.PowerSGD(rank=8))
        >>> trainer = pl.Trainer(accelerator="cpu", devices=1, logger=False, callbacks=[hook])
        >>> hook.stats().saving
        0.0
    """

    def __init__(self, reducer: Reducer, **options: Any) -> None:
        self._late = LateRegistration(reducer, 'give the Trainer strategy="ddp"', **options)
        self._evaluates = False

    @property
    def registration(self) -> Registration | None:
        """What `distopt.register` returned; None in a single process, and before training."""
        return self._late.registration

    def stats(self) -> Stats:
        """What has been reduced and sent so far on this rank; all zero before training."""
        return self._late.stats()

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Lightning is about to restore a checkpoint, and for ``fit`` to wrap the model anew."""
        self._evaluates = stage != "fit"
        if stage == "fit":
            self._late.detach()

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """The model is wrapped, and everything else is restored."""
        self._late.attach(trainer.strategy.model, getattr(trainer.precision_plugin, "scaler", None))

    def state_dict(self) -> dict[str, Any]:
        """What Lightning saves, on all ranks."""
        return self._late.state_dict()

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """What Lightning restores, on all ranks, before the model is wrapped; for an evaluation as well."""
        if not self._evaluates:
            self._late.load_state_dict(state_dict)
