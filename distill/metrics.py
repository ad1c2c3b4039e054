"""metrics.jsonl: one JSON object a line, `kind` "train" or "eval", each with its `step`, and its `stage` if there are several."""

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
        stage: the stage whose lines these are; those of other stages stay.
    """

    def __init__(self, path: Path, keep_through: int, stage: str | None = None) -> None:
        self._path = path
        self._stage = {} if stage is None else {"stage": stage}
        kept = [line for line in _lines(path) if _is_kept(line, keep_through, stage)]
        save_text(path, "".join(kept))
        with write_errors(path):
            self._file = path.open("a")

    def write(self, **values: Any) -> None:
        """Appends one line. Raises CheckpointError if the disk is full."""
        with write_errors(self._path):
            self._file.write(json.dumps(self._stage | values) + "\n")
            self._file.flush()

    def close(self) -> None:
        self._file.close()


def _lines(path: Path) -> list[str]:
    return path.read_text().splitlines(keepends=True) if path.exists() else []


def _is_kept(line: str, keep_through: int, stage: str | None) -> bool:
    """Whether a line is whole, and of another stage or no later step."""
    try:
        if not line.endswith("\n"):
            return False
        values = json.loads(line)
        return bool(values.get("stage") != stage or values["step"] <= keep_through)
    except (ValueError, KeyError, TypeError, AttributeError):
        return False


def peak_memory(device: torch.device) -> int:
    """Peak memory in bytes: allocated on the GPU, resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return resident if sys.platform == "darwin" else resident * 1024
