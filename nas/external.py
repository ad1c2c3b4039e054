"""A score table from elsewhere, which stands alone: what each candidate hurts and what it takes (docs/tables.md).

    layer   subblock    candidate       score   parameters  bytes  kv_bytes  prefill_ms  decode_ms
    0       attention   kv8             0.0     ...
    0       ffn         w14336          0.0     ...
    fixed               embeddings      0.0     ...

CSV, JSON (a list of rows), JSONL or parquet. A layer has joint rows, attention x FFN, or rows for each of its subblocks.
Our own scores.csv is one, too.
"""

from __future__ import annotations

import csv
import difflib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from blocks.errors import ConfigError, DataError
from blocks.spec import Architecture, AttentionSpec, FFNSpec, LayerSpec
from nas.costs import DTYPE_BYTES, Scenario

FIXED = "fixed"
SUBBLOCKS = ("layer", "attention", "ffn")
TEXTS = ("layer", "subblock", "candidate", "attention", "ffn", "source")
WHOLE = ("parameters", "bytes", "weight_bytes", "kv_bytes", "kv_bytes_per_token")
TIMES = ("prefill_ms", "decode_ms", "ms")
KNOWN = (*TEXTS, "score", "score_low", "score_high", "one_pass", "one_pass_seq", "exact", *WHOLE, *TIMES)


@dataclass(frozen=True)
class Candidate:
    """One row: a candidate of one group, and what it takes of each limit (nas/limits.py) that the table knows of."""

    name: str
    score: float
    amounts: Mapping[str, int]


@dataclass(frozen=True)
class ExternalTable:
    """Candidates by group; a group is a layer, or one subblock of it.

    Attributes:
        groups: (layer, subblock) of each, in order.
        scenario: that it is priced in.
        rows: candidates of each.
        fixed: what is there whatever is chosen, by limit.
    """

    path: Path
    scenario: Scenario
    groups: tuple[tuple[int, str], ...]
    rows: tuple[tuple[Candidate, ...], ...]
    fixed: Mapping[str, int]

    @property
    def scores(self) -> list[list[float]]:
        return [[row.score for row in rows] for rows in self.rows]

    def amounts(self, limit: str) -> list[list[int]]:
        """What each candidate takes. Raises ConfigError if the table does not say."""
        if any(limit not in row.amounts for rows in self.rows for row in rows):
            needs = {"memory": "bytes", "kv": "kv_bytes", "parameters": "parameters", "ttft": "prefill_ms"}
            columns = needs.get(limit, "decode_ms" if limit == "tpot" else "prefill_ms and decode_ms, or ms")
            raise ConfigError(f"{self.path}: a limit of {limit} needs the column {columns} in every row")
        return [[row.amounts[limit] for row in rows] for rows in self.rows]

    def knows(self, limit: str) -> bool:
        return all(limit in row.amounts for rows in self.rows for row in rows)

    @property
    def parent(self) -> tuple[int, ...]:
        """The candidate of each group that takes most, of those the one with the least score: what nothing was cut from."""
        limit = next(name for name in ("memory", "parameters", "request", "tpot", "ttft", "kv") if self.knows(name))
        return tuple(
            min(range(len(rows)), key=lambda c, rows=rows: (-rows[c].amounts[limit], rows[c].score))  # type: ignore[misc]
            for rows in self.rows
        )

    def budget_for_share(self, share: float) -> int:
        """Bytes of the budget that keeps `share` of what the parent's candidates take, what is fixed added."""
        self.amounts("memory")  # says what is missing
        fixed = self.fixed.get("memory", 0)
        return fixed + int(share * (self.total("memory", self.parent) - fixed))

    def total(self, limit: str, choice: Sequence[int]) -> int:
        chosen = (rows[c] for rows, c in zip(self.rows, choice, strict=True))
        return self.fixed.get(limit, 0) + sum(row.amounts[limit] for row in chosen)

    def names(self, choice: Sequence[int]) -> list[str]:
        return [rows[c].name for rows, c in zip(self.rows, choice, strict=True)]

    def architecture(self, choice: Sequence[int]) -> Architecture | None:
        """The same as specs, layer by layer, if the candidates are named as this package names them."""
        parts: dict[int, dict[str, str]] = {}
        for (layer, subblock), name in zip(self.groups, self.names(choice), strict=True):
            parts.setdefault(layer, {})[subblock] = name
        try:
            return Architecture(tuple(_spec(parts[layer]) for layer in sorted(parts)))
        except ConfigError:
            return None


