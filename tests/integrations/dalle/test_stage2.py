"""Laws of stage 2: a run is a function of its seed, DDP changes nothing, codes that look alike start alike."""

import dataclasses
from collections.abc import Iterator

import numpy as np
import pytest
import torch
import torch.distributed as dist
from distopt.integrations.dalle import stage2
from distopt.integrations.dalle.averaging import Averaged
from distopt.integrations.dalle.captioned import CaptionedStage
from distopt.integrations.dalle.codes import code_vectors
from distopt.integrations.dalle.context import Context, StageResult
from distopt.integrations.dalle.sampling import sample
from distopt.integrations.dalle.stage2 import Stage2Settings, train_transformer
from distopt.integrations.dalle.text import PAD, Tokenizer
from distopt.integrations.dalle.transformer import TransformerSettings
from torch import Tensor

import distopt
from distopt.errors import SettingError

COLOURS = ("black", "red", "green", "blue", "yellow", "magenta", "cyan", "white")
MODEL = TransformerSettings(
    text_vocabulary=60, text_length=8, codes=8, grid=2, width=32, layers=1, heads=2, code_width=4
)
SETTINGS = Stage2Settings(steps=12, batch=8)


class Flags:
    """Pictures of 8 x 8 whose upper and lower halves have the two colours of the caption."""

    size = 8
    fingerprint = "flags"

    def pairs(self, n: int, rng: np.random.Generator) -> tuple[list[str], Tensor]:
        halves = rng.integers(8, size=(n, 2))
        return [f"{COLOURS[a]} over {COLOURS[b]}" for a, b in halves], Corners().decode(
            torch.from_numpy(halves).repeat_interleave(2, dim=1)
        )

    def pictures(self, n: int, rng: np.random.Generator) -> Tensor:
        return self.pairs(n, rng)[1]

    def captions(self) -> list[str]:
        return [f"{a} over {b}" for a in COLOURS for b in COLOURS]


