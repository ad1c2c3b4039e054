"""Multiple choice through lm-evaluation-harness, where it is installed: its tasks and figures, on a model that is loaded here."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Sequence
from importlib import metadata
from typing import Any

from blocks.errors import ConfigError, DataError
from nas.language_model import LanguageModel

PACKAGE = "lm_eval"
METRICS = ("acc", "acc_norm")


def harness_version() -> str:
    """The installed version. Raises ConfigError if there is none."""
    if importlib.util.find_spec(PACKAGE) is None:
        raise ConfigError(
            "--harness needs lm-evaluation-harness: pip install 'lm_eval[hf]'; or give --tasks, which needs nothing"
        )
    try:
        return metadata.version(PACKAGE)
    except metadata.PackageNotFoundError:
        return "unknown"


def run_harness(model: LanguageModel, task: str, limit: int | None, batch_size: int) -> dict[str, Any]:
    """One task or group of lm-evaluation-harness, zero-shot as the task says.

    Args:
        task: its name there.
        limit: the first so many questions; None for all.
        batch_size: inputs per forward pass.

    Returns:
        {name: {"questions", "acc", "acc_se", "acc_norm", "acc_norm_se"}} of the task, or of each in the group.

    Raises:
        DataError: it knows no such task, cannot get its data, or the task has neither metric.
    """
    import lm_eval
    from lm_eval.models.huggingface import HFLM

    logging.getLogger(PACKAGE).setLevel(logging.ERROR)
    wrapped = HFLM(pretrained=model.model, tokenizer=model.tokenizer, batch_size=batch_size)
    try:
        result: Any = lm_eval.simple_evaluate(model=wrapped, tasks=[task], limit=limit, log_samples=False)
    except Exception as error:  # unknown names, no network, data of another form: errors of every kind
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise DataError(
            f"--harness {task}: lm-evaluation-harness cannot run it ({type(error).__name__}: {first})"
        ) from error
    return read_results(task, result["results"], result.get("n-samples", {}))


def read_results(task: str, results: dict[str, Any], samples: dict[str, Any]) -> dict[str, Any]:
    """Its results, {task: {"acc,none", "acc_stderr,none", ...}}, in this package's words."""
    found = {}
    for name, values in results.items():
        if not any(f"{metric},none" in values for metric in METRICS):
            continue
        row: dict[str, Any] = {"questions": samples.get(name, {}).get("effective")}
        for metric in METRICS:
            row[metric] = _number(values.get(f"{metric},none"))
            row[f"{metric}_se"] = _number(values.get(f"{metric}_stderr,none"))
        found[name] = row
    if not found:
        raise DataError(f"--harness {task} reports neither acc nor acc_norm; it is no multiple choice")
    return found


def _number(value: object) -> float | None:
    """Where there is nothing to tell, it says "N/A"."""
    return float(value) if isinstance(value, (int, float)) else None


def names_of(given: Sequence[str]) -> list[str]:
    """Names with commas or given again and again, each once."""
    return list(dict.fromkeys(name.strip() for words in given for name in words.split(",") if name.strip()))
