"""What is measured on a GPU is tried on a CPU, in tiny shapes: everything but the times."""

import math
import sys
import time

import pytest
import torch

from bench.gpu import __main__ as command
from bench.gpu import dalle, report
from bench.gpu.checks import check, outcome
from bench.gpu.clock import Clock, relative
from bench.gpu.dion import orthonormal
from bench.gpu.parts import PARTS, TINY, records_of
from bench.gpu.traces import Seen
from bench.gpu.ways import BATCHED, DION, HALF, MODELS, OURS, PACKED, PLAIN, TORCH, kernels, step_of
from bench.stamp import append_lines
from distopt.kernels.choice import chosen_setting

CLOCK = Clock(torch.device("cpu"), seconds=0.0)
LATER = time.monotonic() + 1e6


@pytest.fixture(scope="module")
def records():
    found = [r for part in PARTS for r in records_of(part, TINY, CLOCK, LATER)]
    return [
        *found,
        {"part": "checks", "file": "a.py", "passed": True, "said": "3 passed"},
        {"part": "streams", "who": "distopt", "ranks": 1, "backend": "nccl", **Seen(9, 8, 7, 6, 0, 1)._asdict()},
        *dalle.dalle(CLOCK, None, tiny=True),
    ]


def test_every_part_measures_something(records):
    assert {r["part"] for r in records} == {*PARTS, "checks", "dalle", "streams"}
    assert [r for r in records if "error" in r] == []
    timed = [r["ms"] for r in records if "ms" in r]
    assert len(timed) > 30
    assert all(math.isfinite(ms) and ms > 0 for ms in timed)


def test_both_editions_compute_the_same(records):
    for way in (PLAIN, PACKED, HALF):
        found = [r["difference"] for r in records if r["part"] == "compression" and r["way"] == way]
        assert len(found) == len(TINY.ranks) * len(TINY.dtypes)
        assert max(found) < 1e-2
    for way in ("distopt packed16", "distopt packed16, capturable"):
        (packed,) = [r["difference"] for r in records if r.get("way") == way]
        assert packed < 1e-2


def test_the_tables_have_marks_on_the_page(records):
    tables = report.tables(records)
    page = (command.ROOT / "docs/benchmarks.md").read_text(encoding="utf-8")
    assert [mark for mark in tables if f"<!-- {mark} -->\n" not in page] == []
    assert "within 1.3 x" in tables["gpu-targets"]


def test_what_is_met_and_what_is_not():
    common = {"part": "compression", "model": "m", "dtype": "float32", "rank": 4, "bytes": 10**9, "operations": 10**9}
    times = {OURS: 1.5, TORCH: 9.0, BATCHED: 7.0, DION: 2.0}
    records = [{**common, "way": way, "ms": ms, "low": ms, "high": ms, "peak_bytes": None} for way, ms in times.items()]
    records += [
        {"part": "floors", "floor": "copy", "per_second": 4e12, "ms": 1.0, "low": 1.0, "high": 1.0},
        {"part": "floors", "floor": "float32", "per_second": 5e13, "ms": 1.0, "low": 1.0, "high": 1.0},
        {"part": "checks", "file": "a.py", "passed": False, "said": "1 failed"},
    ]
    rows = {row.split(" | ")[0].strip("| "): row for row in report.tables(records)["gpu-targets"].splitlines()[2:]}
    of_floor = rows["compression within 1.3 x of its floor"]
    assert "| 1.2 |" in of_floor
    assert "| met |" in of_floor
    assert "| 4.67 | m float32 4 | met |" in rows["compression at least 4 x faster than torch's hook"]
    assert "| 1.33 | m float32 4 | not met |" in rows["compression at least 2 x faster than Dion's"]
    assert "not measured" in rows["compression at least 2 x faster than epfml's"]
    assert "not met" in rows["checks on the device"]


def test_a_floor_is_of_bytes_or_of_products():
    rate = report.rates([{"floor": "copy", "per_second": 5e12}, {"floor": "tf32", "per_second": 3e14}])
    assert rate["float32"] == 1e14
    record = {"dtype": "float32", "bytes": 10**12, "operations": 10**12}
    assert report.floor_ms(record, rate) == 1e3
    assert report.floor_ms({**record, "operations": 10**15}, rate) == 1e4


