"""``distopt doctor``: can hooks run here? Versions, backends, the network, and a self-test of two processes."""

import argparse
import contextlib
import dataclasses
import importlib.metadata
import importlib.util
import json
import os
import platform
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Generator
from pathlib import Path
from typing import Any

from distopt.errors import SettingError

FAULTY = 1
"""The exit code if something does not work."""
_TESTED = ("2.11", "2.13")
"""The oldest and the newest torch that distopt is tested with."""
_PATIENCE = 60.0
_GRACE = 2.0
"""Seconds that the others have when one has failed."""
_EXAMPLES = """exit codes:
  0  hooks can run here; a note is something to know, no fault
  1  something does not work, and the line that begins with FAULT says what
"""


@dataclasses.dataclass(frozen=True)
class Finding:
    """One line of the report.

    Args:
        state: "ok", "note" (something to know) or "FAULT" (something does not work).
        name: what was looked at.
        said: what was found.
    """

    state: str
    name: str
    said: str

    def __str__(self) -> str:
        return f"{self.state:<6}{self.name:<12}{self.said}"


def add_to(commands: Any) -> None:
    """Add the command to what `ArgumentParser.add_subparsers` gave."""
    parser = commands.add_parser(
        "doctor",
        help="say whether hooks can run here: versions, backends, the network, and a self-test of two processes",
        description="Look at what distopt stands on, then train a small model on some processes and check the laws "
        "that its hooks promise. Half a minute.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--backend", choices=("gloo", "nccl"), default="gloo", help="of the self-test (default: gloo)")
    parser.add_argument("--ranks", type=int, default=2, metavar="N", help="of the self-test (default: 2)")
    parser.add_argument("--no-self-test", action="store_true", help="look, and start nothing")
    parser.set_defaults(run=_run)


def _run(parsed: argparse.Namespace) -> int:
    if not 2 <= parsed.ranks <= 8:
        raise SettingError("--ranks", parsed.ranks, "a whole number from 2 to 8")
    if parsed.backend == "nccl":
        _check_devices(parsed.ranks)
    faults = 0
    for finding in _findings(parsed):
        print(finding, flush=True)
        faults += finding.state == "FAULT"
    print(f"{faults} of the above do not work" if faults else "all is well: distopt's hooks can run here")
    return FAULTY if faults else 0


def _findings(parsed: argparse.Namespace) -> Generator[Finding]:
    yield _versions()
    yield from _backends()
    yield from _network()
    yield _launched()
    yield _kernels()
    if not parsed.no_self_test:
        yield from self_test(parsed.ranks, parsed.backend)


def _check_devices(ranks: int) -> None:
    import torch

    found = torch.cuda.device_count()
    if found < ranks:
        raise SettingError(
            "--backend", "nccl", f"gloo: {ranks} ranks need a CUDA device each, and this machine has {found}"
        )


def _versions() -> Finding:
    import torch

    distopt, system = importlib.metadata.version("distopt"), f"{platform.system()} {platform.machine()}"
    said = f"distopt {distopt}, torch {torch.__version__}, Python {platform.python_version()}, {system}"
    oldest, newest = (_number(version) for version in _TESTED)
    if not oldest <= _number(torch.__version__) <= newest:
        return Finding("note", "versions", f"{said}; tested with torch {_TESTED[0]} to {_TESTED[1]}")
    return Finding("ok", "versions", said)


def _number(version: str) -> tuple[int, int]:
    major, minor, *_ = version.split(".")
    return int(major), int(minor)


def _backends() -> Generator[Finding]:
    import torch
    import torch.distributed as dist

    if not dist.is_available():
        yield Finding("FAULT", "backends", "this torch is built without torch.distributed")
        return
    there = [name for name in ("gloo", "nccl", "mpi", "ucc") if getattr(dist, f"is_{name}_available")()]
    yield Finding("ok" if there else "FAULT", "backends", ", ".join(there) or "none")
    devices = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if not devices:
        yield Finding("note", "devices", f"no CUDA device; {os.cpu_count()} processors")
        return
    names = sorted({torch.cuda.get_device_name(i) for i in range(devices)})
    yield Finding("ok" if "nccl" in there else "FAULT", "devices", f"{devices} x {', '.join(names)}")


