"""Files that are either whole or absent: write to a temporary name, flush, rename."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from blocks.errors import NasError


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Calls `write(temporary)` and renames the result to `path`. Raises NasError in one line if the disk refuses."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        raise NasError(f"cannot write {path}: {error.strerror or error}; free some space and run the same command again") from error
    finally:
        temporary.unlink(missing_ok=True)


def save_json(path: Path, content: Any) -> None:
    write_atomically(path, lambda temporary: temporary.write_text(json.dumps(content, indent=1) + "\n"))


def save_text(path: Path, content: str) -> None:
    write_atomically(path, lambda temporary: temporary.write_text(content))


def save_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Saves a safetensors file. A full disk shows as SafetensorError or OSError; both become one line."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    contiguous = {name: tensor.contiguous().cpu() for name, tensor in tensors.items()}

    def write(temporary: Path) -> None:
        try:
            save_file(contiguous, temporary)
        except SafetensorError as error:
            raise OSError(str(error)) from error

    write_atomically(path, write)
