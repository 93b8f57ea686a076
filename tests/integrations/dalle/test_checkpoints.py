"""Runs that are killed, stopped, or go on with other ranks: what is resumed is what was stopped, to the bit."""

import math
import os
import random
import shutil
import signal
import sys
import threading
import time

import pytest
import torch
import torch.distributed as dist
from distopt.integrations.dalle import checkpoints as module
from distopt.integrations.dalle import recipe
from distopt.integrations.dalle.checkpoints import RunCheckpoints
from distopt.integrations.dalle.context import Context
from distopt.integrations.dalle.dvae import DVAESettings
from distopt.integrations.dalle.precision import reducer
from distopt.integrations.dalle.recipe import Recipe
from distopt.integrations.dalle.sampling import SamplingSettings
from distopt.integrations.dalle.settings import CheckpointOptions, InputError
from distopt.integrations.dalle.stage1_settings import Stage1Settings
from distopt.integrations.dalle.stage2 import Stage2Settings
from distopt.integrations.running.journal import RunJournal
from safetensors.torch import load_file

from distopt import checkpoint
from distopt.errors import CheckpointError
from tests.faults.draw import count
from tests.integrations.dalle.test_stage2 import Flags
from tests.processes import run_mortals

STEPS = 8
EVERY_3 = CheckpointOptions(every_steps=3, every_seconds=0.0)


class WideFlags(Flags):
    """In float64."""

    def pairs(self, n, rng):
        captions, pictures = super().pairs(n, rng)
        return captions, pictures.double()


def small(precision="fp32", shards=1, steps=STEPS):
    """A run of both stages that takes a second; exact for any number of ranks, so without the push to equal use."""
    how = {"steps": steps, "batch": 8, "clip": 0.1}
    return Recipe(
        dvae=DVAESettings(size=8, grid=2, codes=8, width=16, neck=8),
        stage1=Stage1Settings(**how, start=16, usage=0.0),
        vocabulary=60,
        text_length=8,
        transformer={"width": 16, "layers": 1, "heads": 2, "code_width": 4},
        stage2=Stage2Settings(**how),
        sampling=SamplingSettings(),
        reducers=(reducer("powersgd", 1, precision), reducer("powersgd", 1, precision)),
        precision=precision,
        shards=shards,
    )


def train(context, out, chosen, options=EVERY_3, source=None):
    """One process of a run, which leaves its model in the folder when it has come to the end."""
    saver = RunCheckpoints(out / "checkpoints", options, context)
    trained = recipe.train(source or Flags(), chosen, context, RunJournal(None, shown=False), saver)
    if context.rank == 0:
        trained.model.save(out, "demo", {})
    return trained


class Moments:
    """Counts calls and returns of functions, those of the system too, and kills the process at one of them."""

    def __init__(self, last, told):
        self.passed, self.last, self.told = 0, last, told

    def __call__(self, *event):
        self.passed += 1
        if self.passed >= self.last:
            os.close(os.open(self.told, os.O_CREAT))
            os.kill(os.getpid(), signal.SIGKILL)


def end_with(told):
    """What a launcher does: whoever does not notice that another rank is dead, for it waits to meet it, is ended."""
    while not os.path.exists(told):
        time.sleep(0.1)
    time.sleep(1)
    os._exit(1)


