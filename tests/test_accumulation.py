"""Windows of micro-batches are one big batch: on ranks that are threads, and on real ones behind DDP."""

import math
from dataclasses import dataclass

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP

import distopt
from distopt import AgreementError, AllReduce, PowerSGD, RandomK, SettingError, TopK, WindowError
from distopt.accumulation import accumulate
from tests.attach.conftest import alone  # noqa: F401
from tests.attach.models import mlp, wrap
from tests.meetings import on_ranks, windows_of
from tests.processes import run_ranks
from tests.reducers.test_contract import REDUCERS
from tests.simulation import Ranks

IGNORED = -100
FEATURES, CLASSES = 5, 4
POLICIES = ("step", "drop", "carry")


@dataclass
class Tokens:
    """A micro-batch of tokens, some of whose labels are ignored."""

    inputs: torch.Tensor
    labels: torch.Tensor


def tokens(count, ignored, seed):
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(count + ignored, FEATURES, generator=generator, dtype=torch.float64)
    labels = torch.randint(CLASSES, (count + ignored,), generator=generator)
    labels[count:] = IGNORED
    return Tokens(inputs, labels)


def counted(batch):
    return (batch.labels != IGNORED).sum()


def fixed(rows, columns):
    """A linear layer whose numbers do not come from the generator that threads share."""
    layer = nn.Linear(columns, rows, dtype=torch.float64)
    with torch.no_grad():
        for p in layer.parameters():
            p.copy_(torch.linspace(-1.0, 1.0, p.numel(), dtype=torch.float64).reshape(p.shape).sin())
    return layer


def linear():
    return fixed(CLASSES, FEATURES)


def loss_sum(model, batch):
    return nn.functional.cross_entropy(model(batch.inputs), batch.labels, ignore_index=IGNORED, reduction="sum")


def flat(model):
    return torch.cat([p.grad.flatten() for p in model.parameters()]).clone()


def big_batch(batches):
    """The gradient and the value of the mean loss over all tokens at once."""
    model = linear()
    inputs, labels = (torch.cat([getattr(batch, name) for batch in batches]) for name in ("inputs", "labels"))
    count = int((labels != IGNORED).sum())
    loss = loss_sum(model, Tokens(inputs, labels)) / max(count, 1)
    loss.backward()
    return flat(model), loss.item(), count


def take(accumulation, model, epochs=1):
    """The gradient, loss, weight and steps of every window."""
    seen = []
    for _ in range(epochs):
        for window in accumulation:
            model.zero_grad()
            for batch in window:
                window.backward(loss_sum(model, batch))
            seen.append((flat(model), window.loss(), window.weight, window.steps))
    return seen


def cut(by_rank, steps, last, epochs):
    """The model of `accumulate`: the batches of each rank in each window."""
    windows, carried = [], [[] for _ in by_rank]
    for _ in range(epochs):
        rest = [[*early, *batches] for early, batches in zip(carried, by_rank, strict=True)]
        carried = [[] for _ in by_rank]
        while any(rest):
            window, rest = [batches[:steps] for batches in rest], [batches[steps:] for batches in rest]
            if max(map(len, window)) == steps or last == "step":
                windows.append(window)
            elif last == "carry":
                carried = window
    return windows


counts = st.tuples(st.integers(0, 6), st.integers(0, 2)).filter(any)
loaders = st.lists(st.lists(counts, min_size=1, max_size=7), min_size=1, max_size=3)


@given(loaders, st.integers(1, 4), st.sampled_from(POLICIES), st.integers(1, 3))
@settings(max_examples=60)
def test_windows_are_big_batches(shapes, steps, last, epochs):
    """Whatever the counts of tokens and of micro-batches on each rank, ignored ones and windows without any."""
    by_rank = [
        [tokens(*counts, seed=100 * rank + place) for place, counts in enumerate(own)]
        for rank, own in enumerate(shapes)
    ]

    def job(seat):
        model = linear()
        return take(windows_of(seat, by_rank[seat.rank], model, steps=steps, weight=counted, last=last), model, epochs)

    results, _ = on_ranks(len(by_rank), job)
    expected = cut(by_rank, steps, last, epochs)
    assert [len(own) for own in results] == [len(expected)] * len(by_rank)
    for number, window in enumerate(expected):
        gradient, loss, weight = big_batch([batch for own in window for batch in own])
        ours = [own[number] for own in results]
        average = torch.stack([g for g, *_ in ours]).mean(0)
        assert float((average - gradient).norm()) <= 1e-12 * max(float(gradient.norm()), 0.1)
        assert all(math.isclose(theirs, loss, rel_tol=1e-12) for _, theirs, *_ in ours)
        assert [w for *_, w, _ in ours] == [weight] * len(window)
        assert [n for *_, n in ours] == [len(own) for own in window]


