"""Whole commands that are stopped: by SIGTERM, and by a rank that is killed under torchrun. Both end as the same run."""

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image

CONFIG = """
size = 8
pictures_every = 0
[stage1]
steps = 25
batch = 4
codes = 8
[stage2]
steps = 25
batch = 4
layers = 1
width = 16
[checkpoint]
every_steps = 1
"""


@pytest.fixture
def command(tmp_path):
    """What trains on a few small pictures."""
    photos = tmp_path / "photos"
    photos.mkdir()
    chance = np.random.default_rng(0)
    for i in range(8):
        Image.fromarray(chance.integers(0, 256, (8, 8, 3), np.uint8)).save(photos / f"{i}.png")
        (photos / f"{i}.txt").write_text(f"noise number {'abcdefgh'[i]}")
    (tmp_path / "f.toml").write_text(CONFIG)
    return ["distopt.integrations.dalle", "train", "--data", photos, "--config", tmp_path / "f.toml", "--ranks", "2"]


def start(*command, **environment):
    paths = {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    return subprocess.Popen(
        [sys.executable, "-m", *map(str, command)],
        env=os.environ | paths | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for_a_checkpoint(process, out):
    while not list((out / "checkpoints").glob("0*")):
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)


def children(pid):
    with open(f"/proc/{pid}/task/{pid}/children") as listed:
        return [int(child) for child in listed.read().split()]


@pytest.mark.skipif(not os.path.exists("/proc/self/task"), reason="finds the ranks by /proc")
@pytest.mark.timeout(300)
def test_what_sigterm_and_torchrun_s_restarts_leave_is_the_same_model(tmp_path, command):
    one, two = tmp_path / "one", tmp_path / "two"
    process = start(*command, "--out", one)
    wait_for_a_checkpoint(process, one)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate()
    assert process.returncode == 143, err
    assert "stopped by SIGTERM and saved after step" in err
    assert err.endswith("distopt-dalle: interrupted\n")
    assert "Traceback" not in err
    assert not (one / "settings.json").exists()

    other = start(*command, "--out", one, "--stage2.steps", "9")
    _, err = other.communicate()
    assert other.returncode == 2
    assert "holds a run that was stopped with stage2.steps = 25, not 9" in err
    process = start(*command, "--out", one)

    torchrun = ["torch.distributed.run", "--standalone", "--nproc_per_node", "2", "--max-restarts", "2", "-m"]
    agent = start(*torchrun, *command, "--out", two, "--ranks", "5")  # torchrun's own number is what counts
    wait_for_a_checkpoint(agent, two)
    os.kill(children(agent.pid)[-1], signal.SIGKILL)
    restarted, err = agent.communicate()
    assert agent.returncode == 0, err
    assert "goes on after step" in restarted
    out, err = process.communicate()
    assert process.returncode == 0, err
    assert "goes on after step" in out
    assert not (one / "checkpoints").exists()
    assert json.loads((two / "report.json").read_text())["world_size"] == 2
    for name in ("dvae", "transformer"):
        assert (one / f"{name}.safetensors").read_bytes() == (two / f"{name}.safetensors").read_bytes()
