"""The vocabulary losses, in chunks: KL, generalised JSD and cross-entropy from hidden states.

The logits of a batch (tokens x vocabulary) are by far the largest tensors of distillation: 32 x 1024 tokens over
49,152 words are 6.4 GB in fp32, and a dense loss holds about seven of them. Here the logits of `chunk` tokens at
a time are made from the last hidden states, turned into loss and gradient, and dropped: a few buffers of
chunk x V. Temperature is 1, and a divergence is not mixed with cross-entropy, which hurt in Puzzle (arXiv 2411.19146)
and in Minitron (arXiv 2407.14679).

With z the student's logits, q = softmax(z) the student, p the teacher, y the true next token:

    KL  = sum_v p_v (log p_v - log q_v)                       dKL / dz_v  = q_v - p_v
    CE  = -log q_y                                            dCE / dz_v  = q_v - [v = y]
    JSD = b KL(p || m) + (1 - b) KL(q || m)                   dJSD / dz_v = (1 - b) q_v (r_v - sum_u q_u r_u)
          m = b p + (1 - b) q,  r_v = log(q_v / m_v)

For JSD, dm_v / dq_v = 1 - b, so that dJSD / dq_v = (1 - b) (r_v + 1 - (b p_v + (1 - b) q_v) / m_v) = (1 - b) r_v;
the softmax then takes its mean under q away, sum_u q_u r_u = KL(q || m). JSD / b tends to KL(p || q) for b -> 0, and
JSD / (1 - b) to KL(q || p) for b -> 1 (arXiv 2306.13649, equation 1 and appendix A).

Shapes: B sequences, T tokens each, N positions that predict a token, n of them in a chunk, D hidden size (D_t the
teacher's), V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from distill.operations import kernels_for


def predicting_mask(tokens_BT: Tensor, mask_BT: Tensor | None = None) -> Tensor:
    """True at the positions that predict a token, [B, T]: the causal shift and the mask, in one place.

    Position t predicts token t + 1, so the last one of a sequence predicts nothing; where a mask (True = real
    token) is given, both t and t + 1 must be real. Right padding needs no attention mask under causal attention.
    """
    real_BT = torch.ones_like(tokens_BT, dtype=torch.bool) if mask_BT is None else mask_BT
    return real_BT & torch.nn.functional.pad(real_BT[:, 1:], (0, 1))


def predicting_positions(x_BT: Tensor, mask_BT: Tensor | None = None) -> Tensor:
    """Selects, flat, the positions of `x` ([B, T, ...]) that are True in `predicting_mask`: [N, ...]."""
    if mask_BT is None:
        return x_BT[:, :-1].flatten(0, 1)
    return x_BT[predicting_mask(mask_BT, mask_BT)]


def next_tokens(tokens_BT: Tensor, mask_BT: Tensor | None = None) -> Tensor:
    """The token that each of `predicting_positions` predicts: [N]."""
    return predicting_positions(torch.roll(tokens_BT, -1, dims=1), mask_BT)


def chunked_kl(
    student_hidden: Tensor,
    student_head: Tensor,
    teacher_hidden: Tensor,
    teacher_head: Tensor,
    *,
    weights: Tensor | None = None,
    normaliser: float | None = None,
    chunk: int = 512,
    compute_dtype: torch.dtype | None = None,
) -> Tensor:
    """Weighted sum of KL(teacher || student) over tokens, divided by `normaliser`; nats.

    Args:
        student_hidden: [N, D], the student's last hidden states (after its final norm). Gets a gradient.
        student_head: [V, D]. Gets a gradient if it requires one; may be the tied embedding.
        teacher_hidden: [N, D_t].
        teacher_head: [V, D_t].
        weights: [N], one weight a token; all ones if None.
        normaliser: what the sum is divided by; the sum of the weights if None. Under accumulation or on several
            ranks this is the token count of the *global* batch, so that the split does not change the loss.
        chunk: tokens whose logits are held at once.
        compute_dtype: dtype of the matrix products' operands (bfloat16 for speed); None keeps the hidden states'.
            Logits, softmax and sums are fp32 whatever it is, or fp64 for fp64 inputs.

    Returns:
        A scalar, in fp32 (fp64 for fp64 inputs).
    """
    target = _TeacherLogits.of(teacher_hidden, teacher_head, compute_dtype)
    return _chunked(_kl, target, student_hidden, student_head, weights, normaliser, chunk, compute_dtype)


def chunked_jsd(
    student_hidden: Tensor,
    student_head: Tensor,
    teacher_hidden: Tensor,
    teacher_head: Tensor,
    *,
    beta: float = 0.5,
    weights: Tensor | None = None,
    normaliser: float | None = None,
    chunk: int = 512,
    compute_dtype: torch.dtype | None = None,
) -> Tensor:
    """The same of the generalised Jensen-Shannon divergence; `beta`, strictly between 0 and 1, is the teacher's share."""
    target = _TeacherLogits.of(teacher_hidden, teacher_head, compute_dtype)
    divergence = partial(_jsd, beta=beta)
    return _chunked(divergence, target, student_hidden, student_head, weights, normaliser, chunk, compute_dtype)