def test_one_gather_a_window():
    def job(seat):
        model = linear()
        loader = [tokens(3, 0, place) for place in range(4 + seat.rank)]
        for window in windows_of(seat, loader, model, steps=2, weight=counted):
            for batch in window:
                window.backward(loss_sum(model, batch))
            yield window.steps

    assert on_ranks(2, lambda seat: list(job(seat)))[0] == [[2, 2, 0], [2, 2, 1]]
    _, table = on_ranks(2, lambda seat: list(job(seat)))
    assert table.gathers == 3


# The error that circulates


def compared(by_rank, steps):
    """Relative errors of a window's gradient: mean of means, normalised by rank, and ours; a row for each of ten draws."""
    errors = []
    for seed in range(10):
        batches = [
            [tokens(count, 0, 1000 * seed + 10 * rank + place) for place, count in enumerate(own)]
            for rank, own in enumerate(by_rank)
        ]
        exact, *_ = big_batch([batch for own in batches for batch in own])

        def by_hand(share, batches=batches):
            model = linear()
            for own, named in zip(batches, by_rank, strict=True):
                for batch, count in zip(own, named, strict=True):
                    (loss_sum(model, batch) * share(count, named) / len(by_rank)).backward()
            return flat(model)

        def job(seat, batches=batches):
            model = linear()
            return take(windows_of(seat, batches[seat.rank], model, steps=steps, weight=counted), model)[0][0]

        ours = torch.stack(on_ranks(len(by_rank), job)[0]).mean(0)
        means = by_hand(lambda count, own: 1 / count / steps)
        ranks = by_hand(lambda count, own: 1 / sum(own))
        errors.append([float((g - exact).norm() / exact.norm()) for g in (means, ranks, ours)])
    return np.array(errors)


@pytest.mark.parametrize(
    ("by_rank", "steps", "means", "ranks"),
    [
        ([[5, 60, 17, 128]], 4, 0.1, None),
        ([[5, 60, 17], [128, 90, 2]], 3, 0.1, 0.1),
        ([[5, 60, 17]], 4, 0.1, None),
        ([[40, 40], [40, 40]], 2, None, None),
    ],
    ids=["unequal", "two ranks", "three of four", "equal"],
)
def test_a_mean_of_means_is_wrong_and_ours_is_not(by_rank, steps, means, ranks):
    """huggingface/transformers#34191, and #34242 where each rank counts for itself. ``None``: no error there."""
    errors = compared(by_rank, steps)
    for error, least in zip(errors.T, (means, ranks), strict=False):
        assert error.max() < 1e-14 if least is None else np.median(error) > least
    assert errors[:, 2].max() < 1e-14


def test_an_ignored_micro_batch_makes_a_mean_of_means_nan():
    model, batch = linear(), tokens(0, 3, 0)
    assert nn.functional.cross_entropy(model(batch.inputs), batch.labels, ignore_index=IGNORED).isnan()
    (gradient, loss, weight, _), *_ = take(accumulate([batch], model, steps=1, weight=counted), model)
    assert (weight, loss, bool(gradient.any())) == (0.0, 0.0, False)


# Reducers


