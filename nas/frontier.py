"""Every choice near the relaxation's bound, group by group, with whole numbers and without tolerances.

A state is a choice in the first k groups: its reduced costs so far and its use of each row. States grow by one group at a
time, and most are cut off: with prices u of the relaxation and any other prices u + v >= 0, what a state x costs above the
bound in the end is at least

    reduced(x) + sum over the groups left of min_c (reduced_c + v use_c)  +  v (use(x) - slack)

A fan of directions v, per row and mixed, comes close to the state's own linear relaxation and is one matrix product for
all states. What goes over a row whatever follows is cut off too, and of two states of which one
scores and uses no less than the other it goes (dynamic programming). If more than `most` remain, those with the least bounds go on, and the least bound of those given up is
reported: nothing below it was lost.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

STEPS = np.geomspace(0.1, 1.0, 3)  # lengths of the directions, in widths per spread of what candidates use
MIXED = 20  # mixed directions a length
AT_ONCE = 16  # directions in one product
FEW = 64  # states that are not worth comparing
CELLS = 1000  # within a thousandth of their spread, states count as nearly equal
COMPARED = 3  # rows
WORTH, REST = 0.98, 4  # a row that leaves more than this rests for so many groups


@dataclass(frozen=True)
class Group:
    """A group's candidates near the bound, cheapest first: `reduced[c]` (the first is 0) and `use[c][row]`, beyond the first's."""

    reduced: np.ndarray
    use: np.ndarray


@dataclass(frozen=True)
class Explored:
    """The best choice found (one place in each group's candidates), if any, and the cost below which none was missed."""

    choice: tuple[int, ...] | None
    cost: float
    missed: float


def explore(groups: list[Group], slack: np.ndarray, prices: np.ndarray, width: float, most: int) -> Explored:
    """The choice of least cost above the bound, among those at most `width` above it.

    Args:
        groups: those with more than one candidate; what the others use is taken off `slack` already.
        slack: int64 [rows], what the cheapest candidates leave of each row; negative if they go over.
        prices: [rows], the relaxation's.
        most: states kept after each group.
    """
    if not groups:
        met = bool((slack >= 0).all())
        return Explored(() if met else None, float(slack @ prices) if met else math.inf, math.inf)
    order, directions = _order(groups), _directions(groups, prices, width)
    ahead = [(np.zeros(len(directions)), np.zeros(len(slack), dtype=np.int64))]
    for group in reversed(order):
        least, use = ahead[0]
        here = (groups[group].reduced + directions @ groups[group].use.T).min(axis=1)
        ahead.insert(0, (least + here, use + groups[group].use.min(axis=0)))
    states = _States(
        np.zeros(1), np.zeros((1, len(slack)), dtype=np.int64), np.zeros(1, np.int32), np.zeros(1, np.int16)
    )
    comparison, history, missed = _Comparison.of(groups), [], math.inf
    for group, (least, smallest) in zip(order, ahead[1:], strict=True):
        states = _grow(states, groups[group], width, slack - smallest)
        kept, bounds = _promising(states.costs, states.uses - slack, directions, least, width)
        states = states.at(kept)
        kept = comparison.undominated(states.costs - states.uses @ prices, states.uses)
        if len(kept) > most:
            bounds = bounds[kept]
            by_bound = np.argpartition(bounds, most)
            missed = min(missed, float(bounds[by_bound[most:]].min()))
            kept = kept[by_bound[:most]]
        states = states.at(kept)
        history.append((states.parents, states.picks))
    fits = np.flatnonzero((states.uses <= slack).all(axis=1))
    if not len(fits):
        return Explored(None, math.inf, missed)
    totals = states.costs[fits] + (slack - states.uses[fits]) @ prices
    place = int(fits[np.argmin(totals)])
    choice = [0] * len(groups)
    for group, (parents, picks) in zip(reversed(order), reversed(history), strict=True):
        choice[group] = int(picks[place])
        place = int(parents[place])
    return Explored(tuple(choice), float(totals.min()), missed)


@dataclass(frozen=True)
class _States:
    """Choices in the first groups: reduced costs, uses [states, rows]; the state each comes from, and its last pick."""

    costs: np.ndarray
    uses: np.ndarray
    parents: np.ndarray
    picks: np.ndarray

    def at(self, kept: np.ndarray) -> _States:
        return _States(self.costs[kept], self.uses[kept], self.parents[kept], self.picks[kept])


def _order(groups: list[Group]) -> list[int]:
    """Groups by what they can move, the most first, so that the last ones cannot repair much."""
    sizes = np.max([np.abs(group.use).max(axis=0, initial=0) for group in groups], axis=0, initial=1)
    moves = [float((np.abs(group.use) / sizes).sum(axis=1).max(initial=0.0)) for group in groups]
    return sorted(range(len(groups)), key=lambda g: -moves[g])


def _directions(groups: list[Group], prices: np.ndarray, width: float) -> np.ndarray:
    """Changes of the prices, [directions, rows]: none, and a fan of them; none leaves a price below 0.

    What candidates use of different rows goes together (wider is larger and slower), so the fan is even where their uses
    are uncorrelated and of one size.
    """
    rows = len(prices)
    use = np.concatenate([group.use[1:] for group in groups]).astype(float)
    sizes = np.maximum(np.abs(use).max(axis=0, initial=1.0), 1.0)
    moments = (use / sizes).T @ (use / sizes) / max(1, len(use))
    values, vectors = np.linalg.eigh(moments + np.eye(rows) * (1e-6 * np.trace(moments) / max(1, rows) + 1e-300))
    mixed = np.random.default_rng(0).normal(size=(MIXED if rows > 1 else 0, rows))
    mixed /= np.linalg.norm(mixed, axis=1, keepdims=True)
    fan = np.concatenate([np.eye(rows), -np.eye(rows), mixed]) @ (vectors / np.sqrt(values)).T / sizes
    lengths = STEPS * (width if math.isfinite(width) else 1.0)
    changes = (lengths[:, None, None] * fan).reshape(len(STEPS) * len(fan), rows)
    return np.maximum(np.concatenate([np.zeros((1, rows)), changes]), -prices)


def _grow(states: _States, group: Group, width: float, room: np.ndarray) -> _States:
    """Every state with every candidate of the group, but for those over the width or a row."""
    parts = []
    for pick, (cost, use) in enumerate(zip(group.reduced, group.use, strict=True)):
        parents = np.flatnonzero((states.costs + cost <= width) & (states.uses <= room - use).all(axis=1))
        picks = np.full(len(parents), pick, dtype=np.int16)
        parts.append((states.costs[parents] + cost, states.uses[parents] + use, parents.astype(np.int32), picks))
    return _States(*(np.concatenate(columns) for columns in zip(*parts, strict=True)))


@dataclass
class _Comparison:
    """Finds states that score and use no less than another: whatever follows, they end no better.

    Looking at all pairs would take too long. For each of some rows, states that are (nearly) equal in all others stand together
    in the order of their use of this one, and each is compared with the best before it. A row that finds few rests a while.
    """

    rows: list[int]
    rests: dict[int, int]

    @classmethod
    def of(cls, groups: list[Group]) -> _Comparison:
        different = np.sum([[len(np.unique(column)) for column in group.use.T] for group in groups], axis=0)
        rows = [int(row) for row in np.argsort(-different, kind="stable")[:COMPARED]]
        return cls(rows, dict.fromkeys(rows, 0))

    def undominated(self, scores: np.ndarray, uses: np.ndarray) -> np.ndarray:
        """Indices of the states but for some of these."""
        kept = np.arange(len(scores))
        for row in self.rows:
            if len(kept) <= FEW or self.rests[row]:
                self.rests[row] = max(0, self.rests[row] - 1)
                continue
            better = _not_worse(scores[kept], uses[kept], row)
            if len(better) > WORTH * len(kept):
                self.rests[row] = REST
            kept = kept[better]
        return kept


def _not_worse(scores: np.ndarray, uses: np.ndarray, row: int) -> np.ndarray:
    others = np.delete(uses, row, axis=1)
    others = others // np.maximum(1, np.ptp(others, axis=0) // CELLS)
    odd = np.random.default_rng(1).integers(1, 2**62, size=others.shape[1], dtype=np.int64) | 1
    cells = (others * odd).sum(axis=1)  # wraps around: a chance meeting of two cells does no harm, states are compared
    order = np.lexsort((scores, uses[:, row], cells))
    new = np.concatenate(([True], cells[order[1:]] != cells[order[:-1]]))
    sunk = scores[order] - np.cumsum(new) * (2 * float(np.ptp(scores)) + 1e-300)  # each cell below all before
    record = np.concatenate(([True], sunk[1:] < np.minimum.accumulate(sunk)[:-1]))
    best = np.maximum.accumulate(np.where(record, np.arange(len(order)), 0))
    before = order[np.concatenate(([0], best[:-1]))]
    worse = (scores[before] <= scores[order]) & (uses[before] <= uses[order]).all(axis=1)
    worse[0] = False
    return order[~worse]


def _promising(
    costs: np.ndarray, over: np.ndarray, directions: np.ndarray, least: np.ndarray, width: float
) -> tuple[np.ndarray, np.ndarray]:
    """Indices of the states whose bound is within the width, and these bounds."""
    kept, bounds = np.arange(len(costs)), costs.copy()
    over = over.astype(float)
    for start in range(0, len(directions), AT_ONCE):
        part = slice(start, start + AT_ONCE)
        ends = costs[kept] + (directions[part] @ over[kept].T + least[part, None]).max(axis=0)
        bounds = np.maximum(bounds, ends)
        inside = bounds <= width
        kept, bounds = kept[inside], bounds[inside]
    return kept, bounds
