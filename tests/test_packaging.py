"""What is shipped: sdist and wheel are built, the wheel is installed where nothing of ours is, and used there."""

import email
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LEFT = shutil.ignore_patterns(
    ".*", "__pycache__", "*.egg-info", "build", "dist", "runs", "_build", "*.pyc", "MANIFEST", "shared", "venv"
)
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def run(*command, cwd, **variables):
    """Run a command that knows nothing of this checkout."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "PIP_"))}
    done = subprocess.run(
        list(map(str, command)), cwd=cwd, env=environment | variables, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def leave_out(folder, names):
    """Neither what tools leave behind nor the link that lies in some checkouts."""
    linked = {name for name in names if (Path(folder) / name).is_symlink()}
    return set(LEFT(folder, names)) | linked


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """The checkout as it is committed, but for what is not yet."""
    return shutil.copytree(ROOT, tmp_path_factory.mktemp("packaging") / "source", ignore=leave_out)


@pytest.fixture(scope="module")
def files(source):
    """The files of the checkout."""
    return {path.relative_to(source).as_posix() for path in source.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def built(source, files):
    """The sdist, and the wheel that is made from it."""
    pytest.importorskip("build")
    out = source.parent / "out"
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", out, source, cwd=source.parent)
    (sdist,), (wheel,) = out.glob("*.tar.gz"), out.glob("*.whl")
    return sdist, wheel


@pytest.fixture(scope="module")
def installed(built):
    """A new environment with the wheel, which sees this one's packages, but nothing of distopt in it."""
    folder = built[1].parent.parent / "environment"
    venv.create(folder, symlinks=True)
    python = folder / "bin" / "python"
    paths = json.loads(
        run(python, "-c", "import json, sysconfig; print(json.dumps(sysconfig.get_paths()))", cwd=folder)
    )
    # Of a folder that is named in a .pth, no .pth is read: an editable distopt there is not seen.
    Path(paths["purelib"], "packages.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    install = ("-m", "pip", "--python", python, "install", "--quiet", "--no-index", "--no-deps", built[1])
    run(sys.executable, *install, cwd=folder, PIP_DISABLE_PIP_VERSION_CHECK="1")
    return folder / "bin", Path(paths["purelib"])


def test_the_sdist_holds_all_that_the_tests_need(built, files):
    with tarfile.open(built[0]) as archive:
        held = {name.partition("/")[2] for name in archive.getnames() if not archive.getmember(name).isdir()}
    assert not files - held - {"MANIFEST.in"}
    generated = {name for name in held - files if not name.startswith("distopt.egg-info/")}
    assert generated == {"PKG-INFO", "setup.cfg"}


def test_the_wheel_holds_the_packages_and_their_data_alone(built, files):
    with zipfile.ZipFile(built[1]) as archive:
        held = {name for name in archive.namelist() if ".dist-info/" not in name}
        metadata = email.message_from_bytes(archive.read("distopt-0.1.0.dist-info/METADATA"))
    wanted = {name for name in files if name.startswith("distopt/")}
    wanted |= {f"distopt/{name}" for name in files if name.startswith("integrations/")}
    assert held == wanted
    assert "distopt/py.typed" in held
    assert {name.rpartition("/")[2] for name in held if "/presets/" in name} == {
        path.name for path in (ROOT / "integrations/dalle/presets").glob("*.toml")
    }
    assert any(name.endswith("models/demo/transformer.safetensors") for name in held)
    assert metadata["Requires-Python"] == PROJECT["requires-python"]
    assert set(metadata.get_all("Provides-Extra")) == set(PROJECT["optional-dependencies"])
    core = [line for line in metadata.get_all("Requires-Dist") if "extra ==" not in line]
    assert core == PROJECT["dependencies"]


def test_every_command_is_installed(installed, tmp_path):
    for name in PROJECT["scripts"]:
        assert run(installed[0] / name, "--help", cwd=tmp_path).startswith(f"usage: {name} ")
    for command in ("doctor", "plan", "report"):
        assert run(installed[0] / "distopt", command, "--help", cwd=tmp_path).startswith(f"usage: distopt {command} ")


def test_the_wheel_works_where_it_is_installed(installed, tmp_path):
    """It is what is imported, hooks can be made, and the model that comes with it draws."""
    binaries, packages = installed
    code = (
        "import sys, distopt; from distopt.integrations.dalle import cli; distopt.PowerSGD(rank=2);"
        "print(distopt.__file__, cli.__file__); sys.exit(cli.main(sys.argv[1:]))"
    )
    sample = ("sample", "--caption", "a red circle above a blue square", "--out", tmp_path / "red.png")
    where = run(binaries / "python", "-c", code, *sample, cwd=tmp_path, OMP_NUM_THREADS="1").split()
    assert where[:2] == [f"{packages}/distopt/__init__.py", f"{packages}/distopt/integrations/dalle/cli.py"]
    assert (tmp_path / "red.png").read_bytes().startswith(b"\x89PNG")
