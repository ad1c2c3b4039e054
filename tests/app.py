"""The `nas` command in this process, on a tiny parent and text, and a disk that is full; for the tests of the application."""

from __future__ import annotations

import json
import random
import resource
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any
from unittest.mock import patch

from nas.__main__ import main

SMALL = ("--sequence-length", "32", "--fit-tokens", "1024", "--calibration-tokens", "512")
SMALL += ("--heldout-tokens", "512", "--exact-tokens", "256")
BUDGET = ("--budget", "0.6", "--batch", "1", "--context", "128")
HEALING = ("--tokens", "512", "--batch-sequences", "4", "--sequence-length", "32")


@dataclass(frozen=True)
class Result:
    """What a command left: its exit code and both streams."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> dict[str, Any]:
        """Standard output, which must be one JSON object and nothing else."""
        content: dict[str, Any] = json.loads(self.out)
        return content


def nas(*arguments: object) -> Result:
    """Runs the command as a shell would, but here. An error that is not meant for users passes through."""
    out, err = StringIO(), StringIO()
    with patch.object(sys, "argv", ["nas", *map(str, arguments)]), redirect_stdout(out), redirect_stderr(err):
        try:
            main()
            code = 0
        except SystemExit as stop:
            code = int(stop.code or 0)
    return Result(code, out.getvalue(), err.getvalue())


def succeed(*arguments: object) -> Result:
    result = nas(*arguments)
    assert result.code == 0, result.err
    return result


@dataclass(frozen=True)
class World:
    """A tiny parent, its text, and runs that are done up to a stage. Tests work on copies of the runs."""

    parent: Path
    text: Path
    runs: Path

    def score_words(self, run: Path) -> tuple[object, ...]:
        return ("score", "--parent", self.parent, "--data", self.text, "--run", run, *SMALL)

    def copy(self, stage: str, path: Path) -> Path:
        """A copy of the run done up to "scored", "searched" or "healed"."""
        return Path(shutil.copytree(self.runs / stage, path))


def build_world(directory: Path, parent: Path) -> World:
    """Runs the whole path once, keeping the run as it is after each stage."""
    world = World(parent, write_text(directory / "text.jsonl"), directory)
    succeed(*world.score_words(directory / "scored"))
    succeed("search", "--run", world.copy("scored", directory / "searched"), *BUDGET)
    succeed("distill", "--run", world.copy("searched", directory / "healed"), *HEALING)
    return world


def write_text(path: Path, documents: int = 300, seed: int = 0) -> Path:
    """Documents of 8 to 20 random words, as .jsonl."""
    rng = random.Random(seed)
    words = ["".join(rng.choices("abcdefghij", k=rng.randint(2, 7))) for _ in range(200)]
    texts = [" ".join(rng.choices(words, k=rng.randint(8, 20))) for _ in range(documents)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def stamps(directory: Path) -> dict[str, int]:
    """When each file below a directory was last written, in ns."""
    files = (path for path in directory.rglob("*") if path.is_file())
    return {str(path.relative_to(directory)): path.stat().st_mtime_ns for path in files}


def contents(directory: Path) -> dict[str, bytes]:
    files = (path for path in directory.rglob("*") if path.is_file())
    return {str(path.relative_to(directory)): path.read_bytes() for path in files}


@contextmanager
def full_disk(most_bytes: int) -> Iterator[None]:
    """No file can grow beyond `most_bytes`: writing more fails as on a full disk (EFBIG in place of ENOSPC)."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
