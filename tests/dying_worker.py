"""Workers of one ledger that are killed; a script for tests/test_study.py.

    python tests/dying_worker.py CASES.json

CASES.json lists [journal, study, when, half, taken]. Each case is a process forked here that takes `taken` trials in turn, recording
all but the last, and sends SIGKILL to itself at its `when`-th line in the journal: after it, or with half of it written
and the lock held; with 0, once it has the last trial. Prints the exit codes.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import sys
from pathlib import Path
from typing import Any

from optuna.storages.journal import JournalFileBackend

from blocks.spec import LayerSpec
from nas.study import Ledger

SPECS = [[LayerSpec.parse(f"kv{heads}+ffn:{width}") for heads in (1, 2) for width in (256, 512)]] * 2


def work_and_die(journal: str, study: str, when: int, half: bool, taken: int) -> None:
    ledger, lines = Ledger(Path(journal), study, SPECS), 0
    append = JournalFileBackend.append_logs

    def append_and_die(self: Any, logs: list[dict[str, Any]]) -> None:
        nonlocal lines
        lines += 1
        if lines != when:
            return append(self, logs)
        if half:
            self._lock.acquire()
            text = json.dumps(logs[0])
            with open(self._file_path, "a") as file:
                file.write(text[: len(text) // 2])
        else:
            append(self, logs)
        os.kill(os.getpid(), signal.SIGKILL)

    JournalFileBackend.append_logs = append_and_die  # type: ignore[method-assign]
    for number in range(taken):
        trial = ledger.take(None)
        assert trial is not None
        if number < taken - 1:
            ledger.record(trial, 0.5, {"memory": -0.1}, total_bytes=10)
    os.kill(os.getpid(), signal.SIGKILL)


def main() -> None:
    cases = json.loads(Path(sys.argv[1]).read_text())
    fork, codes = multiprocessing.get_context("fork"), []
    for case in cases:
        process = fork.Process(target=work_and_die, args=case)
        process.start()
        process.join()
        codes.append(process.exitcode)
    print(json.dumps(codes))


if __name__ == "__main__":
    main()
