"""Checkpoints that survive a crash at any instant, and the best student.

    checkpoints/step-000123/   the student's parameters and the optimizers' states, in PyTorch's distributed form
                               (torch.distributed.checkpoint: each rank writes its shard); rng.pt  state.json
    best/student.safetensors   the student of the lowest held-out KL, whole; step and statistics in its metadata

Written as `blocks.files` does it: a directory with the final name is complete. A checkpoint of any number of ranks, sharded or
not, can be gone on with by any other number.
"""

from __future__ import annotations

import json
import re
import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from blocks.errors import CheckpointError
from blocks.files import clear_leftovers, remove_directory, replace_directory, save_tensors, temporary_directory
from blocks.ranks import Ranks
from distill.parallel import Parallel

Optimizers = Mapping[str, torch.optim.Optimizer]


class CheckpointStore:
    """The checkpoints of one run. What writes or reads tensors is called on all ranks at once.

    Args:
        directory: where they lie, one directory each.
        keep_last: how many are kept.
        ranks: who writes.
    """

    def __init__(self, directory: Path, keep_last: int, ranks: Ranks) -> None:
        self._directory = directory
        self._keep_last = keep_last
        self._ranks = ranks

    def path(self, step: int) -> Path:
        return self._directory / f"step-{step:06d}"

    def write(
        self, step: int, student: nn.Module, optimizers: Optimizers, rng: dict[str, Any], record: dict[str, Any]
    ) -> Path:
        """Writes a checkpoint and removes the oldest beyond `keep_last`. Raises CheckpointError if it cannot.

        Args:
            rng: states of random generators, rank 0's.
            record: JSON: what the run was made from, and what it has measured so far; rank 0's.
        """
        path = self.path(step)
        with self._whole_or_absent(path) as new:
            _save(_tensors(student, optimizers), new, alone=self._ranks.count == 1)
            if self._ranks.main:
                torch.save(rng, new / "rng.pt")
                (new / "state.json").write_text(json.dumps({"step": step} | record, indent=1))
        if self._ranks.main:
            for old in self._steps()[: -self._keep_last]:
                remove_directory(self.path(old))
        return path

    @contextmanager
    def _whole_or_absent(self, path: Path) -> Iterator[Path]:
        """The directory that all ranks write in; rank 0 makes it and gives it its name."""
        if not self._ranks.main:
            self._ranks.wait()
            yield temporary_directory(path)
            self._ranks.wait()
            return
        with replace_directory(path) as new:
            self._ranks.wait()
            yield new
            self._ranks.wait()

    def newest(self) -> tuple[Path, dict[str, Any]] | None:
        """Where the newest checkpoint lies, and its record with its `step`; None if there is none."""
        steps = self._steps()
        if not steps:
            return None
        path = self.path(steps[-1])
        with _damage(path):
            return path, json.loads((path / "state.json").read_text())

    def read(self, path: Path, student: nn.Module, optimizers: Optimizers) -> dict[str, Any]:
        """Loads a checkpoint into the student and its optimizers, in place; returns the states of random generators.

        Raises CheckpointError if it is damaged, or of another child.
        """
        with _damage(path):
            stored = dcp.FileSystemReader(path).read_metadata().state_dict_metadata
            wanted = _tensors(student, optimizers)
            for name, parameter, optimizer in _places(student, optimizers):
                prefix = f"{optimizer}."
                for key, meta in stored.items():
                    if key.startswith(prefix) and key.endswith(f".{name}") and isinstance(meta, TensorStorageMetadata):
                        state = key[len(prefix) : -len(name) - 1]
                        wanted[key] = _room(meta, parameter)
                        optimizers[optimizer].state[parameter][state] = wanted[key]
            if stored.keys() != wanted.keys():
                differing = sorted(stored.keys() ^ wanted.keys())
                raise CheckpointError(
                    f"{path} does not fit the child: {len(differing)} tensors missing or extra, first {differing[0]}"
                )
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "torch.distributed is disabled")
                dcp.load(wanted, checkpoint_id=path, no_dist=self._ranks.count == 1)
            rng: dict[str, Any] = torch.load(path / "rng.pt", map_location="cpu", weights_only=True)
            return rng

    def clean(self) -> None:
        """Removes what a crash left half written."""
        clear_leftovers(self._directory)

    def clear(self) -> None:
        """Removes every checkpoint."""
        shutil.rmtree(self._directory, ignore_errors=True)

    def _steps(self) -> list[int]:
        found = (re.fullmatch(r"step-(\d{6,})", path.name) for path in self._directory.glob("step-*"))
        return sorted(int(match[1]) for match in found if match)


