"""Two nodes on one Linux machine: network namespaces, and between them a link whose rate can be set. Needs root."""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Generator, Mapping, Sequence
from pathlib import Path

from distopt.errors import DistoptError

RANKS_A_NODE = 2
_ADDRESSES = ("10.77.0.1", "10.77.0.2")


class NodesError(DistoptError):
    """This machine cannot be made two nodes, or a rank on them failed."""


class Link:
    """This node's end of the link, seen from inside of its namespace.

    Args:
        device: its name.
        chief: whether this process is the one of its node that sets the rate.
    """

    def __init__(self, device: str, chief: bool) -> None:
        self._device = device
        self._chief = chief

    def limit(self, megabits: int | None) -> None:
        """Send so many megabits a second from now on; all that the machine can if ``None``."""
        if not self._chief:
            return
        subprocess.run(["tc", "qdisc", "del", "dev", self._device, "root"], capture_output=True)
        if megabits is not None:
            # The bucket has to hold what may be sent between two ticks of the kernel, and one packet of 64 KiB.
            burst = max(128 * 1024, megabits * 1_000_000 // 8 // 100)
            rate = ["rate", f"{megabits}mbit", "burst", str(burst), "latency", "200ms"]
            _run(["tc", "qdisc", "add", "dev", self._device, "root", "tbf", *rate])

    def sent(self) -> int:
        """Bytes on the wire so far, headers included."""
        return int(Path(f"/sys/class/net/{self._device}/statistics/tx_bytes").read_text())


@contextlib.contextmanager
def two_nodes() -> Generator[tuple[list[str], list[str]]]:
    """Make two namespaces and a link between them, and take them away in the end.

    Returns:
        Names of the namespaces and of the link's ends.

    Raises:
        NodesError: if that is not possible here.
    """
    if missing := [tool for tool in ("ip", "tc") if shutil.which(tool) is None]:
        raise NodesError(f"two nodes on one machine need {' and '.join(missing)} (iproute2)")
    spaces, devices = ([f"{name}{side}{os.getpid()}" for side in "ab"] for name in ("distopt-", "do"))
    with contextlib.ExitStack() as stack:
        for space in spaces:
            _run(["ip", "netns", "add", space])
            stack.callback(subprocess.run, ["ip", "netns", "del", space], capture_output=True)
        ends = ["ip", "link", "add", devices[0], "netns", spaces[0], "type", "veth", "peer", "name", devices[1]]
        _run([*ends, "netns", spaces[1]])
        for space, device, address in zip(spaces, devices, _ADDRESSES, strict=True):
            inside = ["ip", "-n", space]
            _run([*inside, "addr", "add", f"{address}/24", "dev", device])
            for name in (device, "lo"):
                _run([*inside, "link", "set", name, "up"])
        yield spaces, devices


def run_on_two_nodes(arguments: Sequence[str]) -> None:
    """Run a module of ours as four ranks, two on each node; it finds its place as under ``torchrun``.

    Args:
        arguments: what follows ``python -m``. The name of the node's end of the link is put behind it.

    Raises:
        NodesError: if this machine cannot be made two nodes, or a rank fails; the others are ended then.
    """
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that everything is taken away
    with two_nodes() as (spaces, devices), contextlib.ExitStack() as stack:
        port, ranks = str(_free_port()), []
        for rank in range(2 * RANKS_A_NODE):
            node = rank // RANKS_A_NODE
            command = ["ip", "netns", "exec", spaces[node], sys.executable, "-m", *arguments, devices[node]]
            ranks.append(subprocess.Popen(command, env={**os.environ, **_place(rank, port, devices[node])}))
            stack.callback(ranks[-1].wait)
            stack.callback(ranks[-1].kill)
        # The ranks wait for one another: the first one that fails ends the others within its own deadline, or we do.
        for rank, process in enumerate(ranks):
            if process.wait() != 0:
                raise NodesError(f"rank {rank} failed with exit code {process.returncode}")


def _place(rank: int, port: str, device: str) -> Mapping[str, str]:
    world = 2 * RANKS_A_NODE
    numbers = {"RANK": rank, "WORLD_SIZE": world, "LOCAL_RANK": rank % RANKS_A_NODE, "GROUP_RANK": rank // RANKS_A_NODE}
    more = {"LOCAL_WORLD_SIZE": RANKS_A_NODE, "OMP_NUM_THREADS": 1, "MASTER_ADDR": _ADDRESSES[0], "MASTER_PORT": port}
    return {name: str(value) for name, value in (numbers | more).items()} | {
        "GLOO_SOCKET_IFNAME": device,
        "TORCH_CPP_LOG_LEVEL": "ERROR",  # the addresses have no names, of which each connection warns
    }


def _free_port() -> int:
    with socket.socket() as trial:
        trial.bind(("", 0))
        return trial.getsockname()[1]


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise NodesError(f"{' '.join(command[:4])} ... does not work here: {done.stderr.strip()}")
