"""The bench of quality: what is run and what is not run again, what equal steps and equal time mean, and what is shown."""

import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.listed import BENCHES
from bench.pages import fill
from bench.quality import runs
from bench.quality.__main__ import main, pictures, tables
from bench.quality.case import Case, Outcome
from bench.quality.figures import Clock, Times, at_equal_time, groups, smooth
from bench.quality.tables import widest
from bench.quality.times import WORKLOADS_OF, steps_of
from bench.quality.ways import Way, parse, ways_of
from bench.stamp import ROOT, read_lines, write_lines
from tests.processes import run_ranks

WAYS = st.builds(Way, st.integers(0, 64), st.sampled_from(["both", "alternate"]), st.booleans(), st.booleans())
SECONDS = st.floats(1e-3, 10)


@given(WAYS, st.integers(1, 5000))
def test_a_way_is_found_by_its_label_and_begins_within_the_run(way, steps):
    label = way.label
    assert parse(label).label == label
    assert way.rank == 0 or parse(label) == way
    assert 0 <= way.exact_steps(steps) <= steps
    assert (way.exact_steps(steps) == steps) == (way.rank == 0)


@given(SECONDS, SECONDS, st.integers(1, 200), st.data())
def test_a_clock_counts_the_steps_that_have_ended(exact, other, steps, data):
    clock = Clock(exact, other, data.draw(st.integers(0, steps)), steps)
    taken = data.draw(st.integers(1, steps))
    assert clock.taken(clock.seconds(taken)) == taken
    assert clock.taken(clock.seconds(taken) - 1e-4) == taken - 1
    assert clock.taken(2 * clock.seconds(steps)) == steps
    assert clock.seconds(steps) == pytest.approx(
        clock.exact_steps * exact + (steps - clock.exact_steps) * other, rel=1e-9
    )


@given(st.lists(st.floats(0, 10), min_size=1, max_size=60))
def test_smoothing_takes_the_mean_of_a_tenth_of_the_run(losses):
    found, width = smooth(losses), max(1, round(len(losses) / 10))
    assert len(found) == len(losses)
    assert [loss is None for loss in found] == [step < width for step in range(1, len(losses) + 1)]
    assert found[-1] == pytest.approx(statistics.fmean(losses[-width:]))


def run(way, seed=0, *, loss=1.0, task="text", precision="fp32", steps=10):
    train = [loss + (steps - step) for step in range(1, steps + 1)]
    figures = {"train": train, "held_out": loss, "saving": 0.5, "skipped": 0}
    return {"kind": "run", **Case(task, parse(way), precision, seed, steps).key, **figures}


def times(way, megabits, *seconds):
    return {"kind": "times", "task": "text", "way": way, "megabits": megabits, "seconds": list(seconds)}


@given(st.dictionaries(st.integers(0, 9), st.tuples(st.floats(0.5, 5), st.floats(0.5, 5)), min_size=1))
def test_a_loss_is_compared_with_the_exact_one_of_its_seed(losses):
    records = [run("AllReduce", seed, loss=exact) for seed, (exact, _) in losses.items()]
    records += [run("rank 4", seed, loss=ours) for seed, (_, ours) in losses.items()]
    group = groups(records)[0]
    assert set(group.away(Way())) == set(losses)
    assert all(value == 0 for value in group.away(Way()).values())
    away = group.away(Way(4))
    assert away == {seed: pytest.approx(ours / exact - 1) for seed, (exact, ours) in losses.items()}


@given(st.lists(st.sampled_from([Way(), Way(1), Way(4), Way(4, late=True)]), min_size=1, unique=True), st.data())
def test_equal_time_ends_with_the_first_to_finish(ways, data):
    timed = {label: data.draw(SECONDS) for label in ("AllReduce", "rank 1", "rank 4")}
    records = [run(way.label) for way in ways]
    found = Times(times(label, 100, seconds) for label, seconds in timed.items())
    group = groups(records)[0]
    reached = at_equal_time(group, found, 100)
    assert set(reached) == set(ways)
    assert max(taken for taken, _ in reached.values()) == 10
    ends = {way: found.clock(group, way, 100).seconds(10) for way in ways}
    assert reached[min(ways, key=ends.__getitem__)][0] == 10
    for taken, loss in reached.values():
        assert loss == (None if taken == 0 else pytest.approx(1.0 + 10 - taken))


