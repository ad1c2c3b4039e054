"""The ledger: what is queued is measured once, whatever dies; several workers; journals and databases that are not whole."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import optuna
import pytest
from app import World, nas
from dying_worker import SPECS
from optuna.samplers import RandomSampler
from optuna.storages.journal import JournalFileSymlinkLock
from optuna.trial import FrozenTrial, TrialState

import nas.study as study_module
from blocks.errors import CheckpointError, ConfigError
from blocks.spec import Architecture
from nas.study import Ledger, architecture_of, distributions, parameters

pytestmark = pytest.mark.filterwarnings("ignore:The value of `grace_period`")
EVERY = [Architecture((one, other)) for one in SPECS[0] for other in SPECS[1]]
CHANGE_OF_STATE = 6  # in Optuna's journal
QUEUED = random.Random(0).sample(EVERY, 5)


def open_ledger(path: Path | str, **options: Any) -> Ledger:
    return Ledger(path, "search", SPECS, RandomSampler(seed=0), **options)


def queue_all(ledger: Ledger, architectures: Sequence[Architecture] = QUEUED) -> None:
    for number, architecture in enumerate(architectures):
        ledger.queue(architecture, "optimum" if number == 0 else "pool")


def kl_of(architecture: Architecture) -> float:
    """A made-up true KL."""
    return 0.1 + EVERY.index(architecture) / 100


def work(ledger: Ledger, most: int | None = None) -> list[Architecture]:
    """Measures all there is, as `nas.trials` does; returns what was taken, in order."""
    taken = []
    while True:
        while (trial := ledger.take(most)) is not None:
            architecture = architecture_of(trial.params)
            ledger.record(trial, kl_of(architecture), {"memory": -0.5}, total_bytes=10)
            taken.append(architecture)
        if ledger.wait():
            return taken


def complete(ledger: Ledger) -> list[Architecture]:
    return [architecture_of(t.params) for t in ledger.trials if t.state == TrialState.COMPLETE]


@pytest.fixture(params=["journal", "sqlite"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Path | str:
    return tmp_path / "study.journal" if request.param == "journal" else f"sqlite:///{tmp_path / 'study.db'}"


# One worker


def test_parameters_are_a_subblock_each_and_can_be_read_back() -> None:
    for architecture in EVERY:
        assert architecture_of(parameters(architecture)) == architecture
        assert architecture_of(dict(reversed(parameters(architecture).items()))) == architecture
    assert list(distributions(SPECS)) == [
        "layer_000.attention",
        "layer_000.ffn",
        "layer_001.attention",
        "layer_001.ffn",
    ]
    assert distributions(SPECS)["layer_001.ffn"].choices == ("ffn:256", "ffn:512")


def test_what_is_queued_first_is_measured_first_and_nothing_else(place: Path | str) -> None:
    ledger = open_ledger(place)
    assert ledger.take(None) is None
    queue_all(ledger)
    queue_all(ledger)  # a search that was stopped queues all of it again
    assert work(ledger) == QUEUED
    queue_all(ledger)
    assert ledger.take(None) is None and ledger.take(5) is None
    again = open_ledger(place)
    assert [again.value(a) for a in QUEUED] == [kl_of(a) for a in QUEUED]
    assert [t.user_attrs["origin"] for t in again.finished] == ["optimum", *["pool"] * 4]
    assert again.finished[0].constraints == {"memory": -0.5} and again.finished[0].user_attrs["total_bytes"] == 10
    assert Ledger(place, "another", SPECS).value(QUEUED[0]) is None


def test_the_sampler_is_asked_up_to_so_many_trials_in_all(place: Path | str) -> None:
    ledger = open_ledger(place)
    queue_all(ledger, QUEUED[:2])
    taken = work(ledger, most=6)
    assert taken[:2] == QUEUED[:2] and len(taken) == 6
    assert work(ledger, most=6) == [] and len(work(open_ledger(place), most=8)) == 2


def test_a_pruned_child_has_no_value_but_is_not_measured_again(place: Path | str) -> None:
    ledger = open_ledger(place)
    queue_all(ledger, QUEUED[:1])
    trial = ledger.take(None)
    assert trial is not None and ledger.trial_of(QUEUED[0]) is not None
    ledger.prune(trial, 0.7, {"memory": 0.0})
    assert ledger.value(QUEUED[0]) is None
    (done,) = ledger.finished
    assert (done.state, done.user_attrs["kl_so_far"]) == (TrialState.PRUNED, 0.7)
    ledger.queue(QUEUED[0], "path")
    assert ledger.take(None) is None


# Workers that die


def run_cases(cases: Sequence[Sequence[object]], directory: Path) -> None:
    (directory / "cases.json").write_text(json.dumps(cases, default=str))
    script = Path(__file__).with_name("dying_worker.py")
    done = subprocess.run([sys.executable, str(script), "cases.json"], cwd=directory, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == [-signal.SIGKILL] * len(cases), done.stderr


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Journals of workers that were killed at every line they write while they take the second trial, a directory each."""
    directory = tmp_path_factory.mktemp("killed")
    cases = []
    for when in range(21):
        path = directory / f"{when}" / "study.journal"
        queue_all(open_ledger(path))
        cases.append((path, "search", when, when in (1, 4, 12), 2))
    run_cases(cases, directory)
    lines = [path.read_bytes().split(b"\n")[:-1] for path in directory.glob("*/study.journal")]
    begun_or_done = {sum(json.loads(line)["op_code"] == CHANGE_OF_STATE for line in journal) for journal in lines}
    assert begun_or_done == {0, 1, 2, 3}  # none begun, one, one done, a second one begun
    return directory


