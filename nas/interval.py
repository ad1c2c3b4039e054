"""How sure a score is: bootstrap intervals over sequences (Efron, 1979), percentile form."""

from __future__ import annotations

import numpy as np

RESAMPLES = 1000
LEVEL = 0.95
FEWEST = 4  # sequences: fewer say nothing about their own spread


def bootstrap(values: np.ndarray, seed: int) -> np.ndarray | None:
    """Intervals of the mean: values [candidates, N] of N sequences -> [candidates, 2], low and high at `LEVEL`.

    All candidates see the same resampled sequences. None if N is below `FEWEST`.
    """
    sequences = values.shape[1]
    if sequences < FEWEST:
        return None
    draws = np.random.default_rng(seed).multinomial(sequences, np.full(sequences, 1 / sequences), size=RESAMPLES)
    means = values @ draws.T / sequences
    tail = (1 - LEVEL) / 2
    return np.quantile(means, (tail, 1 - tail), axis=1).T
