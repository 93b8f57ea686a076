"""Crashes, full disks and damage: the newest checkpoint that came to its end is loaded, and nothing else."""

import errno
import itertools
import multiprocessing
import os
import pickle
import random
import shutil
import signal
import time
import warnings

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st

from distopt import checkpoint
from distopt.checkpoint import files, store
from distopt.errors import CheckpointError
from tests.faults.draw import count
from tests.processes import run_mortals

CALLS = {"open", "write", "fsync", "close", "rename", "mkdir", "makedirs", "listdir"}


class Os:
    """The ``os`` that a checkpoint is written with, until its n-th call; then ``fault(name)`` happens after or instead.

    Writes are short, as the system is allowed to make them.
    """

    def __init__(self, index, fault):
        self.index, self.fault, self.calls = index, fault, []

    def __getattr__(self, name):
        function = getattr(os, name)
        if name not in CALLS:
            return function

        def call(*args):
            self.calls.append(name)
            if len(self.calls) - 1 == self.index:
                if name == "close":
                    os.close(*args)
                self.fault(name)
            if name == "write" and self.calls[-2] != "write":
                return os.write(args[0], args[1][: max(1, len(args[1]) // 2)])
            return function(*args)

        return call


def put(patch, system):
    for module in (files, store):
        patch.setattr(module, "os", system)


def content(step):
    return {"model": checkpoint.Value(torch.full((50,), float(step))), "progress": {"step": step}}


def loaded(folder):
    """The step of the newest whole checkpoint, which must hold what was saved then."""
    back = content(-1)
    step = checkpoint.load(folder, **back)
    assert step == back["progress"]["step"] == int(back["model"].value[7])
    return step


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def save_for_ever(folder, pipe):
    for step in itertools.count(1):
        checkpoint.save(folder, step, keep=2, **content(step))
        pipe.send_bytes(str(step).encode())


def test_killed_at_a_random_moment_no_save_that_returned_is_lost(tmp_path):
    chance = random.Random(6)
    context = multiprocessing.get_context("forkserver")
    for trial in range(count(5, 200)):
        folder = tmp_path / str(trial)
        ours, theirs = context.Pipe(duplex=False)
        process = context.Process(target=save_for_ever, args=(folder, theirs), daemon=True)
        process.start()
        theirs.close()
        told = [int(ours.recv_bytes())]
        time.sleep(chance.random() * 0.05)
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        try:
            while True:
                told.append(int(ours.recv_bytes()))
        except EOFError:
            pass
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert checkpoint.latest(folder) in (told[-1], told[-1] + 1)
            assert loaded(folder) in (told[-1], told[-1] + 1)
        checkpoint.save(folder, 0, keep=1)
        assert len(names(folder)) == 1


def die_at(rank, say, folder, target, unlucky, index):
    """One rank dies at a call of its second save."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    checkpoint.save(target, 1, own=checkpoint.PerRank({"rank": rank}), **content(1))
    say("first")
    if rank == unlucky:
        put(pytest.MonkeyPatch(), Os(index, lambda _: os.kill(os.getpid(), signal.SIGKILL)))
    checkpoint.save(target, 2, own=checkpoint.PerRank({"rank": rank}), **content(2))
    say("second")


def test_a_rank_that_is_killed_while_it_saves_leaves_a_whole_checkpoint(tmp_path):
    chance = random.Random(7)
    for trial in range(count(2, 60)):
        unlucky = trial % 2
        index = chance.randrange(4 if unlucky else 30)
        fates = run_mortals(2, die_at, tmp_path / str(trial), unlucky, index)
        assert all(fate.said[0] == "first" for fate in fates)
        assert fates[unlucky].code == -signal.SIGKILL
        # It may have died after the checkpoint was current, but before anybody knew.
        assert loaded(tmp_path / str(trial)) in ((2,) if "second" in fates[1 - unlucky].said else (1, 2))


@pytest.mark.parametrize("problem", [errno.ENOSPC, errno.EIO])
def test_whatever_call_fails_the_older_checkpoint_stays(tmp_path, problem):
    def fault(_):
        raise OSError(problem, os.strerror(problem))

    checkpoint.save(tmp_path, 1, **content(1))
    with pytest.MonkeyPatch.context() as patch:
        put(patch, sound := Os(-1, fault))
        checkpoint.save(tmp_path, 2, **content(2))
    writes = [index for index, name in enumerate(sound.calls) if name == "write"]
    others = [index for index, name in enumerate(sound.calls) if name != "write"]
    assert {sound.calls[index] for index in others} == CALLS - {"write", "makedirs"}
    last = len(sound.calls) - 1  # closes what nothing was written through
    for index in {*random.Random(9).sample(writes, count(4, len(writes))), *others} - {last}:
        with pytest.MonkeyPatch.context() as patch:
            put(patch, Os(index, fault))
            with pytest.raises(CheckpointError) as caught:
                checkpoint.save(tmp_path, 2, **content(2))
        assert os.strerror(problem) in str(caught.value)
        assert "\n" not in str(caught.value)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert loaded(tmp_path) in (1, 2)
        checkpoint.save(tmp_path, 1, keep=1, **content(1))
        assert len(names(tmp_path)) == 1


class Disk:
    """The ``os`` that a checkpoint is written with, and which of what it wrote, by name, is on the disk in which order."""

    def __init__(self):
        self.paths, self.done = {}, []

    def __getattr__(self, name):
        return getattr(os, name)

    def open(self, path, *args):
        descriptor = os.open(path, *args)
        self.paths[descriptor] = os.path.basename(path)
        return descriptor

    def write(self, descriptor, data):
        self.done.append(("write", self.paths[descriptor]))
        return os.write(descriptor, data)

    def fsync(self, descriptor):
        self.done.append(("fsync", self.paths[descriptor]))
        os.fsync(descriptor)

    def rename(self, old, new):
        self.done.append(("rename", os.path.basename(new)))
        os.rename(old, new)


def test_all_of_it_is_on_the_disk_before_it_is_current_and_when_save_returns(tmp_path, monkeypatch):
    put(monkeypatch, disk := Disk())
    checkpoint.save(tmp_path, 1, **content(1))
    monkeypatch.undo()
    before, after = disk.done[: (at := disk.done.index(("rename", "00001-step-1")))], disk.done[at + 1 :]
    written = {name: place for place, (act, name) in enumerate(before) if act == "write"}
    assert {"manifest.json", "manifest.sha256", "model.pt", "progress.pt", "rank-0.pt"} <= set(written)
    synchronised = {name: place for place, (act, name) in enumerate(before) if act == "fsync"}
    assert all(synchronised[name] > place for name, place in written.items())
    assert before[-1] == ("fsync", ".saving-00001")
    assert after == [("fsync", tmp_path.name)]


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    folder = tmp_path_factory.mktemp("small")
    checkpoint.save(folder, 1, **content(1))
    checkpoint.save(folder, 2, **content(2))
    return folder


def refused(folder, name):
    """No damaged checkpoint is loaded by its step; the older one is, with a warning that names the file."""
    with pytest.raises(CheckpointError) as caught:
        checkpoint.load(folder, step=2, **content(0))
    assert name in str(caught.value)
    assert "\n" not in str(caught.value)
    with pytest.warns(RuntimeWarning, match="00001-step-1 is used instead") as told:
        assert loaded(folder) == 1
    assert name in str(told[0].message)


def test_every_flipped_bit_is_found(small, tmp_path):
    chance = random.Random(8)
    entry = small / "00002-step-2"
    assert names(entry) == ["manifest.json", "manifest.sha256", "model.pt", "progress.pt", "rank-0.pt"]
    for path in sorted(entry.iterdir()):
        sound = path.read_bytes()
        places = chance.sample(range(len(sound)), count(15, len(sound))) if len(sound) > 15 else range(len(sound))
        for place in places:
            flipped = bytearray(sound)
            flipped[place] ^= 1 << chance.randrange(8)
            path.write_bytes(flipped)
            with pytest.raises(CheckpointError, match=path.name):
                store.examine(entry)
        refused(small, path.name)
        path.write_bytes(sound)
    assert loaded(small) == 2


@pytest.mark.parametrize(
    "damage", ["truncated", "longer", "missing", "extra", "swapped", "link", "pipe", "folder", "renamed"]
)
@pytest.mark.timeout(20)
def test_other_damage_is_found(small, tmp_path, damage):
    folder = tmp_path / "run"
    shutil.copytree(small, folder)
    entry = folder / "00002-step-2"
    model = entry / "model.pt"
    sound = model.read_bytes()
    if damage == "renamed":
        shutil.rmtree(folder / "00001-step-1")
        entry.rename(folder / "00002-step-3")
        with pytest.raises(CheckpointError, match="manifest is of step 2"):
            checkpoint.load(folder)
        return
    if damage == "truncated":
        model.write_bytes(sound[:-1])
    elif damage == "longer":
        model.write_bytes(sound + b"\0")
    elif damage == "extra":
        (entry / "model.pt.old").write_bytes(sound)
    elif damage == "swapped":
        model.write_bytes((entry / "progress.pt").read_bytes())
    else:
        model.unlink()
    if damage == "link":
        (tmp_path / "elsewhere").write_bytes(sound)
        model.symlink_to(tmp_path / "elsewhere")
    elif damage == "pipe":
        os.mkfifo(model)
    elif damage == "folder":
        model.mkdir()
    refused(folder, "model.pt")


class Payload:
    """Code that a pickle would run."""

    def __reduce__(self):
        return os.mkdir, ("executed",)


@pytest.mark.parametrize("pickled", [True, False])
def test_nothing_in_a_checkpoint_is_executed_even_if_its_sums_are_right(tmp_path, monkeypatch, pickled):
    monkeypatch.chdir(tmp_path)
    with store.begin(tmp_path / "run") as draft:
        if pickled:
            hostile = files.write(draft / "model.pt", pickle.dumps(Payload(), protocol=2))
        else:
            hostile = files.write(draft / "model.pt", {"sharded": False, "state": Payload()})
        own = files.write(draft / "rank-0.pt", {})
        store.publish(draft, store.Manifest(1, 1, {"model.pt": hostile, "rank-0.pt": own}))
    with pytest.raises(CheckpointError, match=r"model\.pt") as caught:
        checkpoint.load("run", model={})
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "executed").exists()


def test_names_in_a_manifest_lead_nowhere_else(tmp_path):
    with store.begin(tmp_path / "run") as draft:
        store.publish(draft, store.Manifest(1, 1, {}))
        entry = tmp_path / "run/00001-step-1"
    text = (
        (entry / "manifest.json")
        .read_text()
        .replace('"files": {}', '"files": {"../../secret.pt": {"bytes": 1, "sha256": ""}}')
    )
    (entry / "manifest.json").write_text(text)
    (entry / "manifest.sha256").write_bytes(store._seal(text.encode()))
    with pytest.raises(CheckpointError, match="not a manifest"):
        checkpoint.load(tmp_path / "run")


def entry_with(folder, step):
    with store.begin(folder) as draft:
        digest = files.write(draft / "model.pt", b"content")
        return store.publish(draft, store.Manifest(step, 1, {"model.pt": digest}))


@given(damaged=st.lists(st.booleans(), min_size=1, max_size=6), keep=st.integers(1, 4))
@settings(max_examples=60, deadline=None)
def test_retention_never_removes_the_newest_whole_one(tmp_path_factory, damaged, keep):
    folder = tmp_path_factory.mktemp("run")
    made = []
    for step, is_damaged in enumerate(damaged):
        made.append(entry_with(folder, step))
        if is_damaged:
            (made[-1] / "model.pt").write_bytes(b"c0ntent")
    store.retain(folder, keep)
    left = {path for path in made if path.exists()}
    whole = [path for path, is_damaged in zip(made, damaged, strict=True) if not is_damaged]
    assert left == ({*made[-keep:], whole[-1]} if whole else set(made))


def test_the_newest_is_what_was_saved_last(tmp_path):
    for step in (10, 20, 30):
        checkpoint.save(tmp_path, step, keep=2, **content(step))
    assert names(tmp_path) == ["00002-step-20", "00003-step-30"]
    assert checkpoint.load(tmp_path, step=20, **content(0)) == 20
    checkpoint.save(tmp_path, 25, keep=2, **content(25))
    checkpoint.save(tmp_path, 25, keep=2, **content(25))
    assert loaded(tmp_path) == checkpoint.latest(tmp_path) == 25
    assert names(tmp_path) == ["00004-step-25", "00005-step-25"]


def test_without_a_whole_one_there_is_an_error(tmp_path):
    assert checkpoint.latest(tmp_path) is None
    entry = entry_with(tmp_path, 3)
    (entry / "model.pt").write_bytes(b"c0ntent")
    for attempt in (checkpoint.latest, checkpoint.load):
        with pytest.raises(CheckpointError, match=r"is whole: .*model\.pt is damaged"):
            attempt(tmp_path)


def test_two_runs_do_not_save_into_one_folder_at_once(tmp_path):
    checkpoint.save(tmp_path, 1, **content(1))
    with store.begin(tmp_path), pytest.raises(CheckpointError, match="another process is saving"):
        checkpoint.save(tmp_path, 2, **content(2))
    assert names(tmp_path) == ["00001-step-1"]
    assert loaded(tmp_path) == 1


def test_litter_of_crashes_goes_with_the_next_save(tmp_path):
    for name in (".saving-00004", ".removing-00001-step-3"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.pt").write_bytes(b"half")
    (tmp_path / "notes.txt").write_text("the user's own")
    checkpoint.save(tmp_path, 1)
    assert names(tmp_path) == ["00001-step-1", "notes.txt"]
