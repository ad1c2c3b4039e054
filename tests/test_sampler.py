"""The sampler: Optuna's own conformance suite, what it proposes within limits, the posterior behind it, and whether it wins."""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import optuna
import pytest
from numpy.typing import NDArray
from optuna.distributions import CategoricalDistribution
from optuna.samplers import BaseSampler
from optuna.testing.pytest_samplers import BasicSamplerTestCase, RelativeSamplerTestCase, SingleOnlySamplerTestCase
from optuna.trial import TrialState
from tables import Table, costs_of, every_architecture, limited, random_table, row, shape_of

import nas.proposals
from blocks.errors import ConfigError
from blocks.spec import Architecture, LayerSpec
from nas.additive import Candidates
from nas.config import SearchConfig
from nas.costs import Scenario
from nas.proposals import BELIEVED, DISTRUST, LEAST, NOISE, Measured, Proposer
from nas.sampler import SwapSampler
from nas.samplers import make_sampler
from nas.study import architecture_of, distributions, parameters

optuna.logging.set_verbosity(optuna.logging.ERROR)
Truth = Callable[[Architecture], float]

# Optuna's conformance suite


class TestConformance(BasicSamplerTestCase, RelativeSamplerTestCase, SingleOnlySamplerTestCase):
    @pytest.fixture(params=[None, 0])
    def sampler(self, request: pytest.FixtureRequest) -> Callable[[], BaseSampler]:
        return lambda: SwapSampler(seed=request.param)


class TestConformanceOfAKnownSpace(BasicSamplerTestCase, SingleOnlySamplerTestCase):
    """A space that the objectives of the suite know nothing of."""

    @pytest.fixture
    def sampler(self) -> Callable[[], BaseSampler]:
        return lambda: SwapSampler(space={"layer": CategoricalDistribution(["a", "b"])}, seed=0)


@pytest.mark.parametrize("direction", ["minimize", "maximize"])
def test_without_a_proposer_it_stays_near_the_best_trial(direction: str) -> None:
    """100 trials over 4^10 choices find what chance alone (1 in 2,500) rarely does: nine of ten right."""
    sign = 1 if direction == "minimize" else -1
    study = optuna.create_study(direction=direction, sampler=SwapSampler(seed=1))
    study.optimize(lambda t: sign * sum(t.suggest_categorical(f"x{i}", [0, 1, 2, 3]) != i % 4 for i in range(10)), 100)
    assert sign * study.best_value <= 1


# A study over architectures


def study_of(candidates: Candidates, sampler: BaseSampler, start: Sequence[Architecture] = ()) -> optuna.Study:
    study = optuna.create_study(sampler=sampler)
    for architecture in start:
        study.enqueue_trial(parameters(architecture))
    return study


def measure(study: optuna.Study, candidates: Candidates, truth: Truth, trials: int) -> None:
    """As `nas search` records true KLs: the values, and by how much the limits are missed."""
    for _ in range(trials):
        trial = study.ask(distributions(candidates.specs))  # type: ignore[arg-type]
        architecture = architecture_of(trial.params)
        cost = candidates.costs.cost(architecture)
        for bound in candidates.bounds:
            trial.set_constraint(bound.name, bound.excess(cost.total(bound.name)))
        study.tell(trial, truth(architecture))


def found(study: optuna.Study) -> list[Architecture]:
    return [architecture_of(trial.params) for trial in study.trials if trial.state == TrialState.COMPLETE]


def best_within(study: optuna.Study) -> float:
    trials = [t for t in study.trials if all(value <= 0 for value in t.constraints.values())]
    return min(t.value for t in trials if t.value is not None)


def product_table(seed: int, layers: int) -> Table:
    """Eight candidates a layer, all pairs of two attentions and four FFNs, dearer the more they leave out."""
    rng = random.Random(seed)
    cut = {"kv2": 0.0, "kv1": 0.4, "768": 0.0, "512": 0.3, "256": 0.6, "skip": 1.0}
    table = []
    for layer in range(layers):
        weight = rng.uniform(0.2, 1.0)
        table.append(
            [
                row(
                    layer, LayerSpec.parse(f"attention:{a}+ffn:{f}"), weight * (cut[a] + cut[f]) * rng.uniform(0.7, 1.3)
                )
                for a in ("kv2", "kv1")
                for f in ("768", "512", "256", "skip")
            ]
        )
    return table


def of_product(seed: int, layers: int, **limits: Any) -> Candidates:
    costs = costs_of(Scenario(batch=1, context=64), shape_of(layers))
    return limited(product_table(seed, layers), costs, **limits)