def whole_numbers(rows, seed):
    """Inputs whose gradients are exact in float64, whatever the order of sums."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-4, 5, (rows, 20), generator=generator).double()


def rows_loss(model, rows):
    return (model(rows) * rows[:, :6]).sum()


def gradients_of(by_rank, steps):
    """By window, by rank, by name."""

    def job(seat):
        model, seen = fixed(6, 20), []
        for window in windows_of(seat, by_rank[seat.rank], model, steps=steps):
            model.zero_grad()
            for batch in window:
                window.backward(rows_loss(model, batch))
            seen.append({name: p.grad.clone() for name, p in model.named_parameters()})
        return seen

    return [list(window) for window in zip(*on_ranks(len(by_rank), job)[0], strict=True)]


SHAPES = {"weight": (6, 20), "bias": (6,)}


@pytest.mark.parametrize("name", REDUCERS)
@given(
    cuts=st.lists(st.lists(st.integers(0, 8), min_size=2, max_size=2), min_size=1, max_size=3), seed=st.integers(0, 99)
)
@settings(max_examples=5)
def test_any_reducer_takes_a_window_for_one_micro_batch(name, cuts, seed):
    """On the same ranks, bit for bit where the numbers are exact; all of three windows and what is left behind."""
    data = [[whole_numbers(8, seed + 10 * rank + step) for step in range(3)] for rank in range(len(cuts))]
    micros = [
        [rows[a:b] for rows in own for a, b in zip([0, *sorted(cut)], [*sorted(cut), 8], strict=True)]
        for own, cut in zip(data, cuts, strict=True)
    ]
    accumulated, single = (Ranks(REDUCERS[name], SHAPES, len(cuts), dtype=torch.float64) for _ in range(2))
    for window, whole in zip(gradients_of(micros, 3), gradients_of(data, 1), strict=True):
        for left, right in zip(accumulated.step(window), single.step(whole), strict=True):
            assert all(torch.equal(left[n], right[n]) for n in SHAPES)
    for left, right in zip(accumulated.snapshot(), single.snapshot(), strict=True):
        assert all(torch.equal(left[n], right[n]) for n in left)


def across(reducer, by_rank, steps):
    """Over a sequence of windows: the largest relative difference between W ranks and one that has all the data."""
    world = len(by_rank)
    one = [
        batch for place in range(0, len(by_rank[0]), steps) for own in by_rank for batch in own[place : place + steps]
    ]
    many, single = Ranks(reducer, SHAPES, world, dtype=torch.float64), Ranks(reducer, SHAPES, 1, dtype=torch.float64)
    worst = 0.0
    for left, right in zip(gradients_of(by_rank, steps), gradients_of([one], steps * world), strict=True):
        theirs, ours = many.step(left)[0], single.step(right)[0]
        for n in SHAPES:
            size = float(ours[n].norm())
            kept = sum(many.residual(rank, n) for rank in range(world)) / world - single.residual(0, n)
            worst = max(worst, float((theirs[n] - ours[n]).norm()) / size, float(kept.norm()) / size)
    return worst


LINEAR = [AllReduce(), PowerSGD(rank=2), PowerSGD(rank=2, passes="alternate"), RandomK(0.1)]


@pytest.mark.parametrize("reducer", LINEAR, ids=str)
@given(rows=st.lists(st.integers(1, 5), min_size=12, max_size=12), world=st.sampled_from([2, 3]))
@settings(max_examples=10)
def test_linear_reducers_do_not_mind_the_number_of_ranks(reducer, rows, world):
    """The same average gradient and the same mean residual, window after window."""
    generator = torch.Generator().manual_seed(sum(rows))
    batches = [torch.randn(n, 20, generator=generator, dtype=torch.float64) for n in rows]
    assert across(reducer, [batches[rank::world] for rank in range(world)], 2) < 1e-12


def test_others_do():
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randn(n, 20, generator=generator, dtype=torch.float64) for n in [1, 3] * 4]
    assert across(TopK(0.1), [batches[::2], batches[1::2]], 2) > 0.01


# Real ranks


class Buffered(nn.Module):
    """With a buffer, which DDP sends around in the forward pass."""

    def __init__(self):
        super().__init__()
        self.layers = mlp(3, width=12, dtype=torch.float64)
        self.register_buffer("one", torch.ones(1, dtype=torch.float64))

    def forward(self, x):
        return self.layers(x).tanh() * self.one


def inputs(rank, place, rows):
    generator = torch.Generator().manual_seed(100 * rank + place)
    return torch.randn(rows, 12, generator=generator, dtype=torch.float64)


def descend(model):
    with torch.no_grad():
        for p in model.parameters():
            p.sub_(p.grad, alpha=0.3)
            p.grad = None


def square_sum(model, x):
    return model(x).square().sum()


ROWS = ([3, 1, 4, 1, 5, 2, 6], [7, 2, 1, 8, 3], [2, 5])
"""Rank 0 has seven micro-batches, rank 1 five, and rank 2 two: with windows of three it runs out in the first."""


def windows_job(rank, reducers):
    return [windows_and_whole(rank, reducer) for reducer in reducers]


def windows_and_whole(rank, reducer):
    """Windows on a DDP model, and the same data as one micro-batch a rank on another."""
    world = dist.get_world_size()
    model, whole = wrap(Buffered(), 1), wrap(Buffered(), 1)
    kept = [distopt.register(m, reducer, check_replicas_every=1) for m in (model, whole) if reducer]
    loader = [inputs(rank, place, rows) for place, rows in enumerate(ROWS[rank])]
    difference, losses = 0.0, 0.0
    for number, window in enumerate(accumulate(loader, model, steps=3)):
        for x in window:
            window.backward(square_sum(model, x))
        merged = torch.cat([inputs(rank, 0, 0), *loader[3 * number : 3 * number + 3]])
        weight = sum(sum(own[3 * number : 3 * number + 3]) for own in ROWS[:world])
        value = square_sum(whole, merged) * (world / weight)
        value.backward()
        dist.all_reduce(value.detach_())
        losses = max(losses, abs(window.loss() - float(value) / world))
        for left, right in zip(model.parameters(), whole.parameters(), strict=True):
            difference = max(difference, float((left.grad - right.grad).norm() / right.grad.norm()))
        descend(model)
        descend(whole)
    steps = [registration.stats().steps for registration in kept]
    return difference, losses, steps, number + 1


@pytest.mark.parametrize("world", [2, 3])
def test_uneven_ranks_behind_ddp(world):
    """One reduction a window, no hang, no false alarm, and the gradient of one big micro-batch a rank."""
    reducers = [None, AllReduce(), PowerSGD(rank=2)]
    for own in run_ranks(world, windows_job, reducers):
        for reducer, (difference, losses, steps, windows) in zip(reducers, own, strict=True):
            assert windows == 3
            assert steps == ([3, 3] if reducer else [])
            assert difference < (1e-10 if isinstance(reducer, PowerSGD) else 1e-13)
            assert losses < 1e-13


def buffer_job(rank):
    """Gradients straight into the error buffer, against DDP; and what the ranks may not differ in."""
    model, lean = wrap(Buffered()), Buffered()
    distopt.register(model, PowerSGD(rank=2))
    registration = distopt.register(lean.named_parameters(), PowerSGD(rank=2), accumulate=True)
    loader = [inputs(rank, place, rows) for place, rows in enumerate(ROWS[1 + rank])]
    freed = True
    for _epoch in range(2):
        for m in (model, lean):
            for window in accumulate(loader, m, steps=2):
                for x in window:
                    window.backward(square_sum(m, x))
                if m is lean:
                    freed &= all(p.grad is None for p in m.parameters())
                    assert registration.reduce()
                descend(m)
    error = max(float((p - q).abs().max()) for p, q in zip(model.parameters(), lean.parameters(), strict=True))
    refusals = []
    for changed in ({"steps": 2 + rank}, {"steps": 2, "last": POLICIES[rank]}):
        with pytest.raises(AgreementError) as caught:
            next(iter(accumulate(loader, lean, **changed)))
        refusals.append(str(caught.value))
    with pytest.raises(AgreementError) as caught:
        next(iter(accumulate(loader[: 9 * rank], lean, steps=2)))
    return error, freed, [*refusals, str(caught.value)]


def test_into_the_error_buffer_and_what_ranks_disagree_in():
    for error, freed, refusals in run_ranks(2, buffer_job):
        assert error < 1e-12
        assert freed
        assert refusals == [
            "accumulate's 'steps' differs: rank 0 has 2 where rank 1 has 3",
            "accumulate's 'last' differs: rank 0 has step where rank 1 has drop",
            "rank 0 has no batch at all: its loader is empty from the start",
        ]


def poisoned_job(rank):
    """For each micro-step: a window with a NaN there on rank 1, among sound ones; and the sound ones alone."""
    same = []
    for poisoned in range(3):
        models = []
        for bad in (poisoned, None):
            model = wrap(Buffered(), 1)
            registration = distopt.register(model, PowerSGD(rank=2))
            taken = []
            for window in accumulate(_sound_and_bad(rank, bad), model, steps=3):
                for x in window:
                    window.backward(square_sum(model, x))
                taken.append(all(bool(p.grad.isfinite().all()) for p in model.parameters()))
                if taken[-1]:
                    descend(model)
                else:
                    assert all(bool(p.grad.isnan().all()) for p in model.parameters())
                    model.zero_grad()
            state = registration._engine.state
            models.append([*model.parameters(), *state.residuals.values(), *state.factors.values()])
            expected = [True, True, True] if bad is None else [True, False, True, True]
            assert (taken, registration.stats().skipped_steps) == (expected, expected.count(False))
        same.append(all(torch.equal(a, b) for a, b in zip(*models, strict=True)))
    return same


def _sound_and_bad(rank, bad):
    sound = [inputs(rank, place, 2) for place in range(9)]
    if bad is None:
        return sound
    nan = [inputs(rank, place, 2) for place in range(20, 23)]
    if rank == 1:
        nan[bad] = nan[bad] * math.nan
    return [*sound[:3], *nan, *sound[3:]]


def test_a_nan_in_any_micro_batch_drops_the_whole_window_and_nothing_else():
    assert run_ranks(2, poisoned_job) == [[True] * 3] * 2


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("order", ["compile(DDP)", "DDP(compile)"])
def test_a_compiled_model(order):
    model = mlp(2, width=12, dtype=torch.float64)
    if order == "compile(DDP)":
        ddp = DDP(model)
        call = torch.compile(ddp, backend="eager")
    else:
        call = ddp = DDP(torch.compile(model, backend="eager"))
    registration = distopt.register(call, AllReduce())
    loader = [inputs(0, place, rows) for place, rows in enumerate(ROWS[0])]
    for number, window in enumerate(accumulate(loader, call, steps=3)):
        for x in window:
            assert ddp.require_backward_grad_sync is window.is_last
            window.backward(square_sum(call, x))
        exact = mlp(2, width=12, dtype=torch.float64)
        merged = torch.cat(loader[3 * number : 3 * number + 3])
        (square_sum(exact, merged) / len(merged)).backward()
        torch.testing.assert_close(flat(ddp), flat(exact), rtol=1e-12, atol=1e-14)
        ddp.zero_grad()
    assert registration.stats().steps == 3


@pytest.mark.usefixtures("alone")
def test_groups_are_not_piled_up():
    """Many loops call it anew in every epoch, and each group would keep its connections."""
    model = mlp(1)
    groups = []
    for _ in range(3):
        list(accumulate([torch.ones(1, 48)], model, steps=1))
        groups.append(len(dist.distributed_c10d._world.pg_map))
    assert groups[0] == groups[-1]


# Denominators


def test_every_loss_has_its_own_denominator():
    """DALL-E's text counts an eighth and its image seven, each as the mean over its own tokens."""

    def losses(model, batch):
        text, image = batch
        return {"text": model(text).square().sum() / 8, "image": model(image).pow(4).sum() * 7 / 8}

    def weight(batch):
        return {"text": len(batch[0]), "image": torch.tensor(len(batch[1]))}

    rows = [[(3, 5), (1, 9), (2, 2)], [(0, 4), (6, 1)]]
    by_rank = [
        [
            tuple(inputs(rank, 10 * place + kind, n)[:, :FEATURES] for kind, n in enumerate(pair))
            for place, pair in enumerate(own)
        ]
        for rank, own in enumerate(rows)
    ]

    def job(seat):
        model = linear()
        (window,) = windows_of(seat, by_rank[seat.rank], model, steps=3, weight=weight)
        for batch in window:
            window.backward(losses(model, batch))
        return flat(model), window.loss(), window.weight

    ours, _ = on_ranks(2, job)
    everything = [torch.cat([batch[kind] for own in by_rank for batch in own]) for kind in range(2)]
    model = linear()
    parts = losses(model, everything)
    means = {"text": parts["text"].item() / 12, "image": parts["image"].item() / 21}
    (parts["text"] / 12 + parts["image"] / 21).backward()
    torch.testing.assert_close((ours[0][0] + ours[1][0]) / 2, flat(model), rtol=1e-12, atol=1e-14)
    for _, loss, weights in ours:
        assert weights == {"text": 12.0, "image": 21.0}
        assert loss == pytest.approx(means, rel=1e-12)


