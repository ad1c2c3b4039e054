"""Checkpoints that survive a crash at any instant, and the best student.

    checkpoints/step-000123/   student.safetensors  optimizer.pt  rng.pt  state.json
    best/student.safetensors   the student of the lowest held-out KL; step and statistics in its metadata

A checkpoint is written under another name, synced to disk and renamed, so a directory with the final name is
complete. One process writes (rank 0); the student is a full state dict whatever the sharding.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from blocks.errors import CheckpointError

_PARTIAL = ".partial-"


@dataclass
class Snapshot:
    """Everything a run needs to go on from `step`."""

    step: int
    student: dict[str, Tensor]
    optimizer: dict[str, Any]
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
        final, partial = self.path(snapshot.step), self._directory / f"{_PARTIAL}{snapshot.step:06d}"
        state = {"step": snapshot.step} | snapshot.record
        files: dict[str, Callable[[Path], Any]] = {
            "student.safetensors": lambda path: save_file(snapshot.student, path),
            "optimizer.pt": lambda path: torch.save(snapshot.optimizer, path),
            "rng.pt": lambda path: torch.save(snapshot.rng, path),
            "state.json": lambda path: path.write_text(json.dumps(state, indent=1)),
        }
        with _disk_errors(final, "older checkpoints are untouched", partial):
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            for name, write in files.items():
                write(partial / name)
                sync(partial / name)
            sync(partial)
            shutil.rmtree(final, ignore_errors=True)
            partial.rename(final)
            sync(self._directory)
        for step in self._steps()[: -self._keep_last]:
            self._remove(self.path(step))
        return final

    def newest(self) -> Snapshot | None:
        """The newest checkpoint, on the CPU, or None. Raises CheckpointError if it is damaged."""
        steps = self._steps()
        if not steps:
            return None
        path = self.path(steps[-1])
        try:
            record = json.loads((path / "state.json").read_text())
            student = load_file(path / "student.safetensors")
            optimizer, rng = (
                torch.load(path / name, map_location="cpu", weights_only=True) for name in ("optimizer.pt", "rng.pt")
            )
            return Snapshot(record.pop("step"), student, optimizer, rng, record)
        except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
            raise CheckpointError(
                f"checkpoint {path} is damaged ({error}); remove it to go on from the one before"
            ) from error

    def clean(self) -> None:
        """Removes what a crash left half written."""
        for path in self._directory.glob(f"{_PARTIAL}*"):
            shutil.rmtree(path, ignore_errors=True)

    def clear(self) -> None:
        """Removes every checkpoint."""
        shutil.rmtree(self._directory, ignore_errors=True)

    def _steps(self) -> list[int]:
        found = (re.fullmatch(r"step-(\d{6,})", path.name) for path in self._directory.glob("step-*"))
        return sorted(int(match[1]) for match in found if match)

    def _remove(self, path: Path) -> None:
        """Renames first: a removal cut off half-way must not leave a directory that looks complete."""
        doomed = path.with_name(f"{_PARTIAL}{path.name}")
        path.rename(doomed)
        shutil.rmtree(doomed, ignore_errors=True)


def write_best(path: Path, student: dict[str, Tensor], step: int, stats: dict[str, float]) -> None:
    """Replaces the best student by a new one, in one atomic rename; `step` and `stats` ride in its metadata."""
    partial = path.with_suffix(".partial")
    with _disk_errors(path, "the one before is untouched", partial):
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(student, partial, metadata={"step": str(step), "stats": json.dumps(stats)})
        sync(partial)
        os.replace(partial, path)
        sync(path.parent)


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


def sync(path: Path) -> None:
    """Forces a file or directory to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _tied_aliases(student: nn.Module) -> set[str]:
    """Names in the state dict that are second names of a parameter (a head tied to the embedding)."""
    every = {name for name, _ in student.named_parameters(remove_duplicate=False)}
    return every - {name for name, _ in student.named_parameters()}


@contextmanager
def _disk_errors(target: Path, reassurance: str, partial: Path) -> Iterator[None]:
    """Turns a failed write (disk full, no permission) into one line, and removes what was half written."""
    try:
        yield
    # torch and safetensors report a full disk as errors of their own
    except (OSError, RuntimeError, SafetensorError) as error:
        if partial.is_dir():
            shutil.rmtree(partial, ignore_errors=True)
        else:
            partial.unlink(missing_ok=True)
        raise CheckpointError(
            f"cannot write {target}: {error}; {reassurance}. Free some space, then run again to resume"
        ) from error
