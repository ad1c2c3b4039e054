"""The ledger: every child that was assembled and measured, as trials of an Optuna study in the run directory.

One categorical parameter per subblock, the true KL as the value, the budget as a constraint. Another `nas search` with the
same settings finds its trials there and measures only what is missing; optuna-dashboard opens the file.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

import optuna
from optuna.distributions import CategoricalDistribution
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, TrialState

from blocks.spec import Architecture, LayerSpec


class Ledger:
    """The study of one budget over one score table.

    Args:
        path: the journal file.
        name: the study; settings that give other values must give another name.
        space: the candidates of each layer, for the distributions.
        limit: largest total bytes.
    """

    def __init__(self, path: Path, name: str, space: Sequence[Sequence[LayerSpec]], limit: int) -> None:
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        logging.getLogger("optuna").setLevel(logging.WARNING)
        storage = JournalStorage(JournalFileBackend(str(path)))
        self.study = optuna.create_study(storage=storage, study_name=name, direction="minimize", load_if_exists=True)
        self.limit = limit
        self.distributions: dict[str, CategoricalDistribution] = {}
        for index, specs in enumerate(space):
            for part in ("attention", "ffn"):
                choices = list(dict.fromkeys(str(getattr(spec, part)) for spec in specs))
                self.distributions[f"layer_{index:03d}.{part}"] = CategoricalDistribution(choices)

    def value(self, architecture: Architecture) -> float | None:
        """The true KL if this architecture was measured before."""
        wanted = self._parameters(architecture)
        for trial in self._finished():
            if trial.params == wanted:
                return trial.value
        return None

    def record(self, architecture: Architecture, origin: str, kl: float, total_bytes: int, predicted: float) -> None:
        """Adds a measured child.

        Args:
            origin: which proposer it comes from ("pool", "uniform").
            kl: true KL, nats per token.
            total_bytes: of the child in the scenario.
            predicted: the sum of its scores.
        """
        self.study.enqueue_trial(self._parameters(architecture))
        trial = self.study.ask(dict(self.distributions))
        trial.set_user_attr("origin", origin)
        trial.set_user_attr("predicted_kl", predicted)
        trial.set_user_attr("total_bytes", total_bytes)
        trial.set_constraint("bytes_over_budget", float(total_bytes - self.limit))
        self.study.tell(trial, kl)

    def _parameters(self, architecture: Architecture) -> dict[str, str]:
        parameters: dict[str, str] = {}
        for index, layer in enumerate(architecture):
            parameters[f"layer_{index:03d}.attention"] = str(layer.attention)
            parameters[f"layer_{index:03d}.ffn"] = str(layer.ffn)
        return parameters

    def _finished(self) -> list[FrozenTrial]:
        return self.study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
