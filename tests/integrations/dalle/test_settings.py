"""Settings: what is refused, and in which words."""

import dataclasses

import pytest
from distopt.integrations.dalle.settings import (
    DemoSettings,
    InputError,
    TrainSettings,
    build,
    check_batch,
    load_toml,
)
from hypothesis import given
from hypothesis import strategies as st

from distopt.errors import SettingError


def test_an_empty_table_gives_the_defaults():
    assert build(TrainSettings, {}) == TrainSettings()


@given(
    size=st.integers(2, 128).map(lambda n: 4 * n),
    seed=st.integers(0, 2**63 - 1),
    held_out=st.floats(0, 0.9),
    steps=st.integers(1, 10_000_000),
    rank=st.integers(1, 1024),
)
def test_what_is_in_range_is_kept(size, seed, held_out, steps, rank):
    table = {
        "size": size,
        "seed": seed,
        "held_out": held_out,
        "stage1": {"steps": steps},
        "communication": {"rank": rank},
    }
    settings = build(TrainSettings, table)
    assert (settings.size, settings.seed, settings.held_out) == (size, seed, held_out)
    assert (settings.stage1.steps, settings.communication.rank) == (steps, rank)


def test_settings_and_their_table_are_equivalent():
    table = dataclasses.asdict(TrainSettings(size=64))
    without_none = {
        name: {k: v for k, v in value.items() if v is not None} if isinstance(value, dict) else value
        for name, value in table.items()
    }
    assert build(TrainSettings, without_none) == TrainSettings(size=64)


def test_a_whole_number_is_a_number():
    assert build(TrainSettings, {"stage1": {"learning_rate": 1}}).stage1.learning_rate == 1.0


@pytest.mark.parametrize(
    ("table", "words"),
    [
        ({"sise": 32}, ["sise", "32", "size"]),
        ({"stage1": {"step": 5}}, ["stage1.step", "5", "steps, batch"]),
        ({"stage1": 5}, ["stage1", "5", "a table"]),
        ({"size": "32"}, ["size", "'32'", "a whole number from 8 to 512"]),
        ({"size": 32.0}, ["size", "32.0", "a whole number"]),
        ({"size": True}, ["size", "True", "a whole number"]),
        ({"seed": True}, ["seed", "True", "a whole number"]),
        ({"size": 30}, ["size", "30", "a multiple of stage1.patch, which is 4"]),
        ({"size": 4}, ["size", "4", "from 8 to 512"]),
        ({"seed": -1}, ["seed", "-1", "from 0 to 2**63 - 1"]),
        ({"held_out": 1.0}, ["held_out", "1.0", "from 0 to 0.9"]),
        ({"held_out": float("nan")}, ["held_out", "nan"]),
        ({"stage2": {"steps": 0}}, ["stage2.steps", "0", "from 1"]),
        ({"stage2": {"width": 100, "heads": 3}}, ["stage2.width", "100", "a multiple of stage2.heads, which is 3"]),
        ({"stage2": {"learning_rate": float("inf")}}, ["stage2.learning_rate", "inf"]),
        ({"stage2": {"kernel": 4}}, ["stage2.kernel", "4", "an odd number"]),
        ({"stage2": {"code_width": 0}}, ["stage2.neighbours", "3", "0 where stage2.code_width is 0"]),
        ({"stage2": {"attention": "axial"}}, ["stage2.attention", "'axial'", "one of full, paper"]),
        ({"sampling": {"guidance": -1}}, ["sampling.guidance", "-1", "from 0 to 100"]),
        ({"communication": {"reducer": "topk"}}, ["communication.reducer", "'topk'", "one of powersgd, allreduce"]),
    ],
)
def test_what_is_wrong_is_named_with_its_value_and_what_is_allowed(table, words):
    with pytest.raises(SettingError) as caught:
        build(TrainSettings, table)
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message


@pytest.mark.parametrize("field", ["steps_1", "steps_2", "rank", "n"])
def test_the_demo_checks_its_settings_as_well(field):
    with pytest.raises(SettingError, match=field):
        DemoSettings(**{field: 0})


def test_a_batch_must_be_divisible_only_if_it_was_set():
    check_batch(TrainSettings(), 3)
    settings = build(TrainSettings, {"stage2": {"batch": 64}})
    check_batch(settings, 2)
    with pytest.raises(SettingError, match=r"stage2\.batch is 64, but must be a multiple .* 3"):
        check_batch(settings, 3)


@pytest.mark.parametrize(
    ("content", "words"),
    [(None, "no such file"), (b"size = ", "not valid TOML"), (b"\xff\xfe", "UTF-8")],
)
def test_a_file_that_is_no_toml_is_refused_in_one_line(tmp_path, content, words):
    path = tmp_path / "f.toml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match=words) as caught:
        load_toml(path)
    assert "\n" not in str(caught.value)


def test_toml_is_read(tmp_path):
    path = tmp_path / "f.toml"
    path.write_text("size = 16\n[stage1]\nsteps = 3\n")
    assert load_toml(path) == {"size": 16, "stage1": {"steps": 3}}


@pytest.mark.parametrize(
    ("table", "words"),
    [
        ({"neck": 8, "architecture": "paper"}, ["stage1.neck", "8", "left out", "small"]),
        ({"n_hid": 8}, ["stage1.n_hid", "8", "left out", "paper"]),
        ({"n_hid": 6, "architecture": "paper"}, ["stage1.n_hid", "6", "a multiple of 4"]),
        ({"patch": 2, "architecture": "huge"}, ["stage1.architecture", "'huge'", "small, paper"]),
        ({"weights": "somewhere"}, ["stage1.architecture", "'small'", "paper"]),
        ({"weights": 3, "architecture": "paper"}, ["stage1.weights", "3", "a text"]),
        ({"tau_steps": 1.5}, ["stage1.tau_steps", "1.5", "a whole number of steps, or a fraction"]),
        ({"beta_steps": True}, ["stage1.beta_steps", "True", "a whole number of steps, or a fraction"]),
        ({"warmup": "5"}, ["stage1.warmup", "'5'", "a whole number of steps, or a fraction"]),
        ({"likelihood": "l1"}, ["stage1.likelihood", "'l1'", "mse, logit_laplace"]),
    ],
)
def test_what_stage_1_cannot_be_told(table, words):
    with pytest.raises(SettingError) as caught:
        build(TrainSettings, {"stage1": table})
    assert all(word in str(caught.value) for word in words)


def test_the_patch_of_the_papers_dvae_is_a_power_of_two():
    with pytest.raises(SettingError, match=r"stage1.patch is 6, but must be a power of two"):
        build(TrainSettings, {"size": 24, "stage1": {"patch": 6, "architecture": "paper"}})


def test_lengths_keep_their_kind():
    stage1 = build(TrainSettings, {"stage1": {"tau_steps": 1, "beta_steps": 1.0}}).stage1
    assert type(stage1.tau_steps) is int
    assert type(stage1.beta_steps) is float