def test_at_equal_time_the_slow_have_taken_fewer_steps():
    records = [run("AllReduce"), run("rank 4"), run("rank 4, late")]
    found = Times([times("AllReduce", 100, 9.0, 4.0, 3.0), times("rank 4", 100, 2.0)])
    reached = at_equal_time(groups(records)[0], found, 100)
    assert {way.label: steps for way, (steps, _) in reached.items()} == {
        "AllReduce": 5,  # of 4 seconds in the 20 that rank 4 takes
        "rank 4": 10,
        "rank 4, late": 9,  # one exact step, and then eight of 2 seconds in the 16 that are left
    }
    assert at_equal_time(groups(records)[0], found, 1000) == {}


def test_a_table_shows_the_spread_over_seeds_and_judges_the_mean():
    records = [run("AllReduce", seed, loss=2.0) for seed in range(2)]
    records += [run("rank 4", 0, loss=2.0), run("rank 4", 1, loss=2.02), run("rank 1", 0, loss=2.5)]
    *_, _exact, first, fourth = tables(records)["quality-text"].splitlines()
    cells = [cell.strip() for cell in fourth.split("|")]
    assert cells[3:9] == ["rank 4", "2", "50.0 %", "2.0100 (2.0000 to 2.0200)", "+0.50 (+0.00 to +1.00) %", "met"]
    assert "| 1 | 50.0 % | 2.5000 | +25.00 % | **not met** |" in first


@given(st.integers(1, 40))
def test_a_way_is_as_far_as_exact_averages_were_some_steps_before(behind):
    records = [run("AllReduce", steps=50), run("rank 4", loss=1.0 + behind, steps=50)]
    group = groups(records)[0]
    assert group.exact_steps(Way()) == 50
    assert group.exact_steps(Way(4)) == 50 - behind
    assert groups([run("rank 4")])[0].exact_steps(Way(4)) is None
    assert groups([run("AllReduce"), run("rank 4", loss=0.5)])[0].exact_steps(Way(4)) is None


def test_a_way_without_its_exact_run_is_shown_and_not_judged():
    assert tables([run("rank 4")])["quality-text"].endswith("| 1.0000 |  |  |  |  |")


def test_what_is_timed_are_the_runs_with_most_ways_and_without_times_there_is_no_such_table():
    records = [run("AllReduce"), run("rank 4"), run("rank 4", steps=90), run("rank 4", precision="bf16")]
    assert [(g.steps, g.precision) for g in widest(groups(records))] == [(10, "fp32")]
    assert list(tables(records)) == ["quality-text"]
    timed = tables([*records, times("AllReduce", None, 1.0), times("rank 4", None, 2.0)])["quality-time"]
    assert "| AllReduce | 1000.0 | 10 | **1.0000** |" in timed
    assert "| rank 4 | 2000.0 | 5 | 6.0000 |" in timed


def test_the_page_has_a_place_for_every_table(tmp_path):
    records = [run(way, task=task) for task in runs.TASKS for way in ("AllReduce", "rank 4, late")]
    records += [times("AllReduce", None, 1.0), times("rank 4", None, 2.0)]
    page = (ROOT / "docs" / "benchmarks.md").read_text()
    for name, table in tables(records).items():
        assert table in fill(page, {name: table})
    pictures(records, tmp_path)
    assert (tmp_path / "quality.png").stat().st_size > 1000
    pictures([r for r in records if r["kind"] == "run"], tmp_path)  # where steps cannot be timed
    pictures([], tmp_path)


def test_the_grid_has_all_seeds_of_a_precision_before_the_next_and_the_short_form_is_a_part_of_it():
    ways = ways_of([1, 4], [4], [4], [8])
    found = runs.cases(["dalle", "text"], ways, ["fp32", "bf16"], [0, 1], None)
    assert len(found) == len(set(found)) == 2 * len(ways) * 2 * 2
    assert [case.precision for case in found] == ["fp32"] * 24 + ["bf16"] * 24
    assert {case.steps for case in found if case.task == "dalle"} == {runs.STEPS["dalle"]}
    short = next(bench for bench in BENCHES if bench.name == runs.NAME).short
    assert "--steps" not in short, "the long form would not go on with these runs"


