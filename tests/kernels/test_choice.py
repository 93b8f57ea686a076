"""What decides whether Triton works."""

import pytest
import torch

from distopt.errors import SettingError
from distopt.kernels import choice
from distopt.kernels.choice import chosen

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def _read_anew():
    choice.chosen_setting.cache_clear()
    yield
    choice.chosen_setting.cache_clear()


def test_by_default_kernels_work_on_cuda_alone(monkeypatch):
    monkeypatch.delenv(choice.VARIABLE, raising=False)
    assert chosen(CUDA)
    assert not chosen(CPU)


@pytest.mark.parametrize(("setting", "cpu", "cuda"), [("auto", False, True), ("off", False, False), ("on", True, True)])
def test_the_environment_decides(monkeypatch, setting, cpu, cuda):
    monkeypatch.setenv(choice.VARIABLE, setting)
    assert (chosen(CPU), chosen(CUDA)) == (cpu, cuda)


def test_without_triton_torch_does_the_work(monkeypatch):
    monkeypatch.delenv(choice.VARIABLE, raising=False)
    monkeypatch.setattr(choice, "_has_triton", lambda: False)
    assert not chosen(CUDA)


def test_another_setting_is_refused(monkeypatch):
    monkeypatch.setenv(choice.VARIABLE, "yes")
    with pytest.raises(SettingError, match=r"DISTOPT_KERNELS.*'yes'.*auto, off or on"):
        chosen(CUDA)
