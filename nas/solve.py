"""The additive problem, solved exactly: one candidate per group, least total score, every limit met.

A multiple-choice knapsack with any number of limits, each a sum of whole numbers (bytes, parameters, nanoseconds) with
a least value, a largest value, or both. `solve` gives the proven optimum with its bound and the price of every limit,
`solve_pool` diverse near-optima, `extreme` and `why_infeasible` what the limits leave.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from blocks.errors import InfeasibleBudgetError

GAP = 1e-9
POOL_GAP = 1e-4  # of pool members after the first
POOL_STATES = 2_000


@dataclass(frozen=True)
class Limit:
    """`low` <= sum over groups of `amounts[g][choice[g]]` <= `high`; whole numbers (bytes, parameters, ns).

    None is no bound.
    """

    name: str
    amounts: Sequence[Sequence[int]]
    low: int | None = None
    high: int | None = None

    def total(self, choice: Sequence[int]) -> int:
        return sum(int(amounts[c]) for amounts, c in zip(self.amounts, choice, strict=True))

    def allows(self, total: int) -> bool:
        return (self.low is None or self.low <= total) and (self.high is None or total <= self.high)

    @property
    def least(self) -> int:
        """The least total that any choice has."""
        return sum(int(min(amounts)) for amounts in self.amounts)

    @property
    def largest(self) -> int:
        return sum(int(max(amounts)) for amounts in self.amounts)


@dataclass(frozen=True)
class Problem:
    """Groups (layers or subblocks) x candidates, exactly one candidate a group: `scores[g][c]` in nats per token."""

    scores: Sequence[Sequence[float]]
    limits: Sequence[Limit] = ()

    def limit(self, name: str) -> Limit:
        return next(limit for limit in self.limits if limit.name == name)

    def total_score(self, choice: Sequence[int]) -> float:
        return math.fsum(scores[c] for scores, c in zip(self.scores, choice, strict=True))

    def total(self, name: str, choice: Sequence[int]) -> int:
        return self.limit(name).total(choice)

    def feasible(self, choice: Sequence[int]) -> bool:
        return all(limit.allows(limit.total(choice)) for limit in self.limits)


@dataclass(frozen=True)
class Solution:
    """One candidate index per group, and what is known of it.

    Attributes:
        score: nats per token.
        totals: the sum of each limit's amounts, by its name.
        bound: proven lower bound of the best score.
        prices: nats per token that one unit more of a limit's bound would save, in the linear relaxation; 0 if slack.
        binding: the limits whose price is above 0.
    """

    choice: tuple[int, ...]
    score: float
    totals: dict[str, int]
    bound: float
    prices: dict[str, float] = field(default_factory=dict)
    binding: tuple[str, ...] = ()

    @property
    def gap(self) -> float:
        """How much better a score could be at most, in nats per token."""
        return max(0.0, self.score - self.bound)

    def proof(self) -> dict[str, Any]:
        """What is known of it, without the choice, as architecture.json has it."""
        known = {"score": self.score, "bound": self.bound, "gap": self.gap}
        return known | {"binding": list(self.binding), "prices": self.prices}


@dataclass(frozen=True)
class Reach:
    """What one limit's total can be: alone, and under the bounds of all other limits (None if those have no choice)."""

    name: str
    low: int | None
    high: int | None
    least: int
    largest: int
    least_under_others: int | None
    largest_under_others: int | None

    @property
    def missed_alone(self) -> bool:
        return _missed(self, self.least, self.largest)

    @property
    def missed_under_others(self) -> bool:
        """Whether the others have choices, and none of them meets this one."""
        if self.least_under_others is None or self.largest_under_others is None:
            return False
        return _missed(self, self.least_under_others, self.largest_under_others)


def _missed(reach: Reach, least: int, largest: int) -> bool:
    return (reach.high is not None and reach.high < least) or (reach.low is not None and reach.low > largest)


@dataclass(frozen=True)
class Conflict:
    """Why no choice meets the limits.

    Attributes:
        reaches: of every limit, in the problem's order.
        conflicting: the smallest set of limits that cannot be met together: one name if it cannot be met by any choice.
    """

    reaches: tuple[Reach, ...]
    conflicting: tuple[str, ...]

    def reach(self, name: str) -> Reach:
        return next(reach for reach in self.reaches if reach.name == name)


def solve(
    problem: Problem,
    avoid: Sequence[Sequence[int]] = (),
    distance: int = 1,
    near: tuple[Sequence[int], int] | None = None,
    gap: float = GAP,
) -> Solution | None:
    """The proven optimum, at least `distance` groups away from every choice in `avoid`.

    Args:
        near: (choice, changes): at most `changes` groups differ from it.
        gap: relative gap at which the search for better ones stops. `Solution.gap` tells if it was not reached: data made to
            be hard (many limits, scores that are the limits' own amounts turned around) can be left at some 1e-5.

    Returns None if `avoid` and `near` leave nothing. Raises InfeasibleBudgetError if the limits themselves cannot be met.
    """
    return _solve(problem, avoid, distance, near, gap)


