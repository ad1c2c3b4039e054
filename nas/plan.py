"""What `--dry-run` says: how many candidates and tokens, how much memory, before anything is done."""

from __future__ import annotations

from typing import Any

from blocks.shape import ModelShape
from distill.config import DistillConfig
from nas.config import RunConfig, SearchConfig
from nas.costs import Scenario
from nas.guard import guard_set
from nas.score import MOST_STREAMS
from nas.scoring import HEAD_CHUNK
from search_spaces import SearchSpace

FP32 = 4


def plan_score(config: RunConfig, shape: ModelShape, space: SearchSpace) -> dict[str, Any]:
    """Counts and bytes of `nas score`: resident fp32 weights, residual streams, statistics, the library on disk."""
    candidates = [space.layer_candidates(shape, index) for index in range(shape.num_hidden_layers)]
    changed = sum(len(specs) - 1 for specs in candidates)
    score = config.score
    exact = (
        changed
        if score.method != "one-pass"
        else sum(map(len, guard_set(shape, candidates, score.exact_share, score.seed)))
    )
    stream = shape.hidden_size * FP32
    fit = 6 * config.data.fit_tokens * stream + 3 * shape.intermediate_size**2 * FP32
    scoring = (shape.num_hidden_layers + 1 + score.label_samples) * config.data.calibration_tokens * stream
    exact_tokens = min(score.exact_tokens, config.data.calibration_tokens)
    scoring += HEAD_CHUNK * shape.vocab_size * 3 * FP32
    streams = shape.num_hidden_layers + 1 + 2 * min(exact, MOST_STREAMS)
    suffixes = streams * exact_tokens * stream
    library = sum(
        2 * shape.hidden_size * (spec.ffn.width + shape.hidden_size * (spec.attention.kind != "skip"))
        for specs in candidates
        for spec in specs[1:]
    )
    return {
        "stage": "score",
        "layers": shape.num_hidden_layers,
        "candidates": changed,
        "scored_exactly": exact,
        "fit_tokens": config.data.fit_tokens,
        "calibration_tokens": config.data.calibration_tokens,
        "exact_tokens": exact_tokens,
        "memory_gb": round((shape.parameters(shape.parent_architecture) * FP32 + max(fit, scoring, suffixes)) / 1e9, 3),
        "library_gb": round(library / 1e9, 3),
    }


def plan_search(config: SearchConfig, scenario: Scenario, shape: ModelShape, candidates: Any) -> dict[str, Any]:
    """Counts and bytes of `nas search`."""
    pool = candidates.pool(1, 1)[0]
    return {
        "stage": "search",
        "budget_gb": candidates.budget_bytes / 1e9,
        "scenario": vars(scenario) | {},
        "candidates": sum(map(len, candidates.table)),
        "children_to_measure": config.verify + 1,
        "verify_tokens": config.verify_tokens,
        "refit": config.refit,
        "additive_optimum": pool.score,
        "memory_gb": round(2 * shape.parameters(shape.parent_architecture) * FP32 / 1e9, 3),
    }


def plan_distill(config: DistillConfig, shape: ModelShape, child_parameters: int) -> dict[str, Any]:
    """Counts and bytes of `nas distill`: teacher, student with gradient and two Adam moments, and one chunk of logits."""
    parent = shape.parameters(shape.parent_architecture)
    states = parent * FP32 + child_parameters * 4 * FP32
    chunk = 3 * config.chunk_tokens * shape.vocab_size * FP32
    return {
        "stage": "distill",
        "tokens": config.steps * config.step_tokens,
        "steps": config.steps,
        "batch": f"{config.batch_sequences} x {config.sequence_length}",
        "child_parameters": child_parameters,
        "memory_gb": round((states + chunk) / 1e9, 3),
        "memory": "weights, gradients, optimizer and logits; activations come on top",
    }
