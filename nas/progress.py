"""Progress with ETA on the terminal's error stream; standard output stays for results."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

Advance = Callable[[], None]


class Reporter:
    """Says what is going on: bars on a terminal, one line a task where there is none."""

    def __init__(self, quiet: bool = False) -> None:
        self.console = Console(stderr=True, quiet=quiet)

    def say(self, message: str) -> None:
        self.console.print(message, highlight=False, soft_wrap=True)

    @contextmanager
    def task(self, description: str, total: int) -> Iterator[Advance]:
        """A bar of `total` steps; call what is yielded after each."""
        with self.bar(description, total) as (progress, task):
            yield lambda: progress.advance(task)

    @contextmanager
    def tasks(self, totals: Mapping[str, int]) -> Iterator[Callable[[str], None]]:
        """Several bars at once; call what is yielded with a description after each of its steps."""
        with self._progress(", ".join(name for name, total in totals.items() if total)) as progress:
            bars = {name: progress.add_task(name, total=total, note="") for name, total in totals.items() if total}
            yield lambda name: progress.advance(bars[name])

    @contextmanager
    def bar(self, description: str, total: int, note: str = "") -> Iterator[tuple[Progress, TaskID]]:
        """The rich bar itself, for callers that set the note beside it."""
        with self._progress(description) as progress:
            yield progress, progress.add_task(description, total=total, note=note)

    @contextmanager
    def _progress(self, said: str) -> Iterator[Progress]:
        columns = (
            TextColumn("{task.description:<28}"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
        )
        if not self.console.is_terminal:
            self.say(f"{said} ...")
        disabled = not self.console.is_terminal or self.console.quiet
        with Progress(*columns, console=self.console, disable=disabled) as progress:
            yield progress
