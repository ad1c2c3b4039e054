"""What healing tells others: its progress while it runs, its result, its clock."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from pathlib import Path

from distill.evaluation import EvalStats


@dataclass(frozen=True)
class Progress:
    """Where healing stands; given to `on_step` at step 0 and after every step."""

    step: int
    total_steps: int
    loss: float
    """Training KL of this step, nats per token; NaN at step 0."""
    learning_rate: float
    tokens_per_s: float
    """Of training alone, in this session."""
    eta_seconds: float
    """Seconds to the end at the pace so far, evaluations and checkpoints counted; NaN at step 0."""
    evaluation: EvalStats | None = None
    """Set if the held-out text was evaluated at this step."""


@dataclass(frozen=True)
class HealResult:
    """What healing did up to now. When it is returned, the student holds the weights of `best_path`."""

    before: EvalStats
    after: EvalStats
    best: EvalStats
    best_step: int
    best_path: Path
    evaluations: dict[int, EvalStats]
    """Every evaluation of the run by its step, over all sessions: `before` at 0, `after` at the last."""
    steps: int
    tokens: int
    """Training tokens, over all sessions of the run."""
    seconds: float
    """Training, evaluating and writing, over all sessions of the run (work lost to a crash not counted)."""
    tokens_per_s: float
    """Of training alone, in this session; 0 if nothing was left to train."""


class SessionClock:
    """The clock of this process's part of the run.

    Args:
        earlier_seconds: what the sessions before took, up to the checkpoint that this one resumes from.
    """

    def __init__(self, earlier_seconds: float = 0.0) -> None:
        self._earlier_seconds = earlier_seconds
        self._started = time.perf_counter()
        self._steps = 0
        self._training_seconds = 0.0

    def add_step(self, seconds: float) -> None:
        self._steps += 1
        self._training_seconds += seconds

    @property
    def total_seconds(self) -> float:
        return self._earlier_seconds + time.perf_counter() - self._started

    @property
    def seconds_per_step(self) -> float:
        """Evaluations and checkpoints counted; NaN before the first step."""
        return (time.perf_counter() - self._started) / self._steps if self._steps else math.nan

    @property
    def steps_per_training_second(self) -> float:
        return self._steps / self._training_seconds if self._steps else 0.0
