"""The launch examples: two nodes of two ranks train, save, resume and end together; the manifests say the same."""

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from torch.distributed.run import get_args_parser

pytestmark = pytest.mark.timeout(300)
"""A dozen processes load torch, on a machine that may have two cores."""
ROOT = Path(__file__).parent.parent.parent
LAUNCH = ROOT / "docs/launch"
# Two ranks may write at once, and their lines then follow each other without an end between them: no line is looked for by
# where it begins or ends.
MEMBER = r"rank (\d): (shards \[[\d, ]+\], replicas \[[\d, ]+\])"
MEMBERS = {
    "0": "shards [0, 1], replicas [0, 2]",
    "1": "shards [0, 1], replicas [1, 3]",
    "2": "shards [2, 3], replicas [0, 2]",
    "3": "shards [2, 3], replicas [1, 3]",
}
# Slurm's commands, as far as the script needs them. The first agent is the host of the rendezvous; torchrun orders agents
# by their address, and by their process numbers, which may begin anew, where that is the same.
SCONTROL = "#!/usr/bin/env bash\necho localhost\n"
SRUN = """#!/usr/bin/env bash
[[ $1 == --kill-on-bad-exit=1 ]] || exit 2
shift
export SLURM_NTASKS=2
torchrun=$1
shift
SLURM_PROCID=0 SLURM_NODEID=0 "$torchrun" --local-addr 127.0.0.1 "$@" &
until (: > "/dev/tcp/localhost/$PORT") 2> /dev/null; do kill -0 $! || exit 3; done
SLURM_PROCID=1 SLURM_NODEID=1 "$torchrun" --local-addr 127.0.0.2 "$@" &
echo $! > "$PIDS"
wait
"""


def free_port():
    """One that nobody listens on, in the range of the Slurm script."""
    for port in range(20000 + os.getpid() % 9000, 30000):
        with contextlib.suppress(OSError), socket.socket() as trial:
            trial.bind(("localhost", port))
            return port
    raise AssertionError("no port is free")


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """A folder that both nodes see."""
    return tmp_path_factory.mktemp("launch")


@contextlib.contextmanager
def launched(*command, **variables):
    """A launcher under way, with this checkout and this interpreter; nothing of it stays."""
    launcher = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "DISTOPT_"))}
    path = os.pathsep.join([variables.pop("path", ""), str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = {**launcher, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PATH": path, **variables}
    process = subprocess.Popen(
        list(map(str, command)), cwd=ROOT, env=environment, text=True, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    try:
        yield process
    finally:
        # Ranks are in sessions of their own; their agents end them.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        process.stdout.close()
        process.wait()


def losses(text):
    return {int(step): float(loss) for step, loss in re.findall(r"step (\d+): loss (\d+\.\d{4})", text)}


@pytest.fixture(scope="module")
def trained(shared):
    """What two agents of two ranks print."""
    arguments = ("--steps", 11, "--save-every", 10, "--out", shared / "run")
    with launched(LAUNCH / "two_nodes.sh", *arguments, PORT=str(free_port())) as process:
        text, _ = process.communicate()
    assert process.returncode == 0, text
    return text


def test_each_node_is_its_own_shard_group(trained):
    assert dict(re.findall(MEMBER, trained)) == MEMBERS


def test_nodes_end_with_the_same_parameters_and_have_learnt(trained):
    ends = re.findall(r"rank (\d): 11 steps, saving (\d\.\d\d), pieces ([0-9a-f]{16})", trained)
    pieces = {rank: piece for rank, _, piece in ends}
    assert pieces["0"] == pieces["2"] != pieces["1"] == pieces["3"]
    assert all(float(saving) > 0.5 for _, saving, _ in ends)
    assert losses(trained)[10] < 0.7 * losses(trained)[0]


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="looks for the ranks of an agent in /proc")
def test_a_slurm_job_resumes_and_ends_when_a_node_is_killed(trained, shared):
    commands = shared / "commands"
    commands.mkdir()
    for name, text in {"scontrol": SCONTROL, "srun": SRUN}.items():
        (commands / name).write_text(text)
        (commands / name).chmod(0o755)
    port = free_port()
    variables = {"SLURM_NNODES": "2", "SLURM_GPUS_ON_NODE": "2", "SLURM_JOB_NODELIST": "node[1-2]"}
    variables |= {"SLURM_JOB_ID": str(port), "PORT": str(port), "PIDS": str(shared / "pids"), "path": str(commands)}
    script = ("bash", LAUNCH / "slurm.sbatch", "--steps", 10**6, "--save-every", 10**6, "--out", shared / "run")
    with launched(*script, **variables) as process:
        seen = []
        for line in process.stdout:
            seen.append(line)
            if "step 10:" in line:
                agent = int((shared / "pids").read_text())
                ranks = Path(f"/proc/{agent}/task/{agent}/children").read_text().split()
                for pid in (agent, *map(int, ranks)):
                    os.kill(pid, signal.SIGKILL)
                break
        rest, _ = process.communicate()
    assert losses("".join(seen)) == {10: losses(trained)[10]}, "".join(seen) + rest
    assert dict(re.findall(MEMBER, "".join(seen))) == MEMBERS
    line = re.search(r"rank [01]: ranks? (2|3|2, 3) (is|are) gone, .* connections closed, in .* at step", rest)
    # torchrun may end the ranks before they can say why.
    assert line or "torch/distributed/elastic" in rest, rest


def manifests():
    return list(yaml.safe_load_all((LAUNCH / "kubernetes.yaml").read_text()))


def test_the_kubernetes_job_and_its_service_fit():
    service, job = manifests()
    pod = job["spec"]["template"]["spec"]
    assert (service["kind"], job["kind"], job["spec"]["completionMode"]) == ("Service", "Job", "Indexed")
    assert service["spec"]["selector"] == {"job-name": job["metadata"]["name"]}
    assert pod["subdomain"] == service["metadata"]["name"]
    assert {mount["name"] for mount in pod["containers"][0]["volumeMounts"]} == {v["name"] for v in pod["volumes"]}


@pytest.mark.parametrize("index", [0, 1])
def test_the_kubernetes_job_launches_the_same(index):
    service, job = manifests()
    container = job["spec"]["template"]["spec"]["containers"][0]
    (variable,) = (entry["name"] for entry in container["env"])
    program, *arguments = (word.replace(f"$({variable})", str(index)) for word in container["command"])
    assert program == "torchrun"
    assert not any("$" in word for word in arguments)
    chosen = get_args_parser().parse_args(arguments)
    assert int(chosen.nnodes) == job["spec"]["completions"] == job["spec"]["parallelism"]
    assert int(chosen.nproc_per_node) == container["resources"]["limits"]["nvidia.com/gpu"]
    assert chosen.node_rank == index
    assert chosen.master_addr == f"{job['metadata']['name']}-0.{service['metadata']['name']}"
    assert (LAUNCH / chosen.training_script).exists()
    (out,) = chosen.training_script_args
    assert out.startswith("--out=" + container["volumeMounts"][0]["mountPath"])
