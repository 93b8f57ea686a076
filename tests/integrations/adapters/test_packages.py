"""An adapter without its package says in one line what to install."""

import importlib
import sys

import pytest


@pytest.mark.parametrize(
    ("name", "package", "message"),
    [
        ("lightning", "lightning.pytorch", "needs lightning: pip install lightning"),
        ("accelerate", "accelerate", "needs accelerate: pip install accelerate"),
        ("transformers", "transformers", "needs transformers and accelerate: pip install transformers accelerate"),
    ],
)
def test_package_is_missing(monkeypatch, name, package, message):
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.delitem(sys.modules, f"distopt.integrations.{name}", raising=False)
    with pytest.raises(ModuleNotFoundError) as caught:
        importlib.import_module(f"distopt.integrations.{name}")
    assert str(caught.value) == f"distopt.integrations.{name} {message}"
