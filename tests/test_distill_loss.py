"""The chunked vocabulary loss equals the dense one, in value and gradient."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from distill.loss import chunked_kl, next_tokens, predicting_positions, token_statistics

TOKENS, HIDDEN, TEACHER_HIDDEN, VOCABULARY = 37, 16, 24, 101


def dense_kl(hidden: Tensor, head: Tensor, teacher_hidden: Tensor, teacher_head: Tensor, weights: Tensor) -> Tensor:
    log_q, log_p = (hidden @ head.T).log_softmax(-1), (teacher_hidden @ teacher_head.T).log_softmax(-1)
    return ((log_p.exp() * (log_p - log_q)).sum(-1) * weights).sum() / weights.sum()


def states(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = (TOKENS, HIDDEN), (VOCABULARY, HIDDEN), (TOKENS, TEACHER_HIDDEN), (VOCABULARY, TEACHER_HIDDEN)
    hidden, head, teacher_hidden, teacher_head = (torch.randn(s, generator=generator, dtype=dtype) for s in shapes)
    return hidden.requires_grad_(), head.requires_grad_(), teacher_hidden, teacher_head


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
@pytest.mark.parametrize("chunk", [1, 8, 37, 1000])
def test_equals_dense_in_value_and_gradient(dtype: torch.dtype, tolerance: float, chunk: int) -> None:
    hidden, head, *teacher = states(dtype)
    weights = torch.rand(TOKENS, dtype=dtype, generator=torch.Generator().manual_seed(1))
    expected = dense_kl(hidden, head, *teacher, weights)
    expected_gradients = torch.autograd.grad(3 * expected, (hidden, head))
    value = chunked_kl(hidden, head, *teacher, weights=weights, chunk=chunk)
    assert value.dtype == dtype
    assert value.item() == pytest.approx(expected.item(), rel=tolerance)
    for found, wanted in zip(torch.autograd.grad(3 * value, (hidden, head)), expected_gradients, strict=True):
        torch.testing.assert_close(found, wanted, rtol=tolerance, atol=tolerance)


def test_gradcheck() -> None:
    hidden, head, *teacher = states()
    small = (hidden[:5].detach().requires_grad_(), head, teacher[0][:5], teacher[1])
    assert torch.autograd.gradcheck(lambda h, w: chunked_kl(h, w, *small[2:], chunk=2), small[:2])


def test_tied_head_collects_both_gradients() -> None:
    """Where the head is the embedding, its gradient is the sum of both uses."""
    _, _, teacher_hidden, teacher_head = states()
    table = torch.randn(VOCABULARY, HIDDEN, dtype=torch.float64, requires_grad=True)
    tokens = torch.arange(TOKENS)
    mixing = torch.randn(HIDDEN, HIDDEN, dtype=torch.float64)

    def gradient(loss: Tensor) -> Tensor:
        return torch.autograd.grad(loss, table)[0]

    hidden = table[tokens] @ mixing
    expected = gradient(dense_kl(hidden, table, teacher_hidden, teacher_head, torch.ones(TOKENS, dtype=torch.float64)))
    found = gradient(chunked_kl(table[tokens] @ mixing, table, teacher_hidden, teacher_head, chunk=8))
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


def test_frozen_head_gets_no_gradient() -> None:
    hidden, head, *teacher = states()
    expected = torch.autograd.grad(chunked_kl(hidden, head, *teacher), hidden)[0]
    frozen = head.detach()
    loss = chunked_kl(hidden, frozen, *teacher, chunk=8)
    loss.backward()
    assert frozen.grad is None
    torch.testing.assert_close(hidden.grad, expected, rtol=1e-12, atol=1e-12)


def test_accumulation_with_the_global_normaliser() -> None:
    """Parts of a batch, each divided by the whole count, add up to the loss of the whole."""
    hidden, head, teacher_hidden, teacher_head = states()
    whole = torch.autograd.grad(chunked_kl(hidden, head, teacher_hidden, teacher_head), head)[0]
    total = torch.zeros_like(whole)
    for rows in (slice(0, 3), slice(3, 20), slice(20, TOKENS)):
        part = chunked_kl(hidden[rows], head, teacher_hidden[rows], teacher_head, normaliser=TOKENS)
        total += torch.autograd.grad(part, head)[0]
    torch.testing.assert_close(total, whole, rtol=1e-10, atol=1e-12)


def test_equal_models_have_no_loss_and_no_gradient() -> None:
    hidden, head, _, _ = states(torch.float32)
    loss = chunked_kl(hidden, head, hidden.detach(), head.detach(), chunk=8)
    loss.backward()
    assert loss.item() == 0
    assert hidden.grad is not None and hidden.grad.abs().max() == 0


def test_bfloat16_products_stay_close() -> None:
    hidden, head, *teacher = states(torch.float32)
    exact = chunked_kl(hidden * 0.3, head, *(t * 0.3 for t in teacher))
    rounded = chunked_kl(hidden * 0.3, head, *(t * 0.3 for t in teacher), compute_dtype=torch.bfloat16)
    assert rounded.dtype == torch.float32
    assert rounded.item() == pytest.approx(exact.item(), rel=0.05)


def test_logits_of_more_than_a_chunk_never_exist() -> None:
    """The largest tensor made anywhere in forward and backward is a chunk of logits or a head."""
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            for tensor in out if isinstance(out, tuple | list) else [out]:
                if isinstance(tensor, Tensor):
                    largest = max(largest, tensor.numel())
            return out

    hidden, head, *teacher = states(torch.float32)
    with Watch():
        chunked_kl(hidden, head, *teacher, chunk=4).backward()
    assert largest <= max(4 * VOCABULARY, VOCABULARY * TEACHER_HIDDEN) < TOKENS * VOCABULARY


def test_causal_shift_and_padding() -> None:
    tokens = torch.tensor([[5, 6, 7, 0], [8, 9, 0, 0]])
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0]], dtype=torch.bool)
    assert predicting_positions(tokens, mask).tolist() == [5, 6, 8]
    assert next_tokens(tokens, mask).tolist() == [6, 7, 9]
    assert predicting_positions(tokens).tolist() == [5, 6, 7, 8, 9, 0]
    assert next_tokens(tokens).tolist() == [6, 7, 0, 9, 0, 0]


def test_token_statistics_equal_dense() -> None:
    hidden, head, teacher_hidden, teacher_head = states()
    labels = torch.arange(TOKENS)
    values = token_statistics(hidden, head, teacher_hidden, teacher_head, labels, chunk=8)
    assert values.shape == (TOKENS, 4)
    kl, student_ce, teacher_ce, agreement = values.sum(0).tolist()
    student_logits, teacher_logits = hidden @ head.T, teacher_hidden @ teacher_head.T
    dense = dense_kl(hidden, head, teacher_hidden, teacher_head, torch.ones(TOKENS, dtype=torch.float64))
    assert kl == pytest.approx(dense.item() * TOKENS, rel=1e-10)
    cross_entropy = torch.nn.functional.cross_entropy
    assert student_ce == pytest.approx(cross_entropy(student_logits, labels, reduction="sum").item(), rel=1e-10)
    assert teacher_ce == pytest.approx(cross_entropy(teacher_logits, labels, reduction="sum").item(), rel=1e-10)
    assert agreement == (student_logits.argmax(-1) == teacher_logits.argmax(-1)).sum().item()
