"""How far the student is from the teacher on held-out text."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from distill.data import TokenStream, heldout_batches, to_device
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
    kl_se: float | None = None
    """Standard error of `kl` over sequences, nats per token; None for fewer than two of them."""

    @property
    def student_perplexity(self) -> float:
        return math.exp(min(self.student_ce, 700.0))

    @property
    def teacher_perplexity(self) -> float:
        return math.exp(min(self.teacher_ce, 700.0))

    @classmethod
    def from_sequences(cls, sums: Tensor) -> EvalStats:
        """From the sums over each sequence, [S, 5]: those of `STATISTICS` and the tokens; sequences without any do not count.

        The mean over tokens is a ratio of two means over sequences; its standard error is that of the ratio
        (Cochran, Sampling Techniques, 3rd ed., section 2.11): the spread of what a sequence adds beyond its tokens' share.
        """
        counted = sums[sums[:, -1] > 0]
        tokens = int(counted[:, -1].sum())
        means = (counted[:, :-1].sum(0) / tokens).tolist()
        beyond = counted[:, 0] - means[0] * counted[:, -1]
        sequences = len(counted)
        spread = float(beyond.square().sum()) * sequences / (sequences - 1) if sequences > 1 else None
        error = None if spread is None else math.sqrt(spread) / tokens
        return cls(**dict(zip(STATISTICS, means, strict=True)), tokens=tokens, kl_se=error)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> EvalStats:
        return cls(**{name: value for name, value in values.items() if name in cls.__dataclass_fields__})

    def to_dict(self) -> dict[str, Any]:
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
    sums = sequence_statistics(
        FrozenTeacher(teacher, compute_dtype), StudentLoss(student, compute_dtype, chunk_tokens), batches
    )
    return EvalStats.from_sequences(sums)


@torch.no_grad()
def sequence_statistics(teacher: nn.Module, student: nn.Module, batches: Iterable[tuple[Tensor, Tensor]]) -> Tensor:
    """`token_statistics` summed over each sequence of this rank's batches, and their counts: [S, 5] fp64 on the device.

    Args:
        teacher: a `FrozenTeacher`.
        student: a `StudentLoss`, possibly wrapped by accelerate.
        batches: (tokens [B, T], mask [B, T]) pairs.
    """
    device = next(student.parameters()).device
    training, sums = student.training, []
    student.eval()
    for tokens, mask in batches:
        tokens, mask = to_device(tokens, device), to_device(mask, device)
        sums.append(student(tokens, teacher(tokens), mask_BT=mask, statistics=True))
    student.train(training)
    return torch.cat(sums)