def _spec(parts: Mapping[str, str]) -> LayerSpec:
    if "layer" in parts:
        return LayerSpec.parse(parts["layer"])
    return LayerSpec(AttentionSpec.parse(parts["attention"]), FFNSpec.parse(parts["ffn"]))


def load_external(path: Path, scenario: Scenario) -> ExternalTable:
    """Reads a table and prices it in a scenario. Raises DataError in one line, with file and row."""
    found: dict[tuple[int, str], dict[str, Candidate]] = {}
    fixed: dict[str, int] = {}
    for number, record in _records(path):
        where = f"{path}, row {number}"
        layer, subblock, name = _place(record, where)
        candidate = Candidate(name, _number(record, "score", where) or 0.0, _amounts(record, scenario, where))
        if layer is None:
            for limit, amount in candidate.amounts.items():
                fixed[limit] = fixed.get(limit, 0) + amount
            continue
        if record.get("score") in (None, ""):
            raise DataError(f"{where}: no score")
        group = found.setdefault((layer, subblock), {})
        if name in group:
            raise DataError(f"{where}: {name} of layer {layer} is there twice")
        group[name] = candidate
    _require_whole(path, found)
    groups = tuple(sorted(found, key=lambda group: (group[0], SUBBLOCKS.index(group[1]))))
    return ExternalTable(path, scenario, groups, tuple(tuple(found[group].values()) for group in groups), fixed)


def _require_whole(path: Path, found: Mapping[tuple[int, str], Any]) -> None:
    if not found:
        raise DataError(f"{path} has no rows of layers")
    layers = sorted({layer for layer, _ in found})
    for expected, layer in enumerate(layers):
        if layer != expected:
            raise DataError(f"{path} has no rows of layer {expected}, but of layer {layer}")
        own = {subblock for number, subblock in found if number == layer}
        if own not in ({"layer"}, {"attention", "ffn"}):
            raise DataError(
                f"{path}: layer {layer} has rows of {' and '.join(sorted(own))}; give attention and ffn, or whole layers alone"
            )


def _place(record: Mapping[str, Any], where: str) -> tuple[int | None, str, str]:
    """(layer or None for what is fixed, subblock, name) of a row."""
    attention, ffn = (str(record.get(part) or "").strip() for part in ("attention", "ffn"))
    name = str(record.get("candidate") or "").strip() or "+".join(part for part in (attention, ffn) if part)
    if not name:
        raise DataError(f"{where}: no candidate (nor attention or ffn)")
    text = str(record.get("layer", "")).strip()
    if text == FIXED:
        return None, "layer", name
    try:
        layer = int(float(text))
    except ValueError:
        raise DataError(f"{where}: layer is {text!r}; it must be a number from 0, or {FIXED}") from None
    subblock = str(record.get("subblock") or "").strip() or _subblock_of(name, attention, ffn)
    if subblock not in SUBBLOCKS or layer < 0:
        raise DataError(
            f"{where}: layer {layer}, subblock {subblock!r}; write a layer from 0, and attention, ffn or layer"
        )
    return layer, subblock, name


def _subblock_of(name: str, attention: str, ffn: str) -> str:
    if attention or ffn:
        return "layer" if attention and ffn else "attention" if attention else "ffn"
    if "+" not in name and name.startswith(("attention:", "ffn:")):
        return name.partition(":")[0]
    return "layer"


