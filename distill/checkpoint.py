"""Checkpoints that survive a crash at any instant, and the best student.

    checkpoints/step-000123/   student.safetensors  optimizer.pt  rng.pt  state.json
    best/student.safetensors   the student of the lowest held-out KL; step and statistics in its metadata

Written as `blocks.files` does it: a directory with the final name is complete. One process writes (rank 0); the
student is a full state dict whatever the sharding.
"""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from blocks.errors import CheckpointError
from blocks.files import clear_leftovers, remove_directory, replace_directory, save_tensors, write_tensors


@dataclass
class Snapshot:
    """Everything a run needs to go on from `step`."""

    step: int
    student: dict[str, Tensor]
    optimizers: dict[str, Any]
    """The state of each, by name."""
    rng: dict[str, Any]
    record: dict[str, Any]
    """JSON: what the run was made from, and what it has measured so far."""


class CheckpointStore:
    """The checkpoints of one run.

    Args:
        directory: where they lie, one directory each.
        keep_last: how many are kept.
    """

    def __init__(self, directory: Path, keep_last: int) -> None:
        self._directory = directory
        self._keep_last = keep_last

    def path(self, step: int) -> Path:
        return self._directory / f"step-{step:06d}"

    def write(self, snapshot: Snapshot) -> Path:
        """Writes a checkpoint and removes the oldest beyond `keep_last`. Raises CheckpointError if it cannot."""
        path, state = self.path(snapshot.step), {"step": snapshot.step} | snapshot.record
        with replace_directory(path) as new:
            write_tensors(new / "student.safetensors", snapshot.student)
            _write_torch(new / "optimizer.pt", snapshot.optimizers)
            _write_torch(new / "rng.pt", snapshot.rng)
            (new / "state.json").write_text(json.dumps(state, indent=1))
        for step in self._steps()[: -self._keep_last]:
            remove_directory(self.path(step))
        return path

    def newest(self) -> Snapshot | None:
        """The newest checkpoint, on the CPU, or None. Raises CheckpointError if it is damaged."""
        steps = self._steps()
        if not steps:
            return None
        path = self.path(steps[-1])
        try:
            record = json.loads((path / "state.json").read_text())
            student = load_file(path / "student.safetensors")
            optimizers, rng = (
                torch.load(path / name, map_location="cpu", weights_only=True) for name in ("optimizer.pt", "rng.pt")
            )
            return Snapshot(record.pop("step"), student, optimizers, rng, record)
        except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
            raise CheckpointError(
                f"checkpoint {path} is damaged ({error}); remove it to go on from the one before"
            ) from error

    def clean(self) -> None:
        """Removes what a crash left half written."""
        clear_leftovers(self._directory)

    def clear(self) -> None:
        """Removes every checkpoint."""
        shutil.rmtree(self._directory, ignore_errors=True)

    def _steps(self) -> list[int]:
        found = (re.fullmatch(r"step-(\d{6,})", path.name) for path in self._directory.glob("step-*"))
        return sorted(int(match[1]) for match in found if match)


def _write_torch(path: Path, content: dict[str, Any]) -> None:
    try:
        torch.save(content, path)
    except RuntimeError as error:  # how it reports a full disk
        raise OSError(str(error)) from error


def write_best(path: Path, student: dict[str, Tensor], step: int, stats: dict[str, float]) -> None:
    """Replaces the best student by a new one, in one atomic rename; `step` and `stats` ride in its metadata."""
    save_tensors(path, student, {"step": str(step), "stats": json.dumps(stats)})


def read_best(path: Path) -> tuple[int, dict[str, float]]:
    """Step and statistics of the best student. Raises CheckpointError if the file is missing or damaged."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata()
        return int(metadata["step"]), json.loads(metadata["stats"])
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}); use --restart to begin anew") from error


def student_state(state: dict[str, Tensor], student: nn.Module) -> dict[str, Tensor]:
    """`state` of `student` as safetensors wants it: on the CPU, contiguous, a tied tensor under one name only."""
    aliases = _tied_aliases(student)
    return {name: tensor.detach().cpu().contiguous() for name, tensor in state.items() if name not in aliases}


def load_student(student: nn.Module, tensors: dict[str, Tensor], where: Path) -> None:
    """Loads tensors into the student, exactly. Raises CheckpointError for missing or extra ones, or other shapes."""
    try:
        missing, extra = student.load_state_dict(tensors, strict=False)
    except RuntimeError as error:
        raise CheckpointError(f"{where} does not fit the child: {error}") from error
    wrong = sorted((set(missing) - _tied_aliases(student)) | set(extra))
    if wrong:
        raise CheckpointError(
            f"{where} does not fit the child: {len(wrong)} tensors missing or extra, first {wrong[0]}"
        )


def load_best(student: nn.Module, path: Path) -> None:
    """Loads the best student's weights into `student`."""
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}); use --restart to begin anew") from error
    load_student(student, tensors, path)


def _tied_aliases(student: nn.Module) -> set[str]:
    """Names in the state dict that are second names of a parameter (a head tied to the embedding)."""
    every = {name for name, _ in student.named_parameters(remove_duplicate=False)}
    return every - {name for name, _ in student.named_parameters()}
