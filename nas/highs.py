"""One call of HiGHS through scipy: a linear relaxation or a mixed-integer program, silent, with rows as sparse matrices."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, linprog, milp
from scipy.sparse import csr_matrix

from blocks.errors import NasError

INFEASIBLE = 2  # scipy's status


@dataclass(frozen=True)
class Relaxed:
    """A linear relaxation: its value, and for each row the price of its bound (>= 0)."""

    value: float
    prices: np.ndarray


@dataclass(frozen=True)
class Found:
    """A mixed-integer solution: values of the columns, and the proven lower bound of the objective."""

    x: np.ndarray
    bound: float


def relax(scores: np.ndarray, one_each: csr_matrix, rows: np.ndarray, highs: np.ndarray) -> Relaxed | None:
    """min scores x, one_each x = 1, rows x <= highs, 0 <= x <= 1; None if that has no solution."""
    with silent_stdout():
        result = linprog(
            scores,
            A_ub=rows if len(rows) else None,
            b_ub=highs if len(rows) else None,
            A_eq=one_each,
            b_eq=np.ones(one_each.shape[0]),
            bounds=(0, 1),
            method="highs",
        )
    if result.status == INFEASIBLE:
        return None
    if result.x is None:
        raise NasError(f"the solver gave up on the additive problem: {result.message}")
    prices = np.maximum(0.0, -result.ineqlin.marginals) if len(rows) else np.zeros(0)
    return Relaxed(float(result.fun), prices)


def branch(
    objective: np.ndarray,
    constraints: Sequence[LinearConstraint],
    upper: np.ndarray,
    gap: float,
) -> Found | None:
    """Least objective over whole numbers 0 <= x <= upper, to a relative gap; None if there is none."""
    with silent_stdout():
        result = milp(
            objective,
            constraints=list(constraints),
            integrality=np.ones(len(objective), dtype=np.int64),
            bounds=Bounds(0, upper),
            options={"mip_rel_gap": gap},
        )
    if result.status == INFEASIBLE:
        return None
    if result.x is None:
        raise NasError(f"the solver gave up on the additive problem: {result.message}")
    return Found(result.x, float(result.mip_dual_bound))


@contextmanager
def silent_stdout() -> Iterator[None]:
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
