"""Stage 1 is a function of its seed, follows its schedules, learns, and is judged by its tokens."""

import dataclasses
import math
from collections.abc import Mapping

import numpy as np
import pytest
import torch
from distopt.integrations.dalle import trainer
from distopt.integrations.dalle.context import Context
from distopt.integrations.dalle.dvae import DVAE, DVAESettings
from distopt.integrations.dalle.paper_dvae import PaperDVAE, PaperDVAESettings
from distopt.integrations.dalle.settings import Stage1Options, TrainSettings, build, preset
from distopt.integrations.dalle.stage1 import evaluate_tokenizer, train_dvae
from distopt.integrations.dalle.stage1_settings import Stage1Settings, settings_of
from distopt.integrations.scenes.draw import Scenes

import distopt
from distopt.errors import SettingError
from tests.processes import run_ranks

TASK = Scenes()
MODEL = DVAESettings(codes=64, width=32, neck=16)
SHORT = Stage1Settings(steps=40, batch=8, start=32)


class Lines:
    """A journal that keeps what it is told."""

    def __init__(self) -> None:
        self.lines: list[tuple[int, int, dict[str, float]]] = []

    def log(self, step: int, total: int, values: Mapping[str, float]) -> None:
        self.lines.append((step, total, dict(values)))


def test_schedules_do_not_depend_on_the_number_of_steps():
    short, long = (Stage1Settings(steps=n, warmup=0.1) for n in (100, 1000))
    for step in range(0, 100, 7):
        assert short.weights_at(step) == pytest.approx(long.weights_at(10 * step))
    assert short.weights_at(0)["tau"] == 0.5
    assert short.weights_at(99)["tau"] == 1 / 16
    assert short.weights_at(0)["beta"] == 0.0
    assert short.weights_at(99)["beta"] == short.beta
    rates = [short.learning_rate_at(step) for step in range(100)]
    assert max(rates) == rates[9] == short.learning_rate
    assert rates[0] > 0
    assert rates[-1] < 0.02 * short.learning_rate


def test_no_warmup_and_no_annealing_are_legal():
    settings = Stage1Settings(steps=10, warmup=0.0, tau_steps=0.0, beta_steps=0.0)
    assert settings.learning_rate_at(0) == settings.learning_rate
    assert settings.weights_at(0)["tau"] == settings.tau[1]
    assert settings.weights_at(0)["beta"] == settings.beta


def test_training_is_a_function_of_the_seed_and_leaves_torch_alone():
    state = torch.get_rng_state()
    first = train_dvae(TASK, MODEL, SHORT, Context(seed=3))
    assert torch.equal(torch.get_rng_state(), state)
    second = train_dvae(TASK, MODEL, SHORT, Context(seed=3))
    other = train_dvae(TASK, MODEL, SHORT, Context(seed=4))
    assert first.curve == second.curve != other.curve
    for a, b in zip(first.model.parameters(), second.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_training_learns_reports_every_step_and_keeps_codes_in_use():
    journal = Lines()
    result = train_dvae(TASK, MODEL, dataclasses.replace(SHORT, steps=120), Context(journal=journal))
    losses = [loss for _, loss in result.curve]
    assert sum(losses[-10:]) < 0.5 * sum(losses[:10])
    assert result.final_loss == pytest.approx(sum(losses[-6:]) / 6)
    assert [(step, total) for step, total, _ in journal.lines] == [(i + 1, 120) for i in range(120)]
    assert {"loss", "reconstruction", "kl", "idle", "tau"} == set(journal.lines[0][2])
    assert isinstance(result.model, DVAE)
    assert not result.model.training
    assert result.stats is None
    assert evaluate_tokenizer(result.model, TASK, n=20)["codes_used"] >= 32


def test_without_averaging_the_last_weights_are_kept():
    trained: list[torch.nn.Module] = []
    make = trainer.distribute
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "distribute", lambda dvae, *a, **k: trained.append(dvae) or make(dvae, *a, **k))
        kept = train_dvae(TASK, MODEL, dataclasses.replace(SHORT, steps=3, averaging=0.0), Context()).model
        averaged = train_dvae(TASK, MODEL, dataclasses.replace(SHORT, steps=3), Context()).model
    for result, last, same in ((kept, trained[0], True), (averaged, trained[1], False)):
        pairs = zip(result.parameters(), last.parameters(), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs) == same