def test_what_takes_too_long_is_cut_short():
    found = list(records_of("floors", TINY, CLOCK, 0.0))
    assert len(found) == 2
    assert found[-1] == {"part": "floors", "cut_short": True}


def test_a_way_that_fails_leaves_the_others(monkeypatch):
    def fails(stack):
        raise RuntimeError("no such kernel\nmore words")

    monkeypatch.setattr("bench.gpu.parts.orthonormal_rows", fails)
    found = list(records_of("orthogonal", TINY, CLOCK, LATER))
    assert [r.get("error") for r in found] == ["RuntimeError: no such kernel"] * 2 + [None]
    assert "no such kernel" in report.tables(found)["gpu-orthogonal"]


def test_what_is_delivered_and_what_is_kept_is_what_came_in():
    """Dion's way, as far as it is PowerSGD's: after a step the residual is what was not delivered."""
    shapes = MODELS["tiny"]()
    fed = torch.randn(sum(map(math.prod, shapes)))
    sums = {way: torch.zeros_like(fed) for way in (DION, OURS)}
    for way, total in sums.items():
        bucket = fed.clone()
        step = step_of(way, shapes, bucket, 8)
        for _ in range(60):
            bucket.copy_(fed)
            step()
            total += bucket
    for total in sums.values():
        assert relative(total / 60, fed) < 0.1


@pytest.mark.parametrize("rank", [1, 5, 20])
def test_the_sketch_gives_orthonormal_columns(rank):
    q = orthonormal(torch.randn(3, 200, rank), torch.Generator().manual_seed(0))
    assert float((q.mT @ q - torch.eye(rank)).abs().max()) < 1e-5


def test_kernels_are_off_only_where_they_should_be(monkeypatch):
    before = chosen_setting()
    with kernels("off"):
        assert chosen_setting() == "off"
    with kernels(None):
        assert chosen_setting() == before
    assert chosen_setting() == before


def test_poison_is_not_a_number(monkeypatch):
    seen = []
    monkeypatch.setattr(torch, "full", lambda shape, value, device: seen.append((shape, value)))
    CLOCK.poison(400)
    assert seen[0][0] == (100,)
    assert math.isnan(seen[0][1])


def test_without_a_gpu_it_says_so(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["bench.gpu", "--out", str(tmp_path / "out")])
    with pytest.raises(SystemExit) as ended:
        command.main()
    assert ended.value.code == 2
    said = capsys.readouterr().out
    assert said.count("\n") == 1
    assert "no CUDA GPU" in said
    assert not (tmp_path / "out").exists()


def test_parts_that_are_not_run_keep_their_results(tmp_path):
    file = tmp_path / "gpu.jsonl"
    append_lines(file, "gpu", [{"part": "floors"}, {"part": "scaler"}])
    command.keep_others(file, ["floors"])
    assert [line.count("scaler") for line in file.read_text().splitlines()] == [1]


def test_checks_without_pytest_are_left_out(monkeypatch, tmp_path):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    (found,) = check(1.0, tmp_path)
    assert found["said"] == "not run: pytest and hypothesis not installed"
    assert "passed" not in found


def test_checks_say_what_failed(tmp_path):
    wrong = tmp_path / "test_wrong.py"
    wrong.write_text("def test_a():\n    assert False\n\ndef test_b():\n    pass\n")
    (found,) = check(60.0, tmp_path, [str(wrong)])
    assert not found["passed"]
    assert found["said"] == "1 passed, 1 failed"
    assert len(found["failed"]) == 1


def test_checks_that_come_too_late_are_left_out(tmp_path):
    (found,) = check(0.0, tmp_path, ["tests/kernels/test_choice.py"])
    assert (found["passed"], found["said"]) == (False, "left out")


@pytest.mark.parametrize(("code", "passed"), [(0, True), (5, True), (1, False), (4, False), (-9, False)])
def test_what_became_of_a_file(code, passed):
    assert outcome("a.py", "", code)["passed"] == passed


def test_every_part_has_its_turn():
    assert {*command.ALL} == {*PARTS, "checks", "streams"}
