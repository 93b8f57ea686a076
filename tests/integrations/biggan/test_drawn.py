"""The drawn task and its exact reader: everything that is drawn is read right, and what is spoilt is not."""

import pytest
import torch
from distopt.integrations.biggan import drawn
from distopt.integrations.biggan.settings import CLASSES, SIZE
from distopt.integrations.scenes.draw import SHAPES
from hypothesis import given
from hypothesis import strategies as st


@pytest.fixture(scope="module")
def everything():
    return drawn.everything()


def test_all_there_is(everything):
    pictures, classes = everything
    assert CLASSES == SHAPES
    assert pictures.shape == (len(CLASSES) * drawn.CONTENTS, 3, SIZE, SIZE)
    assert len(torch.unique(pictures.flatten(1), dim=0)) == len(pictures)
    readings = drawn.read(pictures)
    assert [reading.shape for reading in readings] == classes.tolist()
    contents = {(reading.shape, reading.colour, reading.place) for reading in readings}
    assert len(contents) == len(pictures)


@given(st.integers(0, 215), st.floats(0, 0.25), st.integers(0, 1000))
def test_a_little_noise_is_forgiven(index, size, seed):
    pictures, classes = drawn.everything()
    noise = torch.rand(1, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(seed)) * 2 - 1
    (reading,) = drawn.read((pictures[index : index + 1] + size * noise).clamp(-1, 1))
    assert reading.shape == classes[index]


def test_what_is_spoilt_is_not_read(everything):
    pictures, _ = everything
    square = int((everything[1] == SHAPES.index("square")).nonzero()[0])
    empty = torch.zeros_like(pictures[:1])
    two = pictures[square].clone()
    two[:, :, 8:] = torch.tensor([0.8, -0.8, -0.8])[:, None, None]
    blob = empty[0].clone()
    blob[:, 4:6, :] = 0.8
    for spoilt in (empty[0], two, blob):
        assert drawn.read(spoilt[None]) == [None]


def test_judging_by_hand(everything):
    pictures, classes = everything
    chosen = torch.cat([(classes == one).nonzero()[:2, 0] for one in range(6)])
    mine, asked = pictures[chosen], classes[chosen]
    whole = drawn.judge(mine, asked)
    assert whole.accuracy == 1
    assert whole.contents == 2
    assert whole.distance > 0
    wrong = drawn.judge(mine, asked.roll(2))
    assert wrong.accuracy == 0
    assert wrong.contents == 0
    same = drawn.judge(pictures[chosen[::2]].repeat_interleave(2, 0), asked)
    assert (same.accuracy, same.contents, same.distance) == (1, 1, 0)
    assert drawn.judge(torch.cat([mine[:6], torch.zeros_like(mine[6:])]), asked).by_class == (1, 1, 1, 0, 0, 0)
