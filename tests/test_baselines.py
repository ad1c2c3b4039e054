"""The simple children that every search is compared with, against brute force; and the warning when one of them wins."""

from __future__ import annotations

import csv
import json
import random
from pathlib import Path
from typing import Any

import pytest
from app import BUDGET, World, succeed
from hypothesis import given, settings
from hypothesis import strategies as st
from tables import Table, costs_of, every_architecture, limited, random_table, row, shape_of

from blocks.spec import Architecture, LayerSpec
from nas.additive import Candidates
from nas.baselines import (
    BASELINES,
    EMPTY,
    baselines,
    depth_by_score,
    depth_contiguous,
    random_feasible,
    uniform,
)
from nas.costs import Scenario

LAYERS = 4
SHAPE = shape_of(LAYERS)
COSTS = costs_of(Scenario(batch=1, context=64), SHAPE)
PARENT = SHAPE.parent_layer


def table_with_empty_layers(seed: int) -> Table:
    """A random table of few candidates whose layers have an empty candidate, but for one in five."""
    rng = random.Random(seed)
    table = random_table(seed, SHAPE, most=5, target="transformers")
    for index, rows in enumerate(table):
        kept = [r for r in rows if r.spec != EMPTY]
        table[index] = kept if rng.random() < 0.2 else [*kept, row(index, EMPTY, 0.1 + rng.random())]
    return table


def some_candidates(seed: int) -> Candidates:
    rng = random.Random(seed)
    limits: dict[str, Any] = {"budget": rng.choice([0.3, 0.5, 0.7, 0.9])}
    if rng.random() < 0.3:
        limits["max_params"] = f"{rng.choice([50_000, 200_000])}:"
    return limited(table_with_empty_layers(seed), COSTS, **limits)


def emptied(architecture: Architecture) -> list[int] | None:
    """Which layers are left out, where all others are the parent's."""
    if not all(layer in (EMPTY, PARENT) for layer in architecture):
        return None
    return [index for index, layer in enumerate(architecture) if layer == EMPTY]


@settings(max_examples=60)
@given(seed=st.integers(0, 10**6))
def test_the_uniform_baseline_is_the_best_uniform_child(seed: int) -> None:
    candidates = some_candidates(seed)
    fitting = [a for a in every_architecture(candidates) if len(set(a)) == 1 and candidates.allows(a)]
    whole = [a for a in fitting if "skip" not in (a[0].attention.kind, a[0].ffn.kind)]
    best = min(map(candidates.predicted, whole), default=None)
    found = uniform(candidates)
    assert (found is None) == (best is None)
    assert found is None or (found in whole and candidates.predicted(found) == best)


@settings(max_examples=60)
@given(seed=st.integers(0, 10**6))
def test_depth_contiguous_leaves_out_the_fewest_layers_in_a_row_that_hurt_least(seed: int) -> None:
    candidates = some_candidates(seed)
    runs = []
    for architecture in every_architecture(candidates):
        out = emptied(architecture)
        if out and len(out) < LAYERS and out == list(range(out[0], out[-1] + 1)) and candidates.allows(architecture):
            runs.append((len(out), candidates.predicted(architecture), architecture))
    found = depth_contiguous(candidates)
    assert (found is None) == (not runs)
    if found is not None:
        count, score, _ = min(runs, key=lambda pair: pair[:2])
        assert (len(emptied(found) or []), candidates.predicted(found)) == (count, pytest.approx(score))
        assert any(found == architecture for _, _, architecture in runs)


@settings(max_examples=60)
@given(seed=st.integers(0, 10**6))
def test_depth_by_score_leaves_out_the_layers_that_hurt_least_alone(seed: int) -> None:
    """What is left out hurts less, layer by layer, than what is kept; with one layer fewer the limits are not met."""
    candidates = some_candidates(seed)
    score = {r.layer: r.score for rows in candidates.table for r in rows if r.spec == EMPTY}
    cheapest = sorted(score, key=lambda index: score[index])
    prefixes = [
        Architecture(tuple(EMPTY if index in cheapest[:count] else PARENT for index in range(LAYERS)))
        for count in range(1, len(cheapest) + 1)
    ]
    fitting = [architecture for architecture in prefixes if candidates.allows(architecture)]
    found = depth_by_score(candidates)
    assert found == (fitting[0] if fitting else None)
    if found is not None:
        out = emptied(found) or []
        assert max(score[i] for i in out) <= min((score[i] for i in score if i not in out), default=9.0)


@settings(max_examples=60)
@given(seed=st.integers(0, 10**6))
def test_the_random_baseline_is_within_the_limits(seed: int) -> None:
    candidates = some_candidates(seed)
    found = random_feasible(candidates, random.Random(seed))
    if found is None:
        every = [candidates.choice(a) for a in every_architecture(candidates)]
        assert sum(candidates.excess(choice) <= 0 for choice in every) < 0.02 * len(every)
    else:
        assert candidates.allows(found) and all(
            layer in specs for layer, specs in zip(found, candidates.specs, strict=True)
        )
    assert found == random_feasible(candidates, random.Random(seed))


def test_random_baselines_of_many_seeds_are_different_children() -> None:
    candidates = limited(table_with_empty_layers(0), COSTS, budget=0.5)
    assert len({random_feasible(candidates, random.Random(seed)) for seed in range(20)}) > 10


def test_baselines_that_do_not_exist_are_left_out() -> None:
    """Nothing but the parent's layer and one other: no empty layers, and no uniform child without a skip is small enough."""
    other = LayerSpec.parse("attention:skip+ffn:256")
    table = [[row(index, PARENT, 0.0), row(index, other, 0.1)] for index in range(LAYERS)]
    assert set(baselines(limited(table, COSTS, budget=0.5), 0)) == {"random"}
    whole = baselines(limited(table_with_empty_layers(3), COSTS, budget=0.7), 0)
    assert set(whole) <= set(BASELINES) and "random" in whole


def with_lies(run: Path) -> None:
    """Turns the scores of a run around: what hurts most now claims to hurt least."""
    with (run / "scores.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    worst = max(float(r["score"]) for r in rows)
    for r in rows:
        if r["source"] != "parent":
            r["score"] = f"{worst * 1.01 - float(r['score']):.6g}"
    with (run / "scores.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


def test_a_baseline_that_wins_is_a_warning(world: World, tmp_path: Path) -> None:
    run = world.copy("scored", tmp_path / "run")
    words = ("search", "--run", run, *BUDGET, "--verify", 1, "--trials", 1)
    honest = succeed(*words, "--json").json
    assert honest["warnings"] == [] and honest["origin"] == "optimum"
    with_lies(run)
    result = succeed(*words)
    found = json.loads((run / "architecture.json").read_text())
    measured = {trial["origin"]: trial["kl"] for trial in found["trials"]}
    by_child = {tuple(trial["layers"]): trial["kl"] for trial in found["trials"]}
    assert found["origin"] in BASELINES and found["kl"] == min(measured.values()) < measured["optimum"]
    (warning,) = found["warnings"]
    assert warning.startswith(f"the {found['origin']} baseline is the best child measured")
    assert f"warning: {warning}" in result.err
    assert len(found["baselines"]) >= 3
    assert all(told["kl"] == by_child[tuple(told["layers"])] for told in found["baselines"].values())
