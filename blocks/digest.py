"""Sampled digests of files and arrays: fast however large, independent of path and time stamps, and different for
different content."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor

_PIECES = 64
_PIECE_BYTES = 4096
_VALUES = 1024


def sample_file(path: Path, head_bytes: int = _PIECE_BYTES) -> bytes:
    """sha256 of a file's size, its first `head_bytes`, and 64 or more evenly spaced pieces of 4 KiB.

    Any file up to 256 KiB is read whole. Raises OSError.
    """
    size = path.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with path.open("rb") as file:
        digest.update(file.read(head_bytes))
        for position in range(0, size, max(_PIECE_BYTES, size // _PIECES)):
            file.seek(position)
            digest.update(file.read(_PIECE_BYTES))
    return digest.digest()


def sample_values(values: Tensor | np.ndarray) -> bytes:
    """sha256 of the shape and of 1,024 or more evenly spaced values, whatever their dtype and device."""
    flat = values.reshape(-1)
    taken = flat[:: max(1, flat.shape[0] // _VALUES)]
    if not isinstance(taken, np.ndarray):
        taken = taken.detach().float().cpu().numpy()
    # float64 holds every token id and every fp32 value exactly
    return hashlib.sha256(f"{tuple(values.shape)} ".encode() + taken.astype(np.float64).tobytes()).digest()
