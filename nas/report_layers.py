"""The layers of a run for its report: what each architecture has in each of them, and what each candidate would hurt."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from blocks.errors import ConfigError
from blocks.shape import ModelShape
from nas.format_words import by_structure, costs_of, formats_told, mean_bits, taken_apart


def map_of(found: dict[str, Any], models: list[dict[str, Any]]) -> dict[str, Any] | None:
    """Columns (layers), parts (rows of the map) and, by model, the candidates of each part, column by column.

    Candidates are structures, so that colours say what is kept of heads and channels; their number formats are in
    `precisions`, in the same order, with each format's bits per weight. That is None where all is bf16.
    """
    layers = found.get("layers")
    if not layers:
        return None
    groups = found.get("groups") or [[str(index), "layer"] for index in range(len(layers))]
    columns = list(dict.fromkeys(str(column) for column, _ in groups))
    shown = {model["name"]: model["layers"] for model in models if model["layers"]}
    for finalist in found.get("finalists") or []:
        if finalist.get("layers") and finalist["layers"] not in shown.values():
            shown[f"finalist {finalist['name']}"] = finalist["layers"]
    whole = {name: _cells(names, groups, columns) for name, names in shown.items()}
    cells = {name: _each(rows, 0) for name, rows in whole.items()}
    parts = list(dict.fromkeys(part for rows in cells.values() for part in rows))
    names = {name for rows in cells.values() for row in rows.values() for name in row if name is not None}
    kept, by = _kept(found, sorted(names))
    precisions = _precisions(found, shown, {name: _each(rows, 1) for name, rows in whole.items()})
    drawn = {"columns": columns, "parts": parts, "models": cells, "kept": kept, "kept_by": by}
    return drawn | {"precisions": precisions}


def _each(rows: dict[str, list[tuple[str | None, str | None]]], which: int) -> dict[str, list[str | None]]:
    return {part: [cell[which] for cell in row] for part, row in rows.items()}


def _precisions(
    found: dict[str, Any], shown: dict[str, list[str]], models: dict[str, dict[str, list[str | None]]]
) -> dict[str, Any] | None:
    """Number formats of every model's parts, with the bits of those of all models."""
    shape = ModelShape(**found["shape"]) if found.get("shape") else None
    layers = [layer for names in shown.values() for layer in names]
    try:
        formats = formats_told(layers, shape)
        means = {} if shape is None or not formats else {name: mean_bits(own, shape) for name, own in shown.items()}
    except ConfigError:  # of a table from elsewhere, a format that cannot hold what it is said to
        formats, means = formats_told(layers), {}
    return {"formats": formats, "models": models, "mean_bits": means} if formats else None


def _cells(names: list[str], groups: list[Any], columns: list[str]) -> dict[str, list[tuple[str | None, str | None]]]:
    """{"attention": [("attention:kv3", "fp8"), ...], "ffn": [...]}; a joint name of a layer is taken apart if it is ours."""
    rows: dict[str, list[tuple[str | None, str | None]]] = {}
    for name, (column, part) in zip(names, groups, strict=True):
        attention, plus, ffn = name.partition("+")
        ours = plus and attention.startswith("attention:") and ffn.startswith("ffn:")
        for row, candidate in {"attention": attention, "ffn": ffn}.items() if ours else ((part, name),):
            rows.setdefault(row, [(None, None)] * len(columns))[columns.index(str(column))] = taken_apart(candidate)
    return rows


def _kept(found: dict[str, Any], names: list[str]) -> tuple[dict[str, float], str | None]:
    """The share of the parent's bytes (or else heads and channels) that each candidate keeps, and by what that is told."""
    if "kept" in found:
        return by_structure(found["kept"]), "bytes"
    if found.get("shape") and found.get("scenario"):
        from blocks.spec import AttentionSpec, FFNSpec

        costs = costs_of(found)
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
    told = [{"attention": attention, "ffn": ffn, "cells": cells} for (attention, ffn), cells in rows.items()]
    chosen = [_place(names, layer) for layer in found.get("layers") or []]
    return {"layers": len(table), "rows": told, "chosen": chosen}


def _place(names: list[str], layer: str) -> int | None:
    """The row of a layer, or else of its structure: scores of structure and of precision are apart."""
    structure = "+".join(taken_apart(name)[0] for name in layer.split("+"))
    return next((names.index(name) for name in (layer, structure) if name in names), None)
