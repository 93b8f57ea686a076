"""Gradients in a bucket: where DDP lays them, and cut only once."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import distopt
from distopt.attach.cutting import cut
from tests.attach.models import wrap

PARAMETERS = {
    "whole": torch.empty(3, 4),
    "turned": torch.empty(4, 3).t(),
    "scalar": torch.empty(()),
    "empty": torch.empty(0, 5),
    "channels last": torch.empty(2, 3, 4, 5).to(memory_format=torch.channels_last),
}


@given(names=st.lists(st.sampled_from(sorted(PARAMETERS)), unique=True, min_size=1), offset=st.integers(0, 3))
def test_every_number_is_in_one_gradient(names, offset):
    parameters = {name: PARAMETERS[name] for name in names}
    size = sum(parameter.numel() for parameter in parameters.values())
    found = cut(torch.arange(float(size + offset))[offset:], parameters)
    assert found.names == tuple(names)
    assert torch.cat(list(found.segments)).tolist() == found.buffer.tolist()
    for name, gradient, segment in zip(names, found.gradients, found.segments, strict=True):
        expected = PARAMETERS[name]
        assert gradient.shape == expected.shape
        assert sorted(gradient.flatten().tolist()) == segment.tolist()
        if expected.numel() > 0:
            assert gradient.stride() == expected.stride()


@pytest.mark.parametrize("view", [False, True])
def test_a_bucket_is_cut_once_its_layout_has_settled(view, alone):
    model = wrap(nn.Sequential(*[nn.Linear(48, 48) for _ in range(4)]), gradient_as_bucket_view=view)
    attachment = distopt.register(model, distopt.PowerSGD(rank=2))._attachment
    kept = []
    for _ in range(5):
        model(torch.ones(2, 48)).sum().backward()
        model.zero_grad()
        attachment.settle()
        kept.append(dict(attachment._cut))
    assert kept[0] == {}  # DDP's first buckets are not kept alive
    assert len(kept[3]) == len(attachment.layout()) > 1
    assert all(kept[4][index] is found for index, found in kept[3].items())
    assert [list(found.names) for _, found in sorted(kept[4].items())] == attachment.layout()
