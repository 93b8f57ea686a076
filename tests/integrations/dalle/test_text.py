"""Laws of the text tokenizer: the library's encoding without dropout, its distribution with, exact repetition by seed."""

import json
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
import torch
from distopt.integrations.dalle.text import PAD, Tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Library

from distopt.errors import SettingError

CAPTIONS = [
    f"a {colour} {shape} {relation} a {other} {shape}"
    for colour in ("red", "green", "yellow", "magenta")
    for shape in ("circle", "square", "triangle", "rhombus")
    for relation in ("above", "to the left of")
    for other in ("blue", "white", "orange")
]
TOKENIZER = Tokenizer.train(CAPTIONS, vocabulary=120)

texts = st.one_of(st.sampled_from(CAPTIONS), st.text(max_size=40), st.text(alphabet="aeirdglbu ,.", max_size=40))


@given(texts, st.integers(0, 2**32 - 1))
@settings(max_examples=200, deadline=None)
def test_replaying_merges_without_dropout_is_the_library(caption: str, seed: int) -> None:
    library = Library.from_str(TOKENIZER.to_json()).encode(caption).ids
    length = len(library) + 1
    # The smallest positive dropout goes through the replay, and is never drawn.
    replayed = TOKENIZER.encode([caption], length, rng=np.random.default_rng(seed), dropout=1e-300)
    plain = TOKENIZER.encode([caption], length)
    assert plain[0].tolist() == [*library, PAD]
    assert torch.equal(replayed, plain)


@pytest.mark.parametrize("dropout", [0.1, 0.5])
def test_dropout_has_the_distribution_of_the_library(dropout: float) -> None:
    word, draws = "triangle", 6000  # the space before a word is its first character
    library = Library.from_str(TOKENIZER.to_json())
    library.model.dropout = dropout  # pyright: ignore[reportAttributeAccessIssue]
    expected = Counter(tuple(library.encode(word).ids) for _ in range(draws))
    encoded = TOKENIZER.encode([word] * draws, 12, rng=np.random.default_rng(0), dropout=dropout)
    found = Counter(tuple(t for t in row if t != PAD) for row in encoded.tolist())
    # Two-sample chi-squared over the segmentations that are common enough; the library's side cannot be seeded, so the
    # limit is eight standard deviations above the mean.
    common = [key for key in expected | found if expected[key] + found[key] >= 20]
    statistic = sum((expected[k] - found[k]) ** 2 / (expected[k] + found[k]) for k in common)
    assert len(common) > 3
    assert statistic < len(common) + 8 * (2 * len(common)) ** 0.5


@given(st.lists(st.sampled_from(CAPTIONS), max_size=5), st.integers(0, 2**32 - 1), st.floats(0, 0.99))
@settings(max_examples=50, deadline=None)
def test_dropout_repeats_by_seed_and_keeps_the_text(captions: list[str], seed: int, dropout: float) -> None:
    first, second = (TOKENIZER.encode(captions, 80, rng=np.random.default_rng(seed), dropout=dropout) for _ in range(2))
    assert torch.equal(first, second)
    assert [TOKENIZER.decode(row) for row in first] == captions


@given(st.sampled_from(CAPTIONS), st.integers(0, 2**32 - 1))
@settings(max_examples=50, deadline=None)
def test_a_caption_that_fits_always_fits(caption: str, seed: int) -> None:
    length = TOKENIZER.longest([caption])
    tokens = TOKENIZER.encode([caption], length, rng=np.random.default_rng(seed), dropout=0.9)
    assert TOKENIZER.decode(tokens[0]) == caption


def test_case_and_spaces_do_not_matter_and_length_cuts() -> None:
    assert torch.equal(TOKENIZER.encode(["A  Red\nCIRCLE"], 9), TOKENIZER.encode(["a red circle"], 9))
    whole, cut = TOKENIZER.encode(["a red circle"], 9), TOKENIZER.encode(["a red circle"], 2)
    assert torch.equal(whole[:, :2], cut)
    assert TOKENIZER.encode([], 9).shape == (0, 9)
    assert TOKENIZER.encode([""], 3).tolist() == [[PAD] * 3]


def test_merges_stay_inside_words() -> None:
    tokenizer = Tokenizer.train(["red-hot 42 red-hot 42"] * 50, vocabulary=500)
    assert tokenizer.encode(["red-hot"], 9).ge(0).sum() == 3  # "red", "-", "hot"
    assert tokenizer.encode(["42"], 9).ge(0).sum() == 3  # the space, "4", "2"


def test_training_is_repeatable_and_saving_is_lossless(tmp_path) -> None:
    again = Tokenizer.train(list(reversed(CAPTIONS)), vocabulary=120)
    assert again.to_json() == TOKENIZER.to_json()
    TOKENIZER.save(tmp_path / "text.json")
    loaded = Tokenizer.load(tmp_path / "text.json")
    assert loaded.vocabulary == TOKENIZER.vocabulary
    drop = [t.encode(CAPTIONS, 40, rng=np.random.default_rng(3), dropout=0.3) for t in (loaded, TOKENIZER)]
    assert torch.equal(*drop)


def test_every_process_trains_the_same_tokenizer() -> None:
    # A hash map's order differs between processes, not within one.
    program = (
        "import sys, json; from distopt.integrations.dalle.text import Tokenizer;"
        "print(Tokenizer.train(json.load(sys.stdin), vocabulary=120).to_json())"
    )
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, input=json.dumps(CAPTIONS), capture_output=True, text=True, check=True)
    assert done.stdout.strip() == TOKENIZER.to_json()


def test_the_whole_vocabulary_can_be_embedded() -> None:
    tokens = TOKENIZER.encode([*CAPTIONS, "Zürich 日本"], 40, rng=np.random.default_rng(0), dropout=0.5)
    assert int(tokens.max()) < TOKENIZER.vocabulary
    assert int(tokens.min()) == PAD


@pytest.mark.parametrize("dropout", [-0.1, 1.0, float("nan")])
def test_dropout_out_of_range_is_named(dropout: float) -> None:
    with pytest.raises(SettingError, match="dropout is"):
        TOKENIZER.encode(["a"], 2, rng=np.random.default_rng(0), dropout=dropout)


def test_vocabulary_out_of_range_is_named() -> None:
    with pytest.raises(SettingError, match="vocabulary is 1"):
        Tokenizer.train(CAPTIONS, vocabulary=1)
