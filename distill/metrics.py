"""metrics.jsonl: one JSON object a line, `kind` "train" or "eval", each with its `step`."""

from __future__ import annotations

import json
import os
import resource
import sys
from pathlib import Path
from typing import Any

import torch

from blocks.errors import CheckpointError


class MetricsLog:
    """Appends to metrics.jsonl. A resumed run first drops what lies beyond the step it resumes from.

    Args:
        path: the file.
        keep_through: lines with a later step are dropped, and so is a line cut off by a crash; -1 drops all.
    """

    def __init__(self, path: Path, keep_through: int) -> None:
        self._path = path
        kept = [line for line in _lines(path) if _step(line) <= keep_through]
        rewritten = path.with_suffix(".jsonl.tmp")
        try:
            rewritten.write_text("".join(kept))
            os.replace(rewritten, path)
            self._file = path.open("a")
        except OSError as error:
            raise self._failure(error) from error

    def write(self, **values: Any) -> None:
        """Appends one line. Raises CheckpointError if the disk is full."""
        try:
            self._file.write(json.dumps(values) + "\n")
            self._file.flush()
        except OSError as error:
            raise self._failure(error) from error

    def close(self) -> None:
        self._file.close()

    def _failure(self, error: OSError) -> CheckpointError:
        return CheckpointError(f"cannot write {self._path}: {error.strerror or error}; free some space, then run again")


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
