"""What becomes of a folder in which a run has begun: decided without torch, before any process is started."""

import dataclasses
import json

import pytest
from distopt.integrations.dalle import resume
from distopt.integrations.dalle.cli import main
from distopt.integrations.dalle.settings import (
    CheckpointOptions,
    DemoSettings,
    InputError,
    TokenizerOptions,
    TrainSettings,
    build,
)
from distopt.integrations.running import launch
from distopt.integrations.running.fields import leaves

DEMO = DemoSettings()


def begin(out, settings=DEMO, fresh=False, first=True, command="demo"):
    return resume.begin(out, command, settings, fresh=fresh, first=first)


def stopped(out):
    (out / resume.CHECKPOINTS).mkdir()


def finished(out):
    (out / "settings.json").write_text("{}")


def test_a_run_begins_goes_on_and_is_finished(tmp_path):
    assert begin(tmp_path)
    assert begin(tmp_path, DemoSettings(seed=1))  # nothing was saved: nothing is lost
    stopped(tmp_path)
    assert begin(tmp_path, DemoSettings(seed=1))
    assert (tmp_path / resume.CHECKPOINTS).exists()
    finished(tmp_path)
    resume.finish(tmp_path)
    assert not (tmp_path / resume.CHECKPOINTS).exists()
    assert not begin(tmp_path, DemoSettings(seed=1))


@pytest.mark.parametrize(("state", "words"), [(stopped, "a run that was stopped"), (finished, "a finished run")])
def test_another_setting_is_named_and_nothing_is_lost(tmp_path, state, words):
    begin(tmp_path)
    state(tmp_path)
    before = {path.name: path.is_dir() or path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(InputError) as caught:
        begin(tmp_path, DemoSettings(steps_1=7))
    assert f"{words} with steps_1 = its default, not 7; give another --out, or --fresh" in str(caught.value)
    with pytest.raises(InputError, match=f"{words} of the command demo"):
        begin(tmp_path, TrainSettings(), command="train")
    assert before == {path.name: path.is_dir() or path.read_bytes() for path in tmp_path.iterdir()}


def test_every_field_is_compared_but_those_that_may_change(tmp_path):
    begin(tmp_path)
    stopped(tmp_path)
    free = dataclasses.replace(DEMO, shard=2, pictures_every=7, checkpoint=CheckpointOptions(keep=5))
    assert begin(tmp_path, free)
    names = {name for name, *_ in leaves(DemoSettings)}
    assert resume.flat(DEMO).keys() == {name for name in names if name.partition(".")[0] not in resume.MAY_CHANGE}
    flat = resume.flat(build(TrainSettings, {"stage1": {"betas": [0.5, 0.6]}}))
    assert flat["stage1.betas"] == [0.5, 0.6]
    assert not [name for name in flat if name.startswith("checkpoint")]
    assert json.loads(json.dumps(flat)) == flat


def test_a_run_of_a_version_without_a_field_had_its_default(tmp_path):
    begin(tmp_path)
    stopped(tmp_path)
    begun = json.loads((tmp_path / resume.BEGUN).read_text())
    del begun["settings"]["stage1.bottleneck"]
    (tmp_path / resume.BEGUN).write_text(json.dumps(begun))
    assert begin(tmp_path)
    with pytest.raises(InputError, match=r'with stage1\.bottleneck = "relaxed", not "simvq"'):
        begin(tmp_path, DemoSettings(stage1=TokenizerOptions(bottleneck="simvq")))


def test_fresh_begins_anew_once(tmp_path, monkeypatch):
    begin(tmp_path)
    stopped(tmp_path)
    finished(tmp_path)
    assert begin(tmp_path, DemoSettings(seed=3), fresh=True)
    assert not (tmp_path / resume.CHECKPOINTS).exists()
    assert not (tmp_path / "settings.json").exists()
    stopped(tmp_path)
    # What torchrun starts again is the run that it has begun.
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert begin(tmp_path, DemoSettings(seed=3), fresh=True)
    assert (tmp_path / resume.CHECKPOINTS).exists()


@pytest.mark.parametrize("content", [None, "{", "[]", '{"command": "demo"}', '{"settings": 3, "command": "demo"}'])
@pytest.mark.parametrize("state", [stopped, finished])
def test_a_run_that_cannot_be_told_is_left_alone(tmp_path, content, state):
    state(tmp_path)
    if content is not None:
        (tmp_path / resume.BEGUN).write_text(content)
    with pytest.raises(InputError, match="whose settings are not known"):
        begin(tmp_path)


def test_other_ranks_change_nothing(tmp_path):
    assert begin(tmp_path, first=False)
    assert list(tmp_path.iterdir()) == []
    finished(tmp_path)
    begun = tmp_path / resume.BEGUN
    assert begin(tmp_path, first=False, fresh=True)
    assert not begun.exists()


def test_the_command_says_what_it_finds(tmp_path, capsys, monkeypatch):
    started = []
    monkeypatch.setattr(launch, "start", lambda *given: started.append(given) or 0)
    demo = ["demo", "--out", str(tmp_path)]
    assert main(demo) == 0
    finished(tmp_path)
    assert main(demo) == 0
    assert "has been trained with these settings" in capsys.readouterr().out
    assert main([*demo, "--steps-1", "9"]) == 2
    assert "holds a finished run with steps_1 = its default, not 9" in capsys.readouterr().err
    assert len(started) == 1
    assert main([*demo, "--steps-1", "9", "--fresh"]) == 0
    assert len(started) == 2
    assert not (tmp_path / "settings.json").exists()
