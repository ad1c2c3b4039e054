"""metrics.jsonl: one JSON object a line, `kind` "train" or "eval", each with its `step`."""

from __future__ import annotations

import json
import resource
import sys
from pathlib import Path
from typing import Any

import torch

from blocks.files import save_text, write_errors


class MetricsLog:
    """Appends to metrics.jsonl. A resumed run first drops what lies beyond the step it resumes from.

    Args:
        path: the file.
        keep_through: lines with a later step are dropped, and so is a line cut off by a crash; -1 drops all.
    """

    def __init__(self, path: Path, keep_through: int) -> None:
        self._path = path
        kept = [line for line in _lines(path) if _step(line) <= keep_through]
        save_text(path, "".join(kept))
        with write_errors(path):
            self._file = path.open("a")

    def write(self, **values: Any) -> None:
        """Appends one line. Raises CheckpointError if the disk is full."""
        with write_errors(self._path):
            self._file.write(json.dumps(values) + "\n")
            self._file.flush()

    def close(self) -> None:
        self._file.close()


def _lines(path: Path) -> list[str]:
    return path.read_text().splitlines(keepends=True) if path.exists() else []


def _step(line: str) -> float:
    """The step of a line; infinity for a line that a crash cut off."""
    try:
        return int(json.loads(line)["step"]) if line.endswith("\n") else float("inf")
    except (ValueError, KeyError, TypeError):
        return float("inf")


def peak_memory(device: torch.device) -> int:
    """Peak memory in bytes: allocated on the GPU, resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return resident if sys.platform == "darwin" else resident * 1024
