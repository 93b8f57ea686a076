"""Batches: any number of ranks draws the same rows, each once, and no rank draws much that is not its own."""

import numpy as np
from distopt.integrations.dalle.batches import CHUNK, chunks
from distopt.integrations.dalle.context import Context
from hypothesis import given
from hypothesis import strategies as st


def rows(ranks, share, step=3, seed=5, stage=1):
    """What all ranks draw, one after the other, and how many rows each had to draw for it."""
    drawn, counts = [], []
    for rank in range(ranks):
        mine = list(chunks(Context(rank=rank, world_size=ranks, seed=seed), stage, step, share * ranks))
        kept = [chunk.rng.integers(2**62, size=chunk.rows)[chunk.kept] for chunk in mine]
        assert sum(map(len, kept)) == share
        drawn.extend(kept)
        counts.append(sum(chunk.rows for chunk in mine))
    return np.concatenate(drawn), counts


@given(st.integers(1, 8), st.integers(1, 40))
def test_any_number_of_ranks_draws_the_rows_that_one_draws(ranks, share):
    alone, _ = rows(1, ranks * share)
    together, counts = rows(ranks, share)
    assert len(set(alone)) == ranks * share
    assert (together == alone).all()
    # A chunk at each end may be another rank's for the most part; none if the share is made of whole chunks.
    assert max(counts) <= share + (2 * (CHUNK - 1) if share % CHUNK else 0)


@given(st.integers(0, 10), st.integers(0, 2**63 - 1), st.integers(1, 3))
def test_rows_are_those_of_one_step_of_one_stage_under_one_seed(step, seed, stage):
    here, _ = rows(1, 9, step, seed, stage)
    assert (here == rows(1, 9, step, seed, stage)[0]).all()
    others = [(step + 1, seed, stage), (step, (seed + 1) % 2**63, stage), (step, seed, stage + 1)]
    assert not set(here) & {row for other in others for row in rows(1, 9, *other)[0]}