class Corners:
    """A picture tokenizer that knows the eight corners of the RGB cube."""

    def tokenize(self, pictures: Tensor) -> Tensor:
        bits = (pictures[:, :, ::4, ::4] > 0.5).flatten(2).long()
        return bits[:, 0] + 2 * bits[:, 1] + 4 * bits[:, 2]

    def decode(self, tokens: Tensor) -> Tensor:
        bits = torch.stack([tokens % 2, tokens // 2 % 2, tokens // 4], dim=1).float().unflatten(2, (2, 2))
        return bits.repeat_interleave(4, dim=2).repeat_interleave(4, dim=3)


TOKENIZER = Tokenizer.train(Flags().captions(), 60)


def train(changes: dict[str, object] | None = None, **context: object) -> StageResult:
    how = dataclasses.replace(SETTINGS, **(changes or {}))
    return train_transformer(Flags(), Corners(), TOKENIZER, MODEL, how, Context(**context))


@pytest.fixture
def lone_process() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_a_run_is_a_function_of_its_seed_alone() -> None:
    first = train(seed=3)
    torch.manual_seed(1234)
    state = torch.get_rng_state()
    again = train(seed=3)
    assert torch.equal(state, torch.get_rng_state())
    assert first.curve == again.curve
    torch.testing.assert_close(first.model.state_dict(), again.model.state_dict(), atol=0, rtol=0)
    assert first.curve != train(seed=4).curve


def test_it_learns_to_draw_what_captions_say() -> None:
    result = train({"steps": 250, "batch": 32, "learning_rate": 1e-2})
    captions, pictures = Flags().pairs(64, np.random.default_rng(7))
    text = TOKENIZER.encode(captions, MODEL.text_length)
    drawn = sample(result.model, text, generator=torch.Generator().manual_seed(0))
    assert (drawn == Corners().tokenize(pictures)).all(dim=1).float().mean() > 0.9
    assert result.final_loss == pytest.approx(sum(v for _, v in result.curve[-12:]) / 12)
    assert [step for step, _ in result.curve] == list(range(250))
    assert not result.model.training


@pytest.mark.usefixtures("lone_process")
def test_ddp_with_all_reduce_changes_nothing() -> None:
    alone, together = train(), train(reducer=distopt.AllReduce())
    assert alone.stats is None
    assert together.stats.steps == SETTINGS.steps
    assert alone.curve == together.curve
    assert together.model.state_dict().keys() == alone.model.state_dict().keys()


@pytest.mark.usefixtures("lone_process")
def test_matrices_are_compressed_and_vocabularies_are_not() -> None:
    result = train({"steps": 3}, reducer=distopt.PowerSGD(rank=2))
    assert 0 < result.stats.saving < 1
    assert all("embedding" not in name for name in result.stats.residual_norm)
    assert any("mlp_in" in name for name in result.stats.residual_norm)


def test_the_ranks_see_different_batches_of_their_share() -> None:
    shares = [
        stage2._batch(Flags(), Corners(), TOKENIZER, MODEL, SETTINGS, Context(rank=rank, world_size=2), 5)
        for rank in (0, 1, 1)
    ]
    assert all(text.shape == (4, 8) and image.shape == (4, 4) for text, image in shares)
    assert not torch.equal(shares[0][0], shares[1][0])
    torch.testing.assert_close(shares[1], shares[2])
    with pytest.raises(SettingError, match=r"Stage2Settings\.batch is 8"):
        train(world_size=3)


def test_as_many_pictures_come_without_captions_as_said() -> None:
    how = dataclasses.replace(SETTINGS, uncaptioned=0.2)
    silent = 0
    for step in range(200):
        text, image = stage2._batch(Flags(), Corners(), TOKENIZER, MODEL, how, Context(), step)
        assert text.shape == (8, 8)
        assert image.shape == (8, 4)
        silent += int((text == PAD).all(dim=1).sum())
    assert 0.17 < silent / (200 * 8) < 0.23
    none = dataclasses.replace(SETTINGS, uncaptioned=0.0)
    text, _ = stage2._batch(Flags(), Corners(), TOKENIZER, MODEL, none, Context(), 0)
    assert not (text == PAD).all(dim=1).any()


def test_averaging_is_the_mean_over_the_last_part_and_none_is_the_last() -> None:
    last = train({"averaging": 0.0, "steps": 1})
    same = train({"averaging": 0.5, "steps": 1})
    torch.testing.assert_close(last.model.state_dict(), same.model.state_dict(), atol=0, rtol=0)
    model, settings = torch.nn.Linear(1, 1), dataclasses.replace(SETTINGS, averaging=0.05)
    stage = CaptionedStage(Flags(), Corners(), TOKENIZER, settings, Context())
    averaged = Averaged(model)
    for step in range(200):
        torch.nn.init.constant_(model.weight, float(step))
        averaged.move(stage.weight_of_last(step))
    # Weights that fall off over a twentieth of the steps: the mean lies about that far behind.
    assert averaged.write(torch.nn.Linear(1, 1)).weight.item() == pytest.approx(200 * (1 - 1 / 21), abs=1.5)


def test_code_vectors_are_close_where_codes_look_alike() -> None:
    model = dataclasses.replace(MODEL, codes=10, code_width=8)  # two codes are never used
    vectors = code_vectors(Flags(), Corners(), model, Context())
    assert vectors.shape == (10, 8)
    assert torch.equal(vectors[8:], torch.zeros(2, 8))
    torch.testing.assert_close(vectors[:8].mean(0), torch.zeros(8), atol=1e-4, rtol=0)
    apart = torch.cdist(vectors, vectors)
    black, red, white = COLOURS.index("black"), COLOURS.index("red"), COLOURS.index("white")
    assert apart[black, red] < apart[black, white]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("steps", 0),
        ("batch", 2.5),
        ("learning_rate", 0.0),
        ("warmup", 1.5),
        ("betas", (0.9, 1.0)),
        ("weight_decay", -1.0),
        ("clip", float("nan")),
        ("averaging", 1.0),
        ("bpe_dropout", -0.1),
        ("uncaptioned", 1.0),
    ],
)
def test_settings_out_of_range_are_named(field: str, value: object) -> None:
    with pytest.raises(SettingError, match=f"Stage2Settings.{field} is"):
        dataclasses.replace(SETTINGS, **{field: value})
