"""What a table's parent takes in fp8 alone, nothing left out of it: what any search for a smaller structure has to beat.

Every matrix inside the layers in fp8 with its scales, norms and whatever is fixed (embeddings, head) as they are; the KV cache
in the scenario's dtype, and in fp8 besides. Sizes are the table's own where it has the parent's candidates in fp8, else those
of `blocks.rounded.subblock_bytes`, else a byte a parameter, which leaves out the scales: a lower bound.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from blocks.spec import AttentionSpec, FFNSpec, LayerSpec
from nas.costs import DTYPE_BYTES
from nas.external import Candidate, ExternalTable
from nas.limits import Bound

FP8 = "fp8"
KV_BYTES = 1  # of one cached value in fp8, which has no scales


def fp8_alone(table: ExternalTable, bounds: Sequence[Bound]) -> dict[str, Any] | None:
    """The field `fp8_alone` of architecture.json (docs/tables.md); None if the table does not tell sizes.

    `fits` and `left_gb` are of the memory limit, None without one; `left_gb` is below 0 where GB are lacking.
    """
    if "memory" not in table.known:
        return None
    by_kind = {"attention": 0, "ffn": 0, "layer": 0}
    exact, scores = True, []
    for (_, subblock), rows, place in zip(table.groups, table.rows, table.parent, strict=True):
        sizes = _sizes(table, subblock, rows, rows[place])
        if sizes is None:
            return None
        exact &= sizes.pop("exact") == 1
        for kind, size in sizes.items():
            by_kind[kind] += size
        twin = in_fp8(rows, rows[place])
        scores.append(None if twin is None else twin.score)
    scenario, fixed, kv = table.scenario, table.fixed["weights"], table.total("kv", table.parent)
    weights = fixed + sum(by_kind.values())
    budget = next((bound.high for bound in bounds if bound.name == "memory"), None)
    small = kv * KV_BYTES // scenario.kv_value_bytes
    told: dict[str, Any] = {
        "exact": exact,
        "fixed_bytes": fixed,
        **{f"{kind}_bytes": size for kind, size in by_kind.items() if size},
        "weight_bytes": weights,
        "reserve_bytes": scenario.reserve_bytes,
        **_total(weights + scenario.reserve_bytes, kv, budget),
        "kv_fp8": _total(weights + scenario.reserve_bytes, small, budget),
        "predicted_kl": None if None in scores else math.fsum(score for score in scores if score is not None),
    }
    if "parameters" in table.known:
        told["parameters"] = table.total("parameters", table.parent)
    return told


def in_fp8(rows: Sequence[Candidate], row: Candidate) -> Candidate | None:
    """The same candidate in fp8 among those of its group."""
    if row.spec is None:
        return None
    wanted = row.spec.at(FP8)
    return next((other for other in rows if other.spec == wanted), None)


def _sizes(table: ExternalTable, subblock: str, rows: Sequence[Candidate], row: Candidate) -> dict[str, int] | None:
    """Bytes of the weights of a candidate in fp8 by what they are of, and whether they are `exact` (1) or at least (0)."""
    twin = in_fp8(rows, row)
    if table.shape is not None and row.spec is not None:
        parts = _subblocks(row.spec)
        known = {part: subblock_size(table, spec.at(FP8)) for part, spec in parts.items()}
        if twin is None or twin.amounts["weights"] == sum(known.values()):
            return known | {"exact": 1}
    if twin is not None:
        return {subblock: twin.amounts["weights"], "exact": 1}
    if "parameters" in row.amounts:
        return {subblock: row.amounts["parameters"], "exact": 0}
    return None


def subblock_size(table: ExternalTable, spec: AttentionSpec | FFNSpec) -> int:
    """Bytes of the weights of a subblock of the table's parent. Raises ConfigError for a format that cannot hold it."""
    from blocks.rounded import subblock_bytes

    assert table.shape is not None
    return subblock_bytes(table.shape, spec, DTYPE_BYTES[table.scenario.weight_dtype])


def _subblocks(spec: LayerSpec | AttentionSpec | FFNSpec) -> dict[str, AttentionSpec | FFNSpec]:
    if isinstance(spec, LayerSpec):
        return {"attention": spec.attention, "ffn": spec.ffn}
    return {"attention" if isinstance(spec, AttentionSpec) else "ffn": spec}


def _total(others: int, kv: int, budget: int | None) -> dict[str, Any]:
    total = others + kv
    return {
        "kv_bytes": kv,
        "total_bytes": total,
        "gb": total / 1e9,
        "fits": None if budget is None else total <= budget,
        "left_gb": None if budget is None else (budget - total) / 1e9,
    }


def fp8_lines(found: dict[str, Any]) -> list[str]:
    """What fp8 alone gives, for the terminal: beside what the search gives, and with the KV cache in fp8, too."""
    alone = found.get("fp8_alone")
    if alone is None:
        return []
    rest = "embeddings and head in " + found["scenario"]["weight_dtype"]
    lines = [f"{'fp8 alone':<11}the parent's matrices in fp8, {rest}: {_size(alone, alone['exact'])}"]
    if alone["predicted_kl"] is not None:
        lines[0] += f"; sum of scores {alone['predicted_kl']:.4f}, the search's {found['predicted_kl']:.4f}"
    if alone["kv_fp8"]["kv_bytes"] != alone["kv_bytes"]:
        lines.append(f"{'':<11}its KV cache in fp8 besides: {_size(alone['kv_fp8'], alone['exact'])}")
    if not alone["exact"]:
        lines.append(f"{'':<11}scales are not counted, for the table does not tell the sizes of its matrices")
    return lines


def _size(told: dict[str, Any], exact: bool) -> str:
    size = f"{'' if exact else 'at least '}{told['gb']:.4f} GB"
    if told["fits"] is None:
        return size
    amount = f"{abs(told['left_gb']):.4f} GB"
    if told["fits"]:
        return f"{size}, fits with {'' if exact else 'at most '}{amount} left"
    return f"{size}, does not fit: {'' if exact else 'at least '}{amount} lacking"
