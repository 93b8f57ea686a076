"""What a plan says of the paper's sizes is what the paper says, and what it says of a run is what the run takes."""

import pytest
import torch
from distopt.integrations.dalle.plan import plan_lines, plan_of
from distopt.integrations.dalle.settings import PRESETS, TrainSettings, build, preset
from distopt.integrations.dalle.train import recipe_of
from distopt.integrations.dalle.transformer import Transformer, TransformerSettings

import distopt

SMALL = {"stage2": {"width": 32, "layers": 2, "heads": 2, "vocabulary": 40, "text_length": 8}}


@pytest.mark.parametrize(
    ("name", "billions", "width", "rank", "saving"),
    [
        ("paper-2.8b", 2.83, 1920, 512, 0.833),
        ("paper-5.6b", 5.55, 2688, 640, 0.851),
        ("paper-12b", 12.09, 3968, 896, 0.859),
    ],
)
def test_the_papers_sizes(name, billions, width, rank, saving):
    """Ramesh et al. 2021, table 1, on 128 machines of 8 GPUs."""
    recipe = recipe_of(build(TrainSettings, {**preset(name), "shard": 8}))
    plan = plan_of(recipe, 1024)
    matrices = 12 * 64 * width**2
    assert matrices / 1e9 == pytest.approx(billions, abs=0.01)
    assert plan.in_blocks == pytest.approx(matrices, rel=2e-3)  # besides biases and norms
    assert 8 * plan.matrices == matrices
    assert plan.budget.residuals == 2 * plan.matrices
    sent = plan.budget.matrix_bytes_sent / 2
    assert 1 - sent / plan.matrices == pytest.approx(1 - 5 * rank / (8 * width), abs=1e-4)
    assert 1 - sent / plan.matrices == pytest.approx(saving, abs=1e-3)


def test_what_12_billion_parameters_take():
    """About 12.1 GB of state a GPU in the paper's formats, and 0.43 GB sent instead of 3.02."""
    lines = plan_lines(recipe_of(build(TrainSettings, {**preset("paper-12b"), "shard": 8})), 1024, 4)
    told = {line[:34].strip(): line[34:].split() for line in lines}
    assert told["all that lasts"][2:] == ["12.2", "GB"]  # embeddings included
    assert told["error buffers"] == ["3.02", "GB", "3.02", "GB"]
    assert told["gradients that are compressed"] == ["6.05", "GB", "3.02", "GB"]
    assert told["sent in their place"] == ["427", "MB", "427", "MB"]
    assert lines[-1].endswith("85.9%")


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_plan_is_what_the_optimizer_then_takes(precision):
    recipe = recipe_of(build(TrainSettings, {**SMALL, "precision": precision}))
    plan = plan_of(recipe, 2)
    settings = TransformerSettings(
        text_vocabulary=40, text_length=8, codes=recipe.dvae.codes, grid=recipe.dvae.grid, width=32, layers=2, heads=2
    )
    transformer = Transformer(settings)
    assert plan.parameters == sum(p.numel() for p in transformer.parameters())
    if precision == "fp16":
        optimizer = distopt.optim.AdamW(transformer.named_parameters(), moments="packed16")
        for parameter in transformer.parameters():
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        assert plan.moments == round(optimizer.moment_bytes() * plan.parameters)
    else:
        assert plan.moments == 2 * 4 * plan.parameters
    assert plan.budget.gathered >= plan.budget.parameters // 4


def test_all_presets_are_sound():
    assert PRESETS == ("paper-12b", "paper-2.8b", "paper-5.6b", "paper-dvae")
    assert recipe_of(build(TrainSettings, preset("paper-dvae"))).stage1.beta == 6.6
    for name in PRESETS[:3]:
        recipe = recipe_of(build(TrainSettings, preset(name)))
        # The published model's masks and embeddings, none of the departures that serve a small one.
        chosen = {"attention": "paper", "kernel": 11, "code_width": 0, "neighbours": 0}
        assert chosen.items() <= recipe.transformer.items()
        assert (recipe.sampling.temperature, recipe.sampling.guidance) == (1.0, 1.0)


def test_lines_of_a_run_on_ddp_say_nothing_of_gathering():
    lines = plan_lines(recipe_of(build(TrainSettings, SMALL)), 2, 100)
    assert not any("gathered" in line for line in lines)
    assert "steps an epoch: 3 and 3, of 100 pictures" in lines


def test_the_papers_stage_1_is_planned_with_its_size_and_its_lengths_in_steps():
    recipe = recipe_of(build(TrainSettings, preset("paper-dvae")))
    lines = plan_lines(recipe, 64, 250_000_000)
    assert lines[0] == "discrete VAE: 97.6 million parameters, 1024 tokens a picture, 8192 codes"
    assert lines[1] == (
        "stage 1: 3,000,000 steps of 512 pictures; temperature 1 to 0.0625 in 150,000, KL weight 0 to 6.6 in 5,000, "
        "learning rate 0.0001 to 1.25e-06 in 1,200,000"
    )
