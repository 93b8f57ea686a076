"""Beside torchft: compressed averages inside a replica group, torchft's manager between the groups. No adapter is needed."""

from datetime import timedelta

import pytest
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel as DDP

import distopt
from distopt.errors import RegistrationError
from tests.integrations.adapters.plain import REDUCER, Net, batches, loss_of, optimizer_of, same, values
from tests.processes import run_ranks

pytestmark = pytest.mark.timeout(300)
"""Four processes load torchft, on a machine that may have two cores."""
STEPS = 4


def manager_of(group, member, members):
    """The manager of this rank; the first one keeps the lighthouse, the first of each group its store."""
    import torchft
    from torchft._torchft import LighthouseServer

    store = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False) if member == 0 else None
    lighthouse = LighthouseServer(bind="[::]:0", min_replicas=2) if group == member == 0 else None
    told = [None] * dist.get_world_size()
    dist.all_gather_object(told, (store and store.port, lighthouse and lighthouse.address()))
    manager = torchft.Manager(
        pg=torchft.ProcessGroupGloo(timeout=timedelta(seconds=60)), load_state_dict=None, state_dict=None, min_replica_size=2,
        init_sync=False, timeout=timedelta(seconds=60), rank=member, world_size=members, store_addr="localhost",
        store_port=told[group * members][0], lighthouse_addr=told[0][1], replica_id=f"group_{group}",
    )  # fmt: skip
    return manager, (store, lighthouse)


def trained(rank, process_group, average, wrapped, guarded=lambda optimizer: optimizer):
    """Parameters after a few steps, and figures: the group's average compressed, then what ``average`` does to a gradient."""
    net = Net()
    model = DDP(net, process_group=process_group) if wrapped else net
    given = model if wrapped else net.named_parameters()
    hook = distopt.register(given, REDUCER, process_group=process_group)
    optimizer = guarded(optimizer_of(net))
    for batch in batches(rank, STEPS):
        optimizer.zero_grad()
        loss_of(model, batch).backward()
        if not wrapped:
            hook.reduce()
        for parameter in net.parameters():
            average(parameter.grad)
        optimizer.step()
    return values(net), hook.stats()


def refusal(*args, **options):
    with pytest.raises(RegistrationError) as caught:
        distopt.register(*args, **options)
    return str(caught.value)


def job(rank):
    import torchft

    group, member = divmod(rank, 2)
    inside = [dist.new_group([0, 1]), dist.new_group([2, 3])][group]
    across = [dist.new_group([0, 2]), dist.new_group([1, 3])][member]
    manager, servers = manager_of(group, member, 2)

    def by_hand(gradient):
        dist.all_reduce(gradient, group=across)
        gradient /= 2

    def by_manager(gradient):
        manager.allreduce(gradient).wait()

    def guarded(optimizer):
        return torchft.Optimizer(manager, optimizer)

    found = {}
    for name in ("DDP", "parameters"):
        expected, stats = trained(rank, inside, by_hand, name == "DDP")
        ended, told = trained(rank, inside, by_manager, name == "DDP", guarded)
        found[name] = same(ended, expected) and told == stats
        found["saving"] = told.saving
    found["committed"] = manager.current_step()
    found["its DDP"] = refusal(torchft.DistributedDataParallel(manager, Net()), REDUCER)
    found["its group"] = refusal(Net().named_parameters(), REDUCER, process_group=torchft.ProcessGroupGloo())
    dist.barrier()
    manager.shutdown(wait=False)
    del servers  # which had to stay until here
    return found


@pytest.fixture(scope="module")
def found():
    pytest.importorskip("torchft", reason="there are wheels for Linux on x86-64 only")
    return run_ranks(4, job, timeout=280)


@pytest.mark.parametrize("law", ["DDP", "parameters"])
def test_equals_averages_by_hand(found, law):
    assert [rank[law] for rank in found] == [True] * 4


def test_was_compressed_and_committed(found):
    assert [rank["committed"] for rank in found] == [2 * STEPS] * 4
    assert all(rank["saving"] > 0.7 for rank in found)


def test_between_replica_groups_is_refused(found):
    """Their members come and go, and factors and residuals belong to a fixed group."""
    for rank in found:
        assert rank["its DDP"].startswith("torch.distributed does not know the ProcessGroupDummy to average over")
        assert rank["its group"].startswith("torch.distributed does not know the ProcessGroupGloo to average over")