def chunked_ce(
    student_hidden: Tensor,
    student_head: Tensor,
    labels: Tensor,
    *,
    weights: Tensor | None = None,
    normaliser: float | None = None,
    chunk: int = 512,
    compute_dtype: torch.dtype | None = None,
) -> Tensor:
    """The same of the cross-entropy on the true next tokens `labels` [N], without a teacher."""
    target = _Labels(labels)
    return _chunked(_ce, target, student_hidden, student_head, weights, normaliser, chunk, compute_dtype)


@dataclass(frozen=True)
class _TeacherLogits:
    """What the student is compared with: the teacher's distribution, [n, V] logits a chunk."""

    hidden: Tensor
    head: Tensor

    @classmethod
    def of(cls, hidden: Tensor, head: Tensor, compute_dtype: torch.dtype | None) -> _TeacherLogits:
        return cls(hidden.detach(), head.detach().to(compute_dtype or hidden.dtype))

    def rows(self, rows: slice, dtype: torch.dtype) -> Tensor:
        return _logits(self.hidden[rows], self.head, dtype)


@dataclass(frozen=True)
class _Labels:
    """What the student is compared with: the true next tokens, [n] a chunk."""

    tokens: Tensor

    def rows(self, rows: slice, dtype: torch.dtype) -> Tensor:
        return self.tokens[rows]


Target = _TeacherLogits | _Labels
Divergence = Callable[[Tensor, Tensor, Tensor, torch.dtype | None], tuple[Tensor, Tensor | None]]
"""Of a chunk: (student's logits [n, V], rows of the target, weight of each token [n], gradient's dtype or None) to the
weighted sum and its gradient by the logits [n, V], None where no dtype is given. The logits are spent."""


def _chunked(
    divergence: Divergence,
    target: Target,
    student_hidden: Tensor,
    student_head: Tensor,
    weights: Tensor | None,
    normaliser: float | None,
    chunk: int,
    compute_dtype: torch.dtype | None,
) -> Tensor:
    if normaliser is None:
        normaliser = float(student_hidden.shape[0] if weights is None else weights.sum())
    if weights is None:
        weights = student_hidden.new_ones(student_hidden.shape[0], dtype=accumulation_dtype(student_hidden))
    wants_gradient = torch.is_grad_enabled() and (student_hidden.requires_grad or student_head.requires_grad)
    settings = (divergence, target, chunk, compute_dtype, wants_gradient)
    loss: Tensor = _ChunkedLoss.apply(student_hidden, student_head, weights / normaliser, *settings)
    return loss