def additive_truth(candidates: Candidates, seed: int) -> Truth:
    """Sums of other scores than the table's, each as far from it as the prior thinks."""
    rng = np.random.default_rng(seed)
    scores = [np.abs(np.asarray(s) * (1 + DISTRUST * rng.normal(size=len(s)))) for s in candidates.scores]
    return lambda a: float(sum(s[c] for s, c in zip(scores, candidates.choice(a), strict=True)))


def test_proposals_meet_the_limits_and_are_new() -> None:
    for seed in range(3):
        candidates = of_product(seed, 6, budget=0.6, max_params="100e3:", max_latency_ms=1000)
        start = [candidates.architecture(solution.choice) for solution in candidates.pool(4, 2)]
        study = study_of(candidates, make_sampler("swap", candidates, seed), start)
        measure(study, candidates, additive_truth(candidates, seed), 34)
        proposed = found(study)
        assert len(set(proposed)) == len(proposed) == 34
        assert all(candidates.allows(architecture) for architecture in proposed)


def test_a_study_without_a_start_begins_at_the_optimum() -> None:
    candidates = of_product(0, 4, budget=0.5)
    study = study_of(candidates, make_sampler("swap", candidates, 0))
    measure(study, candidates, additive_truth(candidates, 0), 1)
    assert candidates.predicted(found(study)[0]) == pytest.approx(candidates.optimum().score)


def test_nothing_is_repeated_while_others_are_left() -> None:
    """A space of few children: most of them are tried before any comes twice, and none outside the limits ever."""
    candidates = of_product(1, 2, budget=0.5)
    within = [a for a in every_architecture(candidates) if candidates.allows(a)]
    assert 10 <= len(within) <= 40
    study = study_of(candidates, make_sampler("swap", candidates, 0), within[:1])
    measure(study, candidates, additive_truth(candidates, 1), len(within) + 10)
    proposed = found(study)
    first_repeat = next(n for n in range(len(proposed)) if proposed[n] in proposed[:n])
    assert first_repeat >= 0.9 * len(within)
    assert set(proposed) <= set(within)


def test_what_is_running_elsewhere_is_not_proposed_again() -> None:
    candidates = of_product(2, 5, budget=0.6)
    start = [candidates.architecture(solution.choice) for solution in candidates.pool(3, 2)]
    study = study_of(candidates, make_sampler("swap", candidates, 0), start)
    measure(study, candidates, additive_truth(candidates, 2), 3)
    asked = [study.ask(distributions(candidates.specs)).params for _ in range(8)]  # type: ignore[arg-type]
    assert len({tuple(params.items()) for params in asked}) == 8


@pytest.mark.parametrize("name", ["swap", "tpe", "nsga2", "random"])
def test_the_same_seed_proposes_the_same_and_another_does_not(name: str) -> None:
    candidates = of_product(3, 5, budget=0.6)
    truth, optimum = additive_truth(candidates, 3), candidates.architecture(candidates.optimum().choice)
    runs = []
    for seed in (5, 5, 6):
        study = study_of(candidates, make_sampler(name, candidates, seed), [optimum])
        measure(study, candidates, truth, 14)
        runs.append(found(study))
    assert runs[0] == runs[1] != runs[2]


@pytest.mark.parametrize("stop", [1, 4, 9])
@pytest.mark.parametrize("killed", [False, True])
def test_a_stopped_study_goes_on_as_if_never_stopped(stop: int, killed: bool) -> None:
    """Also where the last proposal was begun, its worker killed, and it is queued again."""
    candidates = of_product(4, 5, budget=0.6)
    truth, optimum = additive_truth(candidates, 4), candidates.architecture(candidates.optimum().choice)
    whole = study_of(candidates, make_sampler("swap", candidates, 7), [optimum])
    measure(whole, candidates, truth, 12)
    study = study_of(candidates, make_sampler("swap", candidates, 7), [optimum])
    measure(study, candidates, truth, stop)
    if killed:
        begun = study.ask(distributions(candidates.specs))  # type: ignore[arg-type]
        study.tell(begun, state=TrialState.FAIL)
        study.enqueue_trial(begun.params)
    study.sampler = make_sampler("swap", candidates, 7)
    measure(study, candidates, truth, 12 - stop)
    assert found(study) == found(whole)
    assert [t.value for t in study.trials if t.value is not None] == [t.value for t in whole.trials]


# What it is for: fewer true KLs than samplers that see independent categories