def _solve(
    problem: Problem,
    avoid: Sequence[Sequence[int]],
    distance: int,
    near: tuple[Sequence[int], int] | None,
    gap: float,
    states: int | None = None,
) -> Solution | None:
    from nas.knapsack import MOST_STATES, optimum

    cuts = [_away(problem, choice, distance) for choice in avoid]
    if near is not None:
        cuts.append(_close(problem, *near))
    best = optimum(problem.scores, (*problem.limits, *cuts), gap, states or MOST_STATES)
    if best is None:
        if not cuts or not _compatible(problem.limits):
            raise _infeasible(problem)
        return None
    prices = {limit.name: best.prices.get(place, 0.0) for place, limit in enumerate(problem.limits)}
    return Solution(
        choice=best.choice,
        score=problem.total_score(best.choice),
        totals={limit.name: limit.total(best.choice) for limit in problem.limits},
        bound=best.bound,
        prices=prices,
        binding=tuple(name for name, price in prices.items() if price > 0),
    )


def solve_with(problem: Problem, *limits: Limit, gap: float = GAP) -> Solution | None:
    """The optimum under further limits; None if no choice meets them."""
    try:
        return solve(Problem(problem.scores, [*problem.limits, *limits]), gap=gap)
    except InfeasibleBudgetError:
        return None


def solve_pool(problem: Problem, size: int, distance: int, gap: float = POOL_GAP) -> list[Solution]:
    """The optimum, then up to size - 1 near-optima, each at least `distance` groups from all before it, best first.

    The first is proven. For the others `gap` is enough, and where even that would take long, what `POOL_STATES` find:
    proving that the second to last of many equals is one takes minutes, and scores are not known to four digits. Each
    tells its own `gap`.
    """
    pool: list[Solution] = []
    while len(pool) < size:
        taken = [solution.choice for solution in pool]
        found = _solve(problem, taken, distance, None, gap, POOL_STATES) if pool else solve(problem)
        if found is None:
            break
        pool.append(found)
    return [*pool[:1], *sorted(pool[1:], key=lambda solution: solution.score)]


def extreme(problem: Problem, name: str, sense: Literal["min", "max"]) -> int | None:
    """The least or largest total of one limit's amounts under all other limits; None if no choice meets those."""
    wanted = problem.limit(name)
    return _extreme(wanted, [limit for limit in problem.limits if limit is not wanted], sense)


def _extreme(wanted: Limit, others: Sequence[Limit], sense: Literal["min", "max"]) -> int | None:
    from nas.knapsack import optimum

    if not others:
        return wanted.least if sense == "min" else wanted.largest
    sign = 1 if sense == "min" else -1
    signed = [[sign * int(amount) for amount in amounts] for amounts in wanted.amounts]
    best = optimum([[float(amount - min(group)) for amount in group] for group in signed], others, 0.0)
    return None if best is None else wanted.total(best.choice)


def why_infeasible(problem: Problem) -> Conflict:
    """For every limit what its total can be, alone and under the others, and the fewest limits that conflict."""
    reaches = []
    for limit in problem.limits:
        least, largest = extreme(problem, limit.name, "min"), extreme(problem, limit.name, "max")
        reaches.append(Reach(limit.name, limit.low, limit.high, limit.least, limit.largest, least, largest))
    return Conflict(tuple(reaches), _conflicting(problem.limits))


def _conflicting(limits: Sequence[Limit]) -> tuple[str, ...]:
    subsets: Iterable[tuple[Limit, ...]] = itertools.chain.from_iterable(
        itertools.combinations(limits, size) for size in range(1, len(limits) + 1)
    )
    for subset in subsets:
        if not _compatible(subset):
            return tuple(limit.name for limit in subset)
    return ()


def _compatible(limits: Sequence[Limit]) -> bool:
    """Whether a choice meets all of them: the first one's total is driven towards its bound, under the others."""
    if not limits:
        return True
    first, others = limits[0], list(limits[1:])
    if first.high is None:
        largest = _extreme(first, others, "max")
        return largest is not None and (first.low is None or first.low <= largest)
    least = _extreme(first, [*others, Limit("", first.amounts, low=first.low)], "min")
    return least is not None and least <= first.high


def _infeasible(problem: Problem) -> InfeasibleBudgetError:
    report = why_infeasible(problem)
    names = report.conflicting or tuple(limit.name for limit in problem.limits)
    first = report.reach(names[0])
    smallest = first.least if first.least_under_others is None else first.least_under_others
    return InfeasibleBudgetError(f"no choice meets {' and '.join(names)}", smallest / 1e9, names[0])


def _away(problem: Problem, choice: Sequence[int], distance: int) -> Limit:
    return Limit("", _same(problem, choice), high=len(choice) - distance)


def _close(problem: Problem, choice: Sequence[int], changes: int) -> Limit:
    return Limit("", _same(problem, choice), low=len(choice) - changes)


def _same(problem: Problem, choice: Sequence[int]) -> list[list[int]]:
    """1 for the candidates of `choice`."""
    return [[int(c == picked) for c in range(len(s))] for s, picked in zip(problem.scores, choice, strict=True)]