def _network() -> Generator[Finding]:
    """Where gloo will meet: the interface that is named, or the address that the host's name stands for."""
    named = os.environ.get("GLOO_SOCKET_IFNAME")
    there = [name for _, name in socket.if_nameindex()] if hasattr(socket, "if_nameindex") else []
    if named:
        missing = [name for name in named.split(",") if there and name not in there]
        said = f"GLOO_SOCKET_IFNAME is {named}" + (
            f"; there is no {missing[0]}, but {', '.join(there)}" if missing else ""
        )
        yield Finding("FAULT" if missing else "ok", "network", said)
        return
    host = socket.gethostname()
    try:
        address = socket.gethostbyname(host)
    except OSError:
        said = (
            f"the host's name, {host}, stands for no address: gloo meets on this machine alone; set GLOO_SOCKET_IFNAME"
        )
        yield Finding("note", "network", said)
        return
    alone = (
        "; only this machine can be met there: set GLOO_SOCKET_IFNAME for several" if address.startswith("127.") else ""
    )
    yield Finding("note" if alone else "ok", "network", f"{host} is {address}{alone}")


def _launched() -> Finding:
    """Whether a launcher has started this process, and how many threads it may use."""
    threads = os.environ.get("OMP_NUM_THREADS")
    said = (
        f"OMP_NUM_THREADS is {threads}" if threads else "OMP_NUM_THREADS is not set: one thread a rank is often fastest"
    )
    if "RANK" in os.environ:
        said += f"; rank {os.environ['RANK']} of {os.environ.get('WORLD_SIZE', '?')}"
    return Finding("ok" if threads else "note", "processes", said)


def _kernels() -> Finding:
    import torch

    from distopt.kernels.choice import chosen, chosen_setting

    setting = chosen_setting()
    if importlib.util.find_spec("triton") is None:
        return Finding("note", "kernels", "Triton is not installed: torch's own operations do the work on every device")
    on = chosen(torch.device("cuda")) and torch.cuda.is_available()
    said = f"Triton {importlib.metadata.version('triton')}, DISTOPT_KERNELS={setting}: " + (
        "in use on CUDA" if on else "not in use"
    )
    return Finding("ok", "kernels", said)


def self_test(ranks: int, backend: str) -> Generator[Finding]:
    """Start some processes that train a small model together, and give what they find.

    Args:
        ranks: how many processes.
        backend: "gloo", or "nccl" with a device for each rank.
    """
    with tempfile.TemporaryDirectory(prefix="distopt-doctor-") as folder:
        processes = [_start(rank, ranks, Path(folder), backend) for rank in range(ranks)]
        try:
            codes = _wait(processes)
        finally:
            for process in processes:
                process.kill()
        outputs, errors = zip(*(process.communicate() for process in processes), strict=True)
    for line in outputs[0].splitlines():
        with contextlib.suppress(ValueError):
            name, fine, said = json.loads(line)
            yield Finding("ok" if fine else "FAULT", name, said)
    for rank, (code, error) in enumerate(zip(codes, errors, strict=True)):
        if code is None and not any(codes):
            yield Finding("FAULT", "self-test", f"rank {rank} has not ended after {_PATIENCE} s")
        elif code:
            last = error.strip().splitlines()[-1:] or [f"exit code {code}"]
            yield Finding("FAULT", "self-test", f"rank {rank} failed: {last[0]}")


def _start(rank: int, ranks: int, folder: Path, backend: str) -> "subprocess.Popen[str]":
    environment = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    return subprocess.Popen(
        [sys.executable, "-m", "distopt.commands.selftest", str(rank), str(ranks), str(folder), backend],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )


def _wait(processes: "list[subprocess.Popen[str]]") -> list[int | None]:
    """Exit codes of processes, when all have ended or a while after one has failed; ``None`` of one that goes on."""
    limit = time.monotonic() + _PATIENCE
    while None in (codes := [process.poll() for process in processes]) and time.monotonic() < limit:
        if any(codes):
            limit = min(limit, time.monotonic() + _GRACE)
        time.sleep(0.05)
    return codes
