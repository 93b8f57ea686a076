"""Ranks: how they start, meet and end."""

import os
import signal
import subprocess
import sys
import textwrap
import threading
import time

import pytest
from distopt.integrations.running import launch
from distopt.integrations.running.fields import InputError
from distopt.integrations.running.launch import Place, place
from hypothesis import given
from hypothesis import strategies as st

TASK = """
    import sys
    import torch.distributed as dist
    from distopt.errors import DistoptError
    from distopt.integrations.running import launch, ranks

    def task(device):
        import torch
        assert torch.get_num_threads() == 1
        total = torch.tensor(float(where.rank + 1))
        dist.all_reduce(total)
        assert total.item() == 3.0
        if sys.argv[1] == "raise" and where.rank == 1:
            raise RuntimeError("the second rank\\nis unwell")
        if sys.argv[1] == "refuse":
            raise DistoptError("size is 3, but must be 4")
        if sys.argv[1] == "raise":
            dist.all_reduce(total)

    where = launch.place()
    sys.exit(ranks.work(launch.Command("distopt-task", __name__), where, "cpu", task))
"""


@pytest.fixture
def module(tmp_path, monkeypatch):
    """Writes a module that ranks can run, and gives the command that runs it."""
    monkeypatch.syspath_prepend(tmp_path)

    def write(source):
        (tmp_path / "rank_task.py").write_text(textwrap.dedent(source))
        return launch.Command("distopt-task", "rank_task")

    return write


@given(st.integers(1, 64), st.data())
def test_the_place_is_read_from_the_environment(world_size, data):
    rank = data.draw(st.integers(0, world_size - 1))
    environment = {"RANK": str(rank), "WORLD_SIZE": str(world_size), "LOCAL_RANK": "0"}
    assert place(environment) == Place(rank, world_size, 0)


@pytest.mark.parametrize("missing", ["RANK", "WORLD_SIZE", "LOCAL_RANK"])
def test_without_all_three_variables_nobody_gave_a_place(missing):
    environment = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
    del environment[missing]
    assert place(environment) is None


@pytest.mark.parametrize(
    "values", [("2", "2", "0"), ("-1", "2", "0"), ("x", "2", "0"), ("0", "0", "0"), ("", "1", "0")]
)
def test_an_impossible_place_is_refused(values):
    with pytest.raises(InputError, match="WORLD_SIZE"):
        place(dict(zip(("RANK", "WORLD_SIZE", "LOCAL_RANK"), values, strict=True)))


def test_ranks_meet_and_end_well(module, tmp_path, capfd):
    assert launch.start(module(TASK), ["well"], 2, tmp_path / "error.txt") == 0
    assert capfd.readouterr().err == ""
    assert not (tmp_path / "error.txt").exists()


def test_an_unexpected_error_is_one_line_and_its_traceback_is_kept(module, tmp_path, capfd):
    assert launch.start(module(TASK), ["raise"], 2, tmp_path / "error.txt") == 1
    err = capfd.readouterr().err
    assert "rank 1 failed: RuntimeError: the second rank (traceback in" in err
    assert err.count("distopt-task: error") == 1
    assert 'raise RuntimeError("the second rank' in (tmp_path / "error.txt").read_text()


def test_bad_input_found_by_a_rank_is_one_line_and_exit_code_2(module, tmp_path, capfd):
    assert launch.start(module(TASK), ["refuse"], 2, tmp_path / "error.txt") == 2
    assert capfd.readouterr().err == "distopt-task: error: size is 3, but must be 4\n"


def test_when_a_rank_is_killed_the_others_end_at_once(module, tmp_path, capfd):
    command = module("import os, time\nos.kill(os.getpid(), 9) if os.environ['RANK'] == '1' else time.sleep(60)")
    began = time.monotonic()
    assert launch.start(command, [], 3, tmp_path / "error.txt") == 1
    assert time.monotonic() - began < 10
    assert capfd.readouterr().err == "distopt-task: error: rank 1 was killed by SIGKILL (out of memory?)\n"


def test_a_rank_that_leaves_no_word_is_named_with_its_code(module, tmp_path, capfd):
    command = module("import os, sys, time\nsys.exit(7) if os.environ['RANK'] == '0' else time.sleep(60)")
    assert launch.start(command, [], 2, tmp_path / "error.txt") == 1
    assert capfd.readouterr().err == "distopt-task: error: ended early: rank 0 with exit code 7\n"


def test_ctrl_c_ends_all_ranks(module, tmp_path, capfd):
    pids = [tmp_path / f"pid-{rank}" for rank in range(2)]
    sessions = []
    command = module(
        f"""
        import os, time
        from pathlib import Path
        Path({str(tmp_path)!r}, "pid-" + os.environ["RANK"]).write_text(str(os.getpid()))
        time.sleep(60)
        """
    )

    def interrupt():
        while not all(pid.exists() and pid.read_text() for pid in pids):
            time.sleep(0.02)
        sessions.extend(os.getsid(int(pid.read_text())) for pid in pids)
        os.kill(os.getpid(), signal.SIGINT)

    # A shell starts background jobs with SIGINT ignored.
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    threading.Thread(target=interrupt, daemon=True).start()
    try:
        assert launch.start(command, [], 2, tmp_path / "error.txt") == launch.INTERRUPTED
    finally:
        signal.signal(signal.SIGINT, previous)
    assert capfd.readouterr().err == "distopt-task: interrupted\n"
    # The terminal sends Ctrl-C to a whole session: ranks are in others, or each would print a traceback.
    assert os.getsid(0) not in sessions
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(int(pid.read_text()), 0)


def test_ranks_end_with_a_parent_that_is_killed(module, tmp_path):
    command = module(
        f"""
        import os, threading, time
        from pathlib import Path
        from distopt.integrations.running import ranks
        threading.Thread(target=ranks._end_with_parent, daemon=True).start()
        Path({str(tmp_path)!r}, "pid").write_text(str(os.getpid()))
        time.sleep(60)
        """
    )
    program = (
        "from pathlib import Path; from distopt.integrations.running import launch;"
        f"launch.start(launch.{command!r}, [], 1, Path({str(tmp_path / 'error.txt')!r}))"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    parent = subprocess.Popen([sys.executable, "-c", program], env=environment)
    pid = tmp_path / "pid"
    while not (pid.exists() and pid.read_text()):
        time.sleep(0.02)
    parent.kill()
    parent.wait()
    limit = time.monotonic() + 10
    while time.monotonic() < limit and _runs(int(pid.read_text())):
        time.sleep(0.05)
    assert not _runs(int(pid.read_text()))


def _runs(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    # A process that nobody has waited for yet still has its number.
    stat = f"/proc/{pid}/stat"
    return not (os.path.exists(stat) and open(stat).read().rsplit(")", 1)[1].split()[0] == "Z")


def test_ranks_use_one_thread_unless_the_user_says_otherwise(module, tmp_path, monkeypatch):
    command = module(
        f"""
        import os
        from pathlib import Path
        Path({str(tmp_path)!r}, "threads-" + os.environ["RANK"]).write_text(os.environ["OMP_NUM_THREADS"])
        """
    )
    for given_threads, expected in ((None, "1"), ("3", "3")):
        monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
        if given_threads is not None:
            monkeypatch.setenv("OMP_NUM_THREADS", given_threads)
        assert launch.start(command, [], 2, tmp_path / "error.txt") == 0
        assert [(tmp_path / f"threads-{rank}").read_text() for rank in range(2)] == [expected] * 2
