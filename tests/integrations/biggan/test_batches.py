"""Batches: the same numbers however they are shared out, others at every step and turn."""

import torch
from distopt.integrations.biggan.batches import Batches
from hypothesis import given
from hypothesis import strategies as st

PICTURES, CLASSES = torch.arange(20.0).reshape(20, 1, 1, 1).expand(20, 3, 8, 8), torch.arange(20) % 5


def _batches(parts, seed=0):
    return Batches(PICTURES, CLASSES, 3, batch=12, parts=parts, seed=seed)


@given(st.sampled_from([1, 2, 3, 4, 6, 12]), st.integers(0, 10**6), st.integers(0, 3), st.integers(0, 2**63 - 1))
def test_parts_make_up_the_whole(parts, step, turn, seed):
    (whole,) = _batches(1, seed).to_compare(step, turn, range(1))
    cut = [next(_batches(parts, seed).to_compare(step, turn, range(i, i + 1))) for i in range(parts)]
    assert torch.equal(torch.cat([part.pictures for part in cut]), whole.pictures)
    assert torch.equal(torch.cat([part.drawn.noise for part in cut]), whole.drawn.noise)
    (drawn,) = _batches(1, seed).to_draw(step, range(1))
    assert torch.equal(
        torch.cat([part.classes for part in _batches(parts, seed).to_draw(step, range(parts))]), drawn.classes
    )


def test_pictures_have_their_own_classes():
    (whole,) = _batches(1).to_compare(0, 0, range(1))
    assert torch.equal(whole.pictures[:, 0, 0, 0].long() % 5, whole.classes)


def test_steps_turns_and_seeds_differ():
    drawn = [next(_batches(1).to_draw(step, range(1))).noise for step in range(3)]
    drawn += [next(_batches(1).to_compare(0, turn, range(1))).drawn.noise for turn in range(2)]
    drawn.append(next(_batches(1, seed=1).to_draw(0, range(1))).noise)
    assert len(torch.unique(torch.stack(drawn), dim=0)) == len(drawn)
