"""`nas score` and `nas search` killed with SIGKILL at any instant and run again end as if never killed.

`nas distill` is in test_trainer.py.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from app import BUDGET, World, contents, stamps, succeed
from app import nas as nas_command

import nas.study
from blocks.library import BlockLibrary

IN_SCORE = (
    ("calibration.npy", "before"),
    ("layer_002.safetensors", "before"),
    ("layer_002.safetensors", "after"),
    ("one_pass_001.json", "before"),
    ("exact_001.json", "after"),
    ("scores.csv", "before"),
    ("score.json", "before"),
)
# Lines of the journal; renaming the child, and the uniform baseline.
IN_SEARCH = (("journal", 3), ("journal", 12), ("journal", 40), ("rename", 2), ("rename", 4))
LARGER = ("--budget", "0.8", "--batch", 1, "--context", 128)


def kill(cases: Sequence[tuple[str, object, Sequence[object]]], directory: Path) -> None:
    """Runs each command in `directory` until the instant at which it is killed."""
    (directory / "cases.json").write_text(json.dumps(cases, default=str))
    script = Path(__file__).with_name("killed_nas.py")
    done = subprocess.run([sys.executable, str(script), "cases.json"], cwd=directory, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == [-signal.SIGKILL] * len(cases), done.stderr


def whole(directory: Path, part: str) -> dict[str, int]:
    """Modification times of the finished files of a part of a run."""
    return {name: time for name, time in stamps(directory / part).items() if not Path(name).name.startswith(".")}


@pytest.fixture(scope="module")
def killed(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All killed runs, one directory each. Searches are given relative ones: Optuna's lock is a symbolic link, and one that
    leads nowhere would be waited for forever."""
    directory = tmp_path_factory.mktemp("killed")
    cases: list[tuple[str, object, Sequence[object]]] = []
    for file, when in IN_SCORE:
        cases.append((file, when, world.score_words(directory / f"{file}-{when}")))
    for place, count in IN_SEARCH:
        run = world.copy("scored", directory / f"{place}-{count}")
        cases.append((place, count, ("search", "--run", run.name, *BUDGET)))
    # The third renaming: the old child is moved aside, the new one not yet in its place.
    cases.append(("rename", 3, ("search", "--run", world.copy("searched", directory / "replacing"), *LARGER)))
    kill(cases, directory)
    return directory


@pytest.mark.parametrize(("file", "when"), IN_SCORE)
def test_killed_scores_end_as_if_never_killed(world: World, killed: Path, file: str, when: str) -> None:
    run = killed / f"{file}-{when}"
    assert [path.name.split(".")[1] for path in run.rglob("*.tmp")] == [file.split(".")[0]] * (when == "before")
    assert len(list(run.rglob(file))) == (when == "after")
    done = {part: whole(run, part) for part in ("library", "scores")}
    succeed(*world.score_words(run))
    assert not list(run.rglob(".*")), "leftovers of the killed process"
    for part, files in done.items():
        assert files.items() <= whole(run, part).items(), "a layer that was done is done again"
    ours, expected = contents(run), contents(world.runs / "scored")
    assert ours.keys() == expected.keys()
    for name in expected:
        if name == "scores.csv" or name.startswith(("data/", "library/", "scores/")):
            assert ours[name] == expected[name], name


def test_only_the_missing_layers_are_fitted_and_scored(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = world.copy("scored", tmp_path / "run")
    for name in ("scores.csv", "score.json", "library/layer_001.safetensors", "scores/one_pass_002.json"):
        (run / name).unlink()
    (run / "scores" / "exact_003.json").unlink()
    fitted: list[int] = []
    save = BlockLibrary.save
    monkeypatch.setattr(
        BlockLibrary, "save", lambda self, layer, *rest: (fitted.append(layer), save(self, layer, *rest))
    )
    before = stamps(run)
    succeed(*world.score_words(run))
    assert fitted == [1]
    missing = {"scores.csv", "score.json", "library/layer_001.safetensors", "scores/one_pass_002.json"}
    after = stamps(run)
    assert {name for name in after if after[name] != before.get(name)} == missing | {"scores/exact_003.json"}
    assert contents(run)["scores.csv"] == contents(world.runs / "scored")["scores.csv"]


def test_corrupt_leftovers_are_ignored(world: World, tmp_path: Path) -> None:
    run = world.copy("scored", tmp_path / "run")
    (run / "scores.csv").unlink()
    leftovers = [
        run / "library/.layer_000.safetensors.99.tmp",
        run / "scores/.exact_000.json.99.tmp",
        run / ".scores.csv.1.tmp",
    ]
    for leftover in leftovers:
        leftover.write_bytes(b"half")
    (run / ".child.tmp").mkdir()
    succeed(*world.score_words(run))
    assert contents(run)["scores.csv"] == contents(world.runs / "scored")["scores.csv"]
    assert not any(leftover.exists() for leftover in leftovers)
    succeed("search", "--run", run, *BUDGET)
    assert contents(run / "child") == contents(world.runs / "searched" / "child")


def trials(found: dict[str, Any]) -> list[tuple[Any, ...]]:
    """Every child measured. A trial that was cut off is queued again, under another number."""
    told = [tuple(trial[name] for name in ("origin", "state", "kl", "predicted_kl")) for trial in found["trials"]]
    return sorted(told, key=str)


def complete(run: Path) -> int:
    """Trials that whole lines of the journal complete or prune (operation 6, states 1 and 2)."""
    lines = (run / "study.journal").read_bytes().split(b"\n")[:-1]
    return sum(entry["op_code"] == 6 and entry.get("state") in (1, 2) for entry in map(json.loads, lines))


@pytest.mark.filterwarnings("ignore:The value of `grace_period`")
@pytest.mark.parametrize(("place", "when"), IN_SEARCH)
def test_killed_searches_lose_no_trial(
    world: World, killed: Path, monkeypatch: pytest.MonkeyPatch, place: str, when: int
) -> None:
    monkeypatch.setattr(nas.study, "LOCK_SECONDS", 1)
    monkeypatch.setattr(nas.study, "UNNAMED_SECONDS", 0)
    monkeypatch.chdir(killed)
    run = Path(f"{place}-{when}")
    before = complete(run)
    assert (run / "study.journal.lock").is_symlink() == (place == "journal")
    assert not (run / "architecture.json").exists()
    found = succeed("search", "--run", run, *BUDGET, "--json").json
    expected = json.loads((world.runs / "searched" / "architecture.json").read_text())
    for key in ("layers", "uniform_layers", "heldout", "cost", "kl"):
        assert found[key] == expected[key]
    assert trials(found) == trials(expected)
    assert complete(run) == len(found["trials"]) >= before  # what was measured is not measured again
    assert before == (len(found["trials"]) if place == "rename" else before)
    for child in ("child", "uniform"):
        assert contents(run / child) == contents(world.runs / "searched" / child)
    assert not list(run.rglob(".*")) and not (run / "study.journal.lock").is_symlink()


def test_a_search_killed_while_it_replaces_another_child(world: World, killed: Path, tmp_path: Path) -> None:
    run = killed / "replacing"
    assert (run / ".child.old").exists() and not (run / "child").exists()
    assert nas_command("distill", "--run", run).code == 1
    succeed("search", "--run", run, *LARGER)
    untroubled = world.copy("searched", tmp_path / "untroubled")
    succeed("search", "--run", untroubled, *LARGER)
    assert contents(run / "child") == contents(untroubled / "child") and not list(run.rglob(".*"))
