"""The guard set, the map from one-pass scores to nats, and the rank correlation."""

from __future__ import annotations

import math
import random

import pytest

from blocks.shape import ModelShape
from blocks.spec import AttentionSpec, FFNSpec, LayerSpec
from nas.guard import ENOUGH, fit_map, guard_set, kind_of, rank_correlation
from search_spaces import load_space

SHAPE = ModelShape(64, 1536, 8, 4, 4, 16, 300)
CANDIDATES = [load_space("default", "transformers").layer_candidates(SHAPE, index) for index in range(8)]
KV2, SKIP, LINEAR = (LayerSpec.parse(text) for text in ("kv2+ffn:512", "skip+ffn:512", "linear+ffn:skip"))


def test_the_ends_and_the_skips_are_always_guarded() -> None:
    guarded = guard_set(SHAPE, CANDIDATES, share=0.0, seed=0)
    parent = SHAPE.parent_layer
    for index in (0, 7):
        assert guarded[index] == [spec for spec in CANDIDATES[index] if spec != parent]
    skips = [
        LayerSpec(parent.attention, FFNSpec("skip")),
        LayerSpec(AttentionSpec("skip"), parent.ffn),
        LayerSpec(AttentionSpec("skip"), FFNSpec("skip")),
    ]
    for index in range(1, 7):
        assert guarded[index] == [spec for spec in CANDIDATES[index] if spec in skips] and len(guarded[index]) == 3


def test_the_share_adds_that_many_at_random_and_never_the_parent() -> None:
    everything = guard_set(SHAPE, CANDIDATES, share=1.0, seed=0)
    assert everything == [[spec for spec in specs if spec != SHAPE.parent_layer] for specs in CANDIDATES]
    least = sum(map(len, guard_set(SHAPE, CANDIDATES, 0.0, 0)))
    rest = sum(map(len, everything)) - least
    added = [sum(map(len, guard_set(SHAPE, CANDIDATES, 0.25, seed))) - least for seed in range(40)]
    assert sum(added) / len(added) == pytest.approx(0.25 * rest, rel=0.1)


def test_the_guard_set_depends_on_the_seed_alone() -> None:
    assert guard_set(SHAPE, CANDIDATES, 0.3, 1) == guard_set(SHAPE, CANDIDATES, 0.3, 1)
    assert guard_set(SHAPE, CANDIDATES, 0.3, 1) != guard_set(SHAPE, CANDIDATES, 0.3, 2)


def test_each_kind_gets_the_median_of_its_ratios() -> None:
    ratios = [0.5, 2.0, 3.0, 4.0, 100.0]  # the last an outlier, which a mean would follow
    pairs = [(KV2, 0.01, 0.01 * ratio) for ratio in ratios] + [(SKIP, 0.2, 0.1)] * ENOUGH
    factors = fit_map(pairs)
    assert factors[kind_of(KV2)] == pytest.approx(3.0)
    assert factors[kind_of(SKIP)] == pytest.approx(0.5)
    assert factors[""] == pytest.approx(0.5)  # six of the ten


def test_a_kind_with_few_pairs_uses_the_factor_of_all() -> None:
    factors = fit_map([(KV2, 0.1, 0.2)] * ENOUGH + [(SKIP, 0.1, 0.9)] * (ENOUGH - 1))
    assert kind_of(SKIP) not in factors and factors[""] == pytest.approx(2.0)


@pytest.mark.parametrize("pairs", [[], [(KV2, 0.1, 0.3)], [(KV2, 0.0, 0.1)] * 9, [(KV2, 0.1, -1e-12)] * 9])
def test_without_pairs_that_say_something_scores_stay(pairs: list[tuple[LayerSpec, float, float]]) -> None:
    assert fit_map(pairs) == {"": 1.0}


def test_the_map_recovers_a_factor_from_noise() -> None:
    rng = random.Random(0)
    pairs = []
    for _ in range(400):
        one_pass = math.exp(rng.uniform(-8, 0))
        pairs.append((LINEAR, one_pass, 1.7 * one_pass * math.exp(rng.gauss(0, 0.3))))
    assert fit_map(pairs)[kind_of(LINEAR)] == pytest.approx(1.7, rel=0.05)


def test_rank_correlation_is_spearmans() -> None:
    def correlation(exact: list[float]) -> float | None:
        pairs = [(KV2, float(rank), value) for rank, value in enumerate(exact)]
        value: float | None = rank_correlation(pairs)["spearman"]
        return value

    assert correlation([1, 8, 27, 64, 125]) == pytest.approx(1.0)
    assert correlation([5, 4, 3, 2, 1]) == pytest.approx(-1.0)
    assert correlation([2, 1, 3, 4, 5]) == pytest.approx(0.9)  # 1 - 6 * 2 / (5 * 24)
    assert correlation([1.0] * 5) is None and correlation([1, 2, 3, 4]) is None
