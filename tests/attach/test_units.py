"""Gradients whose single scales change from step to step: residuals keep their meaning."""

import gc
import weakref

import pytest
import torch
from torch import nn

import distopt
from distopt.attach.units import declare, scale_of, withdraw

SCALES = [(1.0, 1.0), (1024.0, 0.5), (1024.0, 2.0**-6), (4.0, 2.0**10)]


class Scaling:
    """Says what each of two parameters is scaled by."""

    def __init__(self):
        self.scales = (1.0, 1.0)

    def gradient_scale(self, index):
        return self.scales[index]


def train(reducer, scaling, trace, **settings):
    """Averages divided by their scales, and residuals in unscaled units, of two float16 matrices."""
    matrices = [nn.Parameter(torch.zeros(12, 10, dtype=torch.float16)) for _ in range(2)]
    for index, matrix in enumerate(matrices):
        if scaling is not None:
            declare(matrix, scaling, index)
    registration = distopt.register(matrices, reducer, **settings)
    generator = torch.Generator().manual_seed(0)
    averages = []
    for scales in trace:
        if scaling is not None:
            scaling.scales = scales
        for matrix, scale in zip(matrices, scales, strict=True):
            gradient = torch.randn(12, 10, generator=generator).half().float()
            (matrix * (gradient * (1.0 if scaling is None else scale))).sum().backward()
        registration.reduce()
        for matrix, scale in zip(matrices, scales, strict=True):
            averages.append(matrix.grad.float() / (1.0 if scaling is None else scale))
            matrix.grad = None
    return averages, registration.state_dict()["residuals"], registration.stats().residual_norm


@pytest.mark.parametrize(
    "reducer",
    [
        distopt.PowerSGD(rank=2, min_saving=0.0),
        distopt.PowerSGD(rank=2, min_saving=0.0, residual_dtype="1-6-9", factor_dtype="1-6-9"),
        distopt.TopK(0.1),
        distopt.Quantize(8),
        distopt.Sign(),
    ],
    ids=str,
)
@pytest.mark.parametrize("settings", [{}, {"accumulate": True}], ids=["plain", "accumulating"])
def test_scales_of_single_parameters_change_no_bit(reducer, settings, alone):
    scaled = train(reducer, Scaling(), SCALES, **settings)
    plain = train(reducer, None, SCALES, **settings)
    assert all(map(torch.equal, scaled[0], plain[0]))
    assert scaled[1].keys() == plain[1].keys() == {"0", "1"}
    assert all(torch.equal(scaled[1][name], plain[1][name]) for name in plain[1])
    assert any(bool(residual.any()) for residual in plain[1].values())
    assert scaled[2] == plain[2]


def test_who_scales_can_stop_or_vanish():
    scaling, parameter = Scaling(), torch.ones(1)
    scaling.scales = (8.0, 1.0)
    declare(parameter, scaling, 0)
    assert scale_of(parameter) == 8.0
    withdraw(parameter)
    assert scale_of(parameter) == 1.0
    declare(parameter, scaling, 0)
    alive = weakref.ref(scaling)
    del scaling
    gc.collect()
    assert alive() is None
    assert scale_of(parameter) == 1.0
