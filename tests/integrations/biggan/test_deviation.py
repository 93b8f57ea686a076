"""Minibatch standard deviation: its laws, torch's own deviation as the reference, and what a discriminator sees of it."""

import pytest
import torch
from distopt.integrations.biggan.deviation import deviations, with_deviation
from distopt.integrations.biggan.discriminator import Discriminator
from distopt.integrations.biggan.sizes import Sizes
from hypothesis import given
from hypothesis import strategies as st

from distopt.errors import SettingError

GROUPS = st.tuples(st.integers(1, 3), st.integers(2, 6), st.integers(0, 1000))
"""How many groups, of how many pictures, and a seed."""


def _features(groups, group, seed):
    random = torch.Generator().manual_seed(seed)
    rows = groups * group
    features = torch.randn(rows, 3, 2, 2, generator=random, dtype=torch.float64)
    return features, torch.randint(3, (rows,), generator=random)


@given(GROUPS)
def test_it_is_the_deviation_of_each_class_in_its_group(case):
    groups, group, _ = case
    features, classes = _features(*case)
    found = deviations(features, group, classes)
    for row in range(groups * group):
        first = row // group * group
        companions = [other for other in range(first, first + group) if classes[other] == classes[row]]
        wanted = features[companions].std(0, correction=0).mean((1, 2))
        assert torch.allclose(found[row], wanted, atol=2e-4)
    without = deviations(features, group)
    wanted = features.unflatten(0, (groups, group)).std(1, correction=0).mean((2, 3))
    assert torch.allclose(without, wanted.repeat_interleave(group, 0), atol=2e-4)


@given(GROUPS)
def test_order_within_a_group_is_nothing_and_groups_keep_apart(case):
    groups, group, seed = case
    features, classes = _features(*case)
    order = torch.cat(
        [torch.randperm(group, generator=torch.Generator().manual_seed(seed)) + group * g for g in range(groups)]
    )
    found = deviations(features, group, classes)
    assert torch.allclose(deviations(features[order], group, classes[order]), found[order], atol=1e-9)
    alone = [deviations(f, group, c) for f, c in zip(features.split(group), classes.split(group), strict=True)]
    assert torch.allclose(torch.cat(alone), found, atol=1e-12)


@given(GROUPS, st.floats(0.1, 10), st.floats(-10, 10))
def test_a_shift_changes_nothing_and_a_scale_scales(case, scale, shift):
    features, classes = _features(*case)
    found = deviations(features, case[1], classes)
    assert torch.allclose(deviations(scale * features + shift, case[1], classes), scale * found, atol=1e-3)


def test_equal_pictures_and_lonely_ones_deviate_by_nothing_and_have_finite_slopes():
    features = torch.ones(4, 2, 2, 2, requires_grad=True)
    found = deviations(features, 4, torch.tensor([0, 0, 0, 1]))
    assert not found.any()
    found.sum().backward()
    assert features.grad.isfinite().all()


def test_its_gradient_is_that_of_finite_differences():
    features, classes = _features(2, 4, 3)
    features.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: deviations(x, 4, classes), features)
    assert torch.autograd.gradgradcheck(lambda x: deviations(x, 4, classes), features)


def test_the_channel_behind_is_the_mean_of_all_and_alike_at_all_places():
    features, classes = _features(1, 4, 0)
    both = with_deviation(features, 4, classes)
    assert torch.equal(both[:, :3], features)
    assert torch.equal(both[:, 3:], deviations(features, 4, classes).mean(1)[:, None, None, None].expand(4, 1, 2, 2))


@pytest.mark.parametrize(("rows", "group"), [(6, 4), (2, 4), (4, 1), (4, 0)])
def test_what_is_no_whole_group_is_refused(rows, group):
    with pytest.raises(SettingError, match=f"group is {group}, but must be at least 2, and a divisor of the {rows}"):
        deviations(torch.zeros(rows, 1), group)


@pytest.mark.parametrize("kind", ["hierarchical", "deep"])
@pytest.mark.parametrize("size", [8, 16])
def test_the_discriminator_scores_a_picture_by_its_companions_alone(kind, size):
    torch.manual_seed(0)
    sizes = Sizes(classes=2, size=size, width=8, noise=12, shared=5, attention=0, kind=kind)
    discriminator = Discriminator(sizes, group=4).double().eval()
    pictures, classes = torch.rand(8, 3, size, size, dtype=torch.float64), torch.tensor([0, 1] * 4)
    scores = discriminator(pictures, classes)
    other = pictures.clone()
    other[2] = 1 - other[2]
    changed = (discriminator(other, classes) - scores).abs() > 1e-6
    assert changed.tolist() == [True, False, True, False, False, False, False, False]
    alone = Discriminator(sizes)
    alone.eval()
    assert torch.allclose(alone(pictures.float(), classes)[:1], alone(pictures[:1].float(), classes[:1]), atol=1e-5)
