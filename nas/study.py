"""The ledger: every child that is measured, as trials of an Optuna study that many workers may share.

One categorical parameter per subblock, the true KL as the value, the limits as constraints. The study is a journal in the run
directory, or any Optuna storage URL; optuna-dashboard opens either. Children that a search wants measured are queued;
each worker takes the next one, and when the queue is empty the sampler names one. A trial whose worker died is put back
into the queue, so nothing is lost, and what is measured is never measured again.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Any

import optuna
import psutil
from optuna.distributions import CategoricalDistribution
from optuna.exceptions import UpdateFinishedTrialError
from optuna.pruners import BasePruner
from optuna.samplers import BaseSampler
from optuna.storages import BaseStorage, JournalStorage
from optuna.storages.journal import JournalFileBackend, JournalFileSymlinkLock
from optuna.storages.journal._file import get_lock_file
from optuna.trial import FrozenTrial, Trial, TrialState

from blocks.errors import CheckpointError, ConfigError
from blocks.files import write_errors
from blocks.spec import Architecture, LayerSpec

LOCK_SECONDS = 5  # a lock older than this was left by a killed process; a trial is written in milliseconds
SILENT_SECONDS = 900  # a running trial of another machine that is older than this has lost its worker
UNNAMED_SECONDS = 60  # one that has not even said whose it is
CLOCK_SECONDS = 5  # by which two processes may differ about when a third was started
POLL_SECONDS = 0.5
OPENINGS = 5  # of a database
FIXED = "fixed_params"  # where Optuna keeps what is queued
DONE = (TrialState.COMPLETE, TrialState.PRUNED)
OPEN = (TrialState.WAITING, TrialState.RUNNING)


class Ledger:
    """The study of one search.

    Args:
        storage: the journal file, or a storage URL.
        name: the study; settings that give other values must give another name.
        space: the candidates of each layer, for the distributions.
        sampler, pruner: Optuna's.

    Raises:
        CheckpointError: if the journal is damaged, or the disk refuses.
        ConfigError: if the storage cannot be opened.
    """

    def __init__(
        self,
        storage: Path | str,
        name: str,
        space: Sequence[Sequence[LayerSpec]],
        sampler: BaseSampler | None = None,
        pruner: BasePruner | None = None,
    ) -> None:
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        self.storage, self.distributions = storage, distributions(space)
        with write_errors(Path(str(storage))):
            try:
                self.study = optuna.create_study(
                    storage=_open(storage),
                    study_name=name,
                    direction="minimize",
                    load_if_exists=True,
                    sampler=sampler,
                    pruner=pruner or optuna.pruners.NopPruner(),
                )
            except (ValueError, KeyError, TypeError, AssertionError) as error:  # lines not of JSON, or not of Optuna
                raise CheckpointError(
                    f"{storage} is damaged ({error!r}); delete it and run `nas search` again"
                ) from error

    # ---- the queue

    def queue(self, architecture: Architecture, origin: str, **attributes: Any) -> None:
        """Wants a child measured, unless it is, or is about to be. What is queued first is measured first."""
        if self.trial_of(architecture) is None:
            with write_errors(Path(str(self.storage))):
                self.study.enqueue_trial(parameters(architecture), {"origin": origin, **attributes})

    def take(self, most: int | None) -> Trial | None:
        """The next child to measure: from the queue, or the sampler's if fewer than `most` trials were begun.

        None (no limit) asks only the queue. Returns None if there is nothing to do, though others may be still at work.
        """
        self.put_back()
        if all(trial.state != TrialState.WAITING for trial in self.trials) and self._begun() >= (most or 0):
            return None
        with write_errors(Path(str(self.storage))):
            trial = self.study.ask()
            trial.set_user_attr("worker", this_worker())  # before the sampler, who may take long, so that others know
            for name, distribution in self.distributions.items():
                trial.suggest_categorical(name, distribution.choices)
            if FIXED not in self.trials[trial.number].system_attrs and self._begun(trial.number) >= (most or 0):
                self.study.tell(trial, state=TrialState.FAIL)  # another worker was quicker with the last one
                return None
        return trial

    def _begun(self, before: int | None = None) -> int:
        """Trials that are queued, begun or done; those with a smaller number than `before`."""
        return sum(trial.state in (*DONE, *OPEN) for trial in self.trials[:before])

    def put_back(self) -> None:
        """Queues again what a worker had begun that is no more."""
        for trial in self.trials:
            if trial.state != TrialState.RUNNING or not _orphaned(trial):
                continue
            wanted = _wanted(trial)
            known = (other for other in self.trials if other.state in (*DONE, TrialState.WAITING))
            again = {name: value for name, value in trial.user_attrs.items() if name != "worker"}
            with write_errors(Path(str(self.storage))):
                # In this order: killed in between, this process loses nothing either.
                if len(wanted) == len(self.distributions) and all(_wanted(other) != wanted for other in known):
                    self.study.enqueue_trial(dict(wanted), again | {"begun_before": trial.number})
                with suppress(ValueError, UpdateFinishedTrialError):  # another worker was quicker
                    self.study.tell(trial.number, state=TrialState.FAIL)

    def wait(self, on_wait: Callable[[int], None] | None = None) -> bool:
        """Waits until no trial is open. Returns False at once if one is in the queue (a worker died): it must be taken."""
        while True:
            self.put_back()
            states = [trial.state for trial in self.trials]
            if TrialState.WAITING in states:
                return False
            if TrialState.RUNNING not in states:
                return True
            if on_wait is not None:
                on_wait(states.count(TrialState.RUNNING))
            time.sleep(POLL_SECONDS)

    # ---- results

    def record(self, trial: Trial, kl: float, constraints: Mapping[str, float], **attributes: Any) -> None:
        """A child's true KL (nats per token), by how much it is outside each limit (as a share), and what else is known."""
        self._finish(trial, constraints, attributes)
        with write_errors(Path(str(self.storage))):
            self.study.tell(trial, kl)

    def prune(self, trial: Trial, kl: float, constraints: Mapping[str, float], **attributes: Any) -> None:
        """A child given up half-way, with its KL so far."""
        self._finish(trial, constraints, {**attributes, "kl_so_far": kl})
        with write_errors(Path(str(self.storage))):
            self.study.tell(trial, state=TrialState.PRUNED)

    def _finish(self, trial: Trial, constraints: Mapping[str, float], attributes: Mapping[str, Any]) -> None:
        with write_errors(Path(str(self.storage))):
            for name, value in constraints.items():
                trial.set_constraint(name, value)
            for name, value in attributes.items():
                trial.set_user_attr(name, value)

    # ---- reading

    @property
    def trials(self) -> list[FrozenTrial]:
        return self.study.get_trials(deepcopy=False)

    @property
    def finished(self) -> list[FrozenTrial]:
        """Measured and pruned trials, in the order of their numbers."""
        return [trial for trial in self.trials if trial.state in DONE]

    def trial_of(self, architecture: Architecture) -> FrozenTrial | None:
        """The trial of a child that is measured, being measured or queued."""
        wanted = parameters(architecture)
        for trial in self.trials:
            if trial.state in (*DONE, *OPEN) and _wanted(trial) == wanted:
                return trial
        return None

    def value(self, architecture: Architecture) -> float | None:
        """The true KL if this child was measured."""
        wanted = parameters(architecture)
        for trial in self.trials:
            if trial.state == TrialState.COMPLETE and trial.params == wanted:
                return trial.value
        return None


