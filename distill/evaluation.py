"""How far the student is from the teacher on held-out text."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from distill.data import TokenStream, heldout_batches
from distill.loss import STATISTICS
from distill.models import FrozenTeacher, StudentLoss, check_pair


@dataclass(frozen=True)
class EvalStats:
    """Means over `tokens` predicted tokens of held-out text."""

    kl: float
    """KL(teacher || student), nats per token."""
    student_ce: float
    """Cross-entropy of the student on the text, nats per token."""
    teacher_ce: float
    """Cross-entropy of the teacher on the text, nats per token."""
    top1_agreement: float
    """Share of tokens on which both models hold the same next token most likely."""
    tokens: int
    """Predicted tokens."""

    @property
    def student_perplexity(self) -> float:
        return math.exp(min(self.student_ce, 700.0))

    @property
    def teacher_perplexity(self) -> float:
        return math.exp(min(self.teacher_ce, 700.0))

    @classmethod
    def from_sums(cls, sums: Tensor) -> EvalStats:
        """From the summed `token_statistics` ([5], order of `STATISTICS`)."""
        values = dict(zip(STATISTICS, sums.tolist(), strict=True))
        tokens = int(values.pop("tokens"))
        return cls(**{name: value / tokens for name, value in values.items()}, tokens=tokens)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> EvalStats:
        return cls(**{name: values[name] for name in cls.__dataclass_fields__})

    def to_dict(self) -> dict[str, float]:
        """The fields and both perplexities, for JSON."""
        perplexities = {"student_perplexity": self.student_perplexity, "teacher_perplexity": self.teacher_perplexity}
        return asdict(self) | perplexities


def evaluate(
    teacher: nn.Module,
    student: nn.Module,
    pack: np.ndarray,
    *,
    sequence_length: int = 256,
    tokens: int = 0,
    micro_batch: int = 4,
    chunk_tokens: int = 512,
    compute_dtype: str = "float32",
) -> EvalStats:
    """Compares two causal LMs on a token pack, on the device where the student lies.

    Args:
        teacher: the parent.
        student: the child; its training mode is restored.
        pack: [sequences, length] of token ids, re-cut to `sequence_length`.
        tokens: about how many tokens to use, spread over the pack; 0 for all.
        micro_batch: sequences per forward pass.
        chunk_tokens: tokens whose logits are held at once.
        compute_dtype: "float32" or "bfloat16".
    """
    stream = TokenStream(pack, sequence_length, check_pair(teacher, student), "held-out pack")
    batches = heldout_batches(stream, tokens, sequence_length, micro_batch)
    sums = sum_statistics(
        FrozenTeacher(teacher, compute_dtype), StudentLoss(student, compute_dtype, chunk_tokens), batches
    )
    return EvalStats.from_sums(sums)


@torch.no_grad()
def sum_statistics(teacher: nn.Module, student: nn.Module, batches: Iterable[tuple[Tensor, Tensor]]) -> Tensor:
    """`token_statistics` summed over this rank's batches: [5] fp64 on the CPU.

    Args:
        teacher: a `FrozenTeacher`.
        student: a `StudentLoss`, possibly wrapped by accelerate.
        batches: (tokens [B, T], mask [B, T]) pairs.
    """
    device = next(student.parameters()).device
    training, sums = student.training, torch.zeros(len(STATISTICS), dtype=torch.float64)
    student.eval()
    for tokens, mask in batches:
        tokens, mask = tokens.to(device), mask.to(device)
        sums += student(tokens, *teacher(tokens), mask_BT=mask, statistics=True)
    student.train(training)
    return sums
