"""One rank of the self-test of ``distopt doctor``: laws that a trainer relies on, between real processes.

``python -m distopt.commands.selftest RANK WORLD FOLDER BACKEND``; the first rank prints a line of JSON for each check.
"""

import faulthandler
import json
import statistics
import sys
import time
from collections.abc import Callable, Generator, Sequence
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from distopt.attach.register import register
from distopt.reducers.allreduce import AllReduce
from distopt.reducers.powersgd import PowerSGD

SECONDS = 45
"""After which a rank that is still at it shows its stack and ends."""
_LARGE = 16 * 2**20
_CLOSE = 1e-5


class Check:
    """One check at work. Trouble is noted, not raised: a rank that stopped half way would leave the others waiting.

    Args:
        device: of the models.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.trouble: list[str] = []

    def that(self, fine: bool, otherwise: str) -> None:
        """Note ``otherwise`` unless ``fine``."""
        if not fine:
            self.trouble.append(otherwise)


def main() -> None:
    """Join the other ranks and run every check, in one order on all of them."""
    rank, world, folder, backend = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), sys.argv[4]
    faulthandler.dump_traceback_later(SECONDS, exit=True)
    torch.set_num_threads(1)
    device = torch.device("cpu")
    if backend == "nccl":
        device = torch.device("cuda", rank)
        torch.cuda.set_device(device)
    began = time.monotonic()
    store = dist.FileStore(str(folder / "store"), world)  # pyright: ignore[reportPrivateImportUsage]
    dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=timedelta(seconds=SECONDS))
    dist.barrier()
    _tell("meeting", f"{world} processes over {backend} in {time.monotonic() - began:.1f} s")
    run_checks(device)
    dist.barrier()
    dist.destroy_process_group()


def run_checks(device: torch.device) -> None:
    """Run every check in the process group that is there; the first rank prints what was found."""
    for name, check in CHECKS.items():
        at_work = Check(device)
        said = check(at_work)
        _tell(name, said, at_work.trouble)


def _tell(name: str, said: str, trouble: Sequence[str] = ()) -> None:
    """Let the first rank print what was found: the trouble of the lowest rank that has any."""
    of_all: list[Sequence[str]] = [[]] * dist.get_world_size()
    dist.all_gather_object(of_all, trouble)
    words = [f"rank {rank}: {each[0]}" for rank, each in enumerate(of_all) if each]
    if dist.get_rank() == 0:
        print(json.dumps([name, not words, words[0] if words else said]), flush=True)


def _link(check: Check) -> str:
    """Times all-reduces of a few bytes and of many."""

    def seconds(count: int, times: int) -> float:
        data, taken = torch.zeros(count, device=check.device), list[float]()
        for _ in range(times):
            began = time.perf_counter()
            dist.all_reduce(data)
            data[0].item()  # on a GPU, the wait
            taken.append(time.perf_counter() - began)
        return statistics.median(taken)

    small, large = seconds(1, 50), seconds(_LARGE // 4, 7)
    return f"an all-reduce of 4 bytes takes {1e6 * small:.0f} us, of 16 MiB {1e3 * large:.0f} ms"


def _plain(check: Check) -> str:
    """`AllReduce` is plain DDP, bit for bit."""
    plain, hooked = _model(check.device), _model(check.device)
    register(hooked, AllReduce())
    for step in range(3):
        for model in (plain, hooked):
            _backward(model, step)
            _descend(model)
    same = all(torch.equal(one, other) for one, other in _pairs(plain, hooked))
    check.that(same, "parameters differ from plain DDP's")
    return "AllReduce: parameters of three steps are plain DDP's, bit for bit"


def _compressed(check: Check) -> str:
    """PowerSGD loses nothing, and gives all ranks the same."""
    model = _model(check.device)
    registration = register(model, PowerSGD(rank=2, min_saving=0.1))
    fed = {name: torch.zeros_like(parameter) for name, parameter in model.module.named_parameters()}
    delivered = {name: torch.zeros_like(parameter) for name, parameter in fed.items()}
    for step in range(4):
        for name, gradient in _alone(model, step).items():
            fed[name] += gradient
        _backward(model, step)
        for name, parameter in model.module.named_parameters():
            check.that(_is_first_ranks(_gradient(parameter)), f"{name}: ranks have different gradients after averaging")
            delivered[name] += _gradient(parameter)
    for name, kept in registration.own_residuals().items():
        lost = _mean(fed[name] - kept["values"].view_as(fed[name])) - delivered[name]
        part = float(lost.norm() / delivered[name].norm())
        check.that(part <= _CLOSE, f"{name}: {part:.1e} of the gradient is lost")
    saving = registration.stats().saving
    return f"PowerSGD: gradients are equal on all ranks, and what is not sent is kept; {saving:.0%} of the bytes saved"


def _exact(check: Check) -> str:
    """PowerSGD of full rank is the average."""
    plain, hooked = _model(check.device), _model(check.device)
    register(hooked, PowerSGD(rank=64, min_saving=-10.0))
    for step in range(2):
        for model in (plain, hooked):
            _backward(model, step)
        for (name, one), other in zip(plain.module.named_parameters(), hooked.module.parameters(), strict=True):
            error = float((_gradient(one) - _gradient(other)).norm() / _gradient(one).norm())
            check.that(error <= _CLOSE, f"{name}: of full rank, but off by {error:.1e}")
    return "PowerSGD of full rank is the exact average"


def _not_finite(check: Check) -> str:
    """A NaN on one rank is one skipped step on all."""
    model, control = _model(check.device), _model(check.device)
    registration, _ = [register(each, PowerSGD(rank=2, min_saving=0.1)) for each in (model, control)]
    for each in (model, control):
        _backward(each, 0)
    _backward(model, 1, spoiled=dist.get_rank() == dist.get_world_size() - 1)
    spoiled = all(_gradient(parameter).isnan().all() for parameter in model.module.parameters())
    check.that(spoiled, "a step with a NaN on one rank is not skipped on all")
    skipped = registration.stats().skipped_steps
    check.that(skipped == 1, f"{skipped} steps are counted as skipped, where 1 was")
    for each in (model, control):
        _backward(each, 2)
    check.that(_same_gradients(model, control), "the step after a skipped one is not as if it had not been")
    return "a NaN on one rank is one skipped step on all ranks; the next is as if it had not been"


def _state(check: Check) -> str:
    """What is saved goes on."""
    model, resumed = _model(check.device), _model(check.device)
    registration = register(model, PowerSGD(rank=2, min_saving=0.1))
    for step in range(3):
        _backward(model, step)
    state = registration.state_dict()
    other = register(resumed, PowerSGD(rank=2, min_saving=0.1))
    other.load_state_dict(state)
    for each in (model, resumed):
        _backward(each, 3)
    check.that(_same_gradients(model, resumed), "gradients differ after loading")
    return "state saved and loaded goes on, bit for bit"


CHECKS: dict[str, Callable[[Check], str]] = {
    "link": _link,
    "plain": _plain,
    "compressed": _compressed,
    "exact": _exact,
    "not finite": _not_finite,
    "state": _state,
}


def _model(device: torch.device) -> DistributedDataParallel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(48, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 8))
    return DistributedDataParallel(model.to(device), device_ids=[device.index] if device.type == "cuda" else None)


def _loss(model: nn.Module, step: int, device: torch.device) -> Tensor:
    generator = torch.Generator().manual_seed(1000 * step + dist.get_rank())
    inputs, targets = torch.randn(16, 48, generator=generator), torch.randn(16, 8, generator=generator)
    return F.mse_loss(model(inputs.to(device)), targets.to(device))


def _backward(model: DistributedDataParallel, step: int, *, spoiled: bool = False) -> None:
    model.zero_grad()
    loss = _loss(model, step, next(model.parameters()).device)
    (loss * torch.nan if spoiled else loss).backward()


def _alone(model: DistributedDataParallel, step: int) -> dict[str, Tensor]:
    """This rank's own gradients of a step, by name."""
    loss = _loss(model.module, step, next(model.parameters()).device)
    names, parameters = zip(*model.module.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))


@torch.no_grad()
def _descend(model: DistributedDataParallel) -> None:
    for parameter in model.parameters():
        parameter.sub_(0.1 * _gradient(parameter))


def _gradient(parameter: nn.Parameter) -> Tensor:
    assert parameter.grad is not None
    return parameter.grad


def _mean(tensor: Tensor) -> Tensor:
    total = tensor.clone()
    dist.all_reduce(total)
    return total / dist.get_world_size()


def _is_first_ranks(tensor: Tensor) -> bool:
    first = tensor.clone()
    dist.broadcast(first, 0)
    return torch.equal(first, tensor)


def _pairs(
    one: DistributedDataParallel, other: DistributedDataParallel
) -> Generator[tuple[nn.Parameter, nn.Parameter]]:
    yield from zip(one.module.parameters(), other.module.parameters(), strict=True)


def _same_gradients(one: DistributedDataParallel, other: DistributedDataParallel) -> bool:
    return all(torch.equal(_gradient(a), _gradient(b)) for a, b in _pairs(one, other))


if __name__ == "__main__":
    main()
