"""Several hosts on one Linux machine: network namespaces, and links between them whose rate can be set. Needs root.

Two hosts are joined by a cable (a pair of virtual interfaces), more by a switch (a bridge in a namespace of its
own). The rate is that of each host's way out. Ranks of one host talk over its loopback interface, which has no limit.
Delay is that of the machine: the kernel's emulation of it is not everywhere.
"""

import concurrent.futures
import contextlib
import dataclasses
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Generator, Mapping, Sequence
from pathlib import Path

from distopt.errors import DistoptError

MOST = 200
"""Hosts that the addresses suffice for."""


class HostsError(DistoptError):
    """This machine cannot be made several hosts."""


class RankError(DistoptError):
    """A rank on one of the hosts failed."""


@dataclasses.dataclass(frozen=True)
class Host:
    """One of the hosts.

    Args:
        space: its network namespace.
        device: its interface to the others.
        address: of that interface.
    """

    space: str
    device: str
    address: str

    def command(self, *command: str) -> list[str]:
        """What to run so that ``command`` runs on this host."""
        return ["ip", "netns", "exec", self.space, *command]


class Link:
    """A host's end of its link, seen from inside of its namespace.

    Args:
        device: its name.
        chief: whether this process is the one of its host that sets the rate.
    """

    def __init__(self, device: str, chief: bool = True) -> None:
        self._device = device
        self._chief = chief

    def limit(self, megabits: int | None) -> None:
        """Send so many megabits a second from now on; all that the machine can if ``None``."""
        if not self._chief:
            return
        subprocess.run(["tc", "qdisc", "del", "dev", self._device, "root"], capture_output=True)
        if megabits is not None:
            rate = ["rate", f"{megabits}mbit", "burst", str(burst(megabits)), "latency", "200ms"]
            _run(["tc", "qdisc", "add", "dev", self._device, "root", "tbf", *rate])

    def sent(self) -> int:
        """Bytes on the wire so far, headers included."""
        return int(Path(f"/sys/class/net/{self._device}/statistics/tx_bytes").read_text())


def burst(megabits: int) -> int:
    """Bytes that a link that has been idle lets through at once: a millisecond's worth, but a few packets at least.

    What is sent in small pieces would not meet a limit at all if this were larger.

    Example:
        >>> burst(100), burst(1000)
        (32768, 125000)
    """
    return max(32 * 1024, megabits * 1_000_000 // 8 // 1000)


def check() -> None:
    """Find out, without a change, whether this machine can be made several hosts.

    Raises:
        HostsError: if not.
    """
    if not sys.platform.startswith("linux"):
        raise HostsError("several hosts on one machine need Linux: they are network namespaces")
    if os.geteuid() != 0:
        raise HostsError("several hosts on one machine need root, who alone makes network namespaces")
    if missing := [tool for tool in ("ip", "tc") if shutil.which(tool) is None]:
        raise HostsError(f"several hosts on one machine need {' and '.join(missing)} (iproute2)")


@contextlib.contextmanager
def hosts(count: int = 2) -> Generator[list[Host]]:
    """Make hosts and what joins them, and take all of it away in the end.

    Args:
        count: how many, 2 to `MOST`.

    Returns:
        The hosts.

    Raises:
        HostsError: if that is not possible here.
    """
    if not 2 <= count <= MOST:
        raise HostsError(f"the number of hosts is {count}; allowed is 2 to {MOST}")
    check()
    name = os.getpid()
    made = [Host(f"distopt-{i}-{name}", f"do{i}-{name}", f"10.77.0.{i + 1}") for i in range(count)]
    with contextlib.ExitStack() as stack:
        for host in made:
            _space(host.space, stack)
        if count == 2:
            far = ["peer", "name", made[1].device, "netns", made[1].space]
            _run(["ip", "link", "add", made[0].device, "netns", made[0].space, "type", "veth", *far])
        else:
            _switch(made, f"distopt-s-{name}", stack)
        for host in made:
            inside = ["ip", "-n", host.space]
            _run([*inside, "addr", "add", f"{host.address}/24", "dev", host.device])
            for device in (host.device, "lo"):
                _run([*inside, "link", "set", device, "up"])
        yield made


def _space(name: str, stack: contextlib.ExitStack) -> None:
    _run(["ip", "netns", "add", name])
    stack.callback(subprocess.run, ["ip", "netns", "del", name], capture_output=True)


def _switch(made: Sequence[Host], space: str, stack: contextlib.ExitStack) -> None:
    _space(space, stack)
    _run(["ip", "-n", space, "link", "add", "switch", "type", "bridge"])
    _run(["ip", "-n", space, "link", "set", "switch", "up"])
    for place, host in enumerate(made):
        port = f"port{place}"
        near = ["ip", "link", "add", host.device, "netns", host.space]
        _run([*near, "type", "veth", "peer", "name", port, "netns", space])
        _run(["ip", "-n", space, "link", "set", port, "master", "switch"])
        _run(["ip", "-n", space, "link", "set", port, "up"])


def run_on_hosts(arguments: Sequence[str], *, count: int = 2, ranks: int = 1) -> None:
    """Run a module of ours on several hosts; a rank finds its place as under ``torchrun``.

    Nothing stays behind when it ends, whether by itself, by an error, by Ctrl-C or by SIGTERM.

    Args:
        arguments: what follows ``python -m``. The name of the host's interface is put behind it.
        count: hosts.
        ranks: processes on each host.

    Raises:
        HostsError: if this machine cannot be made several hosts.
        RankError: if a rank fails; the others are ended then.
    """
    with until_terminated(), hosts(count) as made, contextlib.ExitStack() as stack:
        # Threads only wait for the ranks; the stack ends these first.
        waiting = stack.enter_context(concurrent.futures.ThreadPoolExecutor(count * ranks))
        port, processes = str(_free_port()), []
        for rank in range(count * ranks):
            host = made[rank // ranks]
            place = _place(rank, ranks, count, made[0].address, port, host.device)
            command = host.command(sys.executable, "-m", *arguments, host.device)
            processes.append(subprocess.Popen(command, env={**os.environ, **place}))
            stack.callback(processes[-1].wait)
            stack.callback(processes[-1].kill)
        ends = {waiting.submit(process.wait): rank for rank, process in enumerate(processes)}
        for end in concurrent.futures.as_completed(ends):
            if code := end.result():
                raise RankError(f"rank {ends[end]} failed with exit code {code}")


@contextlib.contextmanager
def until_terminated() -> Generator[None]:
    """Leave by an exception on SIGTERM, so that everything is taken away, and let no second one interrupt that."""

    def leave(*_: object) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        sys.exit(128 + signal.SIGTERM)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def refusing(main: Callable[[], None]) -> None:
    """Call a command's ``main``; where there cannot be several hosts, say so in one line and end with exit code 2."""
    try:
        main()
    except HostsError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
    except RankError as error:
        sys.exit(str(error))


def _place(rank: int, ranks: int, count: int, address: str, port: str, device: str) -> Mapping[str, str]:
    numbers = {"RANK": rank, "WORLD_SIZE": count * ranks, "LOCAL_RANK": rank % ranks, "GROUP_RANK": rank // ranks}
    more = {"LOCAL_WORLD_SIZE": ranks, "OMP_NUM_THREADS": 1, "MASTER_ADDR": address, "MASTER_PORT": port}
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
        raise HostsError(f"{' '.join(command[:4])} ... does not work here: {done.stderr.strip()}")
