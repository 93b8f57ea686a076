"""What the fork server loads once, so that no rank has to: it decides how long tests take, and nothing else."""

import contextlib
import gc
import importlib

import distopt
import tests.processes  # noqa: F401

SLOW = (
    "torch._dynamo",  # imported by the first step of any optimizer
    "distopt.kernels.lowrank_jobs",
    "distopt.integrations.biggan.trainer",
    "distopt.integrations.dalle.train",
    "distopt.integrations.recipes.trainer",
    "distopt.integrations.tokenizers.training",
    "hypothesis.strategies",
    "pytest",
    "sklearn.datasets",
)
"""What ranks of several tests import besides what is public here. None of it starts a thread: a fork would lose it."""

for name in dir(distopt):
    getattr(distopt, name)
for name in SLOW:
    with contextlib.suppress(ImportError):
        importlib.import_module(name)
# It stays: no rank looks through it for garbage, which would copy its pages.
gc.collect()
gc.freeze()
