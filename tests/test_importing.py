"""What importing costs, in modules, and what it changes: nothing. A command refuses bad input before torch is loaded."""

import json
import subprocess
import sys

PROGRAM = """
import atexit, json, logging, os, random, signal, sys, threading, warnings

def others(before=()):
    return sorted(n for n in set(sys.modules) - set(before) if n.partition(".")[0] not in sys.stdlib_module_names)

def state():
    found = [
        dict(os.environ), os.getcwd(), list(sys.path), threading.active_count(), atexit._ncallbacks(),
        logging.root.handlers[:], logging.root.level, logging.getLogger("distopt").handlers[:], warnings.filters[:],
        random.getstate(), [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGCHLD)],
        sys.excepthook, sys.stdout, sys.stderr,
    ]
    if torch := sys.modules.get("torch"):
        found += [
            torch.get_rng_state().tolist(), torch.get_num_threads(), torch.get_default_dtype(),
            torch.are_deterministic_algorithms_enabled(), torch.is_grad_enabled(), torch.distributed.is_initialized(),
        ]
    return repr(found)

told = {}
before, modules = state(), set(sys.modules)
import distopt
told["loaded"] = others(modules)
told["same"] = state() == before

import torch, torch.distributed
before, modules = state(), set(sys.modules)
for name in ("register", "PowerSGD", "accumulate", "ResblockScaler", "record", "optim", "checkpoint"):
    getattr(distopt, name)
told["loaded by use"] = [name for name in others(modules) if name.partition(".")[0] != "distopt"]
told["same after use"] = state() == before
told["group"] = torch.distributed.is_initialized()
print(json.dumps(told))
"""


def test_importing_loads_and_changes_nothing():
    """``import distopt`` is one module; its names load others of ours once they are used, and nothing besides torch."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", PROGRAM], capture_output=True, text=True, timeout=100, check=False
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {
        "loaded": ["distopt"],
        "same": True,
        "loaded by use": [],
        "same after use": True,
        "group": False,
    }
