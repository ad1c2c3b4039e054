"""The layers of a run for its report: what each architecture has in each of them, and what each candidate would hurt."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

from blocks.errors import ConfigError


def map_of(found: dict[str, Any], models: list[dict[str, Any]]) -> dict[str, Any] | None:
    """Columns (layers), parts (rows of the map) and, by model, the candidates of each part, column by column."""
    layers = found.get("layers")
    if not layers:
        return None
    groups = found.get("groups") or [[str(index), "layer"] for index in range(len(layers))]
    columns = list(dict.fromkeys(str(column) for column, _ in groups))
    shown = {model["name"]: model["layers"] for model in models if model["layers"]}
    for finalist in found.get("finalists") or []:
        if finalist.get("layers") and finalist["layers"] not in shown.values():
            shown[f"finalist {finalist['name']}"] = finalist["layers"]
    cells = {name: _cells(names, groups, columns) for name, names in shown.items()}
    parts = list(dict.fromkeys(part for rows in cells.values() for part in rows))
    names = {name for rows in cells.values() for row in rows.values() for name in row if name is not None}
    kept, by = _kept(found, sorted(names))
    return {"columns": columns, "parts": parts, "models": cells, "kept": kept, "kept_by": by}


def _cells(names: list[str], groups: list[Any], columns: list[str]) -> dict[str, list[str | None]]:
    """{"attention": ["attention:kv3", ...], "ffn": [...]}; a joint name of a layer is taken apart if it is ours."""
    rows: dict[str, list[str | None]] = {}
    for name, (column, part) in zip(names, groups, strict=True):
        attention, plus, ffn = name.partition("+")
        ours = plus and attention.startswith("attention:") and ffn.startswith("ffn:")
        for row, candidate in {"attention": attention, "ffn": ffn}.items() if ours else ((part, name),):
            rows.setdefault(row, [None] * len(columns))[columns.index(str(column))] = candidate
    return rows


def _kept(found: dict[str, Any], names: list[str]) -> tuple[dict[str, float], str | None]:
    """The share of the parent's bytes (or else heads and channels) that each candidate keeps, and by what that is told."""
    if "kept" in found:
        return found["kept"], "bytes"
    if found.get("shape") and found.get("scenario"):
        from blocks.shape import ModelShape
        from blocks.spec import AttentionSpec, FFNSpec
        from nas.costs import CostModel, Scenario

        known = {field.name for field in fields(Scenario)}
        scenario = Scenario(**{key: value for key, value in found["scenario"].items() if key in known})
        costs = CostModel(ModelShape(**found["shape"]), scenario)
        try:
            return {
                name: costs.kept(AttentionSpec.parse(name) if name.startswith("attention") else FFNSpec.parse(name))
                for name in names
            }, "bytes"
        except ConfigError:
            pass  # candidates of a table from elsewhere
    sizes = {name: _size(name) for name in names}
    most: dict[str, float] = {}
    for name, size in sizes.items():
        most[_part(name)] = max(most.get(_part(name), 0.0), size or 0.0)
    kept = {name: size / most[_part(name)] for name, size in sizes.items() if size is not None and most[_part(name)]}
    return kept, "heads and channels" if kept else None


def _part(name: str) -> str:
    return name.partition(":")[0]


def _size(name: str) -> float | None:
    """KV heads or channels in a candidate's name; 0 for a skip, None for anything else."""
    part, _, body = name.partition(":")
    if part not in ("attention", "ffn"):
        return None
    digits = body.removeprefix("kv") if part == "attention" else body
    return 0.0 if body == "skip" else float(digits) if digits.isdigit() else None


def scores_of(path: Path, found: dict[str, Any]) -> dict[str, Any] | None:
    """The score table by candidate: {"layers": N, "rows": [{"attention", "ffn", "cells": [...]}], "chosen": [row, ...]}."""
    if not path.exists():
        return None
    from nas.table import load_table

    table = load_table(path)
    rows: dict[tuple[str, str], list[dict[str, Any] | None]] = {}
    for layer, candidates in enumerate(table):
        for row in candidates:
            cells = rows.setdefault((row.attention, row.ffn), [None] * len(table))
            cells[layer] = {"score": row.score, "low": row.score_low, "high": row.score_high, "source": row.source}
    kinds = list(dict.fromkeys(attention for attention, _ in rows))
    rows = {key: rows[key] for key in sorted(rows, key=lambda key: kinds.index(key[0]))}
    names = [f"{attention}+{ffn}" for attention, ffn in rows]
    layers = found.get("layers") or []
    told = [{"attention": attention, "ffn": ffn, "cells": cells} for (attention, ffn), cells in rows.items()]
    chosen = [names.index(layer) if layer in names else None for layer in layers]
    return {"layers": len(table), "rows": told, "chosen": chosen}