def job(rank, say, folder, world_size, out, chosen, options=EVERY_3, fate=None, wide=False, lose=None):
    """A rank of a run that may be killed on the way; the first tells where it begins, and every save that returned."""
    if wide:
        torch.set_default_dtype(torch.float64)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world_size)
    context = Context(rank=rank, world_size=world_size)
    save, resume = checkpoint.save, module.StageSaver.resume

    def told(folder, step, **more):
        save(folder, step, **more)
        say(("saved", step))
        if fate == ("signal", rank, step):
            os.kill(os.getpid(), signal.SIGTERM)

    def resumed(self, states, registration):
        if lose is not None:
            forget(lose, states, registration)
        first = resume(self, states, registration)
        say(("begins", self._before + first))
        return first

    patch = pytest.MonkeyPatch()
    patch.setattr(module, "_ASK_SECONDS", 0.0)  # after every step
    patch.setattr(checkpoint, "save", told)
    patch.setattr(module.StageSaver, "resume", resumed)
    killed = fate is not None and fate[0] == "kill"
    moments = Moments(fate[2] if killed and rank in fate[1] else math.inf, f"{folder}/dead")
    if killed:
        threading.Thread(target=end_with, args=(f"{folder}/dead",), daemon=True).start()
        sys.setprofile(moments)
    trained = train(context, out, chosen, options, WideFlags() if wide else None)
    sys.setprofile(None)
    say(
        (
            "done",
            moments.passed,
            trained.stages[1].final_loss,
            trained.stages[0].stats.steps,
            len(trained.stages[0].curve),
        )
    )
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def forget(lost, states, registration):
    """Let what is loaded of one state be lost."""
    if lost == "own":
        registration.load_own_residuals = lambda state: None
    elif lost == "registration":
        registration.load_state_dict = registration.load_own_residuals = lambda state: None
    else:
        states[lost].load_state_dict = lambda state: None


def run(out, world_size, *more, **named):
    out.mkdir(exist_ok=True)
    fates = run_mortals(world_size, _named, world_size, out, more, named, timeout=100.0)
    return fates, [what for what in fates[0].said if what[0] != "done"]


def _named(rank, say, folder, world_size, out, more, named):
    job(rank, say, folder, world_size, out, *more, **named)


def model(out):
    return {name: load_file(out / f"{name}.safetensors") for name in ("dvae", "transformer")}


def same(one, other):
    return all(torch.equal(one[part][name], other[part][name]) for part in one for name in one[part])


KINDS = [("fp16", 2, 1), ("fp32", 2, 2), ("fp32", 2, 1), ("fp32", 4, 2), ("fp16", 4, 2)]


@pytest.mark.timeout(300)
@pytest.mark.parametrize(("precision", "world_size", "shards"), KINDS[: count(1, len(KINDS))])
def test_a_run_that_is_stopped_in_both_stages_is_the_undisturbed_one(tmp_path, precision, world_size, shards):
    chosen = small(precision, shards)
    fates, told = run(tmp_path / "whole", world_size, chosen, CheckpointOptions(every_seconds=0.0))
    assert [fate.code for fate in fates] == [0] * world_size
    assert told == [("begins", 0), ("saved", STEPS), ("begins", STEPS), ("saved", 2 * STEPS)]

    out = tmp_path / "parts"
    for stop, begins in ((3, 0), (STEPS + 6, 4)):
        # The signal comes after a save at one step, so the next step saves again, and all leave.
        fates, told = run(out, world_size, chosen, fate=("signal", world_size - 1, stop))
        words = f"saved after step {(stop + 1) % STEPS} of stage {1 + stop // STEPS}"
        assert all("Stopped: stopped by SIGTERM" in fate.error and words in fate.error for fate in fates)
        assert told[0] == ("begins", begins)
        assert told[-1] == ("saved", stop + 1)
    fates, told = run(out, world_size, chosen)
    assert told[0] == ("begins", STEPS + 7)
    assert same(model(out), model(tmp_path / "whole"))
    assert {fate.said[-1][3:] for fate in fates} == {(STEPS, STEPS)}


@pytest.mark.timeout(300)
def test_four_ranks_go_on_with_a_run_of_two(tmp_path):
    chosen = small(steps=20)
    assert not [fate for fate in run(tmp_path / "two", 2, chosen, wide=True)[0] if fate.error]
    run(tmp_path / "four", 2, chosen, fate=("signal", 0, 9), wide=True)
    _, told = run(tmp_path / "four", 4, chosen, wide=True)
    assert told[0] == ("begins", 10)
    two, four = model(tmp_path / "two"), model(tmp_path / "four")
    for part in two:
        for name, values in two[part].items():
            assert values.dtype == torch.float64
            assert (values - four[part][name]).abs().max() < 1e-9, name


