"""Healing in several stages: each a `heal` of its own, which begins with the best weights of the one before.

    out_dir/metrics.jsonl            of all stages, each line with its `stage` if there are several
    out_dir/checkpoints, best        of the only stage; or
    out_dir/1-kl/, out_dir/2-qad/    of each of several

The stages of the published recipes: block-local (Puzzle, arXiv 2411.19146), distillation, continual pretraining on better
text, at the end the same at greater lengths (Llama-Nemotron, arXiv 2505.00949), and with the number formats that the child
will be served in (quantization-aware distillation, arXiv 2601.20088).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn

from blocks.rounded_model import unround_model
from distill.checkpoint import load_weights
from distill.config import DistillConfig
from distill.progress import HealResult, Progress
from distill.trainer import heal


@dataclass(frozen=True)
class Stage:
    """One stage."""

    config: DistillConfig
    train_pack: np.ndarray
    """[sequences, length] of token ids, possibly memory-mapped."""
    eval_at: tuple[int, ...] = ()
    """Steps to evaluate at, besides those of `config.eval_every`."""


def stage_names(configs: Sequence[DistillConfig]) -> list[str]:
    """What the stages are called: "1-kl", "2-ce", and "3-qad" for kl, "4-qad-ce" for another loss; their directories, too."""
    return [f"{number}-{_kind(config)}" for number, config in enumerate(configs, start=1)]


def _kind(config: DistillConfig) -> str:
    if not config.qad:
        return config.loss
    return "qad" if config.loss == "kl" else f"qad-{config.loss}"


def heal_in_stages(
    stages: Sequence[Stage],
    load_pair: Callable[[DistillConfig], tuple[nn.Module | None, nn.Module]],
    heldout_pack: np.ndarray,
    out_dir: Path,
    *,
    other_texts: Mapping[str, np.ndarray] | None = None,
    on_step: Callable[[int, Progress], None] | None = None,
    resume: bool = True,
) -> list[HealResult]:
    """Heals a child stage after stage; what is done is not done again. Returns the result of each.

    Args:
        stages: at least one.
        load_pair: gives (teacher, student) of a stage, the child as it was at the very first; called once a stage, since
            sharding changes both. The teacher may be None where the stage's is the healed child.
        heldout_pack: decides in every stage which weights are best.
        out_dir: where metrics, checkpoints and best students go.
        other_texts: packs by name that are measured besides.
        on_step: told the stage's index and how it goes (on the main process).
        resume: go on with what is there; if False, it is removed.

    Raises:
        As `distill.trainer.heal`.
    """
    names = stage_names([stage.config for stage in stages])
    results: list[HealResult] = []
    for index, (name, stage) in enumerate(zip(names, stages, strict=True)):
        teacher, student = load_pair(stage.config)
        if results and any(not parameter.is_meta for parameter in student.parameters()):
            load_weights(results[-1].best_path, student)
        if stage.config.teacher == "healed":
            teacher = frozen_copy(student, stage.config.compute_dtype)
        assert teacher is not None

        def tell(progress: Progress, index: int = index) -> None:
            if on_step is not None:
                on_step(index, progress)

        alone = len(stages) == 1
        results.append(
            heal(
                stage.config,
                teacher,
                student,
                stage.train_pack,
                heldout_pack,
                out_dir if alone else out_dir / name,
                on_step=tell,
                resume=resume,
                eval_at=stage.eval_at,
                other_texts=other_texts,
                log=out_dir / "metrics.jsonl",
                stage=None if alone else name,
            )
        )
    return results


def frozen_copy(student: nn.Module, compute_dtype: str) -> nn.Module:
    """The student's master weights as they are, in bf16, as a teacher; held in fp32 if that is what it computes in.

    Buffers stay what they are: the frequencies of rotary embeddings, in bf16, would be other positions.
    """
    teacher = unround_model(copy.deepcopy(student)).eval().requires_grad_(False)
    for parameter in teacher.parameters():
        parameter.data = parameter.data.to(torch.bfloat16).to(getattr(torch, compute_dtype))
    return teacher