def distributions(space: Sequence[Sequence[LayerSpec]]) -> dict[str, CategoricalDistribution]:
    """One categorical per subblock, its choices in the order of the candidates."""
    found: dict[str, CategoricalDistribution] = {}
    for index, specs in enumerate(space):
        for part in ("attention", "ffn"):
            choices = list(dict.fromkeys(str(getattr(spec, part)) for spec in specs))
            found[f"layer_{index:03d}.{part}"] = CategoricalDistribution(choices)
    return found


def parameters(architecture: Architecture) -> dict[str, str]:
    """An architecture as the parameters of a trial."""
    named: dict[str, str] = {}
    for index, layer in enumerate(architecture):
        named[f"layer_{index:03d}.attention"] = str(layer.attention)
        named[f"layer_{index:03d}.ffn"] = str(layer.ffn)
    return named


def architecture_of(params: Mapping[str, Any]) -> Architecture:
    """The inverse of `parameters`."""
    layers = sorted({name.partition(".")[0] for name in params})
    return Architecture(tuple(LayerSpec.parse(f"{params[f'{l}.attention']}+{params[f'{l}.ffn']}") for l in layers))


def _wanted(trial: FrozenTrial) -> Mapping[str, Any]:
    """The parameters of a trial, also of one that is only queued or whose worker has not read them all."""
    fixed: Mapping[str, Any] = trial.system_attrs.get(FIXED, trial.params)
    return fixed


def this_worker() -> str:
    """Names this process so that others can tell whether it still lives."""
    return f"{socket.gethostname()} {os.getpid()} {psutil.Process().create_time():.0f}"


def _orphaned(trial: FrozenTrial) -> bool:
    """Whether the worker of a running trial is gone: its process here, or nothing heard of it for long elsewhere."""
    began = trial.datetime_start or datetime.now()
    silent = (datetime.now() - began).total_seconds()
    host, pid, created = [*str(trial.user_attrs.get("worker", "")).split(), "", "", ""][:3]
    if host != socket.gethostname():  # also one that died before it could say who it was
        return silent > (SILENT_SECONDS if host else UNNAMED_SECONDS)
    try:
        process = psutil.Process(int(pid))
        if process.status() == psutil.STATUS_ZOMBIE:
            return True
        return abs(process.create_time() - float(created)) > CLOCK_SECONDS
    except psutil.NoSuchProcess:
        return True


def _open(storage: Path | str) -> BaseStorage:
    if isinstance(storage, str) and "://" in storage:
        return _open_database(storage)
    path = Path(storage).resolve()  # the lock is a link, which must hold from any directory
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = JournalFileSymlinkLock(str(path), grace_period=LOCK_SECONDS)
    _drop_half_line(path, lock)
    return JournalStorage(JournalFileBackend(str(path), lock_obj=lock))


def _open_database(url: str) -> BaseStorage:
    """Workers that start at once may get into each other's way while they make the tables; then it is tried again."""
    for attempt in range(OPENINGS):
        try:
            return optuna.storages.get_storage(url)
        except Exception as error:  # whatever a database driver raises
            text = " ".join(str(error).split())
            if attempt + 1 == OPENINGS or not any(
                word in text.lower() for word in ("exist", "unique", "dupl", "locked")
            ):
                raise ConfigError(f"--storage {url}: cannot open it ({text})") from error
            time.sleep(POLL_SECONDS * (1 + attempt))
    raise AssertionError("unreachable")


def _drop_half_line(path: Path, lock: JournalFileSymlinkLock) -> None:
    """Cuts off what a killed process or a full disk left of a line; Optuna would never read past it again."""
    if not path.exists():
        return
    with get_lock_file(lock):  # another worker may be writing
        content = path.read_bytes()
        if content and not content.endswith(b"\n"):
            with path.open("r+b") as file:
                file.truncate(content.rfind(b"\n") + 1)
