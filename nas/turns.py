"""Commands in one run directory at once: searches take turns where they would write the same files, the others refuse."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from blocks.errors import ConfigError
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


@contextmanager
def alone(run: Path) -> Iterator[None]:
    """Lets no other process within an `alone` of this directory; one that is killed lets go at once.

    The directory is made if it is not there. On a file system that knows no locks of directories, nobody is kept out. Raises
    ConfigError if another is there.
    """
    import fcntl

    run.mkdir(parents=True, exist_ok=True)
    handle = os.open(run, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(f"another nas command is at work in {run}; let it end, or use another --run") from None
        except OSError:
            pass
        yield
    finally:
        os.close(handle)
