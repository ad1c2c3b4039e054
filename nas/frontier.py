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

STEPS = np.geomspace(0.05, 15.0, 8)  # lengths of the directions, in widths per largest use of a row
MIXED = 12  # mixed directions a length
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
    order, sizes = _order(groups)
    directions = _directions(prices, sizes, width)
    ahead = [(np.zeros(len(directions)), np.zeros(len(slack), dtype=np.int64))]
    for group in reversed(order):
        least, use = ahead[0]
        here = (groups[group].reduced + directions @ groups[group].use.T).min(axis=1)
        ahead.insert(0, (least + here, use + groups[group].use.min(axis=0)))
    costs, uses = np.zeros(1), np.zeros((1, len(slack)), dtype=np.int64)
    history: list[tuple[np.ndarray, np.ndarray]] = []
    missed = math.inf
    for group, (least, smallest) in zip(order, ahead[1:], strict=True):
        costs, uses, parents, picks = _grow(costs, uses, groups[group], width, slack - smallest)
        kept = _cheapest_of_equals(costs, uses)
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


def _order(groups: list[Group]) -> tuple[list[int], np.ndarray]:
    """Groups by what they can move, the most first, so that the last ones cannot repair much; and each row's largest use."""
    rows = groups[0].use.shape[1] if groups else 0
    largest = [np.abs(group.use).max(axis=0, initial=0) for group in groups]
    sizes = np.maximum(np.max(largest, axis=0, initial=1), 1) if groups else np.ones(rows)
    moves = [float((np.abs(group.use) / sizes).sum(axis=1).max(initial=0.0)) for group in groups]
    return sorted(range(len(groups)), key=lambda g: -moves[g]), sizes.astype(float)


def _directions(prices: np.ndarray, sizes: np.ndarray, width: float) -> np.ndarray:
    """Changes of the prices, [directions, rows]: none, one row up or down, and mixed; none leaves a price below 0."""
    rows = len(prices)
    single = np.concatenate([np.eye(rows), -np.eye(rows)])
    mixed = np.random.default_rng(0).normal(size=(MIXED if rows > 1 else 0, rows))
    mixed /= np.abs(mixed).max(axis=1, keepdims=True, initial=1e-9)
    lengths = np.repeat(STEPS, len(single) + len(mixed)) * (width if math.isfinite(width) else 1.0)
    changes = np.tile(np.concatenate([single, mixed]), (len(STEPS), 1)) * lengths[:, None] / sizes
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


def _cheapest_of_equals(costs: np.ndarray, uses: np.ndarray) -> np.ndarray:
    """Indices of the states that are the cheapest of those with the same use."""
    if len(costs) <= FEW:
        return np.arange(len(costs))
    odd = np.random.default_rng(1).integers(1, 2**62, size=uses.shape[1], dtype=np.int64) | 1
    keys = (uses * odd).sum(axis=1)  # wraps around: equal uses have equal keys, and the rest is looked at below
    by_key = np.lexsort((costs, keys))
    same = (uses[by_key[1:]] == uses[by_key[:-1]]).all(axis=1)
    return by_key[np.concatenate(([True], ~same))]


def _promising(
    costs: np.ndarray, over: np.ndarray, directions: np.ndarray, least: np.ndarray, width: float
) -> tuple[np.ndarray, np.ndarray]:
    """Indices of the states whose bound is within the width, and these bounds."""
    kept, bounds = np.arange(len(costs)), costs.copy()
    over = over.astype(float)
    for start in range(0, len(directions), AT_ONCE):
        part = slice(start, start + AT_ONCE)
        ends = costs[kept] + (over[kept] @ directions[part].T + least[part]).max(axis=1)
        bounds = np.maximum(bounds, ends)
        inside = bounds <= width
        kept, bounds = kept[inside], bounds[inside]
    return kept, bounds
