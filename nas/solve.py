"""The additive problem, solved exactly: one candidate per layer, least total score, total cost within the limit.

A multiple-choice knapsack as a mixed-integer program for HiGHS (scipy). Costs are whole bytes; each layer's are counted
from its cheapest candidate, divided by their greatest common divisor and split into digits, so that the solver's
tolerances rarely matter. Every answer is checked in integers all the same, and one that a tolerance let over the limit
is forbidden by name.
"""

from __future__ import annotations

import itertools
import math
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_matrix

from blocks.errors import InfeasibleBudgetError, NasError

GAP = 1e-9
LARGEST_COEFFICIENT = 100_000  # HiGHS takes 1e-6 for an integer: beyond this its slips are whole units


@dataclass(frozen=True)
class Problem:
    """Layers x candidates: `scores[l][c]` (nats per token) and `costs[l][c]` (bytes); total cost at most `limit`."""

    scores: Sequence[Sequence[float]]
    costs: Sequence[Sequence[int]]
    limit: int

    def total_cost(self, choice: Sequence[int]) -> int:
        return sum(costs[c] for costs, c in zip(self.costs, choice, strict=True))

    def total_score(self, choice: Sequence[int]) -> float:
        return sum(scores[c] for scores, c in zip(self.scores, choice, strict=True))

    @property
    def smallest_cost(self) -> int:
        return sum(min(costs) for costs in self.costs)


@dataclass(frozen=True)
class Solution:
    """One candidate index per layer; its score, its cost, and the proven lower bound of the score."""

    choice: tuple[int, ...]
    score: float
    cost: int
    bound: float


def solve(problem: Problem, avoid: Sequence[Sequence[int]] = (), distance: int = 1) -> Solution | None:
    """The proven optimum, at least `distance` layers away from every choice in `avoid`.

    Returns None if `avoid` leaves nothing. Raises InfeasibleBudgetError if the limit alone cannot be met (its
    `smallest_gb` counts the layers only: the caller adds what is fixed).
    """
    if problem.smallest_cost > problem.limit:
        raise InfeasibleBudgetError("no choice fits", smallest_gb=problem.smallest_cost / 1e9, binding="memory")
    sizes = [len(scores) for scores in problem.scores]
    starts = np.concatenate(([0], np.cumsum(sizes)))
    flat_scores = np.concatenate([np.asarray(s, dtype=float) for s in problem.scores])
    columns = np.arange(len(flat_scores) + 1)  # the last one carries from the low to the high digits of the bytes
    one_each = csr_matrix(
        (np.ones(len(flat_scores)), (np.repeat(np.arange(len(sizes)), sizes), columns[:-1])),
        shape=(len(sizes), len(columns)),
    )
    constraints = [LinearConstraint(one_each, 1, 1), *_within_limit(problem)]
    upper = np.append(np.ones(len(flat_scores)), len(sizes))

    def keep_away(choice: Sequence[int], layers: int) -> None:
        taken = np.zeros(len(columns))
        taken[starts[:-1] + np.asarray(choice)] = 1
        constraints.append(LinearConstraint(taken[None], -np.inf, len(sizes) - layers))

    for choice in avoid:
        keep_away(choice, distance)
    while True:
        with _silent_stdout():
            result = milp(
                np.append(flat_scores, 0.0),
                constraints=constraints,
                integrality=np.ones(len(columns), dtype=np.int64),
                bounds=Bounds(0, upper),
                options={"mip_rel_gap": GAP},
            )
        if result.status == 2:
            return None
        if result.x is None:
            raise NasError(f"the solver gave up on the additive problem: {result.message}")
        picked = tuple(int(np.argmax(result.x[a:b])) for a, b in itertools.pairwise(starts))
        cost = problem.total_cost(picked)
        if cost <= problem.limit:
            return Solution(picked, problem.total_score(picked), cost, float(result.mip_dual_bound))
        keep_away(picked, 1)  # a tolerance let it through: forbid this choice and no other


def _within_limit(problem: Problem) -> list[LinearConstraint]:
    """Total cost within the limit, in two rows of digits and a carry c, as the last column:

        sum low x <= limit_low + base c        sum high x + c <= limit_high

    In one row of whole bytes the solver's relative tolerances would be thousands of bytes wide.
    """
    extra = [cost - min(costs) for costs in problem.costs for cost in costs]
    unit = math.gcd(*extra) or 1
    limit, most = (problem.limit - problem.smallest_cost) // unit, max(extra) // unit
    base = most + 1 if most < LARGEST_COEFFICIENT else math.isqrt(most) + 1
    low = np.array([cost // unit % base for cost in extra] + [-base], dtype=float)
    high = np.array([cost // unit // base for cost in extra] + [1], dtype=float)
    return [
        LinearConstraint(low[None], -np.inf, limit % base + 0.5),
        LinearConstraint(high[None], -np.inf, limit // base + 0.5),
    ]


@contextmanager
def _silent_stdout() -> Iterator[None]:
    """HiGHS prints remarks of its own past Python's streams; standard output is for results (`--json`)."""
    sys.stdout.flush()
    saved = os.dup(1)
    with open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), 1)
    try:
        yield
    finally:
        os.dup2(saved, 1)
        os.close(saved)


def solve_pool(problem: Problem, size: int, distance: int) -> list[Solution]:
    """The optimum and up to size - 1 near-optima, each at least `distance` layers from all before it, best first."""
    pool: list[Solution] = []
    while len(pool) < size:
        found = solve(problem, [solution.choice for solution in pool], distance)
        if found is None:
            break
        pool.append(found)
    return pool
