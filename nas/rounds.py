"""How much calibration text is enough: when the architectures that the scores lead to no longer change."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from blocks.shape import ModelShape
from nas.costs import CostModel, Scenario
from nas.interval import FEWEST
from nas.solve import Limit, Problem, solve
from nas.table import ScoreRow

SHARES = (0.9, 0.7, 0.5)  # budgets at which the choice is looked at, as shares of the parent's layers
TOLERANCE = 0.01


def rounds(sequences: int) -> list[slice]:
    """A quarter of the sequences, then up to half, then all; fewer rounds where there are few sequences."""
    ends = [0, max(FEWEST, sequences // 4), max(2 * FEWEST, sequences // 2), sequences]
    stops = sorted({min(end, sequences) for end in ends})
    return [slice(start, stop) for start, stop in itertools.pairwise(stops)]


def choices(rows: Sequence[ScoreRow], shape: ModelShape) -> list[list[str]]:
    """The exact optimum of the additive problem at each of `SHARES` that the space can reach: specs by layer."""
    costs = CostModel(shape, Scenario())
    table = [[row for row in rows if row.layer == layer] for layer in shape.layers]
    scores = [[row.score for row in layer] for layer in table]
    sizes = [[costs.layer_bytes(row.spec) for row in layer] for layer in table]
    found = []
    for share in SHARES:
        limit = Limit("bytes", sizes, high=costs.budget_for_share(share) - costs.fixed_bytes)
        if limit.allows(limit.least) and (solution := solve(Problem(scores, [limit]))) is not None:
            found.append([str(layer[c].spec) for layer, c in zip(table, solution.choice, strict=True)])
    return found


def settled(rows: Sequence[ScoreRow], before: list[list[str]], now: list[list[str]]) -> bool:
    """Whether the choices are the same, or differ by candidates that the later scores `rows` cannot tell apart.

    That is: the earlier choices are no more than `TOLERANCE` worse by the later scores than the later choices.
    """
    score = {(row.layer, str(row.spec)): row.score for row in rows}

    def total(choice: list[str]) -> float:
        return sum(score[layer, spec] for layer, spec in enumerate(choice))

    return all(total(a) <= total(b) * (1 + TOLERANCE) for a, b in zip(before, now, strict=True))
