"""The multiple-choice knapsack behind `nas.solve`: the relaxation's prices, then every choice near its bound.

With the prices u >= 0 that the linear relaxation puts on the rows a x <= b, every choice x costs

    score(x) = sum_g min_c (s_gc + u a_gc) - u b  +  sum of reduced costs of x  +  u (b - a x)

The first part is a lower bound, and what stands after it is never negative. So only candidates whose reduced cost is at most
d matter to choices within d of the bound, and if the best of these lies within d, it is the optimum (the expanding core of
Pisinger 1995). `nas.frontier` explores those choices; what is found narrows d, what was given up says how much further to
look, and HiGHS's integer program stands by for problems that come to no end.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from blocks.errors import ConfigError, NasError
from nas.frontier import Group, explore
from nas.highs import program, relax

CORE = 2  # candidates per group to begin with
WIDER, FURTHER = 4, 1.2  # how much the width grows while nothing is found, and after that: up to the cost found
FEWEST_STATES, MORE_STATES, MOST_STATES = 2_000, 6, 432_000  # kept after each group
LOST_STATES = 12_000  # at most, while nothing is found
ROUNDING = 1e-13  # of a sum of scores, relative
LARGEST = 2**52  # use of a row: sums of these are whole in int64 and single ones in a float


class Bounded(Protocol):
    """What a row is made of (`nas.solve.Limit`)."""

    @property
    def amounts(self) -> Sequence[Sequence[int]]: ...
    @property
    def low(self) -> int | None: ...
    @property
    def high(self) -> int | None: ...


@dataclass(frozen=True)
class Row:
    """sum of `uses` <= `high` over the candidates of all groups: whole numbers, the least of each group 0.

    `place` is that of the limit in question, `unit` how many of its units one of the row's is.
    """

    place: int
    uses: np.ndarray
    high: int
    unit: int


def rows_of(limits: Sequence[Bounded]) -> list[Row] | None:
    """The limits as rows, without those that every choice meets; None if one of them is met by none."""
    rows = []
    for place, limit in enumerate(limits):
        for sign, bound in ((1, limit.high), (-1, limit.low)):
            if bound is None:
                continue
            signed = [[sign * int(amount) for amount in group] for group in limit.amounts]
            least, most = sum(map(min, signed)), sum(map(max, signed))
            if sign * bound < least:
                return None
            if sign * bound < most:
                rows.append(_row(place, signed, sign * bound - least))
    return rows


def _row(place: int, amounts: list[list[int]], room: int) -> Row:
    leasts = [min(group) for group in amounts]
    extra = [amount - least for group, least in zip(amounts, leasts, strict=True) for amount in group]
    unit = math.gcd(*extra)
    if max(extra) // unit > LARGEST:
        raise ConfigError(f"amounts of one group differ by {max(extra):,}: more than the solver can count")
    return Row(place, np.array([amount // unit for amount in extra], dtype=np.int64), room // unit, unit)


@dataclass(frozen=True)
class Best:
    """The best choice found, the proven lower bound of the score, and the relaxation's prices by the limits' places."""

    choice: tuple[int, ...]
    bound: float
    prices: dict[int, float]


def optimum(
    scores: Sequence[Sequence[float]], limits: Sequence[Bounded], gap: float, states: int = MOST_STATES
) -> Best | None:
    """The choice of least score that meets all limits, to a relative gap (infinite: any choice); None if there is none.

    The gap is missed where `states` after each group are too few for it; `Best.bound` tells.
    """
    rows = rows_of(limits)
    relaxation = None if rows is None else Relaxation.of(scores, rows)
    return (
        None
        if relaxation is None
        else _Search(relaxation, gap, states, np.zeros(len(relaxation.highs), dtype=bool)).run()
    )


@dataclass(frozen=True)
class Relaxation:
    """The linear relaxation's bound, and what each candidate costs beyond it.

    `starts[g]` is the first candidate of group g; `uses` [rows, candidates] and `highs` [rows] are int64, `prices` [rows] in
    nats per unit of the row, `by_limit` per unit of the limit.
    """

    scores: np.ndarray
    starts: np.ndarray
    uses: np.ndarray
    highs: np.ndarray
    prices: np.ndarray
    by_limit: dict[int, float]
    reduced: np.ndarray
    bound: float

    @classmethod
    def of(cls, scores: Sequence[Sequence[float]], rows: Sequence[Row]) -> Relaxation | None:
        starts = np.concatenate(([0], np.cumsum([len(group) for group in scores])))
        flat = np.concatenate([np.asarray(group, dtype=float) for group in scores])
        uses = np.array([row.uses for row in rows], dtype=np.int64).reshape(len(rows), len(flat))
        highs = np.array([row.high for row in rows], dtype=np.int64)
        prices = relax(flat, starts, uses, highs)
        if prices is None:
            return None
        by_limit: dict[int, float] = {}
        for row, price in zip(rows, prices, strict=True):
            by_limit[row.place] = by_limit.get(row.place, 0.0) + float(price) / row.unit
        priced = flat + prices @ uses
        least = np.minimum.reduceat(priced, starts[:-1])
        reduced = priced - np.repeat(least, np.diff(starts))
        return cls(flat, starts, uses, highs, prices, by_limit, reduced, math.fsum([*least, *-(prices * highs)]))

    def best(self, picked: np.ndarray, bound: float) -> Best:
        return Best(tuple(int(place) for place in picked - self.starts[:-1]), bound, self.by_limit)


@dataclass
class _Search:
    """Explores wider and with more states until the best choice found is proven. Costs are counted from the bound.

    `strict` says which rows are looked at although the relaxation leaves them slack.
    """

    relaxation: Relaxation
    gap: float
    most: int
    strict: np.ndarray
    picked: np.ndarray | None = None
    cost: float = math.inf
    proven: float = 0.0

    def run(self) -> Best | None:
        width, states = self._first_width(), FEWEST_STATES
        while states <= (LOST_STATES if self.picked is None else self.most):
            width = min(width, self._enough)
            missed = self._explore(width, states)
            self.proven = max(self.proven, min(missed, width))
            if self.proven >= self._enough:  # infinite both if nothing was left out and nothing found
                return None if self.picked is None else self._found()
            if missed < width:
                states *= MORE_STATES
            elif self.picked is None:
                left = self.relaxation.reduced[self.relaxation.reduced > width]
                width = max(width * WIDER, float(left.min())) if len(left) else math.inf
            else:
                width = max(width * FURTHER, self.cost / 16)
        return self._program() if self.picked is None else self._found()

    @property
    def _enough(self) -> float:
        """The best choice so far will do if none below this is missed."""
        score = self.relaxation.bound + self.cost
        return self.cost - max(self.gap, ROUNDING) * max(abs(score), ROUNDING) if math.isfinite(score) else math.inf

    def _found(self) -> Best:
        assert self.picked is not None
        return self.relaxation.best(self.picked, self.relaxation.bound + min(self.proven, self.cost))

    def _first_width(self) -> float:
        """The reduced cost within which there are about `CORE` candidates a group."""
        reduced, groups = self.relaxation.reduced, len(self.relaxation.starts) - 1
        count = min(len(reduced), CORE * groups) - 1
        return float(np.partition(reduced, count)[count])

    def _explore(self, width: float, states: int) -> float:
        """Explores the candidates within the width, keeps the best choice, and returns what was missed."""
        r = self.relaxation
        kept = np.flatnonzero(r.reduced <= width)
        by_group = [kept[a:b] for a, b in itertools.pairwise(np.searchsorted(kept, r.starts))]
        by_group = [own[np.argsort(r.reduced[own], kind="stable")] for own in by_group]
        picked = np.array([own[0] for own in by_group])
        open_groups = [g for g, own in enumerate(by_group) if len(own) > 1]
        slack = r.highs - r.uses[:, picked].sum(axis=1)
        beyond = {g: (r.uses[:, by_group[g]] - r.uses[:, picked[g], None]).T for g in open_groups}
        while True:
            rows = np.flatnonzero((r.prices > 0) | self.strict)
            groups = [Group(r.reduced[by_group[g]], beyond[g][:, rows]) for g in open_groups]
            found = explore(groups, slack[rows], r.prices[rows], width, states)
            if found.choice is None:
                return found.missed
            for g, place in zip(open_groups, found.choice, strict=True):
                picked[g] = by_group[g][place]
            over = r.uses[:, picked].sum(axis=1) > r.highs
            if not over.any():
                break
            # Rows that the relaxation leaves slack and that matter all the same. If it happens again, all are looked at.
            self.strict |= True if self.strict.any() else over
        if found.cost < self.cost:
            self.picked, self.cost = picked, found.cost
        return found.missed

    def _program(self) -> Best | None:
        r = self.relaxation
        other = program(r.scores, r.starts, r.uses, r.highs, self.gap)
        if other is None:
            return None
        self.proven = max(self.proven, other.bound - r.bound)
        if other.picked is not None:
            cost = math.fsum(r.scores[other.picked]) - r.bound
            if cost < self.cost:
                self.picked, self.cost = other.picked, cost
        if self.picked is None:
            raise NasError(
                "the solver found no choice that meets all limits, and no proof that there is none; widen one a little"
            )
        return self._found()