class _ChunkedLoss(torch.autograd.Function):
    """Makes the gradients in the forward pass, while a chunk's logits exist, so that none is computed twice."""

    @staticmethod
    def forward(
        ctx: Any,
        student_hidden: Tensor,
        student_head: Tensor,
        scale: Tensor,
        divergence: Divergence,
        target: Target,
        chunk: int,
        compute_dtype: torch.dtype | None,
        wants_gradient: bool,
    ) -> Tensor:
        dtype = accumulation_dtype(student_hidden)
        loss = student_hidden.new_zeros((), dtype=dtype)
        hidden_gradient = torch.empty_like(student_hidden) if wants_gradient and ctx.needs_input_grad[0] else None
        head_gradient = (
            torch.zeros_like(student_head, dtype=dtype) if wants_gradient and ctx.needs_input_grad[1] else None
        )
        with torch.autocast(student_hidden.device.type, enabled=False):
            head = student_head.to(compute_dtype or student_hidden.dtype)
            wanted = head.dtype if hidden_gradient is not None or head_gradient is not None else None
            for rows in _chunks(len(student_hidden), chunk):
                logits = _logits(student_hidden[rows], head, dtype)
                part, logit_gradient = divergence(logits, target.rows(rows, dtype), scale[rows].to(dtype), wanted)
                del logits  # a chunk's are gone before the next one's are made
                loss += part
                if logit_gradient is None:
                    continue
                if hidden_gradient is not None:
                    hidden_gradient[rows] = _product(logit_gradient, head).to(hidden_gradient.dtype)
                if head_gradient is not None:
                    _add_product(head_gradient, logit_gradient.T, student_hidden[rows].to(head.dtype))
                del logit_gradient
        ctx.save_for_backward(hidden_gradient, None if head_gradient is None else head_gradient.to(student_head.dtype))
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, loss_gradient: Tensor) -> tuple[Tensor | None, ...]:
        gradients = [None if g is None else g * loss_gradient.to(g.dtype) for g in ctx.saved_tensors]
        return (*gradients, None, None, None, None, None, None)


def _kl(
    student: Tensor, teacher: Tensor, scale_n: Tensor, gradient_dtype: torch.dtype | None
) -> tuple[Tensor, Tensor | None]:
    """KL(teacher || student): in one kernel on a GPU, which reads the logits twice and writes the gradient; elsewhere in a
    dozen passes over them and one further buffer."""
    kernels = kernels_for(student)
    if kernels is not None:
        gradient = None if gradient_dtype is None else torch.empty_like(student, dtype=gradient_dtype)
        return kernels.kl_rows(student, teacher, scale_n, gradient).sum(), gradient
    log_q, log_p = _log_softmax_(student), _log_softmax_(teacher)
    p = log_p.exp()
    loss = log_p.sub_(log_q).mul_(p).sum(-1) @ scale_n
    if gradient_dtype is None:
        return loss, None
    return loss, log_q.exp_().sub_(p).mul_(scale_n[:, None]).to(gradient_dtype)


def _jsd(
    student: Tensor, teacher: Tensor, scale_n: Tensor, gradient_dtype: torch.dtype | None, *, beta: float
) -> tuple[Tensor, Tensor | None]:
    """Generalised JSD. The buffers of the spent logits hold log m and the log ratios, so that no further ones are made."""
    log_q, log_p = student.log_softmax(-1), teacher.log_softmax(-1)
    torch.add(log_p, math.log(beta), out=teacher)
    torch.add(log_q, math.log1p(-beta), out=student)
    log_m = torch.logaddexp(teacher, student, out=teacher)
    weighted_q = torch.sub(log_q, log_m, out=student)
    weighted_p = torch.sub(log_p, log_m, out=teacher)
    q, p = log_q.exp_(), log_p.exp_()
    kl_q_n, kl_p_n = weighted_q.mul_(q).sum(-1), weighted_p.mul_(p).sum(-1)
    loss = (beta * kl_p_n + (1 - beta) * kl_q_n) @ scale_n
    if gradient_dtype is None:
        return loss, None
    gradient = weighted_q.addcmul_(q, kl_q_n[:, None], value=-1).mul_((1 - beta) * scale_n[:, None])
    return loss, gradient.to(gradient_dtype)


