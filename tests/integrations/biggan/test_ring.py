"""The ring: how modes are counted, and that a few steps of training do what they should."""

import dataclasses

import pytest
import torch
from distopt.integrations.biggan.ring import (
    DEVIATION,
    MODES,
    RingSettings,
    centres,
    covered,
    draw_ring,
    points,
    train_ring,
)
from hypothesis import given
from hypothesis import strategies as st

from distopt.errors import SettingError


@given(st.sets(st.integers(0, 7), min_size=1), st.integers(0, 1000))
def test_modes_are_counted(chosen, seed):
    generator = torch.Generator().manual_seed(seed)
    found = centres()[list(chosen)].repeat(100, 1)
    found = found + DEVIATION * torch.randn(found.shape, generator=generator)
    modes, within = covered(found)
    assert modes == len(chosen)
    assert within > 0.95


def test_a_stray_point_covers_nothing():
    assert covered(torch.cat([centres()[:1].repeat(99, 1), centres()[1:2]])) == (1, 1.0)
    assert covered(torch.zeros(50, 2)) == (0, 0.0)


def test_the_data_covers_all():
    assert covered(points(2000, torch.Generator().manual_seed(0)))[0] == MODES


@pytest.mark.parametrize("spectral", [False, True])
def test_training_is_repeatable_and_watched(spectral):
    settings = RingSettings(steps=30, every=10, spectral=spectral)
    generator, readings = train_ring(settings)
    again, _ = train_ring(settings)
    assert torch.equal(draw_ring(generator, 50), draw_ring(again, 50))
    assert [reading.step for reading in readings] == [10, 20, 30]
    assert len(readings[0].largest) == 6
    other, _ = train_ring(dataclasses.replace(settings, seed=1))
    assert not torch.equal(draw_ring(generator, 50), draw_ring(other, 50))


def test_with_the_penalty_all_modes_are_found_soon():
    """The first 1,000 of the 5,000 steps that docs/biggan.md shows."""
    _, readings = train_ring(RingSettings(steps=1000, every=500))
    assert readings[-1].modes >= 7


def test_a_negative_weight_is_refused():
    with pytest.raises(SettingError, match=r"RingSettings\.gamma is -1"):
        train_ring(RingSettings(gamma=-1))
