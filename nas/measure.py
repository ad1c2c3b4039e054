"""Held-out measurements of checkpoints as they lie on disk, through transformers alone."""

from __future__ import annotations

import gc
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from blocks.checkpoint import load_child
from blocks.parent import Parent
from distill.evaluation import evaluate
from nas.progress import Reporter

MOST_TOKENS = {"cpu": 4096}


def load_parent_model(
    parent: Parent, device: torch.device | str, dtype: torch.dtype = torch.float32
) -> torch.nn.Module:
    """The parent as transformers loads it, without gradients; on "meta" it has no weights."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()  # ours says what is going on
    if str(device) == "meta":
        with torch.device("meta"):
            model: torch.nn.Module = AutoModelForCausalLM.from_config(parent.config, dtype=dtype)
    else:
        model = AutoModelForCausalLM.from_pretrained(parent.path, dtype=dtype)
        model = torch.nn.Module.to(model, device)
    return model.eval().requires_grad_(False)


def measure(
    parent: Parent,
    children: Mapping[str, Path],
    heldout: np.ndarray,
    device: torch.device,
    reporter: Reporter,
    *,
    unrounded: Collection[str] = (),
) -> dict[str, Any]:
    """KL to the parent (nats per token) with its standard error over sequences, perplexity and top-1 agreement of children on held-out text.

    Args:
        children: directories by name. A child with precisions is measured in them, as it will be served.
        unrounded: names of those that are measured in their master weights instead.
        heldout: token pack [sequences, S]; on a CPU about 4,096 tokens of it, spread evenly.

    Returns:
        {"tokens": N, "parent": {"perplexity": ...}, NAME: {"kl": ..., "kl_se": ..., "perplexity": ..., "top1_agreement": ...}, ...}
    """
    result: dict[str, Any] = {}
    with reporter.task("Measuring on held-out text", len(children)) as advance:
        teacher = load_parent_model(parent, device)
        for name, directory in children.items():
            student = load_child(directory, device=device, rounded=name not in unrounded)
            tokens = MOST_TOKENS.get(device.type, 0)
            stats = evaluate(teacher, student, heldout, sequence_length=heldout.shape[1], tokens=tokens)
            result |= {"tokens": stats.tokens, "parent": {"perplexity": stats.teacher_perplexity}}
            result[name] = {
                "kl": stats.kl,
                "kl_se": stats.kl_se,
                "perplexity": stats.student_perplexity,
                "top1_agreement": stats.top1_agreement,
            }
            del student  # before the next one is loaded; a rounded one refers to itself
            gc.collect()
            advance()
    return result
