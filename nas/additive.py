"""The additive problem of a search: a score table, what each candidate costs, and the limits on the whole child.

minimise sum of scores      such that every limit holds for what is fixed + the sum over layers
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from blocks.errors import ConfigError, InfeasibleBudgetError
from blocks.spec import Architecture, LayerSpec
from nas.costs import CostModel
from nas.limits import Bound, as_limits, infeasible
from nas.solve import Problem, Solution, solve, solve_pool
from nas.table import ScoreRow

if TYPE_CHECKING:
    from nas.precisions import PrecisionScores


@dataclass(frozen=True)
class Candidates:
    """The score table, priced, under limits.

    Attributes:
        table: rows by layer; only those that the scenario's GPUs can share are choices.
        costs: prices.
        bounds: on the whole child.
        precisions: what of the scores is of the candidates' precisions; None where all are bf16.
    """

    table: list[list[ScoreRow]]
    costs: CostModel
    bounds: tuple[Bound, ...]
    precisions: PrecisionScores | None = None

    @classmethod
    def of(
        cls,
        table: list[list[ScoreRow]],
        costs: CostModel,
        bounds: Sequence[Bound],
        precisions: PrecisionScores | None = None,
    ) -> Candidates:
        """Leaves out what `tp` GPUs cannot share. Raises ConfigError if a layer then has nothing left."""
        kept = [[row for row in rows if costs.divides(row.spec)] for rows in table]
        if not all(kept):
            heads = costs.shape.num_attention_heads, costs.shape.num_key_value_heads
            raise ConfigError(
                f"--tp {costs.scenario.tp}: no candidate of layer {kept.index([])} can be shared by so many GPUs ({heads[0]} query and "
                f"{heads[1]} KV heads, {costs.shape.intermediate_size} channels); use a divisor of them"
            )
        return cls(kept, costs, tuple(bounds), precisions)

    @cached_property
    def specs(self) -> list[list[LayerSpec]]:
        return [[row.spec for row in rows] for rows in self.table]

    @cached_property
    def structures(self) -> list[list[LayerSpec]]:
        """The candidates without their precisions, each once."""
        return [list(dict.fromkeys(spec.structure for spec in specs)) for specs in self.specs]

    def rounding(self, layer: int, spec: LayerSpec) -> float:
        """What of a candidate's score is that of its precisions, nats per token."""
        return 0.0 if self.precisions is None else self.precisions.of(layer, spec, self.costs.scenario.kv_dtype)

    @cached_property
    def scores(self) -> list[list[float]]:
        return [[row.score for row in rows] for rows in self.table]

    @cached_property
    def _places(self) -> list[dict[LayerSpec, int]]:
        return [{spec: place for place, spec in enumerate(specs)} for specs in self.specs]

    @cached_property
    def fixed(self) -> dict[str, int]:
        return {bound.name: self.costs.fixed_total(bound.name) for bound in self.bounds}

    @cached_property
    def problem(self) -> Problem:
        return self.problem_of(self.scores)

    def problem_of(self, scores: Sequence[Sequence[float]]) -> Problem:
        """The same limits, other scores."""
        return Problem(scores, as_limits(self.bounds, self.fixed, self._amounts))

    @cached_property
    def _amounts(self) -> dict[str, list[list[int]]]:
        names = [bound.name for bound in self.bounds]
        return {name: [[self.costs.layer_total(name, s) for s in specs] for specs in self.specs] for name in names}

    def tightened(self, progress: float, start: Architecture) -> Candidates:
        """The same with limits on the way from a child to these: at 0 that child meets them, at 1 they are as they are.

        Limits from below are left out on the way: what is still large meets them.
        """
        if progress >= 1:
            return self
        cost, moved = self.costs.cost(start), []
        for bound in self.bounds:
            if bound.high is not None:
                at_start = max(cost.total(bound.name), bound.high)
                moved.append(Bound(bound.name, None, round(at_start + progress * (bound.high - at_start))))
        return Candidates(self.table, self.costs, tuple(moved), self.precisions)

    def has(self, architecture: Architecture) -> bool:
        """Whether an architecture is one of these candidates."""
        return all(spec in places for places, spec in zip(self._places, architecture, strict=True))

    def choice(self, architecture: Architecture) -> tuple[int, ...]:
        """Indices into the table. Raises KeyError for an architecture of other candidates."""
        return tuple(places[spec] for places, spec in zip(self._places, architecture, strict=True))

    def architecture(self, choice: Sequence[int]) -> Architecture:
        return Architecture(tuple(specs[c] for specs, c in zip(self.specs, choice, strict=True)))

    def predicted(self, architecture: Architecture) -> float:
        """Sum of the scores: the additive prediction of the child's KL, nats per token."""
        return self.problem.total_score(self.choice(architecture))

    def allows(self, architecture: Architecture) -> bool:
        """Whether a child meets all limits, in whole numbers."""
        cost = self.costs.cost(architecture)
        return all(bound.allows(cost.total(bound.name)) for bound in self.bounds)

    def excess(self, choice: Sequence[int]) -> float:
        """By how much a child is outside the limit it misses most, as a share; 0 or below if it meets all."""
        totals = ((bound, self.fixed[bound.name] + self.problem.total(bound.name, choice)) for bound in self.bounds)
        return max((bound.excess(total) for bound, total in totals), default=0.0)

    def optimum(self) -> Solution:
        """The proven optimum. Raises InfeasibleBudgetError with what binds and the smallest budget."""
        try:
            solution = solve(self.problem)
        except InfeasibleBudgetError:
            raise self._infeasible() from None
        assert solution is not None
        return solution

    def pool(self, size: int, distance: int) -> list[Solution]:
        """The optimum and diverse near-optima. Raises InfeasibleBudgetError as `optimum`."""
        try:
            return solve_pool(self.problem, size, distance)
        except InfeasibleBudgetError:
            raise self._infeasible() from None

    def _infeasible(self) -> InfeasibleBudgetError:
        if [bound.name for bound in self.bounds] == ["memory"]:
            budget, smallest = self.bounds[0].high, self.fixed["memory"] + self.problem.limit("memory").least
            if budget is not None and budget < smallest:
                return self._too_small(budget)
        return infeasible(
            self.problem, self.fixed, self.bounds, "; change a limit or the scenario, or use a wider --space"
        )

    def _too_small(self, budget: int) -> InfeasibleBudgetError:
        """The usual case, memory alone: what the smallest child is made of, and the options that would do."""
        costs, fixed = self.costs, self.costs.fixed_bytes
        cheapest = [min(specs, key=costs.layer_bytes) for specs in self.specs]
        smallest = fixed + sum(map(costs.layer_bytes, cheapest))
        kv = sum(map(costs.layer_kv_bytes, cheapest))
        parts = {
            "embeddings, head and final norm": fixed - costs.reserve_bytes,
            "the reserve": costs.reserve_bytes,
            "the KV cache of the smallest layers": kv,
            "the weights of the smallest layers": smallest - fixed - kv,
        }
        binding = max(parts, key=lambda name: parts[name])
        sizes = ", ".join(f"{name} {size / 1e9:.4f} GB" for name, size in parts.items())
        parent = costs.cost(costs.shape.parent_architecture).total_bytes
        share = -(-(smallest - fixed) * 10_000 // (parent - fixed)) / 10_000
        message = (
            f"no child of this space fits {budget / 1e9:.4f} GB: the smallest takes {_up(smallest)} GB ({sizes}); "
            f"what binds is {binding}. Raise --budget-gb to {_up(smallest)} (--budget to {share:.4f}) or more, or lower --batch {costs.scenario.batch} or "
            f"--context {costs.scenario.context}, or use a wider --space"
        )
        return InfeasibleBudgetError(message, smallest / 1e9, binding)


def _up(size: int) -> str:
    """Bytes as GB, rounded up in the fourth digit."""
    return f"{-(-size // 100_000) / 10_000:.4f}"
