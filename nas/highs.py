"""HiGHS through scipy, silent: the linear relaxation, and the integer program where exploring choices comes to no end.

HiGHS works in floats with tolerances, so every choice of the integer program is checked in whole numbers. If one slipped
through, rows are split into digits, small enough for the tolerances not to matter; one that slips through even so is
forbidden by name.
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
from scipy.optimize import Bounds, LinearConstraint, OptimizeResult, linprog, milp
from scipy.sparse import csr_matrix, hstack

from blocks.errors import NasError

SECONDS = 60.0  # of one integer program
LARGEST_COEFFICIENT = 100_000  # HiGHS takes 1e-6 for an integer: beyond this its slips are whole units
LARGEST_COST = 1e6  # of a candidate in the objective: HiGHS stops at an absolute gap of 1e-6, and loses its way beyond
SMALLEST_PRICE = 1e-9  # in the scaled relaxation: rounding
INFEASIBLE, LIMIT = 2, 1  # scipy's status


def one_each(columns: np.ndarray, starts: np.ndarray) -> csr_matrix:
    """One candidate of each group, over these columns; group g has the columns from starts[g] up to starts[g + 1]."""
    group = np.searchsorted(starts, columns, side="right") - 1
    ones = (np.ones(len(columns)), (group, np.arange(len(columns))))
    return csr_matrix(ones, shape=(len(starts) - 1, len(columns)))


def relax(scores: np.ndarray, starts: np.ndarray, uses: np.ndarray, highs: np.ndarray) -> np.ndarray | None:
    """Prices (>= 0) of the rows `uses` x <= `highs` in the linear relaxation; None if not even that has a solution.

    Args:
        scores: [candidates]. uses: [rows, candidates] and highs: [rows], whole numbers.
    """
    if not len(highs):
        return np.zeros(0)
    spread, scales = float(np.ptp(scores)) or 1.0, uses.max(axis=1).astype(float)
    with _silent_stdout():
        result = linprog(
            (scores - scores.min()) / spread,
            A_ub=uses / scales[:, None],
            b_ub=(highs + 0.5) / scales,  # whole numbers: the half keeps rounding from losing a choice
            A_eq=one_each(np.arange(len(scores)), starts),
            b_eq=np.ones(len(starts) - 1),
            bounds=(0, 1),
            method="highs",
        )
    if result.status == INFEASIBLE:
        return None
    prices = -_values(result).ineqlin.marginals
    return np.where(prices > SMALLEST_PRICE, prices, 0.0) * spread / scales  # any prices from 0 up give a bound


@dataclass(frozen=True)
class Programmed:
    """One column a group, or None if time ran out before one was found; and the proven lower bound of the score."""

    picked: np.ndarray | None
    bound: float


def program(
    scores: np.ndarray, starts: np.ndarray, uses: np.ndarray, highs: np.ndarray, gap: float
) -> Programmed | None:
    """The choice of least score among all candidates that meets the rows; None if there is none."""
    groups = len(starts) - 1
    group = np.repeat(np.arange(groups), np.diff(starts))
    base = np.minimum.reduceat(scores, starts[:-1])
    objective = scores - base[group]
    scale = LARGEST_COST / (float(objective.max()) or 1.0)
    digits, forbidden = False, np.zeros((0, len(scores)))
    while True:
        matrix, limits, upper = _rows(uses, highs, digits, groups)
        carries = len(upper) - len(scores)
        ones = hstack([one_each(np.arange(len(scores)), starts), csr_matrix((groups, carries))])
        names = csr_matrix(np.hstack([forbidden, np.zeros((len(forbidden), carries))]))
        result = _milp(np.append(objective * scale, np.zeros(carries)), ones, [(matrix, limits), (names, groups - 1)], upper, gap)  # fmt: skip
        if result.status == INFEASIBLE:
            return None
        bound = -math.inf if result.mip_dual_bound is None else result.mip_dual_bound / scale + math.fsum(base)
        if result.x is None and result.status == LIMIT:
            return Programmed(None, bound)
        x = _values(result).x
        picked = np.array([a + np.argmax(x[a:b]) for a, b in itertools.pairwise(starts)])
        if (uses[:, picked].sum(axis=1) <= highs).all():
            return Programmed(picked, bound)
        if digits:
            forbidden = np.vstack([forbidden, np.isin(np.arange(len(scores)), picked)])
        digits = True


def _milp(
    objective: np.ndarray,
    ones: csr_matrix,
    rows: Sequence[tuple[csr_matrix, np.ndarray | int]],
    upper: np.ndarray,
    gap: float,
) -> OptimizeResult:
    most = [LinearConstraint(matrix, -np.inf, limits) for matrix, limits in rows if matrix.shape[0]]
    with _silent_stdout():
        return milp(
            objective,
            constraints=[LinearConstraint(ones, 1, 1), *most],
            integrality=np.ones(len(objective), dtype=np.int64),
            bounds=Bounds(0, upper),
            options={"mip_rel_gap": min(gap, 1e9), "time_limit": SECONDS},
        )


def _rows(uses: np.ndarray, highs: np.ndarray, digits: bool, groups: int) -> tuple[csr_matrix, np.ndarray, np.ndarray]:
    """Rows over the candidates and their bounds; the largest value of every column, of carries too.

    With digits, a row of large numbers is two, with a carry c as a column of its own:

        sum low x - base c <= limit_low            sum high x + c <= limit_high
    """
    lines: list[tuple[np.ndarray, int, float]] = []  # uses, how the carry enters, bound
    for use, high in zip(uses, highs, strict=True):
        largest = int(use.max())
        if not digits or largest < LARGEST_COEFFICIENT:
            lines.append((use / largest, 0, (int(high) + 0.5) / largest))
            continue
        base = math.isqrt(largest) + 1
        lines.append((use % base, -base, int(high) % base + 0.5))
        lines.append((use // base, 1, int(high) // base + 0.5))
    carries = sum(line[1] > 0 for line in lines)
    matrix = np.zeros((len(lines), uses.shape[1] + carries))
    carry = uses.shape[1] - 1
    for place, (use, enters, _) in enumerate(lines):
        matrix[place, : len(use)] = use
        carry += enters < 0
        if enters:
            matrix[place, carry] = enters
    upper = np.append(np.ones(uses.shape[1]), np.full(carries, groups))
    return csr_matrix(matrix), np.array([line[2] for line in lines]), upper


def _values(result: OptimizeResult) -> OptimizeResult:
    if result.x is None:
        raise NasError(f"the solver gave up on the additive problem: {result.message}")
    return result


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
