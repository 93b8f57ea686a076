"""The laws of running means, and that every rank has the same ones."""

import pytest
import torch
import torch.distributed as dist
from distopt.integrations.tokenizers import bottlenecks, union
from distopt.integrations.tokenizers.ema import EMA
from distopt.integrations.tokenizers.lfq import LFQ
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from tests.processes import run_ranks


def normal(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@given(st.integers(0, 2**31), st.floats(0.0, 0.999), st.sampled_from([0.0, 1e-5, 1e-2]))
def test_an_update_is_the_formula(seed, decay, smoothing):
    ema = EMA(6, 3, decay=decay, smoothing=smoothing, dead=0.0)
    rows = normal(seed, 30, 3)
    counts, sums = ema.counts.double(), ema.sums.double()
    indices = ema(rows.T.reshape(1, 3, 5, 6)).indices.flatten()
    for j in range(6):
        own = rows[indices == j].double()
        counts[j] = decay * counts[j] + (1 - decay) * len(own)
        sums[j] = decay * sums[j] + (1 - decay) * own.sum(0)
    assert torch.allclose(ema.counts.double(), counts, atol=1e-5)
    smoothed = (counts + smoothing) / (counts.sum() + 6 * smoothing) * counts.sum()
    assert torch.allclose(ema.table().double()[smoothed > 1e-6], (sums / smoothed[:, None])[smoothed > 1e-6], atol=1e-3)


def test_codes_become_the_means_of_their_cells():
    ema = EMA(2, 1, decay=0.5, dead=0.0)
    ema.start(torch.tensor([-1.0, -1.0, 1.0, 1.0]).reshape(1, 1, 2, 2), torch.Generator().manual_seed(0))
    for _ in range(60):
        ema(torch.tensor([-2.0, -1.0, 1.0, 4.0]).reshape(1, 1, 2, 2))
    assert torch.allclose(ema.table().flatten().sort().values, torch.tensor([-1.5, 2.5]), atol=1e-3)


def test_16_bits_do_not_change_the_means():
    """A hundredth of a count is nothing beside it in bfloat16: running means would stand still."""
    low, full = EMA(4, 2).bfloat16(), EMA(4, 2)
    full.load_state_dict(low.state_dict())
    for step in range(50):
        z = normal(step, 2, 2, 3, 3).bfloat16()
        low(z)
        full(z.float())
    assert low.counts.dtype == torch.float32
    assert all(torch.equal(value, full.state_dict()[key]) for key, value in low.state_dict().items())


def test_no_gradient_reaches_the_codes_and_only_commitment_the_encoder():
    ema = EMA(8, 4)
    assert not list(ema.parameters())
    z = normal(0, 2, 4, 3, 3).requires_grad_()
    out = ema(z)
    assert set(out.losses) == {"commitment"}
    (gradient,) = torch.autograd.grad(out.losses["commitment"], z)
    assert torch.allclose(gradient, 0.25 * 2 * (z - out.vectors).detach() / z.numel())


def test_dead_codes_are_replaced_and_stay_replaced():
    """Without new N and m the next update puts a replaced code back where it was."""
    ema = EMA(4, 2, decay=0.5, dead=0.5)
    far = torch.full((4, 2), 50.0)
    far[0] = 0.0
    ema.embedding.copy_(far)
    ema.sums.copy_(far)
    for step in range(8):
        ema(0.1 * normal(step, 4, 2, 3, 3))
    assert ema.table().abs().max() < 1
    assert (ema.counts > 0).all()


def test_replacement_resets_count_and_sum():
    ema = EMA(4, 2, decay=0.9, dead=0.5)
    ema.counts.copy_(torch.tensor([10.0, 10.0, 10.0, 0.01]))
    ema(torch.zeros(1, 2, 2, 2))
    dead = ema.counts == ema.counts[3]
    assert ema.counts[3] > 1
    assert dead[3]
    assert torch.equal(ema.sums[3], ema.embedding[3] * ema.counts[3])


def test_none_is_replaced_at_zero():
    ema = EMA(4, 2, decay=0.5, dead=0.0)
    ema.embedding[3] = ema.sums[3] = 100.0
    for _ in range(5):
        ema(torch.zeros(1, 2, 2, 2))
    assert ema.table()[3].abs().max() > 90


class Coder(nn.Module):
    def __init__(self, name, options):
        super().__init__()
        torch.manual_seed(0)
        self.bottleneck = bottlenecks.build(name, 16, 4, **options)
        self.encoder = nn.Conv2d(3, self.bottleneck.inputs, 1)
        self.decoder = nn.Conv2d(self.bottleneck.outputs, 3, 1)

    def forward(self, x, generator):
        out = self.bottleneck(self.encoder(x), generator=generator)
        return (self.decoder(out.vectors) - x).square().mean() + sum(out.losses.values())


def train(rank, name, options, started):
    """Twenty steps on other data on each rank; DDP may not hide that buffers differ by sending the first rank's."""
    model = Coder(name, options)
    data = torch.Generator().manual_seed(100 + rank)
    # The other rank has more cells, and lies elsewhere: a mean over ranks is not a mean over their vectors.
    size = 3 + rank
    if started:
        x = torch.randn(4, 3, size, size, generator=data) + 3 * rank
        model.bottleneck.start(model.encoder(x).detach(), torch.Generator().manual_seed(rank))
    ddp = DistributedDataParallel(model, broadcast_buffers=False)
    optimizer = torch.optim.Adam(ddp.parameters(), 1e-2)
    replaced = []
    if name == "ema":
        replace = model.bottleneck._replace
        model.bottleneck._replace = lambda dead, rows: (replaced.append(int(dead.sum())), replace(dead, rows))
    for _ in range(20):
        optimizer.zero_grad()
        ddp(torch.randn(4, 3, size, size, generator=data) + 3 * rank, data).backward()
        optimizer.step()
    return {key: value.clone() for key, value in model.bottleneck.state_dict().items()}, replaced


KINDS = [
    ("ema", {"decay": 0.8, "dead": 0.3}, False),
    ("ema", {"decay": 0.9, "dead": 0.1, "rotation": True}, True),
    ("vq", {}, True),
    ("simvq", {}, True),
    ("simvq", {"train_codes": True, "diagonal": True}, False),
    ("relaxed", {"usage": 0.1, "beta": 0.01}, True),
    ("lfq", {}, False),
]


def train_all(rank):
    return [train(rank, *kind) for kind in KINDS]


def test_codebooks_are_equal_on_all_ranks_to_the_bit():
    first, second = run_ranks(2, train_all)
    for kind, (a, replaced), (b, _) in zip(KINDS, first, second, strict=True):
        assert set(a) == set(b), kind
        assert all(torch.equal(a[key], b[key]) for key in a), kind
        if kind[0] == "ema":
            assert sum(replaced) > 0


def lfq_cells():
    return torch.tensor([[2.0, -1.0], [-2.0, 0.5]]).reshape(2, 2, 1, 1)


def observe(rank):
    """One update of each half of a batch, of unequal halves."""
    ema = EMA(5, 2, decay=0.9, dead=0.5)
    ema.embedding.copy_(normal(7, 5, 2))
    ema.sums.copy_(ema.embedding)
    whole = normal(1, 10, 2)
    ema.observe(
        whole[:3] if rank == 0 else whole[3:], torch.arange(10)[:3] % 4 if rank == 0 else torch.arange(10)[3:] % 4
    )
    fifth = whole[:3] if rank == 0 else whole[3:]
    generator = torch.Generator().manual_seed(5)
    # Of unequal parts, and of one that is empty.
    factor = torch.tensor(2.0, requires_grad=True)
    union.mean_of_all(factor * fifth).square().sum().backward()
    gradient = factor.grad.clone()
    dist.all_reduce(gradient)
    lone = union.mean_of_all(whole if rank == 0 else whole[:0])
    late = EMA(5, 2, dead=0.5)
    late.load_state_dict(ema.state_dict())
    late(whole.T.reshape(1, 2, 2, 5) if rank == 0 else torch.zeros(0, 2, 2, 5))
    spoiled = EMA(5, 2)
    spoiled.load_state_dict(ema.state_dict())
    spoiled(torch.full((1, 2, 2, 5), 0.0 if rank == 0 else torch.nan))
    return {
        "lone": lone,
        "late": late.state_dict(),
        "spoiled": spoiled.state_dict(),
        "ema": ema.state_dict(),
        "gathered": union.gathered(fifth),
        "picked": union.picked(fifth, 40, generator),
        "gradient": gradient / 2,
        # Cells, and so weights, are the same on both ranks here.
        "entropy": LFQ(4, 1)(lfq_cells()[rank : rank + 1]).losses["entropy"].item(),
    }


def test_two_ranks_are_one_with_both_batches():
    alone = EMA(5, 2, decay=0.9, dead=0.5)
    alone.embedding.copy_(normal(7, 5, 2))
    alone.sums.copy_(alone.embedding)
    whole = normal(1, 10, 2)
    alone.observe(whole, torch.arange(10) % 4)
    picked = union.picked(whole, 40, torch.Generator().manual_seed(5))
    lfq, late = LFQ(4, 1), EMA(5, 2, dead=0.5)
    spread = lfq(lfq_cells()).losses["entropy"].item() - 0.1 * lfq.entropies(lfq_cells().flatten(1))[0].item()
    for rank, found in enumerate(run_ranks(2, observe)):
        own = 0.1 * lfq.entropies(lfq_cells().flatten(1)[rank : rank + 1])[0].item()
        assert found["entropy"] - own == pytest.approx(spread, abs=1e-6)
        for key, value in alone.state_dict().items():
            assert torch.allclose(found["ema"][key], value), key
        assert torch.equal(found["gathered"], whole)
        assert torch.equal(found["picked"], picked)
        # d/df of |f mean|^2 at f = 2.
        assert found["gradient"].item() == pytest.approx(4 * whole.mean(0).square().sum().item(), rel=1e-5)
        assert torch.allclose(found["lone"], whole.mean(0))
        assert all(torch.equal(value, found["ema"][key]) for key, value in found["spoiled"].items())
        late.load_state_dict(found["ema"])
        late(whole.T.reshape(1, 2, 2, 5))
        assert all(torch.allclose(value, found["late"][key]) for key, value in late.state_dict().items())


def test_replacements_come_from_the_whole_batch():
    rows = torch.arange(8.0)[:, None]
    assert union.picked(rows, 400, torch.Generator().manual_seed(0)).unique().numel() == 8
