"""What was healed for one search is kept while another one's child is healed, whenever the process is killed."""

from __future__ import annotations

from pathlib import Path

import pytest
from app import BUDGET, HEALING, World, contents, nas, succeed

from blocks.files import save_json, save_text
from nas.config import RunConfig
from nas.export import find_child
from nas.progress import Reporter
from nas.run import Run
from nas.set_aside import HEALED_FOR, forget_healing, set_aside_other_healing
from nas.turns import alone


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(tmp_path, RunConfig(), "fingerprint")


def heal(run: Run, search: str, told: str = "") -> None:
    """As `nas distill` does after `nas search`, but at once."""
    set_aside(run, search)
    save_json(run.path(HEALED_FOR), {"search": search})
    for name in ("distill", "healed"):
        save_text(run.path(name) / "weights", search + told)


def set_aside(run: Run, search: str) -> None:
    save_json(run.path("architecture.json"), {"key": search})
    set_aside_other_healing(run, search, Reporter(quiet=True))


def kept(run: Run) -> dict[str, str]:
    """Of whom the weights are that lie in each directory."""
    return {path.parent.name: path.read_text() for path in run.directory.glob("*/weights")}


def test_each_search_finds_its_own_again(run: Run) -> None:
    for search in ("a", "b", "a"):
        heal(run, search)
    assert kept(run) == {"distill": "a", "healed": "a", "distill-b": "b", "healed-b": "b"}


def test_a_restart_forgets_this_search_alone(run: Run) -> None:
    for search in ("a", "b"):
        heal(run, search)
    save_json(run.path("architecture.json"), {"key": "a"})
    forget_healing(run, Reporter(quiet=True))
    assert kept(run) == {"distill-b": "b", "healed-b": "b"}
    heal(run, "a", "anew")
    set_aside(run, "b")
    assert kept(run) == {"distill": "b", "healed": "b", "distill-a": "aanew", "healed-a": "aanew"}


def test_what_was_set_aside_before_gives_way(run: Run) -> None:
    heal(run, "a")
    for name in ("distill-a", "healed-a"):
        save_text(run.path(name) / "weights", "old")
    set_aside(run, "b")
    assert kept(run) == {"distill-a": "a", "healed-a": "a"}


@pytest.mark.parametrize("after", ["a", "b", "c"])
@pytest.mark.parametrize("renames", range(4))
def test_killed_between_two_renames(run: Run, monkeypatch: pytest.MonkeyPatch, renames: int, after: str) -> None:
    """And then run for either of the two searches, or for a third."""
    for search in ("c", "b", "a"):
        heal(run, search)
    rename, left = Path.rename, [None] * renames

    def die(self: Path, target: Path) -> Path:
        if not left:
            raise KeyboardInterrupt
        left.pop()
        return rename(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", die)
        with pytest.raises(KeyboardInterrupt):
            set_aside(run, "b")
    set_aside(run, after)
    others = {f"{name}-{search}": search for name in ("distill", "healed") for search in {"a", "b", "c"} - {after}}
    assert kept(run) == {"distill": after, "healed": after, **others}


def test_what_a_run_has_healed_is_of_its_present_child(world: World, tmp_path: Path) -> None:
    run = world.copy("healed", tmp_path / "run")
    healed = contents(run / "healed")
    other = succeed("search", "--run", run, "--budget", "0.5", *BUDGET[2:])
    assert "healing of an earlier search is kept" in other.err and not (run / "healed").exists()
    assert find_child(run) == run / "child"
    succeed("search", "--run", run, *BUDGET)
    assert contents(run / "healed") == healed and find_child(run) == run / "healed"


def test_one_command_at_a_time_writes_what_others_would_write_too(world: World, tmp_path: Path) -> None:
    run = world.copy("searched", tmp_path / "run")
    with alone(run):
        for words in (("distill", "--run", run, *HEALING), world.score_words(run), ("fuse", "--run", run)):
            refused = nas(*words)
            assert refused.code != 0 and f"another nas command is at work in {run}" in refused.err
    succeed("distill", "--run", run, *HEALING)