class Copy(torch.nn.Module):
    """A perfect tokenizer of few pictures: remembers each as its own code."""

    settings = DVAESettings(codes=300)

    def __init__(self) -> None:
        super().__init__()
        self.memory = torch.nn.Parameter(torch.zeros(0, 3, 24, 24))

    def tokenize(self, pictures: torch.Tensor) -> torch.Tensor:
        first = len(self.memory)
        self.memory.data = torch.cat([self.memory.data, pictures])
        return torch.arange(first, first + len(pictures))[:, None].expand(-1, 36)

    def decode(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.memory.data[tokens[:, 0]]


def test_a_perfect_tokenizer_is_exact_and_an_empty_one_is_not(monkeypatch: pytest.MonkeyPatch):
    perfect = evaluate_tokenizer(Copy(), TASK, n=100)  # type: ignore[arg-type]
    assert [perfect[split] for split in ("exact", "s0", "s1", "s2")] == [1.0] * 4
    assert perfect["codes_used"] == perfect["n"] == 300
    assert perfect["perplexity"] == pytest.approx(300, rel=1e-3)
    lazy = Copy()
    monkeypatch.setattr(lazy, "decode", lambda tokens: torch.full((len(tokens), 3, 24, 24), 0.5))
    assert evaluate_tokenizer(lazy, TASK, n=10)["exact"] == 0.0  # type: ignore[arg-type]


def test_another_size_and_an_uneven_batch_are_refused():
    with pytest.raises(SettingError, match=r"DVAESettings\.size is 32"):
        train_dvae(TASK, DVAESettings(size=32, grid=8), SHORT, Context())
    with pytest.raises(SettingError, match=r"Stage1Settings\.batch is 8"):
        train_dvae(TASK, MODEL, SHORT, Context(world_size=3))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("steps", 0),
        ("batch", 1.5),
        ("start", 0),
        ("learning_rate", 0.0),
        ("clip", -1.0),
        ("beta", -0.1),
        ("usage", math.inf),
        ("edges", math.nan),
        ("weight_decay", -1.0),
        ("warmup", 1.1),
        ("tau_steps", -0.1),
        ("beta_steps", 1.5),
        ("decay_steps", -3),
        ("averaging", 1.0),
        ("betas", (0.9,)),
        ("tau", (1.0, 0.0)),
        ("final_learning_rate", 2.0),
    ],
)
def test_settings_out_of_range_are_refused_by_name(field: str, value: object):
    with pytest.raises(SettingError, match=f"Stage1Settings.{field} is "):
        Stage1Settings(**{field: value})


def test_ranks_see_different_batches_and_start_from_the_same_codes():
    one_step = dataclasses.replace(SHORT, steps=1, learning_rate=1e-30)
    ranks = [train_dvae(TASK, MODEL, one_step, Context(rank=r, world_size=2)) for r in range(2)]
    assert ranks[0].curve != ranks[1].curve
    for a, b in zip(ranks[0].model.parameters(), ranks[1].model.parameters(), strict=True):
        assert np.allclose(a.detach(), b.detach(), atol=1e-25, rtol=0)


def train_on_two_ranks(rank: int, reducer: object) -> tuple[list[np.ndarray], int, int, float]:
    torch.set_num_threads(1)
    settings = dataclasses.replace(SHORT, steps=6, start=16)
    result = train_dvae(TASK, MODEL, settings, Context(rank=rank, world_size=2, reducer=reducer))
    weights = [p.detach().numpy() for p in result.model.parameters()]
    return weights, result.stats.steps, result.stats.bytes_sent, result.final_loss