def test_what_has_been_run_is_not_run_again(tmp_path, monkeypatch):
    made = []

    def pretend(world_size, job, case, timeout):
        made.append(case)
        return [Outcome([2.0, 1.0 + rank], 1.5, 0.5, 0) for rank in range(world_size)]

    monkeypatch.setattr(runs, "run_ranks", pretend)
    path = tmp_path / "quality.jsonl"
    first = runs.cases(["text"], [Way(), Way(4)], ["fp32"], [0], 2)
    write_lines(path, "quality", [times("AllReduce", None, 1.0)])
    for case in runs.missing(first, path):
        runs.run(case, path)
    assert made == first
    assert runs.missing(first, path) == []
    more = runs.cases(["text"], [Way(), Way(4)], ["fp32", "bf16"], [0, 1], 2)
    assert runs.missing([*more, *more], path) == [case for case in more if case not in first]
    assert runs.missing(runs.cases(["text"], [Way()], ["fp32"], [0], 3), path), "other steps are another run"
    records = [record for record in read_lines(path) if record["kind"] == "run"]
    assert [record["train"] for record in records] == [[2.0, 1.5]] * 2
    assert all(record["commit"] and record["bench"] == "quality" for record in records)


def test_two_real_ranks_begin_alike_under_every_way(tmp_path):
    path = tmp_path / "quality.jsonl"
    exact, late = (runs.run(case, path) for case in runs.cases(["text"], [Way(), Way(4, late=True)], ["fp32"], [0], 10))
    assert read_lines(path)[0]["train"] == exact["train"]
    assert late["train"][:2] == exact["train"][:2], "the first step, and what the second finds"
    assert late["train"] != exact["train"]
    assert exact["saving"] == 0 < late["saving"]


@pytest.mark.parametrize("option", [("--ranks", "4", "0"), ("--steps", "-1"), ("--times", "x"), ("--tasks", "digits")])
def test_what_cannot_be_is_refused_before_anything_is_forgotten(option, tmp_path, monkeypatch, capsys):
    path = tmp_path / "quality.jsonl"
    path.write_text("kept")
    monkeypatch.setattr("sys.argv", ["quality", "--fresh", "--out", str(tmp_path), *option])
    with pytest.raises(SystemExit) as refused:
        main()
    assert refused.value.code == 2
    assert option[0] in capsys.readouterr().err.splitlines()[-1]
    assert path.read_text() == "kept"


@pytest.mark.parametrize("task", runs.TASKS)
def test_sixteen_bits_begin_nearly_where_float32_does(task, tmp_path):
    path = tmp_path / "quality.jsonl"
    wide = runs.run(Case(task, Way(), "fp32", 0, 1), path)
    narrow = runs.run(Case(task, Way(4), "bf16", 0, 1), path)
    assert narrow["train"] == pytest.approx(wide["train"], rel=1e-2)
    assert narrow["train"] != wide["train"]
    assert narrow["held_out"] == pytest.approx(wide["held_out"], rel=0.2)
    assert narrow["saving"] > 0.7


class Network:
    """Remembers what it was told."""

    def __init__(self):
        self.limits = []

    def limit(self, megabits):
        self.limits.append(megabits)

    def sent(self):
        return 0


def timing(rank):
    network = Network()
    return steps_of("text", ways_of([4], [4], []), network, 2, [None, 100]), network.limits


def test_steps_are_timed_over_every_network_and_a_late_way_is_its_parts():
    (records, limits), (other, _) = run_ranks(2, timing)
    assert records == other
    assert limits == [None, 100, None]
    assert [(r["way"], r["megabits"]) for r in records] == [
        ("AllReduce", None), ("rank 4", None), ("AllReduce", 100), ("rank 4", 100)
    ]  # fmt: skip
    assert all(len(record["seconds"]) == 2 and min(record["seconds"]) > 0 for record in records)
    assert set(WORKLOADS_OF) == set(runs.TASKS)
    group = groups([run("rank 4, late")])[0]
    assert Times(records).clock(group, Way(4, late=True), 100).exact_steps == 1
