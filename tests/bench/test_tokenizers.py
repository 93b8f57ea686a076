"""The bench of tokenizers: a row is made once, goes on where it was stopped, and is shown beside those of its budget."""

import pytest
import torch

from bench import tokenizers
from bench.listed import BENCHES
from bench.pages import fill
from bench.stamp import ROOT, read_lines, write_lines
from bench.tokenizers import WAYS, Case, is_there, main, make, tables

SMALL = {"codes": 192, "steps_1": 2, "steps_2": 1, "seed": 0, "n": 6}


def stage_1(way, **more):
    told = {"stage": 1, "way": way, "codes": 192, "steps_1": 100, "seed": 0}
    found = {"codes_used": 96, "of": 192, "perplexity": 12.0, "psnr": 20.0, "exact": 0.5, **more}
    return told | found


def stage_2(way, seed=0, s0=0.5):
    told = {"stage": 2, "way": way, "codes": 192, "steps_1": 100, "steps_2": 50, "seed": seed, "n": 400}
    return told | {split: {"exact": s0} for split in ("s0", "s1", "s2")}


def test_every_bottleneck_is_a_row_and_those_with_a_table_two():
    assert len(set(WAYS)) == len(WAYS) == 10
    for way in WAYS:
        chosen = Case(way, **SMALL).recipe
        assert (chosen.stage1.steps, chosen.stage2.steps, chosen.stage3) == (2, 1, None)
        rotated = getattr(chosen.dvae, "options", {}).get("rotation", False)
        assert rotated == way.endswith("+rotation")
        assert chosen.dvae.codes == (256 if way == "lfq" else 192)


def test_a_table_has_a_row_for_each_bottleneck_and_budget_with_means_over_seeds():
    records = [
        stage_1("vq"),
        stage_1("vq", seed=1, exact=0.7),
        stage_1("fsq", codes_used=192),
        stage_2("vq"),
        stage_2("vq", seed=1, s0=0.6),
    ]
    lines = tables(records)["dalle-tokenizers"].splitlines()
    assert lines[2:] == [
        "| vq | 96 of 192 | 12.0 | 20.00 | 60.0 % | 55.0 % | 55.0 % | 55.0 % | 100 + 50 | 2 |",
        "| fsq | 192 of 192 | 12.0 | 20.00 | 50.0 % |  |  |  | 100 | 1 |",
    ]


def test_a_row_is_made_once_and_stage_2_goes_on_from_stage_1(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(tokenizers, "_PICTURES", 8)
    path, folder, case = tmp_path / "tokenizers.jsonl", tmp_path / "tokenizers", Case("ema", **SMALL)
    assert not is_there(case, 1, path)
    first = make(case, 1, path, folder)
    assert is_there(case, 1, path)
    assert not is_there(case, 2, path)
    trained = []
    go = tokenizers.recipe.train
    monkeypatch.setattr(tokenizers.recipe, "train", lambda *given: trained.append(go(*given)) or trained[-1])
    second = make(case, 2, path, folder)
    assert len(trained[0].stages[0].curve) == 2
    assert second["s0"]["n"] == 6
    assert torch.tensor(first["loss"]).isfinite()
    arguments = ["--bottlenecks", "ema", "--steps-1", "2", "--steps-2", "1", "--n", "6", "--out", str(tmp_path)]
    monkeypatch.setattr("sys.argv", ["bench", *arguments])
    monkeypatch.setattr(tokenizers, "make", lambda *_: pytest.fail("it is there"))
    main()
    assert "| ema |" in capsys.readouterr().out
    assert len(read_lines(path)) == 2


def test_the_bench_is_listed_and_its_table_has_a_place(tmp_path):
    (bench,) = [bench for bench in BENCHES if bench.name == "tokenizers"]
    write_lines(tmp_path / "tokenizers.jsonl", "tokenizers", [stage_1("vq")])
    found = bench.tables(bench.records(tmp_path))
    page = (ROOT / "docs" / "dalle.md").read_text()
    assert fill(page, found) != page
