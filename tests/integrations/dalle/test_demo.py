"""Demo and training from end to end, with too few steps to learn anything: which files are written, and what they hold."""

import json

import numpy as np
import pytest
import torch
from distopt.integrations.dalle import demo, evaluate, recipe, train
from distopt.integrations.dalle.cli import main
from distopt.integrations.dalle.context import Context
from distopt.integrations.dalle.dvae import DVAESettings
from distopt.integrations.dalle.settings import DemoSettings, TrainSettings, build
from distopt.integrations.dalle.stage1_settings import Stage1Settings
from PIL import Image

import distopt

STAGE = {"saving", "matrix_saving", "bytes_sent", "bytes_uncompressed", "final_loss", "wall_seconds", "steps"}


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for i in range(20):
        colour = ("red", "blue")[i % 2]
        picture = Image.new("RGB", (20, 12), colour)
        picture.putpixel((10, 6), tuple(int(v) for v in rng.integers(0, 256, 3)))
        picture.save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(f"something {colour}")
    (folder / "broken.png").write_bytes(b"")
    (folder / "broken.txt").write_text("broken")
    return folder


def _pictures_are_there(out):
    for name in ("samples.png", "reconstructions.png", "loss.png"):
        with Image.open(out / name) as picture:
            assert picture.width == 1800
    assert list((out / "tensorboard").glob("events.out.tfevents.*"))


def test_the_demo_writes_all_that_it_promises(tmp_path, monkeypatch, capsys):
    whole = evaluate.evaluate_tokenizer
    monkeypatch.setattr(evaluate, "evaluate_tokenizer", lambda *given, **named: whole(*given, **named, n=8))
    monkeypatch.setattr(demo, "DVAESettings", lambda: DVAESettings(codes=16, width=16, neck=8))
    monkeypatch.setattr(demo, "Stage1Settings", lambda **steps: Stage1Settings(start=8, **steps))
    demo.run(DemoSettings(steps_1=2, steps_2=2, steps_3=2, n=8), tmp_path, Context())

    report = json.loads((tmp_path / "report.json").read_text())
    assert {"tokenizer", "s0", "s1", "s2", "control", "world_size", "versions", "task"} <= report.keys()
    for split in ("s0", "s1", "s2", "control"):
        assert report[split].keys() == {"exact", "low", "high", "n"}
    for stage in ("stage1", "stage2", "stage3"):
        assert report[stage].keys() >= STAGE
        assert report[stage]["steps"] == 2
    for split in ("s0", "s1", "s2"):
        assert report["best_of"][split].keys() == {"candidates", "single", "picked", "ceiling", "gain"}
    assert report["task"]["size"] == 24
    assert report["task"]["sampling"]["temperature"] > 0
    _pictures_are_there(tmp_path)
    shown = capsys.readouterr().out
    assert "S1  unseen combinations" in shown
    assert report["precision"] == "fp32"
    assert "scale" not in shown
    assert str(tmp_path / "report.json") in shown

    assert main(["evaluate", "--run", str(tmp_path)]) == 0
    again = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    told = again.keys() & report.keys()
    assert {name: again[name] for name in told} == {name: report[name] for name in told}
    assert {"tokenizer", "s0", "s1", "s2", "control", "attributes"} <= told


