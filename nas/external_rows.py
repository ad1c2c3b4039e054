"""Rows of a score table file (docs/tables.md): CSV, JSON, JSONL or parquet, every column known, every error with file and row."""

from __future__ import annotations

import csv
import difflib
import io
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from blocks.errors import DataError

NAMES = ("layer", "subblock", "candidate", "attention", "ffn")
WHOLE = ("parameters", "bytes", "weight_bytes", "kv_bytes", "kv_bytes_per_token")
TIMES = ("prefill_ms", "decode_ms", "ms")
UNREAD = ("score_low", "score_high", "source", "one_pass", "one_pass_seq", "exact")
"""Columns of our own scores.csv that nothing here depends on."""
KNOWN = (*NAMES, "score", *WHOLE, *TIMES, *UNREAD)


@dataclass(frozen=True)
class Record:
    """One row as it was read.

    Attributes:
        number: from 1, the header and empty lines of a file of lines not counted.
    """

    path: Path
    number: int
    values: Mapping[str, Any]

    @property
    def where(self) -> str:
        return f"{self.path}, row {self.number}"

    def text(self, name: str) -> str:
        """What a cell says, "" if it is empty or not there."""
        value = self.values.get(name)
        return "" if value is None else str(value).strip()

    def number_of(self, name: str, least: float = -math.inf) -> float | None:
        """A cell as a finite number of at least `least`; None if it is empty or not there. Raises DataError otherwise."""
        if not (text := self.text(name)):
            return None
        value = self.values[name]
        try:
            number = math.nan if isinstance(value, bool) else float(value)
        except (TypeError, ValueError):
            raise DataError(f"{self.where}: {name} is {text!r}, not a number") from None
        if not (math.isfinite(number) and number >= least):
            wanted = "a finite number" if least < 0 else f"a finite number of {least:g} or more"
            raise DataError(f"{self.where}: {name} is {text}; it must be {wanted}")
        return number


def read_records(path: Path) -> Iterator[Record]:
    """The rows of a table. Raises DataError for what cannot be read, an unknown column or one that must be there."""
    try:
        rows = _read(path)
    except FileNotFoundError:
        raise DataError(f"--scores {path}: no such file") from None
    except (OSError, ValueError, csv.Error) as error:
        raise DataError(f"--scores {path}: cannot read it ({error}); give .csv, .json, .jsonl or .parquet") from error
    columns = tuple(dict.fromkeys(name for row in rows for name in row))
    for name in columns:
        if name not in KNOWN:
            row = next(number for number, row in enumerate(rows, 1) if name in row)
            raise DataError(f"{path}, row {row}: {_unknown(name)}")
    _require(path, columns)
    return (Record(path, number, row) for number, row in enumerate(rows, 1))


def _unknown(name: Any) -> str:
    if name is None:  # csv's name for what stands behind the last column
        return "more cells than columns"
    close = difflib.get_close_matches(str(name), KNOWN, n=1)
    hint = f" (did you mean {close[0]!r}?)" if close else ""
    return f"unknown column {name!r}{hint}; known: {', '.join(KNOWN)}"


def _require(path: Path, columns: Sequence[str]) -> None:
    if not columns:
        raise DataError(f"{path} has no rows")
    for needed in (("layer",), ("score",), ("candidate", "attention", "ffn")):
        if not any(name in columns for name in needed):
            raise DataError(f"{path}: no column {' or '.join(needed)}; it has {', '.join(columns)}")


def _read(path: Path) -> list[dict[str, Any]]:
    if path.suffix == ".parquet":
        from pyarrow.parquet import read_table

        table: list[dict[str, Any]] = read_table(path).to_pylist()
        return table
    text = path.read_text(encoding="utf-8-sig")  # spreadsheets begin their CSV with a byte order mark
    if path.suffix == ".jsonl":
        return [_object(number, line) for number, line in enumerate(filter(str.strip, text.splitlines()), 1)]
    if path.suffix == ".json":
        rows = json.loads(text)
        if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
            raise ValueError("not a list of objects")
        return rows
    reader = csv.DictReader(io.StringIO(text, newline=""))
    header = reader.fieldnames or []
    if twice := next((name for place, name in enumerate(header) if name in header[:place]), None):
        raise ValueError(f"column {twice!r} is there twice")
    return list(reader)


def _object(number: int, line: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise ValueError(f"row {number}: {error}") from None
    if not isinstance(row, dict):
        raise ValueError(f"row {number}: not an object")
    return row
