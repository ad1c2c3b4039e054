"""The vocabulary loss, in chunks: forward KL(teacher || student) from hidden states.

The logits of a batch (tokens x vocabulary) are by far the largest tensors of distillation: 32 x 1024 tokens over
49,152 words are 6.4 GB in fp32, and a dense loss holds about seven of them. Here the logits of `chunk` tokens at
a time are made from the last hidden states, turned into loss and gradient, and dropped: three buffers of
chunk x V. Temperature is 1 and there is no cross-entropy term, which hurt in Puzzle (arXiv 2411.19146)
and in Minitron (arXiv 2407.14679).

    KL = sum_v p_v (log p_v - log q_v)        dKL / d(student logit) = q - p        p teacher, q student

Shapes: B sequences, T tokens each, N positions that predict a token, D hidden size (D_t the teacher's), V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from distill.operations import kernels_for


def predicting_positions(x_BT: Tensor, mask_BT: Tensor | None = None) -> Tensor:
    """Selects, flat, the positions of `x` ([B, T, ...]) that predict a token: the causal shift and the mask.

    Position t predicts token t + 1, so the last one of a sequence predicts nothing; where a mask (True = real
    token) is given, both t and t + 1 must be real. Right padding needs no attention mask under causal attention.
    Returns [N, ...].
    """
    if mask_BT is None:
        return x_BT[:, :-1].flatten(0, 1)
    return x_BT[:, :-1][mask_BT[:, :-1] & mask_BT[:, 1:]]


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
    if normaliser is None:
        normaliser = float(student_hidden.shape[0] if weights is None else weights.sum())
    if weights is None:
        weights = student_hidden.new_ones(student_hidden.shape[0], dtype=_accumulation_dtype(student_hidden))
    wants_gradient = torch.is_grad_enabled() and (student_hidden.requires_grad or student_head.requires_grad)
    arguments = (student_hidden, student_head, teacher_hidden.detach(), teacher_head.detach(), weights / normaliser)
    loss: Tensor = _ChunkedKL.apply(*arguments, chunk, compute_dtype, wants_gradient)
    return loss


class _ChunkedKL(torch.autograd.Function):
    """Makes the gradients in the forward pass, while a chunk's logits exist, so that none is computed twice."""

    @staticmethod
    def forward(
        ctx: Any,
        student_hidden: Tensor,
        student_head: Tensor,
        teacher_hidden: Tensor,
        teacher_head: Tensor,
        scale: Tensor,
        chunk: int,
        compute_dtype: torch.dtype | None,
        wants_gradient: bool,
    ) -> Tensor:
        dtype = _accumulation_dtype(student_hidden)
        loss = student_hidden.new_zeros((), dtype=dtype)
        hidden_gradient = torch.empty_like(student_hidden) if wants_gradient and ctx.needs_input_grad[0] else None
        head_gradient = (
            torch.zeros_like(student_head, dtype=dtype) if wants_gradient and ctx.needs_input_grad[1] else None
        )
        with torch.autocast(student_hidden.device.type, enabled=False):
            head = student_head.to(compute_dtype or student_hidden.dtype)
            logits = _logits(student_hidden, head, teacher_hidden, teacher_head, chunk, compute_dtype)
            wanted = head.dtype if hidden_gradient is not None or head_gradient is not None else None
            for rows, student_logits, teacher_logits in logits:
                part, logit_gradient = _kl_and_gradient(student_logits, teacher_logits, scale[rows].to(dtype), wanted)
                loss += part
                if logit_gradient is None:
                    continue
                if hidden_gradient is not None:
                    hidden_gradient[rows] = _product(logit_gradient, head).to(hidden_gradient.dtype)
                if head_gradient is not None:
                    head_gradient += _product(logit_gradient.T, student_hidden[rows].to(head.dtype))
        ctx.save_for_backward(hidden_gradient, None if head_gradient is None else head_gradient.to(student_head.dtype))
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, loss_gradient: Tensor) -> tuple[Tensor | None, ...]:
        gradients = [None if g is None else g * loss_gradient.to(g.dtype) for g in ctx.saved_tensors]
        return (*gradients, None, None, None, None, None, None)


def _kl_and_gradient(
    student: Tensor, teacher: Tensor, scale_n: Tensor, gradient_dtype: torch.dtype | None
) -> tuple[Tensor, Tensor | None]:
    """The scaled sum of KL(teacher || student) of a chunk's logits [n, V], and its gradient; the logits are spent.

    In one kernel on a GPU, which reads the logits twice and writes the gradient; in nine passes over them elsewhere.
    """
    kernels = kernels_for(student)
    if kernels is not None:
        gradient = None if gradient_dtype is None else torch.empty_like(student, dtype=gradient_dtype)
        return kernels.kl_rows(student, teacher, scale_n, gradient).sum(), gradient
    log_q, log_p = student.log_softmax(-1), teacher.log_softmax(-1)
    p = log_p.exp()
    loss = log_p.sub_(log_q).mul_(p).sum(-1) @ scale_n
    if gradient_dtype is None:
        return loss, None
    return loss, log_q.exp_().sub_(p).mul_(scale_n[:, None]).to(gradient_dtype)


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
    result = student_hidden.new_empty(len(labels), len(STATISTICS), dtype=_accumulation_dtype(student_hidden))
    with torch.autocast(student_hidden.device.type, enabled=False):
        head = student_head.to(compute_dtype or student_hidden.dtype)
        logits = _logits(student_hidden, head, teacher_hidden, teacher_head, chunk, compute_dtype)
        for rows, *both in logits:
            log_q, log_p = (each.log_softmax(-1) for each in both)
            del both
            label_N1 = labels[rows, None]
            agreement = log_p.argmax(-1) == log_q.argmax(-1)
            student_ce, teacher_ce = (-log.gather(1, label_N1)[:, 0] for log in (log_q, log_p))
            kl = log_p.exp().mul_(log_p.sub_(log_q)).sum(-1)
            result[rows] = torch.stack([kl, student_ce, teacher_ce, agreement.to(kl.dtype)], dim=1)
    return result


def _logits(
    student_hidden: Tensor,
    student_head: Tensor,
    teacher_hidden: Tensor,
    teacher_head: Tensor,
    chunk: int,
    compute_dtype: torch.dtype | None,
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Yields (rows, student's logits [n, V], teacher's [n, V]) for each chunk of n tokens, in the accumulation dtype."""
    dtype = _accumulation_dtype(student_hidden)
    teacher_head = teacher_head.to(compute_dtype or teacher_hidden.dtype)
    for start in range(0, student_hidden.shape[0], chunk):
        rows = slice(start, start + chunk)
        student, teacher = (
            _product(hidden[rows].to(head.dtype), head.T).to(dtype)
            for hidden, head in ((student_hidden, student_head), (teacher_hidden, teacher_head))
        )
        yield rows, student, teacher


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b; the fp32 sums of a half-precision product are kept, not rounded, where the device can (CUDA)."""
    if a.is_cuda and a.dtype in (torch.bfloat16, torch.float16):
        return torch.mm(a, b, out_dtype=torch.float32)
    return a @ b


def _accumulation_dtype(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32
