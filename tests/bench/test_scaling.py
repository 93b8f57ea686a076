"""The demonstration of scales, in a tiny setting: it runs, and what it simulates is what the reducer does."""

import json

import pytest
import torch

from bench.scaling import __main__ as bench
from bench.scaling.division import average_by_cast
from bench.scaling.network import EXIT_AFTER, Network, Text, losses
from bench.scaling.training import Size, train
from bench.scaling.ways import Float32, OneScale, PerBranch
from distopt import Cast
from tests.simulation import Ranks

TINY = Size(width=16, branches=EXIT_AFTER + 2, rows=2, steps=3, rows_judged=2)


@pytest.fixture(scope="module")
def text():
    return Text(100_000)


@pytest.fixture(scope="module")
def records(text):
    octaves = 28
    ways = {"float32": Float32(), "one scale": OneScale(initial=-12.0), "per branch": PerBranch()}
    size = Size(**{**TINY.__dict__, "steps": 12})
    runs = [
        {"kind": "run", "exit": exit_octaves, "way": name, "seed": 0, **train(way, text, size, 0, exit_octaves)}
        for exit_octaves in (octaves, None)
        for name, way in ways.items()
    ]
    return [*runs, {"kind": "division", "world": 4, "hook": 0.1, "hook_subnormal": 0.2, "cast": 0.0}]


def of(records, way, exit_octaves):
    return next(r for r in records if r.get("way") == way and r["exit"] == exit_octaves)


def test_one_scale_loses_gradients_after_the_exit_and_a_scale_per_branch_does_not(records):
    late = {way: max(of(records, way, 28)["zeros"][EXIT_AFTER:]) for way in ("float32", "one scale", "per branch")}
    assert late["one scale"] > 0.3
    assert late["float32"] == late["per branch"] == 0


def test_the_natural_case_is_the_same_for_all(records):
    last = [of(records, way, None)["train"][-1] for way in ("float32", "one scale", "per branch")]
    assert max(last) - min(last) < 0.01


def test_tables_and_figures_come_out_of_what_was_written(records, tmp_path, monkeypatch, capsys):
    (tmp_path / "scaling.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records), encoding="utf-8")
    monkeypatch.setattr("sys.argv", ["scaling", "--redraw", "--out", str(tmp_path)])
    bench.main()
    assert {"scaling.png", "scaling_natural.png", "scaling.md"} <= {path.name for path in tmp_path.iterdir()}
    assert "| natural | per branch |" in capsys.readouterr().out


def test_every_run_is_named_once():
    runs = [(exit_octaves, name, seed) for exit_octaves, name, _, seed in bench.runs(2)]
    assert len(runs) == len(set(runs))


def test_before_the_first_step_all_ways_compute_the_same_loss(text):
    batch = text.batch(2, 0)
    found = []
    for way in (Float32(), OneScale(), PerBranch()):
        torch.manual_seed(0)
        network = Network(TINY.width, TINY.branches)
        way.attach(network)
        found.append(losses(network, batch)[1].item())
    assert found[1] == found[2] == pytest.approx(found[0], rel=1e-3)


def test_the_mean_by_cast_is_what_the_reducer_delivers_to_each_of_four_ranks():
    gradient = torch.randn(10, 7, generator=torch.Generator().manual_seed(0)) * 1e-9
    delivered = Ranks(Cast(torch.float16), {"weight": gradient.shape}, 4).step([{"weight": gradient}] * 4)
    assert torch.equal(delivered[0]["weight"].flatten(), average_by_cast(gradient.flatten(), 4))
