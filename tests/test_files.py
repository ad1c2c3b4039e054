"""Files and directories are whole or absent, and what a killed process leaves is tidied."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch

from blocks.digest import sample_values
from blocks.errors import CheckpointError
from blocks.files import clear_leftovers, remove_directory, replace_directory, save_text, write_atomically


def directory(path: Path, content: str) -> Path:
    with replace_directory(path) as new:
        (new / "file").write_text(content)
    return path


def names(path: Path) -> list[str]:
    return sorted(entry.name for entry in path.iterdir())


def full_disk(path: Path) -> None:
    path.write_text("half")
    raise OSError(28, "No space left on device")


def test_a_full_disk_leaves_the_old_file(tmp_path: Path) -> None:
    save_text(tmp_path / "file", "old")
    with pytest.raises(CheckpointError, match=r"cannot write .*file: No space left on device; .*untouched"):
        write_atomically(tmp_path / "file", full_disk)
    assert names(tmp_path) == ["file"] and (tmp_path / "file").read_text() == "old"


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt(), RuntimeError("a bug")])
def test_a_failure_leaves_the_old_directory(tmp_path: Path, error: BaseException) -> None:
    path = directory(tmp_path / "child", "old")
    with (
        pytest.raises(CheckpointError if isinstance(error, OSError) else type(error)),
        replace_directory(path) as new,
    ):
        (new / "file").write_text("half")
        raise error
    assert names(tmp_path) == ["child"] and (path / "file").read_text() == "old"
    directory(path, "new")
    assert names(tmp_path) == ["child"] and (path / "file").read_text() == "new"
    remove_directory(path)
    assert names(tmp_path) == []


@pytest.mark.parametrize("tidy", [lambda path: clear_leftovers(path.parent), lambda path: directory(path, "old")])
def test_what_was_moved_aside_when_killed_comes_back(tmp_path: Path, tidy: object) -> None:
    path = directory(tmp_path / "child", "old")
    path.rename(tmp_path / ".child.old")
    (tmp_path / ".child.tmp").mkdir()
    tidy(path)  # type: ignore[operator]
    assert names(tmp_path) == ["child"] and (path / "file").read_text() == "old"


def test_leftover_files_go_and_others_stay(tmp_path: Path) -> None:
    for name in (f".file.{os.getpid()}.tmp", ".notes.old", "file"):
        (tmp_path / name).write_text("")
    clear_leftovers(tmp_path)
    assert names(tmp_path) == [".notes.old", "file"]


def test_samples_tell_values_and_shapes_apart_but_not_dtypes() -> None:
    values = np.arange(6000, dtype=np.uint16).reshape(60, 100)
    digest = sample_values(values)
    assert digest == sample_values(values.astype(np.uint32)) == sample_values(torch.from_numpy(values.astype(np.int64)))
    assert digest != sample_values(values.reshape(100, 60)) and digest != sample_values(values + 1)
    assert sample_values(torch.ones(3)) == sample_values(torch.ones(3, dtype=torch.bfloat16))
