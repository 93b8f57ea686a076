"""Transformers' real Trainer with two ranks and a small GPT-2: the bits of DDP with `distopt.register`, its checkpoints."""

import shutil
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState
from distopt.integrations.transformers import FILE, attach
from torch.nn.parallel import DistributedDataParallel as DDP
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

import distopt
from distopt.errors import RegistrationError, SettingError
from tests.integrations.adapters.plain import REDUCER, as_torchrun, same, values
from tests.processes import run_ranks

pytestmark = pytest.mark.timeout(300)
"""Two processes load transformers, on a machine that may have two cores."""

ROWS = 2
"""Sentences a rank and micro-batch."""


def language_model():
    torch.manual_seed(3)
    sizes = {"vocab_size": 31, "n_positions": 12, "n_embd": 24, "n_layer": 2, "n_head": 2}
    dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    return GPT2LMHeadModel(GPT2Config(**sizes, **dropout, bos_token_id=0, eos_token_id=0))


def sentences(count):
    """Random tokens."""
    tokens = torch.randint(31, (count, 12), generator=torch.Generator().manual_seed(5))
    return [{"input_ids": row, "labels": row} for row in tokens]


def loss_of(outputs, labels, accumulate):
    logits = outputs.logits[:, :-1].flatten(0, 1)
    return torch.nn.functional.cross_entropy(logits, labels[:, 1:].flatten()) / accumulate


def trainer_of(folder, *, steps, accumulate=1, save=0, reducer=REDUCER, scaled=False):
    """A trainer that has not begun, and our callback on it."""
    arguments = TrainingArguments(
        str(folder), use_cpu=True, max_steps=steps, per_device_train_batch_size=ROWS, learning_rate=1e-2,
        gradient_accumulation_steps=accumulate, lr_scheduler_type="constant", optim="adamw_torch", weight_decay=0.0,
        max_grad_norm=0.0 if scaled else 0.5, save_strategy="steps" if save else "no", save_steps=save or 500,
        train_sampling_strategy="sequential", average_tokens_across_devices=False, report_to="none", disable_tqdm=True,
    )  # fmt: skip
    trainer = Trainer(
        language_model(), arguments, train_dataset=sentences(64), eval_dataset=sentences(4),
        compute_loss_func=lambda outputs, labels, num_items_in_batch=None: loss_of(outputs, labels, accumulate),
    )  # fmt: skip
    if scaled:
        trainer.accelerator.scaler = torch.amp.GradScaler("cpu")  # which Accelerate makes for GPUs only
    return trainer, attach(trainer, reducer) if reducer else None


def plain(rank, *, steps, accumulate=1, save=0, reducer=REDUCER, scaled=False, times=1):
    """The same in a loop of one's own: parameters in the end, and the registration's figures."""
    inner, data = language_model(), sentences(64)
    optimizer = torch.optim.AdamW(inner.parameters(), lr=1e-2, weight_decay=0.0)
    scaler = torch.amp.GradScaler("cpu", enabled=scaled)
    hook = None
    for _ in range(times):
        model = DDP(inner, find_unused_parameters=True)
        state = hook.state_dict() if hook else None
        hook = distopt.register(model, reducer, grad_scaler=scaler if scaled else None) if reducer else None
        if state:
            hook.load_state_dict(state)
        for step in range(steps):
            for part in range(accumulate):
                model.require_backward_grad_sync = part == accumulate - 1
                first = (2 * (step * accumulate + part) + rank) * ROWS
                tokens = torch.stack([row["input_ids"] for row in data[first : first + ROWS]])
                scaler.scale(loss_of(model(input_ids=tokens), tokens, accumulate)).backward()
            if not scaled:
                torch.nn.utils.clip_grad_norm_(inner.parameters(), 0.5)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            if save and (step + 1) % save == 0 and hook:
                hook.state_dict()
    return values(inner), hook.stats() if hook else None


