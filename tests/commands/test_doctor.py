"""``distopt doctor``: well where all is well, and a fault by name where a law does not hold."""

import contextlib
import io
import json
import re
import subprocess
import sys

import pytest
import torch

import distopt
from distopt.attach import ddp
from distopt.commands import doctor, selftest
from distopt.commands.main import main
from tests.processes import run_ranks


@pytest.mark.timeout(120)
def test_all_is_well_here(capsys):
    assert main(["doctor"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("ok    versions    distopt ")
    assert lines[-1] == "all is well: distopt's hooks can run here"
    found = {line[6:18].strip(): line[:6].strip() for line in lines[:-1]}
    assert {name: found[name] for name in ("meeting", *selftest.CHECKS)} == dict.fromkeys(
        ("meeting", *selftest.CHECKS), "ok"
    )


def test_ranks_that_cannot_meet_are_a_fault(monkeypatch, capsys):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "nowhere0")
    assert main(["doctor"]) == 1
    text = capsys.readouterr().out
    assert "FAULT network     GLOO_SOCKET_IFNAME is nowhere0; there is no nowhere0, but lo" in text
    assert re.search(r"FAULT self-test   rank [01] failed: ", text)
    assert text.endswith("do not work\n")


def test_processes_that_hang_are_a_fault(monkeypatch):
    monkeypatch.setattr(doctor, "_PATIENCE", 0.2)
    sleeper = [sys.executable, "-c", "import time; time.sleep(60)"]
    monkeypatch.setattr(
        doctor,
        "_start",
        lambda *_: subprocess.Popen(sleeper, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True),
    )
    said = [str(finding) for finding in doctor.self_test(2, "gloo")]
    assert said == [f"FAULT self-test   rank {rank} has not ended after 0.2 s" for rank in range(2)]


def test_looking_starts_nothing(monkeypatch, capsys):
    monkeypatch.setattr(doctor, "_start", lambda *_: pytest.fail("a process was started"))
    assert main(["doctor", "--no-self-test"]) == 0
    assert "meeting" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--ranks", "1"], "--ranks is 1, but must be a whole number from 2 to 8"),
        (["--backend", "mpi"], "argument --backend: invalid choice"),
        (["--backend", "nccl"], "--backend is 'nccl', but must be gloo: 2 ranks need a CUDA device each"),
    ],
)
def test_what_it_refuses(arguments, words, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert main(["doctor", *arguments]) == 2
    told = capsys.readouterr()
    assert told.err.startswith(f"distopt: error: {words}") or told.err.startswith(f"distopt doctor: error: {words}")
    assert told.out == ""


@pytest.mark.parametrize(
    ("version", "state"), [("2.11.0", "ok"), ("2.13.1+cu130", "ok"), ("2.14.0a0", "note"), ("2.4.1", "note")]
)
def test_versions_that_are_tested(version, state, monkeypatch):
    monkeypatch.setattr(torch, "__version__", version)
    assert doctor._versions().state == state


def _halved(*given, **options):
    made = distopt.PowerSGD(*given, **options)
    return distopt.Quantize(bits=4) if made.rank == 64 else made


def _forgetful(model, reducer):
    registration = distopt.register(model, reducer)
    return _Forgetful(registration)


class _Forgetful:
    """A registration whose residuals and state are lost."""

    def __init__(self, registration):
        self._of = registration

    def __getattr__(self, name):
        return getattr(self._of, name)

    def own_residuals(self):
        kept = self._of.own_residuals()
        return {name: {"values": torch.zeros_like(each["values"])} for name, each in kept.items()}

    def load_state_dict(self, state):
        pass


BREAKS = {
    "plain": (selftest, "AllReduce", lambda: distopt.Cast(torch.bfloat16)),
    "exact": (selftest, "PowerSGD", _halved),
    "compressed": (selftest, "register", _forgetful),
    "state": (selftest, "register", _forgetful),
    "not finite": (ddp, "spoil", lambda *_: None),
}


def _found(rank):
    """What the checks of this process find, by the law that is broken meanwhile."""
    found = {}
    for law, (place, name, broken) in BREAKS.items():
        with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as out:
            patch.setattr(place, name, broken)
            selftest.run_checks(torch.device("cpu"))
        found[law] = [json.loads(line) for line in out.getvalue().splitlines()]
    return found


def test_a_law_that_does_not_hold_is_found():
    first, second = run_ranks(2, _found)
    assert not any(second.values())
    for law, lines in first.items():
        faults = {name: said for name, fine, said in lines if not fine}
        assert faults[law].startswith("rank ")
        assert set(faults) <= {law, "compressed", "state"}
