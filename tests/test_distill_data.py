"""Batches are a pure function of seed, step, rank and world."""

from __future__ import annotations

import numpy as np
import pytest

from blocks.errors import ConfigError, DataError
from distill.data import TokenStream, batch_indices, heldout_batches

PACK = np.arange(60, dtype=np.uint16).reshape(6, 10)


def test_indices_are_pure_and_shared_out() -> None:
    alone = batch_indices(seed=3, step=7, sequences=11, batch=6)
    assert np.array_equal(alone, batch_indices(3, 7, 11, 6))
    assert np.array_equal(alone, np.concatenate([batch_indices(3, 7, 11, 6, rank, 3) for rank in range(3)]))
    assert not np.array_equal(alone, batch_indices(4, 7, 11, 6))


def test_every_epoch_visits_each_sequence_once_in_another_order() -> None:
    order = np.concatenate([batch_indices(0, step, 10, 4) for step in range(5)])
    first, second = order[:10], order[10:]
    assert sorted(first) == sorted(second) == list(range(10))
    assert not np.array_equal(first, second)


def test_batch_larger_than_the_pack() -> None:
    assert np.bincount(batch_indices(0, 0, 3, 7)).tolist() in ([3, 2, 2], [2, 3, 2], [2, 2, 3])


def test_uneven_ranks_are_refused() -> None:
    with pytest.raises(ConfigError, match="3 ranks"):
        batch_indices(0, 0, 10, 4, 0, 3)


@pytest.mark.parametrize(("length", "rows"), [(10, 6), (4, 15), (25, 2)])
def test_packs_are_recut(length: int, rows: int) -> None:
    stream = TokenStream(PACK, length, vocab_size=60)
    assert len(stream) == rows
    assert stream.read(np.array([1]))[0].tolist() == list(range(length, 2 * length))


def test_packs_that_do_not_fit() -> None:
    with pytest.raises(DataError, match="60 tokens"):
        TokenStream(PACK, 61, vocab_size=60)
    with pytest.raises(DataError, match="token 50, outside the vocabulary of 50"):
        TokenStream(PACK, 10, vocab_size=50).read(np.array([0, 5]))
    with pytest.raises(DataError, match="float64"):
        TokenStream(PACK.astype(float), 10, vocab_size=60)


def test_heldout_batches_count_each_sequence_once_with_equal_batches() -> None:
    stream = TokenStream(PACK, 10, vocab_size=60)
    parts = [list(heldout_batches(stream, 50, 10, 2, rank, 2)) for rank in range(2)]
    assert len(parts[0]) == len(parts[1]) == 2
    rows = [int(row[0]) for part in parts for batch, mask in part for row in batch[mask[:, 0]]]
    assert len(rows) == len(set(rows)) == 5
