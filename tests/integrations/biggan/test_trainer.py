"""The trainer: on two ranks, with micro-batches, and resumed; each step leaves exactly what it should."""

import math

import pytest
import torch
import torch.distributed as dist
from distopt.integrations.biggan import drawn
from distopt.integrations.biggan.settings import TrainSettings
from distopt.integrations.biggan.trainer import Trainer
from torch import nn

from distopt import AllReduce
from tests.processes import run_ranks

SMALL = {"width": 8, "noise": 12, "shared": 8, "batch": 8, "steps": 8, "readings_every": 2}
SMALL |= {"discriminator_steps": 1, "gamma": 0.0, "group": 0}


def _trainer(**settings):
    return Trainer(TrainSettings(**{**SMALL, **settings}), *drawn.everything())


def _everything(trainer):
    """All that is trained or kept, but the running statistics of batch norms, which differ between ranks."""
    networks = {"g": trainer.generator, "d": trainer.discriminator, "e": trainer.average.module}
    return {
        f"{whose}.{name}": value.clone()
        for whose, network in networks.items()
        for name, value in network.state_dict().items()
        if "running" not in name and "tracked" not in name
    }


def _differing(first, second):
    assert first.keys() == second.keys()
    return [name for name in first if not torch.equal(first[name], second[name])]


def _two_ranks(rank, folder):
    trainer = _trainer(accumulate=2, gamma=0.1, rank=2, group=2)
    start = _everything(trainer)
    progress = [trainer.step() for _ in range(3)]
    after = _everything(trainer)
    assert len(_differing(start, after)) > len(start) // 2
    # Saving takes nothing away, and what is loaded goes on as this does.
    trainer.save(folder)
    assert _differing(after, _everything(trainer)) == []
    saved = trainer.generator_registration.own_residuals()
    assert any(bool(residual.any()) for residual in _tensors(saved))
    progress += [trainer.step() for _ in range(2)]
    end = _everything(trainer)
    torch.manual_seed(123)
    resumed = _trainer(accumulate=2, gamma=0.1, rank=2, group=2)
    resumed.load(folder)
    assert resumed.taken == 3
    again = [resumed.step() for _ in range(2)]
    assert _differing(end, _everything(resumed)) == []
    assert [p.losses for p in again] == [p.losses for p in progress[3:]]
    assert [p.spectra for p in again] == [p.spectra for p in progress[3:]]
    for name, optimizer in trainer._states().items():
        if name.endswith("_optimizer"):
            there = resumed._states()[name].state_dict()["state"]
            for place, state in optimizer.state_dict()["state"].items():
                assert all(torch.equal(value, there[place][key]) for key, value in state.items())
    stats = [r.stats() for r in (trainer.generator_registration, trainer.discriminator_registration)]
    return end, [p.losses for p in progress], stats, [len(p.spectra) for p in progress]


def _tensors(state):
    if isinstance(state, torch.Tensor):
        yield state
    elif isinstance(state, dict):
        for value in state.values():
            yield from _tensors(value)


def test_two_ranks_train_as_one_and_resume_bit_for_bit(tmp_path):
    (first, losses, stats, spectra), (second, others, *_) = run_ranks(2, _two_ranks, tmp_path / "run", timeout=110)
    assert _differing(first, second) == []
    assert losses == others
    for each in stats:
        assert each.steps == 5  # one reduction a step, whatever the micro-batches
        assert 0 < each.matrix_bytes_sent < each.matrix_bytes_uncompressed
        assert 0 < each.bytes_sent < each.bytes_uncompressed
    assert [bool(read) for read in spectra] == [False, True, False, True, False]


def _compressed(rank):
    trainer = _trainer(rank=1)
    trainer.step()
    both = (
        (trainer.generator, trainer.generator_registration),
        (trainer.discriminator, trainer.discriminator_registration),
    )
    return [
        (sorted(registration.stats().residual_norm), {name: tuple(p.shape) for name, p in network.named_parameters()})
        for network, registration in both
    ]


def test_what_is_compressed():
    """Kernels and linear layers that are worth it; not vectors, batch norms, and both embeddings."""
    for kept_back, shapes in run_ranks(2, _compressed, timeout=60)[0]:
        sides = {name: (shape[0], math.prod(shape[1:])) for name, shape in shapes.items() if len(shape) > 1}
        worth_it = [name for name, (rows, columns) in sides.items() if 2 * (rows + columns) <= rows * columns]
        assert kept_back == sorted(name for name in worth_it if not name.startswith("classes."))
        assert len(kept_back) > 10


class _Frozen(nn.Module):
    """A batch norm whose statistics stand still."""

    def __init__(self, norm):
        super().__init__()
        self.register_buffer("scale", torch.rand(norm.num_features, dtype=torch.float64) + 0.5)

    def forward(self, pictures):
        return pictures * self.scale[:, None, None]


def _freeze_norms(module):
    for name, child in list(module.named_children()):
        if isinstance(child, nn.BatchNorm2d):
            setattr(module, name, _Frozen(child))
        else:
            _freeze_norms(child)


