"""Completion: the script that a command prints, in a real bash; and what it costs who does not use it."""

import importlib
import shutil
import subprocess
import sys

import pytest

from distopt.commands.main import main, make_parser

pytest.importorskip("shtab")
BASH = shutil.which("bash")
INTEGRATIONS = ("dalle", "recipes", "tokenizers", "biggan")


def completed(script, *words, folder="."):
    """What bash offers when TAB is hit at the end of the last word."""
    asked = " ".join(f"'{word}'" for word in words)
    test = (
        f'source "$1"; COMP_WORDS=({asked}); COMP_CWORD={len(words) - 1}; COMP_TYPE=9; COMP_LINE="${{COMP_WORDS[*]}}";'
        f"COMP_POINT=${{#COMP_LINE}}; found=$(complete -p {words[0]}); found=${{found##*-F }}; ${{found%% *}}"
        f' {words[0]} "{words[-1]}" "{words[-2]}"; printf "%s\\n" "${{COMPREPLY[@]}}"'
    )
    done = subprocess.run(
        [BASH, "--norc", "-c", test, "bash", script], capture_output=True, text=True, timeout=30, cwd=folder
    )
    assert not done.stderr
    return sorted(word.strip() for word in done.stdout.split("\n") if word)


@pytest.fixture(scope="module")
def scripts(tmp_path_factory):
    """The scripts of all commands, as a user would write them to files."""
    folder, written = tmp_path_factory.mktemp("completion"), {}
    mains = {"distopt": main}
    mains |= {
        f"distopt-{name}": importlib.import_module(f"distopt.integrations.{name}.cli").main for name in INTEGRATIONS
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, run in mains.items():
            with (folder / name).open("w") as stream:
                patch.setattr(sys, "stdout", stream)
                assert run(["--print-completion", "bash"]) == 0
            written[name] = folder / name
    return written


@pytest.mark.skipif(BASH is None, reason="needs a bash")
@pytest.mark.parametrize(
    ("words", "offered"),
    [
        (("distopt", "re"), ["report"]),
        (("distopt", ""), ["doctor", "plan", "report"]),
        (("distopt", "doctor", "--no"), ["--no-self-test"]),
        (("distopt", "doctor", "--backend", ""), ["gloo", "nccl"]),
        (("distopt-dalle", "sa"), ["sample"]),
        (("distopt-dalle", "train", "--stage1.bo"), ["--stage1.bottleneck"]),
        (("distopt-recipes", "ba"), ["bags"]),
        (("distopt-tokenizers", "com"), ["compare"]),
        (("distopt-biggan", "train", "--dev"), ["--device"]),
    ],
)
def test_bash_completes(scripts, words, offered):
    assert completed(scripts[words[0]], *words) == offered


@pytest.mark.skipif(BASH is None, reason="needs a bash")
def test_bash_completes_files(scripts, tmp_path):
    (tmp_path / "runs").mkdir()
    assert completed(scripts["distopt"], "distopt", "report", "ru", folder=tmp_path) == ["runs"]


@pytest.mark.parametrize("shell", ["zsh", "fish", "tcsh"])
def test_other_shells_have_scripts(shell, capsys):
    assert main(["--print-completion", shell]) == 0
    assert "report" in capsys.readouterr().out


def test_a_shell_that_is_not_known_is_refused(capsys):
    assert main(["--print-completion", "cmd.exe"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("distopt: error: argument --print-completion: invalid choice: 'cmd.exe'")
    assert said.count("\n") == 1


def test_shtab_that_is_missing_is_told(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "shtab", None)
    assert main(["--print-completion", "bash"]) == 2
    assert capsys.readouterr().err == "distopt: error: shtab is missing: pip install 'distopt[completion]'\n"


def test_who_does_not_ask_for_it_does_not_load_it():
    code = (
        "import sys; from distopt.commands.main import main; main(['report', '/there/is/none']);"
        "assert not {'shtab', 'argcomplete', 'torch', 'tensorboard'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=100, capture_output=True)


def test_the_parser_is_that_of_the_command():
    assert make_parser().prog == "distopt"
