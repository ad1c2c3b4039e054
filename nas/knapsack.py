"""The multiple-choice knapsack behind `nas.solve`: linear relaxation, then HiGHS on the few candidates it leaves open.

With the relaxation's prices u >= 0 of the rows a x <= b, every choice x costs

    score(x) = sum_g min_c (s_gc + u a_gc) - u b  +  sum of reduced costs of x  +  u (b - a x)

The first part is a lower bound and the others are never negative. So an optimum among the candidates whose reduced cost is
at most d is the optimum of all if it lies within d of the bound: solve the core of small d, and again with a larger one
only if that fails (Pisinger 1995 calls it the expanding core).

Rows hold whole numbers. HiGHS works in floats with tolerances, so every answer is checked in integers. If one slipped
through, rows are split into digits, small enough for the tolerances not to matter; one that slips through even so is
forbidden by name.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from scipy.optimize import LinearConstraint
from scipy.sparse import csr_matrix, hstack

from nas.highs import branch, relax

LARGEST_COEFFICIENT = 100_000  # HiGHS takes 1e-6 for an integer: beyond this its slips are whole units
CORE = 2  # candidates per group to begin with
WIDER = 4  # how much the core grows if no choice of it meets the limits
RESOLUTION = 1e4  # the core's objective is scaled so that its width is this: HiGHS stops at an absolute gap of 1e-6
LARGEST_COST = 1e6  # of a candidate in the scaled objective: HiGHS loses its way in larger ones


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
    """sum of `amounts` <= `high`, whole numbers from 0 up, the least of each group 0, in units of `unit`.

    `limit` is the place of the limit that it comes from; `sign` is -1 if it is its lower bound.
    """

    limit: int
    sign: int
    amounts: np.ndarray
    high: int
    unit: int


@dataclass(frozen=True)
class Rows:
    """All limits as rows `<=`, over the candidates of all groups one after the other."""

    rows: tuple[Row, ...]

    @classmethod
    def of(cls, limits: Sequence[Bounded]) -> Rows:
        rows = []
        for place, limit in enumerate(limits):
            if limit.high is not None:
                rows.append(_row(place, 1, limit.amounts, limit.high))
            if limit.low is not None:
                rows.append(_row(place, -1, limit.amounts, limit.low))
        return cls(tuple(rows))

    @property
    def possible(self) -> bool:
        """Whether each row alone can be met."""
        return all(row.high >= 0 for row in self.rows)

    def met(self, picked: np.ndarray) -> bool:
        """Whether the candidates with these indices meet all rows."""
        return all(int(row.amounts[picked].sum()) <= row.high for row in self.rows)


def _row(place: int, sign: int, amounts: Sequence[Sequence[int]], bound: int) -> Row:
    signed = [[sign * int(amount) for amount in group] for group in amounts]
    least = [min(group) for group in signed]
    extra = [amount - low for group, low in zip(signed, least, strict=True) for amount in group]
    unit = math.gcd(*extra) or 1
    return Row(
        place, sign, np.array([e // unit for e in extra], dtype=np.int64), (sign * bound - sum(least)) // unit, unit
    )


@dataclass(frozen=True)
class Best:
    """The best choice, the proven lower bound, and the relaxation's prices by the limits' places."""

    choice: tuple[int, ...]
    bound: float
    prices: dict[int, float]


def optimum(scores: Sequence[Sequence[float]], rows: Rows, gap: float) -> Best | None:
    """The choice of least score that meets all rows, to a relative gap (infinite: any choice); None if there is none."""
    if not rows.possible:
        return None
    core = _Core.of(scores, rows)
    if core is None:
        return None
    width = core.first_width()
    while True:
        kept = np.flatnonzero(core.reduced <= width)
        found = core.solve(kept, width, gap)
        whole = len(kept) == len(core.scores)
        if found is None:
            if whole:
                return None
            width = max(width * WIDER, float(core.reduced[core.reduced > width].min()))
            continue
        picked, bound = found
        score = float(core.scores[picked].sum())
        beyond = math.inf if whole else core.bound + width
        bound = max(core.bound, min(bound, beyond))
        if score <= bound + gap * abs(score) or score <= beyond:
            choice = tuple(int(p) for p in picked - core.starts[:-1])
            return Best(choice, min(bound, score), core.prices)
        width = score - core.bound


@dataclass
class _Core:
    """The relaxation of one problem and the integer programs on parts of its candidates."""

    scores: np.ndarray
    starts: np.ndarray
    rows: tuple[Row, ...]
    exact: Rows
    bound: float
    reduced: np.ndarray
    prices: dict[int, float]
    digits: bool = False

    @classmethod
    def of(cls, scores: Sequence[Sequence[float]], rows: Rows) -> _Core | None:
        sizes = [len(group) for group in scores]
        starts = np.concatenate(([0], np.cumsum(sizes)))
        flat = np.concatenate([np.asarray(group, dtype=float) for group in scores])
        useful = tuple(row for row in rows.rows if row.amounts.any())
        scales = np.array([float(row.amounts.max()) for row in useful])
        matrix = np.array([row.amounts / scale for row, scale in zip(useful, scales, strict=True)]).reshape(
            -1, len(flat)
        )
        highs = np.array([(row.high + 0.5) / scale for row, scale in zip(useful, scales, strict=True)])
        spread = float(np.ptp(flat)) or 1.0
        relaxed = relax(flat / spread, _one_each(np.arange(len(flat)), starts), matrix, highs)
        if relaxed is None:
            return None
        unit_prices = relaxed.prices * spread
        highs = np.array([row.high / scale for row, scale in zip(useful, scales, strict=True)])
        priced = flat + unit_prices @ matrix
        least = np.minimum.reduceat(priced, starts[:-1])
        prices: dict[int, float] = {}
        for row, price, scale in zip(useful, unit_prices, scales, strict=True):
            prices[row.limit] = prices.get(row.limit, 0.0) + float(price / (scale * row.unit))
        reduced = priced - np.repeat(least, sizes)
        return cls(flat, starts, useful, rows, math.fsum(least) - float(unit_prices @ highs), reduced, prices)

    def first_width(self) -> float:
        """The reduced cost within which there are about `CORE` candidates a group."""
        count = min(len(self.reduced), CORE * (len(self.starts) - 1)) - 1
        return float(np.partition(self.reduced, count)[count])

    def solve(self, kept: np.ndarray, width: float, gap: float) -> tuple[np.ndarray, float] | None:
        """The best choice among the candidates `kept` and the lower bound of its score; None if none meets the rows."""
        group = np.searchsorted(self.starts, kept, side="right") - 1
        base = np.array([self.scores[a:b].min() for a, b in zip(self.starts[:-1], self.starts[1:], strict=True)])
        offset = 0.0 if gap > 1e-8 else math.fsum(base)
        objective = self.scores[kept] - (base[group] if gap <= 1e-8 else 0.0)
        largest = float(np.abs(objective).max()) or 1.0
        scale = min(RESOLUTION / max(width, largest * 1e-9), LARGEST_COST / largest)
        forbidden: list[np.ndarray] = []
        while True:
            matrix, highs, upper = self._constraints(kept)
            carries = len(upper) - len(kept)
            one = hstack([_one_each(kept, self.starts), csr_matrix((len(base), carries))])
            constraints = [LinearConstraint(one, 1, 1)]
            if len(highs):
                constraints.append(LinearConstraint(matrix, -np.inf, highs))
            for row in forbidden:
                constraints.append(LinearConstraint(np.append(row, np.zeros(carries))[None], -np.inf, len(base) - 1))
            tolerance = 1e-12 if gap <= 1e-8 else min(gap, 1e9)
            found = branch(np.append(objective * scale, np.zeros(carries)), constraints, upper, tolerance)
            if found is None:
                return None
            x = found.x[: len(kept)]
            picked = np.array([kept[group == g][np.argmax(x[group == g])] for g in range(len(base))])
            if self.exact.met(picked):
                return picked, found.bound / scale + offset
            if self.digits:
                forbidden.append(np.isin(kept, picked).astype(float))
            self.digits = True

    def _constraints(self, kept: np.ndarray) -> tuple[csr_matrix, np.ndarray, np.ndarray]:
        """Rows, their bounds, and the largest value of every column: the candidates kept, then the carries."""
        lines: list[tuple[np.ndarray, int, float]] = []  # amounts, how the carry enters, bound
        for row in self.rows:
            amounts, most = row.amounts[kept], int(row.amounts.max())
            if most < LARGEST_COEFFICIENT or not self.digits:
                lines.append((amounts / most, 0, (row.high + 0.5) / most))
                continue
            base = math.isqrt(most) + 1
            lines.append(((amounts % base).astype(float), -base, row.high % base + 0.5))
            lines.append(((amounts // base).astype(float), 1, row.high // base + 0.5))
        carries = sum(line[1] > 0 for line in lines)
        matrix = np.zeros((len(lines), len(kept) + carries))
        carry = -1
        for place, (amounts, enters, _) in enumerate(lines):
            matrix[place, : len(kept)] = amounts
            carry += enters < 0
            if enters:
                matrix[place, len(kept) + carry] = enters
        upper = np.append(np.ones(len(kept)), np.full(carries, len(self.starts) - 1))
        return csr_matrix(matrix), np.array([line[2] for line in lines]), upper


def _one_each(columns: np.ndarray, starts: np.ndarray) -> csr_matrix:
    """One candidate of each group, over these columns."""
    group = np.searchsorted(starts, columns, side="right") - 1
    ones = (np.ones(len(columns)), (group, np.arange(len(columns))))
    return csr_matrix(ones, shape=(len(starts) - 1, len(columns)))
