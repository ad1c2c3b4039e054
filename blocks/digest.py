"""Sampled digests of large files: fast, independent of path and time stamps, and different for different models."""

from __future__ import annotations

import hashlib
from pathlib import Path

_SAMPLES = 64
_SAMPLE_BYTES = 4096


def sample_file(path: Path, head_bytes: int = _SAMPLE_BYTES) -> bytes:
    """sha256 of a file's size, its first `head_bytes`, and 64 evenly spaced pieces of 4 KiB.

    Any file up to 256 KiB is read whole. Raises OSError.
    """
    size = path.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with path.open("rb") as file:
        digest.update(file.read(head_bytes))
        for position in range(0, size, max(_SAMPLE_BYTES, size // _SAMPLES)):
            file.seek(position)
            digest.update(file.read(_SAMPLE_BYTES))
    return digest.digest()