def _amounts(record: Mapping[str, Any], scenario: Scenario, where: str) -> dict[str, int]:
    """What a row takes of every limit that it says something of, in whole numbers."""
    value = {name: _number(record, name, where, least=0.0) for name in (*WHOLE, *TIMES)}
    found: dict[str, int] = {}
    weights = _weights(value, scenario)
    kv = _kv(value, scenario)
    if value["parameters"] is not None:
        found["parameters"] = round(value["parameters"])
    if kv is not None:
        found["kv"] = kv
    if weights is not None:
        found["memory"] = weights + (kv or 0)
    prefill, decode, whole = (value[name] for name in TIMES)
    if prefill is not None:
        found["ttft"] = round(prefill * 1e6)
    if decode is not None:
        found["tpot"] = round(decode * 1e6)
    if prefill is not None and decode is not None:
        found["request"] = found["ttft"] + scenario.output_tokens * found["tpot"]
    elif whole is not None:
        found["request"] = round(whole * 1e6)
    return found


def _weights(value: Mapping[str, float | None], scenario: Scenario) -> int | None:
    """`bytes` as they are; `weight_bytes` (bf16) and parameters in the scenario's dtype."""
    size = DTYPE_BYTES[scenario.weight_dtype]
    if (given := value["bytes"]) is not None:
        return round(given)
    if (parameters := value["parameters"]) is not None:
        return round(parameters) * size
    return None if (half := value["weight_bytes"]) is None else round(half) * size // 2


def _kv(value: Mapping[str, float | None], scenario: Scenario) -> int | None:
    """`kv_bytes` of the scenario as they are; `kv_bytes_per_token` (bf16) for all its tokens, in its dtype."""
    if (given := value["kv_bytes"]) is not None:
        return round(given)
    if (per_token := value["kv_bytes_per_token"]) is None:
        return None
    return round(per_token) * scenario.batch * scenario.context * DTYPE_BYTES[scenario.kv_dtype] // 2


def _number(record: Mapping[str, Any], name: str, where: str, least: float = -math.inf) -> float | None:
    text = record.get(name)
    if text is None or str(text).strip() in ("", "nan", "None"):
        return None
    try:
        number = float(text)
    except (TypeError, ValueError):
        raise DataError(f"{where}: {name} is {text!r}, not a number") from None
    if not (math.isfinite(number) and number >= least):
        raise DataError(f"{where}: {name} is {text}; it must be {'finite' if least < 0 else 'finite and 0 or more'}")
    return number


def _records(path: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """(row number from 1, row) of a table file, its columns checked."""
    try:
        rows = _read(path)
    except FileNotFoundError:
        raise DataError(f"--scores {path}: no such file") from None
    except (OSError, ValueError, csv.Error) as error:
        raise DataError(f"--scores {path}: cannot read it ({error}); give .csv, .json, .jsonl or .parquet") from error
    columns = dict.fromkeys(name for row in rows for name in row)
    for name in columns:
        if name not in KNOWN:
            close = difflib.get_close_matches(str(name), KNOWN, n=1)
            hint = f" (did you mean {close[0]!r}?)" if close else ""
            raise DataError(f"{path}: unknown column {name!r}{hint}; known: {', '.join(KNOWN)}")
    for needed in ("layer", "score"):
        if needed not in columns:
            raise DataError(f"{path}: no column {needed!r}; it has {', '.join(map(str, columns)) or 'none'}")
    yield from enumerate(rows, 1)


def _read(path: Path) -> list[dict[str, Any]]:
    if path.suffix == ".parquet":
        from pyarrow.parquet import read_table

        table: list[dict[str, Any]] = read_table(path).to_pylist()
        return table
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".jsonl":
        rows = [json.loads(line) for line in text.splitlines() if line.strip()]
    elif path.suffix == ".json":
        rows = json.loads(text)
    else:
        rows = list(csv.DictReader(text.splitlines()))
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ValueError("not a list of rows")
    return rows