@pytest.mark.timeout(count(300, 7200))
def test_killed_at_random_moments_a_run_loses_at_most_one_save(tmp_path, record_property):
    chance, chosen, kills, passed = random.Random(3), small(), 0, 0
    fates, _ = run(tmp_path / "whole", 2, chosen, fate=("kill", (), math.inf))
    whole, moments = model(tmp_path / "whole"), fates[0].said[-1][1]
    while kills < count(3, 200):
        out, saved, mine, sound, done = tmp_path / f"after{kills}", 0, 0, True, False
        while not done:
            fate = ("kill", chance.choice([(0,), (1,), (0, 1)]), chance.randrange(1, moments))
            fates, told = run(out, 2, chosen, fate=fate)
            begun = [step for what, step in told if what == "begins"]
            # What was saved last is what it goes on from, whether or not anybody was told; nothing older.
            sound = sound and (not begun or begun[0] >= saved)
            saved = max([saved, *(step for what, step in told if what == "saved")])
            mine += -signal.SIGKILL in [fate.code for fate in fates]
            done = any(what[0] == "done" for what in fates[0].said)
        kills, passed = kills + mine, passed + mine * (sound and same(model(out), whole))
        shutil.rmtree(out)
    record_property(
        "promise", "A run killed at a random moment goes on, at most one save lost, and ends with the same bits"
    )
    record_property("trials", kills)
    record_property("passed", passed)
    assert passed == kills


STATES = ["averaged", "own", "registration", "model", "optimizer", "scaler", "stepper"]


@pytest.mark.parametrize("lost", STATES[: count(1, len(STATES))])
def test_nothing_that_is_saved_could_be_left_out(tmp_path, lost):
    """Each state decides the end of the run: this is how the tests above would notice that one is missing."""
    chosen = small("fp16")
    run(tmp_path / "whole", 2, chosen)
    run(tmp_path / "parts", 2, chosen, fate=("signal", 0, STEPS + 3))
    run(tmp_path / "parts", 2, chosen, lose=lost)
    assert not same(model(tmp_path / "parts"), model(tmp_path / "whole"))


def test_other_data_and_damaged_checkpoints_are_told_of(tmp_path):
    chosen = small(steps=2)
    train(Context(), tmp_path, chosen)

    class Others(Flags):
        fingerprint = "others"

    with pytest.raises(InputError, match="its pictures or captions are not those"):
        train(Context(), tmp_path, chosen, source=Others())
    again = train(Context(), tmp_path, chosen)
    assert [len(stage.curve) for stage in again.stages] == [2, 2]
    for entry in (tmp_path / "checkpoints").iterdir():
        (entry / "run.pt").write_bytes(b"")
    with pytest.raises(CheckpointError, match="is whole"):
        train(Context(), tmp_path, chosen)
    assert len(list((tmp_path / "checkpoints").iterdir())) == 2


def test_a_run_is_saved_by_steps_and_by_time(tmp_path, monkeypatch):
    saved = []
    monkeypatch.setattr(module, "_ASK_SECONDS", 0.0)
    monkeypatch.setattr(checkpoint, "save", lambda folder, step, **_: saved.append(step))
    chosen = small(steps=4)
    train(Context(), tmp_path, chosen, CheckpointOptions(every_steps=3, every_seconds=0.0))
    assert saved == [3, 4, 4 + 3, 4 + 4]
    saved.clear()
    train(Context(), tmp_path, chosen, CheckpointOptions(every_steps=0, every_seconds=1e-9))
    assert saved == [1, 2, 3, 4, 5, 6, 7, 8]
    saved.clear()
    train(Context(), tmp_path, chosen, CheckpointOptions(every_steps=0, every_seconds=1e6))
    assert saved == [4, 8]
