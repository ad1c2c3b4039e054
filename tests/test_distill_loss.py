"""The chunked vocabulary losses equal the dense ones, in value and gradient, and in a quarter of their memory."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from distill.loss import (
    chunked_ce,
    chunked_jsd,
    chunked_kl,
    next_tokens,
    predicting_mask,
    predicting_positions,
    token_statistics,
)

TOKENS, HIDDEN, TEACHER_HIDDEN, VOCABULARY = 37, 16, 24, 101
Loss = Callable[..., Tensor]


def dense_kl(hidden: Tensor, head: Tensor, teacher_hidden: Tensor, teacher_head: Tensor, weights: Tensor) -> Tensor:
    log_q, log_p = (hidden @ head.T).log_softmax(-1), (teacher_hidden @ teacher_head.T).log_softmax(-1)
    return ((log_p.exp() * (log_p - log_q)).sum(-1) * weights).sum() / weights.sum()


def dense_jsd(
    hidden: Tensor, head: Tensor, teacher_hidden: Tensor, teacher_head: Tensor, weights: Tensor, *, beta: float
) -> Tensor:
    q, p = F.softmax(hidden @ head.T, -1), F.softmax(teacher_hidden @ teacher_head.T, -1)
    m = beta * p + (1 - beta) * q
    jsd = beta * F.kl_div(m.log(), p, reduction="none") + (1 - beta) * F.kl_div(m.log(), q, reduction="none")
    return (jsd.sum(-1) * weights).sum() / weights.sum()


def dense_ce(hidden: Tensor, head: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
    return (F.cross_entropy(hidden @ head.T, labels, reduction="none") * weights).sum() / weights.sum()


def labels() -> Tensor:
    return torch.randint(VOCABULARY, (TOKENS,), generator=torch.Generator().manual_seed(5))


BOTH: dict[str, tuple[Loss, Loss]] = {
    "kl": (chunked_kl, dense_kl),
    "jsd": (chunked_jsd, partial(dense_jsd, beta=0.5)),
    "jsd 0.1": (partial(chunked_jsd, beta=0.1), partial(dense_jsd, beta=0.1)),
    "jsd 0.9": (partial(chunked_jsd, beta=0.9), partial(dense_jsd, beta=0.9)),
    "ce": (chunked_ce, dense_ce),
}


def compared(name: str, teacher: list[Tensor]) -> list[Tensor]:
    """What the student is compared with: the teacher's hidden states and head, or the labels."""
    return [labels()] if name == "ce" else teacher


