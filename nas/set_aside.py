"""Healings of earlier searches in one run: kept under names of their own, so that what lies in healed/ is of the present child."""

from __future__ import annotations

from blocks.files import remove_directory
from nas.progress import Reporter
from nas.run import Run

HEALED_FOR = "distill/search.json"
"""Which search distill/ and healed/ are of."""


def set_aside_other_healing(run: Run, search: str, reporter: Reporter) -> None:
    """Keeps what was healed for another search than this one (its key) under its own name, and takes up again what is this one's.

    The note of whose it is lies in distill/, which leaves last and comes back first: killed on the way and called for any
    search, it goes on.
    """
    earlier = run.read(HEALED_FOR, "distill").get("search") if run.has(HEALED_FOR) else None
    if earlier not in (None, search):
        for name in ("healed", "distill"):
            _move(run, name, f"{name}-{earlier}")
        reporter.say(f"The healing of an earlier search is kept in {run.path(f'distill-{earlier}')}")
    for name in ("distill", "healed"):
        if not run.has(name):
            _move(run, f"{name}-{search}", name)


def forget_healing(run: Run, reporter: Reporter) -> None:
    """Removes what an earlier `nas distill` left of this search's child, for --restart; that of another search is set aside."""
    set_aside_other_healing(run, run.read("architecture.json", "search")["key"], reporter)
    for name in ("healed", "distill"):
        if run.has(name):
            remove_directory(run.path(name))
    run.path("results.json").unlink(missing_ok=True)


def _move(run: Run, name: str, new_name: str) -> None:
    """Renames a directory of the run, if it is there; what has the new name is removed."""
    if run.has(name):
        if run.has(new_name):
            remove_directory(run.path(new_name))
        run.path(name).rename(run.path(new_name))
