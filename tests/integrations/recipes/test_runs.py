"""The runs: short ones from end to end, on two ranks, and what the command says of bad input."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from distopt.integrations.recipes import cli, run_bags, run_distillation, run_tasks
from distopt.integrations.recipes.digits import digits
from distopt.integrations.recipes.results import Results, Spread
from distopt.integrations.recipes.settings import BagsSettings, DistillationSettings, TasksSettings
from distopt.integrations.recipes.training import Drawn, Place
from hypothesis import given
from hypothesis import strategies as st

from tests.processes import run_ranks

SHORT = {"seeds": 2, "steps": 2, "batch": 4}


def all_runs(rank, folder):
    """Each run on two seeds, and the parameters that one way ends with."""
    place = Place(rank, 2, torch.device("cpu"))
    out = {name: Path(folder) / name for name in ("tasks", "distillation", "bags", "unit-tests")}
    for each in out.values():
        each.mkdir(exist_ok=True)
    run_tasks.run(TasksSettings(**SHORT), out["tasks"], place)
    run_distillation.run(DistillationSettings(**SHORT, labels=20), out["distillation"], place)
    once = SHORT | {"seeds": 1}
    run_bags.run(BagsSettings(**once, bags=20), out["bags"], place)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_bags, "WAYS", ("noisy-and", "attention"))
        run_bags.run(BagsSettings(**once, bags=20, data="unit-tests"), out["unit-tests"], place)
    model, _ = run_bags.train("digits", "noisy-and", BagsSettings(**SHORT, bags=20), place, 0)
    return [parameter.detach() for parameter in model.parameters()]


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    return run_ranks(2, all_runs, str(folder), timeout=100), folder


def test_ranks_end_with_the_same_parameters(ran):
    (first, second), _ = ran
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert any(parameter.shape == (4,) and (parameter != 0.5).all() for parameter in first)


@pytest.mark.parametrize(
    ("name", "ways", "picture"),
    [
        ("tasks", run_tasks.WAYS, "weights.png"),
        ("distillation", tuple(run_distillation.ways_of(DistillationSettings())), "errors.png"),
        ("bags", run_bags.WAYS, "thresholds.png"),
        ("unit-tests", ("noisy-and", "attention"), None),
    ],
)
def test_a_run_writes_every_seed_of_every_way_and_a_picture(ran, name, ways, picture):
    _, folder = ran
    report = json.loads((folder / name / "results.json").read_text())
    assert tuple(report["ways"]) == ways
    assert report["ranks"] == 2
    for figures in report["ways"].values():
        for figure in figures.values():
            assert len(figure["values"]) == report["settings"]["seeds"]
            assert figure["mean"] == pytest.approx(sum(figure["values"]) / len(figure["values"]))
    found = {path.name for path in (folder / name).iterdir()}
    assert found == {"results.json"} | ({picture} if picture else set())
    if picture:
        assert (folder / name / picture).read_bytes().startswith(b"\x89PNG")


def test_seeds_differ_and_batches_are_a_function_of_seed_step_and_rank():
    def draw(rng):
        return rng.integers(0, 10**9)

    assert list(Drawn(draw, 5, 0, 0)) == list(Drawn(draw, 5, 0, 0))
    assert len({value for seed in (0, 1) for rank in (0, 1) for value in Drawn(draw, 5, seed, rank)}) == 20


def test_a_digit_lies_where_its_position_says():
    training, _ = digits()
    batch = run_tasks.place_digits(training, 50, np.random.default_rng(0))
    for field, (row, column) in zip(batch.fields[:, 0], batch.positions + run_tasks.FREE / 2, strict=True):
        inside = field[int(row) : int(row) + 8, int(column) : int(column) + 8]
        assert inside.sum() == field.sum() > 0
    assert batch.positions.abs().max() == run_tasks.FREE / 2


def test_two_views_show_the_same_digits_differently():
    training, _ = digits()
    batch = run_distillation.draw(training[torch.arange(20)], 30, np.random.default_rng(0))
    assert batch.first.shape == batch.second.shape == (30, 1, 8, 8)
    assert (batch.first != batch.second).flatten(1).any(1).all()
    assert set(batch.labels.tolist()) <= set(training.labels[:20].tolist())


@given(values=st.lists(st.floats(-100, 100), min_size=2, max_size=9))
def test_spread_is_that_of_numpy(values):
    spread = Spread(tuple(values))
    assert spread.mean == pytest.approx(np.mean(values), abs=1e-9)
    assert spread.deviation == pytest.approx(np.std(values, ddof=1), abs=1e-9)


def test_differences_are_taken_seed_by_seed():
    results = Results()
    for mine, its in ((1.0, 3.0), (2.0, 5.0)):
        results.add("a", {"error": mine})
        results.add("b", {"error": its})
    assert results.against("a", "b", "error").values == (-2.0, -3.0)


@pytest.mark.parametrize(
    ("scores", "labels", "wanted"),
    [([0.0, 1.0], [0.0, 1.0], 1.0), ([1.0, 0.0], [0.0, 1.0], 0.0), ([1.0, 1.0], [0.0, 1.0], 0.5)],
)
def test_area(scores, labels, wanted):
    assert run_bags.area(torch.tensor(scores)[:, None], torch.tensor(labels)[:, None]) == wanted


@given(seed=st.integers(0, 10**6))
def test_area_is_that_of_scikit_learn(seed):
    from sklearn.metrics import roc_auc_score

    rng = np.random.default_rng(seed)
    scores, labels = rng.integers(0, 6, 30) / 6, np.arange(30) % 3 == 0
    found = run_bags.area(torch.tensor(scores)[:, None], torch.tensor(labels).float()[:, None])
    assert found == pytest.approx(roc_auc_score(labels, scores), abs=1e-9)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["tasks", "--steps", "0"], "--steps is 0, but must be a whole number from 1 to 1e+06"),
        (["tasks", "--units", "much"], "--units is 'much', but must be a number from 1e-06 to 1e+06"),
        (["distillation", "--mean", "node"], "--mean is 'node', but must be one of rank, global"),
        (
            ["bags", "--fractions", "0.1,0.2"],
            "--fractions is [0.1, 0.2], but must be a list of 4 numbers from 0.01 to 1",
        ),
        (["bags", "--sizes", "30,10"], "--sizes (30, 10): the smallest bag comes first"),
        (["bags", "--data", "mnist"], "--data is 'mnist', but must be one of digits, unit-tests"),
        (["trainer", "--rank", "-1"], "--rank is -1, but must be a whole number from 0 to 4096"),
        (["trainer", "--ranks", "0"], "--ranks: is '0', but must be a whole number from 1 to 64"),
        (["trainer", "--out", "/dev/null/here"], "--out /dev/null/here: cannot be written to"),
        (["multitask"], "argument COMMAND: invalid choice: 'multitask'"),
        ([], "the following arguments are required: COMMAND"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(arguments, told, capsys):
    assert cli.main(arguments) == 2
    line = capsys.readouterr().err
    assert told in line
    assert line.count("\n") == 1


def test_a_missing_package_is_named(monkeypatch, capsys):
    monkeypatch.setitem(cli._NEEDED, "no_such_module", "some-package")
    assert cli.main(["tasks"]) == 2
    assert capsys.readouterr().err == (
        "distopt-recipes: error: some-package is missing: pip install 'distopt[recipes]'\n"
    )


def test_the_command_starts_ranks_and_goes_on_where_it_ended(tmp_path):
    command = [sys.executable, "-m", "distopt.integrations.recipes", "trainer", "--out", str(tmp_path)]
    told = []
    for _ in range(2):
        done = subprocess.run(
            [*command, "--epochs", "1", "--save_every", "19"], capture_output=True, text=True, timeout=220
        )
        assert done.returncode == 0, done.stderr
        told.append(done.stdout)
    assert "step 19, epoch 0" in told[0]
    assert told[1].startswith("steps 19  test_error")
    assert told[0].endswith(told[1])
    report = json.loads((tmp_path / "results.json").read_text())
    assert (report["steps"], report["ranks"], report["settings"]["rank"]) == (19, 2, 4)