def test_two_ranks_end_with_the_same_weights_and_send_less_with_powersgd():
    sent = []
    for reducer in (distopt.AllReduce(), distopt.PowerSGD(rank=2)):
        (first, steps, count, loss), (second, _, _, other) = run_ranks(2, train_on_two_ranks, reducer)
        assert steps == 6
        assert loss != other
        assert all((a == b).all() for a, b in zip(first, second, strict=True))
        sent.append(count)
    assert sent[1] < sent[0]


PAPER_MODEL = PaperDVAESettings(size=24, codes=32, n_hid=16, n_init=16, groups=3, blocks=1)
PAPER_SHORT = Stage1Options(
    architecture="paper", steps=50, batch=8, learning_rate=3e-3, tau_steps=40, beta=0.5, beta_steps=0.5, averaging=0.9
)


def test_the_papers_architecture_learns():
    result = train_dvae(TASK, PAPER_MODEL, settings_of(PAPER_SHORT), Context(seed=1))
    losses = [loss for _, loss in result.curve]
    assert isinstance(result.model, PaperDVAE)
    assert sum(losses[-10:]) / 10 < sum(losses[:10]) / 10 - 0.1


def train_the_paper_on_two_ranks(rank: int) -> tuple[list[np.ndarray], float]:
    torch.set_num_threads(1)
    context = Context(rank=rank, world_size=2, reducer=distopt.PowerSGD(rank=2))
    result = train_dvae(TASK, PAPER_MODEL, dataclasses.replace(settings_of(PAPER_SHORT), steps=6), context)
    return [p.detach().numpy() for p in result.model.parameters()], result.stats.saving


def test_the_papers_architecture_trains_on_two_ranks_with_powersgd():
    (first, saving), (second, _) = run_ranks(2, train_the_paper_on_two_ranks)
    assert saving > 0.3
    assert all((a == b).all() for a, b in zip(first, second, strict=True))


def test_the_preset_is_the_papers_table():
    """Appendix A.2."""
    chosen = settings_of(build(TrainSettings, preset("paper-dvae")).stage1)
    at = {step: chosen.weights_at(step) for step in (0, 2_500, 5_000, 75_000, 150_000, 2_999_999)}
    assert [at[step]["beta"] for step in (0, 2_500, 5_000, 2_999_999)] == pytest.approx([0, 3.3, 6.6, 6.6])
    assert [at[step]["tau"] for step in (0, 75_000, 150_000, 2_999_999)] == pytest.approx([1, 0.53125, 0.0625, 0.0625])
    assert {at[step]["usage"] for step in at} == {at[step]["edges"] for step in at} == {0.0}
    assert chosen.learning_rate_at(0) == 1e-4
    assert chosen.learning_rate_at(600_000) == pytest.approx((1e-4 + 1.25e-6) / 2)
    assert chosen.learning_rate_at(1_200_000) == pytest.approx(1.25e-6)
    assert (chosen.betas, chosen.weight_decay, chosen.averaging) == ((0.9, 0.999), 1e-4, 0.999)
    assert (chosen.steps, chosen.batch, chosen.clip) == (3_000_000, 512, 0.0)


def test_the_architecture_alone_brings_the_papers_constants_in_proportion_to_the_run():
    whole = settings_of(build(TrainSettings, preset("paper-dvae")).stage1)
    short = settings_of(Stage1Options(architecture="paper", steps=3000))
    for step in range(0, 3000, 97):
        assert short.weights_at(step) == pytest.approx(whole.weights_at(1000 * step))
        assert short.learning_rate_at(step) == pytest.approx(whole.learning_rate_at(1000 * step))
    assert settings_of(Stage1Options()) == Stage1Settings()
    mixed = settings_of(Stage1Options(tau=(0.5, 0.1), betas=(0.9, 0.95), warmup=7))
    assert (mixed.tau, mixed.betas, mixed.warmup) == ((0.5, 0.1), (0.9, 0.95), 7)
