"""An Optuna sampler for architectures: proposes whole children near the best ones, within the limits.

Optuna's own samplers see independent categories; they know neither the score table nor the budget. This one asks a proposer
(nas/proposals.py) that knows both. Without one it changes a few parameters of the best trial, which suits any space of
categories, and is what Optuna's conformance suite sees.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from optuna.distributions import BaseDistribution, CategoricalDistribution
from optuna.samplers import BaseSampler, RandomSampler
from optuna.search_space import IntersectionSearchSpace
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState

Propose = Callable[[Sequence[FrozenTrial], np.random.Generator], Mapping[str, Any]]
"""Finished and running trials, and a generator -> parameters of the next trial."""

KEPT = 0.75  # chance of each parameter to stay as in the best trial, without a proposer


class SwapSampler(BaseSampler):
    """Proposes architectures near the best ones.

    Args:
        propose: names the parameters of the next trial; None for changes of the best trial at random.
        space: the parameters and their choices; None for those that all finished trials have.
        seed: each trial's proposal is drawn from a generator of its own, (seed, trials before it), so that a study that
            was stopped goes on as if it never had been. None for other draws every time.

    Note:
        Single-objective studies only.
    """

    def __init__(
        self,
        propose: Propose | None = None,
        space: Mapping[str, CategoricalDistribution] | None = None,
        seed: int | None = None,
    ) -> None:
        self._propose, self._space = propose, space
        self._seed, self._rng = seed, np.random.default_rng(seed)
        self._independent = RandomSampler(seed)
        self._intersection = IntersectionSearchSpace()

    def reseed_rng(self) -> None:
        self._seed, self._rng = None, np.random.default_rng()
        self._independent.reseed_rng()

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        if self._space is not None:
            return dict(self._space)
        found = self._intersection.calculate(study)
        return {name: kind for name, kind in found.items() if not kind.single()}

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        self._raise_error_if_multi_objective(study)
        if not search_space:
            return {}
        trials = [t for t in study.get_trials(deepcopy=False) if t.number != trial.number]
        if self._seed is not None:
            begun = sum(t.state != TrialState.FAIL for t in trials)
            self._rng = np.random.default_rng([self._seed, begun])
        if self._propose is not None:
            return dict(self._propose(trials, self._rng))
        return self._near_the_best(study, trial, trials, search_space)

    def sample_independent(
        self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        self._raise_error_if_multi_objective(study)
        return self._independent.sample_independent(study, trial, param_name, param_distribution)

    def _near_the_best(
        self,
        study: Study,
        trial: FrozenTrial,
        trials: Sequence[FrozenTrial],
        search_space: Mapping[str, BaseDistribution],
    ) -> dict[str, Any]:
        sign = 1 if study.direction.name == "MINIMIZE" else -1
        measured = [t for t in trials if t.state == TrialState.COMPLETE and t.value is not None]
        known: Mapping[str, Any] = min(measured, key=lambda t: sign * (t.value or 0.0)).params if measured else {}
        chosen = {}
        for name, kind in search_space.items():
            stays = name in known and self._rng.random() < KEPT and kind._contains(kind.to_internal_repr(known[name]))
            chosen[name] = known[name] if stays else self.sample_independent(study, trial, name, kind)
        return chosen