def _gradients(accumulate, frozen, group=0):
    """Of both networks after one window each, in float64, where the trainer would take its steps."""
    pictures, classes = drawn.everything()
    torch.set_default_dtype(torch.float64)
    try:
        window = {"batch": 16, "accumulate": accumulate, "group": group}
        settings = TrainSettings(**{**SMALL, **window, "gamma": 0.1, "orthogonal": 0.0})
        trainer = Trainer(settings, pictures.double(), classes)
        if frozen:
            torch.manual_seed(3)
            _freeze_norms(trainer.generator)
        compared, drawn_ = trainer._cut()
        trainer._learn(trainer.discriminator, next(compared), trainer._comparing_loss)
        found = [p.grad.clone() for p in trainer.discriminator.parameters()]
        trainer._learn(trainer.generator, next(drawn_), trainer._drawing_loss)
        return found, [p.grad for p in trainer.generator.parameters() if p.grad is not None]
    finally:
        torch.set_default_dtype(torch.float32)


def _largest_difference(first, second):
    differences = [(a - b).abs().max() / (b.abs().max() + 1e-30) for a, b in zip(first, second, strict=True)]
    return float(max(differences))


@pytest.mark.parametrize(("group", "accumulate"), [(0, 8), (4, 4)])
def test_micro_batches_are_one_big_batch_where_batch_norms_stand_still(group, accumulate):
    whole, parts = _gradients(1, True, group), _gradients(accumulate, True, group)
    assert _largest_difference(parts[0], whole[0]) < 1e-9
    assert _largest_difference(parts[1], whole[1]) < 1e-9


def test_with_live_batch_norms_they_are_not():
    """Each micro-batch is normalised by itself: another function, which nobody should take for the same."""
    whole, parts = _gradients(1, frozen=False), _gradients(8, frozen=False)
    assert _largest_difference(parts[1], whole[1]) > 1e-2


def test_a_step_leaves_no_gradients_and_each_network_its_own():
    trainer = _trainer()
    seen = {}
    trainer._generator_optimizer.register_step_pre_hook(
        lambda *_: seen.update({n: p.grad for n, p in trainer.discriminator.named_parameters()})
    )
    trainer.step()
    assert set(seen.values()) == {None}
    for network in (trainer.generator, trainer.discriminator):
        assert all(p.grad is None and p.requires_grad for p in network.parameters())


def test_one_power_iteration_a_step(monkeypatch):
    """Of each network, however many micro-batches and turns of the other there are."""
    from torch.nn.utils.parametrizations import _SpectralNorm

    counts = {}
    original = _SpectralNorm._power_method

    def counted(self, matrix, iterations):
        counts[id(self)] = counts.get(id(self), 0) + iterations
        original(self, matrix, iterations)

    trainer = _trainer(accumulate=2, discriminator_steps=2)
    monkeypatch.setattr(_SpectralNorm, "_power_method", counted)
    trainer.step()
    for network, expected in ((trainer.generator, 1), (trainer.discriminator, 2)):
        norms = [m for m in network.modules() if isinstance(m, _SpectralNorm)]
        # The spectra read the weights themselves, and count no iteration.
        assert {counts[id(norm)] for norm in norms} == {expected}


def test_the_average_is_that_of_its_closed_form():
    """Weights that stay at 1 from an average of 0: 1 - d^n after n updates."""
    from distopt.optim.averaging import IterateAverage

    layer = nn.Linear(2, 2, bias=False)
    nn.init.zeros_(layer.weight)
    average = IterateAverage(layer, decay=0.9, every=1)
    average.update()
    nn.init.ones_(layer.weight)
    for n in range(1, 30):
        average.update()
        assert torch.allclose(average.module.weight, torch.full((2, 2), 1 - 0.9**n), atol=1e-6)


def test_a_step_that_is_not_finite_is_not_taken():
    trainer = _trainer()
    trainer.step()
    before = _everything(trainer)
    trainer._comparing_loss = lambda part: trainer.discriminator(part.pictures * torch.nan, part.classes).sum()
    trainer._drawing_loss = lambda part: trainer.generator(part.noise * torch.nan, part.classes).sum()
    trainer.step()
    assert trainer.skipped == 2
    changed = _differing(before, _everything(trainer))
    assert all(name.endswith(("_u", "_v")) for name in changed)


def test_orthogonal_regularisation_reaches_all_of_the_generator_but_the_embedding():
    plain, pressed = _trainer(orthogonal=0.0), _trainer(orthogonal=100.0)
    for trainer in (plain, pressed):
        trainer.step()
    changed = _differing(_everything(plain), _everything(pressed))
    trained = {name.removeprefix("g.") for name in changed if name.startswith("g.")}
    assert {name for name in trained if "original" in name}
    assert "classes.weight" not in trained
    assert not [name for name in changed if name.startswith("d.")]


def test_plain_averaging_is_the_other_reducer():
    from distopt.integrations.biggan.trainer import reducer_of

    assert reducer_of(TrainSettings(reducer="allreduce")) == AllReduce()
    assert not dist.is_initialized()


@pytest.mark.parametrize(
    ("decay", "wanted"), [(0.0, [1.0] * 4), (0.5, [1.0, 1.0, 1.0, 0.5]), (1.0, [1.0, 0.75, 0.5, 0.25])]
)
def test_rates_fall_to_nothing_behind_the_last_step(decay, wanted):
    trainer = _trainer(steps=4, decay=decay)
    rates = []
    for _ in range(4):
        trainer.step()
        optimizers = (trainer._generator_optimizer, trainer._discriminator_optimizer)
        rates.append(tuple(optimizer.param_groups[0]["lr"] for optimizer in optimizers))
    base = trainer.settings
    assert rates == [(part * base.generator_rate, part * base.discriminator_rate) for part in wanted]
