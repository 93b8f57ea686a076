"""Lightning's real Trainer with two ranks: the bits of DDP with `distopt.register`, and its checkpoints."""

import warnings

import lightning.pytorch as pl
import pytest
import torch
from distopt.integrations.lightning import ReducerCallback
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.precision import MixedPrecision
from lightning.pytorch.strategies import DDPStrategy
from torch.utils.data import DataLoader

from distopt.errors import RegistrationError, SettingError
from tests.integrations.adapters.plain import (
    REDUCER,
    as_torchrun,
    batches,
    loss_of,
    net,
    optimizer_of,
    same,
    train,
    values,
)
from tests.processes import run_ranks

pytestmark = pytest.mark.timeout(300)
"""Two processes load lightning, on a machine that may have two cores."""


class Module(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = net()

    def training_step(self, batch, index):
        return loss_of(self.net, batch)

    def validation_step(self, batch, index):
        loss_of(self.net, batch)

    def configure_optimizers(self):
        return optimizer_of(self)


class BareStrategy(DDPStrategy):
    """Several processes, and no DDP, as FSDP and others are."""

    def configure_ddp(self):
        pass


def every_epoch(folder):
    return ModelCheckpoint(folder, "{epoch}", every_n_epochs=1, save_top_k=-1)


def fitted(rank, *callbacks, steps, module=None, ckpt_path=None, strategy=DDPStrategy, fp16=False, epochs=1, **options):
    """A module after ``fit``, on this rank's batches."""
    module = Module() if module is None else module
    plugins = [MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu"))] if fp16 else None
    trainer = pl.Trainer(
        accelerator="cpu", devices=2, strategy=strategy(), max_epochs=epochs, logger=False,
        callbacks=list(callbacks), plugins=plugins, use_distributed_sampler=False, enable_progress_bar=False,
        enable_model_summary=False, enable_checkpointing=any(isinstance(c, ModelCheckpoint) for c in callbacks), **options,
    )  # fmt: skip
    loader = DataLoader(batches(rank, steps * options.get("accumulate_grad_batches", 1) // epochs), batch_size=None)
    trainer.fit(module, loader, ckpt_path=ckpt_path)
    return module, trainer


def job(rank, folder):
    as_torchrun(rank)
    warnings.simplefilter("ignore")
    found = {}
    expected, stats = train(rank, steps=6, accumulate=2, epochs=2, save_every=3)
    hook = ReducerCallback(REDUCER)
    module, _ = fitted(rank, hook, every_epoch(folder), steps=6, epochs=2, accumulate_grad_batches=2)
    found["bits"] = same(values(module), expected) and hook.stats() == stats
    found["steps"], found["saving"] = hook.stats().steps, hook.stats().saving
    alone, _ = fitted(rank, steps=6, epochs=2, accumulate_grad_batches=2)
    found["ddp alone"] = same(values(alone), train(rank, steps=6, accumulate=2, epochs=2, reducer=None)[0])
    found["compressed"] = not same(values(alone), expected)

    hook = ReducerCallback(REDUCER)
    module, trainer = fitted(
        rank,
        hook,
        every_epoch(folder),
        steps=6,
        epochs=2,
        accumulate_grad_batches=2,
        ckpt_path=f"{folder}/epoch=0.ckpt",
    )
    found["resumed"] = same(values(module), expected) and hook.stats() == stats
    loader = DataLoader(batches(rank, 1), batch_size=None)
    trainer.validate(module, loader, ckpt_path=f"{folder}/epoch=0.ckpt", verbose=False)
    found["evaluated"] = hook.stats() == stats

    hook = ReducerCallback(REDUCER)
    module, _ = fitted(rank, hook, steps=3)
    fitted(rank, hook, module=module, steps=2)
    expected, stats = train(rank, steps=3, again=2)
    found["twice"] = same(values(module), expected) and hook.stats() == stats
    fitted(rank, hook, steps=2)
    found["another model"] = hook.stats().steps == 2

    hook = ReducerCallback(REDUCER)
    module, _ = fitted(rank, hook, steps=4, fp16=True)
    expected, stats = train(rank, steps=4, fp16=True)
    found["fp16"] = same(values(module), expected) and hook.stats() == stats
    found["unscaled"] = max(stats.residual_norm.values())

    with pytest.raises(RegistrationError, match='not Module: give the Trainer strategy="ddp"'):
        fitted(rank, ReducerCallback(REDUCER), steps=1, strategy=BareStrategy)
    return found


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    return run_ranks(2, job, str(tmp_path_factory.mktemp("lightning")), timeout=280)


LAWS = ("bits", "ddp alone", "compressed", "resumed", "evaluated", "twice", "another model", "fp16")


@pytest.mark.parametrize("law", LAWS)
def test_equals_ddp_with_register(found, law):
    assert [rank[law] for rank in found] == [True, True]


def test_was_compressed(found):
    assert [rank["steps"] for rank in found] == [6, 6]
    assert all(rank["saving"] > 0.7 for rank in found)
    assert all(0.1 < rank["unscaled"] < 10 for rank in found)  # the scale is 65536


def test_one_process(tmp_path):
    """Nothing is reduced; a state of several processes waits, and is saved again."""
    hook = ReducerCallback(REDUCER)
    hook.load_state_dict({"step": 3})
    trainer = pl.Trainer(accelerator="cpu", devices=1, max_steps=2, logger=False, callbacks=[hook],
                         enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)  # fmt: skip
    trainer.fit(Module(), DataLoader(batches(0, 2), batch_size=None))
    trainer.save_checkpoint(tmp_path / "one.ckpt")
    assert hook.registration is None
    assert hook.stats().steps == 0
    saved = torch.load(tmp_path / "one.ckpt", weights_only=True)
    assert saved["callbacks"]["ReducerCallback"] == {"step": 3}


def test_reducer_is_one():
    with pytest.raises(SettingError, match="reducer is 8"):
        ReducerCallback(8)
