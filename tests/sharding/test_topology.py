"""Which ranks are on one node: laws of the picture that all ranks get, and shards that follow it without a mesh."""

import os

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed.device_mesh import DeviceMesh

import distopt
from distopt.sharding.topology import Place, place_of, rows_of
from tests.processes import run_ranks
from tests.sharding.models import Model, train, whole, worst


@st.composite
def clusters(draw):
    """The node of each rank, with as many ranks on every node, handed out in some order."""
    nodes, each = draw(st.integers(1, 5)), draw(st.integers(1, 6))
    return draw(st.permutations([node for node in range(nodes) for _ in range(each)]))


def torchrun(rank, placed):
    """What ``torchrun`` tells a rank."""
    here = placed[rank]
    told = {"RANK": rank, "WORLD_SIZE": len(placed), "GROUP_RANK": here, "LOCAL_WORLD_SIZE": placed.count(here)}
    return {name: str(value) for name, value in told.items()}


def slurm(rank, placed):
    """What ``srun`` tells a rank."""
    told = {"SLURM_PROCID": rank, "SLURM_NTASKS": len(placed), "SLURM_NODEID": placed[rank]}
    return {name: str(value) for name, value in told.items()}


def places(placed, *launchers, hosts=None, **more):
    """The places of all ranks, each under all of the launchers."""
    return [
        place_of(
            rank,
            len(placed),
            {name: value for launcher in launchers for name, value in launcher(rank, placed).items()} | more,
            (hosts or [f"host{node}" for node in placed])[rank],
        )
        for rank in range(len(placed))
    ]


@pytest.mark.parametrize("launchers", [(), (torchrun,), (slurm,)], ids=["hosts", "torchrun", "slurm"])
@given(placed=clusters())
def test_a_row_is_a_node_however_ranks_are_handed_out(launchers, placed):
    rows = rows_of(places(placed, *launchers))
    assert sorted(rank for row in rows for rank in row) == list(range(len(placed)))
    assert all(row == [rank for rank in range(len(placed)) if placed[rank] == placed[row[0]]] for row in rows)
    assert [row[0] for row in rows] == sorted(row[0] for row in rows)


@given(placed=clusters(), data=st.data())
def test_as_many_shards_as_asked_for_stay_on_one_node_where_they_fit(placed, data):
    count = data.draw(st.sampled_from([n for n in range(1, len(placed) + 1) if len(placed) % n == 0]))
    rows = rows_of(places(placed, torchrun, DISTOPT_SHARDS=str(count)))
    assert {len(row) for row in rows} == {count}
    assert sorted(rank for row in rows for rank in row) == list(range(len(placed)))
    each = placed.count(placed[0])
    for row in rows:
        on = {placed[rank] for rank in row}
        assert len(on) == 1 or each % count != 0
        assert count % each != 0 or len(on) == count // each


@given(placed=clusters())
def test_torchrun_comes_before_slurm_and_slurm_before_host_names(placed):
    """Agents in one Slurm job, and several on one host."""
    plain = rows_of(places(placed))
    one_host = ["host"] * len(placed)
    assert rows_of(places(placed, slurm, hosts=one_host)) == plain
    others = [0] * len(placed)
    assert rows_of(places(placed, lambda rank, _: slurm(rank, others), torchrun, hosts=one_host)) == plain


@pytest.mark.parametrize(
    "inherited",
    [
        {"RANK": "0", "WORLD_SIZE": "1", "GROUP_RANK": "0", "LOCAL_WORLD_SIZE": "1"},
        {"SLURM_PROCID": "0", "SLURM_NTASKS": "1", "SLURM_NODEID": "0"},
        {"GROUP_RANK": "0"},
    ],
)
def test_a_launcher_that_started_other_processes_says_nothing(inherited):
    """One task a node, which starts the ranks of the node itself."""
    assert rows_of([place_of(rank, 4, inherited, f"host{rank // 2}") for rank in range(4)]) == [[0, 1], [2, 3]]


