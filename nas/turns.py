"""Workers that share a run directory take turns where they would write the same files."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from blocks.files import write_errors


@contextmanager
def turn(path: Path) -> Iterator[None]:
    """Waits until no other process is within a turn of the same file. A killed process ends its turn at once.

    Args:
        path: a file that exists; it is not changed. Raises CheckpointError if it cannot be opened for writing.
    """
    import fcntl

    with write_errors(path, "it must be writable, so that workers can take turns"):
        file = path.open("rb+")
    with file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
