"""Hosts on one machine: what they are, that a link keeps its rate, and that nothing of them stays."""

import contextlib
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from bench.lab import __main__ as command
from bench.lab import hosts as lab

ROOT = Path(__file__).parents[3]
SOURCE = (
    "import socket, sys; s = socket.create_connection((sys.argv[1], int(sys.argv[2]))); s.sendall(bytes({})); s.close()"
)


def runs_here():
    try:
        with lab.hosts(2):
            return True
    except lab.HostsError:
        return False


needs_hosts = pytest.mark.skipif(not runs_here(), reason="needs root, iproute2 and network namespaces")


def spaces(pid=None):
    """Those that a process has made; ours if it is not said whose."""
    lines = subprocess.check_output(["ip", "netns", "list"], text=True).splitlines()
    return {line.split()[0] for line in lines if line.split()[0].endswith(f"-{pid or os.getpid()}")}


def received(host, sender, count):
    """Send ``count`` bytes from one host to another; seconds from the first to the last, and the bytes that came."""
    code = (
        "import socket, sys, time; s = socket.create_server((sys.argv[1], 0)); print(s.getsockname()[1], flush=True)\n"
        "c, _ = s.accept(); n = len(c.recv(1)); t = time.perf_counter()\n"
        "while b := c.recv(1 << 20): n += len(b)\n"
        "print(n, time.perf_counter() - t)"
    )
    command = host.command(sys.executable, "-c", code, host.address)
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        port = server.stdout.readline().strip()
        subprocess.run(sender.command(sys.executable, "-c", SOURCE.format(count), host.address, port), check=True)
        number, seconds = server.stdout.readline().split()
    return int(number), float(seconds)


def limit(host, megabits):
    """Set a host's rate from outside of it."""
    code = "import sys; from bench.lab.hosts import Link; Link(sys.argv[1]).limit(int(sys.argv[2]))"
    subprocess.run(host.command(sys.executable, "-c", code, host.device, str(megabits)), check=True, cwd=ROOT)


@needs_hosts
@pytest.mark.parametrize("count", [2, 3])
def test_a_link_is_not_faster_than_its_rate_whoever_is_at_the_other_end(count):
    size, megabits = 1_000_000, 50
    assert lab.burst(megabits) < size / 10
    with lab.hosts(count) as made:
        limit(made[-1], megabits)
        for other in made[:-1]:
            number, seconds = received(other, made[-1], size)
            assert number == size
            assert seconds >= (size - lab.burst(megabits)) * 8 / (megabits * 1e6)
        # Nobody else is limited.
        assert received(made[-1], made[0], size)[0] == size


@needs_hosts
def test_nothing_stays_after_an_error():
    with contextlib.suppress(KeyboardInterrupt), lab.hosts(3) as made:
        assert {host.space for host in made} < spaces()  # and the switch
        raise KeyboardInterrupt
    assert not spaces()


TOLD = """
import os, sys, pathlib, torch, torch.distributed as dist
from bench.lab.hosts import Link
dist.init_process_group("gloo")
link = Link(sys.argv[-1])
before = link.sent()
x = torch.ones(250_000)
dist.all_reduce(x)
dist.barrier()
names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "GROUP_RANK", "LOCAL_WORLD_SIZE")
told = [os.environ[name] for name in names] + [str(link.sent() - before), str(x[0].item())]
pathlib.Path(__file__).with_name("rank" + told[0]).write_text(" ".join(told))
dist.barrier()
"""
SLEEPY = """
import os, pathlib, sys, time
if os.environ["RANK"] == "1":
    sys.exit({code}) if {code} else pathlib.Path(__file__).with_name("there").write_text("yes")
time.sleep(600)
"""


@pytest.fixture
def module(tmp_path, monkeypatch):
    """Lets ``python -m job`` run a text."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), str(ROOT)]))
    return tmp_path / "job.py"


@needs_hosts
def test_ranks_find_their_places_and_the_wire_counts_what_they_say(module):
    module.write_text(TOLD)
    lab.run_on_hosts(["job"], count=2, ranks=1)
    for rank in range(2):
        *place, sent, value = module.with_name(f"rank{rank}").read_text().split()
        assert place == [str(rank), "2", "0", str(rank), "1"]
        assert 1_000_000 < int(sent) < 1_200_000  # a ring of two sends as much as it averages, and headers
        assert float(value) == 2


@needs_hosts
def test_a_rank_that_fails_ends_the_others(module):
    module.write_text(SLEEPY.format(code=7))
    with pytest.raises(lab.RankError, match="rank 1 failed with exit code 7"):
        lab.run_on_hosts(["job"], count=2, ranks=1)
    assert not spaces()


@needs_hosts
@pytest.mark.parametrize("ending", [signal.SIGTERM, signal.SIGINT])
def test_nothing_stays_after_a_signal(module, ending):
    module.write_text(SLEEPY.format(code=0))
    # Where the tests run in the background, SIGINT is ignored, and processes inherit that.
    heard = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"
    code = f"{heard}; from bench.lab.hosts import run_on_hosts; run_on_hosts(['job'], count=3)"
    with subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stderr=subprocess.DEVNULL) as process:
        while not module.with_name("there").exists():
            assert process.poll() is None
            os.sched_yield()
        ranks = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        assert len(spaces(process.pid)) == 4
        process.send_signal(ending)
        assert process.wait() == (143 if ending == signal.SIGTERM else -signal.SIGINT)
    assert len(ranks) == 3
    assert not any(Path(f"/proc/{rank}").exists() for rank in ranks)
    assert not spaces(process.pid)


@pytest.mark.parametrize(
    ("hidden", "message"),
    [("root", "need root"), ("tools", r"need ip and tc \(iproute2\)"), ("kernel", "need Linux")],
)
def test_where_it_cannot_run_it_says_so_in_one_line(monkeypatch, capsys, tmp_path, hidden, message):
    monkeypatch.setattr(os, "geteuid", lambda: 1000 if hidden == "root" else 0)
    monkeypatch.setattr(lab.shutil, "which", lambda tool: None if hidden == "tools" else tool)
    monkeypatch.setattr(sys, "platform", "darwin" if hidden == "kernel" else "linux")
    monkeypatch.setattr(sys, "argv", ["lab", "--out", str(tmp_path)])
    with pytest.raises(SystemExit) as ended:
        lab.refusing(command.main)
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert re.search(message, line)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("count", [0, 1, lab.MOST + 1])
def test_so_many_hosts_are_refused(count):
    with pytest.raises(lab.HostsError, match=f"is {count}; allowed is 2 to"), lab.hosts(count):
        raise AssertionError
