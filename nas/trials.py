"""Measuring children: takes them from the ledger one by one, assembles and refits each, and records its true KL.

The KL is measured on a few batches of the verification text, and a proposal that is surely worse than the best child is given
up between two of them (the Wilcoxon signed-rank test over batches, as Optuna's pruner has it).
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

import optuna
from optuna.exceptions import UpdateFinishedTrialError
from optuna.trial import FrozenTrial, Trial, TrialState

from blocks.spec import Architecture
from nas.additive import Candidates
from nas.assemble import Assembler
from nas.baselines import BASELINES
from nas.costs import Cost
from nas.progress import Reporter
from nas.study import Ledger, architecture_of

BATCHES = 8  # of the verification text, between which a trial may be given up
SURE = 0.05  # p-value below which a proposal counts as worse
NEVER_PRUNED = ("optimum", "pool", "path", "attention-rich", "ffn-rich", "contiguous", *BASELINES)


def pruner(wanted: bool) -> optuna.pruners.BasePruner:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        return optuna.pruners.WilcoxonPruner(p_threshold=SURE) if wanted else optuna.pruners.NopPruner()


@dataclass
class Trials:
    """The measuring side of a search.

    Attributes:
        prunes: whether proposals may be given up half-way.
    """

    candidates: Candidates
    assembler: Assembler
    ledger: Ledger
    reporter: Reporter
    prunes: bool = True

    def run(self, most: int | None = None) -> None:
        """Measures what is queued and, up to `most` trials in all, what the sampler proposes; waits for other workers."""
        total = most if most is not None else len(self.ledger.trials)
        with self.reporter.bar("True KL of children", max(total, len(self.ledger.trials))) as (bar, task):

            def show(note: str = "") -> None:
                best = self.best()
                best_text = "" if best is None or best.value is None else f"best {best.value:.4f}"
                bar.update(task, completed=len(self.ledger.finished), note=note or best_text)

            show()
            while True:
                while (trial := self.ledger.take(most)) is not None:
                    with suppress(UpdateFinishedTrialError):  # others took this worker for dead and do it again
                        self.measure(trial)
                    show()
                if self.ledger.wait(lambda running: show(f"waiting for {running} of other workers")):
                    return

    def measure(self, trial: Trial) -> None:
        """One child: assembled, refitted, measured, recorded."""
        started = time.perf_counter()
        architecture = architecture_of(trial.params)
        cost = self.candidates.costs.cost(architecture)
        facts = self._facts(architecture, cost)
        constraints = {bound.name: bound.excess(cost.total(bound.name)) for bound in self.candidates.bounds}
        if (known := self.ledger.value(architecture)) is not None:  # Optuna's samplers repeat themselves
            self.ledger.record(trial, known, constraints, **facts, repeated=True)
            return
        child = self.assembler.assemble(architecture)
        sequences = len(self.assembler.verify_tokens)
        step = -(-sequences // BATCHES)
        values: list[float] = []
        may_end_early = self.prunes and origin_of(trial) not in NEVER_PRUNED
        for start in range(0, sequences, step):
            kl = self.assembler.true_kl(child, slice(start, start + step))
            trial.report(float(kl.mean()), start // step)
            values += kl.tolist()
            if may_end_early and start + step < sequences and trial.should_prune():
                seconds = round(time.perf_counter() - started, 3)
                self.ledger.prune(trial, _mean(values), constraints, **facts, seconds=seconds)
                return
        seconds = round(time.perf_counter() - started, 3)
        error = standard_error(values)
        self.ledger.record(trial, _mean(values), constraints, **facts, kl_se=error, seconds=seconds)

    def _facts(self, architecture: Architecture, cost: Cost) -> dict[str, float]:
        """What the ledger keeps of a child beside its KL."""
        known: dict[str, float] = {"total_bytes": cost.total_bytes, "parameters": cost.parameters}
        if cost.tokens_per_s is not None:
            known["tokens_per_s"] = cost.tokens_per_s
        return known | {"predicted_kl": self.candidates.predicted(architecture)}

    def measured(self, origin: Callable[[str], bool] = lambda _: True) -> list[FrozenTrial]:
        """Wholly measured children within the limits, the best first."""
        done = [t for t in self.ledger.trials if t.state == TrialState.COMPLETE and t.value is not None]
        return sorted((t for t in done if meets_limits(t) and origin(origin_of(t))), key=lambda t: (t.value, t.number))

    def best(self) -> FrozenTrial | None:
        return next(iter(self.measured()), None)


def meets_limits(trial: FrozenTrial) -> bool:
    """Whether a measured or pruned child is within all limits."""
    return all(value <= 0 for value in trial.constraints.values())


def origin_of(trial: FrozenTrial | Trial) -> str:
    """Which proposer a trial comes from; what the sampler names has no other origin."""
    return str(trial.user_attrs.get("origin", "swap"))


def _mean(values: list[float]) -> float:
    return math.fsum(values) / len(values)


def standard_error(values: list[float]) -> float | None:
    """Of the mean of values of sequences; None for fewer than two."""
    if len(values) < 2:
        return None
    mean = _mean(values)
    return math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1) / len(values))
