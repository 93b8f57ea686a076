"""The paper's filters, and what they do not touch."""

import pytest
from distopt.integrations.dalle.data.collecting import Collector
from distopt.integrations.dalle.data.filters import Filters
from distopt.integrations.dalle.settings import DataOptions, TrainSettings, build
from hypothesis import given
from hypothesis import strategies as st

from distopt.errors import SettingError

PAPER = Filters.chosen(DataOptions(filters="paper"))


@pytest.mark.parametrize(
    ("caption", "why"),
    [
        ("a dog on a beach", ""),
        ("a dog", "too short"),
        ("the church photographed on 12 May 1999", "boilerplate"),
        ("Photographed in 1999 by me", "boilerplate"),
        ("picture taken on Jan 3rd at noon", "boilerplate"),
        ("image uploaded on 2008-01-02 by him", "boilerplate"),
        ("a photograph in maybe the best light", ""),
        ("a picture taken on the beach", ""),
        ("собака на пляже летом", "not in Latin letters"),
        ("ein Hund am Strand, größer", ""),
        ("1 2 3 4", "not in Latin letters"),
    ],
)
def test_captions_are_judged(caption, why):
    assert PAPER.of_captions([caption]) == (([], [why]) if why else ([caption], []))


@given(st.text(max_size=60))
def test_without_filters_every_caption_stays(caption):
    assert Filters.chosen(DataOptions()).of_captions([caption]) == ([caption], [])


@given(st.integers(1, 500), st.integers(1, 500))
def test_the_shape_is_bounded_both_ways(width, height):
    assert PAPER.allow(width, height) == PAPER.allow(height, width) == (0.5 <= width / height <= 2)
    assert Filters().allow(width, height)


def test_a_single_setting_changes_the_papers():
    chosen = Filters.chosen(DataOptions(filters="paper", shortest=0, boilerplate="cat", aspect=3.0))
    assert chosen == Filters(shortest=0, boilerplate="cat", latin=0.9, aspect=3.0)
    assert Filters.chosen(DataOptions(latin=0.5)) == Filters(latin=0.5)


def test_a_picture_with_a_caption_left_stays():
    collector = Collector(Filters(shortest=2))
    assert collector.captions("a.png", ["a dog", "dog", " "]) == ["a dog"]
    assert collector.captions("b.png", ["dog"]) == []
    assert collector.left_out.names == {
        "captions beside better ones that are too short": ["a.png"],
        "with a caption that is too short": ["b.png"],
    }


def test_a_pattern_that_is_none_is_refused():
    with pytest.raises(SettingError, match=r"data.boilerplate is '\(', but must be a regular expression"):
        build(TrainSettings, {"data": {"boilerplate": "("}})
