"""The guard set: candidates that are scored exactly, to check the one-pass scores and to map them to nats.

One-pass scores are a second-order term: right where a candidate changes little, wrong where it changes much. So the
candidates that change most (skips, the first and last layers) and a random few are scored exactly. Where both are known,
the median of log(exact / one-pass) per kind of candidate is the map for those where only one-pass is.
"""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Sequence
from typing import Any

from blocks.shape import ModelShape
from blocks.spec import LayerSpec

SMALLEST = 1e-9  # nats per token; below this a score is noise
ENOUGH = 5  # pairs of one kind that allow a map of its own


def guard_set(
    shape: ModelShape, candidates: Sequence[Sequence[LayerSpec]], share: float, seed: int
) -> list[list[LayerSpec]]:
    """For each layer, which of its candidates are scored exactly (never the parent's own layer)."""
    chooser = random.Random(seed)
    last = len(candidates) - 1
    parent = shape.parent_layer
    chosen: list[list[LayerSpec]] = []
    for index, specs in enumerate(candidates):
        changed = [spec for spec in specs if spec != parent]
        chosen.append([s for s in changed if index in (0, last) or _plain_skip(s, parent) or chooser.random() < share])
    return chosen


def _plain_skip(spec: LayerSpec, parent: LayerSpec) -> bool:
    """The attention, the FFN or both skipped, and nothing else changed."""
    return (spec.attention.kind == "skip" or spec.attention == parent.attention) and (
        spec.ffn.kind == "skip" or spec.ffn == parent.ffn
    )


def kind_of(spec: LayerSpec) -> str:
    """Candidates of one kind share a map from one-pass to nats."""
    return f"{spec.attention.kind}+{spec.ffn.kind}"


def fit_map(pairs: Sequence[tuple[LayerSpec, float, float]]) -> dict[str, float]:
    """(spec, one-pass, exact) -> factor from one-pass to nats, by kind; "" is the factor of all others."""
    logs: dict[str, list[float]] = {}
    for spec, estimate, exact in pairs:
        if estimate > SMALLEST and exact > SMALLEST:
            ratio = math.log(exact / estimate)
            logs.setdefault(kind_of(spec), []).append(ratio)
            logs.setdefault("", []).append(ratio)
    factors = {kind: math.exp(statistics.median(values)) for kind, values in logs.items() if len(values) >= ENOUGH}
    return {"": 1.0} | factors


def rank_correlation(pairs: Sequence[tuple[LayerSpec, float, float]]) -> dict[str, Any]:
    """Spearman's rank correlation of one-pass with exact scores; None for fewer than `ENOUGH` pairs, or no differences."""
    from scipy.stats import spearmanr

    estimates, truths = [a for _, a, _ in pairs], [b for _, _, b in pairs]
    spearman = None
    if len(pairs) >= ENOUGH and len(set(estimates)) > 1 and len(set(truths)) > 1:
        value = float(spearmanr(estimates, truths).statistic)
        spearman = value if math.isfinite(value) else None
    return {"candidates": len(pairs), "spearman": spearman}