def states(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = (TOKENS, HIDDEN), (VOCABULARY, HIDDEN), (TOKENS, TEACHER_HIDDEN), (VOCABULARY, TEACHER_HIDDEN)
    hidden, head, teacher_hidden, teacher_head = (torch.randn(s, generator=generator, dtype=dtype) for s in shapes)
    return hidden.requires_grad_(), head.requires_grad_(), teacher_hidden, teacher_head


@pytest.mark.parametrize("name", BOTH)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
@pytest.mark.parametrize("chunk", [1, 8, 37, 1000])
def test_equals_dense_in_value_and_gradient(name: str, dtype: torch.dtype, tolerance: float, chunk: int) -> None:
    chunked, dense = BOTH[name]
    hidden, head, *teacher = states(dtype)
    weights = torch.rand(TOKENS, dtype=dtype, generator=torch.Generator().manual_seed(1))
    # The reference in fp64, as an fp32 one would be off by as much as is allowed.
    exact = [tensor.detach().double().requires_grad_() for tensor in (hidden, head)]
    wide = [t.double() if t.is_floating_point() else t for t in compared(name, teacher)]
    expected = dense(*exact, *wide, weights=weights.double())
    expected_gradients = torch.autograd.grad(3 * expected, exact)
    value = chunked(hidden, head, *compared(name, teacher), weights=weights, chunk=chunk)
    assert value.dtype == dtype
    assert value.item() == pytest.approx(expected.item(), rel=tolerance)
    for found, wanted in zip(torch.autograd.grad(3 * value, (hidden, head)), expected_gradients, strict=True):
        torch.testing.assert_close(found.double(), wanted, rtol=tolerance, atol=tolerance)
    with torch.no_grad():
        again = chunked(hidden, head, *compared(name, teacher), weights=weights, chunk=chunk)
    torch.testing.assert_close(again, value.detach(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", BOTH)
def test_gradcheck(name: str) -> None:
    hidden, head, *teacher = states()
    inputs = [tensor.detach().requires_grad_() for tensor in (hidden[:5, :6], head[:9, :6])]
    rest = [labels()[:5] % 9] if name == "ce" else [teacher[0][:5], teacher[1][:9]]
    assert torch.autograd.gradcheck(lambda h, w: BOTH[name][0](h, w, *rest, chunk=2), inputs)


@pytest.mark.parametrize("name", BOTH)
def test_tied_head_collects_both_gradients(name: str) -> None:
    """Where the head is the embedding, its gradient is the sum of both uses."""
    chunked, dense = BOTH[name]
    rest = compared(name, list(states()[2:]))
    table = torch.randn(VOCABULARY, HIDDEN, dtype=torch.float64, requires_grad=True)
    tokens = torch.arange(TOKENS)
    mixing = torch.randn(HIDDEN, HIDDEN, dtype=torch.float64)

    def gradient(loss: Tensor) -> Tensor:
        return torch.autograd.grad(loss, table)[0]

    expected = gradient(dense(table[tokens] @ mixing, table, *rest, torch.ones(TOKENS, dtype=torch.float64)))
    found = gradient(chunked(table[tokens] @ mixing, table, *rest, chunk=8))
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


def test_jsd_tends_to_forward_and_to_reverse_kl() -> None:
    """JSD / beta for beta -> 0, and JSD / (1 - beta) for beta -> 1, in value and gradient."""
    hidden, head, *teacher = states()
    hidden = (hidden.detach() * 0.3).requires_grad_()  # distributions that are not nearly disjoint
    teacher[0] = teacher[0] * 0.3
    q, p = F.softmax(hidden @ head.T, -1), F.softmax(teacher[0] @ teacher[1].T, -1)
    limits = {1e-7: (p * (p / q).log()).sum(-1).mean(), 1 - 1e-7: (q * (q / p).log()).sum(-1).mean()}
    for beta, limit in limits.items():
        found = chunked_jsd(hidden, head, *teacher, beta=beta, chunk=8) / min(beta, 1 - beta)
        assert found.item() == pytest.approx(limit.item(), rel=1e-4)
        wanted = torch.autograd.grad(limit, head, retain_graph=True)[0]
        torch.testing.assert_close(torch.autograd.grad(found, head)[0], wanted, rtol=1e-3, atol=1e-5)


def test_jsd_is_symmetric_and_bounded_at_one_half() -> None:
    hidden, head, teacher_hidden, teacher_head = (s.detach() for s in states())
    one = chunked_jsd(hidden * 9, head, teacher_hidden * 9, teacher_head)
    other = chunked_jsd(teacher_hidden * 9, teacher_head, hidden * 9, head)
    torch.testing.assert_close(one, other, rtol=1e-12, atol=0)
    assert 0.6 < one.item() < torch.tensor(2.0).log().item()


def test_ce_needs_no_more_of_a_teacher_than_kl_to_a_certain_one() -> None:
    """A teacher that is certain of the true token makes forward KL the cross-entropy."""
    hidden, head, *_ = states()
    certain = 1000 * F.one_hot(labels(), VOCABULARY).double(), torch.eye(VOCABULARY, dtype=torch.float64)
    ce, kl = chunked_ce(hidden, head, labels(), chunk=8), chunked_kl(hidden, head, *certain, chunk=8)
    torch.testing.assert_close(ce, kl, rtol=1e-10, atol=0)


@pytest.mark.parametrize("name", BOTH)
def test_frozen_head_gets_no_gradient(name: str) -> None:
    hidden, head, *teacher = states()
    chunked, rest = BOTH[name][0], compared(name, teacher)
    expected = torch.autograd.grad(chunked(hidden, head, *rest), hidden)[0]
    frozen = head.detach()
    loss = chunked(hidden, frozen, *rest, chunk=8)
    loss.backward()
    assert frozen.grad is None
    torch.testing.assert_close(hidden.grad, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", BOTH)
def test_accumulation_with_the_global_normaliser(name: str) -> None:
    """Parts of a batch, each divided by the whole count, add up to the loss of the whole."""
    hidden, head, *teacher = states()
    chunked, rest = BOTH[name][0], compared(name, teacher)
    whole_loss = chunked(hidden, head, *rest)
    whole = torch.autograd.grad(whole_loss, head)[0]
    total, loss = torch.zeros_like(whole), torch.zeros_like(whole_loss)
    for rows in (slice(0, 3), slice(3, 20), slice(20, TOKENS)):
        part = chunked(hidden[rows], head, rest[0][rows], *rest[1:], normaliser=TOKENS)
        total += torch.autograd.grad(part, head)[0]
        loss += part.detach()
    torch.testing.assert_close(total, whole, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(loss, whole_loss.detach(), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("chunked", [chunked_kl, chunked_jsd])
def test_equal_models_have_no_loss_and_no_gradient(chunked: Loss) -> None:
    hidden, head, _, _ = states(torch.float32)
    loss = chunked(hidden, head, hidden.detach(), head.detach(), chunk=8)
    loss.backward()
    assert loss.item() == pytest.approx(0, abs=1e-7)
    assert hidden.grad is not None and hidden.grad.abs().max() < 1e-7


@pytest.mark.parametrize("name", BOTH)
def test_bfloat16_products_stay_close(name: str) -> None:
    hidden, head, *teacher = states(torch.float32)
    chunked, rest = BOTH[name][0], compared(name, [teacher[0] * 0.3, teacher[1] * 0.3])
    exact = chunked(hidden * 0.3, head, *rest)
    rounded = chunked(hidden * 0.3, head, *rest, compute_dtype=torch.bfloat16)
    assert rounded.dtype == torch.float32
    assert rounded.item() == pytest.approx(exact.item(), rel=0.05)


@pytest.mark.parametrize("name", BOTH)
def test_logits_of_more_than_a_chunk_never_exist(name: str) -> None:
    """The largest tensor made anywhere in forward and backward is a chunk of logits or a head."""
    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            largest = max([largest, *(tensor.numel() for tensor in tree_leaves(out) if isinstance(tensor, Tensor))])
            return out

    hidden, head, *teacher = states(torch.float32)
    rest = compared(name, teacher)
    with Watch():
        BOTH[name][0](hidden, head, *rest, chunk=4).backward()
    assert largest <= max(4 * VOCABULARY, VOCABULARY * TEACHER_HIDDEN) < TOKENS * VOCABULARY


class PeakMemory(TorchDispatchMode):
    """Bytes of the storages made within it that live at once, at most."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.alive: dict[int, Any] = {}
        self.outside: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        given = {storage._cdata for storage in self._storages((args, kwargs))}
        self.outside |= given - self.alive.keys()
        out = func(*args, **(kwargs or {}))
        for storage in self._storages(out):
            if storage._cdata not in self.outside | self.alive.keys():
                self._count(storage)
        return out

    def _storages(self, tree: Any) -> list[torch.UntypedStorage]:
        return [leaf.untyped_storage() for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()

        def end(_: Any) -> None:
            self.now -= size
            del self.alive[key]

        self.alive[key] = weakref.ref(storage, end)
        self.now += size
        self.peak = max(self.peak, self.now)


def test_the_memory_is_counted_rightly() -> None:
    before = torch.ones(1000)
    with PeakMemory() as memory:
        a = before[:100] * 2
        b = a.view(10, 10) + 1
        del a
        c = b * b
    assert (memory.now, memory.peak) == (800, 800) and len(c) == 10


@pytest.mark.parametrize("name", ["kl", "jsd", "ce"])
def test_peak_memory_is_a_quarter_of_dense_at_the_size_of_a_real_vocabulary(name: str) -> None:
    """2048 tokens x 49,152 words and the hidden size of SmolLM2-135M, forward and backward, without a fused kernel."""
    tokens, vocabulary, size = 2048, 49_152, 576
    peaks = []
    for loss in BOTH[name]:
        with FakeTensorMode():  # shapes and storages, but no numbers
            hidden, head = (torch.empty(rows, size, requires_grad=True) for rows in (tokens, vocabulary))
            teacher = [torch.empty(rows, size) for rows in (tokens, vocabulary)]
            rest = [torch.empty(tokens, dtype=torch.long)] if name == "ce" else teacher
            weights = torch.ones(tokens)
            with PeakMemory() as memory:
                arguments = {"normaliser": tokens} if loss is BOTH[name][0] else {}
                loss(hidden, head, *rest, weights=weights, **arguments).backward()
        peaks.append(memory.peak)
    chunked, dense = peaks
    assert dense > 3 * tokens * vocabulary * 4
    assert chunked <= 0.25 * dense


def test_causal_shift_and_padding() -> None:
    tokens = torch.tensor([[5, 6, 7, 0], [8, 9, 0, 0]])
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0]], dtype=torch.bool)
    assert predicting_positions(tokens, mask).tolist() == [5, 6, 8]
    assert next_tokens(tokens, mask).tolist() == [6, 7, 9]
    assert predicting_positions(tokens).tolist() == [5, 6, 7, 8, 9, 0]
    assert next_tokens(tokens).tolist() == [6, 7, 0, 9, 0, 0]
    assert predicting_mask(tokens, mask).tolist() == [[True, True, False, False], [True, False, False, False]]
    assert predicting_mask(tokens).tolist() == [[True, True, True, False]] * 2


def test_token_statistics_equal_dense() -> None:
    hidden, head, teacher_hidden, teacher_head = states()
    truth = labels()
    values = token_statistics(hidden, head, teacher_hidden, teacher_head, truth, chunk=8)
    assert values.shape == (TOKENS, 4)
    kl, student_ce, teacher_ce, agreement = values.sum(0).tolist()
    student_logits, teacher_logits = hidden @ head.T, teacher_hidden @ teacher_head.T
    dense = dense_kl(hidden, head, teacher_hidden, teacher_head, torch.ones(TOKENS, dtype=torch.float64))
    assert kl == pytest.approx(dense.item() * TOKENS, rel=1e-10)
    cross_entropy = F.cross_entropy
    assert student_ce == pytest.approx(cross_entropy(student_logits, truth, reduction="sum").item(), rel=1e-10)
    assert teacher_ce == pytest.approx(cross_entropy(teacher_logits, truth, reduction="sum").item(), rel=1e-10)
    assert agreement == (student_logits.argmax(-1) == teacher_logits.argmax(-1)).sum().item()
