"""Several `nas search` at once, some of them killed; a script for tests/test_workers.py.

    python tests/search_workers.py CASES.json

CASES.json lists [workers, killed, [words of the command ...]]. The workers of a case are processes forked here, so that
importing torch is paid once; `killed` is null or [place, count]: the first worker sends SIGKILL to itself when it measures a batch of
text ("kl") or takes a step of healing ("heal") for the count-th time. Prints the exit codes.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
import transformers.models.auto.modeling_auto  # noqa: F401  (imported once, before forking)
from healing_run import fork, kill_at

import blocks.child.modeling_decilm  # noqa: F401
import nas.finalists
import nas.knapsack
import nas.search
from nas.__main__ import main as nas_main
from nas.assemble import Assembler


def run(words: list[str], killed: tuple[str, int] | None) -> None:
    if killed is not None:
        die_at(*killed)
    sys.argv = ["nas", *words]
    sys.stdout = Path(os.devnull).open("w")  # noqa: SIM115 (until the process ends)
    try:
        nas_main()
    except SystemExit as stop:
        if stop.code:
            raise


def die_at(place: str, count: int) -> None:
    tick = kill_at(count)
    if place == "kl":
        true_kl = Assembler.true_kl
        Assembler.true_kl = lambda *arguments: (tick(), true_kl(*arguments))[1]  # type: ignore[method-assign]
        return
    heal = nas.finalists.heal

    def heal_and_die(*arguments: Any, on_step: Any, **options: Any) -> Any:
        return heal(*arguments, on_step=lambda progress: (tick(), on_step(progress)), **options)

    nas.finalists.heal = heal_and_die


def main() -> None:
    torch.set_num_threads(1)
    codes = []
    for workers, killed, words in json.loads(Path(sys.argv[1]).read_text()):
        started = [fork(run, words, None if number else killed) for number in range(workers)]
        ended = {}
        for _ in started:  # whichever ends: a killed one must not stay a zombie
            process, status = os.wait()
            ended[process] = os.waitstatus_to_exitcode(status)
        codes.append([ended[process] for process in started])
    print(json.dumps(codes))


if __name__ == "__main__":
    main()
