"""`nas score --verify-additivity`: is the score of a structure in a precision the sum of the two?

For single layers drawn from the candidates, all true KLs to the parent on the same tokens, nats per token:

    joint        the structure in the precision
    sum          the structure in bf16, and the precision by the table (precisions.csv)
    apart        the structure in bf16, and the parent's own layer in the precision: as published, with no term that knows both
"""

from __future__ import annotations

import random
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from blocks.files import save_json
from blocks.parent import Parent
from blocks.rounded import round_layer
from blocks.spec import BF16, LayerSpec
from nas.costs import CostModel, Scenario
from nas.precisions import PrecisionScores, PrecisionScoring, parse_precisions
from nas.progress import Reporter
from nas.run import Run

DRAWS = 6  # layers of each precision


@dataclass(frozen=True)
class Check:
    """One structure of one layer in one precision; scores in nats per token."""

    layer: int
    candidate: str
    precision: str
    structure: float
    precision_by_table: float
    precision_of_parent: float
    joint: float

    @property
    def sum_error(self) -> float:
        """Of structure + precision by the table, as a share of the joint score."""
        return (self.structure + self.precision_by_table) / self.joint - 1

    @property
    def apart_error(self) -> float:
        """Of structure + precision of the parent's layer, as a share of the joint score."""
        return (self.structure + self.precision_of_parent) / self.joint - 1


@dataclass
class Additivity:
    """Checks sums of scores against joint ones."""

    scoring: PrecisionScoring
    scores: PrecisionScores
    precisions: Sequence[str]
    seed: int = 0
    draws: int = DRAWS
    _alone: dict[tuple[int, LayerSpec], float] = field(default_factory=dict, repr=False)

    def run(self) -> dict[str, Any]:
        """All checks, written to additivity.json: rows, and by precision the median and the largest size of each error."""
        drawn = list(self._drawn())
        with self.scoring.reporter.task("True KL of single layers", len(drawn)) as advance:
            checks = []
            for layer, spec, precision in drawn:
                checks.append(self._check(layer, spec, precision))
                advance()
        found = {
            "tokens": int(self.scoring.text.numel()),
            "rows": [asdict(c) | {"sum_error": c.sum_error, "apart_error": c.apart_error} for c in checks],
            "errors": {name: _errors([c for c in checks if c.precision == name]) for name in self.precisions},
        }
        save_json(self.scoring.run.path("additivity.json"), found)
        return found

    def _drawn(self) -> Iterator[tuple[int, LayerSpec, str]]:
        """Structures that are not the parent's and that the precision can hold."""
        own, costs = self.scoring.parent.shape.parent_layer, CostModel(self.scoring.parent.shape, Scenario())
        for number, precision in enumerate(self.precisions):
            pairs = [
                (layer, row.spec)
                for layer, rows in enumerate(self.scoring.table)
                for row in rows
                if row.spec not in (own, row.spec.at(precision))
                and costs.holds(row.spec.at(precision))
                and self.scoring.blocks.has(layer)
            ]
            chosen = random.Random(self.seed * 1000 + number).sample(pairs, min(self.draws, len(pairs)))
            yield from ((layer, spec, precision) for layer, spec in sorted(chosen, key=lambda pair: pair[0]))

    def _check(self, layer: int, spec: LayerSpec, precision: str) -> Check:
        own = self.scoring.parent.shape.parent_layer
        return Check(
            layer,
            str(spec),
            precision,
            structure=self._true_kl(layer, spec),
            precision_by_table=self.scores.of(layer, spec.at(precision)),
            precision_of_parent=self._true_kl(layer, own.at(precision)),
            joint=self._true_kl(layer, spec.at(precision)),
        )

    def _true_kl(self, layer: int, spec: LayerSpec) -> float:
        """Of the parent with one layer replaced."""
        if (layer, spec) not in self._alone:
            layers = self.scoring.layers
            library = self.scoring.blocks.open(layer, layers[layer])
            layers[layer] = round_layer(library.layer_weights(spec.structure), spec)
            self._alone[layer, spec] = self.scoring.true_kl(layers)
        return self._alone[layer, spec]


def _errors(checks: Sequence[Check]) -> dict[str, float]:
    if not checks:
        return {}
    sums, apart = ([abs(getattr(check, f"{name}_error")) for check in checks] for name in ("sum", "apart"))
    return {
        "median_sum_error": statistics.median(sums),
        "largest_sum_error": max(sums),
        "median_apart_error": statistics.median(apart),
        "largest_apart_error": max(apart),
    }


def score_and_check(
    run: Run, parent: Parent, device: torch.device, reporter: Reporter, formats: str, tokens: int, verify: bool
) -> dict[str, Any]:
    """`nas score --precisions`: scores what is missing, and checks sums if asked to. Returns what is told of it."""
    names = [name for name in parse_precisions(formats) if name != BF16]
    scoring = PrecisionScoring(run, parent, device, reporter, tokens)
    scores = scoring.ensure(names)
    told: dict[str, Any] = {"scored": names, "rows": len(scores.values)}
    return told | ({"additivity": Additivity(scoring, scores, names, run.config.score.seed).run()} if verify else {})


def additivity_lines(told: dict[str, Any]) -> list[str]:
    """For people: the errors by precision."""
    lines = [f"{', '.join(told['scored']) or 'no precision'} scored: precisions.csv, {told['rows']} rows"]
    for name, errors in told.get("additivity", {}).get("errors", {}).items():
        if errors:
            lines.append(
                f"  {name}: structure + precision is the joint score within {errors['median_sum_error']:.2%} (median; at most "
                f"{errors['largest_sum_error']:.2%}); with the parent's own precision score within {errors['median_apart_error']:.2%} "
                f"({errors['largest_apart_error']:.2%})"
            )
    return lines
