"""The pictures of docs/concepts keep the laws that they show, and are drawn."""

import itertools
import math
from pathlib import Path

import pytest
import torch
from PIL import Image

from bench.concepts.gradients import of_digits
from bench.concepts.pictures import DRAWN, draw

PAGES = Path(__file__).parents[2] / "docs/concepts"


@pytest.fixture(scope="module")
def computed():
    """What the pictures show, to the number."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield {name: shown() for name, (shown, _, _) in DRAWN.items()}
    torch.set_num_threads(threads)


def test_a_power_iteration_is_never_better_than_the_best_and_a_warm_one_near_it(computed):
    found = computed["power-iteration"]
    for warm, fresh, best in zip(found["warm"], found["fresh"], found["best"], strict=True):
        assert best <= warm <= 1
        assert best <= fresh <= 1
    assert found["warm"][0] == found["fresh"][0]
    assert sum(found["warm"][1:]) < 1.15 * sum(found["best"][1:]) < 0.8 * sum(found["fresh"][1:])
    rank, values = found["rank"], found["values"]
    best = math.hypot(*values[rank:]) / math.hypot(*values)
    assert best == pytest.approx(found["best"][-1], rel=1e-6)


def test_gradients_are_those_of_training():
    first, *_, last = of_digits(3, width=16)
    assert first.shape == (16, 16)
    assert not torch.equal(first, last)


def test_what_is_not_delivered_is_what_is_kept(computed):
    found = computed["error-feedback"]
    assert found["with"] == pytest.approx(found["kept"], rel=1e-3)
    assert found["with"][-1] < 0.3 * found["with"][0]
    assert min(found["without"]) > 0.8
    for fed, delivered in zip(found["fed"], found["delivered"], strict=True):
        changed = [b for a, b in itertools.pairwise(delivered) if a != b]
        assert 0 < len(changed) < 60  # a number waits until it is among the largest
        # What has been delivered of a number since its last turn and before it lies within what has been fed.
        assert 0 < delivered[-1] <= 1.1 * fed[-1]


def test_a_dropped_step_is_as_if_it_had_not_been(computed):
    found = computed["transaction"]
    assert found["dropped"] == found["told"]
    losses, kept = found["without"]["losses"], found["without"]["kept"]
    assert losses[:16] == pytest.approx(found["told"]["losses"][:16], rel=1e-6)
    assert all(math.isnan(loss) for loss in losses[16:])
    assert all(math.isnan(norm) for norm in kept[15:])


def test_a_step_takes_what_cannot_be_hidden_and_compression_loses_on_a_fast_link(computed):
    found = computed["overlap"]
    plain = found["seconds"]["plain DDP"]
    for seconds, wire in zip(plain, found["wire"], strict=True):
        assert max(wire, found["compute"]) <= seconds <= found["compute"] + 1.01 * wire + 0.05
    for label in ("rank 16", "rank 64"):
        assert found["seconds"][label][0] < 0.1 * plain[0]
        assert all(math.isnan(s) or s >= found["compute"] for s in found["seconds"][label])
    assert plain[-1] < found["seconds"]["rank 16"][-1]


def test_formats_round_by_half_their_spacing_and_one_scale_fits_one_branch(computed):
    found = computed["scaling"]
    digits = {"float16": 10, "bfloat16": 7, "1-6-9": 9, "0-6-10": 10}
    normal = {"float16": (-14, 15), "bfloat16": (-70, 19), "1-6-9": (-59, 3), "0-6-10": (-59, 3)}
    for name, errors in found["errors"].items():
        of = dict(zip(found["octaves"], errors, strict=True))
        low, high = normal[name]
        assert all(2.0 ** -(digits[name] + 3) < of[k] <= 2.0 ** -(digits[name] + 1) for k in range(low, high))
        if name != "bfloat16":
            assert of[low - 3] > 2 * of[low]
            assert math.isinf(of[high + 1])
    assert found["errors"]["float16"][found["octaves"].index(-30)] == 1
    before, behind = (torch.tensor(found[name]) for name in ("before", "behind"))
    shifted = behind + 15 - before.max()
    assert (shifted < -24).float().mean() > 0.5
    assert (behind + 15 - behind.max() < -14).float().mean() < 1e-3


def test_a_window_counts_every_token_alike(computed):
    found = computed["windows"]
    assert found["window"] == pytest.approx([1.0] * 210, rel=1e-12)
    start = 0
    for tokens in found["tokens"]:
        assert found["means"][start : start + tokens] == pytest.approx([210 / 4 / tokens] * tokens)
        start += tokens


def test_every_picture_has_its_page_and_is_drawn(computed, tmp_path):
    assert {path.stem for path in PAGES.glob("*.png")} == set(DRAWN)
    for name in DRAWN:
        assert f"({name}.png)" in (PAGES / f"{name}.md").read_text()
        draw(name, computed[name], tmp_path / "drawn.png")
        drawn, kept = Image.open(tmp_path / "drawn.png"), Image.open(PAGES / f"{name}.png")
        assert drawn.size == kept.size
        assert len(drawn.getcolors()) > 20