def _places(student: nn.Module, optimizers: Optimizers) -> Iterator[tuple[str, nn.Parameter, str]]:
    """(name, parameter, name of its optimizer) of every parameter that learns; a tied one once."""
    owner = {
        id(parameter): name
        for name, optimizer in optimizers.items()
        for group in optimizer.param_groups
        for parameter in group["params"]
    }
    for name, parameter in student.named_parameters():
        if id(parameter) in owner:
            yield name, parameter, owner[id(parameter)]


def _tensors(student: nn.Module, optimizers: Optimizers) -> dict[str, Tensor]:
    """What a checkpoint holds: "student.NAME", and "OPTIMIZER.STATE.NAME" for the states that there are."""
    tensors = {f"student.{name}": parameter.detach() for name, parameter in student.named_parameters()}
    for name, parameter, optimizer in _places(student, optimizers):
        states = optimizers[optimizer].state.get(parameter, {})
        tensors |= {f"{optimizer}.{state}.{name}": value for state, value in states.items()}
    return tensors


def _room(meta: TensorStorageMetadata, parameter: Tensor) -> Tensor:
    """A tensor for an optimizer's state: spread over the ranks as its parameter is, or a number of its own."""
    if meta.size == parameter.shape:
        return torch.zeros_like(parameter, dtype=meta.properties.dtype)
    return torch.zeros(meta.size, dtype=meta.properties.dtype, device=parameter.device)


def _save(tensors: dict[str, Tensor], directory: Path, alone: bool) -> None:
    """Raises OSError if the disk refuses, on all ranks."""
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled")  # one process: nothing is shared
            dcp.save(tensors, checkpoint_id=directory, no_dist=alone)
    except CheckpointException as failure:
        raise OSError(str(next(iter(failure.failures.values()))[0])) from failure
    except RuntimeError as error:  # how torch.save reports a full disk
        raise OSError(str(error)) from error


@contextmanager
def _damage(path: Path) -> Iterator[None]:
    """Turns what reading a damaged checkpoint raises into one line."""
    try:
        yield
    except (OSError, ValueError, KeyError, RuntimeError, EOFError, CheckpointException) as error:
        reason: BaseException = error
        if isinstance(error, CheckpointException):
            reason = next(iter(error.failures.values()))[0]
        raise CheckpointError(
            f"checkpoint {path} is damaged ({reason}); remove it to go on from the one before"
        ) from error


def write_best(path: Path, student: nn.Module, parallel: Parallel, step: int, stats: dict[str, float]) -> None:
    """Replaces the best student by a new one, in one atomic rename; `step` and `stats` ride in its metadata."""
    whole = {name: parallel.whole(parameter) for name, parameter in student.named_parameters()}
    if parallel.ranks.main:
        tensors = {name: tensor for name, tensor in whole.items() if tensor is not None}
        save_tensors(path, tensors, {"step": str(step), "stats": json.dumps(stats)})


def read_best(path: Path) -> tuple[int, dict[str, float]]:
    """Step and statistics of the best student. Raises CheckpointError if the file is missing or damaged."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata()
        return int(metadata["step"]), json.loads(metadata["stats"])
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}); use --restart to begin anew") from error


def load_best(path: Path, student: nn.Module, parallel: Parallel) -> None:
    """Loads the best student's weights into `student`, wherever its parameters lie. All ranks must call it."""
    tensors = _read_weights(path, student) if parallel.ranks.main else {}
    for name, parameter in student.named_parameters():
        parallel.fill(parameter, tensors.get(name))


@torch.no_grad()
def load_weights(path: Path, student: nn.Module) -> None:
    """Loads the best student's weights into `student`, which lies whole in this process."""
    tensors = _read_weights(path, student)
    for name, parameter in student.named_parameters():
        parameter.copy_(tensors[name])


def _read_weights(path: Path, student: nn.Module) -> dict[str, Tensor]:
    """The tensors of the best student. Raises CheckpointError if they cannot be read or are not those of `student`."""
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}); use --restart to begin anew") from error
    wanted = {name: parameter.shape for name, parameter in student.named_parameters()}
    found = {name: tensor.shape for name, tensor in tensors.items()}
    if wrong := sorted(name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name)):
        raise CheckpointError(
            f"{path} does not fit the child: {len(wrong)} tensors missing, extra or of another shape, first {wrong[0]}"
        )
    return tensors
