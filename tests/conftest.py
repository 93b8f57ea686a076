"""Profiles and habits that all tests share."""

import os

import hypothesis
import pytest
import torch

hypothesis.settings.register_profile("quick", max_examples=20, deadline=None, derandomize=True)
hypothesis.settings.register_profile("full", max_examples=200, deadline=None)
hypothesis.settings.load_profile(os.environ.get("DISTOPT_TESTS", "quick"))


if not torch.cuda.is_available():
    # Read when Triton is imported, which any test may cause: its kernels are interpreted.
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(autouse=True)
def one_thread():
    """One thread computes fastest where ranks share cores."""
    torch.set_num_threads(1)
