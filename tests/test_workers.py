"""Several `nas search` at once, on one run directory and one storage, find what one finds; also when one of them is killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import optuna
import pytest
from app import BUDGET, World, contents

from nas.study import FIXED
from nas.turns import turn

# No more trials than are queued: then the result does not depend on who measures what. Pruning does.
WORDS = (*BUDGET, "--verify", "3", "--trials", "1", "--no-prune", "--no-refit")
KILLED = -signal.SIGKILL
FOUND = (
    "layers",
    "kl",
    "kl_se",
    "predicted_kl",
    "cost",
    "heldout",
    "baselines",
    "optimum",
    "uniform_layers",
    "warnings",
)


@pytest.fixture(scope="module")
def searched(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run searched by one worker, and others by several, a directory each."""
    directory = tmp_path_factory.mktemp("workers")

    def case(name: str, workers: int, killed: tuple[str, int] | None, *words: object) -> list[object]:
        run = world.copy("scored", directory / name)
        return [workers, killed, ["search", "--run", run, *WORDS, *words]]

    database = f"sqlite:///{directory / 'study.db'}"
    path = ("--path-steps", "2")
    cases = [
        case("one", 1, None, *path),
        case("four", 4, None, *path),
        case("killed", 4, ("kl", 6), *path),
        case("database", 2, None, *path, "--storage", database),
        [
            1,
            None,
            ["search", "--run", world.copy("scored", directory / "another"), *WORDS, *path, "--storage", database],
        ],
    ]
    (directory / "cases.json").write_text(json.dumps(cases, default=str))
    script = Path(__file__).with_name("search_workers.py")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(script), "cases.json"], cwd=directory, capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    expected = [[0], [0] * 4, [KILLED, 0, 0, 0], [0] * 2, [0]]
    assert json.loads(done.stdout.splitlines()[-1]) == expected, done.stderr
    assert "Traceback" not in done.stderr
    return directory


def found(run: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((run / "architecture.json").read_text())
    return content


@pytest.mark.parametrize("name", ["four", "killed", "database", "another"])
def test_several_workers_find_what_one_finds(searched: Path, name: str) -> None:
    ours, expected = found(searched / name), found(searched / "one")
    for key in FOUND:
        assert ours[key] == expected[key], key
    assert [step["layers"] for step in ours["path"]] == [step["layers"] for step in expected["path"]]
    for child in ("child", "uniform"):
        assert contents(searched / name / child) == contents(searched / "one" / child)


@pytest.mark.parametrize("name", ["four", "killed", "database"])
def test_every_queued_child_is_measured_and_none_is_lost(searched: Path, name: str) -> None:
    """And has the same true KL whoever measured it; the killed worker's trial was begun, and done by another."""
    trials, expected = found(searched / name)["trials"], found(searched / "one")["trials"]
    assert {tuple(t["layers"]): t["kl"] for t in trials} == {tuple(t["layers"]): t["kl"] for t in expected}
    assert all(trial["state"] == "complete" for trial in trials)
    study = load(searched / name, searched)
    states = Counter(trial.state.name for trial in study.trials)
    assert states["RUNNING"] == states["WAITING"] == 0
    lost = [trial for trial in study.trials if trial.state.name == "FAIL" and FIXED in trial.system_attrs]
    assert bool(lost) == (name == "killed")  # what else fails was proposed when another worker had begun the last one
    workers = {trial.user_attrs["worker"] for trial in study.trials}
    assert len(workers) >= (2 if name != "database" else 1)


def load(run: Path, directory: Path) -> optuna.Study:
    if run.name == "database":
        storage: Any = f"sqlite:///{directory / 'study.db'}"
    else:
        backend = optuna.storages.journal.JournalFileBackend(str(run / "study.journal"))
        storage = optuna.storages.JournalStorage(backend)
    (name,) = optuna.get_all_study_names(storage)
    return optuna.load_study(study_name=name, storage=storage)


def test_a_search_of_another_directory_takes_what_is_in_the_database(searched: Path) -> None:
    """Of the same parent, text and limits: as on another machine that comes late. Nothing is measured twice."""
    assert not (searched / "another" / "study.journal").exists()
    trials = found(searched / "another")["trials"]
    assert trials == found(searched / "database")["trials"]


def test_nothing_is_left_lying_about(searched: Path) -> None:
    for run in searched.iterdir():
        assert not list(run.rglob(".*")) and not list(run.rglob("*.lock"))


# Turns


def test_turns_come_one_after_another(tmp_path: Path) -> None:
    path, seen = tmp_path / "file", []
    path.write_text("as it was")

    def work(number: int) -> None:
        with turn(path):
            seen.append(number)
            time.sleep(0.05)
            seen.append(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen[::2] == seen[1::2] and sorted(seen[::2]) == [0, 1, 2, 3]
    assert path.read_text() == "as it was"


def test_the_turn_of_a_killed_process_is_over(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.touch()
    program = f"""
import pathlib, time
from nas.turns import turn
with turn(pathlib.Path({str(path)!r})):
    print("in", flush=True)
    time.sleep(60)
"""
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "in\n"
    entered = threading.Event()

    def enter() -> None:
        with turn(path):
            entered.set()

    threading.Thread(target=enter, daemon=True).start()
    assert not entered.wait(0.3)
    process.kill()
    assert entered.wait(20)
    process.wait()
