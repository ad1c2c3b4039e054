"""Teacher and student as modules whose `forward` is all of their work.

DDP and FSDP act in hooks around a module's `forward`, and parameters touched outside of it (such as a head used
by a loss) would be left unsynchronised or sharded. So the student's loss is computed inside the wrapped module.
"""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn

from blocks.errors import ConfigError
from distill.decoder import Packed, last_hidden, prepare
from distill.loss import chunked_kl, next_tokens, predicting_positions, token_statistics


class FrozenTeacher(nn.Module):
    """The parent: gives last hidden states and head, never a gradient.

    Args:
        model: a Hugging Face causal LM, `model.model` its decoder and `model.lm_head` its head.
        compute_dtype: dtype of its matrix products; see `DistillConfig.compute_dtype`. Weights of another dtype are held
            a second time in this one; weights that have it already are not.
    """

    def __init__(self, model: nn.Module, compute_dtype: str = "float32") -> None:
        super().__init__()
        self.model = model.eval().requires_grad_(False)
        self.compute_dtype = compute_dtype
        self._fused = prepare(model)
        self._packed: Packed = {}
        self._rounded_head: Tensor | None = None

    @torch.no_grad()
    def forward(self, tokens_BT: Tensor) -> tuple[Tensor, Tensor]:
        """Last hidden states [B, T, D_t] and head [V, D_t]."""
        if self._rounded_head is None:  # here, once the model lies where it stays
            head = _head(self.model)
            self._rounded_head = head.to(_dtype(self.compute_dtype) or head.dtype)
        if self._fused:
            return last_hidden(self.model, tokens_BT, _dtype(self.compute_dtype), self._packed), self._rounded_head
        with autocast(tokens_BT.device, self.compute_dtype):
            return _last_hidden(self.model, tokens_BT), self._rounded_head


class StudentLoss(nn.Module):
    """The student together with its loss: tokens and teacher states in, one scalar out.

    Other losses (cosine of hidden states, JSD, cross-entropy) are further terms of `forward`.
    """

    def __init__(self, student: nn.Module, compute_dtype: str = "float32", chunk_tokens: int = 512) -> None:
        super().__init__()
        self.student = student
        self.compute_dtype = compute_dtype
        self.chunk_tokens = chunk_tokens
        self._fused = prepare(student)

    def forward(
        self,
        tokens_BT: Tensor,
        teacher_hidden_BTD: Tensor,
        teacher_head_VD: Tensor,
        *,
        mask_BT: Tensor | None = None,
        normaliser: float | None = None,
        statistics: bool = False,
    ) -> Tensor:
        """The batch's summed KL over `normaliser`; or, if `statistics`, what an evaluation reports of each sequence.

        Args:
            mask_BT: True where a token is real; None if all are.
            normaliser: predicting positions of the global batch; this batch's own if None.

        Returns:
            A scalar; or [B, 5] fp64, the sums of `token_statistics` over each sequence and their count.
        """
        dtype = _dtype(self.compute_dtype)
        if self._fused:
            hidden_BTD = last_hidden(self.student, tokens_BT, dtype)
        else:
            with autocast(tokens_BT.device, self.compute_dtype):
                hidden_BTD = _last_hidden(self.student, tokens_BT)
        hidden = predicting_positions(hidden_BTD, mask_BT)
        target = predicting_positions(teacher_hidden_BTD, mask_BT)
        states = (hidden, _head(self.student), target, teacher_head_VD)
        if statistics:
            labels = next_tokens(tokens_BT, mask_BT)
            values = token_statistics(*states, labels, chunk=self.chunk_tokens, compute_dtype=dtype)
            return _sums_of_sequences(values, mask_BT, tokens_BT)
        return chunked_kl(*states, normaliser=normaliser, chunk=self.chunk_tokens, compute_dtype=dtype)


def _sums_of_sequences(values_NC: Tensor, mask_BT: Tensor | None, tokens_BT: Tensor) -> Tensor:
    """Adds up the rows that belong to each sequence, and counts them: [B, C + 1] fp64."""
    sequence_BT = torch.arange(len(tokens_BT), device=tokens_BT.device)[:, None].expand(tokens_BT.shape)
    rows = torch.nn.functional.pad(values_NC.double(), (0, 1), value=1.0)
    sums = rows.new_zeros(len(tokens_BT), rows.shape[1])
    return sums.index_add_(0, predicting_positions(sequence_BT, mask_BT), rows)


def check_pair(teacher: nn.Module, student: nn.Module) -> int:
    """The common vocabulary size. Raises ConfigError if the student was not cut from such a teacher."""
    sizes = _head(teacher).shape[0], _head(student).shape[0]
    if sizes[0] != sizes[1]:
        raise ConfigError(
            f"parent and child have different vocabularies ({sizes[0]} and {sizes[1]}): not parent and child"
        )
    return int(sizes[0])


def keep_master_weights(student: nn.Module) -> nn.Module:
    """The student with half-precision parameters raised to fp32, in place; small updates vanish in bfloat16."""
    halves = (torch.bfloat16, torch.float16)
    return student.float() if any(p.dtype in halves for p in student.parameters()) else student


def autocast(device: torch.device, compute_dtype: str) -> AbstractContextManager[None]:
    """Autocast to `compute_dtype` on `device`; nothing for float32.

    Ours rather than `Accelerator(mixed_precision=...)`, whose setting is a process-wide singleton: training and a
    standalone `evaluate` must use the same arithmetic, and one process may heal twice with different dtypes.
    """
    return torch.autocast(device.type, torch.bfloat16, enabled=compute_dtype == "bfloat16")


def _dtype(compute_dtype: str) -> torch.dtype | None:
    """Of matrix products; None leaves that of the weights."""
    return torch.bfloat16 if compute_dtype == "bfloat16" else None


def _last_hidden(model: nn.Module, tokens_BT: Tensor) -> Tensor:
    hidden: Tensor = model.model(input_ids=tokens_BT, use_cache=False).last_hidden_state  # type: ignore[operator]
    return hidden


def _head(model: nn.Module) -> Tensor:
    head: Tensor = model.lm_head.weight  # type: ignore[union-attr, assignment]
    return head