def interacting_truth(candidates: Candidates, seed: int) -> Truth:
    """Other scores than the table's, and for each pair of layers an interaction that grows with what both leave out."""
    rng = np.random.default_rng(seed)
    alone = [np.asarray(s) * np.exp(0.5 * rng.normal(size=len(s))) for s in candidates.scores]
    layers = len(alone)
    pairs = {(i, j): rng.normal(0.1, 0.3, size=(len(alone[i]), len(alone[j]))) for i in range(layers) for j in range(i)}

    def truth(architecture: Architecture) -> float:
        choice = candidates.choice(architecture)
        hurt = [s[c] for s, c in zip(alone, choice, strict=True)]
        both = (w[choice[i], choice[j]] * np.sqrt(hurt[i] * hurt[j]) for (i, j), w in pairs.items())
        return float(sum(hurt) + sum(both))

    return truth


def test_it_beats_chance_and_tpe_on_an_objective_that_is_not_additive() -> None:
    """12 layers x 8 candidates, 120 evaluations from the same start, the median of 3 seeds."""
    reached: dict[str, list[float]] = {"swap": [], "random": [], "tpe": []}
    begun = []
    for seed in range(3):
        candidates = of_product(10 + seed, 12, budget=0.6)
        truth = interacting_truth(candidates, seed)
        start = [candidates.architecture(solution.choice) for solution in candidates.pool(4, 3)]
        begun.append(min(map(truth, start)))
        for name, values in reached.items():
            study = study_of(candidates, make_sampler(name, candidates, seed), start)
            measure(study, candidates, truth, 120)
            values.append(best_within(study) / begun[-1])
    medians = {name: statistics.median(values) for name, values in reached.items()}
    assert medians["swap"] < min(medians["random"], medians["tpe"]), medians
    assert medians["swap"] < 0.95, medians


def wide(seed: int, layers: int = 16) -> Candidates:
    """39 candidates a layer, most of them far worse than the ones worth taking."""
    rng = random.Random(seed)
    table = []
    for layer in range(layers):
        weight = rng.uniform(0.1, 1.0)
        pairs = [(a, width) for a in ("kv2", "kv1", "skip") for width in range(0, 769, 64)]
        hurt = [{"kv2": 0.0, "kv1": 0.02, "skip": 1.0}[a] + (1 - width / 768) ** 3 for a, width in pairs]
        specs = [LayerSpec.parse(f"attention:{a}+ffn:{width or 'skip'}") for a, width in pairs]
        table.append(
            [row(layer, spec, weight * h * rng.uniform(0.7, 1.3)) for spec, h in zip(specs, hurt, strict=True)]
        )
    return limited(table, costs_of(Scenario(batch=1, context=64), shape_of(layers)), budget=0.6)


def test_among_many_candidates_proposals_are_not_the_most_wrong_scores(monkeypatch: pytest.MonkeyPatch) -> None:
    """True KLs of 20 proposals as multiples of the best child before them: no draw below half its score, and any draw."""
    medians: dict[float, list[float]] = {BELIEVED: [], -1e9: []}
    for believed, found in medians.items():
        monkeypatch.setattr(nas.proposals, "BELIEVED", believed)
        for seed in range(4):
            candidates, rng = wide(seed), np.random.default_rng(seed)
            truth = additive_truth(candidates, seed)
            measured = [(a, truth(a)) for a in map(candidates.architecture, (s.choice for s in candidates.pool(4, 2)))]
            start = min(kl for _, kl in measured)
            for _ in range(20):
                proposed = Proposer(candidates)(measured, {a for a, _ in measured}.__contains__, rng)
                assert proposed is not None
                measured.append((proposed, truth(proposed)))
            found.append(statistics.median(kl / start for _, kl in measured[4:]))
            assert believed != BELIEVED or min(kl for _, kl in measured) < 0.9 * start
    assert statistics.median(medians[BELIEVED]) < 1.1 and statistics.median(medians[-1e9]) > 2, medians


# The posterior behind the proposals


def one_hot(candidates: Candidates, architectures: Sequence[Architecture]) -> NDArray[np.float64]:
    """[children, all candidates of all layers]."""
    sizes = [len(specs) for specs in candidates.specs]
    starts = np.cumsum([0, *sizes[:-1]])
    rows = np.zeros((len(architectures), sum(sizes)))
    for place, architecture in enumerate(architectures):
        rows[place, starts + np.array(candidates.choice(architecture))] = 1
    return rows