def test_a_denominator_may_be_absent_from_a_window():
    model = linear()
    x = inputs(0, 0, 4)[:, :FEATURES]
    (window,) = accumulate([x], model, steps=1, weight=lambda batch: {"text": 0, "image": 4})
    for batch in window:
        window.backward({"text": model(batch[:0]).sum(), "image": model(batch).sum()})
    assert window.loss() == {"text": 0.0, "image": pytest.approx(float(model(x).sum().detach()) / 4)}
    assert bool(flat(model).isfinite().all())


@pytest.mark.parametrize(
    "batch",
    [
        torch.ones(3, 2),
        [torch.tensor(7.0), torch.ones(3, 2)],
        {"id": "a", "deep": ({"x": torch.ones(3)}, torch.ones(5))},
        Tokens(torch.ones(3, FEATURES), torch.ones(5)),
    ],
    ids=["tensor", "list", "nested", "dataclass"],
)
def test_the_weight_is_the_batch_size_by_default(batch):
    (window,) = accumulate([batch], linear(), steps=2)
    assert window.weight == 3.0


def test_a_scaled_loss():
    """A gradient scaler's factor goes through, as all is linear."""
    plain, scaled = linear(), linear()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    loader = [tokens(n, 0, n) for n in (2, 5)]
    (exact, *_) = take(accumulate(loader, plain, steps=2, weight=counted), plain)
    for window in accumulate(loader, scaled, steps=2, weight=counted):
        for batch in window:
            window.backward(scaler.scale(loss_sum(scaled, batch)))
    assert torch.equal(flat(scaled) / 2**10, exact[0])


