"""Laws of stage 3: groups are alike, a batch is the same for any number of ranks, and pairs are learned."""

import dataclasses

import numpy as np
import pytest
import torch
from distopt.integrations.dalle.context import Context
from distopt.integrations.dalle.contrast import ContrastSettings
from distopt.integrations.dalle.stage3 import Stage3Settings, alike, batch_of, train_contrast
from distopt.integrations.dalle.text import PAD
from hypothesis import given
from hypothesis import strategies as st

from distopt.errors import SettingError
from tests.integrations.dalle.test_stage2 import TOKENIZER, Corners, Flags

MODEL = ContrastSettings(text_vocabulary=TOKENIZER.vocabulary, text_length=8, size=8, width=8, features=16)
SETTINGS = Stage3Settings(steps=3, batch=24, group=4, pool=12)
TEXT = st.lists(st.lists(st.integers(0, 6), min_size=4, max_size=4), min_size=1, max_size=12)


def batch(step=0, changes=None, **context):
    how = dataclasses.replace(SETTINGS, **(changes or {}))
    return batch_of(Flags(), Corners(), TOKENIZER, MODEL, how, Context(**context), step)


@given(TEXT, st.data())
def test_a_group_has_the_captions_that_share_most_with_its_first(rows, data):
    count = data.draw(st.integers(1, len(rows)))
    chosen = alike(torch.tensor(rows), count, np.random.default_rng(data.draw(st.integers(0, 99)))).tolist()
    assert len(set(chosen)) == count

    def shared(i):
        return sum(min(rows[i].count(token), rows[chosen[0]].count(token)) for token in set(rows[i]))

    left = [shared(i) for i in range(len(rows)) if i not in chosen]
    assert min((shared(i) for i in chosen[1:]), default=9) >= max(left, default=0)


def test_pads_are_not_shared():
    text = torch.tensor([[1, 2, PAD, PAD], [3, 4, PAD, PAD], [1, 3, 5, 6]])
    for seed in range(20):
        chosen = alike(text, 2, np.random.default_rng(seed)).tolist()
        assert chosen[0] == 2 or chosen[1] == 2


def test_a_batch_is_the_same_for_any_number_of_ranks():
    whole = batch(5)
    parts = [batch(5, rank=rank, world_size=3) for rank in range(3)]
    for alone, together in zip(whole, zip(*parts, strict=True), strict=True):
        assert torch.equal(alone, torch.cat(together))
    assert [tuple(part.shape) for part in whole] == [(6, 4, 3, 8, 8), (6, 4, 8), (6, 2, 3, 8, 8)]
    assert not torch.equal(whole[1], batch(6)[1])
    assert not torch.equal(whole[1], batch(5, seed=1)[1])


def test_captions_keep_their_pictures():
    pictures, text, _ = batch()
    for picture, row in zip(pictures.flatten(0, 1), text.flatten(0, 1), strict=True):
        upper, lower = TOKENIZER.decode(row).split(" over ")
        expected = Corners().decode(torch.tensor([[_colour(upper)] * 2 + [_colour(lower)] * 2]))[0]
        assert torch.equal(picture, expected)


def _colour(word):
    from tests.integrations.dalle.test_stage2 import COLOURS

    return COLOURS.index(word)


@pytest.mark.parametrize("spoilt", [0.0, 0.25, 1.0])
def test_spoilt_pictures_have_codes_of_others_of_their_group(spoilt):
    how = {"spoilt": spoilt, "exchanged": 1.0}
    pictures, _, wrong = batch(changes=how)
    assert wrong.shape[:2] == (6, round(4 * spoilt))
    for group, others in zip(pictures, wrong, strict=True):
        codes = Corners().tokenize(group)
        for i, mixed in enumerate(Corners().tokenize(others) if len(others) else []):
            assert ((mixed == codes[i]) | (mixed == codes[i - 1])).all()
    if spoilt:
        assert 0.1 < (wrong != pictures[:, : wrong.shape[1]]).flatten(2).any(2).float().mean() < 1
        whole = batch(changes=how | {"exchanged": 0.0})
        assert torch.equal(whole[2], whole[0][:, : wrong.shape[1]])


def test_pictures_are_seen_as_the_dvae_brings_them_back():
    class Coarse(Corners):
        def decode(self, tokens):
            return super().decode(tokens) / 2

    pictures, _, wrong = batch_of(Flags(), Coarse(), TOKENIZER, MODEL, SETTINGS, Context(), 0)
    assert pictures.max() == wrong.max() == 0.5


def test_a_run_is_a_function_of_its_seed():
    def run(seed):
        return train_contrast(Flags(), Corners(), TOKENIZER, MODEL, SETTINGS, Context(seed=seed))

    first, again, other = run(1), run(1), run(2)
    assert first.curve == again.curve
    assert first.curve != other.curve
    assert not first.model.training


def test_pairs_are_learned():
    how = dataclasses.replace(SETTINGS, steps=60, learning_rate=0.01)
    result = train_contrast(Flags(), Corners(), TOKENIZER, MODEL, how, Context())
    with torch.no_grad():
        found = result.model(*batch(1000))
    assert found.right > 0.8
    assert result.final_loss < 0.5 * result.curve[0][1]


@pytest.mark.parametrize(
    ("wrong", "name"),
    [
        ({"group": 5}, "batch"),
        ({"pool": 3}, "pool"),
        ({"spoilt": 1.5}, "spoilt"),
        ({"exchanged": -0.5}, "exchanged"),
        ({"group": 0}, "group"),
    ],
)
def test_settings_that_do_not_fit_are_refused(wrong, name):
    with pytest.raises(SettingError, match=f"Stage3Settings.{name}"):
        dataclasses.replace(SETTINGS, **wrong)


def test_groups_must_be_divisible_over_the_ranks():
    with pytest.raises(SettingError, match=r"Stage3Settings\.batch is 24, but must be 4 pairs for each of the 4 ranks"):
        train_contrast(Flags(), Corners(), TOKENIZER, MODEL, SETTINGS, Context(world_size=4))