def posterior(candidates: Candidates, measured: Sequence[Measured]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Mean and covariance of all scores by the textbook's formula (Bishop, PRML, 3.50): S = (S0^-1 + X'X / s^2)^-1."""
    x = one_hot(candidates, [architecture for architecture, _ in measured])
    table = np.concatenate([np.asarray(s) for s in candidates.scores])
    true = np.array([kl for _, kl in measured])
    factor = np.median(true / (x @ table))
    prior = np.diag(1 / (factor * (DISTRUST * table + LEAST * table[table > 0].mean())) ** 2)
    misfit = true - factor * (x @ table)
    noise = NOISE * np.abs(misfit).max()
    covariance = np.linalg.inv(prior + x.T @ x / noise**2)
    return factor * table + covariance @ x.T @ misfit / noise**2, covariance


def some_children(candidates: Candidates, count: int, seed: int) -> list[Architecture]:
    rng = random.Random(seed)
    return [candidates.architecture([rng.randrange(len(specs)) for specs in candidates.specs]) for _ in range(count)]


def draws(candidates: Candidates, measured: Sequence[Measured], count: int, seed: int = 0) -> NDArray[np.float64]:
    rng, proposer = np.random.default_rng(seed), Proposer(candidates)
    return np.array([np.concatenate(proposer.draw(measured, rng)) for _ in range(count)])


def test_draws_have_the_mean_and_the_spread_of_the_posterior() -> None:
    """2,000 draws of 32 scores. A mean is off by five standard errors once in 1.7 million, the share of a variance, whose
    standard error is sqrt(2 / 2000) = 3.2 %, likewise."""
    candidates = of_product(0, 4, budget=1)
    truth = additive_truth(candidates, 0)
    measured = [
        (a, truth(a) + 0.05 * random.Random(n).random()) for n, a in enumerate(some_children(candidates, 12, 0))
    ]
    mean, covariance = posterior(candidates, measured)
    drawn = draws(candidates, measured, 2000)
    errors = (drawn.mean(0) - mean) / np.sqrt(np.diag(covariance) / len(drawn))
    assert np.abs(errors).max() < 5
    shares = drawn.var(0, ddof=1) / np.diag(covariance)
    assert np.abs(shares - 1).max() < 5 * np.sqrt(2 / len(drawn))
    other = [*some_children(candidates, 20, 1), *(a for a, _ in measured)]  # sums too, whose terms are correlated
    sums, x = drawn @ one_hot(candidates, other).T, one_hot(candidates, other)
    shares = sums.var(0, ddof=1) / np.einsum("as,st,at->a", x, covariance, x)
    assert np.abs(shares - 1).max() < 5 * np.sqrt(2 / len(drawn))


def test_many_measured_children_teach_another_additive_truth() -> None:
    """Children never measured are foreseen to a few standard deviations of the posterior, and far better than by the table."""
    candidates = of_product(1, 6, budget=1)
    truth = additive_truth(candidates, 1)
    measured = [(a, truth(a)) for a in some_children(candidates, 200, 1)]
    other = some_children(candidates, 200, 2)
    x, true = one_hot(candidates, other), np.array([truth(a) for a in other])
    _, covariance = posterior(candidates, measured)
    drawn = draws(candidates, measured, 60) @ x.T
    spread = np.sqrt(np.einsum("as,st,at->a", x, covariance, x))
    assert (np.abs(drawn.mean(0) - true) < 5 * spread).all()
    by_table = np.array([candidates.predicted(a) for a in other])
    by_table *= np.median(true / by_table)
    assert np.abs(drawn.mean(0) - true).mean() < 0.1 * np.abs(by_table - true).mean()


def test_without_any_measured_child_draws_are_the_prior() -> None:
    candidates = of_product(2, 4, budget=1)
    table = np.concatenate([np.asarray(s) for s in candidates.scores])
    spread = DISTRUST * table + LEAST * table[table > 0].mean()
    drawn = draws(candidates, [], 2000)
    assert np.abs((drawn.mean(0) - table) / spread).max() < 5 / np.sqrt(len(drawn))
    assert np.abs(drawn.var(0, ddof=1) / spread**2 - 1).max() < 5 * np.sqrt(2 / len(drawn))


def test_a_child_that_was_measured_twice_is_no_trouble() -> None:
    """Two equal rows make the kernel singular, and a table that is exactly right leaves no noise to repair it."""
    candidates = of_product(2, 4, budget=1)
    child = some_children(candidates, 1, 3)[0]
    measured = [(child, candidates.predicted(child))] * 3
    assert np.isfinite(draws(candidates, measured, 20)).all()


def test_spaces_that_are_no_product_are_kept_to() -> None:
    """A table of hand-picked pairs: not every attention goes with every FFN."""
    candidates = limited(random_table(0, most=5), costs_of(), budget=0.6)
    study = study_of(candidates, make_sampler("swap", candidates, 0))
    measure(study, candidates, additive_truth(candidates, 0), 15)
    assert all(candidates.allows(a) and candidates.choice(a) is not None for a in found(study))


def test_seeds_are_those_that_optuna_takes() -> None:
    assert SearchConfig(budget=0.5, seed=2**32 - 1).seed
    with pytest.raises(ConfigError, match=r"^seed is 4294967296; it must be below 2\^32"):
        SearchConfig(budget=0.5, seed=2**32)
