"""The `nas` command, killed at a chosen instant; a script for tests/test_resume.py.

    python tests/killed_nas.py CASES.json

CASES.json lists [place, when, [words of the command ...]]. Each case runs in a process forked here, so that importing torch
is paid once, and sends SIGKILL to itself. Places are the name of a file, "before" or "after" it gets its name;
`rename`, before the `when`-th renaming while children are written; and `journal`, at the `when`-th line of the study's journal, half of
it written and its lock held. Prints the exit codes.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
from healing_run import fork, kill_at
from optuna.storages.journal import JournalFileBackend

import blocks.files
import nas.heal
import nas.score
import nas.search  # noqa: F401  (imported once, before forking)
from nas.__main__ import main as nas_main


def run_and_die(place: str, when: Any, words: list[str]) -> None:
    if place == "journal":
        die_in_journal(when)
    elif place == "rename":
        tick, rename = kill_at(when), Path.rename
        Path.rename = lambda self, target: (tick(), rename(self, target))[1]  # type: ignore[method-assign]
    else:
        die_at_file(place, when)
    sys.argv = ["nas", *words]
    nas_main()


def die_at_file(name: str, when: str) -> None:
    """Files are synced, get their name, and then their directory is synced."""
    sync, written = blocks.files.sync, False

    def sync_and_die(path: Path) -> None:
        nonlocal written
        sync(path)
        if written or (when == "before" and path.name.startswith(f".{name}.")):
            os.kill(os.getpid(), signal.SIGKILL)
        written = path.name.startswith(f".{name}.")

    blocks.files.sync = sync_and_die


def die_in_journal(count: int) -> None:
    """At the `count`-th line: with half of it written, the lock held."""
    lines = 0

    def append_logs(self: Any, logs: list[dict[str, Any]]) -> None:
        nonlocal lines
        lines += 1
        if lines == count:
            self._lock.acquire()
            text = json.dumps(logs[0])
            with open(self._file_path, "a") as file:
                file.write(text[: len(text) // 2])
            os.kill(os.getpid(), signal.SIGKILL)
        append(self, logs)

    append = JournalFileBackend.append_logs
    JournalFileBackend.append_logs = append_logs  # type: ignore[method-assign]


def main() -> None:
    torch.set_num_threads(1)
    codes = []
    for place, when, words in json.loads(Path(sys.argv[1]).read_text()):
        codes.append(os.waitstatus_to_exitcode(os.waitpid(fork(run_and_die, place, when, words), 0)[1]))
    print(json.dumps(codes))


if __name__ == "__main__":
    main()
