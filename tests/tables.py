"""Random score tables of a tiny parent, priced under limits as `nas search` prices them; for the tests of the search."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from blocks.shape import ModelShape
from blocks.spec import Architecture, LayerSpec
from nas.additive import Candidates
from nas.config import SearchConfig
from nas.costs import CostModel, Scenario
from nas.datasheet import DATASHEETS, RooflineClock
from nas.limits import bounds_of
from nas.table import ScoreRow
from search_spaces import load_space

SHAPE = ModelShape(64, 768, 3, 4, 2, 16, 272, tie_word_embeddings=True)
SCENARIO = Scenario(batch=2, context=512, prompt=384, output=128)
Table = list[list[ScoreRow]]


def row(layer: int, spec: LayerSpec, score: float) -> ScoreRow:
    return ScoreRow(layer, str(spec.attention), str(spec.ffn), score, None, None, "exact", None, None, score, 0, 0, 0)


def table_of(scores: list[dict[str, float]]) -> Table:
    """Rows of hand-written scores: by layer, {"attention:kv1+ffn:256": 0.1}."""
    return [[row(n, LayerSpec.parse(spec), score) for spec, score in layer.items()] for n, layer in enumerate(scores)]


def random_table(seed: int, shape: ModelShape = SHAPE, most: int = 8, target: str = "vllm") -> Table:
    """The parent's own layer with score 0 and up to `most` - 1 others, more costly to the child the more they leave out."""
    rng, space, costs = random.Random(seed), load_space("default", target), CostModel(shape, Scenario(1, 64))
    table = []
    for layer in shape.layers:
        parent, *others = space.layer_candidates(shape, layer)
        chosen = rng.sample(others, min(most - 1, len(others)))
        cut = {spec: 1 - costs.layer_bytes(spec) / costs.layer_bytes(parent) for spec in chosen}
        table.append([row(layer, parent, 0.0), *(row(layer, s, 0.02 + rng.random() * cut[s]) for s in chosen)])
    return table


def costs_of(scenario: Scenario = SCENARIO, shape: ModelShape = SHAPE) -> CostModel:
    """With the clock of a datasheet, so that limits of time have a meaning."""
    return CostModel(shape, scenario, RooflineClock(DATASHEETS["H100"], shape, scenario))


def limited(table: Table, costs: CostModel, **limits: Any) -> Candidates:
    """Under limits as `nas search` is given them: `limited(table, costs, budget=0.6, max_params="1000:")`."""
    return Candidates.of(table, costs, bounds_of(SearchConfig(**limits).ranges, costs))


def every_architecture(candidates: Candidates) -> Iterator[Architecture]:
    return map(Architecture, itertools.product(*candidates.specs))


def shape_of(layers: int, **changes: Any) -> ModelShape:
    return replace(SHAPE, num_hidden_layers=layers, **changes)