# Misuse


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"steps": 0}, "steps is 0, but must be an integer of at least 1"),
        ({"steps": 2.0}, "steps is 2.0, but must be an integer of at least 1"),
        ({"steps": True}, "steps is True, but must be an integer of at least 1"),
        ({"steps": 2, "last": "keep"}, "last is 'keep', but must be 'step', 'drop' or 'carry'"),
        ({"steps": 2, "weight": 3}, "weight is 3, but must be a function of a batch"),
    ],
)
def test_settings_that_are_refused(setting, message):
    with pytest.raises(SettingError) as caught:
        accumulate([], linear(), **setting)
    assert str(caught.value) == message


NUMBER = "a finite number of at least 0 for each batch, or a dictionary of them by name"


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        (lambda batch: -1, f"-1, but must be {NUMBER}"),
        (lambda batch: math.nan, f"nan, but must be {NUMBER}"),
        (lambda batch: torch.tensor(math.inf), f"inf, but must be {NUMBER}"),
        (lambda batch: torch.ones(2), f"'a tensor of shape [2]', but must be {NUMBER}"),
        (lambda batch: {"text": None}, f"None, but must be {NUMBER}"),
        (lambda batch: {}, "[], but must be a dictionary with 1 to 16 names as keys"),
        (lambda batch: {3: 1.0}, "[3], but must be a dictionary with 1 to 16 names as keys"),
        (
            lambda batch: {"a": 1} if len(batch) == 1 else {"b": 1},
            "['b'], but must be of the same keys for every batch, ['a']",
        ),
        (None, "None, but must be given: there is no tensor in a str to take a size from"),
    ],
)
def test_weights_that_are_refused(weight, message):
    with pytest.raises(SettingError) as caught:
        list(accumulate(["x", "yy"], linear(), steps=2, weight=weight))
    assert str(caught.value) == f"weight is {message}"


