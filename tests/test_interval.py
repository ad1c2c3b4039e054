"""Bootstrap intervals of scores: against the whole bootstrap distribution, and in what they are for."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from nas.interval import FEWEST, LEVEL, bootstrap


def values(candidates: int, sequences: int, seed: int = 0) -> np.ndarray:
    """Scores as skewed as those of sequences are."""
    return np.random.default_rng(seed).gamma(2.0, size=(candidates, sequences))


def intervals(of: np.ndarray, seed: int = 0) -> np.ndarray:
    found = bootstrap(of, seed)
    assert found is not None and found.shape == (len(of), 2)
    return found


@pytest.mark.parametrize("sequences", [4, 5, 6])
def test_bounds_are_quantiles_of_all_resamples(sequences: int) -> None:
    """All N^N of them; what a thousand draws leave is put as the share of resamples that lies outside the bounds."""
    scores = values(20, sequences)
    every = np.array(list(itertools.product(range(sequences), repeat=sequences)))
    for own, (low, high) in zip(scores, intervals(scores), strict=True):
        means = own[every].mean(1)
        for outside, inside in ((means < low, means <= low), (means > high, means >= high)):
            # The deviation of a share of 0.025 among 1000 draws is 0.005; equal means lie on both sides of a bound.
            assert outside.mean() - 0.02 < (1 - LEVEL) / 2 < inside.mean() + 0.02


@pytest.mark.parametrize("sequences", [FEWEST, 16, 100])
def test_intervals_contain_the_mean(sequences: int) -> None:
    scores = values(200, sequences)
    low, high = intervals(scores).T
    assert (low < scores.mean(1)).all() and (scores.mean(1) < high).all()
    assert (scores.min(1) <= low).all() and (high <= scores.max(1)).all()


def test_intervals_shrink_with_the_root_of_the_number_of_sequences() -> None:
    widths = [float(np.diff(intervals(values(300, sequences))).mean()) for sequences in (16, 64, 256)]
    for wide, narrow in itertools.pairwise(widths):
        assert narrow == pytest.approx(wide / 2, rel=0.1)


def test_intervals_hold_what_they_say() -> None:
    """The true mean of 2 lies in 95 % of them, a little less often where few skewed values are resampled."""
    low, high = intervals(values(2000, 64)).T
    assert 0.91 < ((low <= 2.0) & (high >= 2.0)).mean() < 0.97


def test_all_candidates_see_the_same_resamples() -> None:
    """So what one is worse than another by is as sure as their difference, not as each of them."""
    (own,) = values(1, 12)
    one, scaled, shifted = intervals(np.stack((own, 3 * own, own + 7)))
    np.testing.assert_allclose(scaled, 3 * one)
    np.testing.assert_allclose(shifted, one + 7)


def test_equal_sequences_leave_no_doubt() -> None:
    np.testing.assert_allclose(intervals(np.full((2, 8), 0.25)), 0.25)


def test_the_same_seed_gives_the_same_intervals() -> None:
    scores = values(5, 10)
    assert np.array_equal(intervals(scores, 3), intervals(scores, 3))
    assert not np.array_equal(intervals(scores, 3), intervals(scores, 4))


@pytest.mark.parametrize("sequences", range(FEWEST))
def test_too_few_sequences_have_no_interval(sequences: int) -> None:
    assert bootstrap(values(3, sequences), 0) is None
