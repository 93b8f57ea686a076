"""A ``TrainerCallback`` that puts a reducer to work in Hugging Face's ``Trainer``, and saves it in its checkpoints.

The Trainer has no argument for communication hooks, and what callbacks give it to save is JSON from one rank. So this
one keeps a file of its own in each ``checkpoint-*`` folder.
"""

import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from distopt import Registration, Stats
from distopt.reducers.reducer import Reducer

from .late import LateRegistration, logger

try:
    from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
    from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, get_last_checkpoint
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        "distopt.integrations.transformers needs transformers and accelerate: pip install transformers accelerate"
    ) from error

FILE = "distopt.pt"
"""What is written into each checkpoint's folder, beside ``optimizer.pt``."""

REMEDY = "train without FSDP or DeepSpeed, and do not evaluate before: Accelerate then leaves DDP out, and ranks differ"


class ReducerCallback(TrainerCallback):
    """Averages gradients by a reducer, in every ``train`` of a trainer; `attach` makes one.

    Args:
        trainer: whose model it is. What its ``train`` is told to resume from is noted; nothing else of it changes.
        reducer: ``distopt.PowerSGD(rank=8)`` for example.
        options: keywords of `distopt.register`.
    """

    def __init__(self, trainer: Trainer, reducer: Reducer, **options: Any) -> None:
        self._late = LateRegistration(reducer, REMEDY, **options)
        self._trainer = trainer
        self._resumed: str | bool | None = None
        trainer.train = self._noting(trainer.train)  # no callback is told the folder

    @property
    def registration(self) -> Registration | None:
        """What `distopt.register` returned; None in a single process, and before training."""
        return self._late.registration

    def stats(self) -> Stats:
        """What has been reduced and sent so far on this rank; all zero before training."""
        return self._late.stats()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """The model is wrapped, and everything else is restored."""
        self._late.detach()
        folder = get_last_checkpoint(args.output_dir) if self._resumed is True else self._resumed
        if folder:
            file = Path(folder, FILE)
            if file.exists():
                self._late.load_state_dict(torch.load(file, map_location="cpu", weights_only=True))
            else:
                logger.warning("%s is not there: residuals and factors begin anew", file)
        self._late.attach(self._trainer.model_wrapped, self._trainer.accelerator.scaler)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """The trainer has written a checkpoint; all ranks come here."""
        saved = self._late.state_dict()
        folder = Path(args.output_dir, f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}")
        if saved and args.should_save and not args.save_only_model and not state.is_hyper_param_search:
            torch.save(saved, folder / f"{FILE}.part")
            os.replace(folder / f"{FILE}.part", folder / FILE)

    def _noting(self, train: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(train)
        def noted(resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
            self._resumed = resume_from_checkpoint
            return train(resume_from_checkpoint, *args, **kwargs)

        return noted


def attach(trainer: Trainer, reducer: Reducer, **options: Any) -> ReducerCallback:
    """Let ``reducer`` average the gradients of a trainer's model, from the first step of every ``train`` on.

    A second ``train`` goes on with the residuals of the first, as the trainer does with its optimizer. Accumulation and
    ``fp16`` work as with DDP alone. Evaluation leaves it alone, and in a single process it does nothing. Each
    checkpoint folder gets one more file, ``distopt.pt``, and ``train(resume_from_checkpoint=...)`` reads it.

    Args:
        trainer: a `transformers.Trainer`, or one derived from it, that has not begun.
        reducer: ``distopt.PowerSGD(rank=8)`` for example.
        options: keywords of `distopt.register`.

    Returns:
        The callback, added to the trainer; its ``stats()`` tell what was sent.

    Raises:
        SettingError: if ``reducer`` is none.
        RegistrationError: when training begins, if there are several processes without DDP.
    """
    callback = ReducerCallback(trainer, reducer, **options)
    trainer.add_callback(callback)
    return callback