@pytest.mark.parametrize(
    ("found", "message"),
    [
        (
            places([0, 0, 0, 1], torchrun),
            "mesh is None, but must be given, or DISTOPT_SHARDS set to a divisor of all 4 ranks: by GROUP_RANK, node 1 has "
            "1 and node 0 has 3",
        ),
        (
            [Place("GROUP_RANK", node, size) for node, size in (("0", "2"), ("0", "2"), ("1", "4"), ("1", "4"))],
            "mesh is None, but must be given, or DISTOPT_SHARDS set to a divisor of all 4 ranks: LOCAL_WORLD_SIZE is 4 "
            "where GROUP_RANK 1 has 2",
        ),
        (
            [Place("host name", "a"), Place("host name", "b"), Place("GROUP_RANK", "0")],
            "setting 'the source of nodes' differs: rank 2 has GROUP_RANK where ranks 0, 1 have host name",
        ),
        (
            [Place("host name", "a", asked=("DISTOPT_SHARDS", n)) for n in "221"],
            "setting 'DISTOPT_SHARDS' differs: rank 2 has 1 where ranks 0, 1 have 2",
        ),
        *(
            (
                places([0, 0, 1, 1], torchrun, DISTOPT_SHARDS=bad),
                f"DISTOPT_SHARDS is '{bad}', but must be a number that",
            )
            for bad in ("", "0", "3", "8", "-2", "two", "²")
        ),
    ],
)
def test_an_unclear_picture_is_one_line_that_says_what_to_give(found, message):
    with pytest.raises(distopt.DistoptError) as caught:
        rows_of(found)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


def test_what_is_asked_for_by_argument_wins():
    found = [place_of(rank, 4, {"DISTOPT_SHARDS": "4"}, "host", 2) for rank in range(4)]
    assert rows_of(found) == [[0, 1], [2, 3]]
    with pytest.raises(distopt.SettingError, match=r"shards is '2.0', but must be a number that divides all 4 ranks"):
        rows_of([place_of(rank, 4, {}, "host", 2.0) for rank in range(4)])


def test_uneven_nodes_go_with_a_number_of_shards():
    assert rows_of(places([1, 0, 1, 1, 0, 1], DISTOPT_SHARDS="2")) == [[0, 2], [3, 5], [1, 4]]


def sharded(rank, mesh=None):
    model = Model()
    registration = distopt.shard(model, "blocks.?", mesh=mesh, reducer=distopt.PowerSGD(rank=2))
    engine = registration._engine
    train(model, rank, 2)
    return whole(model), sorted(engine.shards.communicator.ranks), sorted(engine.communicator.ranks)


def job(rank):
    """Without a mesh, on two nodes whose ranks are dealt out in turn; then with the mesh that this should be."""
    os.environ.update(slurm(rank, [0, 1, 0, 1]))
    found, *groups = sharded(rank)
    given, *_ = sharded(rank, DeviceMesh("cpu", torch.tensor([[0, 2], [1, 3]]), mesh_dim_names=("replica", "shard")))
    assert worst(found, given) == 0.0
    os.environ["DISTOPT_SHARDS"] = "4"
    assert distopt.node_mesh().mesh.tolist() == [[0, 2, 1, 3]]
    assert distopt.node_mesh(shards=1).mesh.tolist() == [[0], [2], [1], [3]]
    os.environ["DISTOPT_SHARDS"] = "4" if rank else "3"
    with pytest.raises(distopt.AgreementError, match="rank 0 has 3 where ranks 1, 2, 3 have 4"):
        distopt.shard(Model(), "blocks.?")
    return groups


def test_without_a_mesh_replicas_are_nodes_and_shards_their_ranks():
    assert run_ranks(4, job) == [[[0, 2], [0, 1]], [[1, 3], [0, 1]], [[0, 2], [2, 3]], [[1, 3], [2, 3]]]


def test_a_mesh_of_nodes_needs_a_world():
    assert not dist.is_initialized()
    with pytest.raises(distopt.RegistrationError, match="call init_process_group before node_mesh"):
        distopt.node_mesh()
