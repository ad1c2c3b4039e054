"""Every choice near the relaxation's bound, group by group, with whole numbers and without tolerances.

A state is a choice in the first k groups: its reduced costs so far and its use of each row. States grow by one group at a
time, and most are cut off: with prices u of the relaxation and any other prices u + v >= 0, what a state x costs above the
bound in the end is at least

    reduced(x) + sum over the groups left of min_c (reduced_c + v use_c)  +  v (use(x) - slack)

A fan of directions v, per row and mixed, comes close to the state's own linear relaxation and is one matrix product for
all states. What goes over a row whatever follows is cut off too, and of states with equal use the cheapest stays (dynamic
programming). If more than `most` remain, those with the least bounds go on, and the least bound of those given up is
reported: nothing below it was lost.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

STEPS = np.geomspace(0.1, 1.5, 4)  # lengths of the directions, in widths per spread of what candidates use
MIXED = 40  # mixed directions a length
AT_ONCE = 16  # directions in one product
FEW = 64  # states that are not worth looking for equals among


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
        fits = bool((slack >= 0).all())
        return Explored(() if fits else None, float(slack @ prices) if fits else math.inf, math.inf)
    order, directions = _order(groups), _directions(groups, prices, width)
    ahead = [(np.zeros(len(directions)), np.zeros(len(slack), dtype=np.int64))]
    for group in reversed(order):
        least, use = ahead[0]
        here = (groups[group].reduced + directions @ groups[group].use.T).min(axis=1)
        ahead.insert(0, (least + here, use + groups[group].use.min(axis=0)))
    finest = _finest(groups)
    costs, uses = np.zeros(1), np.zeros((1, len(slack)), dtype=np.int64)
    history: list[tuple[np.ndarray, np.ndarray]] = []
    missed = math.inf
    for group, (least, smallest) in zip(order, ahead[1:], strict=True):
        costs, uses, parents, picks = _grow(costs, uses, groups[group], width, slack - smallest)
        kept = _undominated(costs - uses @ prices, uses, finest)
        costs, uses, parents, picks = costs[kept], uses[kept], parents[kept], picks[kept]
        kept, bounds = _promising(costs, uses - slack, directions, least, width)
        if len(kept) > most:
            by_bound = np.argpartition(bounds, most)
            missed = min(missed, float(bounds[by_bound[most:]].min()))
            kept = kept[by_bound[:most]]
        costs, uses, parents, picks = costs[kept], uses[kept], parents[kept], picks[kept]
        history.append((parents, picks))
        if not len(costs):
            return Explored(None, math.inf, missed)
    fits = np.flatnonzero((uses <= slack).all(axis=1))
    if not len(fits):
        return Explored(None, math.inf, missed)
    totals = costs[fits] + (slack - uses[fits]) @ prices
    place = int(fits[np.argmin(totals)])
    choice = [0] * len(groups)
    for group, (parents, picks) in zip(reversed(order), reversed(history), strict=True):
        choice[group] = int(picks[place])
        place = int(parents[place])
    return Explored(tuple(choice), float(totals.min()), missed)


def _order(groups: list[Group]) -> list[int]:
    """Groups by what they can move, the most first, so that the last ones cannot repair much."""
    sizes = np.max([np.abs(group.use).max(axis=0, initial=0) for group in groups], axis=0, initial=1)
    moves = [float((np.abs(group.use) / sizes).sum(axis=1).max(initial=0.0)) for group in groups]
    return sorted(range(len(groups)), key=lambda g: -moves[g])


def _finest(groups: list[Group]) -> int:
    """The row in which the candidates of a group differ most."""
    different = [[len(np.unique(column)) for column in group.use.T] for group in groups]
    return int(np.argmax(np.sum(different, axis=0))) if different[0] else 0


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


def _grow(
    costs: np.ndarray, uses: np.ndarray, group: Group, width: float, room: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Every state with every candidate of the group, but for those over the width or a row: costs, uses, parents, picks."""
    parts = []
    for pick, (cost, use) in enumerate(zip(group.reduced, group.use, strict=True)):
        parents = np.flatnonzero((costs + cost <= width) & (uses <= room - use).all(axis=1))
        parts.append((costs[parents] + cost, uses[parents] + use, parents.astype(np.int32), pick))
    picks = np.concatenate([np.full(len(part[0]), part[3], dtype=np.int16) for part in parts])
    return np.concatenate([p[0] for p in parts]), np.concatenate([p[1] for p in parts]), np.concatenate([p[2] for p in parts]), picks  # fmt: skip


def _undominated(scores: np.ndarray, uses: np.ndarray, finest: int) -> np.ndarray:
    """Indices of the states but for those that score and use as much as another or more, with equal use of all rows but one.

    `finest` is that row, the one in which states differ most.
    """
    if len(scores) <= FEW or not uses.shape[1]:
        return np.arange(len(scores))
    others = np.delete(uses, finest, axis=1)
    odd = np.random.default_rng(1).integers(1, 2**62, size=others.shape[1], dtype=np.int64) | 1
    keys = (others * odd).sum(axis=1)  # wraps around: equal uses have equal keys, and equal keys are looked at below
    order = np.lexsort((scores, uses[:, finest], keys))
    new = np.concatenate(([True], (others[order[1:]] != others[order[:-1]]).any(axis=1)))
    sunk = scores[order] - np.cumsum(new) * (2 * float(np.ptp(scores)) + 1e-300)  # equals by equals, each below all before
    worse = np.concatenate(([False], sunk[1:] >= np.minimum.accumulate(sunk)[:-1])) & ~new
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
