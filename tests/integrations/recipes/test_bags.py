"""Bags: their labels are what they say, and what each pooling can be taught that it should not."""

import numpy as np
import pytest
import torch
from distopt.integrations.recipes.bags import UNIT_TESTS, digit_bags, unit_test_bags
from distopt.integrations.recipes.digits import digits
from distopt.integrations.recipes.pooling import KINDS, pooling
from distopt.integrations.recipes.run_bags import BagNetwork, answers, area
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional

ADDING = ("isr", "max", "noisy-or")
"""Poolings that an instance more can only make surer; the others are of means, which it may dilute."""


def test_digits_are_cut_into_two_parts_that_share_nothing():
    training, test = digits(3)
    assert (len(training), len(test)) == (1200, 597)
    assert training.pictures.shape == (1200, 1, 8, 8)
    assert 0 <= training.pictures.min() < training.pictures.max() == 1
    shared = set(map(bytes, training.pictures.numpy())) & set(map(bytes, test.pictures.numpy()))
    assert len(shared) == 0
    assert not torch.equal(training.labels, digits(4)[0].labels)


@given(seed=st.integers(0, 1000), first=st.floats(0.05, 1.0), second=st.floats(0.05, 1.0))
def test_a_bag_is_positive_if_enough_of_it_is_of_the_class(seed, first, second):
    training, _ = digits()
    names = {
        picture.numpy().tobytes(): int(label) for picture, label in zip(training.pictures, training.labels, strict=True)
    }
    bags = digit_bags(training, 12, (first, second), (3, 9), np.random.default_rng(seed))
    for instances, mask, labels in zip(bags.instances, bags.mask, bags.labels, strict=True):
        held = [names[picture.numpy().tobytes()] for picture in instances[mask]]
        assert 3 <= len(held) <= 9
        assert not instances[~mask].any()
        for digit, fraction in enumerate((first, second)):
            if abs(held.count(digit) / len(held) - fraction) > 1e-3:
                assert labels[digit] == (held.count(digit) / len(held) > fraction)


def test_the_planted_fraction_itself_is_positive_and_both_labels_occur():
    training, _ = digits()
    bags = digit_bags(training, 400, (0.3,), (10, 10), np.random.default_rng(0))
    assert 0.3 < bags.labels.mean() < 0.7
    again = digit_bags(training, 400, (0.3,), (10, 10), np.random.default_rng(0))
    assert torch.equal(bags.instances, again.instances)
    zeros = dict.fromkeys((p.numpy().tobytes() for p in training.pictures[training.labels == 0]), 1)
    counts = torch.tensor([sum(p.numpy().tobytes() in zeros for p in bag) for bag in bags.instances])
    assert torch.equal(bags.labels[:, 0], (counts >= 3).float())


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("name", UNIT_TESTS)
def test_unit_tests_are_drawn_as_published(name, train):
    bags = unit_test_bags(name, 200, train=train, rng=np.random.default_rng(0))
    means = bags.instances.mean(2)
    positive = bags.labels[:, 0] > 0.5
    assert positive.float().mean() == 0.5
    poisoned = ((means < -8) & bags.mask).any(1)
    first = ((means - 2).abs() < 0.2) & bags.mask
    second = ((means - 3).abs() < 0.2) & bags.mask
    if name == "false-frequency":
        assert not poisoned.any()
        assert (first.sum(1)[positive] == 1).all()
        many = first.sum(1)[~positive]
        assert (many == 1).all() if train else (many.min() >= 35 and many.max() < 45)
        assert (second.sum(1) == positive.long()).all()
    else:
        assert torch.equal(poisoned, positive != train)
    if name == "multi-concept":
        assert torch.equal(first.any(1) & second.any(1), positive)
        assert (first.any(1) | second.any(1)).all()


@pytest.mark.parametrize("kind", KINDS)
@given(z=st.lists(st.floats(-6, 6), min_size=1, max_size=6), more=st.floats(-30, 6))
def test_an_instance_more_never_makes_a_bag_less_sure_where_evidence_adds_up(kind, z, more):
    made = pooling(kind, 1).double()
    few, many = (made(torch.tensor(part, dtype=torch.float64).reshape(1, -1, 1)).item() for part in (z, [*z, more]))
    if kind in ADDING:
        assert many >= few - 1e-12
    elif more < min(z) - 0.1:
        assert many < few


def trained(name, kind):
    """Areas under ROC on the bags of training, and on those of testing."""
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    training, test = (unit_test_bags(name, 400, train=train, rng=rng) for train in (True, False))
    model = BagNetwork(16, 1, kind)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for _ in range(120):
        some = training[torch.tensor(rng.integers(0, len(training), 32))]
        optimizer.zero_grad()
        functional.binary_cross_entropy_with_logits(model(some.instances, some.mask), some.labels).backward()
        optimizer.step()
    return [area(*answers(model, bags, torch.device("cpu"))) for bags in (training, test)]


@pytest.mark.parametrize("kind", ADDING)
def test_adding_poolings_cannot_learn_that_something_is_missing(kind):
    """arXiv:2310.17867, algorithm 1: a model that has learned the poison does worse than chance."""
    seen, unseen = trained("single-concept", kind)
    assert seen > 0.65
    assert unseen > 0.6


def test_attention_learns_it_and_is_misled():
    seen, unseen = trained("single-concept", "attention")
    assert seen > 0.95
    assert unseen < 0.2