def job(rank, folder):
    as_torchrun(rank)
    found, saved = {}, {"steps": 4, "accumulate": 2, "save": 2}
    expected, stats = plain(rank, **saved)
    trainer, hook = trainer_of(folder, **saved)
    trainer.train()
    found["bits"] = same(values(trainer.model), expected) and hook.stats() == stats
    found["steps"], found["saving"] = hook.stats().steps, hook.stats().saving
    alone, _ = trainer_of(folder, steps=4, accumulate=2, reducer=None)
    alone.train()
    found["ddp alone"] = same(values(alone.model), plain(rank, steps=4, accumulate=2, reducer=None)[0])
    found["compressed"] = not same(values(alone.model), expected)

    trainer, hook = trainer_of(f"{folder}/elsewhere", **saved)
    trainer.train(resume_from_checkpoint=f"{folder}/checkpoint-2")
    found["resumed"] = same(values(trainer.model), expected) and hook.stats() == stats
    trainer.evaluate()
    found["evaluated"] = hook.stats() == stats
    dist.barrier()
    if rank == 0:
        shutil.rmtree(f"{folder}/checkpoint-4")
    dist.barrier()
    trainer, hook = trainer_of(folder, **saved)
    trainer.train(resume_from_checkpoint=True)
    found["resumed from the last"] = same(values(trainer.model), expected) and hook.stats() == stats

    trainer, hook = trainer_of(folder, steps=2)
    trainer.train()
    trainer.train()
    expected, stats = plain(rank, steps=2, times=2)
    found["twice"] = same(values(trainer.model), expected) and hook.stats() == stats

    trainer, hook = trainer_of(folder, steps=3, scaled=True)
    trainer.train()
    expected, stats = plain(rank, steps=3, scaled=True)
    found["scaled"] = same(values(trainer.model), expected) and hook.stats() == stats

    trainer, hook = trainer_of(folder, steps=2)
    trainer.evaluate()
    found["untouched"] = hook.stats().steps == 0
    with pytest.raises(RegistrationError, match=r"not GPT2LMHeadModel: .* do not evaluate before"):
        trainer.train()
    alone, _ = trainer_of(folder, steps=2, reducer=None)
    alone.evaluate()
    alone.train()
    found["alone"] = values(alone.model)
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("transformers")


@pytest.fixture(scope="module")
def found(folder):
    return run_ranks(2, job, str(folder), timeout=280)


LAWS = (
    "untouched", "bits", "ddp alone", "compressed", "resumed", "evaluated", "resumed from the last", "twice", "scaled",
)  # fmt: skip


@pytest.mark.parametrize("law", LAWS)
def test_equals_ddp_with_register(found, law):
    assert [rank[law] for rank in found] == [True, True]


def test_was_compressed(found):
    assert [rank["steps"] for rank in found] == [4, 4]
    assert all(rank["saving"] > 0.5 for rank in found)


def test_what_is_refused_would_train_apart(found):
    """Evaluated first, Trainer alone does not wrap its model, and says nothing."""
    assert not same(*(rank["alone"] for rank in found))


def test_one_process(found, folder, tmp_path, caplog):
    """Nothing is reduced; the state of two ranks waits, and is saved again. Where there is none, that is said."""
    trainer, hook = trainer_of(tmp_path, steps=4, save=2)
    trainer.train(resume_from_checkpoint=str(folder / "checkpoint-2"))
    assert hook.registration is None
    assert hook.stats().steps == 0
    assert "one process: there is nothing to reduce, and PowerSGD(rank=2) waits" in caplog.text
    first, second = (
        torch.load(Path(f, FILE), weights_only=True) for f in (folder / "checkpoint-2", tmp_path / "checkpoint-4")
    )
    assert first["step"] == second["step"] == 2
    assert same(list(first["residuals"].values()), list(second["residuals"].values()))

    (tmp_path / "checkpoint-4" / FILE).unlink()
    trainer, _ = trainer_of(tmp_path, steps=5)
    trainer.train(resume_from_checkpoint=True)
    assert f"{tmp_path}/checkpoint-4/distopt.pt is not there: residuals and factors begin anew" in caplog.text


def test_reducer_is_one(tmp_path):
    with pytest.raises(SettingError, match="reducer is 8"):
        trainer_of(tmp_path, steps=1, reducer=8)


@pytest.fixture(autouse=True)
def fresh_state():
    """The Accelerator inside remembers the first one of a process."""
    yield
    AcceleratorState._reset_state(True)
