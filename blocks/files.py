"""Files and directories that are either whole or absent, whatever happens: write beside, sync to disk, rename.

    write_atomically(path, write)       one file, by any function that writes one
    save_json, save_text, save_array, save_tensors
    replace_directory(path)             a whole directory

Beside `path` lie `.NAME.PID.tmp` (a file being written), `.NAME.tmp` (a directory being written or removed) and `.NAME.old`
(a directory that the new one is about to replace), each gone afterwards. Only a killed process leaves them;
`clear_leftovers` tidies. Concurrent writers of one file are safe, of one directory not.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from blocks.errors import CheckpointError

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

REMEDY = "what was there is untouched. Free some space, then run the same command again"


@contextmanager
def write_errors(path: Path, remedy: str = REMEDY) -> Iterator[None]:
    """Turns a disk that refuses (full, read-only) into one line, a CheckpointError."""
    try:
        yield
    except OSError as error:
        raise CheckpointError(f"cannot write {path}: {error.strerror or error}; {remedy}") from error


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Calls `write(temporary)` and renames the result to `path`. Raises CheckpointError in one line if it cannot."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with write_errors(path):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write(temporary)
            sync(temporary)
            temporary.replace(path)
            sync(path.parent)
        finally:
            temporary.unlink(missing_ok=True)


def save_json(path: Path, content: Any) -> None:
    save_text(path, json.dumps(content, indent=1) + "\n")


def save_text(path: Path, content: str) -> None:
    write_atomically(path, lambda temporary: temporary.write_text(content, encoding="utf-8"))


def save_array(path: Path, array: np.ndarray) -> None:
    """Saves a .npy file."""
    import numpy as np

    def write(temporary: Path) -> None:
        with temporary.open("wb") as file:  # given a name, numpy would append .npy to it
            np.save(file, array)

    write_atomically(path, write)


def save_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Saves a safetensors file, `metadata` in its header."""
    write_atomically(path, lambda temporary: write_tensors(temporary, tensors, metadata))


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Writes a safetensors file in place, for use within `replace_directory`. Raises OSError alone if it cannot."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    contiguous = {name: tensor.detach().contiguous().cpu() for name, tensor in tensors.items()}
    try:
        save_file(contiguous, path, metadata={"format": "pt", **(metadata or {})})
    except SafetensorError as error:  # how it reports a full disk
        raise OSError(str(error)) from error


@contextmanager
def replace_directory(path: Path, remedy: str = REMEDY) -> Iterator[Path]:
    """Gives an empty directory that takes the place of `path` at the end, and vanishes if anything fails.

    Raises:
        CheckpointError: in one line, if an OSError passes.
    """
    new, old = temporary_directory(path), _old(path)
    with write_errors(path, remedy):
        _settle(path)
        try:
            new.mkdir(parents=True)
            yield new
            for written in (*new.rglob("*"), new):
                sync(written)
            if path.exists():
                path.rename(old)
            new.rename(path)
            sync(path.parent)
        finally:
            _settle(path)


def remove_directory(path: Path) -> None:
    """Renames first: a removal cut off half-way must not leave a directory that looks whole."""
    _settle(path)
    with write_errors(path):
        shutil.rmtree(path.rename(temporary_directory(path)), ignore_errors=True)


def clear_leftovers(directory: Path) -> None:
    """Removes from `directory` what killed processes left half written, and puts back what one had moved aside."""
    for leftover in [*directory.glob(".*.tmp"), *directory.glob(".*.old")]:
        if leftover.is_dir():
            _settle(leftover.with_name(leftover.name[1:].rpartition(".")[0]))
        elif leftover.suffix == ".tmp":
            leftover.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Forces a file or directory to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def temporary_directory(path: Path) -> Path:
    return path.with_name(f".{path.name}.tmp")


def _old(path: Path) -> Path:
    return path.with_name(f".{path.name}.old")


def _settle(path: Path) -> None:
    """Leaves at `path` the new directory if it got there, else the old one, and nothing beside it."""
    shutil.rmtree(temporary_directory(path), ignore_errors=True)
    if _old(path).exists() and not path.exists():
        _old(path).rename(path)
    shutil.rmtree(_old(path), ignore_errors=True)
