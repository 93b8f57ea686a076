"""Decisions that hold the code together, pinned: who imports whom, what is public."""

import ast
import importlib
import inspect
import tomllib
from pathlib import Path

import pytest

import distopt

ROOT = Path(__file__).parent.parent
ORDER = ["errors", "kernels", "numerics", "comm", "reducers", "attach"]
APART = {"accumulation", "checkpoint", "monitor", "optim", "scaling", "sharding", "pipelining", "planning"}
"""Rooms that stand on those in order, and never import one another."""
ONE_WAY = {("pipelining", "sharding")}
"""Except that the first imports the second."""
PUBLIC = [
    "Accumulation",
    "AgreementError",
    "AllReduce",
    "ByName",
    "Cast",
    "CheckpointError",
    "DistoptError",
    "EnergyRank",
    "Figures",
    "Hierarchical",
    "MissingPackageError",
    "Nesterov",
    "PeerLostError",
    "Periodic",
    "PeriodicStats",
    "Pipeline",
    "Plan",
    "PowerSGD",
    "Quantize",
    "RandomK",
    "Recorder",
    "Registration",
    "RegistrationError",
    "ResblockScaler",
    "ScaleError",
    "SettingError",
    "Sign",
    "StateError",
    "Stats",
    "TopK",
    "Window",
    "WindowError",
    "accumulate",
    "log_to_tensorboard",
    "node_mesh",
    "pipeline",
    "plan",
    "record",
    "register",
    "shard",
]
MODULES = sorted((ROOT / "distopt").rglob("*.py"))
SELF_TEST = ROOT / "distopt/commands/selftest.py"
"""A trainer of its own, which judges what comm and all above it do: it must not ask them."""
SHARED = {"running", "scenes"}
"""What every one of the integrations may import, besides distopt itself."""
INTEGRATIONS = {"dalle": {"tokenizers"}}
"""Which of the others an integration may import."""
ADAPTERS = {"late"}
"""What adapters to other trainers, files beside the integrations, may import of each other; no integration needs them."""
INTEGRATED = sorted((ROOT / "integrations").rglob("*.py"))


def imports(path):
    """Names of distopt's modules that a file imports, wherever in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "distopt":
            yield node.module
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.split(".")[0] == "distopt")


def test_there_are_modules():
    assert len(MODULES) > 15


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_one_way(path):
    room = path.relative_to(ROOT / "distopt").parts[0].removesuffix(".py")
    if room in ("__init__", "commands"):  # which stand on everything
        return
    for name in imports(path):
        other = name.split(".")[1]
        if room in APART:
            assert other == room or other in ORDER or (room, other) in ONE_WAY, f"{path.name} imports {name}"
        else:
            assert ORDER.index(other) <= ORDER.index(room), f"{path.name} imports {name}"


@pytest.mark.parametrize("path", INTEGRATED, ids=lambda path: str(path.relative_to(ROOT)))
def test_integrations_do_not_know_each_other(path):
    *rooms, _ = path.relative_to(ROOT / "integrations").parts
    if rooms:
        allowed = {rooms[0]} | (set() if rooms[0] in SHARED else SHARED) | INTEGRATIONS.get(rooms[0], set())
    else:
        allowed = ADAPTERS
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level > len(rooms):
            above = [node.module.split(".")[0]] if node.module else [alias.name for alias in node.names]
            assert set(above) <= allowed, f"{path.name} imports {above}"
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("distopt.integrations."):
            assert node.module.split(".")[2] in allowed, f"{path.name} imports {node.module}"


def test_no_cycles():
    names = {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path for path in MODULES}
    edges = {name: set(imports(path)) & set(names) for name, path in names.items() if name != "distopt"}
    while free := [name for name, targets in edges.items() if not targets]:
        edges = {name: targets - set(free) for name, targets in edges.items() if name not in free}
    assert not edges, f"cycle among {sorted(edges)}"


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_and_functions_stay_small(path):
    text = path.read_text()
    assert text.count("\n") <= 400
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno < 80, node.name


@pytest.mark.parametrize(
    "path",
    [p for p in MODULES if "comm" not in p.parts and p != SELF_TEST],
    ids=lambda path: str(path.relative_to(ROOT)),
)
def test_only_comm_calls_collectives(path):
    called = {
        n.func.attr
        for n in ast.walk(ast.parse(path.read_text()))
        if isinstance(n, ast.Call) and isinstance(n.func, ast.Attribute)
    }
    assert not called & {
        "all_reduce",
        "all_gather",
        "broadcast",
        "reduce_scatter",
        "barrier",
        "all_gather_object",
        "new_group",
    }


def test_public_names():
    typed = {
        alias.asname
        for node in ast.walk(ast.parse((ROOT / "distopt/__init__.py").read_text()))
        if isinstance(node, ast.ImportFrom) and node.module.startswith("distopt.")
        for alias in node.names
    }
    assert sorted(typed) == sorted(distopt._HOMES) == PUBLIC


@pytest.mark.parametrize("name", PUBLIC)
def test_public_names_are_documented(name):
    thing = getattr(distopt, name)
    assert inspect.getdoc(thing)
    assert getattr(importlib.import_module(thing.__module__), name) is thing


def test_every_package_is_installed_and_under_one_name():
    """Nothing named integrations, tests or bench may land at the top of site-packages."""
    tool = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    folders = {"distopt": ROOT / "distopt", "distopt.integrations": ROOT / "integrations"}
    found = {
        ".".join([name, *init.parent.relative_to(folder).parts])
        for name, folder in folders.items()
        for init in folder.rglob("__init__.py")
    }
    assert set(tool["packages"]) == found
    assert tool["package-dir"] == {"distopt": "distopt", "distopt.integrations": "integrations"}
