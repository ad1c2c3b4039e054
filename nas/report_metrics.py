"""What distill/metrics.jsonl tells of a healing: held-out text, other texts and training loss over healing tokens.

Stages follow one another on one axis: each counts its tokens from 0, so those of the stages before are added. A line cut off by a
crash, and one that a resumed run wrote again, are left out.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

MOST_LOSSES = 400
_EVALUATION = {"kl": "kl", "kl_se": "kl_se", "ce": "student_ce", "perplexity": "student_perplexity"}
_EVALUATION |= {"top1_agreement": "top1_agreement"}


def healing_of(path: Path, stages: Sequence[str] | None = None) -> dict[str, Any]:
    """The curves of a metrics.jsonl, all empty if there is none.

    Args:
        stages: the names of the stages that are meant, if others were tried before in the same directory; None means all.

    Returns:
        learning: held-out evaluations in order: step, tokens, stage (null for a healing of one), kl, kl_se, ce, perplexity,
            top1_agreement. other_texts: the same by the name of the text.
        training: at most `MOST_LOSSES` means of neighbouring steps: tokens, stage, loss.
        stages: name and the tokens before it, of a healing in several.
    """
    lines, starts = _placed([line for line in _lines(path) if _is_of(line, stages)])
    curves: dict[str | None, dict[tuple[Any, int], dict[str, Any]]] = {}
    losses: dict[tuple[Any, int], dict[str, Any]] = {}
    for line in lines:
        place = {"step": line["step"], "tokens": line["tokens"], "stage": line.get("stage")}
        key = (place["stage"], place["step"])
        if line["kind"] == "eval" and _finite(line.get("kl")):
            values = {name: line.get(wanted) for name, wanted in _EVALUATION.items()}
            curves.setdefault(line.get("text"), {})[key] = place | values
        elif line["kind"] == "train" and _finite(line.get("loss")):
            losses[key] = place | {"loss": line["loss"]}
    texts = {str(name): list(found.values()) for name, found in curves.items() if name is not None}
    return {
        "learning": list(curves.get(None, {}).values()),
        "other_texts": texts,
        "training": _thinned(list(losses.values())),
        "stages": [{"name": name, "tokens": tokens} for name, tokens in starts.items() if name is not None],
    }


def _lines(path: Path) -> list[dict[str, Any]]:
    lines = []
    for text in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            line = json.loads(text)
        except ValueError:
            continue
        if isinstance(line, dict) and all(isinstance(line.get(key), int) for key in ("step", "tokens")):
            lines.append(line | {"kind": line.get("kind")})
    return lines


def _is_of(line: dict[str, Any], stages: Sequence[str] | None) -> bool:
    """Whether a line is of one of the stages; the only one of a healing leaves its name out."""
    return stages is None or line.get("stage") in (stages if len(stages) > 1 else [None])


def _placed(lines: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], dict[str | None, int]]:
    """The lines with tokens over all stages, and where each stage begins."""
    spans: dict[str | None, int] = {}
    for line in lines:
        stage = line.get("stage")
        spans[stage] = max(spans.get(stage, 0), line["tokens"])
    starts, before = {}, 0
    for stage, span in spans.items():
        starts[stage], before = before, before + span
    return [line | {"tokens": starts[line.get("stage")] + line["tokens"]} for line in lines], starts


def _thinned(losses: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Means over runs of neighbouring steps of one stage, each at its last step."""
    size = max(1, math.ceil(len(losses) / MOST_LOSSES))
    thinned: list[dict[str, Any]] = []
    group: list[dict[str, Any]] = []
    for index, loss in enumerate(losses):
        group.append(loss)
        is_last = index + 1 == len(losses) or losses[index + 1]["stage"] != loss["stage"]
        if len(group) == size or is_last:
            thinned.append(loss | {"loss": sum(one["loss"] for one in group) / len(group)})
            group = []
    return thinned


def _finite(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)