@pytest.mark.parametrize("when", range(21))
def test_the_trial_of_a_killed_worker_comes_back(killed: Path, monkeypatch: pytest.MonkeyPatch, when: int) -> None:
    monkeypatch.setattr(study_module, "UNNAMED_SECONDS", 0)
    monkeypatch.setattr(study_module, "LOCK_SECONDS", 1)
    ledger = open_ledger(killed / f"{when}" / "study.journal")
    before = complete(ledger)
    assert len(before) <= 1 and len(ledger.trials) == len(QUEUED)
    taken = work(ledger)
    assert sorted(map(EVERY.index, complete(ledger))) == sorted(map(EVERY.index, QUEUED))
    assert set(taken) == set(QUEUED) - set(before)
    origins = {architecture_of(t.params): t.user_attrs["origin"] for t in ledger.finished}
    assert origins == {a: "optimum" if n == 0 else "pool" for n, a in enumerate(QUEUED)}
    assert not [t for t in ledger.trials if t.state in (TrialState.RUNNING, TrialState.WAITING)]


def test_a_worker_that_is_killed_while_it_puts_back_another_s_trial_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second one dies between any two lines of putting back the trial of the first."""
    paths = [tmp_path / f"{when}" / "study.journal" for when in range(1, 6)]
    cases: list[tuple[object, ...]] = []
    for when, path in enumerate(paths, 1):
        queue_all(open_ledger(path), QUEUED[:3])
        cases += [(path, "search", 0, False, 1), (path, "search", when, False, 1)]
    run_cases(cases, tmp_path)
    monkeypatch.setattr(study_module, "UNNAMED_SECONDS", 0)
    for path in paths:
        work(ledger := open_ledger(path))
        assert sorted(map(EVERY.index, complete(ledger))) == sorted(map(EVERY.index, QUEUED[:3]))


def running(ledger: Ledger, worker: str, seconds: float = 0.0) -> FrozenTrial:
    """A trial that some worker has begun."""
    trial = ledger.take(None)
    assert trial is not None
    trial.set_user_attr("worker", worker)
    return ledger.trials[trial.number]


@pytest.mark.parametrize(
    ("worker", "gone"),
    [
        ("ours", False),
        ("ours, and clocks apart", False),
        ("reused", True),
        ("dead", True),
        ("zombie", True),
        ("elsewhere", False),
        ("long silent elsewhere", True),
    ],
)
def test_which_workers_are_taken_for_dead(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, worker: str, gone: bool
) -> None:
    """A process of another start time has only the number of the one that is gone."""
    ledger = open_ledger(tmp_path / "study.journal")
    queue_all(ledger, QUEUED[:1])
    host, pid, created = study_module.this_worker().split()
    child = subprocess.Popen([sys.executable, "-c", ""])
    if worker == "dead":
        child.wait()
    names = {
        "ours": f"{host} {pid} {created}",
        "ours, and clocks apart": f"{host} {pid} {int(created) + 1}",
        "reused": f"{host} {pid} {int(created) - 1000}",
        "dead": f"{host} {child.pid} {time.time():.0f}",
        "zombie": f"{host} {child.pid} {time.time():.0f}",
    }
    if worker == "long silent elsewhere":
        monkeypatch.setattr(study_module, "SILENT_SECONDS", 0)
    if worker == "zombie":
        time.sleep(0.5)
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    trial = running(ledger, names.get(worker, f"elsewhere {pid} {created}"))
    ledger.put_back()
    state = ledger.trials[trial.number].state
    assert state == (TrialState.FAIL if gone else TrialState.RUNNING)
    assert sum(t.state == TrialState.WAITING for t in ledger.trials) == gone
    child.wait()


# Several workers at once


def test_the_last_one_of_the_queue_goes_to_one_worker_and_the_sampler_is_not_asked(place: Path | str) -> None:
    """Another worker takes it just before this one asks."""
    ours, theirs = open_ledger(place), open_ledger(place)
    queue_all(ours, QUEUED[:1])
    ask, taken = ours.study.ask, []

    def ask_late(*arguments: Any) -> optuna.Trial:
        taken.append(theirs.take(None))
        return ask(*arguments)

    ours.study.ask = ask_late  # type: ignore[method-assign]
    assert ours.take(None) is None and taken[0] is not None
    assert [t.state for t in theirs.trials if t.state != TrialState.FAIL] == [TrialState.RUNNING]


def test_workers_at_once_begin_no_more_trials_than_asked_for(place: Path | str) -> None:
    ledgers, taken = [open_ledger(place) for _ in range(3)], []
    queue_all(ledgers[0], QUEUED[:2])

    def late(number: int) -> Callable[..., optuna.Trial]:
        ask = ledgers[number].study.ask

        def asked(*arguments: Any) -> optuna.Trial:
            if number:
                taken.append(ledgers[number - 1].take(3))
            return ask(*arguments)

        return asked

    for number, ledger in enumerate(ledgers):
        ledger.study.ask = late(number)  # type: ignore[method-assign]
    taken += [ledgers[2].take(3), ledgers[2].take(3)]
    assert sum(trial is not None for trial in taken) == 3
    assert sum(t.state == TrialState.RUNNING for t in ledgers[0].trials) == 3
    assert not [t for t in ledgers[0].trials if t.state == TrialState.WAITING]


def test_a_worker_that_was_taken_for_dead_is_told_so_and_its_trial_is_done_again(place: Path | str) -> None:
    ours, theirs = open_ledger(place), open_ledger(place)
    queue_all(ours, QUEUED[:1])
    slow = ours.take(None)
    assert slow is not None
    theirs.study.tell(slow.number, state=TrialState.FAIL)
    with pytest.raises(optuna.exceptions.UpdateFinishedTrialError):  # nas.trials goes on with the next one
        ours.record(slow, 0.5, {"memory": 0.0}, total_bytes=1)
    queue_all(theirs, QUEUED[:1])
    assert work(theirs) == QUEUED[:1] and theirs.value(QUEUED[0]) == kl_of(QUEUED[0])


def test_waiting_ends_when_others_are_done_or_something_is_to_be_taken(place: Path | str) -> None:
    ours, theirs = open_ledger(place), open_ledger(place)
    queue_all(ours, QUEUED[:1])
    trial = theirs.take(None)
    assert trial is not None
    told: list[int] = []

    def others_go_on(running: int) -> None:
        told.append(running)
        if len(told) == 2:
            theirs.record(trial, 0.5, {})

    assert ours.wait(others_go_on) and told == [1, 1]
    ours.queue(QUEUED[1], "path")
    assert not theirs.wait()


# Journals and databases


def test_half_a_line_is_dropped(tmp_path: Path) -> None:
    path = tmp_path / "study.journal"
    queue_all(open_ledger(path), QUEUED[:2])
    whole = path.read_bytes()
    for half in (b'{"op_code": 4, "worker', b"{", b"\xc3"):
        path.write_bytes(whole + half)
        ledger = open_ledger(path)
        assert path.read_bytes().startswith(whole) and half not in path.read_bytes()[len(whole) :].splitlines()
        assert len(ledger.trials) == 2
    assert work(open_ledger(path)) == QUEUED[:2]


def test_half_a_line_is_not_dropped_while_another_worker_writes_it(tmp_path: Path) -> None:
    path = tmp_path / "study.journal"
    queue_all(open_ledger(path), QUEUED[:2])
    content = path.read_bytes()
    last = content.splitlines(keepends=True)[-1]
    lock = JournalFileSymlinkLock(str(path.resolve()))
    lock.acquire()
    path.write_bytes(content[: -len(last)] + last[:20])
    opened: list[Ledger] = []
    other = threading.Thread(target=lambda: opened.append(open_ledger(path)))
    other.start()
    time.sleep(0.5)
    assert not opened and path.read_bytes().endswith(last[:20])
    with path.open("ab") as file:
        file.write(last[20:])
    lock.release()
    other.join(20)
    assert len(opened[0].trials) == 2


def test_a_lock_that_a_killed_worker_left_does_not_hold_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(study_module, "LOCK_SECONDS", 1)
    path = tmp_path / "study.journal"
    queue_all(open_ledger(path), QUEUED[:1])
    JournalFileSymlinkLock(str(path.resolve())).acquire()
    assert work(open_ledger(path)) == QUEUED[:1]


@pytest.mark.parametrize("content", [b"not a journal\n", b'{"op_code": 77}\n', b"[1, 2]\n"])
def test_a_damaged_journal_is_one_line(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "study.journal"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"study\.journal is damaged .*; delete it") as caught:
        open_ledger(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "url", ["sqlite:////nowhere/at/all.db", "mysql://nobody@127.0.0.1:1/nas", "oracel://x", "x://"]
)
def test_a_database_that_cannot_be_opened_is_one_line(url: str) -> None:
    with pytest.raises(ConfigError) as caught:
        open_ledger(url)
    assert str(caught.value).startswith(f"--storage {url}: cannot open it (") and "\n" not in str(caught.value)


def test_and_so_the_command_says(world: World, tmp_path: Path) -> None:
    url = "sqlite:////nowhere/at/all.db"
    result = nas(
        "search", "--run", world.runs / "scored", "--budget", "0.5", "--batch", 1, "--context", 128, "--storage", url
    )
    assert result.code == 2 and result.out == "" and "Traceback" not in result.err
    assert result.err.splitlines()[-1].startswith(f"error: --storage {url}: cannot open it (")