def test_numbers_of_numpy_are_weights():
    (window,) = accumulate(["x", "y"], linear(), steps=2, weight=lambda batch: np.float32(1.5))
    assert window.weight == 3.0


def begun(steps=2, weight=None):
    model = linear()
    x = torch.ones(2, FEATURES, dtype=torch.float64)
    windows = iter(accumulate([x] * 2 * steps, model, steps=steps, weight=weight))
    return model, windows, next(windows)


def test_a_backward_that_is_missing_or_one_too_many():
    _, _, window = begun()
    with pytest.raises(WindowError, match=r"^window\.backward was not called for a micro-batch"):
        list(window)
    model, _, window = begun()
    loss = model.weight.sum()
    with pytest.raises(WindowError, match="outside of the window's loop"):
        window.backward(loss)
    for _ in window:
        window.backward(loss)
        with pytest.raises(WindowError, match="called twice for a micro-batch"):
            window.backward(loss)


def test_a_window_that_is_left_early_iterated_twice_or_not_begun():
    model, windows, window = begun()
    for _ in window:
        window.backward(model.weight.sum())
        with pytest.raises(WindowError, match=r"^window\.loss\(\) was called before the window's last backward$"):
            window.loss()
        break
    with pytest.raises(WindowError, match="a window was left after 1 micro-batches, before its end"):
        next(windows)
    with pytest.raises(WindowError, match="a window was iterated twice"):
        next(iter(window))
    accumulation = accumulate([torch.ones(1, 1)] * 4, model, steps=2)
    for window in accumulation:
        for _ in window:
            break
        break
    with pytest.raises(WindowError, match="a window was left after 1 micro-batches"):
        next(iter(accumulation))
    assert [window.steps for window in accumulation] == [2, 2]  # told once; and windows may be skipped whole


