"""The samplers of `nas search --sampler`: ours, and Optuna's own for comparison."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import optuna
from optuna.samplers import BaseSampler
from optuna.trial import FrozenTrial, TrialState

from nas.additive import Candidates
from nas.proposals import Measured, Proposer
from nas.sampler import SwapSampler
from nas.study import architecture_of, distributions, parameters


def make_sampler(name: str, candidates: Candidates, seed: int) -> BaseSampler:
    """By its name in `nas.config.SAMPLERS`. Each is told of the limits by the trials' constraints."""
    if name == "tpe":
        return optuna.samplers.TPESampler(seed=seed, multivariate=True)
    if name == "nsga2":
        return optuna.samplers.NSGAIISampler(seed=seed)
    if name == "random":
        return optuna.samplers.RandomSampler(seed=seed)
    return SwapSampler(_Swaps(Proposer(candidates)), distributions(candidates.specs), seed)


class _Swaps:
    """A `Proposer` in the terms of a study."""

    def __init__(self, proposer: Proposer) -> None:
        self.proposer = proposer

    def __call__(self, trials: Sequence[FrozenTrial], rng: np.random.Generator) -> Mapping[str, Any]:
        taken = [t for t in trials if t.state != TrialState.FAIL and t.params]
        complete = [t for t in taken if t.state == TrialState.COMPLETE and t.value is not None]
        measured: list[Measured] = [(architecture_of(t.params), float(t.value or 0.0)) for t in complete]
        known = {tuple(sorted(t.params.items())) for t in taken}
        found = self.proposer(measured, lambda a: tuple(sorted(parameters(a).items())) in known, rng)
        if found is None and complete:  # nothing else is left; to repeat the best one costs nothing
            return min(complete, key=lambda t: (any(x > 0 for x in t.constraints.values()), t.value)).params
        return {} if found is None else parameters(found)