def _ce(
    student: Tensor, labels_n: Tensor, scale_n: Tensor, gradient_dtype: torch.dtype | None
) -> tuple[Tensor, Tensor | None]:
    """Cross-entropy on the labels, in the buffer of the logits alone."""
    student.sub_(student.amax(-1, keepdim=True))
    of_label_n = student.gather(1, labels_n[:, None])[:, 0]
    sum_n = student.exp_().sum(-1)
    loss = (sum_n.log() - of_label_n) @ scale_n
    if gradient_dtype is None:
        return loss, None
    gradient = student.div_(sum_n[:, None])
    gradient[torch.arange(len(labels_n), device=labels_n.device), labels_n] -= 1
    return loss, gradient.mul_(scale_n[:, None]).to(gradient_dtype)


STATISTICS = ("kl", "student_ce", "teacher_ce", "top1_agreement")
"""Columns of `token_statistics`."""


@torch.no_grad()
def token_statistics(
    student_hidden: Tensor,
    student_head: Tensor,
    teacher_hidden: Tensor,
    teacher_head: Tensor,
    labels: Tensor,
    *,
    chunk: int = 512,
    compute_dtype: torch.dtype | None = None,
) -> Tensor:
    """What an evaluation reports of each token, in the same chunks and precision as `chunked_kl`.

    Args:
        labels: [N], the true next tokens; the others as in `chunked_kl`.

    Returns:
        [N, 4] in the order of `STATISTICS`, fp32 (fp64 for fp64 inputs): KL(teacher || student) and the
        cross-entropies of student and teacher on the labels (nats), and 1 where both have the same most likely next
        token, else 0.
    """
    result = student_hidden.new_empty(len(labels), len(STATISTICS), dtype=accumulation_dtype(student_hidden))
    with torch.autocast(student_hidden.device.type, enabled=False):
        head = student_head.to(compute_dtype or student_hidden.dtype)
        target = _TeacherLogits.of(teacher_hidden, teacher_head, compute_dtype)
        for rows in _chunks(len(labels), chunk):
            log_q = _log_softmax_(_logits(student_hidden[rows], head, result.dtype))
            log_p = _log_softmax_(target.rows(rows, result.dtype))
            label_N1 = labels[rows, None]
            agreement = log_p.argmax(-1) == log_q.argmax(-1)
            student_ce, teacher_ce = (-log.gather(1, label_N1)[:, 0] for log in (log_q, log_p))
            kl = log_p.exp().mul_(log_p.sub_(log_q)).sum(-1)
            result[rows] = torch.stack([kl, student_ce, teacher_ce, agreement.to(kl.dtype)], dim=1)
    return result


def _chunks(tokens: int, chunk: int) -> Iterator[slice]:
    return (slice(start, start + chunk) for start in range(0, tokens, chunk))


def _logits(hidden: Tensor, head: Tensor, dtype: torch.dtype) -> Tensor:
    """[n, V] in `dtype`, the product in that of the head."""
    return _product(hidden.to(head.dtype), head.T).to(dtype)


def _log_softmax_(logits: Tensor) -> Tensor:
    """The log-softmax in the place of the logits, with one buffer of their size on the way."""
    logits.sub_(logits.amax(-1, keepdim=True))
    return logits.sub_(logits.exp().sum(-1, keepdim=True).log_())


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b; the fp32 sums of a half-precision product are kept, not rounded, where the device can (CUDA)."""
    if a.is_cuda and a.dtype in (torch.bfloat16, torch.float16):
        return torch.mm(a, b, out_dtype=torch.float32)
    return a @ b


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b, without a second tensor of its size where the dtypes are one."""
    if a.dtype == b.dtype == total.dtype:
        total.addmm_(a, b)
    else:
        total += _product(a, b)


def accumulation_dtype(tensor: Tensor) -> torch.dtype:
    """fp32, or fp64 for an fp64 tensor: what sums over it are kept in."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32