def test_the_demo_in_16_bits_reports_its_scales(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(demo, "DVAESettings", lambda: DVAESettings(codes=16, width=16, neck=8))
    monkeypatch.setattr(demo, "Stage1Settings", lambda **steps: Stage1Settings(start=8, **steps))
    monkeypatch.setattr(demo, "score_scenes", lambda *_, **__: ({}, {}))
    monkeypatch.setattr(demo, "score_best_of", lambda *_, **__: ({}, {}))
    monkeypatch.setattr(demo.pages, "draw_samples", lambda *_: None)
    monkeypatch.setattr(demo.report, "score_lines", lambda _: [])
    demo.run(DemoSettings(steps_1=2, steps_2=2, steps_3=2, precision="fp16"), tmp_path, Context())
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["precision"] == report["training"]["precision"] == "fp16"
    assert report["stage1"]["log2_scales"].keys() == {"loss"}
    assert report["stage2"]["log2_scales"].keys() == {f"{i}.{name}" for i in range(3) for name in ("attention", "mlp")}
    assert 0 <= report["stage2"]["skipped_steps"] <= 2
    with Image.open(tmp_path / "scales.png") as picture:
        assert picture.width == 1800
    shown = capsys.readouterr().out
    assert "fp16: stage 1 skipped 0 of 2 steps, scale 2^16.0; stage 2 skipped" in shown
    assert "scales.png" in shown


def test_the_published_demo_scores_enough_captions():
    assert DemoSettings().n >= 400


def test_a_new_demo_makes_an_old_one_unfinished(tmp_path):
    for name in ("settings.json", "report.json"):
        (tmp_path / name).write_text("{}")
    with recipe.journal_of(tmp_path, Context()):
        assert not (tmp_path / "settings.json").exists()
        assert not (tmp_path / "report.json").exists()


def test_two_ranks_train_on_a_folder(photos, tmp_path, capfd):
    config = tmp_path / "f.toml"
    config.write_text("size = 8\nheld_out = 0.2\n[stage1]\ncodes = 8\nbatch = 4\n[stage2]\nbatch = 4\nlayers = 1\n")
    out = tmp_path / "run"
    arguments = ["train", "--data", str(photos), "--out", str(out), "--config", str(config)]
    assert main([*arguments, "--steps-1", "3", "--steps-2", "3", "--steps-3", "2", "--ranks", "2"]) == 0
    captured = capfd.readouterr()
    assert "left out: 1 broken: broken.png" in captured.out
    report = json.loads((out / "report.json").read_text())
    data = report["data"]
    assert data["left_out"] == {"broken": 1}
    assert data["left_out_names"] == {"broken": ["broken.png"]}
    assert data["training"] + data["held_out"] == data["pictures"] == 20
    assert {"image_loss", "unigram", "text_loss", "n"} <= report["held_out"].keys()
    assert report["world_size"] == 2
    for stage in ("stage1", "stage2"):
        assert 0 < report[stage]["bytes_sent"] < report[stage]["bytes_uncompressed"]
    _pictures_are_there(out)
    assert not (out / "error.txt").exists()

    assert main(["evaluate", "--run", str(out)]) == 0
    again = json.loads(capfd.readouterr().out.strip().splitlines()[-1])
    assert again["held_out"] == pytest.approx(report["held_out"])


def test_every_option_of_the_configuration_reaches_its_stage():
    stage1 = {"steps": 3, "batch": 5, "learning_rate": 0.1, "codes": 7, "patch": 8}
    stage2 = {"steps": 4, "batch": 6, "learning_rate": 0.2}
    shape = {"width": 32, "layers": 2, "heads": 2, "attention": "paper", "kernel": 3, "activation": "gelu"}
    shape |= {"code_width": 8, "neighbours": 1, "fixed_codes": True}
    table = {
        "size": 16,
        "stage1": stage1,
        "stage3": {"steps": 5, "batch": 30, "learning_rate": 0.3, "group": 6, "pool": 9, "accumulate": 2},
        "stage2": {**stage2, **shape, "vocabulary": 99, "text_length": 11},
        "communication": {"rank": 2, "wire": "bfloat16", "separate": True},
        "precision": "fp16",
        "shard": 2,
        "sampling": {"temperature": 0.5, "top_k": 3, "top_p": 0.9},
    }
    chosen = train.recipe_of(build(TrainSettings, table))
    assert (chosen.dvae.size, chosen.dvae.grid, chosen.dvae.codes) == (16, 2, 7)
    assert chosen.shards == 2
    assert (chosen.stage1.steps, chosen.stage1.batch, chosen.stage1.learning_rate) == (3, 5, 0.1)
    assert (chosen.stage2.steps, chosen.stage2.batch, chosen.stage2.learning_rate) == (4, 6, 0.2)
    stage3 = chosen.stage3
    assert (stage3.steps, stage3.batch, stage3.learning_rate) == (5, 30, 0.3)
    assert (stage3.group, stage3.pool, stage3.accumulate) == (6, 9, 2)
    assert chosen.transformer == shape
    assert (chosen.vocabulary, chosen.text_length) == (99, 11)
    assert (chosen.sampling.temperature, chosen.sampling.top_k, chosen.sampling.top_p) == (0.5, 3, 0.9)
    narrow = distopt.PowerSGD(
        rank=2,
        residual_dtype="1-6-9",
        factor_dtype="1-6-9",
        wire_dtype=torch.bfloat16,
        stacked={"*.attention_in.weight": 3},
    )
    assert (chosen.precision, chosen.reducers) == ("fp16", (narrow, narrow))
