"""Accuracies on multiple choice and their standard errors; no torch, so that a table can be drawn anywhere."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from nas.choice_files import Question


def summarise(questions: Sequence[Question], scores: Sequence[np.ndarray]) -> dict[str, Any]:
    """acc and acc_norm with their standard errors, the accuracy of guessing, and which questions were answered right.

    Returns:
        {"questions", "chance", "acc", "acc_se", "acc_norm", "acc_norm_se", "right", "right_norm"}; the last two are texts of
        1 and 0, one a question, from which differences between models are told (`paired_difference`).
    """
    answers = np.array([question.answer for question in questions])
    lengths = [np.array([len(choice) for choice in question.choices]) for question in questions]
    right = np.array([score.argmax() for score in scores]) == answers
    normed = np.array([(score / n).argmax() for score, n in zip(scores, lengths, strict=True)]) == answers
    result: dict[str, Any] = {"questions": len(questions)}
    result["chance"] = float(np.mean([1 / len(question.choices) for question in questions]))
    for name, values in (("acc", right), ("acc_norm", normed)):
        result[name], result[f"{name}_se"] = mean_and_error(values.astype(float))
    return result | {"right": _bits(right), "right_norm": _bits(normed)}


def mean_and_error(values: np.ndarray) -> tuple[float, float | None]:
    """The mean and its standard error, s / sqrt(n) with s over n - 1; None for fewer than two values."""
    error = float(values.std(ddof=1) / np.sqrt(len(values))) if len(values) > 1 else None
    return float(values.mean()), error


def paired_difference(right: str, right_of_parent: str) -> tuple[float, float | None]:
    """Accuracy less the parent's on the same questions, and its standard error from the differences question by question.

    Two models err on many of the same questions, so this error is smaller than that of two separate accuracies.
    """
    own, parent = (np.array([bit == "1" for bit in bits], dtype=float) for bits in (right, right_of_parent))
    return mean_and_error(own - parent)


def _bits(values: np.ndarray) -> str:
    return "".join("1" if value else "0" for value in values)
