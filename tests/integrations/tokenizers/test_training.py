"""The trainer: the same pictures for any number of ranks, runs that go on, and what each bottleneck is there for."""

import dataclasses

import pytest
import torch
from distopt.integrations.running.fields import InputError
from distopt.integrations.tokenizers import bottlenecks, runs, training
from distopt.integrations.tokenizers.data import DrawnScenes
from distopt.integrations.tokenizers.experiments import run_one
from distopt.integrations.tokenizers.judging import judge
from distopt.integrations.tokenizers.settings import NAMES, TrainSettings
from distopt.integrations.tokenizers.sweeps import COMPARED, compared

from distopt.errors import SettingError, StateError
from tests.processes import run_ranks

TINY = TrainSettings(
    bottleneck="vq", codes=16, width=4, hidden=8, steps=8, batch=4, judged=64, save_every=3, start=False
)


def test_names_are_those_of_the_kinds():
    assert tuple(bottlenecks.KINDS) == NAMES
    assert {given["bottleneck"] for given in COMPARED.values()} == set(NAMES)
    assert len({entry.name for entry in compared(TrainSettings())}) == len(COMPARED)


def test_every_row_of_the_comparison_can_be_built():
    for entry in compared(dataclasses.replace(TINY, codes=64)):
        assert training.build(entry.settings).bottleneck.codes in (64, None)


class Killed(Exception):
    pass


class Recorder:
    def __init__(self, die_at=None):
        self.losses, self.die_at = {}, die_at

    def log(self, step, total, values):
        self.losses[step] = values["loss"]
        if step == self.die_at:
            raise Killed


@pytest.mark.parametrize("name", ["vq", "ema", "relaxed"])
def test_a_run_that_was_killed_goes_on_to_the_bit(tmp_path, name):
    settings = dataclasses.replace(TINY, bottleneck=name, start=True)
    whole, parts = Recorder(), [Recorder(die_at=5), Recorder()]
    expected = training.train(settings, None, whole).state_dict()
    with pytest.raises(Killed):
        training.train(settings, tmp_path, parts[0])
    found = training.train(settings, tmp_path, parts[1]).state_dict()
    assert min(parts[1].losses) == 4
    assert {**parts[0].losses, **parts[1].losses} == whole.losses
    assert all(torch.equal(expected[key], found[key]) for key in expected)


def test_checkpoints_of_other_settings_are_refused(tmp_path):
    training.train(TINY, tmp_path)
    with pytest.raises(StateError, match="other settings; --fresh trains anew"):
        training.train(dataclasses.replace(TINY, seed=1), tmp_path)
    training.train(dataclasses.replace(TINY, save_every=0), tmp_path)


def test_a_saved_tokenizer_is_the_trained_one(tmp_path):
    settings = dataclasses.replace(TINY, bottleneck="ema", options="dead = 0.0")
    figures = run_one(settings, tmp_path, "ema")
    model = runs.load(tmp_path)
    assert judge(model, DrawnScenes(), 64)["mse"] == pytest.approx(figures["mse"], rel=1e-6)
    assert run_one(settings, tmp_path, "ema") == figures
    assert run_one(dataclasses.replace(settings, save_every=0), tmp_path, "ema") == figures
    assert not (tmp_path / training.CHECKPOINTS).exists()
    with pytest.raises(Exception, match="holds a run of other settings"):
        run_one(TINY, tmp_path, "vq")
    (tmp_path / runs.WEIGHTS).write_bytes(b"nothing")
    with pytest.raises(Exception, match="is damaged"):
        runs.load(tmp_path)


@pytest.mark.parametrize("text", ["[]", "{}", '{"settings": 3, "figures": {}}', "nothing"])
def test_a_report_that_is_none_is_refused_by_its_name(tmp_path, text):
    (tmp_path / runs.REPORT).write_text(text)
    for look in (lambda: runs.load(tmp_path), lambda: run_one(TINY, tmp_path, "vq")):
        with pytest.raises(InputError, match=rf"{runs.REPORT}: (is no report of a tokenizer|cannot be read)"):
            look()


def on_ranks(rank, settings):
    recorder = Recorder()
    model = training.train(settings, None, recorder)
    return model.state_dict(), recorder.losses


def test_two_ranks_train_on_what_one_trains_on():
    """Averaged exactly, and without statistics of a rank's own, it is the same run but for the order of sums."""
    settings = dataclasses.replace(TINY, rank=0)
    alone = training.train(settings, None).state_dict()
    (first, losses), (second, others) = run_ranks(2, on_ranks, settings)
    assert losses != others
    for key, value in alone.items():
        assert torch.equal(first[key], second[key])
        assert torch.allclose(first[key], value, atol=2e-3), key


@pytest.mark.parametrize("name", NAMES)
def test_bottlenecks_are_sent_whole_and_convolutions_are_not(name):
    model = training.Trained(training.build(dataclasses.replace(TINY, bottleneck=name, hidden=64, width=32)), 0.0)
    rule = training.reducer_of(TINY).uncompressed
    import fnmatch

    for key, _ in model.named_parameters():
        assert any(fnmatch.fnmatchcase(key, pattern) for pattern in rule) is ("bottleneck" in key)


def test_the_batch_must_divide():
    with pytest.raises(SettingError, match="must be one of"):
        TrainSettings(bottleneck="vqvae")
    with pytest.raises(SettingError, match="options is 'rotation', but must be names and values"):
        TrainSettings(options="rotation")
    with pytest.raises(SettingError, match=r"simvq\.beta is 1"):
        training.build(TrainSettings(options="beta = 1"))


def test_collapse_of_a_vae_is_seen():
    """A weight of the prior of 100 leaves no unit active, one of 0.1 some."""
    active = {}
    for beta in (0.1, 100.0):
        settings = TrainSettings(
            bottleneck="gaussian", width=4, hidden=32, steps=80, batch=16, options=f"beta = {beta}", edges=0.0
        )
        active[beta] = judge(training.train(settings, None), DrawnScenes(), n=256)["active_units"]
    assert active[100.0] == 0
    assert active[0.1] > 20


def test_simvq_uses_more_codes_than_a_plain_codebook():
    used = {}
    for name in ("vq", "simvq"):
        settings = TrainSettings(bottleneck=name, codes=256, width=8, hidden=32, steps=120, batch=16, start=False)
        used[name] = judge(training.train(settings, None), DrawnScenes(), n=256)["used"]
    assert used["simvq"] > 1.3 * used["vq"], used


def test_rotation_uses_more_codes_where_they_follow_the_encoder_and_fewer_where_they_do_not():
    """The paper's gain, at the decay of its authors' code, and what becomes of it at a slower one."""
    used = {}
    for decay in (0.8, 0.99):
        for rotation in ("false", "true"):
            options = f"decay = {decay}, dead = 0.0, rotation = {rotation}"
            settings = TrainSettings(bottleneck="ema", codes=128, width=8, hidden=32, steps=100, options=options)
            used[decay, rotation] = judge(training.train(settings, None), DrawnScenes(), n=128)["used"]
    assert used[0.8, "true"] > 1.1 * used[0.8, "false"], used
    assert used[0.99, "true"] < 0.9 * used[0.99, "false"], used
