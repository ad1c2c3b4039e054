"""The ledger: every child that was assembled and measured, as trials of an Optuna study in the run directory.

One categorical parameter per subblock, the true KL as the value, the budget as a constraint. Another `nas search` with the
same settings finds its trials there and measures only what is missing; optuna-dashboard opens the file. A trial is one
line, so a process killed while writing leaves at most half a line, which the next one removes.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import optuna
from optuna.distributions import CategoricalDistribution
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend, JournalFileSymlinkLock
from optuna.trial import FrozenTrial, TrialState, create_trial

from blocks.errors import CheckpointError
from blocks.files import write_errors
from blocks.spec import Architecture, LayerSpec

LOCK_SECONDS = 5  # a lock older than this was left by a killed process; a trial is written in milliseconds


class Ledger:
    """The study of one budget over one score table.

    Args:
        path: the journal file.
        name: the study; settings that give other values must give another name.
        space: the candidates of each layer, for the distributions.
        limit: largest total bytes.

    Raises:
        CheckpointError: if the journal is damaged, or the disk refuses.
    """

    def __init__(self, path: Path, name: str, space: Sequence[Sequence[LayerSpec]], limit: int) -> None:
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self.path, self.limit = path.resolve(), limit  # the lock is a link, which must hold from any directory
        with write_errors(path):
            _drop_half_line(self.path)
            try:
                lock = JournalFileSymlinkLock(str(self.path), grace_period=LOCK_SECONDS)
                storage = JournalStorage(JournalFileBackend(str(self.path), lock_obj=lock))
                self.study = optuna.create_study(
                    storage=storage, study_name=name, direction="minimize", load_if_exists=True
                )
            except (ValueError, KeyError, TypeError) as error:  # lines that are not JSON, or not of Optuna
                raise CheckpointError(f"{path} is damaged ({error!r}); delete it and run `nas search` again") from error
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
        trial = create_trial(
            value=kl,
            params=self._parameters(architecture),
            distributions=dict(self.distributions),
            user_attrs={"origin": origin, "predicted_kl": predicted, "total_bytes": total_bytes},
            constraints={"bytes_over_budget": float(total_bytes - self.limit)},
        )
        with write_errors(self.path):
            self.study.add_trial(trial)  # whole or not at all: nothing half told is left when killed here

    def _parameters(self, architecture: Architecture) -> dict[str, str]:
        parameters: dict[str, str] = {}
        for index, layer in enumerate(architecture):
            parameters[f"layer_{index:03d}.attention"] = str(layer.attention)
            parameters[f"layer_{index:03d}.ffn"] = str(layer.ffn)
        return parameters

    def _finished(self) -> list[FrozenTrial]:
        return self.study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))


def _drop_half_line(path: Path) -> None:
    """Cuts off what a killed process or a full disk left of a line; Optuna would never read past it again."""
    if not path.exists():
        return
    content = path.read_bytes()
    if content and not content.endswith(b"\n"):
        with path.open("r+b") as file:
            file.truncate(content.rfind(b"\n") + 1)
