"""The scripts of docs/clients: plain, and with the lines that the page adds, on two ranks each."""

import contextlib
import hashlib
import io
import os
import re
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import distopt
from tests.processes import run_mortals

pytest.importorskip("sklearn")
pytestmark = pytest.mark.timeout(300)
CLIENTS = Path(__file__).parent.parent.parent / "docs/clients"
PAGE = (CLIENTS / "index.md").read_text()
ARGUMENTS = {
    "gpt.py": [
        "--max_iters=30",
        "--eval_interval=30",
        "--eval_iters=2",
        "--gradient_accumulation_steps=4",
        "--n_embd=64",
        "--n_layer=1",
        "--block_size=32",
        "--batch_size=4",
        "--warmup_iters=5",
    ],
    "classifier.py": ["--epochs", "2"],
    "multinode.py": ["4", "2"],
}


def diffs(name):
    """The hunks that the page shows for a file, each as lines before and lines after."""
    section = PAGE[PAGE.index(f"`{name}`:\n") :].split("\n## ")[0]
    for hunk in re.findall(r"```diff\n(.*?)\n```", section, re.DOTALL):
        lines = [line.ljust(1) for line in hunk.split("\n")]
        yield tuple("\n".join(line[1:] for line in lines if line[0] in kinds) for kinds in (" -", " +"))


def changed(name):
    """The file as the page's diffs leave it; every hunk has to fit in one place."""
    text = (CLIENTS / name).read_text()
    for before, after in diffs(name):
        assert text.count(f"\n{before}\n") == 1, before
        text = text.replace(f"\n{before}\n", f"\n{after}\n")
    return text


def run_script(rank, say, folder, program, name, arguments, where):
    """Run a script as torchrun would, and tell what it printed, its weights, and what was saved."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2")
    os.chdir(where)
    sys.argv = [name, *arguments]
    join, register = dist.init_process_group, distopt.register
    models, made = [], []

    def joined(*given, **options):
        join("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)

    class Wrapped(torch.nn.parallel.DistributedDataParallel):
        def __init__(self, *given, **options):
            super().__init__(*given, **options)
            models.append(self)

    def registered(*given, **options):
        made.append(register(*given, **options))
        return made[-1]

    dist.init_process_group = dist.distributed_c10d.init_process_group = joined
    torch.nn.parallel.DistributedDataParallel = Wrapped
    distopt.register = registered
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(compile(program, name, "exec"), {"__name__": "__main__"})
    (model,) = models
    weights = b"".join(p.detach().numpy().tobytes() for p in model.parameters())
    saving = [each.stats().saving for each in made]
    say((printed.getvalue(), hashlib.sha256(weights).hexdigest(), saving))


def trained(name, program, where, arguments=None):
    """What every rank of a script printed, its weights, and its saving, if there is any."""
    fates = run_mortals(
        2, run_script, program, name, ARGUMENTS[name] if arguments is None else arguments, str(where), timeout=190
    )
    for fate in fates:
        assert not fate.error
        assert fate.code == 0
    return [fate.said[0] for fate in fates]


def last(pattern, printed):
    return float(re.findall(pattern, printed)[-1])


MEASURES = {
    "gpt.py": r"val loss ([\d.]+)",
    "classifier.py": r" \* Acc@1 ([\d.]+)",
    "multinode.py": r"loss ([\d.]+)",
}


@pytest.fixture(scope="module", params=ARGUMENTS)
def both(request, tmp_path_factory):
    """A script, what comes of it as it is, and with the page's lines."""
    name = request.param
    plain = trained(name, (CLIENTS / name).read_text(), tmp_path_factory.mktemp("plain"))
    return name, plain, trained(name, changed(name), tmp_path_factory.mktemp("changed"))


# What is learned without the line, at the least; how much worse it may be with it; and what is saved.
LIMITS = {"gpt.py": (3.2, 0.4, 0.65), "classifier.py": (90.0, 12.0, 0.8), "multinode.py": (6.0, 2.5, 0.9)}


def test_it_learns_and_sends_less(both):
    name, plain, ours = both
    limit, worse, saving = LIMITS[name]
    before, after = (last(MEASURES[name], ranks[0][0]) for ranks in (plain, ours))
    sign = 1 if name == "classifier.py" else -1
    assert sign * before > sign * limit
    assert sign * after > sign * before - worse
    assert [each[2] for each in plain] == [[], []]
    assert all(found > saving for each in ours for found in each[2])
    assert all(len(each[2]) == 1 for each in ours)


def test_all_ranks_have_the_same_weights(both):
    for ranks in both[1:]:
        assert ranks[0][1] == ranks[1][1]
    assert both[1][0][1] != both[2][0][1]


def test_a_trainer_that_was_stopped_goes_on(both, tmp_path):
    """With what the reducer has kept back in the snapshot: the same weights as if it had not been stopped."""
    name, _, ours = both
    if name != "multinode.py":
        return
    trained(name, changed(name), tmp_path, ["2", "2"])
    again = trained(name, changed(name), tmp_path)
    assert "[rank 1] goes on from epoch 2" in again[1][0]
    assert [each[1] for each in again] == [each[1] for each in ours]
