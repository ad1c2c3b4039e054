"""The additive problem of a run: its score table, joined with the precisions that a search may choose, under its limits."""

from __future__ import annotations

from dataclasses import replace

import torch

from blocks.errors import CheckpointError, InfeasibleBudgetError
from blocks.formats import format_named
from blocks.parent import Parent
from blocks.shape import ModelShape
from nas.additive import Candidates
from nas.clock import Clock, load_clock
from nas.config import SearchConfig
from nas.costs import CostModel, Scenario
from nas.limits import bounds_of
from nas.precisions import (
    PrecisionScoring,
    held_by_none,
    known_precisions,
    load_precisions,
    parse_precisions,
    require_served,
    table_of,
    to_score,
    with_precisions,
)
from nas.progress import Reporter
from nas.run import Run
from nas.table import load_table
from nas.turns import turn


def load_candidates(
    run: Run, shape: ModelShape, config: SearchConfig, scenario: Scenario, budget: float | None = None
) -> Candidates:
    """The run's score table under the limits of a configuration (and a share of the parent instead of its budget).

    Raises CheckpointError if it is of another parent, ConfigError for limits that contradict each other or lack a clock.
    """
    table, precisions = load_table(run.path("scores.csv")), None
    if len(table) != shape.num_hidden_layers:
        raise CheckpointError(
            f"{run.path('scores.csv')} has {len(table)} layers, the parent {shape.num_hidden_layers}; run `nas score` again"
        )
    costs = CostModel(shape, scenario, load_search_clock(shape, config, scenario))
    formats = parse_precisions(config.precisions)
    if to_score(formats, [scenario.kv_dtype]):
        precisions = load_precisions(run.path(table_of(config.quantizer)))
        table = with_precisions(table, precisions, formats, costs)
    return Candidates.of(table, costs, bounds_of(config.ranges_at(budget), costs), precisions)


def load_search_clock(shape: ModelShape, config: SearchConfig, scenario: Scenario) -> Clock | None:
    return None if config.clock is None else load_clock(config.clock, shape, scenario)


def score_precisions(
    run: Run, parent: Parent, config: SearchConfig, scenario: Scenario, device: torch.device, reporter: Reporter
) -> None:
    """Scores those precisions of a search that have no scores yet. Raises ConfigError for one that the target cannot serve."""
    formats = parse_precisions(config.precisions)
    require_served(run.config.target, formats)
    wanted = to_score(formats, scenario.kv_dtype.split(","))
    if wanted:
        for name in held_by_none(load_table(run.path("scores.csv")), formats, CostModel(parent.shape, Scenario())):
            shared = format_named(name).group
            reporter.say(
                f"  warning: nothing of this parent can be had in {name}: no inputs are a multiple of {shared}"
            )
        with turn(run.path("config.yaml")):  # one worker makes them for all
            tokens, quantizer = config.precision_tokens, config.quantizer
            PrecisionScoring(run, parent, device, reporter, tokens, quantizer).ensure(wanted)


def with_scored_kv_dtypes(run: Run, config: SearchConfig, scenario: Scenario) -> Scenario:
    """The scenario without those of its KV dtypes that `score_precisions` has yet to score; as it is if that leaves none."""
    dtypes = scenario.kv_dtype.split(",")
    if len(dtypes) == 1:
        return scenario
    known = known_precisions(run.path(table_of(config.quantizer)))
    scored = [dtype for dtype in dtypes if known.issuperset(to_score((), [dtype]))]
    return replace(scenario, kv_dtype=",".join(scored)) if scored else scenario


def choose_kv_dtype(
    run: Run,
    shape: ModelShape,
    config: SearchConfig,
    scenario: Scenario,
    reporter: Reporter,
    budget: float | None = None,
) -> Scenario:
    """The scenario with the one of its KV dtypes whose optimum has the least score. Raises InfeasibleBudgetError if none has one."""
    choices = scenario.by_kv_dtype
    if len(choices) == 1:
        return choices[0]
    found: list[tuple[float, Scenario]] = []
    for choice in choices:
        try:
            found.append((load_candidates(run, shape, config, choice, budget).optimum().score, choice))
        except InfeasibleBudgetError:
            if choice is choices[-1] and not found:
                raise
    told = ", ".join(f"{choice.kv_dtype} {score:.4f}" for score, choice in found)
    _, best = min(found, key=lambda pair: pair[0])
    reporter.say(f"  KV cache in {best.kv_dtype} (predicted KL: {told})")
    return best