def test_the_last_loop_may_be_broken_off_after_its_backward():
    model, windows, window = begun()
    for _ in window:
        window.backward(model.weight.sum())
        if window.is_last:
            break
    assert next(windows).steps == 2


@pytest.mark.parametrize(
    ("weight", "loss", "message"),
    [
        (None, lambda w: w, "a loss must be a tensor of one number, but has shape [4, 5]"),
        (None, lambda w: 1.0, "a loss must be a tensor of one number, but is a float"),
        (
            None,
            lambda w: {"a": w.sum()},
            "window.backward was given losses for ['a'], but the weights ask for one loss",
        ),
        (
            lambda batch: {"a": 1, "b": 1},
            lambda w: {"a": w.sum()},
            "window.backward was given losses for ['a'], but the weights ask for losses for ['a', 'b']",
        ),
        (
            lambda batch: {"a": 1},
            lambda w: w.sum(),
            "window.backward was given one loss, but the weights ask for losses for ['a']",
        ),
    ],
)
def test_losses_that_are_refused(weight, loss, message):
    model, _, window = begun(weight=weight)
    for _ in window:
        with pytest.raises(WindowError) as caught:
            window.backward(loss(model.weight))
        assert str(caught.value) == message
        break


def test_who_cannot_read_its_data_tells_the_others():
    def broken():
        yield torch.ones(2, FEATURES, dtype=torch.float64)
        raise OSError("the disk is gone")

    def job(seat):
        model = linear()
        loader = broken() if seat.rank == 1 else [torch.ones(2, FEATURES, dtype=torch.float64)] * 4
        for window in windows_of(seat, loader, model, steps=2):
            for batch in window:
                window.backward(model(batch).sum())

    results, _ = on_ranks(3, job)
    assert isinstance(results[1], OSError)
    for error in (results[0], results[2]):
        assert str(error) == "rank 1 cannot go on: OSError: the disk is gone"
        assert error.ranks == (1,)


def test_other_keys_on_one_rank_name_it():
    def job(seat):
        weight = (lambda batch: {"text": 1}) if seat.rank else (lambda batch: {"text": 1, "image": 1})
        next(iter(windows_of(seat, ["x"], linear(), steps=2, weight=weight)))

    for error in on_ranks(3, job)[0]:
        assert isinstance(error, AgreementError)
        assert str(error) == "accumulate's 'weight' differs: rank 0 has 'image', 'text' where ranks 1, 2 have 'text'"


def test_an_empty_loader_is_refused():
    with pytest.raises(AgreementError, match="rank 0 has no batch at all: its loader is empty from the start"):
        list(accumulate([], linear(), steps=2))


def test_what_is_carried_is_counted():
    accumulation = accumulate([torch.ones(1)] * 5, linear(), steps=3, last="carry")
    sizes = []
    for _ in range(3):
        sizes.append(([window.steps for window in accumulation], accumulation.carried))
    assert sizes == [([3], 2), ([3, 3], 1), ([3, 3], 0)]
